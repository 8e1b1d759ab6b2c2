"""The tokenizer that a recipe's data are made with."""

from __future__ import annotations

from pathlib import Path

from sinkbench.config import BigramBackcopyConfig, Config
from sinkbench.data.manifest import load_manifest
from sinkbench.data.prepare import prepare_cached
from sinkbench.data.tokenizer import Tokenizer, load_tokenizer
from sinkbench.errors import DataError


def find_tokenizer(config: Config, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a run's data, or the given one; None for synthetic data.

    Raises:
        DataError: it is not where the recipe says.
    """
    if given is not None:
        return load_tokenizer(given)
    data = config.data
    if isinstance(data, BigramBackcopyConfig):
        return None
    try:
        if data.prepare is not None and data.prepare.tokenizer.path is not None:
            return load_tokenizer(Path(data.prepare.tokenizer.path).expanduser())
        folder = prepare_cached(data.prepare) if data.prepare else Path(data.train[0].path).expanduser()
        return load_tokenizer(folder / load_manifest(folder).tokenizer.path)
    except DataError as error:
        problem = f"the tokenizer of the run's data is gone ({error.where} {error.problem})"
        raise DataError("tokenizer", problem, "give --tokenizer FILE") from error
