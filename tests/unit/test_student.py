"""What a student starts from."""

import pytest
import torch

from distilcb.config import StudentConfig
from distilcb.errors import ConfigError, ModelError
from distilcb.models.student import build_student


def build(teacher, *, seed=0, vocab_size=101, **settings):
    model, _ = build_student(StudentConfig(**settings), teacher=teacher, vocab_size=vocab_size, seed=seed)
    return model


def depth(model):
    assert model.config.num_hidden_layers == len(model.roberta.encoder.layer)
    return model.config.num_hidden_layers


def equal_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def equal_layers(student, source, layers):
    pairs = zip(student.roberta.encoder.layer, layers, strict=True)
    return all(equal_weights(layer, source.roberta.encoder.layer[number]) for layer, number in pairs)


def learn_something(model, batch):
    """Gradients of the masked words' loss."""
    logits = model(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows]
    torch.nn.functional.cross_entropy(logits, batch.labels).backward()


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize(("layers", "half"), [(4, 2), (5, 2), (1, 1)])
def test_a_student_has_half_of_the_teachers_layers_unless_told_otherwise(tiny_model, init, layers, half):
    assert depth(build(tiny_model(layers=layers), init=init)) == half


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize("num_layers", [1, 3, 6])
def test_num_layers_decides_whatever_the_student_starts_from(tiny_model, init, num_layers):
    assert depth(build(tiny_model(layers=4), init=init, num_layers=num_layers)) == num_layers


def test_layers_are_spread_over_the_teacher_unless_told_otherwise(tiny_model):
    teacher = tiny_model(layers=4)
    assert equal_layers(build(teacher), teacher, [0, 3])


def test_init_layers_decide_depth_and_source(tiny_model):
    teacher = tiny_model(layers=4)
    assert equal_layers(build(teacher, init_layers=(3, 0, 1)), teacher, [3, 0, 1])


@pytest.mark.parametrize(
    ("asked", "num_layers", "layers"),
    [
        ("first_of_pairs", None, [0, 2, 4]),
        ("last_of_pairs", None, [1, 3, 5]),
        ("first_of_pairs", 2, [0, 3]),
        ("last_of_pairs", 2, [2, 5]),
        ("last_of_pairs", 4, [0, 2, 3, 5]),
    ],
)
def test_layers_can_be_the_first_or_last_of_their_neighbours(tiny_model, asked, num_layers, layers):
    teacher = tiny_model(layers=6)
    assert equal_layers(build(teacher, init_layers=asked, num_layers=num_layers), teacher, layers)


def test_groups_of_more_layers_than_there_are_is_a_config_error(tiny_model):
    with pytest.raises(ConfigError, match="the source has 2 layers, the student 3"):
        build(tiny_model(layers=2), init_layers="last_of_pairs", num_layers=3)


def test_a_layer_that_the_teacher_lacks_is_a_config_error(tiny_model):
    with pytest.raises(ConfigError, match=r"init_layers=\[0, 4\]"):
        build(tiny_model(layers=4), init_layers=(0, 4))


@torch.no_grad()
def test_a_student_of_the_teachers_depth_predicts_as_the_teacher(tiny_model, tiny_batch):
    teacher, ids = tiny_model(layers=3), tiny_batch().input_ids
    assert torch.equal(build(teacher, num_layers=3).eval()(ids).logits, teacher(ids).logits)


