"""Every hook of hookspecs.py: a package that implements it is asked once, what it answers counts, and
SINKBENCH_TRACE_PLUGINS prints the call. And the version of sinkbench.api that a package names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbench import discovery, hookspecs, plugins
from sinkbench.api import API_VERSION, KINDS
from sinkbench.errors import PluginError
from tests.unit.conftest import Install

HOOKS = [
    name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("sinkbench_")
]

OF_A_KIND = """\
from sinkbench.api import Plugin, hookimpl

@hookimpl
def HOOK():
    return [Plugin(name="acme_one", summary="a test", build=print)]
"""
OF_RECIPES = """\
from pathlib import Path
from sinkbench.api import hookimpl

@hookimpl
def HOOK():
    return {"acme": Path("/recipes/of/acme")}
"""


def effect_of_a_kind(hook: str) -> None:
    found = plugins.discover().get(hook.removeprefix("sinkbench_"), "acme_one")
    assert found.package.id == "acme-pack:variants"


def effect_of_recipes(hook: str) -> None:
    assert discovery.recipe_folders()["acme"] == Path("/recipes/of/acme")


TESTED: dict[str, tuple[str, Callable[[str], None]]] = {
    **{f"sinkbench_{kind}": (OF_A_KIND, effect_of_a_kind) for kind in KINDS},
    "sinkbench_recipe_paths": (OF_RECIPES, effect_of_recipes),
}
"""Hook -> the source of a package that implements it, and what must come of that."""


def test_every_hook_has_a_test() -> None:
    assert set(HOOKS) == TESTED.keys()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_and_takes_nothing(hook: str) -> None:
    function = getattr(hookspecs, hook)
    assert inspect.getdoc(function)
    assert not inspect.signature(function).parameters


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_called_once_and_traced(
    hook: str, install: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, effect = TESTED[hook]
    install("acme-pack", source.replace("HOOK", hook))
    effect(hook)
    assert not capfd.readouterr().err
    monkeypatch.setenv(discovery.TRACE, "1")
    effect(hook)
    lines = capfd.readouterr().err.splitlines()
    calls = [line for line in lines if "acme-pack:variants" in line]
    assert calls == [f"sinkbench plugins: call {hook} of acme-pack:variants"]
    after = lines[lines.index(calls[0]) + 1]
    assert after.startswith(f"sinkbench plugins: {hook} returned ")
    assert "acme" in after


def test_a_hook_that_raises_is_traced(
    install: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install("acme-pack", OF_A_KIND.replace("HOOK", "sinkbench_loss").replace("return", "1 / 0\n    return"))
    monkeypatch.setenv(discovery.TRACE, "1")
    (broken,) = plugins.discover().broken
    assert broken.error == "its hook sinkbench_loss raised ZeroDivisionError: division by zero"
    assert "sinkbench_loss raised ZeroDivisionError: division by zero" in capfd.readouterr().err


MAJOR, MINOR = (int(number) for number in API_VERSION.split("."))
NEEDS_MORE = "from sinkbench.api import SomethingNewer\n"


def name_version(tmp_path: Path, version: str) -> None:
    (info,) = (tmp_path / "site" / "acme-pack").glob("*.dist-info")
    with (info / "entry_points.txt").open("a") as file:
        file.write(f"\n[{discovery.API_GROUP}]\n{version} = sinkbench.api\n")


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (f"{MAJOR}.{MINOR + 1}", f"newer than the {API_VERSION} here: upgrade sinkbench"),
        (f"{MAJOR + 1}.0", f"newer than the {API_VERSION} here: upgrade sinkbench"),
        (f"{MAJOR - 1}.9", f"older than the {API_VERSION} here: upgrade it"),
        ("next", f"it names sinkbench.api 'next', which is not a version such as {API_VERSION}"),
    ],
)
def test_a_package_for_another_version_of_the_api(
    install: Install, tmp_path: Path, version: str, error: str
) -> None:
    install("acme-pack", NEEDS_MORE)
    name_version(tmp_path, version)
    index = plugins.discover()
    (broken,) = index.broken
    assert broken.error.endswith(error)
    assert f"sinkbench.api {version}" in broken.error.replace("'", "")
    with pytest.raises(PluginError) as caught:
        index.get("attention", "theirs")
    assert f"the plugin package acme-pack 1.0 is broken ({broken.error})" in str(caught.value)


def test_a_package_that_names_no_version_and_needs_another(install: Install) -> None:
    install("acme-pack", NEEDS_MORE)
    (broken,) = plugins.discover().broken
    assert "cannot import name 'SomethingNewer' from 'sinkbench.api'" in broken.error
    assert broken.error.endswith(f"; this is sinkbench.api {API_VERSION}")


def test_a_package_for_this_version_of_the_api(install: Install, tmp_path: Path) -> None:
    install("acme-pack", OF_A_KIND.replace("HOOK", "sinkbench_loss"))
    name_version(tmp_path, API_VERSION)
    assert plugins.discover().get("loss", "acme_one").package.distribution == "acme-pack"
