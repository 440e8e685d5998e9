"""Documents -> packed token blocks on disk.

Documents follow one another, a separator between two, and are cut into full blocks: <s> tokens </s>. Nothing is
padded (RoBERTa's FULL-SENTENCES), so attention needs no mask and every step has the same shape.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from distilcb.data.blocks import TOKEN_COUNTS, Description, is_prepared, read_description
from distilcb.data.corpus import Damage, Source, find_sources, kind_of, read_documents
from distilcb.data.tokenizer import TextTokenizer, Vocabulary
from distilcb.errors import ConfigError, DataError, writing
from distilcb.hub import HubDataset

log = logging.getLogger(__name__)

# Documents tokenized in one call, so that the Rust tokenizer can use several threads.
_BATCH_DOCUMENTS = 512
# Blocks in one Arrow record batch.
_BATCH_BLOCKS = 1024


def prepare(
    names: Sequence[str],
    *,
    tokenizer: TextTokenizer,
    output: Path,
    seq_len: int,
    text_field: str = "text",
    show_progress: bool = False,
) -> Description:
    """Write the blocks of the named text to `output`, whole or not at all.

    A folder that already holds the blocks of the same content is left as it is.

    Raises:
        DataError: text that cannot be read or fills no block; an output that holds something else.
        ConfigError: blocks too short to mask a token of.
    """
    if seq_len < 8:
        raise ConfigError(f"seq_len={seq_len} tokens: a block needs 8 or more, separators included.")
    sources = find_sources(names)
    content = content_key(sources, tokenizer=tokenizer, seq_len=seq_len, text_field=text_field)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if is_prepared(output) and read_description(output).content == content:
            return read_description(output)
        raise DataError(f"{output} is there and holds something else. Name another folder, or move it aside.")
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex}.tmp"
    with writing(output, DataError, "Name a folder that can be written to."):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()  # not mkdtemp, whose folders are closed to other users
    try:
        damage = Damage()
        facts: list[dict[str, Any]] = []
        documents = _all_documents(sources, text_field, damage, facts, show_progress)
        packer = _Packer(tokenizer.vocabulary, seq_len)
        with closing(_Writer(temporary, tokenizer.vocabulary, seq_len)) as writer:
            for batch in _batches(documents, _BATCH_DOCUMENTS):
                writer.write(packer.add(tokenizer.encode(batch)))
        if not writer.blocks:
            raise DataError(
                f"{', '.join(names)}: {packer.documents} documents with {packer.tokens} tokens fill no block of "
                f"{seq_len} tokens. Give more text, or a smaller seq_len."
            )
        description = Description(
            blocks=writer.blocks,
            seq_len=seq_len,
            vocab_size=tokenizer.vocabulary.size,
            tokenizer=str(tokenizer.folder),
            tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
            documents=packer.documents,
            tokens=writer.blocks * seq_len,
            dropped={"tokens_at_the_end": packer.pending, "blocks_of_special_tokens": packer.dropped_blocks},
            damage=asdict(damage),
            sources=facts,
            options={"text_field": text_field},
            files=[writer.path.name],
            content=content,
            versions=_versions(),
        )
        _warn_of_damage(names, damage, packer.documents)
        np.save(temporary / TOKEN_COUNTS, writer.token_counts)
        description.write(temporary)
        if output.is_dir():
            output.rmdir()  # it was empty: rename needs the name free
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def prepare_cached(
    names: Sequence[str],
    *,
    tokenizer: TextTokenizer,
    cache: Path,
    seq_len: int,
    text_field: str,
    show_progress: bool = False,
) -> Path:
    """The folder of blocks for `names`: themselves if they are one prepared folder, else prepared once and cached.

    The cache goes by content: the bytes of the text, the tokenizer and the options. Every rank may call it; a file
    lock lets one work while the others wait, on one node or on a shared file system.
    """
    if prepared := prepared_folder(names):
        return prepared
    content = content_key(find_sources(names), tokenizer=tokenizer, seq_len=seq_len, text_field=text_field)
    output = cache / "blocks" / content[:32]
    with writing(output.parent, DataError, "Give a --data.cache that can be written to."):
        output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{output}.lock"):
        for left in output.parent.glob(f".{output.name}.*.tmp"):  # by a start that was killed: nobody else is here
            shutil.rmtree(left, ignore_errors=True)
        prepare(
            names,
            tokenizer=tokenizer,
            output=output,
            seq_len=seq_len,
            text_field=text_field,
            show_progress=show_progress,
        )
    return output


def prepared_folder(names: Sequence[str]) -> Path | None:
    """The folder of blocks that `names` stand for, where they are one."""
    if len(names) != 1:
        return None
    try:
        path = Path(names[0]).expanduser()
        return path if is_prepared(path) else None
    except (OSError, RuntimeError):  # find_sources says what is wrong with it
        return None


def content_key(sources: Sequence[Source], *, tokenizer: TextTokenizer, seq_len: int, text_field: str) -> str:
    """A hash of all that decides what the blocks hold.

    Raises:
        DataError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    facts = [1, tokenizer.vocabulary.fingerprint, seq_len, text_field, [kind_of(source) for source in sources]]
    digest.update(json.dumps(facts).encode())
    for source in sources:
        digest.update(_content(source))
    return digest.hexdigest()