def test_building_a_student_leaves_the_teacher_as_it_was(tiny_model, parameters_of):
    teacher = tiny_model()
    before, config = parameters_of(teacher), teacher.config.to_dict()
    student = build(teacher, dropout=0.3, num_layers=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_random_students_of_one_seed_are_equal_and_of_two_are_not(tiny_model):
    teacher = tiny_model()
    student = build(teacher, init="random", seed=3)
    assert equal_weights(student, build(teacher, init="random", seed=3))
    assert not equal_weights(student, build(teacher, init="random", seed=4))


def test_a_random_student_copies_nothing(tiny_model):
    teacher = tiny_model()
    ours, theirs = build(teacher, init="random").state_dict(), teacher.state_dict()
    # Biases and layer norms are constant in fresh models; the fixture's teacher has none that are.
    assert not any(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_building_a_student_leaves_the_random_state_alone(tiny_model):
    teacher = tiny_model()
    before = torch.get_rng_state()
    build(teacher, init="random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model of three layers, and its folder."""
    model = tiny_model(layers=3, seed=7)
    model.save_pretrained(tmp_path / "saved")
    return model, str(tmp_path / "saved")


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_student_from_a_folder_keeps_its_depth_and_weights(tiny_model, saved, with_teacher):
    model, folder = saved
    student = build(tiny_model(layers=4) if with_teacher else None, init=folder)
    assert depth(student) == 3
    assert equal_weights(student, model)


def test_a_student_from_a_folder_can_be_deepened(saved):
    model, folder = saved
    student = build(None, init=folder, init_layers=(0, 0, 1, 1, 2, 2))
    assert depth(student) == 6
    assert equal_layers(student, model, [0, 0, 1, 1, 2, 2])


def test_a_student_from_a_folder_is_deepened_evenly_by_num_layers_alone(saved):
    model, folder = saved
    assert equal_layers(build(None, init=folder, num_layers=6), model, [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_from_a_half_precision_folder_is_in_fp32(tiny_model, tmp_path, dtype):
    tiny_model().to(dtype).save_pretrained(tmp_path)
    student = build(None, init=str(tmp_path))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32


def test_a_student_of_a_half_precision_teacher_is_in_fp32(tiny_model):
    student = build(tiny_model().half())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32


def test_a_folder_that_is_not_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        build(None, init=str(tmp_path / "nowhere"))


def write_config(model, path, **changes):
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    path.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    return str(path)


def test_a_config_file_decides_the_depth_and_layers_still_come_from_the_teacher(tiny_model, tmp_path):
    teacher = tiny_model(layers=4)
    path = write_config(teacher, tmp_path / "student.json", num_hidden_layers=3)
    student = build(teacher, config=path)
    assert depth(student) == 3
    assert equal_layers(student, teacher, [0, 2, 3])  # 1.5 is rounded to the even one


def test_num_layers_wins_over_the_config_file(tiny_model, tmp_path):
    teacher = tiny_model(layers=4)
    path = write_config(teacher, tmp_path / "student.json", num_hidden_layers=3)
    assert depth(build(teacher, config=path, num_layers=1)) == 1


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_random_student_has_the_sizes_of_its_config_file(tiny_model, tmp_path, with_teacher):
    teacher = tiny_model(layers=4)
    path = write_config(teacher, tmp_path / "student.json", num_hidden_layers=3, hidden_size=16)
    student = build(teacher if with_teacher else None, init="random", config=path)
    assert depth(student) == 3
    assert student.config.hidden_size == student.get_input_embeddings().weight.shape[1] == 16


def test_a_config_file_of_another_width_cannot_take_the_teachers_weights(tiny_model, tmp_path):
    teacher = tiny_model(layers=4)
    path = write_config(teacher, tmp_path / "student.json", hidden_size=16)
    with pytest.raises(ModelError, match=r"Only the depth may differ; check student\.config"):
        build(teacher, config=path)


def test_a_config_file_of_an_unsupported_architecture_is_a_model_error(tiny_model, tmp_path):
    (tmp_path / "student.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    with pytest.raises(ModelError, match="student: model_type 'electra' is not supported"):
        build(tiny_model(), init="random", config=str(tmp_path / "student.json"))


def test_a_config_file_that_is_not_there_is_a_model_error(tiny_model):
    with pytest.raises(ModelError, match=r"nowhere\.json"):
        build(tiny_model(), config="nowhere.json")


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_dropout_is_the_one_asked_for(tiny_model, init):
    student = build(tiny_model(), init=init, dropout=0.25)
    rates = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


def test_dropout_is_the_teachers_unless_told_otherwise(tiny_model):
    student = build(tiny_model(hidden_dropout_prob=0.125, attention_probs_dropout_prob=0.5))
    assert (student.config.hidden_dropout_prob, student.config.attention_probs_dropout_prob) == (0.125, 0.5)


@torch.no_grad()
def test_a_student_with_dropout_0_is_the_same_in_training_mode(tiny_model, tiny_batch):
    student, ids = build(tiny_model(), dropout=0.0), tiny_batch().input_ids
    assert torch.equal(student.train()(ids).logits, student.eval()(ids).logits)


@pytest.mark.parametrize(
    ("architecture", "student_of_it", "positions"),
    [
        ("camembert", None, "roberta.embeddings.position_embeddings.weight"),
        ("roberta", None, "roberta.embeddings.position_embeddings.weight"),
        ("xlm-roberta", None, "roberta.embeddings.position_embeddings.weight"),
        ("bert", "distilbert", "distilbert.embeddings.position_embeddings.weight"),
        ("gpt2", None, "transformer.wpe.weight"),
    ],
)
def test_frozen_position_embeddings_do_not_move_and_all_else_does(
    tiny_model, tiny_batch, parameters_of, architecture, student_of_it, positions
):
    teacher = tiny_model(architecture)
    student = build(teacher, freeze_position_embeddings=True, architecture=student_of_it)
    before = parameters_of(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    learn_something(student, tiny_batch())
    optimizer.step()
    stayed = [name for name, weight in student.named_parameters() if torch.equal(weight, before[name])]
    assert [name for name in stayed if "key.bias" not in name and "k_lin.bias" not in name] == [positions]


def test_position_embeddings_learn_unless_frozen(tiny_model, tiny_batch):
    student = build(tiny_model())
    learn_something(student, tiny_batch())
    assert student.roberta.embeddings.position_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_a_tied_decoder_stays_tied(tiny_model, init):
    student = build(tiny_model(), init=init)
    assert student.lm_head.decoder.weight is student.get_input_embeddings().weight
    assert student.lm_head.decoder.bias is student.lm_head.bias


def test_a_decoder_that_is_not_tied_stays_so(tiny_model):
    teacher = tiny_model(tie_word_embeddings=False)
    student = build(teacher)
    assert torch.equal(student.lm_head.decoder.weight, teacher.lm_head.decoder.weight)
    assert not torch.equal(student.lm_head.decoder.weight, student.get_input_embeddings().weight)


def test_a_vocabulary_smaller_than_the_tokenizers_is_a_config_error(tiny_model):
    build(tiny_model(vocab_size=101), vocab_size=101)
    with pytest.raises(ConfigError, match="vocab_size 101, but the tokenizer has 102 tokens"):
        build(tiny_model(vocab_size=101), vocab_size=102)
