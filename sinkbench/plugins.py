"""The plugins by kind and name, and those that a recipe uses, checked against one another."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sinkbench import discovery
from sinkbench.api import KINDS, BuildContext, Params, Plugin
from sinkbench.config import Config, PluginRef
from sinkbench.discovery import Broken, Package
from sinkbench.errors import DEBUG, PluginError, RecipeError, SinkbenchError
from sinkbench.explain import explain, nearest

FORWARD_PASSES = "forward_passes"
"""What a metric requires that makes forward passes of its own: ``sinkbench measure`` alone provides it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plugin and the package that registered it."""

    kind: str
    plugin: Plugin
    package: Package


@dataclass(frozen=True, kw_only=True)
class PluginIndex:
    """All plugins of this environment.

    Attributes:
        found: in the order of the entry points; a name may occur twice.
        broken: packages that could not be imported or whose hooks failed.
        disabled: packages that SINKBENCH_PLUGINS leaves out.
    """

    found: tuple[Found, ...]
    broken: tuple[Broken, ...] = ()
    disabled: tuple[Package, ...] = ()

    def names(self, kind: str) -> list[str]:
        return sorted({item.plugin.name for item in self.found if item.kind == kind})

    def providers(self, kind: str, name: str) -> list[Found]:
        """Everything registered under a name; more than one is a clash."""
        return [item for item in self.found if (item.kind, item.plugin.name) == (kind, name)]

    def get(self, kind: str, name: str, where: str = "") -> Found:
        """The plugin of a name.

        Args:
            kind: one of ``sinkbench.api.KINDS``.
            name: as in a recipe.
            where: place in the recipe, for the error.

        Raises:
            PluginError: no package provides it, or several do.
        """
        providers = self.providers(kind, name)
        if len(providers) == 1:
            return providers[0]
        where = where or f"{_words(kind)} {name!r}"
        if providers:
            packages = list(dict.fromkeys(p.package for p in providers))
            by = " and by ".join(f"{p.package} ({p.package.id})" for p in providers)
            problem = f"{_words(kind)} {name!r} is provided by {by}"
            alone = len(packages) == 1
            remedy = f"rename one in {packages[0].module}" if alone else discovery.leave_out(packages)
            raise PluginError(where, problem, remedy)
        raise self._unknown(kind, name, where)

    def _unknown(self, kind: str, name: str, where: str) -> PluginError:
        problem = f"there is no {_words(kind)} {name!r}"
        other = next((item.kind for item in self.found if item.plugin.name == name), None)
        if other:
            problem += f" ({name} is a {_words(other)} plugin)"
        remedy = nearest(name, self.names(kind))
        if self.broken:
            which = " and ".join(f"{b.package} is broken ({b.error})" for b in self.broken)
            problem += f", and the plugin package {which}"
            names = ", ".join(dict.fromkeys(b.package.distribution for b in self.broken))
            remedy = f"{remedy} Or repair {names}" if remedy.endswith("?") else f"repair {names}; {remedy}"
        elif self.disabled:
            left_out = ", ".join(package.id for package in self.disabled)
            problem += f" ({discovery.SELECTION} leaves out {left_out})"
        return PluginError(where, problem, remedy)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A plugin as a recipe uses it.

    Attributes:
        path: dotted key of its block.
        params: the validated parameters.
    """

    path: str
    plugin: Plugin
    params: Params
    package: Package


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The plugins of a recipe."""

    attention: Chosen
    normalization: Chosen
    positional: Chosen
    loss: Chosen
    transforms: tuple[Chosen, ...]
    metrics: tuple[Chosen, ...]

    def __iter__(self) -> Iterator[Chosen]:
        yield from (self.attention, self.normalization, self.positional, self.loss)
        yield from self.transforms
        yield from self.metrics


def discover() -> PluginIndex:
    """Import the plugin packages and ask each for its plugins.

    Raises:
        PluginError: SINKBENCH_PLUGINS names a package that is not installed.
    """
    packages = discovery.discover()
    found: list[Found] = []
    for kind in KINDS:
        hook = f"sinkbench_{kind}"
        for package, answer in packages.call(hook):
            wrong = _wrong_answer(answer)
            if wrong:
                packages.fail(package, f"its hook {hook} returned {wrong} instead of a list of Plugin")
                continue
            found += [Found(kind=kind, plugin=plugin, package=package) for plugin in answer]
    return PluginIndex(found=tuple(found), broken=tuple(packages.broken), disabled=tuple(packages.disabled))


def resolve(
    config: Config,
    index: PluginIndex,
    provenance: Mapping[str, str] | None = None,
    *,
    provided: Collection[str] = (),
) -> Resolved:
    """Find and check the plugins that a recipe names.

    Args:
        config: the validated recipe.
        index: from ``discover``.
        provenance: where the recipe's values came from, for errors.
        provided: capabilities of what the plugins are for, beside their own.

    Raises:
        PluginError: a plugin is unknown or ambiguous, its parameters are wrong, or it does not fit
            the rest of the recipe; all that does not fit is in the one message.
        RecipeError: a metric is listed twice.
    """
    places = provenance or {}

    def choose(kind: str, path: str, ref: PluginRef) -> Chosen:
        return _choose(index, kind, path, ref, places)

    resolved = Resolved(
        attention=choose("attention", "model.attention", config.model.attention),
        normalization=choose("normalization", "model.normalization", config.model.normalization),
        positional=choose("positional", "model.positional", config.model.positional),
        loss=choose("loss", "loss", config.loss),
        transforms=tuple(
            choose("data_transform", f"data.transforms[{i}]", ref)
            for i, ref in enumerate(config.data.transforms)
        ),
        metrics=_metrics(config, index, places),
    )
    _check_fit(tuple(resolved), config, index, places, provided)
    return resolved


def build(chosen: Chosen, context: BuildContext) -> Any:
    """What a plugin makes of its parameters for a model.

    Raises:
        PluginError: its build raised something else; that is the cause of this error.
    """
    try:
        return chosen.plugin.build(chosen.params, context)
    except SinkbenchError:
        raise
    except Exception as error:
        where = f"{chosen.path}: plugin {chosen.plugin.name} of {chosen.package}"
        problem = f"its build raised {type(error).__name__}: {error}"
        remedy = f"repair it in {chosen.package.module}; {DEBUG}=1 shows the traceback"
        raise PluginError(where, problem, remedy) from error


def resolve_metrics(config: Config, index: PluginIndex) -> tuple[Chosen, ...]:
    """Find and check the metrics alone, for a model that no recipe made.

    Raises:
        PluginError, RecipeError: as ``resolve``.
    """
    metrics = _metrics(config, index, {})
    _check_fit(metrics, config, index, {}, (FORWARD_PASSES,))
    return metrics


def refuse_repeated(metrics: Iterable[tuple[str, str]]) -> None:
    """Refuse a metric that is listed twice: its results have the same keys, whatever its parameters.

    Args:
        metrics: where each is listed, and its name.

    Raises:
        RecipeError: one is listed twice.
    """
    known: set[str] = set()
    for where, name in metrics:
        if name in known:
            problem = f"the metric {name!r} is listed twice, and its results would overwrite each other"
            example = "{name: sink, eps: [0.3, 0.01]}"
            remedy = f"list it once, with all values where it takes lists, as in {example}"
            raise RecipeError(where, problem, remedy)
        known.add(name)


def _metrics(config: Config, index: PluginIndex, places: Mapping[str, str]) -> tuple[Chosen, ...]:
    paths = {f"measure.metrics[{i}]": ref for i, ref in enumerate(config.measure.metrics)}
    refuse_repeated((_where(path, places), ref.name) for path, ref in paths.items())
    return tuple(_choose(index, "metric", path, ref, places) for path, ref in paths.items())


def _where(path: str, places: Mapping[str, str]) -> str:
    """A plugin's block in the recipe, for errors."""
    place = places.get(f"{path}.name") or places.get(path)
    return f"{place}: {path}" if place else path


