"""What a run will need, against counts of the real models."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import CamembertConfig, CamembertForMaskedLM, GPT2Config, GPT2LMHeadModel

from distilcb.command_line import parse_command_line
from distilcb.config import MOST_TOKENS, REPOSITORY
from distilcb.engine.deepspeed_config import DS_CONFIGS
from distilcb.errors import ConfigError, ModelError
from distilcb.models.cpu_layers import use_cpu_training
from distilcb.monitor.metrics import shape_of
from distilcb.plan import prediction
from distilcb.plan.command import plan_from
from distilcb.plan.prediction import Machine, Step, activation_bytes, largest_micro_batch, memory
from distilcb.plan.sizes import ModelSizes, sizes_of
from distilcb.train.models import kind_faults

RECIPE = ["--recipe", str(REPOSITORY / "recipes" / "distilcamembert.yaml"), "--dry_run"]
NODE = Machine(8, 4, memory=80e9, flops=312e12, efficiency=0.4, link=300e9, node_link=25e9, buckets=1e8)


def config(*words):
    return parse_command_line([*RECIPE, *words]).config


@pytest.fixture(scope="module")
def sizes():
    return sizes_of(config())


def test_sizes_are_those_of_the_published_models(sizes):
    assert sizes.teacher.parameters == pytest.approx(110.6e6, rel=0.005)
    assert sizes.student.parameters == 68_128_261  # counted where checkpoints were measured
    assert (sizes.teacher.shape.layers, sizes.student.shape.layers) == (12, 6)


def test_work_of_a_token_is_what_was_derived_by_hand(sizes):
    assert prediction.flop_per_token(config(), sizes) == pytest.approx(673e6, rel=0.005)
    masked = prediction.flop_per_token(config("--loss.kl_positions", "masked"), sizes)
    assert masked == pytest.approx(502e6, rel=0.005)


def kept_bytes(model, tokens):
    """Bytes a token that a forward pass keeps for the backward one."""
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    positions = torch.arange(2, tokens.shape[1] + 2).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.roberta(tokens, position_ids=positions)
    return sum(size for place, size in kept.items() if place not in weights) / tokens.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", [2, 6])
def test_activations_are_those_that_the_models_keep(layers, dropout, checkpointing):
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": layers}
    made = CamembertConfig(
        **shape,
        vocab_size=300,
        max_position_embeddings=130,
        pad_token_id=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = CamembertForMaskedLM(made).to(torch.bfloat16).train()
    use_cpu_training(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = kept_bytes(model, torch.randint(7, 300, (4, 128)))

    def planned(layers, checkpointing):
        shape = replace(shape_of(made, feed_forward_size=made.intermediate_size), layers=layers)
        sizes = ModelSizes(shape, 0, 0, 4, dropout)
        settings = ("--data.seq_len", "128", "--train.activation_checkpointing", str(checkpointing).lower())
        return activation_bytes(sizes, 2, "cpu", config(*settings))

    expected = planned(layers, checkpointing)
    if checkpointing:  # less the layer that is computed again, which comes later
        expected -= planned(layers + 1, False) - planned(layers, False)
    assert found == pytest.approx(expected, rel=0.03)


def test_memory_falls_with_ranks_and_grows_with_sequences_by_as_much_each(sizes):
    def total(gpus, size):
        machine = replace(NODE, gpus=gpus)
        return memory(config(), sizes, machine, micro_batch=size, width=2).total

    assert total(8, 16) < total(1, 16)
    assert total(1, 16) - total(8, 16) == pytest.approx(16 * sizes.student.trained * 7 / 8)
    assert total(8, 64) - total(8, 48) == pytest.approx(total(8, 48) - total(8, 32))


def test_the_largest_micro_batch_fits_and_twice_of_it_does_not(sizes):
    small = replace(NODE, memory=16e9)
    size = largest_micro_batch(config(), sizes, small, width=2)
    assert memory(config(), sizes, small, micro_batch=size, width=2).total <= 0.92 * 16e9
    assert memory(config(), sizes, small, micro_batch=2 * size, width=2).total > 0.92 * 16e9


def test_communication_shows_where_the_backward_pass_does_not_hide_it():
    assert Step(2.0, 0.5, 1).seconds == 2.0
    assert Step(2.0, 1.5, 1).seconds == 2.5


def test_one_gpu_sends_nothing(sizes):
    assert prediction.bytes_per_step(sizes, replace(NODE, gpus=1), width=2, micro_batches=4) == 0


def test_a_checkpoint_is_as_large_as_those_that_were_measured(sizes):
    assert prediction.checkpoint_bytes(sizes, width=4) == pytest.approx(1.09e9, rel=0.01)


def test_the_plan_is_a_table_with_its_assumptions(capsys):
    plan_from([*RECIPE[:2], "--gpus", "32", "--gpu", "h200", "--optim.micro_batch", "auto"], description=None)
    told = capsys.readouterr().out
    assert "68.1 M parameters" in told
    assert "673 MFLOP a token, fp16" in told
    assert "GPU-hours" in told
    assert "assumed: rate of one device   35% of 989 TFLOP/s" in told


def planned(tmp_path, *words):
    """The plan of DistilCamemBERT's recipe as data."""
    plan_from([*RECIPE[:2], *words, "--json", str(tmp_path / "plan.json")], description=None)
    return json.loads((tmp_path / "plan.json").read_text())


