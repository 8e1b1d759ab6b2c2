"""Reports of synthetic run folders, and the comparison table."""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from rich.console import Console

from sinkbench.errors import HostError, SinkbenchError
from sinkbench.report import command
from sinkbench.report.columns import ABSENT
from sinkbench.report.page import write_report
from sinkbench.report.runs import find_runs, read_run, read_runs
from sinkbench.report.table import comparison_table
from tests.unit.run_folder import make_run


def render(*runs: Path) -> str:
    out = runs[0].parent / "out" / "report.html"
    write_report(list(runs), out)
    return out.read_text(encoding="utf-8")


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def captions(html: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", html)


def svgs(html: str) -> list[str]:
    return [
        base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    ]


def rows(html: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a heading, as text."""
    part = html.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]


class Structure(HTMLParser):
    """Collects what a page loads, and checks that its tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [
        make_run(folder / "a", label="softmax"),
        make_run(folder / "b", label="sigmoid", attention={"name": "sigmoid", "normalize": False}, sink=0.5),
    ]
    return paths, render(*paths)


def test_page_is_well_formed_and_loads_nothing(two_runs: tuple[list[Path], str]) -> None:
    structure = Structure()
    structure.feed(two_runs[1])
    assert structure.open == []
    assert structure.sources, "there are figures"
    assert all(source.startswith("data:image/svg+xml;base64,") for source in structure.sources)
    assert not re.search(r"@import|url\(|<script", two_runs[1])
    for svg in svgs(two_runs[1]):
        ElementTree.fromstring(svg)
        assert "currentColor" in svg


def test_page_has_every_section_and_figure(two_runs: tuple[list[Path], str]) -> None:
    assert headings(two_runs[1]) == [
        "Summary",
        "Validation loss by domain",
        "Training",
        "Where the sink sits",
        "Norms by layer",
        "Recipe differences",
        "Environment",
    ]
    assert captions(two_runs[1]) == [
        "Loss",
        "Attention sink",
        "Attention to the first token",
        "softmax",
        "sigmoid",
        "Hidden states",
        "Value drain",
    ]


def test_summary_holds_the_final_numbers(two_runs: tuple[list[Path], str]) -> None:
    title, softmax, sigmoid = rows(two_runs[1], "Summary")
    by_title = dict(zip(title, softmax, strict=True))
    assert by_title["run"] == "softmax"
    assert by_title["step"] == "200"
    assert by_title["loss"] == "2.0825", "of summary.json, not of the last line"
    assert by_title["Sink_1 % raw"] == "90.0"
    assert by_title["Sink_1 % proxy"] == "92.0"
    assert by_title["to first token from triggers"] == "0.020"
    assert by_title["to first token from others"] == "0.900"
    assert by_title["MFU %"] == "21.4"
    assert dict(zip(title, sigmoid, strict=True))["attention"] == "sigmoid (normalize: false)"


def test_only_what_differs_is_listed(two_runs: tuple[list[Path], str]) -> None:
    _, *listed = rows(two_runs[1], "Recipe differences")
    assert sorted(listed) == [
        ["model.attention", "softmax", ABSENT],
        ["model.attention.name", ABSENT, "sigmoid"],
        ["model.attention.normalize", ABSENT, "false"],
    ]
    assert ["versions.torch", "2.13.0"] in rows(two_runs[1], "Environment")


def test_different_versions_are_shown_for_each_run(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, label=name, probes=False) for name in "ab"]
    (paths[1] / "manifest.json").write_text(json.dumps({"versions": {"torch": "9.9"}}))
    table = rows(render(*paths), "Environment")
    assert ["versions.torch", "2.13.0", "9.9"] in table
    assert ["backend", "sdpa", ABSENT] in table


def test_run_without_probes_is_shown_without_their_figures(tmp_path: Path) -> None:
    html = render(make_run(tmp_path / "a", probes=False))
    assert captions(html) == ["Loss"]
    assert headings(html) == ["Summary", "Validation loss by domain", "Training", "Environment"]
    assert "Sink_1 % raw" not in rows(html, "Summary")[0]


def test_run_without_triggers_has_no_trigger_columns(tmp_path: Path) -> None:
    html = render(make_run(tmp_path / "a", triggers=False))
    assert "Attention to the first token" not in captions(html)
    assert not [title for title in rows(html, "Summary")[0] if "first token" in title]


def test_scalars_of_other_metrics_have_a_column_and_a_curve(tmp_path: Path) -> None:
    own = {"key_norm_ratio": 0.5, "sink_2_raw_eps0.01": 3.0, "kurtosis": 5.0, "massive_activation_top": 7.0}
    with_it = make_run(tmp_path / "a", label="a", others={**own, "first_head_entropy": 0.6123456})
    html = render(with_it, make_run(tmp_path / "b", label="b"))
    title, first, second = rows(html, "Summary")
    known = title.index("activation ratio")
    assert title[known + 1 :] == ["tokens/s", "MFU %", "first_head_entropy"]
    assert (first[-1], second[-1]) == ("0.6123", ABSENT)
    assert captions(html)[:4] == [
        "Loss",
        "Attention sink",
        "Attention to the first token",
        "first_head_entropy",
    ]
    assert "Without a column" not in html


def test_many_scalars_of_other_metrics_are_named(tmp_path: Path) -> None:
    others = {f"<b>${number}": float(number) for number in range(40)}
    html = render(make_run(tmp_path / "a", others=others))
    title, row = rows(html, "Summary")
    assert title[-6:] == [f"&lt;b&gt;${number}" for number in range(6)]
    assert row[-6:] == list("012345")
    assert len(captions(html)) == len(captions(render(make_run(tmp_path / "b")))) + 6
    assert "Without a column, but in metrics.jsonl of the runs: &lt;b&gt;$6, " in html
    assert "$29 and 10 more." in html


def test_texts_of_files_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&$\\frac{$'
    path = make_run(tmp_path / "a", attention={"name": evil, evil: evil}, label=evil)
    (path / "manifest.json").write_text(json.dumps({evil: evil}))
    html = render(path, make_run(tmp_path / "b"))
    assert "<script" not in html
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;$" in html
    for svg in svgs(html):
        ElementTree.fromstring(svg)
        assert "<script" not in svg


def test_speeds_are_medians_also_of_a_finished_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"tokens_per_second": 1.0, "mfu": 0.1}))
    run = read_run(path)
    assert run.row()["tokens_per_second"] == run.median("train", "tokens_per_second") != 1.0


