"""Which sizes of blocks the kernels get, with a timer of the test's own instead of a card."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.attention import tiles
from sinkbench.attention.tiles import Tiles

DEFAULT = Tiles(64, 64, 4, 3)
FASTER = Tiles(128, 64, 8, 2)
TOO_LARGE = Tiles(128, 128, 8, 2)
KEY: dict[str, Any] = {"card": "card A", "kernel": "forward", "length": 2048}
TIMES = {DEFAULT: 2.0, FASTER: 1.0, TOO_LARGE: math.inf}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tuned sizes are kept. They are tuned, whatever the tests are run with."""
    monkeypatch.setenv("SINKBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("SINKBENCH_AUTOTUNE", raising=False)
    return tmp_path


class Card:
    """Times what is launched, and counts."""

    def __init__(self, times: dict[Tiles, float]) -> None:
        self.times = times
        self.launched: list[Tiles] = []

    def measure(self, tried: tuple[Tiles, ...]) -> dict[Tiles, float]:
        self.launched += tried
        return {sizes: self.times[sizes] for sizes in tried}


def tune(card: Card, key: dict[str, Any] = KEY) -> Tiles:
    return tiles.tuned(key, DEFAULT, (FASTER, TOO_LARGE), card.measure)


def test_the_fastest_is_kept() -> None:
    card = Card(TIMES)
    assert tune(card) == FASTER
    assert card.launched == [DEFAULT, FASTER, TOO_LARGE]
    again = Card({})
    assert tune(again) == FASTER
    assert not again.launched, "kept sizes are not tuned again"
    tune(card, KEY | {"card": "card B"})
    assert len(card.launched) == 6, "another card has sizes of its own"
    assert len(tiles.load(tiles.cache_file())) == 2


def test_nothing_fits() -> None:
    assert tune(Card(dict.fromkeys(TIMES, math.inf))) == DEFAULT
    assert not tiles.cache_file().exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"sizes"',
        "\x00",
        json.dumps({"a": {"block_q": 64, "block_k": 64, "num_warps": 4}}),
        json.dumps({"a": {"block_q": 1000, "block_k": 64, "num_warps": 4, "num_stages": 2}}),
        json.dumps({"a": {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": "2"}}),
        json.dumps({"a": {"block_q": 64, "block_k": 64, "num_warps": 3, "num_stages": 2}}),
        json.dumps({"a": {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "registers": 300}}),
        json.dumps({"a": {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "stage": 0}}),
    ],
)
def test_a_file_of_others(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tiles.cache_file().write_text(text)
    with caplog.at_level(logging.WARNING):
        assert tune(Card(TIMES)) == FASTER
    assert "passed over" in caplog.text
    assert list(tiles.load(tiles.cache_file()).values()) == [FASTER]


def test_an_entry_without_a_limit_of_registers() -> None:
    tune(Card(TIMES))
    held = json.loads(tiles.cache_file().read_text())
    for entry in held.values():
        assert entry.pop("registers") == 0
    tiles.cache_file().write_text(json.dumps(held))
    assert tune(Card({})) == FASTER


def test_options() -> None:
    assert "maxnreg" not in FASTER.options()
    assert Tiles(64, 64, 4, 2, 168).options()["maxnreg"] == 168


def test_an_entry_of_others_beside_ours(caplog: pytest.LogCaptureFixture) -> None:
    tune(Card(TIMES))
    held = json.loads(tiles.cache_file().read_text())
    tiles.cache_file().write_text(json.dumps(held | {"foreign": 1}))
    assert tune(Card({})) == FASTER
    assert "1 entries are no block sizes" in caplog.text


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SINKBENCH_CACHE", str(tmp_path / "file" / "folder"))
    assert tune(Card(TIMES)) == DEFAULT
    assert "not tuned" in caplog.text


class OnCard:
    """What the choice asks of a query on a card."""

    is_cuda = True
    shape = (1, 8, 2000, 96)
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keys that are tuned; the outcome is always FASTER."""
    keys: list[dict[str, Any]] = []

    def record(key: dict[str, Any], *_: object) -> Tiles:
        keys.append(key)
        return FASTER

    monkeypatch.setattr(tiles, "tuned", record)
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(tiles, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card A")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return keys


def choose(**variant: Any) -> Tiles:
    query: Any = OnCard()
    return tiles.choose("forward", query, {"mask": "causal", **variant}, lambda sizes: None)


def test_each_kind_of_call_is_tuned_once(tuned: list[dict[str, Any]]) -> None:
    assert [choose(), choose(), choose(mask="window")] == [FASTER] * 3
    assert [(key["mask"], key["length"], key["card"]) for key in tuned] == [
        ("causal", 2048, "card A"),
        ("window", 2048, "card A"),
    ]


def test_when_nothing_is_tuned(tuned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = tiles.fixed("forward", 96, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setenv("SINKBENCH_AUTOTUNE", "0")
        assert choose() == fixed
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert choose() == fixed
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose() == fixed
    assert not tuned
    assert choose() == FASTER, "after a capture it is"


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "head_size"),
    [(name, d) for name in tiles.FIXED for d in (16, 64, 96, 128, 192, 256) if d <= max(tiles.FIXED[name])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_are_tried_and_none_is_below_what_a_product_takes(
    position: int, kernel: str, head_size: int, dtype: torch.dtype
) -> None:
    candidates = tiles._candidates(kernel, head_size, dtype)
    tried = {tiles.fixed(kernel, head_size, dtype, position), *candidates}
    assert len(tried) <= 6
    for sizes in tried:
        assert min(sizes.block_q, sizes.block_k) >= tiles.SMALLEST_BLOCK
