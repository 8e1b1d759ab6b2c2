"""Plugin packages that know sinkbench only as an installed wheel: a good one and three faulty ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.packaging.conftest import Installation

GOOD = '''
"""Attention by the squared positive part of the score."""

from sinkbench.api import AttentionSpec, BuildContext, Elementwise, Params, Plugin, hookimpl


class SquaredReluParams(Params):
    normalize: bool = False


def squared_relu(score):
    return score.relu().square()


def build(params: SquaredReluParams, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=squared_relu, normalize=params.normalize))


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [Plugin(name="squared_relu", summary="relu(s)^2", params=SquaredReluParams, build=build)]
'''

BROKEN = """
import a_library_that_nobody_has
"""

TAKEN = """
from sinkbench.api import AttentionSpec, Plugin, Softmax, hookimpl


@hookimpl
def sinkbench_attention():
    build = lambda params, context: AttentionSpec(rule=Softmax(sink_logit=1.0))
    return [Plugin(name="softmax", summary="a softmax of my own", build=build)]
"""

SHORT = ("train.steps=2", "optim.warmup_steps=1", "log.every=1")


@pytest.fixture(scope="module")
def crowd(
    make_installation: Callable[[Sequence[Path]], Installation],
    build_plugin: Callable[[str, str], Path],
) -> Installation:
    """All of them beside the wheel: the faulty ones must not stand in the way of the good one."""
    return make_installation(
        [
            build_plugin("squared_relu", GOOD),
            build_plugin("broken_attention", BROKEN),
            build_plugin("taken_name", TAKEN),
        ]
    )


def one_line(done_stderr: str) -> str:
    (line,) = done_stderr.strip().splitlines()
    return line


def test_it_is_listed_with_its_package(crowd: Installation) -> None:
    listed = crowd.sinkbench("plugins", "list")
    assert listed.returncode == 0, listed.stderr
    (line,) = (line for line in listed.stdout.splitlines() if "relu(s)^2" in line)
    assert "squared_relu" in line
    assert "squared-relu 1.2.3" in line


def test_the_list_names_the_package_that_cannot_be_imported(crowd: Installation) -> None:
    listed = crowd.sinkbench("plugins", "list")
    assert "broken-attention" in listed.stdout + listed.stderr
    assert "a_library_that_nobody_has" in listed.stdout + listed.stderr


def test_it_is_trained_and_measured(crowd: Installation) -> None:
    trained = crowd.pretrain("demo.yaml", *SHORT, "model.attention=squared_relu", "name=third_party")
    assert trained.returncode == 0, trained.stderr
    run = crowd.folder / "runs" / "third_party"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if entry["event"] == "train"] == [1, 2]
    manifest = json.loads((run / "manifest.json").read_text())
    assert "squared-relu" in json.dumps(manifest["plugins"])

    measured = crowd.sinkbench("measure", str(run), "--json", "measured.json")
    assert measured.returncode == 0, measured.stderr
    (result,) = json.loads((crowd.folder / "measured.json").read_text())["results"]
    assert 0 <= result["metrics"]["sink_1_raw"] <= 100


def test_a_bad_parameter_is_an_error(crowd: Installation) -> None:
    done = crowd.pretrain("demo.yaml", *SHORT, "model.attention={name: squared_relu, normalise: true}")
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert "model.attention" in line
    assert "normalise" in line
    assert "normalize" in line.replace("normalise", "")


def test_a_package_that_cannot_be_imported_is_fatal_for_who_needs_it(crowd: Installation) -> None:
    done = crowd.pretrain("demo.yaml", *SHORT, "model.attention=from_the_broken_package")
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert "from_the_broken_package" in line
    assert "broken-attention" in line
    assert "a_library_that_nobody_has" in line


def test_a_name_taken_is_an_error_that_names_both_packages(crowd: Installation) -> None:
    done = crowd.pretrain("demo.yaml", *SHORT, "name=refused")
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert "softmax" in line
    assert "sinkbench:softmax" in line
    assert "taken-name:taken_name" in line
    assert "SINKBENCH_PLUGINS=-" in line
    assert not (crowd.folder / "runs" / "refused").exists()


def test_a_package_can_be_left_out(crowd: Installation) -> None:
    done = crowd.pretrain("demo.yaml", *SHORT, "name=without", SINKBENCH_PLUGINS="-taken-name")
    assert done.returncode == 0, done.stderr
