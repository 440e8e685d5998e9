"""Shipped recipes load, and each of their values says where it comes from."""

import re

import pytest
import torch
import yaml

from distilcb.command_line import parse_command_line
from distilcb.config import DEFAULT_RECIPE, REPOSITORY, flatten, to_plain
from distilcb.errors import ConfigError
from distilcb.models.loading import load_language_model
from distilcb.recipe import load_recipe

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)

MARK = re.compile(r"#.*\b(?:published: \S|assumed\b)")


def unmarked_values(text):
    """The lines of a YAML text that give a value and say neither 'published: source' nor 'assumed'."""

    def values(node):
        """(first, last) line of each setting's value; a list counts with the line of its key."""
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                yield from values(value)
            else:
                yield key.start_mark.line, max(key.start_mark.line, value.end_mark.line - (value.end_mark.column == 0))

    lines = text.splitlines()
    tree = yaml.compose(text)
    spans = list(values(tree)) if tree else []
    return [lines[first] for first, last in spans if not any(MARK.search(line) for line in lines[first : last + 1])]


def test_there_are_recipes_and_the_default_is_one():
    assert DEFAULT_RECIPE in RECIPES


@every_recipe
def test_every_recipe_loads(path):
    config = load_recipe(path)
    text = "one.txt,another.txt" if config.data.language_exponent is not None else "text.txt"
    assert parse_command_line(["--recipe", str(path), "--data.train", text]).config.optim == config.optim


@every_recipe
def test_every_value_of_a_recipe_is_marked_published_with_its_source_or_assumed(path):
    assert unmarked_values(path.read_text(encoding="utf-8")) == []


@every_recipe
def test_what_a_recipe_names_in_its_own_folder_is_there(path):
    for name, value in flatten(to_plain(load_recipe(path))).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and word.startswith(str(path.parent)):
                assert list(path.parent.glob(word[len(str(path.parent)) + 1 :])), f"{name}: {word} is not there"


@pytest.mark.parametrize("typed", ["mini", "minni.yaml"])
def test_a_recipe_that_is_not_there_says_which_was_meant(typed):
    with pytest.raises(ConfigError, match=r"recipes/mini\.yaml\?$"):
        load_recipe(DEFAULT_RECIPE.parent / typed)


def test_a_recipe_that_is_a_folder_is_not_what_was_meant(tmp_path):
    (tmp_path / "mini.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"such as recipes/mini\.yaml\.$"):
        load_recipe(tmp_path / "mini.yaml")


def test_the_default_recipe_needs_no_network():
    config = load_recipe(DEFAULT_RECIPE)
    for name in (config.teacher.model, *config.data.train, *config.data.heldout):
        assert str(name).startswith(str(DEFAULT_RECIPE.parent))


def test_the_mini_teachers_layers_are_copies_of_three_which_the_better_recipe_takes_in_their_order():
    teacher = load_language_model(str(DEFAULT_RECIPE.parent / "mini" / "teacher"), dtype=torch.float32)
    layers = [
        torch.cat([each.detach().flatten() for each in layer.parameters() if each.dim() == 2])
        for layer in teacher.roberta.encoder.layer
    ]
    for one, ours in enumerate(layers):
        for other, theirs in enumerate(layers):
            alike = torch.cosine_similarity(ours, theirs, dim=0)
            assert alike > 0.8 if (one - other) % 3 == 0 else alike < 0.1, (one, other)
    better = load_recipe(DEFAULT_RECIPE.parent / "mini_better.yaml")
    assert [layer % 3 for layer in better.student.init_layers] == [0, 1, 2, 0, 1, 2]


def test_the_better_recipe_is_the_default_with_two_changes():
    default, better = (
        flatten(to_plain(load_recipe(path))) for path in (DEFAULT_RECIPE, DEFAULT_RECIPE.parent / "mini_better.yaml")
    )
    changed = {name for name in default | better if default.get(name) != better.get(name)}
    assert changed == {"student.init_layers", "loss.kl_positions"}


def test_an_unmarked_value_is_found():
    text = """
    optim:
      lr: 1.0e-3
      eps: 1.0e-6 # published:
      clip: 5.0 # assumed
      betas: [0.9, 0.98] # published: RoBERTa, table 9
    data: # assumed
      train: # assumed: two files
        - a
        - b
      heldout:
        - c
    """
    assert [line.split(":")[0].strip() for line in unmarked_values(text)] == ["lr", "eps", "heldout"]
