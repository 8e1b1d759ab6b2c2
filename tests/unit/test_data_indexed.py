"""Prepared folders as a source: chunks, epochs, blends, held-out sets, probes, and damage."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinkbench.config import Config, IndexedConfig
from sinkbench.data import verify as data_verify
from sinkbench.data.indexed import BLEND_PERIOD, Blend, Chunks, Epochs, IndexedSource
from sinkbench.data.loader import micro_batches
from sinkbench.data.manifest import file_sha256
from sinkbench.data.source import open_source
from sinkbench.data.verify import verify
from sinkbench.errors import DataError
from tests.unit.data_folder import EOS, write_folder

SIZE = 5
"""Tokens of a sequence; seq_length is one less."""


def open_folders(
    *paths: Path | dict[str, Any], seed: int = 1, seq_length: int = SIZE - 1, **values: Any
) -> IndexedSource:
    train = [str(path) if isinstance(path, Path) else path for path in paths]
    config = IndexedConfig.model_validate({"source": "indexed", "train": train, **values})
    return IndexedSource.open(config, seq_length=seq_length, seed=seed)


def documents(first: int, lengths: list[int]) -> list[list[int]]:
    """Documents of counting tokens, so that a stretch of tokens tells where it is from."""
    ends = np.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def stream(texts: list[list[int]]) -> list[int]:
    return [token for text in texts for token in [*text, EOS]]


def chunks_of(texts: list[list[int]]) -> set[tuple[int, ...]]:
    tokens = stream(texts)
    return {tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens) - SIZE + 1, SIZE)}


def rows(source: IndexedSource, start: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in source.sequences(start, count)["tokens"].tolist()]


TEXTS = documents(1, [3, 17, 1, 9, 30, 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "news", TEXTS, documents(200, [12, 40, 3, 25]))


def test_megatron_reads_what_was_written(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / "train"))
    assert [document.tolist() for document in dataset] == [[*text, EOS] for text in TEXTS]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))


def test_epochs_are_different_permutations_of_the_chunks(folder: Path) -> None:
    source = open_folders(folder)
    expected = chunks_of(TEXTS)
    count = len(stream(TEXTS)) // SIZE
    assert len(expected) == count == 13
    epochs = [rows(source, epoch * count, count) for epoch in range(3)]
    assert all(set(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows(open_folders(folder, seed=2), 0, count) != epochs[0]


def test_a_sequence_depends_on_its_index_alone(folder: Path) -> None:
    whole = rows(open_folders(folder), 0, 100)
    source = open_folders(folder)
    assert [tuple(source.sequence(i)["tokens"].tolist()) for i in (99, 0, 57)] == [
        whole[99],
        whole[0],
        whole[57],
    ]
    assert rows(source, 8, 45) == whole[8:53]
    assert source.sequences(0, 2)["tokens"].dtype == np.int64


def test_documents_of_a_sequence(tmp_path: Path) -> None:
    """From the documents' lengths and not from tokens: an EOS may stand within one, as in dialogues."""
    texts = [[*range(1, 13)], [], [], [20, EOS, 21], [30], [*range(40, 60)]]
    folder = write_folder(tmp_path / "a", texts)
    source = open_folders(folder, document_mask=True)
    owners = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    expected = {}
    for at in range(0, len(owners) - SIZE + 1, SIZE):
        owner = owners[at : at + SIZE].tolist()
        expected[tuple(stream(texts)[at : at + SIZE])] = [owner.index(document) for document in owner]
    found = source.sequences(0, 2 * len(expected))
    assert found["document_start"].dtype == np.int32
    for tokens, starts in zip(found["tokens"].tolist(), found["document_start"].tolist(), strict=True):
        assert starts == expected[tuple(tokens)]
    np.testing.assert_array_equal(source.sequence(3)["document_start"], found["document_start"][3])
    assert "document_start" not in open_folders(folder).sequence(3)