def test_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", probes=False)
    (path / "summary.json").unlink()
    whole = (path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in whole if json.loads(line)["step"] <= 120]
    (path / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 130, "ev')
    row = read_run(path).row()
    assert row["step"] == "120 of 200"
    newest = [line for text in kept if (line := json.loads(text))["event"] == "validation"][-1]
    assert (row["loss"], row["loss/web"]) == (newest["loss"], newest["loss/web"])
    assert captions(render(path)) == ["Loss"]


def test_numbers_of_an_earlier_step_are_not_those_of_the_last(tmp_path: Path) -> None:
    """As of a run that went on without validation and probes."""
    path = make_run(tmp_path / "a")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 260, "event": "train", "loss": 1.5}\n')
    (path / "recipe.yaml").write_text((path / "recipe.yaml").read_text().replace("steps: 200", "steps: 260"))
    (path / "summary.json").write_text('{"step": 260, "loss": 1.5}')
    row = read_run(path).row()
    assert (row["step"], row["loss"], row["validation_loss"]) == ("260", 1.5, None)
    assert not {"sink_1_raw", "loss/web"} & row.keys()


def test_steps_run_again_after_a_resume_count_once(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    again = {"step": 150, "event": "train", "loss": 7.0}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    steps, losses = read_run(path).series("train", "loss")
    assert steps == list(range(10, 201, 10))
    assert losses[steps.index(150)] == 7.0


def test_diverged_run_is_reported(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", layers=1, heads=1)
    text = re.sub(r'"loss": [\d.]+', '"loss": NaN', (path / "metrics.jsonl").read_text())
    (path / "metrics.jsonl").write_text(text)
    (path / "summary.json").write_text('{"loss": NaN, "sink_1_raw": NaN}')
    measured = {"importance_raw": [[[None, 0.5]]], "activation_ratio_layers": [None]}
    (path / "measure" / "step_200.json").write_text(json.dumps({"step": 200, "metrics": measured}))
    html = render(path)
    title, row = rows(html, "Summary")
    assert dict(zip(title, row, strict=True))["loss"] == "nan"
    assert "Hidden states" in captions(html)


def test_a_number_that_is_not_finite_at_the_last_step_is_not_that_of_an_earlier_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    spoilt = [re.sub(r'"(loss\S*|sink_1_raw)": [\d.]+', r'"\1": null', line) for line in lines]
    last = [json.loads(line)["step"] == 200 for line in lines]
    kept = [new if spoil else old for old, new, spoil in zip(lines, spoilt, last, strict=True)]
    (path / "metrics.jsonl").write_text("".join(kept))
    (path / "summary.json").write_text('{"loss": null, "sink_1_raw": null}')
    html = render(path)
    title = rows(html, "Summary")[0]
    assert not {"loss", "validation loss", "Sink_1 % raw"} & set(title)
    assert "Sink_1 % proxy" in title
    assert rows(html, "Validation loss by domain")[1][1:] == [ABSENT, ABSENT]


def test_many_runs_stay_apart(tmp_path: Path) -> None:
    """More runs than colours: markers tell them apart, and equal names become paths."""
    paths = [make_run(tmp_path / f"r{number}", seed=number, probes=False) for number in range(9)]
    runs = read_runs(paths)
    assert [run.label for run in runs] == [str(path) for path in paths]
    html = render(*paths)
    assert captions(html) == ["Loss"]
    colours = re.findall(r'class="swatch" style="background:(#\w{6})"', html)
    assert colours[7] == colours[0]
    root = ElementTree.fromstring(svgs(html)[0])
    svg = "{http://www.w3.org/2000/svg}"
    axes = next(group for group in root.iter(f"{svg}g") if group.get("id") == "axes_1")
    lines = [group for group in axes if (group.get("id") or "").startswith("line2d")]
    marked = [next(line.iter(f"{svg}use"), None) is not None for line in lines]
    assert marked == 2 * ([False] * 7 + [True] * 2), "training, then validation, of nine runs"


def test_sweep_folder_stands_for_its_runs(tmp_path: Path) -> None:
    second, first = make_run(tmp_path / "b"), make_run(tmp_path / "a")
    waiting = make_run(tmp_path / "c")
    (waiting / "metrics.jsonl").unlink()
    (tmp_path / "other").mkdir()
    assert find_runs([tmp_path]) == ([first, second], [waiting])
    assert find_runs([second, tmp_path]) == ([second, first], [waiting])


def test_runs_are_found_below_folders_of_sweeps(tmp_path: Path) -> None:
    single = make_run(tmp_path / "runs" / "demo")
    swept = [make_run(tmp_path / "runs" / "paper" / "heads" / label) for label in ("heads=2", "heads=4")]
    for run in (single, *swept):
        checkpoint = run / "checkpoints" / "step_4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "recipe.yaml").touch()
    assert find_runs([tmp_path / "runs"]) == ([single, *swept], [])
    assert find_runs([tmp_path / "runs" / "paper"]) == (swept, [])
    assert find_runs([single]) == ([single], [])


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "sweep" / "a")
    (make_run(tmp_path / "sweep" / "b") / "metrics.jsonl").unlink()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "page.html"
    command.run(parser.parse_args([str(tmp_path / "sweep"), "-o", str(out)]))
    assert out.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.splitlines() == [
        f"left out, not started: {tmp_path / 'sweep' / 'b'}",
        f"{out}: 1 run",
    ]


def damage(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


MEASURE = "measure/step_200.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "manifest.json").unlink(), r"manifest\.json: cannot be read \(No such file"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: cannot be read \(No such file"),
        (damage("manifest.json", '{"a": 1,\n'), r"manifest\.json: is damaged at line 2"),
        (damage("manifest.json", "[]"), r"manifest\.json: holds no JSON object"),
        (damage("summary.json", "{"), r"summary\.json: is damaged at line 1"),
        (damage("recipe.yaml", "a: [1"), r"recipe\.yaml: is damaged"),
        (damage("recipe.yaml", "- 1"), r"recipe\.yaml: is not a recipe"),
        (damage("recipe.yaml", "name: a\ntrain: {steps: 1}"), r"recipe\.yaml: is not a recipe \(model: "),
        (damage("recipe.yaml", "name: a\nmodel: {attention: [1]}\ntrain: {steps: 1}"), r"model\.attention"),
        (
            damage("metrics.jsonl", '{"step": 1, "event": "train"}\n{"st\n'),
            r"metrics\.jsonl:2: is not a JSON",
        ),
        (damage("metrics.jsonl", "[1]\n"), r"metrics\.jsonl:1: is not a JSON object with step and event"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), r"metrics\.jsonl: is not UTF-8"),
        (damage(MEASURE, "{}"), r"step_200\.json: is not a measurement"),
        (damage(MEASURE, '{"step": 1, "metrics": {"importance_raw": 1}}'), r"importance_raw has shape"),
        (damage(MEASURE, '{"step": 1, "metrics": {"importance_raw": [[[1], [1, 2]]]}}'), "unequal length"),
    ],
)
def test_damaged_runs_are_one_line_errors(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = make_run(tmp_path / "run", steps=200)
    spoil(path)
    out = tmp_path / "report.html"
    with pytest.raises(SinkbenchError, match=message) as caught:
        write_report([path], out)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not out.exists()


def test_wrong_paths_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(SinkbenchError, match="absent: is not a folder"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(SinkbenchError, match=r"has no recipe\.yaml"):
        find_runs([tmp_path])
    (make_run(tmp_path / "a") / "metrics.jsonl").unlink()
    with pytest.raises(SinkbenchError, match="no run in it has started"):
        find_runs([tmp_path])


def test_page_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", probes=False, steps=20)
    with pytest.raises(HostError, match=r"metrics\.jsonl/report\.html: cannot be written"):
        write_report([path], path / "metrics.jsonl" / "report.html")


def test_parsing_arguments_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import argparse, sys; from sinkbench.report import command;"
        "command.add_arguments(argparse.ArgumentParser());"
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=200, check=False).returncode == 0


def test_writing_a_report_leaves_matplotlib_as_it_was(two_runs: tuple[list[Path], str]) -> None:
    def settings() -> dict[str, Any]:
        # to read the backend is to choose one
        return {key: mpl.rcParams[key] for key in mpl.rcParams if key != "backend"}

    before = settings()
    write_report(two_runs[0][:1], two_runs[0][0].parent / "again.html")
    assert settings() == before


def printed(table_rows: list[dict[str, Any]], width: int = 200) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(comparison_table(table_rows))
    return capture.get()


def cells(text: str) -> list[list[str]]:
    """The lines of a printed table."""
    lines = [line for line in text.splitlines() if re.search("[│┃]", line)]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


def test_comparison_table_shows_what_there_is() -> None:
    text = printed(
        [
            {"attention": "softmax", "loss": 2.08254, "sink_1_raw": 100.0, "sink_1_proxy": 100.0, "x": "y"},
            {"attention": "[bold]sigmoid", "loss": 2.09, "sink_1_raw": 0.0, "value_drain": 0.95},
        ]
    )
    header, *body = cells(text)
    assert header == ["attention", "loss", "Sink_1 % raw", "Sink_1 % proxy", "value drain"]
    assert body == [
        ["softmax", "2.0825", "100.0", "100.0", ABSENT],
        ["[bold]sigmoid", "2.0900", "0.0", ABSENT, "0.950"],
    ]


SUMMARY = {
    "name": "demo",
    "attention": "attention=sigmoid,normalize=false",
    "label": "attention=sigmoid,normalize=false",
    "step": 200,
    "loss": 2.5,
    "train_loss": 2.25,
    "tokens": 4096,
    "tokens_per_second": 51000.0,
    "mfu": None,
    "loss/web": 2.75,
    "sink_1_raw": 100.0,
    "importance_1_raw": 0.75,
    "value_drain": 0.125,
}
KNOWN = ["run", "attention", "loss", "Sink_1 % raw", "value drain"]


def test_comparison_table_adds_the_scalars_of_other_metrics() -> None:
    assert cells(printed([SUMMARY]))[0] == KNOWN
    text = printed([SUMMARY, SUMMARY | {"first_head_entropy": 0.6123456, "[red]spread": 51234.5}])
    header, *body = cells(text)
    assert header == [*KNOWN, "first_head_entropy", "[red]spread"]
    assert [row[-2:] for row in body if row[-2]] == [[ABSENT, ABSENT], ["0.6123", "51,234"]]


@pytest.mark.parametrize(("width", "count"), [(200, 6), (100, 2), (80, 1), (40, 0)])
def test_columns_are_added_where_there_is_room(width: int, count: int) -> None:
    others = {f"number_{number}_of_another": 700.5 + number for number in range(8)}
    text = printed([SUMMARY | others], width)
    assert [f"{value:.1f}" for value in others.values() if f" {value:.1f} " in text] == [
        f"{700.5 + number:.1f}" for number in range(count)
    ]
    assert all(len(line) <= width for line in text.splitlines())
    if width > 40:
        assert " 0.125 " in text, "the known columns are whole"
    note = " ".join(text[text.index("Without") :].split())
    names = ", ".join(list(others)[count:])
    assert note == f"Without a column, but in summary.json: {names}."
