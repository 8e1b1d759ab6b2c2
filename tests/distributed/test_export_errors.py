"""What the converters refuse: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from sinkbench.export import commands, to_hf
from sinkbench.export.model_files import ModelFiles
from sinkbench.export.safetensors_files import Entry, write_shards
from tests.distributed.runs import Run
from tests.distributed.text_run import STEPS

pytest.importorskip("transformers")


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def edit_recipe(checkpoint: Path, old: str, new: str) -> None:
    path = checkpoint / "recipe.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def delete_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def write(path: Path, text: str) -> None:
    path.write_text(text)


TO_HF: dict[str, tuple[Callable[[Path], None], str]] = {
    "not there": (lambda c: shutil.rmtree(c), "there is no such folder; give a run's folder or one of its"),
    "no checkpoint": (
        delete_files,
        "checkpoint.json is missing, so it is not a complete checkpoint; delete the folder to go on",
    ),
    "not a folder": (
        replace_by_file,
        "there is no such folder; give a run's folder or one of its checkpoints",
    ),
    "file missing": (lambda c: next(c.glob("*.distcp")).unlink(), ".distcp: is missing; copy it again, or"),
    "file cut short": (lambda c: cut(next(c.glob("*.distcp")), 99), ".distcp: has 99 bytes where"),
    "recipe missing": (lambda c: (c / "recipe.yaml").unlink(), "recipe.yaml: is missing; copy it again, or"),
}


@pytest.mark.parametrize("name", TO_HF)
def test_a_bad_checkpoint_is_one_line(
    name: str, text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = TO_HF[name]
    checkpoint = tmp_path / "step_3"
    shutil.copytree(text_run.checkpoint(STEPS), checkpoint)
    shutil.copytree(text_run.folder / "tokenizer", checkpoint / "tokenizer")
    if name == "no checkpoint":
        shutil.rmtree(checkpoint / "tokenizer")
    spoil(checkpoint)
    refused(commands.to_hf, [str(checkpoint), str(tmp_path / "made" / "out")], expected, tmp_path, capsys)


def test_an_unknown_plugin_is_one_line(
    text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "runs" / "short" / "checkpoints" / "step_3"
    shutil.copytree(text_run.checkpoint(STEPS), checkpoint)
    edit_recipe(checkpoint, "name: sigmoid", "name: sigmoids")
    info = checkpoint / "checkpoint.json"
    edit_info(info, checkpoint)
    expected = "there is no attention 'sigmoids'; did you mean sigmoid?"
    refused(commands.to_hf, [str(checkpoint), str(tmp_path / "out")], expected, tmp_path, capsys)


def edit_info(info: Path, checkpoint: Path) -> None:
    """Writes the index of a checkpoint whose files were changed on purpose."""
    from sinkbench.checkpoint import write_info
    from sinkbench.checksums import FileSum, hash_file

    files = {
        path.name: FileSum(path.stat().st_size, hash_file(path))
        for path in checkpoint.iterdir()
        if path.is_file() and path != info
    }
    info.unlink()
    write_info(checkpoint, step=STEPS, layout={}, files=files)


def widen_recipe(path: Path) -> None:
    recipe = json.loads(path.read_text())["recipe"]
    edit_json(path, recipe=recipe | {"model": recipe["model"] | {"hidden_size": 128}})


def enlarge_tokenizer(path: Path) -> None:
    words = {"</s>": 0, **{str(number): number for number in range(1, 449)}}
    Tokenizer(WordLevel(words, unk_token="1")).save(str(path))


FROM_HF: dict[str, tuple[Callable[[Path], None], str]] = {
    "not there": (lambda m: shutil.rmtree(m), "there is no such folder; name a folder of save_pretrained"),
    "no config": (lambda m: (m / "config.json").unlink(), "there is no config.json, so it is not a Hugging"),
    "config is no JSON": (lambda m: write(m / "config.json", "{"), "config.json: is not JSON ("),
    "another kind": (
        lambda m: edit_json(m / "config.json", model_type="mamba"),
        "config.json: model_type mamba is none that sinkbench can compute; choose a model of gpt2, gpt_neox",
    ),
    "no recipe": (
        lambda m: edit_json(m / "config.json", recipe=None),
        "config.json: has no recipe; copy the model again",
    ),
    "odd recipe": (
        lambda m: edit_json(m / "config.json", recipe=[1]),
        "config.json: is damaged (TypeError: ",
    ),
    "other sizes": (
        lambda m: edit_json(m / "config.json", head_dim=7),
        "of shape (64, 64) and (64, 64) and (64, 64), which config.json does not tell; copy the model again",
    ),
    "more layers": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=5),
        "has no model.layers.4.",
    ),
    "other width": (
        lambda m: widen_recipe(m / "config.json"),
        "has model.embed_tokens.weight of shape (448, 64), where config.json tells (448, 128); copy",
    ),
    "tokenizer of more tokens": (
        lambda m: enlarge_tokenizer(m / "tokenizer.json"),
        "tokenizer.json: has 449 tokens, the model has 448; give the model's own tokenizer with --tokenizer",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        "holds neither safetensors nor PyTorch weights; save the model there with save_pretrained",
    ),
    "cut short": (
        lambda m: cut(m / "model.safetensors", 9000),
        "model.safetensors: cannot be read (SafetensorError: ",
    ),
    "tokenizer is no JSON": (
        lambda m: write(m / "tokenizer.json", "{"),
        "tokenizer.json: is not a tokenizer.json (",
    ),
    "unknown plugin": (
        lambda m: write(
            m / "config.json", (m / "config.json").read_text().replace('"sigmoid"', '"sigmoids"')
        ),
        "there is no attention 'sigmoids'; did you mean sigmoid?",
    ),
}


@pytest.mark.parametrize("name", FROM_HF)
def test_a_bad_model_is_one_line(
    name: str, text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = FROM_HF[name]
    model = tmp_path / "model"
    shutil.copytree(text_export, model)
    spoil(model)
    refused(commands.from_hf, [str(model), str(tmp_path / "made" / "out")], expected, tmp_path, capsys)


def test_an_odd_tensor_is_one_line(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(text_export, model)
    files = ModelFiles(text_export)
    tensors = {name: files.read(name) for name in files.names} | {"model.router": torch.zeros(2)}
    entries = [Entry(name, tuple(x.shape), x.dtype, partial(x.clone)) for name, x in tensors.items()]
    write_shards(model, entries, 10**9)
    expected = "model.router: is no tensor of an exported model; export the model again"
    refused(commands.from_hf, [str(model), str(tmp_path / "out")], expected, tmp_path, capsys)


def test_an_export_has_the_length_of_its_recipe(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(text_export), str(tmp_path / "out"), "--seq-length", "32"]
    expected = "--seq-length: an export of sinkbench keeps that of its recipe; leave it out"
    refused(commands.from_hf, arguments, expected, tmp_path, capsys)


@pytest.mark.parametrize("main", [commands.to_hf, commands.from_hf])
def test_a_folder_with_something_in_it_is_left_alone(
    main: Callable[[list[str]], int],
    text_run: Run,
    text_export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    source = text_run.folder if main is commands.to_hf else text_export
    assert main([str(source), str(out)]) == 2
    assert capsys.readouterr().err == f"{out}: is not empty; name a folder that is new or empty\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("main", [commands.to_hf, commands.from_hf])
def test_a_place_that_cannot_be_written_is_one_line(
    main: Callable[[list[str]], int],
    text_run: Run,
    text_export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    source = text_run.folder if main is commands.to_hf else text_export
    assert main([str(source), str(out)]) == 2
    expected = "cannot be written (Not a directory); choose a writable folder on a disk with room"
    assert capsys.readouterr().err == f"{out}: {expected}\n"


def test_a_full_disk_leaves_nothing(
    text_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "write_shards", no_room)
    expected = (
        "out: cannot be written (No space left on device); choose a writable folder on a disk with room"
    )
    refused(commands.to_hf, [str(text_run.folder), str(tmp_path / "out")], expected, tmp_path, capsys)


def refused(
    main: Callable[[list[str]], int],
    arguments: list[str],
    expected: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints one line, and writes nothing."""
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    assert not Path(arguments[1]).exists()