def _choose(index: PluginIndex, kind: str, path: str, ref: PluginRef, places: Mapping[str, str]) -> Chosen:
    name_place = places.get(f"{path}.name") or places.get(path)
    found = index.get(kind, ref.name, _where(path, places))
    schema = found.plugin.params
    try:
        params = schema.model_validate_json(json.dumps(ref.params), strict=True)
    except ValidationError as e:
        fault = explain(e, schema, ref.params)[0]
        key = f"{path}.{fault.key}" if fault.key else path
        place = places.get(key) or name_place
        of = f"{_words(kind)} {ref.name!r} of {found.package}"
        where = f"{place}: {key}" if place else key
        raise PluginError(where, f"{fault.problem} ({of})", fault.remedy) from None
    return Chosen(path=path, plugin=found.plugin, params=params, package=found.package)


def _check_fit(
    resolved: Sequence[Chosen],
    config: Config,
    index: PluginIndex,
    places: Mapping[str, str],
    given: Collection[str],
) -> None:
    problems: list[str] = []
    for chosen in resolved:
        problems += [f"{chosen.path} {chosen.plugin.name}: {text}" for text in _problems(chosen, config)]
        provided = {p for other in resolved if other is not chosen for p in other.plugin.provides}
        for capability in sorted(chosen.plugin.requires - provided - set(given)):
            if capability == FORWARD_PASSES:
                problems.append(f"{chosen.path} {chosen.plugin.name}: {own_passes(chosen.plugin.name)}")
                continue
            able = sorted({f.plugin.name for f in index.found if capability in f.plugin.provides})
            hint = f", which {', '.join(able)} would provide" if able else ""
            problems.append(f"{chosen.path} {chosen.plugin.name}: requires {capability!r}{hint}")
    if len(problems) == 1:
        where, _, text = problems[0].partition(": ")
        problem, _, remedy = text.partition("; ")
        path, _, name = where.partition(" ")
        raise PluginError(f"{_where(path, places)} {name}", problem, remedy or "change one of the two")
    if problems:
        text = ", ".join(f"({i}) {problem}" for i, problem in enumerate(problems, start=1))
        raise PluginError(f"recipe {config.name}", f"its parts do not fit: {text}", "change these")


