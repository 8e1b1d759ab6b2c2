"""The tokenizer that a run's data are made with. The run folder keeps a copy: when the run is exported, the
data may be gone, or prepared anew with another one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from sinkbench.config import BigramBackcopyConfig, Config, IndexedConfig
from sinkbench.data.manifest import load_manifest, prepared_in
from sinkbench.data.prepare import cached_folder
from sinkbench.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from sinkbench.errors import DataError

FOLDER = "tokenizer"
"""Within a run folder, or within a checkpoint that was converted."""

_log = logging.getLogger(__name__)


def refuse_other(config: Config, run: Path) -> None:
    """Checks that a recipe's data are made with the tokenizer that a run folder keeps, if it keeps one.

    Raises:
        DataError: they are made with another.
    """
    kept = run / FOLDER
    if kept.is_dir() and has_other(config, load_tokenizer(kept)):
        problem = "the run began with data of another tokenizer, which is kept here"
        raise DataError(str(kept), problem, "name data that are prepared with it, or set another name")


def has_other(config: Config, tokenizer: Tokenizer | None) -> bool:
    """Whether a recipe's data say of themselves that they are made with another tokenizer than this one.
    Synthetic data, and such as are not there yet, do not."""
    if tokenizer is None or isinstance(config.data, BigramBackcopyConfig):
        return False
    try:
        return load_manifest(_prepared_folder(config.data)).tokenizer.sha256 != tokenizer.sha256
    except DataError:
        return False  # who opens them says what is wrong


def keep_tokenizer(path: Path, run: Path) -> None:
    """Copies the tokenizer of the data into a run folder, unless it has one.

    Args:
        path: its main file.
    """
    if (run / FOLDER).exists():
        return
    if not path.is_file():
        _log.warning("%s is missing, so that an export of this run will need --tokenizer", path)
        return
    writing = run / f".{FOLDER}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    copy_tokenizer(load_tokenizer(path), writing)
    writing.rename(run / FOLDER)


def find_kept(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer in the folder of a checkpoint, or of its run."""
    for place in (checkpoint, checkpoint.absolute().parent.parent):
        if (place / FOLDER).is_dir():
            return load_tokenizer(place / FOLDER)
    return None


def find_tokenizer(config: Config, checkpoint: Path, given: Path | None = None) -> Tokenizer | None:
    """The given tokenizer, or that in the folder of the checkpoint or of its run, or else that of the
    prepared data, which are never prepared anew; None for synthetic data.

    Args:
        checkpoint: its folder.

    Raises:
        DataError: there is none of these.
    """
    if given is not None:
        return load_tokenizer(given)
    if (kept := find_kept(checkpoint)) is not None:
        return kept
    if isinstance(config.data, BigramBackcopyConfig):
        return None
    try:
        return _of_data(config.data)
    except DataError as error:
        problem = f"the tokenizer of the run's data is gone ({error.where} {error.problem})"
        raise DataError("tokenizer", problem, "put it back, or export with --tokenizer FILE") from error


def _of_data(data: IndexedConfig) -> Tokenizer:
    if data.prepare is not None and data.prepare.tokenizer.path is not None:
        return load_tokenizer(Path(data.prepare.tokenizer.path).expanduser())
    folder = _prepared_folder(data)
    record = load_manifest(folder).tokenizer
    tokenizer = load_tokenizer(folder / record.path)
    if tokenizer.sha256 != record.sha256:
        problem = "is not the tokenizer that the data were prepared with"
        raise DataError(str(tokenizer.path), problem, "prepare the data again")
    return tokenizer


def _prepared_folder(data: IndexedConfig) -> Path:
    folder = cached_folder(data.prepare) if data.prepare else Path(data.train[0].path).expanduser()
    return prepared_in(folder)[0]  # all in it share their tokenizer
