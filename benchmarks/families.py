"""Every family of the Distil* literature in the small: a teacher is trained, then distilled by the family's recipe.

python benchmarks/families.py --text DATA [--families distilbert-uncased,distilgpt2] [--quick] [--json FILE]

For each family a tokenizer of its kind is trained on the text, then a teacher of four layers until it predicts words
well beyond their frequencies, then two students of two layers with its first weights: one by the recipe's objective,
one on the words alone, equally long. DATA has {fr,en,de}_{train,valid}.txt.xz. Each training is launch/train.py in a
folder of its own under --runs, so what is stopped goes on, and what is done is left alone.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import parser_of, table, tell

from distilcb import distributed
from distilcb.config import REPOSITORY, DataConfig, cache_folder
from distilcb.data.blocks import Blocks
from distilcb.data.corpus import read_documents
from distilcb.data.damage import Damage
from distilcb.data.prepare import prepare_cached
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import TrainingError

HEADS, LAYERS = 4, 4
TOKENS_A_STEP = 4096
_TOKENIZER_DOCUMENTS = 1500
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass(frozen=True)
class Kind:
    """What a family's teacher is made of. tokenizer: writes one of so many pieces for these documents into a folder."""

    model_type: str
    tokenizer: Callable[[Sequence[str], Path, int], None]
    languages: tuple[str, ...] = ("en",)
    more: tuple[tuple[str, Any], ...] = ()
    hidden: int = 64
    vocabulary: int = 1000
    positions: int | None = None  # None: those of seq_len

    @property
    def causal(self) -> bool:
        return self.model_type == "gpt2"

    @property
    def seq_len(self) -> int:
        """An encoder of this size learns nothing beyond frequencies for thousands of steps, but from short blocks."""
        return 32 if self.causal else 8


def word_pieces(documents: Sequence[str], folder: Path, size: int, *, lowercase: bool) -> None:
    """BERT's."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    made = BertWordPieceTokenizer(lowercase=lowercase)
    made.train_from_iterator(documents, vocab_size=size, special_tokens=BERT_WORDS, show_progress=False)
    BertTokenizer(vocab=made.get_vocab(), do_lower_case=lowercase).save_pretrained(folder)


def byte_pairs(documents: Sequence[str], folder: Path, size: int, *, causal: bool) -> None:
    """RoBERTa's and GPT-2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer, RobertaTokenizer

    special = ["<|endoftext|>"] if causal else ROBERTA_WORDS
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(documents, vocab_size=size, special_tokens=special, show_progress=False)
    facts = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in facts["merges"]]
    (GPT2Tokenizer if causal else RobertaTokenizer)(vocab=facts["vocab"], merges=merges).save_pretrained(folder)


