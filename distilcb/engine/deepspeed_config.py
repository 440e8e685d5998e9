"""A file of ds_configs/ and the run, made into DeepSpeed's dictionary.

The file says how to shard and in which precision. All else has its one home in the recipe, and DeepSpeed takes
misspelled top-level keys in silence, so both are refused here.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from distilcb.config import REPOSITORY, OptimConfig, accumulation_steps
from distilcb.errors import ConfigError

DS_CONFIGS = REPOSITORY / "ds_configs"

ALLOWED = (
    "zero_optimization",
    "fp16",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# DeepSpeed's name -> where the recipe says it.
IN_RECIPE = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.global_batch and optim.micro_batch, which it follows from",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.name, optim.lr, optim.betas, optim.eps, optim.weight_decay",
    "zero_allow_untested_optimizer": "optim.name",
    "scheduler": "optim.schedule and optim.warmup",
    "checkpoint": "train.save_every",
    "steps_per_print": "train.log_every",
}


def choose_file(name: str, *, cuda: bool, cpu_has_bf16: bool) -> tuple[Path, str]:
    """The DeepSpeed file that a run uses, and a sentence that says why.

    Args:
        name: 'auto', a path, or the name of a file of ds_configs/.

    Raises:
        ConfigError: no such file.
    """
    if name == "auto":
        if cuda:
            return DS_CONFIGS / "zero2_fp16.json", "fp16 with dynamic loss scaling: a CUDA device is here"
        if cpu_has_bf16:
            return DS_CONFIGS / "zero2_bf16.json", "bf16: this CPU has instructions for it"
        return DS_CONFIGS / "zero2_cpu.json", "fp32: this CPU has no bf16 instructions"
    for path in (Path(name).expanduser(), DS_CONFIGS / name, DS_CONFIGS / f"{name}.json"):
        if path.is_file():
            return path, f"{path.name}, as asked for"
    there = ", ".join(sorted(path.name for path in DS_CONFIGS.glob("*.json")))
    raise ConfigError(f"deepspeed={name}: no such file. Give 'auto', a path, or one of ds_configs/: {there}.")


def read_file(path: Path) -> dict[str, Any]:
    """The DeepSpeed settings of a file, checked.

    Raises:
        ConfigError: not JSON, unknown keys, keys that belong to the recipe, or no precision that can be told.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeats)
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed file {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"DeepSpeed file {path}: came {type(settings).__name__}, needed an object of settings")
    faults = [_fault(key) for key in settings if key not in ALLOWED]
    faults += [
        f"'{key}' is {settings[key]!r}, needed an object of settings"
        for key in ("zero_optimization", "fp16", "bf16", "data_types")
        if not isinstance(settings.get(key, {}), dict)
    ]
    if _section(settings, "fp16").get("enabled") and _section(settings, "bf16").get("enabled"):
        faults.append("fp16 and bf16 are both enabled: choose one")
    stage = _section(settings, "zero_optimization").get("stage", 0)
    if stage != 2:
        faults.append(
            f"zero_optimization.stage is {stage}, needed 2: stage 3 splits weights, which the streamed head needs "
            "whole, and DeepSpeed cannot make a model of the checkpoints of stage 0 and of 1 in bf16"
        )
    offloaded = [key for key in _section(settings, "zero_optimization") if key.startswith("offload")]
    faults += [
        f"zero_optimization.{key} is not supported: the fused optimizer works on the device" for key in offloaded
    ]
    faults += [
        f"{key}.enabled is {enabled!r}, needed true or false"
        for key in ("fp16", "bf16")
        if not isinstance(enabled := _section(settings, key).get("enabled", False), bool)
    ]
    known = ("grad_accum_dtype",)
    faults += [
        f"unknown key 'data_types.{key}'. Known: {known[0]}"
        for key in _section(settings, "data_types")
        if key not in known
    ]
    if faults:
        raise ConfigError("\n  ".join([f"DeepSpeed file {path}:", *faults]))
    return settings


def check_sections(settings: dict[str, Any]) -> None:
    """Raise ConfigError for names or values inside a section that DeepSpeed itself would refuse, but only later.

    Imports DeepSpeed, so it comes after ranks have met.
    """
    import pydantic
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    faults = []
    for section, model in sections.items():
        try:
            model(**settings.get(section, {}))
        except pydantic.ValidationError as error:
            faults += [f"{section}.{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
    if faults:
        raise ConfigError("\n  ".join(["DeepSpeed file:", *faults]))


def state_layout(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides how optimizer states lie in a checkpoint and how gradients are summed.

    A run that goes on with another `round_robin_gradients` gets its moments in another order, without an error.
    """
    zero, sums = _section(settings, "zero_optimization"), _section(settings, "data_types")
    return {
        "round_robin_gradients": bool(zero.get("round_robin_gradients", False)),
        "parameter_alignment": zero.get("parameter_alignment"),
        "elastic_checkpoint": bool(zero.get("elastic_checkpoint", False)),
        "grad_accum_dtype": sums.get("grad_accum_dtype", "fp32"),
        "communication_data_type": settings.get("communication_data_type"),
    }


def precision(settings: dict[str, Any]) -> str:
    """'fp16', 'bf16' or 'fp32'."""
    for name in ("fp16", "bf16"):
        if settings.get(name, {}).get("enabled"):
            return name
    return "fp32"


def bucket_numbers(settings: dict[str, Any]) -> int:
    """How many numbers DeepSpeed's buffers for gradients on their way hold: one of them, or two where it overlaps.

    Raises:
        ConfigError: their size is no number.
    """
    zero = _section(settings, "zero_optimization")
    size = zero.get("reduce_bucket_size", 5e8)
    if isinstance(size, bool) or not isinstance(size, int | float) or size < 0:
        raise ConfigError(f"DeepSpeed file: zero_optimization.reduce_bucket_size is {size!r}, needed a number.")
    if not zero.get("contiguous_gradients", True):
        return 0
    return int(size) * (2 if zero.get("overlap_comm") else 1)


def build(
    settings: dict[str, Any], optim: OptimConfig, *, world_size: int, load_universal: bool = False
) -> dict[str, Any]:
    """DeepSpeed's dictionary: the file's settings and what the recipe says.

    Args:
        load_universal: whether a checkpoint in the universal format will be loaded, which DeepSpeed must know first.
    """
    # DeepSpeed sums gradients of micro-batches in the model's own dtype unless told otherwise, and a batch of 4,096
    # is a sum of dozens of terms.
    data_types = {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})
    return settings | {
        "train_batch_size": optim.global_batch,
        "train_micro_batch_size_per_gpu": optim.sequences_a_pass,
        "gradient_accumulation_steps": accumulation_steps(optim, world_size),
        "gradient_clipping": optim.clip,
        "data_types": data_types,
        "zero_allow_untested_optimizer": optim.name == "lamb",  # tests/distributed/test_lamb.py tests it
        "steps_per_print": 2**31 - 1,  # our monitor prints
        # DeepSpeed's own throughput timer waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "checkpoint": {"load_universal": load_universal},
    }


def _fault(key: str) -> str:
    if key in IN_RECIPE:
        return f"'{key}' does not belong here; the recipe says it in {IN_RECIPE[key]}"
    near = difflib.get_close_matches(key, ALLOWED, n=1)
    return f"unknown key '{key}'" + (f": did you mean '{near[0]}'?" if near else f". Known: {', '.join(ALLOWED)}")


def _section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice} written twice")
    return dict(pairs)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (DeepSpeed and torch say yes of every CPU: they emulate it)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