def test_documents_of_held_out_sequences(folder: Path) -> None:
    held_out = open_folders(folder, document_mask=True).validation("news")
    starts = held_out.sequences(0, 4)["document_start"]
    assert starts.shape == (4, SIZE)
    assert (starts <= np.arange(SIZE)).all()
    assert starts.any()


def test_blend_follows_the_weights_and_shuffles_each_folder(tmp_path: Path) -> None:
    texts = {name: documents(first, [99]) for name, first in (("a", 1), ("b", 200), ("c", 400))}
    for name, text in texts.items():
        write_folder(tmp_path / name, text)
    weights = {"a": 5.0, "b": 3.0, "c": 0.5}
    entries = [{"path": str(tmp_path / name), "weight": weight} for name, weight in weights.items()]
    source = open_folders(*entries)
    found = rows(source, 0, 1700)
    owner = np.searchsorted([200, 400], [max(row) for row in found], side="right")
    share = np.array([5.0, 3.0, 0.5]) / 8.5
    # At every point of the run each folder has its share, to within the number of folders.
    for end in (1, 10, 100, 1700):
        assert (abs(np.bincount(owner[:end], minlength=3) - end * share) <= 3).all()
    for number, name in enumerate("abc"):
        of_folder = [row for row, which in zip(found, owner, strict=True) if which == number]
        assert set(of_folder[:20]) == set(of_folder[20:40]) == chunks_of(texts[name])
    assert rows(source, 700, 100) == found[700:800]