def own_passes(metric: str) -> str:
    """What is wrong with such a metric in a run, and what to do."""
    return (
        f"the metric {metric} makes forward passes of its own, which training does not; "
        f"leave it out, and give --metrics {metric} to sinkbench measure"
    )


def _problems(chosen: Chosen, config: Config) -> Sequence[str]:
    if chosen.plugin.check is None:
        return ()
    where = f"{chosen.path} {chosen.plugin.name}"
    remedy = f"repair the plugin package {chosen.package}"
    try:
        problems: Any = chosen.plugin.check(chosen.params, config)
    except Exception as e:
        raise PluginError(where, f"its check raised {type(e).__name__}: {e}", remedy) from e
    if not isinstance(problems, list) or not all(isinstance(problem, str) for problem in problems):
        raise PluginError(where, f"its check returned {type(problems).__name__}, not a list of str", remedy)
    return problems


def _wrong_answer(answer: object) -> str | None:
    """What a hook returned, if that is not a list of well-formed plugins."""
    if not isinstance(answer, list):
        return type(answer).__name__
    for item in answer:
        if not isinstance(item, Plugin):
            return f"a list with a {type(item).__name__}"
        if not (isinstance(item.params, type) and issubclass(item.params, Params)):
            return f"a Plugin {item.name!r} whose params is not a subclass of Params"
        if not callable(item.build):
            return f"a Plugin {item.name!r} whose build is not callable"
    return None


def _words(kind: str) -> str:
    return kind.replace("_", " ")