def sentence_pieces(documents: Sequence[str], folder: Path, size: int) -> None:
    """XLM-RoBERTa's, as it lies on the hub: SentencePiece's own file."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=size,
        character_coverage=0.9995,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.vocab").unlink()


cased, uncased = partial(word_pieces, lowercase=False), partial(word_pieces, lowercase=True)
encoder_bytes, causal_bytes = partial(byte_pairs, causal=False), partial(byte_pairs, causal=True)
_ROBERTA = (("type_vocab_size", 1), ("layer_norm_eps", 1e-5), ("pad_token_id", 1))
_BERT = (("type_vocab_size", 2), ("pad_token_id", 0))
# By the name of the recipe.
KINDS = {
    "distilbert-uncased": Kind("bert", uncased, more=_BERT),
    "distilbert-cased": Kind("bert", cased, more=_BERT),
    "distilbert-german": Kind("bert", cased, ("de",), _BERT),
    "distilmbert": Kind("bert", cased, ("fr", "en", "de"), _BERT),
    "distilroberta": Kind("roberta", encoder_bytes, more=_ROBERTA),
    "distilgpt2": Kind("gpt2", causal_bytes, more=(("bos_token_id", 0), ("eos_token_id", 0))),
    "distilxlmr": Kind("xlm-roberta", sentence_pieces, ("fr", "en", "de"), _ROBERTA),
}


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--text", type=Path, required=True, help="folder of {fr,en,de}_{train,valid}.txt.xz")
    parser.add_argument("--families", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/families"))
    options = parser.parse_args(words)
    figures: dict[str, Any] = {}
    for name in options.families.split(","):
        figures[name] = one_family(name, KINDS[name], options)
    head = ["", "by frequency", "teacher", "kl, start", "recipe", "words alone", "class"]
    rows = [
        (
            name,
            *(f"{each[key]:.3f}" for key in ("frequency_loss", "teacher_loss", "kl_start", "kl_recipe", "kl_words")),
            each["class"],
        )
        for name, each in figures.items()
    ]
    text = (
        "Nats a word on held-out text: loss by the words' frequencies and of the teacher, then kl of its students.\n\n"
    )
    tell("Families in the small", text + table(head, rows), figures, options, "python benchmarks/families.py")


def one_family(name: str, kind: Kind, options: Any) -> dict[str, Any]:
    """Figures of one family; trains what is not trained yet."""
    home = options.runs / name
    shape = write_teacher_shape(name, kind, options.text, home / "shape")
    teacher_steps, steps = (100, 20) if options.quick else (700, 150)
    alone = {"clm" if kind.causal else "mlm": 1.0}
    text = text_and_steps(kind, options.text, kind.seq_len)
    new = [*untaught(shape), "--student.init", "random", "--student.num_layers", str(LAYERS)]
    teacher = run(name, home / "teacher", [*text, *new, *weights(alone)], teacher_steps, lr=4e-3)
    taught = [*text, "--teacher.model", str(teacher / "student"), "--student.num_layers", str(LAYERS // 2)]
    distilled = run(name, home / "recipe", taught, steps, lr=2e-3)
    on_words = run(name, home / "words", [*taught, *weights(alone)], steps, lr=2e-3)
    figures = {which: heldout(folder) for which, folder in (("recipe", distilled), ("words", on_words))}
    loss = "clm_loss" if kind.causal else "mlm_loss"
    return {
        "frequency_loss": frequency_loss(teacher / "student", kind, options.text),
        "teacher_loss": figures["recipe"]["teacher"][loss],
        "kl_start": figures["recipe"]["student_start"]["kl"],
        "kl_recipe": figures["recipe"]["student"]["kl"],
        "kl_words": figures["words"]["student"]["kl"],
        "agreement_recipe": figures["recipe"]["student"]["agreement"],
        "class": json.loads((distilled / "student" / "config.json").read_text())["architectures"][0],
        "student": str(distilled / "student"),
        "teacher": str(teacher / "student"),
    }


def text_and_steps(kind: Kind, text: Path, seq_len: int) -> list[str]:
    """Settings of a training on a kind's languages, in steps of TOKENS_A_STEP."""
    sequences = str(TOKENS_A_STEP // seq_len)
    return [
        *("--data.train", json.dumps([str(text / f"{each}_train.txt.xz") for each in kind.languages])),
        *("--data.heldout", json.dumps([str(text / f"{each}_valid.txt.xz") for each in kind.languages])),
        *("--data.seq_len", str(seq_len), "--data.workers", "0", "--data.fraction", "1"),
        *("--data.sample_sentences", "[]", "--masking.smoothing", "0", "--masking.rate", "0.2"),
        *("--optim.global_batch", sequences, "--optim.micro_batch", sequences, "--optim.clip", "1"),
        *("--train.eval_every", "0", "--train.save_every", "0", "--train.log_every", "100"),
        *("--train.eval_maskings", "2", "--student.dropout", "0", "--deepspeed", "zero2_cpu"),
    ]


def untaught(shape: Path) -> list[str]:
    """Settings of a training without a teacher, of a model as large as the one in this folder."""
    shaped = ["--student.config", str(shape / "config.json"), "--data.tokenizer", str(shape)]
    return [*shaped, "--teacher.model", "null", "--student.architecture", "null"]


def weights(terms: dict[str, float]) -> list[str]:
    """Settings that give these loss terms their weight, and none to any other."""
    every = dict.fromkeys(("kl", "mlm", "clm", "cos", "mse"), 0.0) | terms
    return [word for name, value in every.items() for word in (f"--loss.{name}", str(value))]


def run(name: str, folder: Path, settings: Sequence[str], steps: int, *, lr: float) -> Path:
    """launch/train.py with the family's recipe; returns its run folder."""
    words = ["--recipe", str(REPOSITORY / "recipes" / f"{name}.yaml"), "--run_dir", str(folder), *settings]
    words += ["--train.steps", str(steps), "--optim.lr", str(lr)]
    print(f"--- {folder}", flush=True)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "train.py"), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise TrainingError(f"{folder} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return folder


def heldout(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["heldout"]
    return found


def documents_of(kind: Kind, text: Path, part: str) -> Iterator[str]:
    for language in kind.languages:
        path = text / f"{language}_{part}.txt.xz"
        yield from islice(
            read_documents(path, text_field="text", damage=Damage()), _TOKENIZER_DOCUMENTS // len(kind.languages)
        )


def write_teacher_shape(name: str, kind: Kind, text: Path, folder: Path) -> Path:
    """A folder with tokenizer and config.json of the teacher; once."""
    from transformers import AutoConfig

    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind.tokenizer(list(documents_of(kind, text, "train")), folder, kind.vocabulary)
    more = dict(kind.more)
    sizes = {
        "hidden_size": kind.hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * kind.hidden,
        "max_position_embeddings": kind.positions or kind.seq_len + (2 if kind.more == _ROBERTA else 0),
        "vocab_size": kind.vocabulary,
    }
    config = AutoConfig.for_model(kind.model_type, **(sizes | more))
    config.save_pretrained(folder)
    size = TextTokenizer(str(folder)).vocabulary.size  # which for the small text may be less than what was asked for
    config.vocab_size = size
    config.save_pretrained(folder)
    return folder


def frequency_loss(model: Path, kind: Kind, text: Path) -> float:
    """Nats a word of the held-out text for one who knows how often each word stands in it, and nothing else."""
    tokenizer = TextTokenizer(str(model))
    names = [str(text / f"{each}_valid.txt.xz") for each in kind.languages]
    folder = prepare_cached(
        names, tokenizer=tokenizer, cache=cache_folder(DataConfig()), seq_len=kind.seq_len, text_field="text"
    )
    counts = Blocks(folder).token_counts.astype(np.float64)
    if not kind.causal:  # only words are masked
        counts[tokenizer.vocabulary.special_ids] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