def test_auto_is_planned_as_training_takes_it(tmp_path):
    """Up to so many tokens a pass, though more would fit."""
    plan = planned(tmp_path, "--gpus", "1", "--gpu", "h200", "--optim.micro_batch", "auto")
    assert plan["micro_batch"] * 512 == MOST_TOKENS["cuda"]
    assert plan["largest_micro_batch"] > plan["micro_batch"]
    small = planned(tmp_path, "--gpus", "1", "--gpu", "h200", "--memory_gb", "8", "--optim.micro_batch", "auto")
    assert small["micro_batch"] == small["largest_micro_batch"] < plan["micro_batch"]


def test_fp32_is_planned_at_its_own_peak(tmp_path):
    words = ("--gpus", "8", "--gpu", "h100")
    half, full = planned(tmp_path, *words), planned(tmp_path, *words, "--deepspeed", "zero2_cpu")
    assert full["hours"] / half["hours"] == pytest.approx(989 / 67, rel=0.02)
    assert "67 TFLOP/s, the peak in fp32" in full["assumptions"]["rate of one device"]


def test_buckets_are_as_large_as_the_deepspeed_file_says(tmp_path):
    settings = json.loads((DS_CONFIGS / "zero2_fp16.json").read_text())
    sizes = []
    for name, zero in (("small", {"reduce_bucket_size": 1000}), ("alone", {"overlap_comm": False}), ("both", {})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings | {"zero_optimization": settings["zero_optimization"] | zero}))
        plan = planned(tmp_path, "--gpus", "8", "--gpu", "h100", "--deepspeed", str(path))
        sizes.append(plan["memory_bytes"]["gradients"])
    assert sizes[1] - sizes[0] == pytest.approx(2 * 50e6, rel=1e-3)
    assert sizes[2] - sizes[1] == 2 * 50e6  # overlapping takes two


