"""What is refused before torch is imported: sizes beyond the memory, addresses, what a run starts from."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sinkbench import packages, preflight, recipe
from sinkbench.config import Config
from sinkbench.data import run_tokenizer
from sinkbench.errors import CheckpointError, DataError, HostError, SinkbenchError
from sinkbench.preflight import check_host, check_launcher
from tests.unit.data_folder import write_folder

HERE = (
    "demo",
    "name=new",
    "train={device: cpu, precision: fp32, global_batch_size: 32, micro_batch_size: 8}",
    "model={num_layers: 4, hidden_size: 64, num_attention_heads: 2, seq_length: 256}",
)
ACTIVATIONS = 8 * 256 * 64 * 4 * 4
"""Sequences, tokens, hidden size, layers, bytes."""


def config_of(folder: Path, *overrides: str) -> Config:
    name, *values = (*HERE, *overrides, f"output_dir={folder}")
    return recipe.to_config(recipe.load(name, values))


def give_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=size))


@pytest.mark.parametrize(
    ("overrides", "needed", "where"),
    [
        ((), ACTIVATIONS, "model.seq_length"),
        (("train.precision=bf16",), ACTIVATIONS // 2, "model.seq_length"),
        (("train.micro_batch_size=4",), ACTIVATIONS // 2, "model.seq_length"),
        (("train.micro_batch_size=16",), 2 * ACTIVATIONS, "model.seq_length"),
        (("train={recompute: full, global_batch_size: 8192}",), 8192 * 256 * 8, "train.global_batch_size"),
    ],
)
def test_sizes_beyond_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str], needed: int, where: str
) -> None:
    config = config_of(tmp_path, *overrides)
    give_memory(monkeypatch, needed)
    check_host(config)
    give_memory(monkeypatch, needed - 1)
    with pytest.raises(HostError) as caught:
        check_host(config)
    assert caught.value.where == where
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    give_memory(monkeypatch, 2 * needed - 1)
    with pytest.raises(HostError):
        check_host(config)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("model.seq_length=33554432",),
            "model.seq_length: 33554432: 4 layers and a micro-batch of 8, which need 275 GB of memory, and "
            "16 GB are here; lower it or train.micro_batch_size, or set train.recompute=full",
        ),
        (
            ("model.seq_length=33554432", "train.recompute=full"),
            "model.seq_length: 33554432: one layer and a micro-batch of 8, which need 69 GB of memory, and "
            "16 GB are here; lower it or train.micro_batch_size, or raise parallel.context",
        ),
        (
            ("train={global_batch_size: 16777216, micro_batch_size: null}",),
            "train.global_batch_size: 16777216 sequences of 256 tokens need 34 GB of memory, and 16 GB are "
            "here; lower it, or use more hosts",
        ),
        (
            ("model.vocab_size=1000000000",),
            "model: num_layers 4 and hidden_size 64 make ... parameters, which need 768 GB of memory, and 16 "
            "GB are here; lower its sizes, or use more hosts",
        ),
        (
            ("parallel.tensor=2",),
            "parallel: 1 processes are not divisible by tensor 2 x pipeline 1 x context 1 = 2; ...",
        ),
        (("train.micro_batch_size=5",), "train.micro_batch_size: 5 does not divide the 32 sequences of ..."),
        (
            ("checkpoint.start_from=gone",),
            "checkpoint.start_from: there is no checkpoint gone; train the run that it is of, or name "
            "another folder checkpoints/step_N",
        ),
    ],
)
def test_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str], line: str
) -> None:
    give_memory(monkeypatch, 16 * 10**9)
    with pytest.raises(SinkbenchError) as caught:
        check_host(config_of(tmp_path, *overrides))
    assert re.fullmatch(re.escape(line).replace(r"\.\.\.", ".*"), str(caught.value))
    assert not list(tmp_path.iterdir())


def test_what_a_run_starts_from_matters_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, f"checkpoint.start_from={tmp_path / 'gone'}")
    with pytest.raises(CheckpointError):
        check_host(config)
    (tmp_path / "new" / "checkpoints" / "step_1").mkdir(parents=True)
    check_host(config)


def test_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "old" / "checkpoints" / "step_20").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "step_3").mkdir()
    newest = tmp_path / "old" / "checkpoints" / "step_20"
    with pytest.raises(CheckpointError) as caught:
        check_host(config_of(tmp_path, f"checkpoint.start_from={tmp_path / 'old'}"))
    expected = f"{tmp_path / 'old'}: is a run, not a checkpoint; name one of its checkpoints, as {newest}"
    assert str(caught.value) == expected


def test_data_of_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(sha: str) -> Config:
        data = tmp_path / sha
        if not data.exists():
            write_folder(data, [[1] * 300], tokenizer_sha256=sha)
        return config_of(tmp_path, "data={source: indexed}", f"data.train={data}")

    monkeypatch.setattr(run_tokenizer, "load_tokenizer", lambda path: SimpleNamespace(sha256="a" * 64))
    check_host(config("b" * 64))  # a new run
    kept = tmp_path / "new" / "tokenizer"
    kept.mkdir(parents=True)
    check_host(config("a" * 64))
    with pytest.raises(DataError) as caught:
        check_host(config("b" * 64))
    assert str(caught.value) == (
        f"{kept}: the run began with data of another tokenizer, which is kept here; "
        "name data that are prepared with it, or set another name"
    )


def test_an_address_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name, text in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node-7", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(HostError, match=r"^MASTER_ADDR: 'node-7' cannot be resolved"):
        check_launcher()


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "log.wandb={project: mine}")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"^log\.wandb: the package wandb is not installed; pip"):
        check_host(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.megatron={foo: 3}",
            "model.megatron.foo: megatron-core has no such field",
        ),
        ("model.megatron={hidden_size: 3}", "model.megatron.hidden_size: .*; set model.hidden_size instead"),
        ("train.cuda_graph=true", "train.cuda_graph: is for CUDA cards; set it to auto or false"),
        ("train={device: auto, cuda_graph: true}", "train.cuda_graph: is for CUDA cards"),
        (
            "checkpoint.allow_change=[seed, train.stepz]",
            "checkpoint.allow_change: train.stepz is no .* steps",
        ),
        (
            "checkpoint.allow_change=[optm.lr]",
            "checkpoint.allow_change: optm.lr is no .* optim.lr",
        ),
        ("train.device=cuda", "train.device: cuda is not available here; write auto or cpu"),
    ],
)
def test_what_needs_no_torch_to_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_library)
    monkeypatch.setattr(preflight, "_CUDA_DEVICE", tmp_path / "absent")
    with pytest.raises(SinkbenchError, match=f"^{message}"):
        check_host(config_of(tmp_path, override))


@pytest.mark.parametrize(
    "key",
    [
        "optim",
        "train.steps",
        "model.attention.window",
        "loss.x",
        "model.megatron.hidden_dropout",
        "data.train",
    ],
)
def test_keys_whose_change_is_allowed(tmp_path: Path, key: str) -> None:
    check_host(config_of(tmp_path, f"checkpoint.allow_change=[{key}]"))


def test_a_mistake_is_told_before_the_run_that_is_there(tmp_path: Path) -> None:
    config = config_of(tmp_path, "seed=3", "model.megatron={foo: 1}")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text(recipe.dump(config_of(tmp_path)))
    with pytest.raises(SinkbenchError, match=r"^model\.megatron\.foo: "):
        check_host(config)
