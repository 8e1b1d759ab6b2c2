"""The Pile by domain, in the layout of regmix-data-sample, the data of Gu et al. (2410.10781):
train_the_pile_DOMAIN*.jsonl and valid_the_pile_DOMAIN*.jsonl, each with a field ``text``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from sinkbench.config import TokenizerConfig
from sinkbench.data import hub
from sinkbench.data.documents import find_inputs
from sinkbench.data.manifest import Manifest
from sinkbench.data.prepare import Request, prepare
from sinkbench.errors import DataError

_FILE = re.compile(r"(train|valid)_the_pile_([a-z0-9_]+)([-.].*)?\.jsonl(\.gz|\.zst)?")
_REMEDY = "give a folder with train_the_pile_DOMAIN.jsonl and valid_the_pile_DOMAIN.jsonl"


@dataclass
class DomainFiles:
    train: list[Path] = field(default_factory=list)
    valid: list[Path] = field(default_factory=list)


def find_domains(folder: Path) -> dict[str, DomainFiles]:
    """The files of every domain below a folder, sorted.

    Raises:
        DataError: there are none, or a domain lacks training or validation files.
    """
    domains: dict[str, DomainFiles] = {}
    for path in sorted(folder.rglob("*_the_pile_*.jsonl*")):
        if match := _FILE.fullmatch(path.name):
            files = domains.setdefault(match[2], DomainFiles())
            (files.train if match[1] == "train" else files.valid).append(path)
    if not domains:
        raise DataError(str(folder), "holds no file of The Pile by domain", _REMEDY)
    for name, files in domains.items():
        missing = "train" if not files.train else "valid" if not files.valid else None
        if missing:
            raise DataError(str(folder), f"has no {missing}_the_pile_{name}.jsonl", _REMEDY)
    return domains


def prepare_pile(
    source: str, output: Path, tokenizer: str, *, workers: int | None = None, progress: bool = False
) -> dict[str, Manifest]:
    """Prepares each domain into a folder of its own, OUTPUT/DOMAIN. ``data.train: OUTPUT`` then shuffles
    all together.

    Args:
        source: a folder, or the name of a data set on the Hugging Face hub.

    Raises:
        DataError: there is no such folder or data set, or as ``prepare``.
        HostError: as ``prepare``.
    """
    folder = Path(source).expanduser()
    if hub.is_name(source):
        folder = hub.dataset(source, "*_the_pile_*.jsonl*")
    if not folder.is_dir():
        raise DataError(source, "no such folder", _REMEDY)
    requests = {
        name: Request(
            inputs=tuple(find_inputs(map(str, files.train))),
            tokenizer=TokenizerConfig(path=tokenizer),
            validation=tuple(find_inputs(map(str, files.valid))),
        )
        for name, files in find_domains(folder).items()
    }
    return {
        name: prepare(request, output / name, workers=workers, progress=progress)
        for name, request in requests.items()
    }