def test_a_micro_batch_that_does_not_fit_is_said_with_the_one_that_does(capsys):
    words = ["--gpus", "8", "--gpu", "v100", "--memory_gb", "16", "--optim.micro_batch", "512"]
    plan_from([*RECIPE[:2], *words], description=None)
    assert "512 sequences, 1 a step: DOES NOT FIT, 128 does" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "3", "--gpu", "h100"], "4096 is not a multiple of --gpus 3"),
        (
            ["--gpus", "8", "--gpu", "h100", "--memory_gb", "1"],
            "one sequence of 512 tokens needs .* 1 GB, 8% of them kept free",
        ),
        (["--gpus", "8", "--gpu", "h100", "--efficiency", "2"], "--efficiency.*from 0.01 to 1"),
        (["--gpus", "8", "--gpu", "b300"], "--gpu"),
        (["--gpus", "8", "--gpu", "h100", "--deepspeed", "auto_bucket.json"], "reduce_bucket_size is 'auto', needed a"),
        (
            ["--gpus", "256", "--gpu", "h200"],
            "256 rank.s. x optim.micro_batch=32 make 8192 a pass.*--optim.micro_batch 16",
        ),
        (["--gpus", "32", "--gpu", "h200", "--optim.micro_batch", "24"], "make 768 a pass, and 4096 is not a multiple"),
        (["--gpus", "8", "--gpu", "h100", "--json", "no/folder/x.json"], "no/folder is no folder"),
        (["--gpus", "8", "--gpu", "h100", "--optim.lr", "-1"], "optim.lr"),
        (["--gpus", "8", "--gpu", "h100", "--student.init", "some/folder"], "student.init some/folder"),
        (
            ["--gpus", "8", "--gpu", "h100", "--loss.mlm", "0", "--loss.clm", "0.2"],
            r"loss\.clm=0\.2: the student is an encoder \(camembert\).*Give loss\.mlm the weight, and loss\.clm 0",
        ),
    ],
)
def test_mistakes_are_told(words, told, tmp_path, monkeypatch):
    zero = {"stage": 2, "reduce_bucket_size": "auto"}
    (tmp_path / "auto_bucket.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        plan_from([*RECIPE[:2], *words], description=None)


def test_a_plan_refuses_a_causal_teacher_with_masked_words_as_training_does(tmp_path):
    GPT2Config(vocab_size=100, n_layer=2, n_embd=16, n_head=2).save_pretrained(tmp_path)
    words = ["--gpus", "8", "--gpu", "h100", "--teacher.model", str(tmp_path), "--data.seq_len", "128"]
    with pytest.raises(ConfigError) as refused:
        plan_from([*RECIPE[:2], *words], description=None)
    student = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_layer=1, n_embd=16, n_head=2))
    assert str(refused.value) == "\n  ".join(kind_faults(config().loss, student, student))
    assert "loss.mlm=0.2: the student is causal (gpt2) and predicts the next word" in str(refused.value)


def test_computing_activations_again_costs_a_third_of_the_students_layers(sizes):
    plain = prediction.flop_per_token(config(), sizes)
    again = prediction.flop_per_token(config("--train.activation_checkpointing", "true"), sizes)
    shape = sizes.student.shape
    forward = 2 * shape.layer_parameters + 4 * shape.layers * config().data.seq_len * shape.hidden
    assert again - plain == pytest.approx(forward)


def test_a_teacher_that_cannot_be_had_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing"):
        plan_from([*RECIPE[:2], "--gpus", "8", "--gpu", "h100", "--teacher.model", "nobody/nothing"], description=None)


def test_relations_take_memory_that_does_not_grow_with_the_micro_batch(sizes):
    words = ("--loss.relation", "1", "--data.seq_len", "512")
    plain, few, many = (
        memory(config(*asked), sizes, NODE, micro_batch=size, width=2).parts
        for asked, size in ((words[2:], 2), (words, 2), (words, 64))
    )
    assert "relations" not in plain
    # 2 blocks x 48 heads x 512 x 512 tokens, and queries, keys and values of both models
    assert few["relations"] == pytest.approx(2 * 48 * 512**2 * 22 + 2 * 512 * 3 * 2 * (768 + 768))
    assert many["relations"] - few["relations"] == pytest.approx(62 * 512 * 3 * 2 * (768 + 768))


def test_work_is_the_mean_over_steps_with_kl_and_without(sizes):
    whole, masked = (prediction.flop_per_token(config(*words), sizes) for words in ((), ("--loss.kl", "0")))
    assert prediction.flop_per_token(config("--loss.kl_until", "0.75"), sizes) == pytest.approx(
        0.75 * whole + 0.25 * masked
    )
    alone = prediction.flop_per_token(config("--loss.kl", "0", "--loss.cos", "0", "--loss.mlm", "1"), sizes)
    assert alone < 0.7 * masked  # the teacher is not run
