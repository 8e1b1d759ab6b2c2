"""The training loop: schedule of steps, logging, validation, probes and checkpoints."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from sinkbench import flops, manifest
from sinkbench.api import Batch, LossSpec
from sinkbench.batching import data_parallel_size, micro_batch_size
from sinkbench.checkpoint import CheckpointStore
from sinkbench.config import Config
from sinkbench.data.loader import micro_batches
from sinkbench.data.run_tokenizer import find_kept, has_other, keep_tokenizer, refuse_other
from sinkbench.data.source import SequenceSource, open_source
from sinkbench.errors import DataError, DivergedError, RecipeError, SinkbenchError, Stopped
from sinkbench.measure.probe import Probe, build_metrics
from sinkbench.measure.results import StepMetrics, write
from sinkbench.model import Declarations, build_stages, declare, most_tokens
from sinkbench.progress import Bar, Sink, open_sinks
from sinkbench.run_folder import RunFolder, folder_of, join, write_json
from sinkbench.saving import Saver, load, newest_good, open_good
from sinkbench.stopping import Deadline, Request

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout
    from sinkbench.megatron.training import StepResult
    from sinkbench.plugins import Resolved

T = TypeVar("T")

_log = logging.getLogger(__name__)

SHOWN_SEQUENCES = 4
"""Most sequences of a bad batch that an error names."""


def train(config: Config, resolved: Resolved, source: SequenceSource | None = None) -> dict[str, Any]:
    """Trains a recipe to its last step, from the newest checkpoint of its run folder if there is one.

    Every process of the job calls it.

    Args:
        source: of the recipe's data; default: it is opened here.

    Returns:
        The summary of the run, on the main process; an empty dict elsewhere.

    Raises:
        Stopped: by a signal or for want of time, after a checkpoint.
        SinkbenchError: of any kind.
    """
    from sinkbench.megatron import parallel

    deadline = Deadline(config.train.max_minutes)
    data_size = data_parallel_size(config.parallel, parallel.world_size())
    source = open_source(config) if source is None else source
    declared = declare(config, resolved, source.vocab_size)
    micro_batch = micro_batch_size(config, data_size, most_tokens(config, declared.backend.name))
    _check_needs(declared.loss, config, source)
    with parallel.running(config) as layout:
        return Trainer(config, resolved, declared, source, layout, micro_batch, deadline).run()


def _check_needs(loss: LossSpec, config: Config, source: SequenceSource) -> None:
    missing = sorted(loss.needs - source.sequence(0).keys()) if loss.needs else []
    if missing:
        problem = f"{config.loss.name} needs {' and '.join(missing)}, which the data does not give"
        remedy = "prepare dialogues (JSON with messages, or prompt and response), or choose another loss"
        raise RecipeError("loss", problem, remedy)


def _warn_of_window(declared: Declarations) -> None:
    window, length = declared.attention.window, declared.context.num_positions
    if window is not None and window >= length:
        _log.warning("a window of %d leaves out nothing of %d tokens: this is full attention", window, length)


def _warn_of_held_out(config: Config, source: SequenceSource) -> None:
    wanted = config.validation.sequences
    sizes = {name: len(source.validation(name)) for name in source.domains if config.validation.every}
    few = ", ".join(f"{size} of {name}" for name, size in sizes.items() if size < wanted)
    if few:
        _log.warning("validation reads fewer sequences than the %d asked for, all held out: %s", wanted, few)


class Trainer:
    """One run. Everything here is called on all ranks unless it says otherwise."""

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        declared: Declarations,
        source: SequenceSource,
        layout: Layout,
        micro_batch: int,
        deadline: Deadline,
    ) -> None:
        from sinkbench.megatron.training import Engine

        self.config = config
        self.declared = declared
        self.source = source
        self.layout = layout
        self.micro_batch = micro_batch
        self.deadline = deadline
        self.near_end = False
        """Whether the newest step found the deadline near; a save may turn out shorter than feared."""
        self.request = Request()
        self.manifest = manifest.describe(resolved, declared, layout, source.fingerprint)
        self.store = CheckpointStore(folder_of(config) / "checkpoints")
        self.saver = Saver(self.store, layout, config.checkpoint)
        stages = build_stages(config, declared, layout)
        if config.checkpoint.start_from is not None and not self.store.steps():
            self._load_start(stages, Path(config.checkpoint.start_from).expanduser())
        self.engine = Engine(config, stages, layout)
        self.probe = self._make_probe(resolved)
        self.flops_per_token = flops.flops_per_token(config.model, source.vocab_size)
        self.peak = flops.peak(manifest.device_name(layout.device), config.train.precision)
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_length
        self.tokens = 0
        self.sinks: list[Sink] = []
        # Last, so that a run that cannot start leaves no folder.
        self.folder = on_main(layout, self._open_folder)
        self.share = None if layout.is_main else join(folder_of(config))

    def _open_folder(self) -> RunFolder:
        folder = RunFolder(self.config)
        try:
            folder.refuse_other_defaults(self.manifest)
            refuse_other(self.config, folder.path)
            if self.store.steps():
                folder.refuse_other_data(self.manifest)
        except BaseException:
            folder.close()
            raise
        return folder

    def _load_start(self, stages: list[Any], folder: Path) -> None:
        from sinkbench.megatron import state

        open_good(folder, self.layout, self.config.checkpoint.verify)
        if self.layout.is_main and has_other(self.config, find_kept(folder)):
            _log.warning("%s is of another tokenizer than the data: its tokens mean other text", folder)
        missing = state.load_weights(stages, folder, other_attention=True)
        if missing and self.layout.is_main:
            names = ", ".join(missing)
            _log.warning("%s has no %s: these start at the initial values of the recipe", folder, names)

    def _make_probe(self, resolved: Resolved) -> Probe | None:
        measure = self.config.measure
        if not measure.every:
            return None
        metrics = build_metrics(resolved.metrics, self.declared.context)
        sequences = self.source.probe(measure.count, measure.length)
        return Probe(metrics, sequences, self.engine, self.declared.transforms)

    def run(self) -> dict[str, Any]:
        from sinkbench.megatron import parallel

        start = self._resume()
        on_main(self.layout, lambda: self._begin(start))
        try:
            with self.request:
                self._train(start)
            return self._finish()
        except Exception as error:
            if self.request.signal is not None and parallel.lost_peer(error):
                # torchrun is ending this rank because of another one, whose error is the one to show.
                sys.exit(128 + self.request.signal)
            raise
        finally:
            self.saver.abandon()
            for sink in self.sinks:
                sink.close()
            if self.folder is not None:
                self.folder.close()
            if self.share is not None:
                self.share.close()

    def _begin(self, start: int) -> None:
        assert self.folder is not None
        self.folder.begin(start, self.manifest)
        if self.source.tokenizer is not None:
            keep_tokenizer(self.source.tokenizer, self.folder.path)
        _warn_of_window(self.declared)
        _warn_of_held_out(self.config, self.source)
        self.sinks = open_sinks(self.config, self.folder.path, start)
        if self.config.log.progress:
            programs = manifest.in_words(self.declared)
            resumed = f"goes on from step {start}, " if start else ""
            print(f"{self.config.name}: {resumed}{programs}", file=sys.stderr, flush=True)

    def _resume(self) -> int:
        checkpoint = newest_good(self.store, self.layout, self.config.checkpoint.verify)
        if checkpoint is None:
            return 0
        if checkpoint.step > self.config.train.steps:
            raise RecipeError(
                "train.steps",
                f"{self.config.train.steps} is below the checkpoint's step {checkpoint.step}",
                "raise it, or set another name",
            )
        load(self.engine, checkpoint)
        self.tokens = checkpoint.step * self.tokens_per_step
        return checkpoint.step

    def _train(self, start: int) -> None:
        if start == 0:
            self._probe(0)
        with closing(self._batches(start)) as batches:
            self._steps(start, batches)
        self.saver.finish()

    def _steps(self, start: int, batches: Iterator[list[Batch]]) -> None:
        config, steps = self.config, self.config.train.steps
        elapsed, counted = 0.0, 0
        ready = deque([next(batches)])
        for step in range(start + 1, steps + 1):
            began = time.perf_counter()
            lr = self.engine.optimizer.param_groups[0]["lr"]
            batch = ready.popleft()
            result = self.engine.train_step(
                batch, wants_stop=self._wants_stop, meanwhile=lambda: ready.append(next(batches))
            )
            elapsed += time.perf_counter() - began
            counted += self.tokens_per_step
            self.tokens += self.tokens_per_step
            self.saver.poll()
            for sink in self.sinks:
                if isinstance(sink, Bar):
                    sink.step(step)
            self._check_health(step, result, batch)
            if result.updated and (due(step, config.log.every, steps) or step == 1):
                self._log_step(step, result.loss, lr, result.grad_norm, counted / elapsed)
                elapsed, counted = 0.0, 0
            if config.validation.every and due(step, config.validation.every, steps):
                self._validate(step)
            if config.measure.every and due(step, config.measure.every, steps):
                self._probe(step)
            stop = result.stop and step < steps
            if stop or due(step, config.checkpoint.every, steps):
                self._save(step)
            if stop:
                self.saver.finish()
                self._stop(step)

    def _wants_stop(self) -> bool:
        self.near_end = self.layout.is_main and self.deadline.near(self.saver.longest_s)
        return self.near_end or self.request.signal is not None

    def _stop(self, step: int) -> NoReturn:
        if self.request.signal is not None:
            reason = self.request.signal.name
        else:
            reason = self.deadline.reason if self.near_end else "a signal to another rank"
        if self.folder is not None:
            self.folder.stopped(step, reason)
        done = f"stopped after step {step} of {self.config.train.steps}, which is saved ({reason})"
        raise Stopped(str(folder_of(self.config)), done)

    def _check_health(self, step: int, result: StepResult, batch: list[Batch]) -> None:
        """Logs what is wrong with a step, and ends a run that should not go on."""
        trouble = self.engine.health.after(result)
        if trouble is None:
            return
        self._log(step, trouble.event, trouble.values)
        if trouble.stop:
            self.saver.wait()
            cause = self._cause(step, batch) if result.tokens else ""
            raise DivergedError(f"step {step}", f"{trouble.what}{cause}", trouble.remedy)
        if self.layout.is_main:
            _log.warning("step %d: %s", step, trouble.what)

    def _cause(self, step: int, batch: list[Batch]) -> str:
        """Which layer of which sequences made a step go wrong."""
        from sinkbench.megatron.overflow import first_overflow

        overflow = first_overflow(self.engine, batch)
        size = self.config.train.global_batch_size
        sequences = [(step - 1) * size + row for row in overflow.rows or range(size)]
        named = ", ".join(f"{n} ({self.source.origin(n)})" for n in sequences[:SHOWN_SEQUENCES])
        more = len(sequences) - SHOWN_SEQUENCES
        others = f" and {more} more" if more > 0 else ""
        return f", first in {overflow.what}, with sequence {named}{others}"

    def _log_step(self, step: int, loss: float, lr: float, grad_norm: float, rate: float) -> None:
        mfu = None
        if self.peak is not None:
            mfu = 100 * rate * self.flops_per_token / (self.peak * self.layout.world_size)
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": self.tokens}
        self._log(step, "train", {**values, "tokens_per_second": rate, "mfu": mfu})

    def _batches(self, start: int) -> Generator[list[Batch]]:
        """This rank's micro-batches of each step, on its device, after the recipe's transforms."""
        share = self.config.train.global_batch_size // self.layout.data_size
        loader = micro_batches(
            self.source,
            start_step=start,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.micro_batch,
            dp_rank=self.layout.data_rank,
            dp_size=self.layout.data_size,
        )
        with closing(loader):
            while True:
                yield [self._ready(next(loader)) for _ in range(share // self.micro_batch)]

    def _ready(self, batch: Batch) -> Batch:
        """As the model takes it. Where documents begin is no plugin's affair: none may lose the mask."""
        batch = {name: x.to(self.layout.device, non_blocking=True) for name, x in batch.items()}
        document_start = batch.get("document_start")
        for change in self.declared.transforms:
            batch = change.transform(batch)
        batch = self.declared.loss.transform(batch)
        if document_start is None:
            return batch
        return batch | {"document_start": document_start[:, : self.config.model.seq_length].contiguous()}

    def _validate(self, step: int) -> None:
        """Token loss of each held-out domain that has tokens, and over all of them."""
        losses: dict[str, float] = {}
        total = tokens = 0.0
        for domain in self.source.domains:
            loss, count = self.engine.evaluate(self._held_out(domain))
            if count:
                losses[f"loss/{domain}"] = loss
                total, tokens = total + loss * count, tokens + count
            elif self.layout.is_main:
                _log.warning("validation: no token held out of %s has a weight above 0", domain)
        if not tokens:
            problem = "no token of the held-out sequences has a weight above 0"
            raise DataError("validation.sequences", problem, "raise it, or hold out more documents")
        self._log(step, "validation", {"loss": total / tokens, **losses})

    def _held_out(self, domain: str) -> list[Batch]:
        """This rank's micro-batches of a domain: the same sequences under every layout, filled up with
        sequences of weight 0."""
        held_out = self.source.validation(domain)
        count = min(self.config.validation.sequences, len(held_out))
        ranks, size, stages = self.layout.data_size, self.micro_batch, self.config.parallel.pipeline
        parts = -(-count // (ranks * size * stages)) * stages
        arrays = held_out.sequences(0, count)
        index = torch.arange(parts * size) + self.layout.data_rank * parts * size
        batches = []
        for rows in index.split(size):
            at = rows.clamp(max=count - 1)
            batch = self._ready({name: torch.as_tensor(array)[at] for name, array in arrays.items()})
            real = (rows < count).to(batch["weights"].device)
            batches.append(batch | {"weights": batch["weights"] * real[:, None]})
        return batches

    def _probe(self, step: int) -> None:
        if self.probe is None:
            return
        began = time.perf_counter()
        results = self.probe.run()
        floats = {name: value for name, value in results.items() if isinstance(value, int | float)}
        self._log(step, "probe", {**floats, "seconds": time.perf_counter() - began})
        if self.folder is not None:
            path = self.folder.path / "measure" / f"step_{step}.json"
            write(path, StepMetrics(step=step, metrics=results))

    def _save(self, step: int) -> None:
        if self.folder is not None:
            self.folder.flush()
        text = self.folder.recipe_text if self.folder is not None else ""
        self.saver.save(self.engine, step, text)

    def _log(self, step: int, event: str, values: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(step, event, values)
        for sink in self.sinks:
            sink.log(step, event, values)

    def _finish(self) -> dict[str, Any]:
        """Writes summary.json. The loss is the held-out one where there is one. Numbers of a validation or a
        probe before the last step, as of a run that went on without any, are not those of its end."""
        if self.folder is None:
            return {}
        known, last = self.folder.latest_events(), self.config.train.steps
        train = known.get("train", {})
        validation, probe = (
            line if line.get("step") == last else {}
            for line in (known.get(event, {}) for event in ("validation", "probe"))
        )
        summary = {
            "name": self.config.name,
            "label": self.config.label,
            "attention": self.config.model.attention.name,
            "step": last,
            "loss": validation.get("loss", train.get("loss")),
            "train_loss": train.get("loss"),
            "tokens": self.tokens,
            "tokens_per_second": train.get("tokens_per_second"),
            "mfu": train.get("mfu"),
            **{key: value for key, value in validation.items() if key.startswith("loss/")},
            **{key: value for key, value in probe.items() if key not in ("step", "event", "seconds")},
        }
        write_json(self.folder.path / "summary.json", summary)
        return summary


def due(step: int, every: int, steps: int) -> bool:
    """Every so many steps, and after the last one."""
    return step == steps or (every > 0 and step % every == 0)


def on_main(layout: Layout, function: Callable[[], T]) -> T | None:
    """Calls a function on the main process; a user's error there is raised on all."""
    result: T | None = None
    error: list[SinkbenchError | None] = [None]
    if layout.is_main:
        try:
            result = function()
        except SinkbenchError as caught:
            error[0] = caught
    if layout.world_size > 1:
        dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    return result
