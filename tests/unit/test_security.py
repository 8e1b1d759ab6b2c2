"""Nothing runs that was not asked for, and no secret or run leaves its place."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from sinkbench import cli, command, discovery, plugins, pretrain, recipe
from sinkbench.errors import HostError, RecipeError
from sinkbench.manifest import command_line
from sinkbench.redaction import redact
from tests.unit.conftest import Install, Write
from tests.unit.test_plugins import DECAY

SECRET = "0123456789abcdef0123456789abcdef01234567"
HUB_TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsT"


@pytest.mark.parametrize("selection", ["none", "sinkbench", "-acme-decay", "-acme_decay:variants"])
def test_a_package_that_is_left_out_is_never_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, selection: str
) -> None:
    mark = tmp_path / "imported"
    install("acme-decay", f"open({str(mark)!r}, 'w').close()\n" + textwrap.dedent(DECAY))
    monkeypatch.setenv(discovery.SELECTION, selection)
    index = plugins.discover()
    assert "softmax" in index.names("attention")
    assert "acme-decay:variants" in [package.id for package in index.disabled]
    assert not mark.exists()
    monkeypatch.delenv(discovery.SELECTION)
    assert "decay" in plugins.discover().names("attention")
    assert mark.exists()


def test_an_allow_list_admits_what_it_names_alone(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme-decay", DECAY)
    install("other", DECAY.replace('"decay"', '"other"'))
    monkeypatch.setenv(discovery.SELECTION, "sinkbench,acme-decay")
    names = plugins.discover().names("attention")
    assert "decay" in names
    assert "other" not in names
    assert cli.main(["plugins", "list"]) == 0
    assert "left out by SINKBENCH_PLUGINS: other 1.0 (other:variants)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"log in with {SECRET}!", "log in with ***!"),
        (f"get {HUB_TOKEN} now", "get *** now"),
        ("https://me:pass@host/x and s3://key@bucket", "https://***@host/x and s3://***@bucket"),
        ("https://host/x?a=1&access_token=abc&b=2", "https://host/x?a=1&access_token=***&b=2"),
        ("https://host/x?X-Amz-Signature=abc#y", "https://host/x?X-Amz-Signature=***#y"),
        ("model.attention=softmax@home key=short", "model.attention=softmax@home key=short"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    environment = {"WANDB_API_KEY": SECRET, "MONKEY": "get", "HOME": "/home/someone", "A_TOKEN": "short"}
    assert redact(text, environment) == shown


@pytest.mark.parametrize("value", [SECRET, HUB_TOKEN, f"https://user:{SECRET}@host/data"])
def test_a_recipe_with_a_secret_is_refused_without_showing_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert pretrain.main(["small", f"log.wandb={{project: '{value}'}}"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("command line: log.wandb.project: it holds a token or password")
    assert value not in shown
    assert list(Path().iterdir()) == [Path("small.yaml")]


def test_error_lines_show_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def fail() -> None:
        raise HostError("hub", f"no answer from https://x.y/z?token={HUB_TOKEN} with {SECRET}", "wait")

    assert command.run_command(fail) == 2
    assert capsys.readouterr().err == "hub: no answer from https://x.y/z?token=*** with ***; wait\n"


def test_a_manifest_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["pretrain", f"a={SECRET}", f"https://me:{HUB_TOKEN}@host"])
    assert command_line() == ["pretrain", "a=***", "https://***@host"]


LEAVING = [
    "../up",
    "..",
    ".",
    "/abs",
    "a/b",
    "a\\\\b",
    "",
    " a",
    "a ",
    "-a",
    ".hidden",
    "~",
    "a\\0b",
    "a\\nb",
]
LEAVING += ["x" * 201, "é", "a:b", "$HOME", "a;b", "\\u202Eabc"]


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("key", ["name", "label"])
def test_no_name_leads_out_of_the_output_folder(write: Write, key: str, name: str) -> None:
    write("bad.yaml", f'extends: small\n{key}: "{name}"\n')
    with pytest.raises(RecipeError, match=rf"^bad.yaml:2: {key}: "):
        recipe.to_config(recipe.load("bad"))
    write("bad.yaml", f'extends: small\nsweep: [{{label: "{name}"}}]\n')
    with pytest.raises(RecipeError, match=r"^bad.yaml:2: "):
        [recipe.to_config(run) for run in recipe.expand(recipe.load("bad"))]


@pytest.mark.parametrize("label", ["summary.json", "checkpoints", "Measure", "recipe.yaml"])
def test_no_run_of_a_sweep_takes_the_place_of_a_file(write: Write, label: str) -> None:
    write("bad.yaml", f"extends: small\nsweep: [{{label: {label}}}]\n")
    with pytest.raises(RecipeError, match="is the name of a file or folder of a run"):
        [recipe.to_config(run) for run in recipe.expand(recipe.load("bad"))]


@pytest.mark.parametrize("value", ["../../etc", "/etc", "a/../..", "x" * 40, "~root"])
def test_generated_labels_stay_within_their_folder(write: Write, value: str) -> None:
    write("s.yaml", f'extends: small\nsweep: {{model.attention.name: ["{value}"]}}\n')
    (run,) = recipe.expand(recipe.load("s"))
    label = recipe.to_config(run).label
    assert label is not None
    assert "/" not in label
    assert label.startswith("name=")
