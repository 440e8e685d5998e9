"""What `make install` leaves in site-packages."""

import shutil
import subprocess
import sys
import zipfile

import distilcb
from distilcb.config import REPOSITORY


def test_a_script_beside_the_clone_imports_the_package_and_not_the_clone_as_a_namespace(tmp_path):
    clone, site_packages = tmp_path / "distilcb", tmp_path / "site-packages"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, clone)
    shutil.copytree(REPOSITORY / "distilcb", clone / "distilcb", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_editable as build; build({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site_packages)

    script = tmp_path / "mine.py"
    script.write_text(
        f"import site; site.addsitedir({str(site_packages)!r})\n"
        "import distilcb.errors\nprint(distilcb.__version__, distilcb.errors.__file__)\n"
    )
    # -S and no PYTHONPATH: the package as it is installed here is not there.
    environment = {"PATH": "/usr/bin:/bin"}
    said = subprocess.run([sys.executable, "-S", script], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.split() == [distilcb.__version__, str(clone / "distilcb" / "errors.py")]
