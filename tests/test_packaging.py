"""pyproject.toml, Makefile and CI agree with the files that are there."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"ftc": "ftc", "passes": "ftc.passes", "models": "ftc.models"}


def tracked(folder):
    """Files of `folder` that are part of the project (caches are not)."""
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_every_package_is_listed_so_that_none_vanishes_from_the_wheel():
    found = set()
    for folder, package in FOLDERS.items():
        for init in (path for path in tracked(folder) if path.name == "__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_module_is_in_a_package():
    for folder in FOLDERS:
        for path in tracked(folder):
            if path.suffix == ".py":
                assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_every_data_file_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for folder, package in FOLDERS.items():
        for path in (path for path in tracked(folder) if path.suffix != ".py"):
            name = ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
            assert any(path.match(pattern) for pattern in patterns.get(name, ())), f"{path} would not be in the wheel"


def test_core_dependencies_stay_light():
    names = {line.split(">")[0].split("=")[0].split("<")[0] for line in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "networkx", "numpy", "safetensors", "tokenizers", "typer", "rich"}  # networkx: what torch itself brings


def test_the_licence_is_the_whole_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000


def test_the_version_is_the_package_s_own():
    import ftc

    assert PROJECT["project"]["version"] == ftc.__version__


@pytest.mark.parametrize("target", ["help", "quickstart", "test", "bench", "clean"])
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        target == "help"
        or f"make {target}" in subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    )


def test_ci_runs_the_tests_and_stops_at_the_first_failure():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and "make test" in script
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
