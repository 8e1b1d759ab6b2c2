"""What a target of ``sinkbench measure`` is, and its measurement, one model in memory at a time."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import ValidationError

from sinkbench import plugins, recipe
from sinkbench.checkpoint import INFO, Checkpoint, CheckpointStore
from sinkbench.config import Config, IndexedConfig, MeasureConfig, PluginRef
from sinkbench.data.manifest import MANIFEST, prepared_in
from sinkbench.data.prepare import cached_folder
from sinkbench.errors import DataError, HostError, SinkbenchError
from sinkbench.measure import finished
from sinkbench.measure.finished import Finished
from sinkbench.measure.hf_place import Place, Trust, find_place, refuse_absent, require_packages
from sinkbench.measure.inputs import Inputs
from sinkbench.measure.results import Result
from sinkbench.measure.settings import Settings, metric_reference
from sinkbench.plugins import Chosen

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""Files of a model's folder that its tokenizer may be read from."""

Advance = Callable[[int, int], None]
"""Called with sequences done and sequences in all."""


def is_run(target: str) -> bool:
    """Whether a target is a run of ours or one of its checkpoints, rather than a model of others."""
    folder = Path(target).expanduser()
    if (folder / "config.json").exists():
        return False
    return any(
        (folder / name).exists() for name in (INFO, "recipe.yaml", "checkpoints")
    ) or folder.name.startswith("step_")


def is_sweep(target: str) -> bool:
    """Whether a target is the folder of a sweep's runs."""
    folder = Path(target).expanduser()
    return not is_run(target) and not (folder / "config.json").exists() and any(folder.glob("*/recipe.yaml"))


def checkpoint_steps(target: str) -> list[int]:
    """The steps of a run's checkpoints, oldest first.

    Raises:
        DataError: the target is not a run with checkpoints.
    """
    refuse_absent(target)
    steps = CheckpointStore(Path(target).expanduser() / "checkpoints").steps()
    if not steps:
        raise DataError(target, "is no run with checkpoints", "leave out --step all")
    return steps


def find_target(target: str, settings: Settings) -> None:
    """Finds a target, so that one that is not there is told before others are measured. A model of the hub is
    fetched.

    Raises:
        SinkbenchError: there is no such target.
    """
    if not is_run(target):
        _place(target, settings)
        return
    refuse_absent(target)


def measure_target(target: str, settings: Settings, kept: Finished, advance: Advance) -> Iterator[Result]:
    """The results of a target, one for each kind of inputs. Each is kept once it is there.

    Raises:
        SinkbenchError: the target cannot be measured.
    """
    yield from (_run if is_run(target) else _open)(target, settings, kept, advance)


def _run(target: str, settings: Settings, kept: Finished, advance: Advance) -> Iterator[Result]:
    from sinkbench.measure.runs import find_checkpoint, measure_run

    checkpoint = find_checkpoint(Path(target).expanduser(), settings.step)
    known = _recipe_of_run(checkpoint, settings)
    chosen = known and known[1]
    for kind in settings.inputs:
        own_text = kind == "natural" and settings.prompts is None
        files = _files(checkpoint) + (_data(known[0]) if known and own_text else [])
        name = _key(files, kind, settings, chosen)
        result = kept.get(name)
        if result is None:
            result = measure_run(target, checkpoint, kind, settings)
            kept.put(name, result)
        advance(result.count, result.count)
        yield result.model_copy(update={"target": target})


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.folder / INFO, checkpoint.recipe]


def _data(config: Config) -> list[Path]:
    """What tells a run's data from others under the same path."""
    data = config.data
    if not isinstance(data, IndexedConfig):
        return []
    try:
        prepared = [cached_folder(data.prepare)] if data.prepare else []
    except SinkbenchError:
        return []  # as measuring will say
    paths = [entry.path for entry in data.train] + [*data.validation.values()]
    folders = prepared or [Path(path).expanduser() for path in paths]
    manifests = (found / MANIFEST for folder in folders for found in prepared_in(folder))
    return [path for path in manifests if path.is_file()]


def _open(target: str, settings: Settings, kept: Finished, advance: Advance) -> Iterator[Result]:
    from sinkbench.measure.hf_load import open_model

    place = _place(target, settings)
    chosen = _metrics(settings)
    # The copies of its plugins that an exported model runs are code that came with it.
    code = [*place.folder.glob("*.py")] if settings.allow_code else []
    files = place.files + code + [path for name in TOKENIZER for path in place.folder.glob(name)]
    names = {kind: _key(files, kind, settings, chosen) for kind in settings.inputs}
    known = {kind: kept.get(name) for kind, name in names.items()}
    missing = [kind for kind, result in known.items() if result is None]
    fresh: Iterator[Result] = iter(())
    if missing:
        from sinkbench.measure.hf import measure_open_model

        opened = open_model(
            place, device=settings.torch_device(), dtype=settings.dtype, trust=_trust(settings)
        )
        fresh = measure_open_model(opened, missing, settings, advance)
    for kind, result in known.items():
        if result is None:
            result = next(fresh)
            kept.put(names[kind], result)
        advance(result.count, result.count)
        yield result.model_copy(update={"target": target})


def _place(target: str, settings: Settings) -> Place:
    refuse_absent(target)
    try:
        require_packages("transformers")
    except HostError as error:
        if Path(target).expanduser().exists():
            raise
        problem = "is no run or folder here, and a model of the hub needs transformers, not installed here"
        raise DataError(target, problem, "correct the path, or pip install 'sinkbench[hf]'") from error
    if settings.step is not None:
        raise DataError(f"{target}: --step", "is of a run's checkpoint", "leave it out")
    return find_place(target, _trust(settings))


def _trust(settings: Settings) -> Trust:
    return Trust(pickle=settings.allow_pickle, code=settings.allow_code)


def _recipe_of_run(checkpoint: Checkpoint, settings: Settings) -> tuple[Config, tuple[Chosen, ...]] | None:
    """The recipe of a run and the plugins that take part in measuring it; None if they cannot be had, as
    measuring will say."""
    overrides = [f"measure.metrics=[{', '.join(settings.metrics)}]"] if settings.metrics else []
    try:
        config = recipe.to_config(recipe.load(checkpoint.recipe, overrides))
        return config, tuple(plugins.resolve(config, plugins.discover(), provided={plugins.FORWARD_PASSES}))
    except SinkbenchError:
        return None


def _metrics(settings: Settings) -> tuple[Chosen, ...] | None:
    """The same of an open model, whose sizes the metrics are not checked against here."""
    index = plugins.discover()
    chosen = []
    try:
        written = [PluginRef.model_validate(metric_reference(text)) for text in settings.metrics]
        for ref in written or MeasureConfig().metrics:
            found = index.get("metric", ref.name)
            params = found.plugin.params.model_validate(ref.params)
            chosen.append(Chosen(path=ref.name, plugin=found.plugin, params=params, package=found.package))
    except (SinkbenchError, ValidationError):
        return None
    return tuple(chosen)


def _key(
    files: list[Path], kind: Inputs, settings: Settings, chosen: tuple[Chosen, ...] | None
) -> str | None:
    """Where a result is kept: it depends on everything but how fast it was made. None: it is not kept."""
    if chosen is None:
        return None
    natural = kind == "natural"
    prompts = settings.prompts if natural else None
    what = replace(
        settings, inputs=(kind,), prompts=prompts, batch_size=None, allow_pickle=False, allow_code=False
    )
    if prompts is not None and prompts.is_file():
        files = [*files, prompts]
    python = platform.python_version() if natural else ""
    return finished.key(files, chosen, python=python, **asdict(what))
