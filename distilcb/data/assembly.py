"""All parts are made: one folder of them, with description and report."""

import logging
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from distilcb.data.blocks import TOKEN_COUNTS, Description
from distilcb.data.damage import Damage
from distilcb.data.data_report import DataReport, write_report
from distilcb.data.packing import ON_FULL_DISK, PartFacts, sum_of_arrays
from distilcb.data.request import ChangedError, How, Plan
from distilcb.data.tables import Source
from distilcb.data.working_folder import made_before, wait_until_seen
from distilcb.durability import sync
from distilcb.errors import DataError, first_line, writing

log = logging.getLogger(__name__)

# In one warning; each has had one of its own when it was read.
_NAMED_FILES = 20


@dataclass(frozen=True)
class Assembly:
    """All parts are made: one folder of them."""

    plan: Plan
    how: How
    content: str
    folder: Path
    facts: list[PartFacts]

    def finish(self, output: Path, *, seconds: float) -> None:
        """Give the blocks their names, description and report, and the folder its place.

        Raises:
            DataError: a source has changed meanwhile, there is too little text, or the disk is full.
        """
        try:
            self.plan.check_unchanged(self.content, self.how)
        except ChangedError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        except OSError as error:
            raise DataError(f"{first_line(error)}. The same command goes on once it can be read again.") from error
        facts, vocabulary = self.facts, self.how.tokenizer.vocabulary
        if not self._sum("blocks"):
            shutil.rmtree(self.folder, ignore_errors=True)
            short = self._sum("short_documents")
            left_out = f" {short:,} documents are shorter than min_characters." if short else ""
            raise DataError(
                f"{', '.join(self.plan.names)}: {self._sum('documents')} documents with {self._sum('tokens')} tokens "
                f"fill no block of {self.how.seq_len} tokens. Give more text, or a smaller seq_len.{left_out}"
            )
        if made_before(output, self.content):  # or other text or options have taken the name meanwhile: DataError
            return
        assembled = self.folder / "assembled"
        shutil.rmtree(assembled, ignore_errors=True)  # of a start that was killed here
        with writing(output, DataError, ON_FULL_DISK):
            assembled.mkdir()
            files: list[str] = []
            for part in facts:
                if part.blocks:
                    files.append(f"blocks-{len(files):05d}.arrow")
                    _link(self.folder / f"{part.name}.arrow", assembled / files[-1])
            token_counts, lengths = sum_of_arrays(self.folder, [each.name for each in facts], vocabulary.size)
            np.save(assembled / TOKEN_COUNTS, token_counts)
            description = self._description(files)
            description.write(assembled)
            report = DataReport.of(description, facts, token_counts, lengths, self.how.tokenizer, seconds=seconds)
            write_report(report, assembled)
            self._warn_of_damage(description)
            for path in (*assembled.iterdir(), assembled):
                sync(path)
            if made_before(output, self.content):  # where parts had to be copied, that was long ago
                return
            if output.is_dir():
                output.rmdir()  # it was empty: rename needs the name free
            assembled.rename(output)
            sync(output.parent)  # before the parts are deleted
        shutil.rmtree(self.folder, ignore_errors=True)

    def _description(self, files: list[str]) -> Description:
        blocks = self._sum("blocks")
        tokenizer, seq_len = self.how.tokenizer, self.how.seq_len
        left_out = {"short_documents": self._sum("short_documents")} if self.how.min_characters else {}
        if self.how.drop_duplicates:
            left_out["duplicate_documents"] = self._sum("duplicate_documents")
        return Description(
            blocks=blocks,
            seq_len=seq_len,
            vocab_size=tokenizer.vocabulary.size,
            tokenizer=str(tokenizer.folder),
            tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
            documents=self._sum("documents"),
            tokens=blocks * seq_len,
            dropped={
                "tokens_at_the_end": self._sum("pending"),
                "blocks_of_special_tokens": self._sum("dropped_blocks"),
            }
            | left_out,
            damage=self._damage(),
            sources=[self._source(number, source) for number, source in enumerate(self.plan.sources)],
            options=self.how.described(),
            files=files,
            content=self.content,
            versions=_versions(),
        )

    def _source(self, number: int, source: Source) -> dict[str, Any]:
        read = [each.read[number] for each in self.facts if number in each.read]
        size = source.stat().st_size if isinstance(source, Path) else None
        documents, characters = (sum(tally[which] for tally in read) for which in (0, 1))
        return {"path": str(source), "bytes": size, "documents": documents, "characters": characters}

    def _sum(self, name: str) -> int:
        return sum(getattr(each, name) for each in self.facts)

    def _damage(self) -> dict[str, int]:
        """What was survived; the newer counts where they are not zero."""
        names = [each.name for each in fields(Damage) if each.name != "damaged"]
        names.append("damaged_files")  # as parts of an older version count them
        counts = {name: sum(part.damage.get(name, 0) for part in self.facts) for name in names}
        counts["damaged_files"] += len(self._damaged())
        return {name: count for name, count in counts.items() if count or not name.startswith("damaged_")}

    def _damaged(self) -> list[str]:
        """Names of the files that are."""
        return sorted({file for part in self.facts for file in part.damage.get("damaged", [])})

    def _warn_of_damage(self, made: Description) -> None:
        names, damage = ", ".join(self.plan.names), made.damage
        if damage["undecodable_documents"]:
            log.warning(
                "%s: %d of %d documents are not UTF-8; what could not be read became U+FFFD. If the text is in another "
                "encoding convert it first, as with iconv -f latin1 -t utf-8",
                *(names, damage["undecodable_documents"], made.documents),
            )
        if files := damage.get("damaged_files"):
            names_of_files = self._damaged()  # fewer than there are, where parts are of an older version
            told = names_of_files[:_NAMED_FILES] + (["..."] if files > min(len(names_of_files), _NAMED_FILES) else [])
            log.warning("skipped what %d damaged file(s) held after the damage showed: %s", files, ", ".join(told))
        if records := damage.get("damaged_records"):
            log.warning("%s: skipped %d record(s) that are no JSON", names, records)
        if damage["control_characters"]:
            log.warning("%s: %d control characters became spaces", names, damage["control_characters"])


def _link(path: Path, target: Path) -> None:
    """The file under another name as well, or a copy of it; it may take a while to be seen from here."""
    wait_until_seen(path)
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has links
        shutil.copyfile(path, target)


def _versions() -> dict[str, str]:
    import datasets
    import transformers

    import distilcb

    return {
        "distilcb": distilcb.__version__,
        "datasets": datasets.__version__,
        "transformers": transformers.__version__,
    }