def _content(source: Source) -> bytes:
    """What tells a source's content from another's: a hash of a file's bytes, the fingerprint of a data set."""
    if isinstance(source, HubDataset):
        return f"{source} {source.load()._fingerprint}".encode()
    try:
        with source.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _warn_of_damage(names: Sequence[str], damage: Damage, documents: int) -> None:
    if damage.undecodable_documents:
        log.warning(
            "%s: %d of %d documents are not UTF-8; what could not be read became U+FFFD. If the text is in another "
            "encoding convert it first, as with iconv -f latin1 -t utf-8",
            *(", ".join(names), damage.undecodable_documents, documents),
        )
    if damage.control_characters:
        log.warning("%s: %d control characters became spaces", ", ".join(names), damage.control_characters)


class _Packer:
    """Joins documents and cuts them into blocks; keeps the rest for the next call."""

    def __init__(self, vocabulary: Vocabulary, seq_len: int) -> None:
        self.vocabulary, self.seq_len = vocabulary, seq_len
        self.documents = self.tokens = self.dropped_blocks = 0
        self._rest: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._special = np.zeros(vocabulary.size, dtype=bool)
        self._special[vocabulary.special_ids] = True

    @property
    def pending(self) -> int:
        """Tokens that do not fill a block yet."""
        return int(self._rest.size)

    def add(self, documents: Iterable[list[int]]) -> NDArray[np.int64]:
        """(blocks, seq_len) int64: the blocks that these documents complete."""
        parts = [self._rest]
        for ids in documents:
            if ids:
                self.documents += 1
                self.tokens += len(ids)
                parts += [np.asarray(ids, dtype=np.int64), np.array([self.vocabulary.eos_id])]
        stream = np.concatenate(parts)
        inner = self.seq_len - 2
        count = stream.size // inner
        self._rest = stream[count * inner :]
        blocks = np.empty((count, self.seq_len), dtype=np.int64)
        blocks[:, 0], blocks[:, -1] = self.vocabulary.bos_id, self.vocabulary.eos_id
        blocks[:, 1:-1] = stream[: count * inner].reshape(count, inner)
        # A mask takes up to half of a block's tokens, and none that is special: a block of <unk> could not give them.
        usable = (~self._special[blocks]).sum(1) >= inner // 2 + 1
        self.dropped_blocks += int(count - usable.sum())
        return blocks[usable]


class _Writer:
    """Writes blocks to one Arrow file and counts their tokens."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, seq_len: int) -> None:
        import pyarrow

        self.path = folder / "blocks-00000.arrow"
        self.blocks = 0
        self.token_counts = np.zeros(vocabulary.size, dtype=np.int64)
        self._dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
        self._type = pyarrow.list_(pyarrow.from_numpy_dtype(self._dtype), seq_len)
        self._file = pyarrow.OSFile(str(self.path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, pyarrow.schema([("input_ids", self._type)]))

    def write(self, blocks: NDArray[np.int64]) -> None:
        """Append (blocks, seq_len) token ids to the file, and count them."""
        import pyarrow

        self.token_counts += np.bincount(blocks.ravel(), minlength=self.token_counts.size)
        self.blocks += len(blocks)
        for start in range(0, len(blocks), _BATCH_BLOCKS):
            values = pyarrow.array(blocks[start : start + _BATCH_BLOCKS].astype(self._dtype).ravel())
            lists = pyarrow.FixedSizeListArray.from_arrays(values, type=self._type)
            self._stream.write_batch(pyarrow.record_batch([lists], names=["input_ids"]))

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())


def _all_documents(
    sources: Sequence[Source], text_field: str, damage: Damage, facts: list[dict[str, Any]], show_progress: bool
) -> Iterator[str]:
    """Every document of every source; what was read of each is appended to `facts`."""
    with tqdm(unit=" documents", disable=not show_progress, desc="preparing", unit_scale=True) as bar:
        for source in sources:
            documents = characters = 0
            for document in read_documents(source, text_field=text_field, damage=damage):
                documents += 1
                characters += len(document)
                bar.update()
                yield document
            size = source.stat().st_size if isinstance(source, Path) else None
            facts.append({"path": str(source), "bytes": size, "documents": documents, "characters": characters})


def _batches(documents: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(documents, size)):
        yield batch


def _versions() -> dict[str, str]:
    import datasets
    import transformers

    import distilcb

    return {
        "distilcb": distilcb.__version__,
        "datasets": datasets.__version__,
        "transformers": transformers.__version__,
    }
