"""``sinkbench plugins new``: what it writes for each kind, and what it refuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinkbench import cli
from sinkbench.api import KINDS, Params, Plugin
from sinkbench.scaffold.package import MODULES, USE, new_package
from sinkbench.testing import check_plugin

EXAMPLE = Path(__file__).parents[2] / "examples" / "sinkbench-plugin-template"


@pytest.fixture(params=KINDS)
def written(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """A package of each kind, installed as far as importing and discovery go."""
    kind = request.param
    folder = new_package(f"new_{kind}", kind, tmp_path)
    info = folder / "src" / f"new_{kind}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: new-{kind}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[sinkbench]\nnew_{kind} = new_{kind}\n")
    monkeypatch.syspath_prepend(folder / "src")
    yield kind, folder
    for name in [name for name in sys.modules if name.partition(".")[0] == f"new_{kind}"]:
        del sys.modules[name]


def test_every_kind_has_its_templates() -> None:
    assert MODULES.keys() == USE.keys() == set(KINDS)


def test_it_registers_a_plugin_with_a_test(written: tuple[str, Path]) -> None:
    kind, folder = written
    module = importlib.import_module(f"new_{kind}")
    (plugin,) = getattr(module, f"sinkbench_{kind}")()
    assert isinstance(plugin, Plugin)
    assert issubclass(plugin.params, Params)
    assert plugin.name == f"new_{kind}"
    assert f'new_{kind} = "new_{kind}"' in (folder / "pyproject.toml").read_text()
    assert len((folder / "tests" / f"test_new_{kind}.py").read_text().splitlines()) == 2
    assert f"sinkbench plugins show {kind} new_{kind}" in (folder / "README.md").read_text()


@pytest.mark.full
@pytest.mark.timeout(300)
def test_it_passes_every_check(written: tuple[str, Path]) -> None:
    kind, _ = written
    report = check_plugin(f"new_{kind}")
    print(report)
    assert {outcome.name for outcome in report.skipped} <= {"backends"}


def test_it_is_light_and_clean(tmp_path: Path) -> None:
    for kind in KINDS:
        assert cli.main(["plugins", "new", f"new_{kind}", "--kind", kind, "--folder", str(tmp_path)]) == 0
    subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=110", tmp_path], check=True
    )
    options = ["--check", "--isolated", "--line-length=110"]
    subprocess.run([sys.executable, "-m", "ruff", "format", *options, tmp_path], check=True)
    code = (
        "import importlib, sys;"
        f"[importlib.import_module(f'new_{{kind}}') for kind in {KINDS}];"
        "sys.exit('torch' in sys.modules)"
    )
    paths = ":".join(str(tmp_path / f"new-{kind.replace('_', '-')}" / "src") for kind in KINDS)
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": paths}, cwd=EXAMPLE.parents[1]
    )


def test_the_example_is_what_the_command_writes(tmp_path: Path) -> None:
    new = new_package("softplus", "attention", tmp_path)
    ours, theirs = (
        {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}
        for root in (new, EXAMPLE)
    )
    assert ours == {name: text for name, text in theirs.items() if "__pycache__" not in name}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("Softplus", "attention", "cannot be the name of a module; write small letters"),
        ("soft-plus", "attention", "cannot be the name of a module; write small letters"),
        ("../x", "attention", "cannot be the name of a module; write small letters"),
        ("class", "attention", "is taken by Python or an installed package; choose another"),
        ("json", "attention", "is taken by Python or an installed package; choose another"),
        ("torch", "attention", "is taken by Python or an installed package; choose another"),
        ("softmax", "attention", "attention 'softmax': is taken by sinkbench"),
        ("mine", "atention", "--kind atention: there is no such kind; did you mean attention?"),
    ],
)
def test_refused(
    name: str, kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plugins", "new", name, "--kind", kind, "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my-norm").mkdir()
    arguments = ["plugins", "new", "my_norm", "--kind", "normalization", "--folder", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert (
        capsys.readouterr().err == f"{tmp_path}/my-norm: exists already; choose another name, or --folder\n"
    )
    assert not list((tmp_path / "my-norm").iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["plugins", "new", "my_norm", "--kind", "normalization", "--folder", str(tmp_path / "file")]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/file/my-norm: cannot be written (")
