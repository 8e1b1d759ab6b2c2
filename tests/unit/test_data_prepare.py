"""Preparation: the written stream against one made by hand, any number of workers, interruptions."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers

from sinkbench.config import Config, PrepareConfig, TokenizerConfig
from sinkbench.data import prepare as prepare_module
from sinkbench.data import shards
from sinkbench.data.documents import find_inputs
from sinkbench.data.manifest import Manifest
from sinkbench.data.prepare import Request, prepare, prepare_cached
from sinkbench.data.source import open_source
from sinkbench.data.tokenizer import train_sentencepiece
from sinkbench.data.verify import verify
from sinkbench.errors import DataError, HostError
from sinkbench.megatron.datasets import open_tokens

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "over", "hills"]


def text(number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) + f" {number}.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "words.model"
    train_sentencepiece((text(i) for i in range(300)), 320, path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Two inputs of 90 different documents, with copies within and across inputs and empty ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(text(i))
    (folder / "99_copy.md").write_text(text(7))
    (folder / "99_empty.md").write_text(" \n\t")
    lines = [*map(text, range(25, 60)), "", *map(text, range(55, 90))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return [str(folder), str(tmp_path / "x.jsonl")]


def request(inputs: list[str], tokenizer: Path | int, **values: Any) -> Request:
    if isinstance(tokenizer, int):
        config = TokenizerConfig(train_vocab_size=tokenizer)
    else:
        config = TokenizerConfig(path=str(tokenizer))
    return Request(tuple(find_inputs(inputs)), config, **values)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_split(folder: Path, split: str) -> list[list[int]]:
    file = open_tokens(folder / split)
    return [document.tolist() for document in np.split(file.tokens, np.cumsum(file.lengths))[:-1]]


def hash_fraction(document: str) -> float:
    digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def test_stream_is_every_document_once_with_eos(tmp_path: Path, corpus: list[str], model: Path) -> None:
    manifest = prepare(request(corpus, model, holdout=0.2), tmp_path / "out", workers=1)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for number in range(90):
        split = "validation" if hash_fraction(text(number)) < 0.2 else "train"
        expected[split].append([*processor.encode(text(number)), processor.eos_id()])
    for split, documents in expected.items():
        assert read_split(tmp_path / "out", split) == documents
        assert manifest.documents[split] == len(documents) > 5
        assert manifest.tokens[split] == sum(map(len, documents))
    counts = {record.input: record for record in manifest.inputs}
    # The folder holds one copy; the .jsonl repeats 5 of the folder and 5 of its own.
    assert [(c.documents, c.duplicates, c.empty) for c in counts.values()] == [(30, 1, 1), (60, 10, 1)]
    assert (manifest.duplicates, manifest.empty) == (11, 2)
    assert sum(c.tokens for c in counts.values()) == sum(manifest.tokens.values())
    assert manifest.tokenizer.vocab_size == 320
    assert manifest.tokenizer.eos_id == processor.eos_id()
    assert (tmp_path / "out" / manifest.tokenizer.path).read_bytes() == model.read_bytes()
    assert verify(tmp_path / "out") == manifest
    assert sorted(contents(tmp_path / "out")) == [
        "manifest.json",
        "tokenizer/words.model",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def test_workers_and_units_change_nothing(tmp_path: Path, corpus: list[str]) -> None:
    wanted = request(corpus, 330)
    prepare(wanted, tmp_path / "one", workers=1)
    prepare(wanted, tmp_path / "two", workers=2, unit_bytes=500)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_order_of_inputs_leaves_the_trained_tokenizer_as_it_is(tmp_path: Path, corpus: list[str]) -> None:
    first = prepare(request(corpus, 330), tmp_path / "one", workers=1)
    second = prepare(request(corpus[::-1], 330), tmp_path / "two", workers=1)
    assert first.tokenizer == second.tokenizer
    assert first.files != second.files


def test_tokenizer_is_trained_on_a_sample_of_the_documents(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[str] = []

    def record(texts: Any, vocab_size: int, path: Path) -> None:
        trained_on.extend(texts)
        train_sentencepiece([text(i) for i in range(90)], vocab_size, path)

    monkeypatch.setattr(prepare_module, "train_sentencepiece", record)
    monkeypatch.setattr(prepare_module, "SAMPLE_CHARS", 3000)
    prepare(request(corpus, 330), tmp_path / "out", workers=1)
    assert sum(map(len, trained_on)) == 3000
    assert len(set(trained_on)) == len(trained_on) > 5
    whole = {text(i) for i in range(90)}
    assert set(trained_on[:-1]) <= whole
    assert any(t.startswith(trained_on[-1]) for t in whole)


def huge_vocabulary(path: Path) -> Path:
    vocabulary = {"</s>": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(70000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "w0 w69999"}\n{"text": "w65535"}\n')
    tokenizer = huge_vocabulary(tmp_path / "tokenizer.json")
    manifest = prepare(request([str(tmp_path / "x.jsonl")], tokenizer), tmp_path / "out", workers=1)
    assert manifest.dtype == "int32"
    splits = [read_split(tmp_path / "out", split)[0] for split in ("train", "validation")]
    assert sorted(splits) == [[2, 70001, 0], [65537, 0]]


def test_each_split_gets_a_document(tmp_path: Path, model: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(text(i))
    inputs = [str(tmp_path / f"{i}.txt") for i in range(3)]
    lowest, _, highest = sorted(range(3), key=lambda i: hash_fraction(text(i)))
    ends = {
        i: [*sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text(i)), 2] for i in range(3)
    }
    small = prepare(request(inputs, model, holdout=1e-9), tmp_path / "small", workers=1)
    assert small.documents == {"train": 2, "validation": 1}
    assert read_split(tmp_path / "small", "validation") == [ends[lowest]]
    large = prepare(request(inputs, model, holdout=1 - 1e-9), tmp_path / "large", workers=1)
    assert large.documents == {"train": 1, "validation": 2}
    assert read_split(tmp_path / "large", "train") == [ends[highest]]
    none = prepare(request(inputs, model, holdout=0), tmp_path / "none", workers=1)
    assert none.documents == {"train": 3, "validation": 0}
    assert sorted(none.files) == ["train.bin", "train.idx"]
    every = prepare(request(inputs, model, holdout=1), tmp_path / "every", workers=1)
    assert every.documents == {"train": 0, "validation": 3}
    assert verify(tmp_path / "none") == none
    assert verify(tmp_path / "every") == every


def test_validation_inputs_that_are_trained_on_are_refused(
    corpus: list[str], model: Path, tmp_path: Path
) -> None:
    held_out = tuple(find_inputs(corpus[1:]))
    with pytest.raises(
        DataError, match=r"x.jsonl: all its documents are among the inputs, .*; hold out others"
    ):
        prepare(request(corpus, model, validation=held_out), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    manifest = prepare(request(corpus[:1], model, validation=held_out), tmp_path / "out", workers=1)
    assert manifest.documents == {"train": 30, "validation": 60}


def test_validation_inputs_do_not_train_the_tokenizer(corpus: list[str], tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"quetzalcoatl {number} " * 2000)
        held_out = tuple(find_inputs([str(tmp_path / f"{number}.txt")]))
        prepare(request(corpus, 320, validation=held_out), tmp_path / f"out{number}", workers=1)
    models = [(tmp_path / f"out{number}" / "tokenizer" / "tokenizer.model") for number in range(2)]
    prepare(request(corpus, 320), tmp_path / "alone", workers=1)
    models.append(tmp_path / "alone" / "tokenizer" / "tokenizer.model")
    assert len({path.read_bytes() for path in models}) == 1
    assert len(sentencepiece.SentencePieceProcessor(model_file=str(models[0])).encode("quetzalcoatl")) > 3


def test_lone_document_is_cut(tmp_path: Path, model: Path) -> None:
    book = "".join(text(i) for i in range(20))
    (tmp_path / "book.txt").write_text(book)
    manifest = prepare(request([str(tmp_path / "book.txt")], model, holdout=0.1), tmp_path / "out", workers=1)
    [train], [validation] = (read_split(tmp_path / "out", split) for split in ("train", "validation"))
    whole = [*sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(book), 2]
    assert train + validation == whole
    assert len(validation) == round(len(whole) * 0.1)
    assert manifest.documents == {"train": 1, "validation": 1}
    assert verify(tmp_path / "out") == manifest


# --- again, interrupted, at once --------------------------------------------------------------------


class Counter:
    """Counts the shards that are written, and may interrupt after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.shards = 0
        make = shards.make_tokenise

        def counting(*args: Any) -> Callable[[Any], int]:
            tokenise = make(*args)

            def call(job: Any) -> int:
                if self.shards == stop_after:
                    raise KeyboardInterrupt
                self.shards += 1
                return tokenise(job)

            return call

        monkeypatch.setattr(prepare_module, "make_tokenise", counting)


