"""What DeepSpeed makes of a run: sharding, optimizer, teacher, memory, dropout, and losses that are not finite."""

import ctypes
import hashlib
import math
import resource
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch

from distilcb import distributed
from distilcb.engine.checkpoint import Checkpoints
from distilcb.errors import TrainingError

pytestmark = pytest.mark.launch

# Large enough that the teacher's weights would show in a checkpoint's size.
HIDDEN_SIZE = 64
STEPS = 3


@pytest.fixture(scope="module")
def findings(run_on_ranks, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of 2 ranks found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [rank.result for rank in run_on_ranks(find_out, 2, folder=folder)]


@pytest.fixture(scope="module")
def facts(findings) -> list[dict[str, Any]]:
    """Each rank's facts of a run in bf16 that took some steps and saved."""
    return [rank["facts"] for rank in findings]


def find_out(folder: Path) -> dict[str, Any]:
    """Runs on every rank; memory first, since its peak never falls."""
    return {
        "memory": peaks_of_accumulation(),
        "facts": run_and_tell(folder / "facts"),
        "dropout": runs_with_dropout(folder / "dropout"),
    }


def run_and_tell(folder: Path) -> dict[str, Any]:
    run = tiny.start(tiny.tiny_config(deepspeed="zero2_bf16"), hidden_size=HIDDEN_SIZE)
    assert run.models.teacher is not None
    before = digest(run.models.teacher.model)
    accumulated = []
    take_step = run.engine.step

    def look_then_step() -> None:
        if run.engine.is_gradient_accumulation_boundary():
            accumulated.extend(
                part.dtype for group in run.engine.optimizer.averaged_gradients.values() for part in group
            )
        take_step()

    run.engine.step = look_then_step
    run.take(0, STEPS)
    Checkpoints(folder, keep=1).save(run.engine, step=STEPS, world_size=2, state={})
    teacher = run.models.teacher.model
    inner = run.engine.optimizer.optimizer
    return {
        "folder": folder / f"step_{STEPS:08d}",
        "stage": run.engine.zero_optimization_stage(),
        "optimizer": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "state_bytes": sum(v.nbytes for state in inner.state.values() for v in state.values() if torch.is_tensor(v)),
        "master_bytes": sum(weight.nbytes for group in inner.param_groups for weight in group["params"]),
        "accumulated": set(accumulated),
        "student_weights": sum(weight.numel() for weight in run.models.student.parameters()),
        "student_dtype": {weight.dtype for weight in run.models.student.parameters()},
        "teacher_weights": sum(weight.numel() for weight in teacher.parameters()),
        "teacher_before": before,
        "teacher_after": digest(teacher),
        "teacher_trains": [name for name, module in teacher.named_modules() if module.training],
        "teacher_gradients": [n for n, p in teacher.named_parameters() if p.requires_grad or p.grad is not None],
        "engine_weights": sum(weight.numel() for weight in run.engine.module.parameters()),
    }


def digest(model: Any) -> str:
    """A hash of every byte of a model's weights and buffers."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        data = value.contiguous()
        found.update(name.encode() + ctypes.string_at(data.data_ptr(), data.nbytes))
    return found.hexdigest()


def test_zero_stage_2_shards_fused_adam(facts):
    for rank in facts:
        assert rank["stage"] == 2
        assert rank["optimizer"] == "deepspeed.ops.adam.fused_adam.FusedAdam"


def test_each_rank_holds_half_of_the_optimizer_state(facts):
    for rank in facts:
        whole = 4 * rank["student_weights"]  # fp32
        assert 0.5 <= rank["master_bytes"] / whole < 0.51
        assert 0.5 <= rank["state_bytes"] / (2 * whole) < 0.51  # two moments


def test_a_checkpoint_holds_an_optimizer_shard_of_each_rank(facts):
    shards = sorted(path.name for path in facts[0]["folder"].glob("*optim_states.pt"))
    assert shards == [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


def test_gradients_are_accumulated_in_fp32_under_bf16(facts):
    for rank in facts:
        assert rank["student_dtype"] == {torch.bfloat16}
        assert rank["accumulated"] == {torch.float32}


def test_training_leaves_the_teacher_alone(facts):
    for rank in facts:
        assert rank["teacher_after"] == rank["teacher_before"] == facts[0]["teacher_before"]
        assert rank["teacher_trains"] == []
        assert rank["teacher_gradients"] == []


def test_the_teacher_is_in_no_checkpoint(facts):
    folder, weights = facts[0]["folder"], facts[0]["student_weights"]
    assert facts[0]["engine_weights"] == weights
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    assert saved["module"]
    assert {name.split(".")[0] for name in saved["module"]} == {"student"}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    student = (2 + 3 * 4) * weights  # bf16 weights; fp32 weights and two moments
    assert student <= size < student + facts[0]["teacher_weights"]


def peaks_of_accumulation() -> dict[str, Any]:
    """Peak memory of this process after steps of 256 and of 4,096 sequences on 2 ranks, 32 a micro-batch."""
    peaks, means = [], []
    for global_batch in (256, 4096):
        run = tiny.start(tiny.tiny_config(global_batch=global_batch, micro_batch=32))
        sums = distributed.all_reduce_sum(run.take(0, 2)[-1].sums)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        means.append(sums / global_batch)
    return {"peaks": peaks, "means": means}


def test_a_step_of_4096_sequences_takes_no_more_memory_than_one_of_256(findings):
    logits = 4 * 32 * tiny.SEQ_LEN * tiny.VOCAB_SIZE  # bytes of one micro-batch's, of which 60 more were made
    for rank in findings:
        few, many = rank["memory"]["peaks"]
        assert many - few < 15 * logits, f"{(many - few) / 2**20:.1f} MiB more"


def test_a_step_of_4096_sequences_has_the_losses_of_one_of_256(findings):
    few, many = findings[0]["memory"]["means"]
    assert torch.isfinite(many).all()
    torch.testing.assert_close(many, few, rtol=0.2, atol=0.0)


def runs_with_dropout(folder: Path) -> dict[str, Any]:
    """Sums of each step of several starts, over all ranks; and what this rank seeded dropout with in two steps."""
    config, checkpoints = tiny.tiny_config(dropout=0.1), Checkpoints(folder, keep=1)
    first, resumed, again = (tiny.start(config) for _ in range(3))
    torch.manual_seed(1)
    results = {"first": first.take(0, 2)}
    checkpoints.save(first.engine, step=2, world_size=2, state={})
    results["first"] += first.take(2, 5)
    torch.manual_seed(2)
    newest = checkpoints.of_step(2)
    assert newest is not None
    checkpoints.load(resumed.engine, newest, world_size=2)
    results["resumed"] = resumed.take(2, 5)
    with patch.object(torch, "manual_seed", wraps=torch.manual_seed) as seed:
        results["again"] = again.take(0, 2)
    seeds = [call.args[0] for call in seed.call_args_list]
    results["without"] = tiny.start(tiny.tiny_config()).take(0, 1)
    sums = {name: distributed.all_reduce_sum(torch.stack([r.sums for r in each])) for name, each in results.items()}
    return {"sums": sums, "seeds": seeds}


def test_a_repeated_step_drops_the_same_units(findings):
    sums = findings[0]["dropout"]["sums"]
    assert not torch.isclose(sums["first"][0], sums["without"][0])[:3].any()  # something is dropped
    assert torch.equal(sums["again"], sums["first"][:2])


def test_each_micro_batch_of_each_rank_and_step_drops_units_of_its_own(findings):
    seeds = [seed for rank in findings for seed in rank["dropout"]["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 2


def test_a_resumed_run_takes_the_same_steps_to_the_last_bit(findings):
    # The third of them shows what the optimizer made of the first two.
    sums = findings[0]["dropout"]["sums"]
    assert torch.equal(sums["resumed"], sums["first"][2:])


@pytest.fixture(scope="module")
def not_finite(run_on_ranks, tmp_path_factory) -> tuple[list[Any], Path]:
    """Two ranks, one of which meets numbers that are not finite, and their checkpoints."""
    folder = tmp_path_factory.mktemp("not_finite")
    return run_on_ranks(meet_nan, 2, fails=True, folder=folder), folder


def meet_nan(folder: Path) -> None:
    """Runs on every rank: two cases that are told, and a last one that ends the process."""
    for name, value in (("teacher's bias", math.nan), ("gradient still finite", -math.inf)):
        run = tiny.start(tiny.tiny_config())
        assert run.models.teacher is not None
        run.take(0, 2)
        if distributed.discover().rank == 1:
            run.models.teacher.model.lm_head.decoder.bias.data[0] = value
        try:
            run.take(2, 3)
            run.stepper.refuse_non_finite()  # what the loop asks where it logs and saves
        except TrainingError as error:
            print(f"{name}: {error}")
    run = tiny.start(tiny.tiny_config())
    run.take(0, 2)
    Checkpoints(folder, keep=2).save(run.engine, step=2, world_size=2, state={})
    if distributed.discover().rank == 1:
        run.models.student.roberta.embeddings.LayerNorm.weight.data[0] = math.nan
    run.take(2, 3)


@pytest.mark.parametrize("case", ["teacher's bias", "gradient still finite"])
def test_every_rank_learns_which_term_of_which_step_is_not_finite_on_which_rank(not_finite, case):
    ranks, _ = not_finite
    for rank in ranks:
        assert f"{case}: step 3: loss term kl is not finite on rank 1." in rank.output


def test_a_weight_that_is_nan_ends_every_rank_with_one_message(not_finite):
    ranks, _ = not_finite
    assert [rank.exit_code for rank in ranks] == [1, 1]
    message = "TrainingError: step 3: loss term kl, mlm, cos is not finite on rank 1."
    assert [rank.output.count(message) for rank in ranks] == [1, 0]
    assert not any("Traceback" in rank.output for rank in ranks)


def test_the_checkpoint_before_a_nan_is_good(not_finite):
    _, folder = not_finite
    newest = Checkpoints(folder, keep=2).newest()
    assert newest is not None
    assert newest.step == 2
    weights = torch.load(newest.path / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_activation_checkpointing_keeps_less_between_the_passes(run_on_ranks):
    (rank,) = run_on_ranks(bytes_kept, 1)
    plain, checkpointed = rank.result
    assert checkpointed < 0.6 * plain


def bytes_kept() -> tuple[int, int]:
    """Bytes that the student's forward pass keeps for the backward one, without and with checkpointing."""
    found = []
    for checkpointing in (False, True):
        student = tiny.models(tiny.tiny_config(), hidden_size=HIDDEN_SIZE).student.train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student.roberta(torch.randint(7, 200, (32, tiny.SEQ_LEN)))
        found.append(sum(size for place, size in kept.items() if place not in weights))
    return found[0], found[1]
