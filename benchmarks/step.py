"""A whole micro-step, teacher and student and update, beside the loop of the first Distil* scripts.

python benchmarks/step.py [--quick] [--json FILE] [--report FILE] [--cases real,mini] [--profile FILE] [SETTINGS]

Each contender takes optimizer steps of a few micro-batches in turn. Tokens are real ones: padding counts for nothing.
benchmarks/original_loop.py says what the baseline is. The share of a matrix product is that of the rate at which this
device multiplies (tokens, 768) x (768, 3072) in the same precision, in the same run.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from original_loop import OriginalLoop, padded_batches
from side_by_side import in_turn, parser_of, peak_bytes, table, tell
from torch import Tensor
from transformers import CamembertConfig, CamembertForMaskedLM

from distilcb import distributed
from distilcb.command_line import number, parse_command_line
from distilcb.config import DEFAULT_RECIPE, REPOSITORY, Config
from distilcb.data.blocks import RandomBlocks
from distilcb.data.loader import Batch, training_batches
from distilcb.data.tokenizer import TextTokenizer
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.errors import ConfigError
from distilcb.losses.triplet import coefficients
from distilcb.models.families import Family
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.monitor.metrics import ModelShape, flops_per_token
from distilcb.train.build import Place, take_place, wire_stepper
from distilcb.train.models import Models, use_fast_layers

MINI_TEXT = DEFAULT_RECIPE.parent / "mini" / "text" / "train"
# Sizes of almanach/camembert-base and of the shipped teacher.
REAL = {"vocab_size": 32_005, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
MINI = {"vocab_size": 8_005, "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4}
LAYERS = 12
CASES = ("real", "real_128", "real_512", "mini", "first")
# Tokens of the shortest sequence that the first scripts keep.
SHORTEST = 12
PLAIN = "original loop, fp32"
SENTENCES, DOCUMENTS = f"{PLAIN}, padded sentences", f"{PLAIN}, padded documents"
# What the others are compared with, and the names of the ratios.
BASELINES = {PLAIN: "original", SENTENCES: "padded_original", DOCUMENTS: "original_on_documents"}


@dataclass(frozen=True)
class Case:
    """Sizes of the models and of a step."""

    name: str
    sizes: dict[str, int]
    length: int
    micro_batch: int
    accumulation: int

    @property
    def sequences(self) -> int:
        return self.micro_batch * self.accumulation


def cases(names: str, *, on_cuda: bool, quick: bool) -> list[Case]:
    """What is measured here: as much as a step of seconds holds."""
    if on_cuda:
        real = [Case("real", REAL, 128, 96, 4), Case("real", REAL, 512, 24, 4)]
        mini = [Case("mini", MINI, 128, 128, 4)]
    elif quick:
        real, mini = [Case("real", REAL, 128, 2, 1), Case("real", REAL, 512, 1, 1)], [Case("mini", MINI, 128, 8, 2)]
    else:
        real = [Case("real", REAL, 128, 16, 1), Case("real", REAL, 512, 4, 1)]
        mini = [Case("mini", MINI, 128, 16, 2)]
    # What the first scripts were measured at: 98.5 tokens/s on one core (OMP_NUM_THREADS=1).
    chosen = {"real": real, "mini": mini, "first": [Case("real", REAL, 51, 5, 1)]}
    chosen |= {f"real_{length}": [case for case in real if case.length == length] for length in (128, 512)}
    assert chosen.keys() == set(CASES)
    return [case for name in names.split(",") for case in chosen[name]]


class Ours:
    """The stepper of training, on random words."""

    def __init__(self, case: Case, config: Config, place: Place, models: Models) -> None:
        size = case.sequences * place.world.size
        optim = replace(config.optim, global_batch=size, micro_batch=case.micro_batch)
        config = replace(config, optim=optim, data=replace(config.data, seq_len=case.length))
        blocks = RandomBlocks(models.tokenizer.vocabulary, seq_len=case.length, blocks=64 * size)
        self.engine, self.stepper, micro_batches, self.counts = wire_stepper(config, place, models, blocks)
        self.batches: Iterator[Batch] = training_batches(
            micro_batches, first_step=0, last_step=100_000, workers=1, pin_memory=place.device.type == "cuda"
        )
        self.steps, self.tokens = 0, size * case.length

    def learn_at(self, kl_positions: str) -> None:
        """Take kl there from now on."""
        loss = replace(self.stepper.loss, kl_positions=kl_positions)
        self.stepper.loss = self.engine.module.loss = loss
        self.stepper.coefficients = coefficients(loss, self.counts, world_size=self.stepper.cut.world_size)

    def step(self, *, kl_positions: str = "attended") -> tuple[int, int]:
        """One optimizer step, whose losses are not read; its tokens, none of them padding."""
        self.learn_at(kl_positions)
        self.stepper.step(self.steps, self.batches)
        self.steps += 1
        return self.tokens, self.tokens


@dataclass(frozen=True)
class Session:
    """What the benchmarks of a step are asked for, and the ranks that take it."""

    options: argparse.Namespace
    config: Config
    place: Place
    rounds: int
    cases: list[Case]
    figures: dict[str, Any]

    def end(self, title: str, parts: list[str], command: str) -> None:
        """Tell the cases' tables on rank zero, and part."""
        if self.place.world.is_main:
            tell(title, "\n\n".join(parts), self.figures, self.options, command)
        distributed.stop()


