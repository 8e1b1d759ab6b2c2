"""What a run shows and sends while it trains: a progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sinkbench.config import Config
from sinkbench.files import write_atomically

RUN_ID = "wandb_run_id"
"""File in the run folder."""


class Sink(Protocol):
    """Receives every line of metrics.jsonl."""

    def log(self, step: int, event: str, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A progress bar on a terminal; elsewhere one line per logged step."""

    def __init__(self, config: Config, start_step: int) -> None:
        self.console = Console(stderr=True)
        self.total = config.train.steps
        self.name = f"{config.name}/{config.label}" if config.label else config.name
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(self.name, total=self.total, completed=start_step, numbers="")
            self.progress.start()

    def step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, event: str, values: dict[str, Any]) -> None:
        text = _line(event, values)
        if self.progress is None:
            print(f"{self.name} {step}/{self.total} {text}", file=sys.stderr, flush=True)
        elif event == "train":
            self.progress.update(self.task, completed=step, numbers=text)
        else:
            self.progress.console.print(f"{self.name} step {step} {text}", highlight=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _line(event: str, values: dict[str, Any]) -> str:
    if event == "train":
        mfu = f"  MFU {values['mfu']:.1f} %" if values.get("mfu") is not None else ""
        return (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.2f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s{mfu}"
        )
    shown = {k: v for k, v in values.items() if isinstance(v, float)}
    return f"{event}: " + "  ".join(f"{key} {value:.4g}" for key, value in shown.items())


class TensorBoard:
    """Steps after the one that training resumes from are taken back, all of them where it begins anew."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def log(self, step: int, event: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Offline without a key, so that a run never stops to ask for one. A resumed run goes on under the same
    id, where steps that are sent again are dropped."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        settings = config.log.wandb
        assert settings is not None
        mode = settings.mode
        if mode == "auto":
            mode = "online" if _has_key(wandb.setup().settings) else "offline"
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=f"{config.name}/{config.label}" if config.label else config.name,
            dir=str(folder),
            mode=mode,
            id=_run_id(folder / RUN_ID),
            resume="allow",
            config=config.model_dump(by_alias=True),
        )

    def log(self, step: int, event: str, values: dict[str, Any]) -> None:
        self.run.log({f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _has_key(settings: Any) -> bool:
    if settings.api_key or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(settings.base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def open_sinks(config: Config, folder: Path, start_step: int) -> list[Sink]:
    """The sinks that the recipe asks for."""
    sinks: list[Sink] = []
    if config.log.wandb is not None:
        sinks.append(Wandb(config, folder))
    if config.log.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", start_step))
    if config.log.progress:
        sinks.append(Bar(config, start_step))
    return sinks
