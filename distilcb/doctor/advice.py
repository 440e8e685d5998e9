"""What to ask Slurm and DeepSpeed for on this allocation, as far as the figures tell."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import median_high
from typing import Any

from distilcb.doctor.judgement import Finding
from distilcb.doctor.links import SIZES

# DistilCamemBERT's, and of the half precision in which its gradients are summed.
_PARAMETERS, _BYTES = 68_000_000, 2
# Of ds_configs/, in elements.
_BUCKET = 50_000_000
_NEARLY = 0.9


def advise(
    ranks: Sequence[Mapping[str, Any]], products: Sequence[Mapping[str, float]], findings: Sequence[Finding]
) -> list[str]:
    """Slurm's header lines and DeepSpeed's option for these nodes, without those that were found slow."""
    hosts = Counter(each["host"] for each in ranks)
    per_node = max(hosts.values())
    # Outside Slurm the cores that a process may use are those of all ranks of its node.
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or ranks[0]["cores_allowed"] // per_node)
    header = slurm_header(
        nodes=len(hosts),
        ranks_per_node=per_node,
        gpus_per_node=ranks[0]["devices_seen"],
        cores_per_rank=cores,
        avoid=_slurm_names(ranks, {each.host for each in findings if each.ratio is not None and len(hosts) > 1}),
    )
    file, why = deepspeed_file({name: median_high(each[name] for each in products) for name in products[0]})
    return [*header, f"--deepspeed {file}   # {why}"]


def _slurm_names(ranks: Sequence[Mapping[str, Any]], hosts: Collection[str]) -> set[str]:
    """What Slurm calls the hosts; it may know node1.cluster as node1, and refuses a job with a name it does not know.

    mpiexec can hand the first node's variables to all: where two hosts have one name none is believed.
    """
    names = {each["host"]: each["slurm_node"] for each in ranks if each["slurm_node"]}
    if len(set(names.values())) < len(names):
        names = {}
    return {names.get(host, host) for host in hosts}


def slurm_header(
    *, nodes: int, ranks_per_node: int, gpus_per_node: int, cores_per_rank: int, avoid: Collection[str]
) -> list[str]:
    """The lines of a job that uses such nodes fully: a task a GPU, all cores shared out, without the nodes to avoid."""
    tasks = max(ranks_per_node, gpus_per_node)
    lines = [
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        *([f"--gres=gpu:{gpus_per_node}"] if gpus_per_node else []),
        f"--cpus-per-task={max(1, cores_per_rank * ranks_per_node // tasks)}",
        *([f"--exclude={','.join(sorted(avoid))}"] if avoid else []),
    ]
    return [f"#SBATCH {line}" for line in lines]


def deepspeed_file(rates: Mapping[str, float]) -> tuple[str, str]:
    """The value for --deepspeed, and why.

    Args:
        rates: TFLOP/s by precision.
    """
    if "fp16" in rates:
        figures = f"bf16 {rates['bf16']:.3g}, fp16 {rates['fp16']:.3g} TFLOP/s"
        if rates["bf16"] >= _NEARLY * rates["fp16"]:
            return "zero2_bf16", f"{figures}: as fast, and without a loss scale that overflows; auto takes zero2_fp16"
        return "zero2_fp16", f"{figures}; auto takes it too"
    figures = f"bf16 {rates['bf16']:.3g}, fp32 {rates['fp32']:.3g} TFLOP/s"
    return ("zero2_bf16" if rates["bf16"] > rates["fp32"] else "zero2_cpu"), figures


def on_gradients(curve: Mapping[int, float], *, ranks: int) -> str:
    """How long gradients take to be summed over all ranks, and whether reduce_bucket_size should change.

    Args:
        curve: bus bandwidth in GB/s by bytes; it ends early where sums are slow.
    """
    best = max(curve.values())
    seconds = _PARAMETERS * _BYTES * 2 * (ranks - 1) / ranks / (best * 1e9)
    told = f"the gradients of {_PARAMETERS // 10**6} million parameters are summed over all ranks in {seconds:.2g} s"
    full = min(size for size in curve if curve[size] >= _NEARLY * best)
    if full < max(curve) == SIZES[-1]:
        told += (
            f"; {full >> 20} MiB at once are as fast as more, and the files' buckets ({_BUCKET * _BYTES >> 20} MiB) "
        )
        told += "are above: leave reduce_bucket_size"
    return told