def begin(parser: argparse.ArgumentParser, words: list[str], *, names: str, rounds: int, quick: int) -> Session:
    """Read a command line of options and settings, and meet the other ranks.

    Args:
        names: the cases, where none are named; with --quick mini alone, which takes under a minute.
        rounds: of a measurement, where no number is given; quick: with --quick.
    """
    parser.add_argument("--cases", help=f"of {', '.join(CASES)} (default: {names}, with --quick mini)")
    parser.add_argument("--rounds", type=number(1), help=f"turns of each (default: {rounds}, with --quick {quick})")
    parser.add_argument("--local_rank", help="set by launchers")
    options, settings = parser.parse_known_args(words)
    options.cases = options.cases or ("mini" if options.quick else names)
    if unknown := [name for name in options.cases.split(",") if name not in CASES]:
        raise ConfigError(f"--cases {', '.join(unknown)}: there are {', '.join(CASES)}.")
    command = parse_command_line([*recipe_words(), *settings])
    place = take_place(command)
    return Session(
        options,
        command.config,
        place,
        options.rounds or (quick if options.quick else rounds),
        cases(options.cases, on_cuda=place.device.type == "cuda", quick=options.quick),
        {"precision": place.precision, "ranks": place.world.size},
    )


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--profile", type=Path, help="write a trace of one step of ours there, for chrome://tracing")
    session = begin(parser, words, names="real,mini", rounds=5, quick=1)
    parts = [measure(case, session) for case in session.cases]
    session.end("One step", parts, "python benchmarks/step.py " + " ".join(words))


def recipe_words() -> list[str]:
    """CamemBERT's recipe, for any number of ranks: every case takes fewer sequences than it does."""
    recipe = REPOSITORY / "recipes" / "distilcamembert.yaml"
    return ["--recipe", str(recipe), "--data.train", "none", "--optim.micro_batch", "1"]


@dataclass
class Contender:
    """A step that takes its turns, and the tokens of each turn so far: real ones, and with padding."""

    turn: Callable[[], tuple[int, int]]
    masked_only: bool = False
    length: int | None = None
    tokens: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self) -> None:
        self.tokens.append(self.turn())

    def speeds(self, seconds: Sequence[float]) -> list[float]:
        """Real tokens a second of each turn that took so long; one before them warmed up."""
        real = [count for count, _ in self.tokens[1 : len(seconds) + 1]]
        return [count / each for count, each in zip(real, seconds, strict=True)]

    @property
    def padding(self) -> float:
        """Share of what is computed."""
        return 1 - sum(real for real, _ in self.tokens) / sum(shown for _, shown in self.tokens)


