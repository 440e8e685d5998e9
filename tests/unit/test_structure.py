"""The shape of the code: imports point one way, entry points are short, no file names one machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from distilcb.config import REPOSITORY

# Parts of a layer import from those before it, and not from each other.
LAYERS = [
    {"errors", "durability"},
    {"launcher", "hub", "config", "gpus"},
    {"recipe"},
    {"command_line", "machine"},
    {"distributed", "native"},
    {"preemption", "watchdog", "surroundings"},
    {"data", "models", "losses", "monitor", "tasks"},
    {"engine"},
    {"export"},
    {"eval"},
    {"train", "finetune"},
    {"doctor", "plan"},
    {"launch"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
PACKAGE = REPOSITORY / "distilcb"
LAUNCH_FILES = sorted((REPOSITORY / "launch").rglob("*.py"))
LONGEST_LAUNCH_FILE = 45


def part_of(path):
    """'data' of distilcb/data/order.py, 'config' of distilcb/config.py, 'launch' of launch/train.py."""
    folders = path.relative_to(REPOSITORY).with_suffix("").parts
    return folders[1] if folders[0] == "distilcb" else folders[0]


def imported_modules(source):
    """Dotted names of all modules that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{name}" for name in names)


def imported_parts(source):
    """The parts of this project that a source imports; the package itself, for its version, is none."""
    for module in imported_modules(source):
        root, *rest = module.split(".")
        if root == "launch":
            yield "launch"
        elif root == "distilcb" and rest and rest[0] != "__version__":
            yield rest[0]


def wrong_imports(part, source):
    return sorted({target for target in imported_parts(source) if target != part and LEVEL[target] >= LEVEL[part]})


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"] + LAUNCH_FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_only_point_left(path):
    assert part_of(path) in LEVEL, "a part of the package that docs/architecture.md does not place"
    wrong = wrong_imports(part_of(path), path.read_text(encoding="utf-8"))
    assert not wrong, f"{part_of(path)} may not import {wrong}"


def test_every_layer_is_there():
    assert {part_of(path) for path in SOURCES} == set(LEVEL)


def test_the_package_itself_imports_nothing():
    assert list(imported_modules((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("losses", "from distilcb.engine import stepper", ["engine"]),
        ("losses", "def f():\n    from distilcb.engine.stepper import Stepper", ["engine"]),
        ("losses", "import distilcb.data.order", ["data"]),
        ("config", "from distilcb import distributed", ["distributed"]),
        ("export", "from distilcb.eval.report import as_markdown", ["eval"]),
        ("engine", "from distilcb import train, losses", ["train"]),
        ("train", "import launch.train", ["launch"]),
        ("losses", "from distilcb.losses import reference\nfrom distilcb.config import LossConfig", []),
        ("errors", "import distilcb\nfrom distilcb import __version__\nimport torch", []),
    ],
)
def test_an_import_that_points_right_is_found(part, source, wrong):
    assert wrong_imports(part, source) == wrong


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_an_entry_point_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_LAUNCH_FILE


def tracked_files():
    """What git tracks, or would: new files that it does not ignore are in."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git checkout here, so nothing tells which files belong to the project")
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [REPOSITORY / name for name in listed.split("\0") if name]
    assert REPOSITORY / "pyproject.toml" in files
    return [path for path in files if path.is_file()]


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in tracked_files() if path.suffix == ".py" and path.stem in drawers] == []


# Not as part of a longer path or an address: docs/work, {home}/work and example.org/home are nobody's machine.
ONE_MACHINE = re.compile(r"(?<![\w.})/-])/(?:work|root|home)(?![\w-])")


def text_of(path):
    """Its text, or none of a file that is not text."""
    content = path.read_bytes()
    try:
        return "" if b"\0" in content else content.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_names_a_folder_of_one_machine():
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if path != Path(__file__) and ONE_MACHINE.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["cd /work/main", "'/home/me'", "PATH=/root/bin:/home", "x=/work"])
def test_a_folder_of_one_machine_is_recognised(text):
    assert ONE_MACHINE.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/", "docs/work/x", "$HOME/work", "{home}/work", "/workers"])
def test_other_folders_are_not(text):
    assert not ONE_MACHINE.search(text)


# What README's and docs' lines make where they are given in the repository's folder.
MADE_BY_DOCUMENTED_LINES = [
    *("distill-22.out", "distill-22_1.out", "slurm/doctor-7.out", "doctor.json", "step_20.json", "runs/mini/DONE"),
    *("blocks/description.json", "heldout_blocks/description.json", "models/camembert-base/config.json"),
    *("early_student/config.json", "figures/results.json", "results/results.md"),
]


def ignored_by_git(names):
    tracked_files()  # skips where there is no checkout
    words = ["git", "-C", str(REPOSITORY), "check-ignore", "--no-index", *names]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


def test_git_ignores_what_documented_lines_make():
    assert ignored_by_git(MADE_BY_DOCUMENTED_LINES) == MADE_BY_DOCUMENTED_LINES


def test_git_ignores_nothing_that_belongs_to_the_project():
    ours = ["docs/results/torture.md", "distilcb/models/new.py", "distilcb/data/blocks.py", "benchmarks/doctor.json"]
    tracked = [str(path.relative_to(REPOSITORY)) for path in tracked_files()]
    assert ignored_by_git(ours + tracked) == []
