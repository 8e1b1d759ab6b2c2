"""Documents to token files: read, drop duplicates, hold some out, tokenise, write IndexedDatasets.

The work is done in shards, one per unit of input, which many processes write and an interrupted run
keeps; then one pass joins them. The output depends on the inputs and options alone: not on the number
of workers, nor on interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sinkbench.config import PrepareConfig, TokenizerConfig
from sinkbench.data.documents import Input, Unit, find_inputs, units
from sinkbench.data.join import join
from sinkbench.data.manifest import MANIFEST, SCHEMA, WORK, Manifest, TokenizerRecord, load_manifest
from sinkbench.data.shards import make_sample, make_tokenise, sample_key, shard_path
from sinkbench.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from sinkbench.data.workers import available_cores, map_in_order
from sinkbench.errors import DataError, HostError
from sinkbench.files import NO_LOCKS, write_atomically

UNIT_BYTES = 4 << 20
"""Text of one shard: small enough to hold many at once, large enough that files stay few."""
SAMPLE_CHARS = 32 << 20
"""Text on which a tokenizer is trained."""

_MARKER = "request.json"
"""In the work folder: what is being prepared."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
        inputs: see ``find_inputs``.
        tokenizer: which to use, or to train.
        text_field: of JSON objects and parquet files.
        holdout: share of documents (0 to 1) for validation, chosen by hash. Strictly between 0 and 1
            both splits get a document: a lone one is cut.
        validation: inputs that are held out instead. A document that is in both is trained on only.
    """

    inputs: tuple[Input, ...]
    tokenizer: TokenizerConfig
    text_field: str = "text"
    holdout: float = 0.01
    validation: tuple[Input, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.holdout <= 1:
            raise DataError("--holdout", f"{self.holdout} is not a share", "give a number from 0 to 1")

    def hash(self) -> str:
        """Changes with the inputs' names, sizes and times, the tokenizer's main file, and the options."""
        path = self.tokenizer.path
        parts = [
            SCHEMA,
            [entry.identity() for entry in self.inputs],
            load_tokenizer(Path(path).expanduser()).sha256 if path else self.tokenizer.train_vocab_size,
            self.text_field,
            [entry.identity() for entry in self.validation] or self.holdout,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def eos_id(self) -> int | None:
        """The EOS where it may change without the hash, as a file beside tokenizer.json may name it."""
        # Not part of the hash, which would no longer find what was prepared before.
        path = self.tokenizer.path
        tokenizer = load_tokenizer(Path(path).expanduser()) if path else None
        return tokenizer.eos_id if tokenizer and tokenizer.kind == "huggingface" else None


def prepare(
    request: Request,
    folder: Path,
    *,
    workers: int | None = None,
    progress: bool = False,
    unit_bytes: int = UNIT_BYTES,
) -> Manifest:
    """Writes a prepared folder, or finds it written. Processes that ask for the same folder at once
    wait for the first.

    Args:
        folder: absent, empty, or with the same request finished or interrupted.
        workers: processes; default: the cores of this process.
        progress: show bars on stderr if it is a terminal.
        unit_bytes: text of one shard; changes nothing but the time taken.

    Raises:
        DataError: an input, the tokenizer or the folder cannot be used. What was written is removed.
        HostError: the folder cannot be written, or a worker process died.
    """
    request_hash = request.hash()
    created = not folder.exists()
    work = folder / WORK
    try:
        if done := _finished(folder, request, request_hash):
            return done
        with _lock(work / "lock"):
            try:
                manifest = _finished(folder, request, request_hash)
                if manifest is None:
                    _check_ours(folder)
                    workers = workers or available_cores()
                    manifest = _Job(request, request_hash, folder, workers, progress, unit_bytes).run()
            except DataError:
                _discard(work)
                if created:
                    with suppress(OSError):  # not empty: another process has begun
                        folder.rmdir()
                raise
            _discard(work)
            return manifest
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise HostError(str(folder), problem, "choose a writable folder on a disk with room") from error


def prepare_cached(config: PrepareConfig, *, progress: bool = True) -> Path:
    """The folder, in the cache, of what a recipe prepares on first use.

    Raises:
        DataError: as ``prepare``.
        HostError: as ``prepare``.
    """
    request, folder = _cached(config)
    prepare(request, folder, progress=progress)
    return folder


def cached_folder(config: PrepareConfig) -> Path:
    """Where ``prepare_cached`` puts it, or has put it.

    Raises:
        DataError: the inputs or the tokenizer are gone.
    """
    return _cached(config)[1]


def _cached(config: PrepareConfig) -> tuple[Request, Path]:
    inputs = tuple(find_inputs(config.inputs))
    request = Request(inputs, config.tokenizer, config.text_field, config.holdout)
    return request, Path(config.cache).expanduser() / request.hash()[:16]


def _finished(folder: Path, request: Request, request_hash: str) -> Manifest | None:
    """The folder's manifest if it answers the request.

    Raises:
        DataError: the folder holds something else.
    """
    if (folder / MANIFEST).exists():
        found = load_manifest(folder)
        if found.request == request_hash and request.eos_id() in (None, found.tokenizer.eos_id):
            return found
        problem = "holds data prepared from other inputs, another tokenizer or other options"
        raise DataError(str(folder), problem, "choose another folder, or remove it")
    if folder.exists() and not folder.is_dir():
        raise DataError(str(folder), "is not a folder", "choose another path")
    return None


def _check_ours(folder: Path) -> None:
    """Call it under the lock: only then is a folder without a manifest or a marker nobody's work.

    Raises:
        DataError: the folder holds files that no preparation wrote.
    """
    foreign = any(not entry.name.startswith(WORK) for entry in folder.iterdir())
    if foreign and not (folder / WORK / _MARKER).exists():
        raise DataError(str(folder), "is not empty", "choose another folder")


def _discard(work: Path) -> None:
    """Removes the work folder and the lock in it, by way of another name: a process that waits for the
    lock may make both again meanwhile."""
    doomed = work.with_name(f"{WORK}.{os.getpid()}.{threading.get_ident()}")
    work.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file that its holder may remove."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        except (FileNotFoundError, FileExistsError):  # its holder removed it in between
            if path.parent.is_file():
                raise
            continue
        try:
            _wait_for_lock(descriptor, path.parent.parent)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another process that prepares %s", folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _log.warning("%s: its file system has no locks; prepare it in no other process meanwhile", folder)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


class _Job:
    """One preparation, under the folder's lock."""

    def __init__(
        self, request: Request, request_hash: str, folder: Path, workers: int, progress: bool, unit_bytes: int
    ) -> None:
        self._request = request
        self._request_hash = request_hash
        self._folder = folder
        self._work = folder / WORK
        self._shards = self._work / "shards"
        self._trained = self._work / "tokenizer.model"
        self._workers = workers
        self._progress = progress
        self._unit_bytes = unit_bytes
        self._inputs = (*request.inputs, *request.validation)
        self._total = sum(entry.size for entry in self._inputs)

    def run(self) -> Manifest:
        self._start_or_resume()
        tokenizer = self._tokenizer()
        manifest = self._join(tokenizer, self._tokenise(tokenizer))
        write_atomically(self._folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        return manifest

    def _start_or_resume(self) -> None:
        """Keeps the shards and the tokenizer of an interrupted run of the same request, and no others."""
        marker = self._work / _MARKER
        eos_id = self._request.eos_id()
        wanted = json.dumps([self._request_hash, self._unit_bytes, *([] if eos_id is None else [eos_id])])
        if marker.exists() and marker.read_text() == wanted:
            _log.info("%s: going on with an interrupted preparation", self._folder)
        else:
            self._trained.unlink(missing_ok=True)
            if self._shards.exists():
                shutil.rmtree(self._shards)
            write_atomically(marker, wanted)
        self._shards.mkdir(exist_ok=True)

    def _tokenizer(self) -> Tokenizer:
        path, vocab_size = self._request.tokenizer.path, self._request.tokenizer.train_vocab_size
        if path is not None:
            return load_tokenizer(Path(path).expanduser())
        assert vocab_size is not None
        if not self._trained.exists():
            temporary = self._trained.with_suffix(".tmp")
            train_sentencepiece(self._sample(), vocab_size, temporary)
            temporary.replace(self._trained)
        return load_tokenizer(self._trained)

    def _sample(self) -> Iterable[str]:
        """Text of SAMPLE_CHARS: documents in the order of their hashes, so that each has the same
        chance and the order of the inputs is of no account. Inputs that are held out give none."""
        inputs = self._request.inputs
        total = sum(entry.size for entry in inputs)
        # Four times too many by the size on disk, since compressed files hold more text than that.
        share = 4 * SAMPLE_CHARS / max(total, 1)
        make = partial(make_sample, self._request.text_field, share)
        chosen: dict[bytes, str] = {}
        with _bar("sampling", total, self._progress) as advance:
            for size, found in map_in_order(make, units(inputs, self._unit_bytes), self._workers):
                chosen.update(found)
                advance(size)
        missing = SAMPLE_CHARS
        for digest in sorted(chosen, key=sample_key):
            if missing <= 0:
                break
            yield chosen[digest][:missing]
            missing -= len(chosen[digest])

    def _tokenise(self, tokenizer: Tokenizer) -> list[Path]:
        """Writes the shards that are missing; returns all in order."""
        paths: list[Path] = []
        make = partial(make_tokenise, tokenizer.path, self._request.text_field, self._shards)
        with _bar("tokenising", self._total, self._progress) as advance:

            def missing() -> Iterator[tuple[int, Unit]]:
                for number, unit in enumerate(units(self._inputs, self._unit_bytes)):
                    paths.append(shard_path(self._shards, number))
                    if paths[-1].exists():
                        advance(unit.size)
                    else:
                        yield number, unit

            for size in map_in_order(make, missing(), self._workers):
                advance(size)
        return paths

    def _join(self, tokenizer: Tokenizer, shards: list[Path]) -> Manifest:
        """Moves finished token files and the tokenizer into the folder; returns their manifest."""
        result = self._work / "result"
        if result.exists():
            shutil.rmtree(result)
        (result / "tokenizer").mkdir(parents=True)
        for path in tokenizer.files:
            shutil.copyfile(path, result / "tokenizer" / path.name)
        with _bar("joining", sum(path.stat().st_size for path in shards), self._progress) as advance:
            joined = join(
                shards,
                result,
                inputs=[entry.name for entry in self._inputs],
                holdout=self._request.holdout,
                held_out_from=len(self._request.inputs) if self._request.validation else None,
                vocab_size=tokenizer.vocab_size,
                advance=advance,
            )
        for path in [p.relative_to(result) for p in result.rglob("*") if p.is_file()]:
            (self._folder / path).parent.mkdir(exist_ok=True)
            (result / path).replace(self._folder / path)
        return Manifest(
            request=self._request_hash,
            documents=joined.documents,
            tokens=joined.tokens,
            duplicates=sum(record.duplicates for record in joined.inputs),
            empty=sum(record.empty for record in joined.inputs),
            not_text=sum(record.not_text for record in joined.inputs),
            inputs=joined.inputs,
            tokenizer=TokenizerRecord(
                kind=tokenizer.kind,
                path=f"tokenizer/{tokenizer.path.name}",
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
            ),
            dtype=joined.dtype,
            files=joined.files,
        )