def measure(case: Case, session: Session) -> str:
    """All contenders of a case in turn, as Markdown."""
    place, rounds, profile = session.place, session.rounds, session.options.profile
    contenders = contenders_of(case, session.config, place)
    product, flops = _product(case, DTYPES[place.precision], place.device)
    seconds = in_turn({**contenders, "product": product}, rounds=rounds)
    rate = flops / statistics.median(seconds["product"])
    memory = {name: peak_bytes(contender) for name, contender in contenders.items()}
    if profile:
        _profile(contenders["ours"], profile.with_stem(f"{profile.stem}_{case.name}_{case.length}"))
    turns = {name: each.speeds(seconds[name]) for name, each in contenders.items()}
    rows = []
    for name, each in contenders.items():
        speed = statistics.median(turns[name])
        share = speed * _flops(case, each) / rate
        over = {base: _over(turns[name], turns[base]) for base in BASELINES}
        session.figures[f"{case.name}, length {case.length}: {name}"] = {
            "tokens_per_second": speed,
            **{f"speed_over_{key}": over[base] for base, key in BASELINES.items()},
            "share_of_product_rate": share,
            "peak_bytes": memory[name],
            "padding_share": each.padding,
        }
        ratios = [f"{over[base]:.2f}" for base in BASELINES]
        rows.append(
            (name, f"{speed:,.0f}", *ratios, f"{share:.0%}", f"{memory[name] / 1e6:,.0f}", f"{each.padding:.0%}")
        )
    head = ["", "tokens/s", "original, fp32 = 1", "of sentences = 1", "of documents = 1", "of a product's rate"]
    head += ["peak MB beyond the models", "padding"]
    sentences, documents = (contenders[name].length for name in (SENTENCES, DOCUMENTS))
    return (
        f"## {case.name} size: hidden {case.sizes['hidden_size']}, vocabulary {case.sizes['vocab_size']:,}, length "
        f"{case.length}\n\n{LAYERS} to {LAYERS // 2} layers, {case.accumulation} micro-batch(es) of {case.micro_batch} "
        f"sequences a step, ours in {place.precision}; medians of {rounds} in turn, ratios taken turn by turn. Padded "
        f"batches hold about as many tokens, in sentences of {sentences} or pieces of documents of {documents} on "
        f"average. A product runs at {rate / 1e12:.2f} TFLOP/s.\n\n" + table(head, rows)
    )


