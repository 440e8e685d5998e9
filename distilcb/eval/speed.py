"""How large models are and how fast they answer, side by side: parameters, bytes, seconds a text, texts a second.

A model is run as its folder has it, head and all, on this machine's CPU in fp32; and where `launch/export.py --onnx`
has been there, as ONNX and in int8 too, by onnxruntime on the same threads. A GPU is left alone: times on it beside
these would be ratios of machines.
"""

import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distilcb.durability import write_durably
from distilcb.errors import DataError, ModelError, writing
from distilcb.eval.report import as_markdown as table
from distilcb.export.onnx import INT8, ONNX, OnnxModel
from distilcb.hub import model_folder
from distilcb.models.families import family_of
from distilcb.models.loading import load_any_model, load_config

log = logging.getLogger(__name__)

LENGTHS = (16, 128, 512)
_BATCHES = {1: 9, 32: 3}
"""texts at once -> rounds of which the median is taken"""
_FIRST_WORD = 10

Contender = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Timed:
    """What was measured of some models.

    Attributes:
        sizes: {model: what `sizes` gives}.
        seconds: {model, or "model, onnx" or "model, int8": {"batch x length": median seconds a call}}.
        beside: the model whose time is divided by each other's.
        lengths: tokens that were asked for, of which some may be more than a model has positions for.
    """

    sizes: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, Mapping[str, float]]
    beside: str
    lengths: Sequence[int]

    def of(self, shown: Mapping[str, str]) -> "Timed":
        """Some of the models under other names: {their name: another}, the one beside which they are among them."""
        seconds = {
            f"{other}{kind}": self.seconds[f"{name}{kind}"]
            for name, other in shown.items()
            for kind in ("", ", onnx", ", int8")
            if f"{name}{kind}" in self.seconds
        }
        sizes = {other: self.sizes[name] for name, other in shown.items()}
        return Timed(sizes, seconds, shown[self.beside], self.lengths)

    def as_markdown(self) -> str:
        """A table, and what it shows."""
        rows = speed_rows(self.sizes, self.seconds, beside=self.beside)
        done = {int(case.partition(" x ")[2]) for case in self.seconds[self.beside]}
        left_out = [str(length) for length in self.lengths if length not in done]
        page = (
            f"{table(rows)}\n\nfp32 but for int8, on a CPU with {torch.get_num_threads()} thread(s), each model with "
            f"the head of its folder; medians of calls in turn. Ratio: the time of {self.beside} over that of the row."
        )
        return page + (
            f" Not timed: {', '.join(left_out)} tokens, for which a model timed beside them has no positions."
            if left_out
            else ""
        )


def in_turn(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `rounds` calls, in which each contender has its turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            wait_for_device()
            started = time.perf_counter()
            contender()
            wait_for_device()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait_for_device() -> None:
    """Return when a GPU has done what it was given; one that was given nothing is left alone."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sizes(name: str) -> dict[str, Any]:
    """{"parameters", "in_layers", "bytes": {file: bytes}} of a model's folder."""
    model = load_any_model(name)
    folder = model_folder(name)
    layers = family_of(model.config, where=name).layers(model)
    files = [path for path in sorted([*folder.glob("*.safetensors"), *folder.glob("onnx/*.onnx*")]) if path.is_file()]
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "in_layers": sum(each.numel() for each in layers.parameters()),
        "bytes": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }


def check_lengths(models: Mapping[str, str], lengths: Sequence[int]) -> None:
    """Raises ModelError where one of the models, {name: folder or hub name}, has positions for none of the lengths."""
    fewest, most = _fewest_positions(models)
    if min(lengths) > most:
        raise ModelError(f"--lengths {min(lengths)}: {fewest} has positions for {most} tokens. Name a smaller one.")


def _fewest_positions(models: Mapping[str, str]) -> tuple[str, int]:
    """The model whose texts can be no longer than any other's, and their tokens."""
    configs = {name: load_config(model) for name, model in models.items()}
    positions = {name: family_of(config, where=name).max_seq_len(config) for name, config in configs.items()}
    fewest = min(positions, key=positions.__getitem__)
    return fewest, positions[fewest]


def time_models(models: Mapping[str, str], *, lengths: Sequence[int] = LENGTHS) -> Timed:
    """Sizes and speeds of models, {name: folder or hub name}, beside the first one."""
    sizes_of = {name: sizes(model) for name, model in models.items()}
    return Timed(sizes_of, speeds(models, lengths=lengths), next(iter(models)), lengths)