def test_finished_folder_is_found(
    tmp_path: Path, corpus: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(request(corpus, model), tmp_path / "out", workers=1)
    counter = Counter(monkeypatch)
    assert prepare(request(corpus, model), tmp_path / "out", workers=1) == first
    assert counter.shards == 0


def test_data_with_another_eos_are_not_taken_for_those_asked_for(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = two_ends(tmp_path / "tokenizer", "</s>")
    wanted = request(corpus, tokenizer)
    first = prepare(wanted, tmp_path / "out", workers=1)
    with monkeypatch.context() as patch:
        Counter(patch, stop_after=8)
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted, tmp_path / "stopped", workers=1, unit_bytes=500)
    two_ends(tmp_path / "tokenizer", "<end>")
    # Data that were prepared before stay where they are.
    assert request(corpus, tokenizer).hash() == wanted.hash() == first.request
    with pytest.raises(DataError, match=r"out: holds data prepared from other inputs, another tokenizer or"):
        prepare(request(corpus, tokenizer), tmp_path / "out", workers=1)
    prepare(request(corpus, tokenizer), tmp_path / "stopped", workers=1, unit_bytes=500)
    prepare(request(corpus, tokenizer), tmp_path / "fresh", workers=1)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "fresh")
    two_ends(tmp_path / "tokenizer", "</s>")
    assert prepare(request(corpus, tokenizer), tmp_path / "out", workers=1) == first


