"""Finds the installed plugin packages and calls their hooks.

The entry points are walked here rather than by pluggy's own loader, which silently skips a name that
is already taken. A package that cannot be imported or answers a hook wrongly is remembered, not
fatal: only a recipe that needs it fails.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from sinkbench import hookspecs
from sinkbench.api import API_VERSION, PROJECT
from sinkbench.errors import PluginError
from sinkbench.explain import nearest

SELECTION = "SINKBENCH_PLUGINS"
"""Environment variable: a comma list; ``-name`` leaves a package out, bare names leave out all others, and
``none`` leaves out all but sinkbench's own. What is left out is not imported. A name is that of a
distribution, of an entry point, or distribution:entry_point."""
NONE = "none"

API_GROUP = "sinkbench.api"
"""Entry-point group in which a package names the version of sinkbench.api that it was written for. It is read
before the package is imported, so that a newer one does not fail with what it could not import."""

TRACE = "SINKBENCH_TRACE_PLUGINS"
"""Environment variable: 1 prints every hook call to stderr."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where plugins come from: one entry point of an installed distribution."""

    distribution: str
    version: str
    entry_point: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def id(self) -> str:
        return f"{self.distribution}:{self.entry_point}"

    @property
    def names(self) -> set[str]:
        """What it is called in the selection."""
        return {
            _normal(self.distribution),
            self.entry_point,
            f"{_normal(self.distribution)}:{self.entry_point}",
        }


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A package that cannot be used, and why."""

    package: Package
    error: str


@dataclass
class Discovery:
    """The packages that were found. ``broken`` grows when a hook fails."""

    manager: pluggy.PluginManager
    loaded: dict[Package, object] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    disabled: list[Package] = field(default_factory=list)

    def call(self, hook: str) -> list[tuple[Package, Any]]:
        """Call a hook of every package; what each returned, by package."""
        results: list[tuple[Package, Any]] = []
        for package, plugin in self.loaded.items():
            others = [other for other in self.loaded.values() if other is not plugin]
            try:
                answers = self.manager.subset_hook_caller(hook, remove_plugins=others)()
            except Exception as e:
                self.fail(package, f"its hook {hook} raised {_text(e)}")
                continue
            results += [(package, answer) for answer in answers]
        return results

    def fail(self, package: Package, error: str) -> None:
        self.broken.append(Broken(package=package, error=error))


def discover() -> Discovery:
    """Import every selected plugin package.

    Raises:
        PluginError: the selection names a package that is not installed.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE, "0") not in ("", "0"):
        manager.add_hookcall_monitoring(_before_call, _after_call)
    found = Discovery(manager)
    points = {_package(point): point for point in entry_points(group=PROJECT)}
    selected = _select(list(points))
    for package, point in points.items():
        if package in selected:
            _load(found, package, point)
        else:
            found.disabled.append(package)
    return found


def recipe_folders() -> dict[str, Path]:
    """Folders of recipes that plugin packages offer, by the package name that recipes use.

    Raises:
        PluginError: two packages offer the same name, or one returns something else than folders.
    """
    folders: dict[str, Path] = {}
    owners: dict[str, Package] = {}
    for package, answer in discover().call("sinkbench_recipe_paths"):
        if not isinstance(answer, Mapping) or not all(isinstance(p, Path) for p in answer.values()):
            problem = f"its hook sinkbench_recipe_paths returned {type(answer).__name__}"
            raise PluginError(package.id, problem, "return a dict of name -> pathlib.Path")
        for name, folder in answer.items():
            if name in folders:
                problem = f"offered by both {owners[name].id} and {package.id}"
                raise PluginError(f"recipes of {name!r}", problem, leave_out([owners[name], package]))
            folders[name], owners[name] = folder, package
    return folders


def leave_out(packages: Sequence[Package]) -> str:
    """The remedy where packages clash."""
    return f"set {SELECTION}={' or '.join(f'-{package.id}' for package in packages)} to leave one out"


def _load(found: Discovery, package: Package, point: EntryPoint) -> None:
    other = _other_api(point)
    if other:
        found.fail(package, other)
        return
    try:
        plugin = point.load()
    except (Exception, SystemExit) as e:  # a plugin's import may do anything
        lacks_a_name = isinstance(e, ImportError) and e.name == API_GROUP
        ours = f"; this is sinkbench.api {API_VERSION}" if lacks_a_name else ""
        found.fail(package, f"its import failed with {_text(e)}{ours}")
        return
    if any(plugin is other for other in found.loaded.values()):
        return  # two entry points of one module: one set of plugins
    try:
        found.manager.register(plugin, name=package.id)
        found.manager.check_pending()
    except pluggy.PluginValidationError as e:
        if found.manager.is_registered(plugin):
            found.manager.unregister(plugin)
        found.fail(package, _text(e))
        return
    found.loaded[package] = plugin


def _other_api(point: EntryPoint) -> str | None:
    """What is wrong with the version of sinkbench.api that a package names, if it names one."""
    ours = _numbers(API_VERSION)
    assert ours is not None
    named = point.dist.entry_points.select(group=API_GROUP) if point.dist else ()
    for wanted in (entry.name for entry in named):
        theirs = _numbers(wanted)
        if theirs is None:
            return f"it names sinkbench.api {wanted!r}, which is not a version such as {API_VERSION}"
        if theirs > ours:
            return f"it needs sinkbench.api {wanted}, newer than the {API_VERSION} here: upgrade sinkbench"
        if theirs[0] < ours[0]:
            return f"it was written for sinkbench.api {wanted}, older than the {API_VERSION} here: upgrade it"
    return None


def _numbers(version: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _package(point: EntryPoint) -> Package:
    distribution = point.dist
    return Package(
        distribution=distribution.name if distribution else "unknown",
        version=distribution.version if distribution else "0",
        entry_point=point.name,
        module=point.module,
    )


def _select(packages: list[Package]) -> set[Package]:
    words = [word.strip() for word in os.environ.get(SELECTION, "").split(",") if word.strip()]
    own = {package for package in packages if _normal(package.distribution) == PROJECT}
    if words == [NONE]:
        return own
    known = {name for package in packages for name in package.names} | {NONE}
    allowed: set[Package] = set()
    denied: set[Package] = set()
    for word in words:
        distribution, colon, entry_point = word.removeprefix("-").partition(":")
        name = f"{_normal(distribution)}:{entry_point}" if colon else distribution
        matches = {p for p in packages if name in p.names or _normal(name) in p.names}
        if not matches:
            raise PluginError(SELECTION, f"no plugin package is called {name!r}", nearest(name, known))
        (denied if word.startswith("-") else allowed).update(matches)
    return (allowed or set(packages)) - denied


def _normal(distribution: str) -> str:
    """A distribution name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _before_call(hook: str, methods: Any, arguments: Mapping[str, Any]) -> None:
    for method in methods:
        print(f"sinkbench plugins: call {hook} of {method.plugin_name}", file=sys.stderr)


def _after_call(outcome: Any, hook: str, methods: Any, arguments: Mapping[str, Any]) -> None:
    if methods:
        result = (
            f"raised {_text(outcome.exception)}" if outcome.exception else f"returned {outcome.get_result()}"
        )
        print(f"sinkbench plugins: {hook} {result}", file=sys.stderr)