def speeds(
    models: Mapping[str, str], *, lengths: Sequence[int] = LENGTHS, batches: Mapping[int, int] | None = None
) -> dict[str, dict[str, float]]:
    """{"name" or "name, onnx" or "name, int8": {"batch x length": median seconds a call}}, all in turn.

    Lengths that a model has no positions for are left out for all.

    Args:
        models: what each is called -> folder or hub name.
        batches: texts at once -> rounds.

    """
    fewest, most = _fewest_positions(models)
    contenders = {each: call for name, model in models.items() for each, call in _contenders(name, model).items()}
    words = min(load_config(model).vocab_size for model in models.values())
    found: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for length in lengths:
        if length > most:
            log.info("no model is timed at %d tokens: %s has positions for %d", length, fewest, most)
            continue
        for batch, rounds in (batches or _BATCHES).items():
            ids = torch.randint(_FIRST_WORD, words, (batch, length), generator=torch.Generator().manual_seed(0))
            calls = {name: lambda call=call, ids=ids: call(ids) for name, call in contenders.items()}
            for name, seconds in in_turn(calls, rounds=rounds).items():
                found[name][f"{batch} x {length}"] = statistics.median(seconds)
            log.info("timed: %d x %d tokens", batch, length)
    return found


def _contenders(name: str, model: str) -> dict[str, Contender]:
    plain = load_any_model(model).eval()

    @torch.inference_mode()
    def answer(ids: torch.Tensor) -> Any:
        return plain(ids)

    found: dict[str, Contender] = {name: answer}
    for label, file in (("onnx", ONNX), ("int8", INT8)):
        path = Path(model_folder(model)) / file
        if path.is_file():
            found[f"{name}, {label}"] = OnnxModel(path, threads=torch.get_num_threads()).run
    return found


def speed_rows(
    sizes_of: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, Mapping[str, float]], *, beside: str
) -> list[list[str]]:
    """Header and a row a contender: parameters, megabytes, milliseconds a text alone, texts a second in batches.

    beside: the model whose time is divided by each other's.

    Raises:
        ModelError: `beside` is none of them.
    """
    if beside not in seconds:
        raise ModelError(f"{beside} is none of {', '.join(seconds)}.")
    cases = list(seconds[beside])
    rows = [["", "parameters", "MB", *(_title(case) for case in cases)]]
    for name, times in seconds.items():
        kind = next((each for each in ("onnx", "int8") if name not in sizes_of and name.endswith(f", {each}")), "")
        model = name.removesuffix(f", {kind}") if kind else name
        facts = sizes_of[model]
        files = {"": ".safetensors", "onnx": ONNX, "int8": INT8}
        held = sum(size for file, size in facts["bytes"].items() if files[kind] in file)
        parameters = f"{facts['parameters'] / 1e6:,.1f} M" if not kind else ""
        rows.append([name, parameters, f"{held / 1e6:,.1f}", *(_cell(times, seconds[beside], case) for case in cases)])
    return rows


def _title(case: str) -> str:
    batch, _, length = case.partition(" x ")
    return f"{length} tokens: ms, ratio" if batch == "1" else f"{batch} of {length}: texts/s, ratio"


def _cell(times: Mapping[str, float], others: Mapping[str, float], case: str) -> str:
    batch = int(case.partition(" x ")[0])
    value = f"{times[case] * 1e3:,.1f}" if batch == 1 else f"{batch / times[case]:,.1f}"
    return f"{value}, {others[case] / times[case]:.2f}"


def write_speeds(output: Path, timed: Timed) -> str:
    """speed.json and speed.md, whose text is given back.

    Raises:
        DataError: a folder that cannot be written to.
    """
    where: dict[str, Any] = {"host": platform.node(), "torch": torch.__version__, "device": "cpu"}
    where |= {"threads": torch.get_num_threads()}
    made: dict[str, Any] = {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "where": where}
    made |= {"sizes": timed.sizes, "seconds": timed.seconds}
    page = timed.as_markdown()
    with writing(output, DataError, "Name a folder that can be written to."):
        output.mkdir(parents=True, exist_ok=True)
        write_durably(output / "speed.json", json.dumps(made, indent=2, ensure_ascii=False) + "\n")
        write_durably(output / "speed.md", page + "\n")
    return page
