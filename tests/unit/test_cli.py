"""The command line: what it prints, how it ends, and the figures it derives from a recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sinkbench import cli, command, flops
from sinkbench.config import ModelConfig
from sinkbench.errors import HostError
from tests.unit.conftest import Install, Write
from tests.unit.test_plugins import DECAY

Capture = pytest.CaptureFixture[str]


def output(capsys: Capture, *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# --- FLOPs and parameters -------------------------------------------------------------------------

PAPER = {
    "60m": ModelConfig(
        num_layers=10, hidden_size=768, num_attention_heads=8, ffn_hidden_size=1536, seq_length=2048
    ),
    "1b": ModelConfig(
        num_layers=22, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5632, seq_length=2048
    ),
}


@pytest.mark.parametrize(("name", "millions"), [("60m", 681), ("1b", 7956)])
def test_flops_per_token_of_the_paper(name: str, millions: int) -> None:
    assert round(flops.flops_per_token(PAPER[name], 50432) / 1e6) == millions


def test_flops_count_the_padded_vocabulary_and_the_length() -> None:
    model = PAPER["60m"]
    assert flops.flops_per_token(model, 50400) == flops.flops_per_token(model, 50432)
    longer = flops.flops_per_token(model, 50432, seq_length=4096) - flops.flops_per_token(model, 50432)
    assert longer == 10 * 3 * (2 + 2) * 768 * 2048 // 2  # layers, passes, QK and AV, width, length, causal


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({}, 4 * 64 * 64 + 3 * 64 * 96),
        ({"ffn": "gelu"}, 4 * 64 * 64 + 2 * 64 * 96),
        ({"ffn": "none"}, 4 * 64 * 64),
        ({"num_query_groups": 2}, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96),
        ({"head_size": 32}, 4 * 64 * 128 + 3 * 64 * 96),
    ],
)
def test_weights_of_a_layer(changes: dict[str, Any], weights: int) -> None:
    sizes = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64}
    model = ModelConfig(**{**sizes, "ffn_hidden_size": 96, **changes})
    assert flops.layer_weights(model) == weights
    norms = 64 * (3 * (1 if model.ffn == "none" else 2) + 1)
    assert flops.parameters_without_tables(model) == 3 * weights + norms
    assert flops.parameters(model, 65) == 3 * weights + norms + 2 * 128 * 64
    tied = model.model_copy(update={"tie_embeddings": True})
    assert flops.parameters(tied, 65) == 3 * weights + norms + 128 * 64


# --- recipe ---------------------------------------------------------------------------------------


def test_recipe_show_names_the_origin_of_every_value(write: Write, capsys: Capture) -> None:
    write("s.yaml", "extends: small\nmodel:\n  attention: {name: sigmoid, normalize: false}\n")
    text = output(capsys, "recipe", "show", "s", "train.steps=300")
    for row in (
        ["name", "small", "small.yaml:1"],
        ["model.attention.normalize", "false", "s.yaml:3"],
        ["model.attention.bias", "none", "default", "of", "sinkbench", "0.1.0"],
        ["train.steps", "300", "command", "line"],
        ["optim.betas", "[0.9,", "0.95]", "default"],
        ["model.num_query_groups", "null", "default"],
        ["tokens", "153.6", "k"],
    ):
        assert row in rows(text)


def test_recipe_show_as_json(write: Write, capsys: Capture) -> None:
    shown = json.loads(output(capsys, "recipe", "show", "small", "--json", "seed=9"))
    (run,) = shown["runs"]
    assert shown["recipe"] == "small.yaml"
    assert run["values"]["seed"] == {"value": 9, "from": "command line"}
    assert run["values"]["optim.lr"] == {"value": 4e-4, "from": "small.yaml:4"}
    assert run["derived"]["tokens"] == 200 * 8 * 64
    assert run["derived"]["flops"] == run["derived"]["tokens"] * run["derived"]["flops_per_token"]


def test_recipe_show_of_a_sweep_prints_what_differs_per_run(write: Write, capsys: Capture) -> None:
    write("g.yaml", "extends: small\nsweep: {optim.lr: [1e-4, 1e-3], train.steps: [100, 300]}\n")
    text = output(capsys, "recipe", "show", "g")
    common, *runs = text.split("\nrun ")
    assert "optim.lr " not in common
    assert "optim.eps " in common
    assert [run.splitlines()[0] for run in runs] == [
        *("1 of 4: lr=0.0001,steps=100", "2 of 4: lr=0.0001,steps=300"),
        *("3 of 4: lr=0.001,steps=100", "4 of 4: lr=0.001,steps=300"),
    ]
    assert rows(runs[1])[1:3] == [["optim.lr", "0.0001", "g.yaml:2"], ["train.steps", "300", "g.yaml:2"]]


def test_recipe_show_without_a_known_vocabulary(write: Write, capsys: Capture) -> None:
    overrides = ["data={source: indexed, train: [a]}"]
    text = output(capsys, "recipe", "show", "small", *overrides)
    assert "the vocabulary is known once the data is prepared" in text
    assert "FLOPs" not in text


def test_recipe_list_groups_by_folder(write: Write, install: Install, capsys: Capture) -> None:
    install(
        "acme",
        """\
        from pathlib import Path
        from sinkbench.api import hookimpl

        @hookimpl
        def sinkbench_recipe_paths():
            return {"acme": Path(__file__).parent / "recipes"}
        """,
    )
    write("../site/acme/recipes/b.yaml", "# What b is for\n# and more\nseed: 1\n")
    write("../site/acme/recipes/paper/x.yaml", "seed: 1\n")
    write("../site/acme/recipes/_base/hidden.yaml", "# not run by itself\n")
    lines = output(capsys, "recipe", "list").splitlines()
    first = lines.index("acme:")
    assert lines[first : first + 4] == ["acme:", "  b.yaml  What b is for", "acme:paper", "  paper/x.yaml"]
    assert any(line.strip().startswith("demo.yaml  ") for line in lines)


# --- plugins --------------------------------------------------------------------------------------


def test_plugins_list_flags_clashes_and_broken_packages(
    write: Write, install: Install, capsys: Capture
) -> None:
    install("acme", DECAY)
    install("other", DECAY)
    install("broken", "import absent_module")
    text = output(capsys, "plugins", "list")
    clashes = [line for line in text.splitlines() if "NAME TAKEN TWICE" in line]
    assert [line.split()[:4] for line in clashes] == [
        ["attention", "decay", "other", "1.0"],
        ["attention", "decay", "acme", "1.0"],
    ]
    assert "also by acme:variants" in clashes[0]
    assert "broken: broken 1.0 (broken:variants): its import failed with ModuleNotFoundError" in text


def test_plugins_list_of_a_kind(capsys: Capture) -> None:
    kinds = {row[0] for row in rows(output(capsys, "plugins", "list", "positional"))[1:]}
    assert kinds == {"positional"}


def test_plugins_show_describes_parameters(capsys: Capture) -> None:
    text = output(capsys, "plugins", "show", "attention", "sigmoid")
    assert ["normalize", "bool", "true", "divide", "each", "row", "by", "its", "sum."] in rows(text)
    assert "sinkbench:similarity" in text


def test_plugins_as_json(install: Install, capsys: Capture) -> None:
    install("acme", DECAY)
    shown = json.loads(output(capsys, "plugins", "show", "attention", "decay", "--json"))
    (plugin,) = shown["plugins"]
    assert plugin["package"]["distribution"] == "acme"
    assert [(p["name"], p["type"], p["default"]) for p in plugin["parameters"]] == [
        ("rate", "float", "0.5"),
        ("steps", "int", "3"),
    ]


def test_left_out_packages_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("SINKBENCH_PLUGINS", "-similarity")
    text = output(capsys, "plugins", "list")
    assert "left out by SINKBENCH_PLUGINS: sinkbench" in text
    assert ["attention", "sigmoid"] not in [row[:2] for row in rows(text)]


# --- how commands end -----------------------------------------------------------------------------


def raises(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


ERROR = HostError("here", "it is\nbroken", "repair it")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ERROR, 2, "here: it is broken; repair it\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: cannot be used (Permission denied); "),
        (
            OSError(28, "No space left on device", "/x/y"),
            2,
            "/x/y: cannot be used (No space left on device); ",
        ),
    ],
)
def test_errors_end_with_a_line(error: BaseException, code: int, printed: str, capsys: Capture) -> None:
    assert command.run_command(raises(error)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(printed)
    assert shown.err.count("\n") == (1 if printed else 0)


@pytest.mark.parametrize(
    "error", [ValueError("ours"), FileNotFoundError(2, "absent", "x"), BrokenPipeError(32, "a connection")]
)
def test_our_own_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        command.run_command(raises(error))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_exit_codes(returned: int | None, code: int) -> None:
    assert command.run_command(lambda: returned) == code


def ranks(tmp_path: Path, error: str, wait_s: float) -> list[subprocess.Popen[str]]:
    """Two ranks, each of which fails as the statement says; the second waits for the first."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom sinkbench import command\nfrom sinkbench.errors import HostError\n"
        f"command.REPORT_WAIT_S = {wait_s}\nrank = int(os.environ['RANK'])\n"
        f"def fail():\n    {error}\nsys.exit(command.run_command(fail))\n"
    )
    return [
        subprocess.Popen(
            [sys.executable, script], env=os.environ | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]


def test_rank_0_speaks_for_all(tmp_path: Path) -> None:
    first, second = ranks(
        tmp_path, "raise HostError('parallel', f'wrong on {rank}', 'change it')", wait_s=100.0
    )
    assert first.communicate(timeout=100)[1] == "parallel: wrong on 0; change it\n"
    assert first.returncode == 2
    second.terminate()  # as torchrun does when a rank has left
    assert second.communicate(timeout=100)[1] == ""
    assert second.returncode == -signal.SIGTERM


def test_an_error_of_another_rank_alone_is_told_after_a_while(tmp_path: Path) -> None:
    error = "import time\n    if rank == 1: raise HostError('disk', 'full', 'free space')"
    first, second = ranks(tmp_path, error, wait_s=0.5)
    assert second.communicate(timeout=100)[1] == "disk: full; free space\n"
    assert second.returncode == 2
    assert first.communicate(timeout=100)[1] == ""
    assert first.returncode == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys; from sinkbench.command import run_command as r; sys.exit(r(lambda: print('x' * 10**6)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=100) == 141


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "sinkbench: the following arguments are required: COMMAND; see sinkbench --help"),
        (("plugin",), "invalid choice: 'plugin'"),
        (("plugins",), "sinkbench plugins: the following arguments are required"),
        (("plugins", "list", "loss", "name", "a=b"), "unrecognized arguments: a=b"),
        (("recipe", "show", "small", "--jsn"), "unrecognized arguments: --jsn"),
        (("sweep", "small", "--jobs", "0"), "argument --jobs: 0 is not 1 or more"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], words: str, capsys: Capture) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("subcommand", cli.SUBCOMMANDS, ids=lambda s: s.name)
def test_every_subcommand_has_help(subcommand: cli.Subcommand, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([subcommand.name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: sinkbench {subcommand.name}")