def test_blend_goes_on_across_its_period(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", documents(1, [99]))
    second = write_folder(tmp_path / "b", documents(200, [99]))
    source = open_folders({"path": str(first), "weight": 2}, {"path": str(second), "weight": 1})
    tokens = source.sequences(0, BLEND_PERIOD + 300)["tokens"]
    from_first = tokens[tokens.max(axis=1) < 200]
    assert abs(len(from_first) - len(tokens) * 2 / 3) <= 2
    # The sequences of one folder come epoch after epoch without a gap: its 20 chunks, each once.
    for epoch in range(0, len(from_first) - 20, 20):
        assert len(np.unique(from_first[epoch : epoch + 20, 0])) == 20
    np.testing.assert_array_equal(source.sequences(BLEND_PERIOD - 9, 20)["tokens"], tokens[-309:-289])


def test_a_weight_too_small_to_be_met(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", documents(1, [99]))
    second = write_folder(tmp_path / "b", documents(200, [99]))
    with pytest.raises(DataError, match=r"b: weight 1e-09 is less than one sequence in 65536"):
        open_folders(first, {"path": str(second), "weight": 1e-9})


def test_validation_holds_every_chunk_of_each_domain(tmp_path: Path, folder: Path) -> None:
    held_out = documents(500, [33])
    other = write_folder(tmp_path / "books", TEXTS, held_out)
    source = open_folders(folder, other)
    assert source.domains == ("news", "books")
    books = source.validation("books")
    assert {tuple(example["tokens"].tolist()) for example in map(books.__getitem__, range(6))} == chunks_of(
        held_out
    )
    assert len(books) == 6
    np.testing.assert_array_equal(books[3]["tokens"], books.sequences(2, 3)["tokens"][1])
    # The same in every run, whatever its seed.
    again = open_folders(folder, other, seed=5).validation("books")
    np.testing.assert_array_equal(again.sequences(0, 6)["tokens"], books.sequences(0, 6)["tokens"])
    named = open_folders(folder, validation={"novels": str(other)})
    assert named.domains == ("novels",)
    assert len(named.validation("novels")) == 6


def test_probe_takes_document_starts_then_later_stretches(folder: Path) -> None:
    source = open_folders(folder)
    # Documents of 12, 40, 3 and 25 tokens from 200 on; stretches of 10 lie in all but the third.
    probe = source.probe(7, 10)["tokens"]
    firsts = probe[:, 0].tolist()
    assert sorted(firsts[:3]) == [200, 212, 255]
    assert sorted(firsts[3:5]) == [222, 265]
    assert firsts[5:] == [232, 242]
    assert (np.diff(probe) == 1).all()
    with pytest.raises(DataError, match=r"measure.count: 8 is above the 7 stretches of 10 tokens"):
        source.probe(8, 10)


def test_probe_takes_domains_in_turn(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path / "books", TEXTS, documents(500, [10, 10, 10]))
    first = open_folders(folder, other).probe(4, 10)["tokens"][:, 0]
    assert (first[::2] < 500).all()
    assert (first[1::2] >= 500).all()


@pytest.mark.parametrize("left", [".prepare/request.json", "train.bin", "validation.bin"])
def test_domains_that_are_not_prepared_to_the_end_are_named(tmp_path: Path, left: str) -> None:
    for name in ("a", "c"):
        write_folder(tmp_path / "all" / name, TEXTS)
    (tmp_path / "all" / "notes").mkdir()
    (tmp_path / "all" / "a" / ".prepare").mkdir()  # the manifest is there: it is whole
    assert len(open_folders(tmp_path / "all")._train.parts) == 2
    for name in ("b", "d"):
        path = tmp_path / "all" / name / left
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(DataError, match=r"/all: not yet prepared to the end: b, d; finish `sinkbench data p"):
        open_folders(tmp_path / "all")


@pytest.mark.parametrize(("every", "sequences"), [(1, 16), (1, 17), (0, 17)])
def test_validation_of_fewer_sequences_is_warned_of(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, every: int, sequences: int
) -> None:
    from sinkbench.trainer import _warn_of_held_out

    other = write_folder(tmp_path / "more", TEXTS, documents(200, [200]))
    config = recipe(folder, validation={"every": every, "sequences": sequences})
    _warn_of_held_out(config, open_folders(folder, other))
    warning = "validation reads fewer sequences than the 17 asked for, all held out: 16 of news"
    assert [record.getMessage() for record in caplog.records] == [warning] * (every and sequences == 17)


def test_fingerprint_follows_content_not_place(tmp_path: Path, folder: Path) -> None:
    copy = write_folder(tmp_path / "copy", TEXTS)
    other = write_folder(tmp_path / "other", TEXTS[1:])
    fingerprint = open_folders(folder).fingerprint
    assert open_folders(copy).fingerprint == fingerprint
    assert open_folders(other).fingerprint != fingerprint
    assert open_folders(folder, seed=2).fingerprint != fingerprint
    assert open_folders(folder, seq_length=7).fingerprint != fingerprint


# --- errors ---------------------------------------------------------------------------------------


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def replace_bytes(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def replace_and_record(path: Path, at: int, new: bytes) -> None:
    """As a program would that wrote wrong tokens in the first place: the checksum fits."""
    replace_bytes(path, at, new)
    edit_manifest(path.parent, lambda m: m["files"][path.name].update(sha256=file_sha256(path)))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "has no manifest.json; prepare it with `sinkbench data prepare`",
    ),
    "manifest is not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: the file is"),
    "manifest of another version": (
        lambda f: edit_manifest(f, lambda m: m.update(schema_version=2)),
        "manifest.json: schema_version is not as sinkbench writes it",
    ),
    "no token file": (lambda f: (f / "train.bin").unlink(), "train.bin: is missing"),
    "token file is cut": (lambda f: cut(f / "train.bin"), "train.bin: has 134 bytes where the"),
    "index is cut": (lambda f: cut(f / "train.idx"), "train.idx: has"),
    "index of another format": (
        lambda f: replace_and_record(f / "train.idx", 0, b"X"),
        "train.idx: is damaged (not the header of an IndexedDataset",
    ),
    "index counts more sequences": (
        lambda f: replace_and_record(f / "train.idx", 18, b"\7"),
        "train.idx: is damaged (162 bytes where the header says 174)",
    ),
    "index of other tokens": (
        lambda f: replace_and_record(f / "train.idx", 34, b"\5"),
        "train.bin: has 136 bytes where train.idx says 138",
    ),
    "manifest of other tokens": (
        lambda f: edit_manifest(f, lambda m: m["tokens"].update(train=60)),
        "train.bin holds 68 uint16 where the manifest says 60 uint16",
    ),
    "token outside the vocabulary": (
        lambda f: replace_and_record(f / "train.bin", 4, b"\xff\xff"),
        "train.bin holds token 65535, outside the tokenizer's vocabulary of 1000",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_at_start(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(DataError) as caught:
        open_folders(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verify_finds_a_changed_byte(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["tokenizer"].update(path="tokenizer.model"))
    with pytest.raises(DataError, match=r"tokenizer.model: is missing"):
        verify(folder)
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"tokenizer.model: is not what was prepared"):
        verify(folder)
    # sha256 of "x"
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    edit_manifest(folder, lambda m: m["tokenizer"].update(sha256=sha256))
    assert verify(folder).tokens["train"] == len(stream(TEXTS))
    replace_bytes(folder / "train.bin", 10, b"\1\2")  # within the vocabulary, so only the checksum tells
    with pytest.raises(DataError, match=r"train.bin: is not what was prepared"):
        verify(folder)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "tokenizer/tokenizer.model"])
def test_a_flipped_bit_is_refused_at_start(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_verify, "CACHE", tmp_path / "cache")
    tokenizer = folder / "tokenizer" / "tokenizer.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes(b"the tokenizer")
    edit_manifest(folder, lambda m: m["tokenizer"].update(sha256=file_sha256(tokenizer)))
    open_folders(folder)
    content = (folder / name).read_bytes()
    replace_bytes(folder / name, len(content) - 2, bytes([content[-2] ^ 1]))
    os.utime(folder / name, ns=(1, 1))  # however coarse the file system's clock
    with pytest.raises(DataError, match=rf"{name}: is not what was prepared"):
        open_folders(folder)


def test_checksums_are_compared_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_verify, "CACHE", tmp_path / "cache")
    read: list[str] = []

    def record(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(data_verify, "file_sha256", record)
    open_folders(folder)
    assert sorted(read) == ["train.bin", "train.idx", "validation.bin", "validation.idx"]
    open_folders(folder)
    assert len(read) == 4
    os.utime(folder / "train.idx", ns=(1, 1))
    open_folders(folder)
    assert read[4:] == ["train.idx"]
    # A note that cannot be read or written costs a comparison, no more.
    for note in (tmp_path / "cache").iterdir():
        note.write_text("[")
    open_folders(folder)
    monkeypatch.setattr(data_verify, "CACHE", folder / "train.bin")
    open_folders(folder)
    assert len(read) == 5 + 4 + 4
    monkeypatch.setattr(data_verify, "CHECKED_BYTES", 0)
    open_folders(folder)
    assert len(read) == 13


def test_verify_finds_a_token_outside_the_vocabulary(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.model").write_bytes(b"x")
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    edit_manifest(folder, lambda m: m["tokenizer"].update(sha256=sha256, vocab_size=62))
    with pytest.raises(DataError, match=r"train.bin: holds a token outside the tokenizer's vocabulary of 62"):
        verify(folder)
    edit_manifest(folder, lambda m: m["documents"].update(train=5))
    with pytest.raises(DataError, match=r"train: holds \(6, 68\) documents and tokens where"):
        verify(folder)


def test_folder_is_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; prepare it with"):
        open_folders(tmp_path / "nothing")


def test_sequence_is_longer_than_the_data(folder: Path) -> None:
    assert len(open_folders(folder, seq_length=67).sequence(0)["tokens"]) == 68
    with pytest.raises(DataError, match="has 68 training tokens, below one sequence of 69; shorten"):
        open_folders(folder, seq_length=68)


def test_folders_of_different_tokenizers(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path / "other", TEXTS, tokenizer_sha256="1" * 64)
    with pytest.raises(DataError, match=r"other: was prepared with another tokenizer than .*news"):
        open_folders(folder, other)
    with pytest.raises(DataError, match=r"other: was prepared with another tokenizer than .*news"):
        open_folders(folder, validation={"x": str(other)})


def test_folders_with_different_ends_of_documents(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path / "other", TEXTS)
    edit_manifest(other, lambda m: m["tokenizer"].update(eos_id=1))
    with pytest.raises(DataError, match=r"other: was prepared with another tokenizer than .*news"):
        open_folders(folder, other)


def test_domains_of_one_name(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path / "more" / "news", TEXTS, TEXTS)
    with pytest.raises(DataError, match=r"two folders are called news; name the domains in data.validation"):
        open_folders(folder, other)


def test_validation_folder_without_held_out_documents(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path / "other", TEXTS)
    with pytest.raises(DataError, match="other: has no validation documents"):
        open_folders(folder, validation={"x": str(other)})


def recipe(path: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "name": "x",
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "ffn": "none",
            "seq_length": 16,
        },
        "data": {"source": "indexed", "train": str(path)},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "train": {"steps": 1, "global_batch_size": 1},
        "measure": {"every": 0, "length": 16},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def test_what_a_run_will_need_is_checked_at_start(tmp_path: Path, folder: Path) -> None:
    assert open_source(recipe(folder)).vocab_size == 1000
    with pytest.raises(DataError, match="vocab_size: 999 is below the 1000 tokens of the data; raise it"):
        open_source(recipe(folder, model={"vocab_size": 999}))
    with pytest.raises(DataError, match=r"measure.count: 4 is above the 3 stretches of 16 tokens"):
        open_source(recipe(folder, measure={"every": 1, "count": 4}))
    open_source(recipe(folder, measure={"every": 1, "count": 3}))
    none_held_out = write_folder(tmp_path / "train_only", TEXTS)
    open_source(recipe(none_held_out))
    with pytest.raises(DataError, match=r"validation.every: no documents are held out; prepare with"):
        open_source(recipe(none_held_out, validation={"every": 1}))
    little_held_out = write_folder(tmp_path / "little", TEXTS, documents(1, [9]))
    open_source(recipe(little_held_out))
    with pytest.raises(DataError, match=r"validation.every: little holds out less than one sequence of 17"):
        open_source(recipe(little_held_out, validation={"every": 1}))


@pytest.mark.full
def test_ten_million_sequences_are_read_from_any_step(tmp_path: Path) -> None:
    """What is held beside the mapped file are the order of an epoch, 4 bytes a sequence, and its making."""
    count, batch = 10_000_000, 512
    file = np.memmap(tmp_path / "tokens", np.uint32, "w+", shape=(2 * count,))
    file[::2] = np.arange(count)
    tracemalloc.start()
    chunks = Chunks(file, np.full(count, 2, np.int32), 2)
    blend = Blend([Epochs(chunks, 1.0, 1, 0)], [1.0], ["all"])
    source = IndexedSource(
        blend, {}, seq_length=1, vocab_size=count, fingerprint="", tokenizer=tmp_path / "none"
    )
    tracemalloc.reset_peak()
    loader = micro_batches(
        source, start_step=1_000_000, global_batch_size=batch, micro_batch_size=batch, dp_rank=0, dp_size=1
    )
    first = next(loader)["tokens"][:, 0]
    loader.close()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    epoch, position = divmod(1_000_000 * batch, count)
    order = np.random.Generator(np.random.PCG64((1, 0, epoch))).permutation(count)
    assert first.tolist() == order[position : position + batch].tolist()
    assert held < 13 * count
    assert peak < 25 * count