def _over(speeds: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios turn by turn: what slows this machine for a while slows both."""
    return statistics.median(each / other for each, other in zip(speeds, base, strict=True))


def random_models(case: Case, config: Config) -> tuple[Any, Any, Family, TextTokenizer]:
    """Teacher and student in fp32 on the CPU, the same at every call, and the shipped tokenizer."""
    teacher = teacher_of(case.sizes)
    tokenizer = TextTokenizer(str(DEFAULT_RECIPE.parent / "mini" / "teacher"))
    vocab = tokenizer.vocabulary.size
    student, family = build_student(config.student, teacher=teacher, vocab_size=vocab, seed=config.train.seed)
    return teacher, student, family, tokenizer


def teacher_of(sizes: dict[str, int]) -> CamembertForMaskedLM:
    """A CamemBERT of 12 layers with random weights, the same at every call."""
    torch.manual_seed(0)
    shape = {"max_position_embeddings": 514, "type_vocab_size": 1, "num_hidden_layers": LAYERS, "pad_token_id": 1}
    return CamembertForMaskedLM(CamembertConfig(**sizes, **shape))


def contenders_of(case: Case, config: Config, place: Place) -> dict[str, Contender]:
    """The original loop in its variants, and ours, on models of the same random weights."""
    device, half = place.device, DTYPES[place.precision]
    teacher, student, family, tokenizer = random_models(case, config)

    def original(dtype: torch.dtype, *, masked_only: bool = False) -> OriginalLoop:
        return OriginalLoop(teacher, student, device=device, dtype=dtype, masked_only=masked_only)

    def batches(lengths: list[int], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return padded_batches(lengths, size=size, vocab=case.sizes["vocab_size"], seed=0)

    full = batches([case.length] * 4096, case.micro_batch)
    plain = original(torch.float32)

    def padded(lines: list[str]) -> Contender:
        """As many sequences to a micro-batch as have about its tokens."""
        lengths = sequence_lengths(tokenizer, lines, case.length)
        mean = statistics.mean(lengths)
        rows = max(1, round(case.micro_batch * case.length / mean))
        # Repeated, so that each bin of lengths fills some batches.
        return Contender(_turn(plain, batches(lengths * rows, rows), case.accumulation), length=round(mean))

    documents = shipped_documents()
    sentences = [sentence for document in documents for sentence in re.split(r"(?<=[.!?])\s+", document)]
    on_masked = original(torch.float32, masked_only=True)
    found = {
        PLAIN: Contender(_turn(plain, full, case.accumulation)),
        SENTENCES: padded(sentences),
        DOCUMENTS: padded(documents),
        f"{PLAIN}, KL on masked": Contender(_turn(on_masked, full, case.accumulation), masked_only=True),
    }
    if half != torch.float32:
        found[f"original loop, {place.precision}"] = Contender(_turn(original(half), full, case.accumulation))
    models = Models(Teacher(teacher.to(device, half)), student, family, tokenizer)
    use_fast_layers(models, place, compiled=config.train.compile)  # the original loops have copies of their own
    ours = Ours(case, config, place, models)
    found["ours"] = Contender(ours.step)
    found["ours, KL on masked"] = Contender(lambda: ours.step(kl_positions="masked"), masked_only=True)
    return found


def _turn(
    loop: OriginalLoop, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: int
) -> Callable[[], tuple[int, int]]:
    def turn() -> tuple[int, int]:
        taken = list(islice(batches, micro_batches))
        loop.step(taken)
        return sum(int(lengths.sum()) for _, lengths in taken), sum(ids.numel() for ids, _ in taken)

    return turn


def shipped_documents() -> list[str]:
    """The lines of the shipped text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(MINI_TEXT.glob("*.txt")))
    return [line for line in text.splitlines() if line.strip()]


def sequence_lengths(tokenizer: TextTokenizer, lines: list[str], longest: int) -> list[int]:
    """Tokens of the sequences that the first scripts make of lines of text, two separators included in each.

    A sequence a line; lines too long are cut in pieces, and pieces of under 12 tokens left out.
    """
    pieces = []
    for ids in tokenizer.hugging_face(lines, add_special_tokens=False)["input_ids"]:
        whole, rest = divmod(len(ids), longest - 2)
        pieces += [longest] * whole + [rest + 2] * (rest > 0)
    return [length for length in pieces if length >= SHORTEST]


def _flops(case: Case, contender: Contender) -> float:
    def shape(layers: int) -> ModelShape:
        sizes = case.sizes
        return ModelShape(layers, sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"])

    share, length = 0.15 if contender.masked_only else 1.0, contender.length or case.length
    return flops_per_token(shape(LAYERS // 2), shape(LAYERS), seq_len=length, soft_share=share, head_share=share)


def _product(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], float]:
    """The feed-forward layer's product at the real size, with a micro-batch's rows, 20 times; its FLOP."""
    rows, hidden, inner = case.micro_batch * case.length, REAL["hidden_size"], REAL["intermediate_size"]
    left = torch.randn(rows, hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, inner, device=device, dtype=dtype)

    def product() -> None:
        for _ in range(20):
            left @ right

    return product, 20 * 2.0 * rows * hidden * inner


def _profile(step: Callable[[], Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as trace:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    text = trace.key_averages().table(sort_by=order, row_limit=40)
    path.with_suffix(".txt").write_text(text)


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
