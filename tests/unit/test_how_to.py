"""The examples of the how-to pages are plugins that work."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinkbench import hookspecs
from sinkbench.api import Plugin
from sinkbench.testing import CheckPlugin
from sinkbench.testing.check import CHECKS
from tests.documentation import blocks

PAGES = (
    *("how-to/attention.md", "how-to/normalization.md", "how-to/positional.md", "how-to/loss.md"),
    *("how-to/data-transform.md", "how-to/metric.md"),
)
EXAMPLES = {
    block.title.removesuffix(".py"): block
    for page in PAGES
    for block in blocks(page)
    if block.title is not None and "@hookimpl" in block.text
}
"""Module -> its block; a plugin has the name of its module."""
BY_ITSELF = [check.name for check in CHECKS].index("training")
"""The checks before this one need no model, and hardly any time."""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with every file of the pages."""
    folder = tmp_path_factory.mktemp("examples")
    written = [b.write(folder).stem for page in PAGES for b in blocks(page) if b.title is not None]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in written:
        sys.modules.pop(name, None)


def load(name: str) -> tuple[str, Plugin]:
    """The kind and the plugin of an example."""
    module = importlib.import_module(name)
    ((hook, function),) = (
        (hook, getattr(module, hook))
        for hook, _ in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(module, hook)
    )
    (plugin,) = function()
    assert plugin.name == name
    return hook.removeprefix("sinkbench_"), plugin


def test_every_kind_has_an_example(modules: Path) -> None:
    kinds = {load(name)[0] for name in EXAMPLES}
    assert kinds == {"attention", "normalization", "positional", "loss", "data_transform", "metric"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, modules: Path, check_plugin: CheckPlugin) -> None:
    kind, plugin = load(name)
    later = {check.name: "see test_example_in_a_model" for check in CHECKS[BY_ITSELF:] if kind in check.kinds}
    report = check_plugin(plugin, kind=kind, skip=later)
    assert report["shapes"].status == "passed" or kind == "metric"


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_in_a_model(name: str, modules: Path, check_plugin: CheckPlugin) -> None:
    kind, plugin = load(name)
    check_plugin(plugin, kind=kind)
