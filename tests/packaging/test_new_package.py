"""A package that ``sinkbench plugins new`` wrote, beside the built wheel: listed, tested, trained, measured,
exported. And packages that name another version of sinkbench.api."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sinkbench.api import API_VERSION
from tests.packaging.conftest import Installation, build_wheel

SHORT = ("train.steps=2", "optim.warmup_steps=1", "log.every=1")
NEWER = """
from sinkbench.api import SomethingOfLaterOn
"""


@pytest.fixture(scope="module")
def written(
    installation: Installation,
    make_installation: Callable[[Sequence[Path]], Installation],
    build_plugin: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Installation, Path]:
    """An environment with the new package and one that needs a newer API; the new package's folder."""
    folder = tmp_path_factory.mktemp("new")
    options = ("--kind", "attention", "--folder", str(folder))
    done = installation.sinkbench("plugins", "new", "soft_scores", *options)
    assert done.returncode == 0, done.stderr
    package = folder / "soft-scores"
    newer = build_plugin("newer_attention", NEWER, api_version="99.0")
    return make_installation([build_wheel(package), newer]), package


@pytest.mark.full
@pytest.mark.timeout(300)
def test_its_own_test_passes(written: tuple[Installation, Path]) -> None:
    environment, package = written
    done = environment.run(
        environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", package / "tests"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.full
def test_it_is_listed_beside_what_cannot_be_used(written: tuple[Installation, Path]) -> None:
    listed = written[0].sinkbench("plugins", "list")
    assert listed.returncode == 0, listed.stderr
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    (rest,) = (line[2] for line in lines if line[:2] == ["attention", "soft_scores"])
    assert rest.startswith("soft-scores 0.1.0 ")
    (broken,) = (line for line in listed.stdout.splitlines() if line.startswith("broken: newer-attention"))
    assert broken.endswith(
        f"it needs sinkbench.api 99.0, newer than the {API_VERSION} here: upgrade sinkbench"
    )


@pytest.mark.full
def test_a_recipe_that_needs_a_newer_api_says_so(written: tuple[Installation, Path]) -> None:
    done = written[0].pretrain("demo.yaml", *SHORT, "model.attention=of_later_on")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "there is no attention 'of_later_on'" in line
    assert "newer-attention 1.2.3 is broken (it needs sinkbench.api 99.0, newer than" in line


@pytest.mark.full
@pytest.mark.timeout(300)
def test_it_trains_is_measured_and_exports(written: tuple[Installation, Path]) -> None:
    pytest.importorskip("transformers")
    environment, _ = written
    trained = environment.pretrain("demo.yaml", *SHORT, "model.attention=soft_scores", "name=new")
    assert trained.returncode == 0, trained.stderr
    run = environment.folder / "runs" / "new"
    assert "soft-scores" in json.dumps(json.loads((run / "manifest.json").read_text())["plugins"])

    measured = environment.sinkbench("measure", str(run), "--json", "measured.json")
    assert measured.returncode == 0, measured.stderr
    (result,) = json.loads((environment.folder / "measured.json").read_text())["results"]
    assert 0 <= result["metrics"]["sink_1_raw"] <= 100

    code = "import sys; from sinkbench.export.commands import to_hf; sys.exit(to_hf())"
    exported = environment.run(environment.python, "-c", code, run, "exported")
    assert exported.returncode == 0, exported.stderr
    sources = {path.name for path in (environment.folder / "exported").glob("plugin_*.py")}
    assert sources == {"plugin_soft_scores.py"} | {name for name in sources if "sinkbench_plugins" in name}
