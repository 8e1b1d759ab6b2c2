"""Any change to a recipe leaves one that is valid, or an error of one line that names file and key."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinkbench import plugins, recipe, recipe_yaml
from sinkbench.errors import HostError, PluginError, RecipeError
from sinkbench.preflight import check_launcher
from sinkbench.recipe_files import shipped_root
from sinkbench.stopping import START_TIMEOUT
from tests.unit.test_wrong_input import contents

SETTINGS = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RECIPES = ("demo.yaml", "demo_sweep.yaml", "text.yaml", "sigmoid_1b.yaml")

odd_text = st.sampled_from(
    [
        *["", " ", "x", "../x", "/", "a\0b", "\ud800", "a\nb", "\x1b[31m", "é", "\u2028"],
        *["true", "5", "1e5", "~", "=", "<<"],
    ]
) | st.text(max_size=8)
odd_number = st.sampled_from(
    [0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan")]
)
scalar = st.none() | st.booleans() | odd_number | odd_text
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=5,
)
KEYS = ["", "name", "params", "a.b", "a[0]", "label", "sweep", "scale", "extends", "source", "path", "lr"]
KEYS += ["model.attention", "model.attention.name", "sweep.seed", "data", "loss"]
key = st.sampled_from(KEYS) | odd_text


@cache
def index() -> plugins.PluginIndex:
    return plugins.discover()


@cache
def texts() -> tuple[str, ...]:
    root = shipped_root()
    assert root is not None
    return tuple((root / name).read_text() for name in RECIPES)


@cache
def resolved() -> tuple[dict[str, Any], ...]:
    root = shipped_root()
    assert root is not None
    loaded = [recipe.load(root / name) for name in RECIPES]
    return tuple(recipe.to_config(recipe.expand(item)[0]).model_dump(by_alias=True) for item in loaded)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all parts of nested values."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


@st.composite
def mutated_values(draw: st.DrawFn) -> dict[str, Any]:
    """A whole recipe in which one to three values are others, are gone, or have a new neighbour."""
    values: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(resolved())))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(values))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        holder: Any = values
        for part in path:
            holder = holder[part]
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "delete":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(key)] = draw(value)
            case _:
                holder[last] = draw(value)
    return values


@st.composite
def mutated_text(draw: st.DrawFn) -> str:
    """The text of a shipped recipe with characters changed, removed, repeated or put in."""
    text = draw(st.sampled_from(texts()))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 20])))
        again = text[start : start + 40]
        piece = draw(st.sampled_from(["", again, *"{}[]:,-#&*!|>'\"%@`?~ \n\t.0e\\_é\x1b\x85"]))
        text = text[:start] + piece + text[end:]
    return text


def refused(check: Callable[[], object]) -> str | None:
    """The line of the error, or None if there is none. Any other exception is a fault of sinkbench."""
    try:
        check()
    except (RecipeError, PluginError) as error:
        return str(error)
    return None


def validate(path: Path) -> None:
    for run in recipe.expand(recipe.load(path)):
        plugins.resolve(recipe.to_config(run), index(), run.provenance)


def validates_or_names_the_place(path: Path) -> None:
    line = refused(lambda: validate(path))
    if line is None:
        return
    assert line.isprintable(), ascii(line)
    assert len(line) < 3000
    where, _, rest = line.partition(": ")
    # The file, or one that it extends and that set what does not fit; or the recipe, if several parts do not.
    assert where.split(":")[0].endswith(".yaml") or where.startswith("recipe "), line
    assert "; " in rest


@SETTINGS
@given(values=mutated_values())
def test_mutated_values(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "mutated.yaml"
    path.write_bytes(recipe_yaml.dump(values).encode("utf-8", "surrogatepass"))
    validates_or_names_the_place(path)


@SETTINGS
@given(text=mutated_text())
def test_mutated_text(tmp_path: Path, text: str) -> None:
    root = shipped_root()
    assert root is not None
    path = tmp_path / "mutated.yaml"
    if not (tmp_path / "_base").exists():
        (tmp_path / "_base").symlink_to(root / "_base")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    validates_or_names_the_place(path)


@SETTINGS
@given(path=st.from_regex(r"\A[a-z_.\[\]]{0,20}\Z") | odd_text, new=odd_text | value.map(str))
def test_odd_overrides(path: str, new: str) -> None:
    root = shipped_root()
    assert root is not None

    def load() -> None:
        run = recipe.load(root / "demo.yaml", [f"{path}={new}"])
        plugins.resolve(recipe.to_config(recipe.require_single(run)), index(), run.provenance)

    line = refused(load)
    assert line is None or (line.isprintable() and line.startswith("command line")), line


ENVIRONMENT = {
    "WORLD_SIZE: 'x' is not a whole number": {"WORLD_SIZE": "x"},
    "WORLD_SIZE: '0' is not a whole number": {"WORLD_SIZE": "0", "RANK": "0"},
    "WORLD_SIZE: '²' is not a whole number": {"WORLD_SIZE": "²"},
    "WORLD_SIZE: it is 2, but RANK is not set": {"WORLD_SIZE": "2"},
    "RANK: '' is not a whole number": {"RANK": ""},
    "RANK: '-1' is not a whole number": {"RANK": "-1"},
    "RANK: '99999999999' is not a whole number": {"RANK": "9" * 11},
    "RANK: it is 0, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT is not set": {"RANK": "0"},
    "RANK: it is 0, but MASTER_PORT is not set": {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here"},
    "RANK: 2 is not below WORLD_SIZE 2": {
        "RANK": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1",
    },
    "MASTER_PORT: 65536 is no port": {"MASTER_PORT": "65536"},
    "MASTER_PORT: 'http' is not a whole number": {"MASTER_PORT": "http"},
    "LOCAL_RANK: '1.5' is not a whole number": {"LOCAL_RANK": "1.5"},
    "LOCAL_WORLD_SIZE: 'all' is not a whole number": {"LOCAL_WORLD_SIZE": "all"},
    "SINKBENCH_START_TIMEOUT: '5m' is not a whole number": {"SINKBENCH_START_TIMEOUT": "5m"},
}
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    START_TIMEOUT,
)


@pytest.mark.parametrize("line", ENVIRONMENT)
def test_odd_environment(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    check_launcher()
    for name, text in ENVIRONMENT[line].items():
        monkeypatch.setenv(name, text)
    with pytest.raises(HostError) as caught:
        check_launcher()
    assert str(caught.value).startswith(line)


PROCESSES: dict[str, tuple[list[str], dict[str, str]]] = {
    "bad.yaml:2: optm: unknown key": (["bad.yaml"], {}),
    "RANK: 'x' is not a whole number": (["bad.yaml"], {"RANK": "x"}),
    "command line: model.num_layers: 99999999999 should be": (["demo", "model.num_layers=99999999999"], {}),
    "SINKBENCH_PLUGINS: no plugin package is called 'gone'": (["demo"], {"SINKBENCH_PLUGINS": "gone"}),
    "/dev/null/x/demo_softmax: cannot be written": (["demo", "output_dir=/dev/null/x"], {}),
    "command line: model: num_layers 1000 and hidden_size 1048576 make 4,": (
        ["demo", "model.num_layers=1000", "model.hidden_size=1048576"],
        {},
    ),
    "command line: model.seq_length: 67108864: 10 layers": (
        ["default_60m", "model.seq_length=67108864", "train={device: cpu, micro_batch_size: 512}"],
        {},
    ),
    "gone: no such folder; prepare it": (["default_60m", "data.train=gone"], {}),
}


@pytest.mark.parametrize("line", PROCESSES)
def test_processes_end_within_seconds(tmp_path: Path, line: str) -> None:
    arguments, environment = PROCESSES[line]
    (tmp_path / "bad.yaml").write_text("optim: 5\noptm: 3\n")
    before, spent = contents(tmp_path), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "sinkbench.pretrain", *arguments],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(line), done.stderr
    assert contents(tmp_path) == before
    assert after.ru_utime - spent.ru_utime < 3  # of the processor: others may use it meanwhile