def two_ends(folder: Path, eos: str) -> Path:
    """A tokenizer of words whose EOS its configuration names."""
    folder.mkdir(exist_ok=True)
    tokens = ["<unk>", "</s>", "<end>", *WORDS]
    words = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Written once: the vocabulary's order in the file is by chance.
    if not (folder / "tokenizer.json").exists():
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def test_interrupted_run_goes_on(tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(corpus, 330)
    prepare(wanted, tmp_path / "whole", workers=1, unit_bytes=500)
    with monkeypatch.context() as patch:
        stopped = Counter(patch, stop_after=8)
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted, tmp_path / "out", workers=1, unit_bytes=500)
    assert stopped.shards == 8
    assert not (tmp_path / "out" / "manifest.json").exists()
    with monkeypatch.context() as patch:
        resumed = Counter(patch)
        patch.setattr(prepare_module, "train_sentencepiece", None)  # it is not trained again
        prepare(wanted, tmp_path / "out", workers=1, unit_bytes=500)
    with monkeypatch.context() as patch:
        fresh = Counter(patch)
        prepare(wanted, tmp_path / "fresh", workers=1, unit_bytes=500)
    assert resumed.shards == fresh.shards - 8 > 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupted_run_of_another_request_is_begun_anew(
    tmp_path: Path, corpus: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Counter(patch, stop_after=8)
        with pytest.raises(KeyboardInterrupt):
            prepare(request(corpus, 330), tmp_path / "out", workers=1, unit_bytes=500)
    prepare(request(corpus[:1], model), tmp_path / "out", workers=1, unit_bytes=500)
    prepare(request(corpus[:1], model), tmp_path / "fresh", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_killed_run_goes_on(tmp_path: Path, corpus: list[str], model: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from sinkbench.data import prepare as module, shards
        from tests.unit.test_data_prepare import request
        if __name__ == "__main__":
            wanted = request(sys.argv[3:], Path(sys.argv[2]))
            module.prepare(wanted, Path(sys.argv[1]), workers=2, unit_bytes=100)
        """
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", program, str(out), str(model), *corpus]) as process:
        while len(list(out.glob(".prepare/shards/*.npz"))) < 5:
            assert process.poll() is None
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    psutil.wait_procs(children, timeout=60)
    assert not (out / "manifest.json").exists()
    prepare(request(corpus, model), out, workers=1, unit_bytes=100)
    prepare(request(corpus, model), tmp_path / "fresh", workers=1)
    assert contents(out) == contents(tmp_path / "fresh")


def test_processes_that_ask_at_once_prepare_once(
    tmp_path: Path, corpus: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    found: list[Manifest] = []

    def ask() -> None:
        found.append(prepare(request(corpus, model), tmp_path / "out", workers=1, unit_bytes=500))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(manifest == found[0] for manifest in found)
    once = counter.shards
    prepare(request(corpus, model), tmp_path / "fresh", workers=1, unit_bytes=500)
    assert counter.shards == 2 * once
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_reported(
    tmp_path: Path,
    corpus: list[str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    prepare(request(corpus, model), tmp_path / "out", workers=1)
    verify(tmp_path / "out")
    assert "out: its file system has no locks; prepare it in no other process meanwhile" in caplog.text


def test_a_lock_that_fails_otherwise_is_an_error(
    tmp_path: Path, corpus: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(HostError, match=r"out: cannot be written \(Input/output error\)"):
        prepare(request(corpus, model), tmp_path / "out", workers=1)


def failing(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_the_lock_may_be_made_and_removed_by_many_at_once(tmp_path: Path) -> None:
    work = tmp_path / "out" / ".prepare"
    inside: list[int] = []
    most: list[int] = []
    failures: list[BaseException] = []

    def hold() -> None:
        try:
            for _ in range(50):
                with prepare_module._lock(work / "lock"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    prepare_module._discard(work)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert most == [1] * 400
    assert list((tmp_path / "out").iterdir()) == []


def test_recipe_prepares_on_first_use(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {
            "name": "x",
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "ffn": "none",
                "seq_length": 16,
            },
            "data": {
                "source": "indexed",
                "prepare": {
                    "inputs": corpus,
                    "tokenizer": {"train_vocab_size": 330},
                    "cache": str(tmp_path / "cache"),
                    "holdout": 0.2,
                },
            },
            "optim": {"lr": 1e-3, "warmup_steps": 0},
            "train": {"steps": 1, "global_batch_size": 1},
            "validation": {"every": 1},
            "measure": {"length": 16, "count": 5},
        }
    )
    monkeypatch.setattr(prepare_module, "available_cores", lambda: 1)
    source = open_source(config)
    counter = Counter(monkeypatch)
    again = open_source(config)
    assert counter.shards == 0
    assert source.domains == ("held_out",)
    assert source.vocab_size == 330
    np.testing.assert_array_equal(source.sequence(40)["tokens"], again.sequence(40)["tokens"])
    assert source.fingerprint == again.fingerprint
    # A changed input is another folder of the cache.
    (Path(corpus[0]) / "new.txt").write_text("a new document of the cat")
    prepared: PrepareConfig = config.data.prepare  # type: ignore[union-attr,assignment]
    prepare_cached(prepared, progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# --- errors ---------------------------------------------------------------------------------------


def test_other_data_is_not_overwritten(tmp_path: Path, corpus: list[str], model: Path) -> None:
    out = tmp_path / "out"
    prepare(request(corpus, model), out, workers=1)
    before = contents(out)
    for other in (
        request(corpus[:1], model),
        request(corpus, 330),
        request(corpus, model, holdout=0.5),
        request(corpus, model, text_field="body"),
    ):
        with pytest.raises(DataError, match="out: holds data prepared from other inputs, another tokenizer"):
            prepare(other, out, workers=1)
    assert contents(out) == before


def test_folder_of_other_things(tmp_path: Path, corpus: list[str], model: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="mine: is not empty; choose another folder"):
        prepare(request(corpus, model), tmp_path / "mine", workers=1)
    with pytest.raises(DataError, match=r"thesis.tex: is not a folder"):
        prepare(request(corpus, model), tmp_path / "mine" / "thesis.tex", workers=1)
    with pytest.raises(HostError, match="cannot be written"):
        prepare(request(corpus, model), tmp_path / "mine" / "thesis.tex" / "out", workers=1)
    assert list(contents(tmp_path / "mine")) == ["thesis.tex"]


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_after_an_error(tmp_path: Path, model: Path, exists: bool) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text(1)}) + '\n{"text": }\n')
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    for tokenizer in (model, 330):
        with pytest.raises(DataError, match=r"x.jsonl:2: is not valid JSON"):
            prepare(request([str(tmp_path / "x.jsonl")], tokenizer), out, workers=1)
        assert out.exists() == exists
        assert not exists or not contents(out)


def test_error_of_a_worker_process_is_the_same_line(tmp_path: Path, corpus: list[str], model: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"latin.txt: is not UTF-8 \(byte 0\); convert it to UTF-8"):
        prepare(request([*corpus, str(tmp_path / "latin.txt")], model), tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_file_of_a_folder_that_is_no_text_is_passed_over(
    tmp_path: Path, corpus: list[str], model: Path
) -> None:
    before = prepare(request(corpus, model), tmp_path / "before", workers=1)
    (tmp_path / "corpus" / "50a.txt").write_bytes(b"\xff")
    after = prepare(request(corpus, model), tmp_path / "after", workers=1)
    assert (before.not_text, after.not_text) == (0, 1)
    assert after.tokens == before.tokens


def test_input_without_text(tmp_path: Path, corpus: list[str], model: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('\n{"text": "  "}\n')
    with pytest.raises(DataError, match=r"blank.jsonl: holds no text; give files that hold text"):
        prepare(request([*corpus, str(tmp_path / "blank.jsonl")], model), tmp_path / "out", workers=1)


def test_share_of_held_out_documents(corpus: list[str], model: Path) -> None:
    with pytest.raises(DataError, match=r"--holdout: 1.5 is not a share; give a number from 0 to 1"):
        request(corpus, model, holdout=1.5)


def test_request_hash_tells_requests_apart(tmp_path: Path, corpus: list[str], model: Path) -> None:
    wanted = request(corpus, model)
    hashes = {
        wanted.hash(),
        request(corpus[::-1], model).hash(),
        request(corpus, 330).hash(),
        dataclasses.replace(wanted, holdout=0.5).hash(),
        dataclasses.replace(wanted, text_field="body").hash(),
    }
    (tmp_path / "corpus" / "00.txt").write_text("changed")
    hashes.add(request(corpus, model).hash())
    assert len(hashes) == 6
