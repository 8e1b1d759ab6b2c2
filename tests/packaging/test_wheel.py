"""The built wheel: what it carries, and that it works away from the checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import Installation

PACKAGES = {"sinkbench": "sinkbench", "plugins": "sinkbench_plugins", "recipes": "sinkbench_recipes"}


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("folder", PACKAGES)
def test_the_wheel_carries_every_file(files: set[str], source: Path, folder: str) -> None:
    expected = {
        f"{PACKAGES[folder]}/{path.relative_to(source / folder).as_posix()}"
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert expected == {name for name in files if name.startswith(f"{PACKAGES[folder]}/")}


def test_the_wheel_carries_nothing_else(files: set[str]) -> None:
    folders = {name.partition("/")[0] for name in files}
    (metadata,) = folders - set(PACKAGES.values())
    assert metadata.endswith(".dist-info")


def test_the_wheel_is_typed_and_has_the_main_recipes(files: set[str]) -> None:
    assert {"sinkbench/py.typed", "sinkbench_recipes/demo.yaml", "sinkbench_recipes/text.yaml"} <= files


def test_the_installation_hides_the_checkout(installation: Installation) -> None:
    code = "import sinkbench, sinkbench_plugins; print(sinkbench.__file__); print(sinkbench_plugins.__file__)"
    done = installation.run(installation.python, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(str(installation.environment) in line for line in done.stdout.splitlines())


def test_plugins_are_listed(installation: Installation) -> None:
    done = installation.sinkbench("plugins", "list")
    assert done.returncode == 0, done.stderr
    for name in ("softmax_off_by_one", "sigmoid", "rmsnorm", "rope", "causal_lm"):
        assert name in done.stdout


def test_a_shipped_recipe_is_found_by_name(installation: Installation) -> None:
    done = installation.sinkbench("recipe", "show", "demo.yaml")
    assert done.returncode == 0, done.stderr
    assert "bigram_backcopy" in done.stdout


def test_a_shipped_recipe_trains(installation: Installation) -> None:
    done = installation.pretrain("demo.yaml", "train.steps=2", "optim.warmup_steps=1", "name=shipped")
    assert done.returncode == 0, done.stderr
    assert (installation.folder / "runs" / "shipped" / "metrics.jsonl").is_file()
