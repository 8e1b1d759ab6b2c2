"""What an author reads when a check of ``check_plugin`` fails: for each check a plugin with that fault."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sinkbench.api import Plugin
from sinkbench.attention import reference
from sinkbench.attention.backends import Backend
from sinkbench.errors import PluginError
from sinkbench.testing import Report, backend_checks, check_plugin
from sinkbench.testing.check import CHECKS
from tests.unit import broken_plugins as broken
from tests.unit.conftest import Install

Fault = tuple[str, Callable[..., object], str]
"""A check, a plugin that it is made for, and words of the message."""

FAULTS: dict[str, list[Fault]] = {
    "attention": [
        ("build", broken.wrong_kind, "build returned LossSpec; it must return AttentionSpec"),
        ("shapes", broken.sees_neighbours, "one score, alone instead of among others, differs"),
        ("dtypes", broken.in_float32, "the similarity of torch.float64 is torch.float32"),
        ("gradient", broken.wrong_gradient, r"d \(the output\) / d query at \[.*\] is .*, finite"),
        ("causality", broken.not_causal, r"query \d gives 0\.\d+ of its weight to key \d"),
        ("determinism", broken.random, r"the output computed again differs in \d+ of"),
        ("batch invariance", broken.looks_at_the_batch, r"of a sequence alone, .* differs in"),
        ("documents", broken.blind_to_documents, "the output of a document alone, behind another"),
        ("measurement", broken.negative_sums, "weights go down to -|although rows are normalised"),
        ("training", broken.not_finite, "the losses of 3 steps are nan"),
        ("tensor parallel", broken.all_heads, r"The size of tensor a \(2\) must match .*\(4\)"),
        ("tensor parallel", broken.counts_heads, r"the loss of step \d is [\d.]+, in one process"),
    ],
    "normalization": [
        ("shapes", broken.over_positions, "the norm of one position, alone instead of"),
        ("dtypes", broken.upcast, "the norm of torch.float64 is torch.float32"),
        ("gradient", broken.upcast, r"d \(the norm\) / d input at"),
        ("pipeline parallel", broken.numbered, r"the loss of step 1 is .*in one process"),
        ("bf16", broken.upcast, "RuntimeError: "),
        ("checkpoint", broken.remembering, r"losses go on with .* instead of"),
    ],
    "positional": [
        ("shapes", broken.ignores_heads, "the score bias of the later half of the heads differs"),
    ],
    "loss": [
        ("shapes", broken.one_too_long, r"tokens is torch.int64 \[4, 17\] instead of"),
        ("causality", broken.shows_targets, "tokens before position 8, after a change of"),
    ],
    "data_transform": [
        ("determinism", broken.changes_its_input, "tokens of the batch that was given differs"),
        ("batch invariance", broken.mixes_sequences, "tokens of a sequence alone, beside"),
    ],
    "metric": [
        ("shapes", broken.reduces_sequences, r"observation first of 4 sequences is \[\]: its first"),
        ("batch invariance", broken.gives_a_tensor, "observation first of a sequence alone"),
        ("result", broken.gives_a_tensor, "result first holds a Tensor"),
    ],
}
SLOW: dict[str, list[Fault]] = {
    "attention": [
        ("measurement of the model", broken.not_causal, r"the model gives up to 0\.\d+ of"),
    ],
    "normalization": [
        ("sequence parallel", broken.over_positions, r"the loss of step 1 is .*; the gradient of"),
        ("determinism of the model", broken.noisy_norm, "the model run again at once differs"),
        ("causality of the model", broken.over_positions, "hidden states before position 8"),
        ("batch invariance of the model", broken.over_batch, "a sequence alone, beside"),
    ],
    "positional": [
        ("context parallel", broken.counting, r"the loss of step 1 is"),
    ],
}


def only(kind: str, name: str) -> dict[str, str]:
    """Leaves out all checks but one and what that needs."""
    checks = {check.name: check for check in CHECKS if kind in check.kinds}
    return {other: "not of this test" for other in checks if other not in (name, *checks[name].needs)}


def check(kind: str, name: str, plugin: Plugin) -> Report:
    return check_plugin(plugin, kind=kind, skip=only(kind, name))


@pytest.mark.parametrize(
    ("kind", "name", "build", "words"),
    [
        pytest.param(kind, *fault, id=f"{fault[0]}-{fault[1].__name__}", marks=marks)
        for table, marks in ((FAULTS, ()), (SLOW, pytest.mark.full))
        for kind, faults in table.items()
        for fault in faults
    ],
)
def test_a_fault_is_found_and_explained(kind: str, name: str, build: Any, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check(kind, name, broken.plugin(build))
    first, what, usually = str(caught.value).splitlines()
    assert re.fullmatch(rf"{kind.replace('_', ' ')} {build.__name__}\(\): 1 of \d+ checks failed", first)
    assert what.startswith(f"  {name}: ")
    assert re.search(words, what), what
    assert usually.startswith("    usually: ")


@pytest.mark.parametrize("name", ["tensor parallel", "context parallel"])
def test_rounding_is_no_fault(name: str) -> None:
    check("attention", name, broken.plugin(broken.divides_by_little))


def test_every_check_has_a_faulty_plugin() -> None:
    tested = {name for table in (FAULTS, SLOW) for faults in table.values() for name, _, _ in faults}
    assert {check.name for check in CHECKS} - tested == {"backends", "export", "triton functions"}


def test_a_backend_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(problem: reference.Problem) -> Any:
        return 2 * reference.attend(problem)

    wrong = Backend(name="wrong", missing=lambda spec, use: [], run=twice)
    monkeypatch.setattr(backend_checks, "BACKENDS", (wrong,))
    with pytest.raises(AssertionError, match="backends: the output of wrong against eager differs in"):
        check("attention", "backends", broken.plugin(broken.any_attention))


OWN = """\
import psutil

from sinkbench.api import AttentionSpec, Plugin, Softmax, hookimpl

def build(params, context):
    assert psutil.pid_exists(1)
    return AttentionSpec(rule=Softmax(sink_logit=1.0))

@hookimpl
def sinkbench_attention():
    return [Plugin(name="own", summary="needs a package that who loads the model may lack", build=build)]
"""


@pytest.mark.full
def test_an_export_that_needs_another_package(install: Install) -> None:
    pytest.importorskip("transformers")
    install("own-attention", OWN)
    with pytest.raises(AssertionError, match=r"export: .*psutil, which an exported model cannot rely on"):
        check_plugin("own", skip=only("attention", "export"))


def test_all_that_fails_is_in_one_message() -> None:
    names = {"dtypes", "gradient", "causality", "build"}
    others = {c.name: "quick" for c in CHECKS if "attention" in c.kinds and c.name not in names}
    with pytest.raises(AssertionError) as caught:
        check_plugin(broken.plugin(broken.in_float32), kind="attention", skip=others)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0].strip() for line in lines[1::2]] == ["dtypes", "gradient"]


def test_what_is_left_out_says_why() -> None:
    report = check("attention", "dtypes", broken.plugin(broken.any_attention))
    assert report["dtypes"].status == "passed"
    assert {outcome.status for outcome in report.skipped} == {"skipped"}
    assert report["gradient"].detail == "not of this test"
    assert "  skipped gradient: not of this test" in str(report)


def test_a_metric_with_forward_passes_needs_no_run() -> None:
    report = check_plugin("sink_cut", kind="metric")
    assert report["result"].status == "passed"
    assert report["training"].detail == "a metric with forward passes of its own is not made in a run"
    assert not report.failed


def test_a_check_needs_those_before_it() -> None:
    skip = only("attention", "shapes") | {"build": "no"}
    report = check_plugin("sigmoid", skip=skip)
    assert report["shapes"].detail == "needs the check 'build', which did not pass"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plugin": "sigmod"}, "no attention 'sigmod'; did you mean sigmoid?"),
        ({"plugin": "sigmoid", "kind": "attentions"}, "kind 'attentions': there is no such kind"),
        ({"plugin": "sigmoid", "skip": {"causalty": ""}}, "skip 'causalty': there is no such check"),
        (
            {"plugin": broken.plugin(broken.random)},
            "is not registered, so that its kind is not known",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_plugin(**arguments)
    assert words in str(caught.value)


def test_a_plugin_that_ranks_cannot_import() -> None:
    local = Plugin(name="local", summary="", build=lambda params, context: None)
    with pytest.raises(PluginError, match=r"'local': cannot be handed to other processes \(.*; define"):
        check_plugin(local, kind="attention")


def test_a_wrong_parameter_is_a_failed_build() -> None:
    with pytest.raises(AssertionError, match=r"build: .*normalise: unknown key.*did you mean normalize"):
        check_plugin("sigmoid", params={"normalise": True}, skip=only("attention", "build"))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("plugin", "kind", "params"),
    [
        ("softmax", None, {"window": 5, "sink_logit": "learned"}),
        ("sigmoid", None, {"bias": "learned", "bias_init": -1.0}),
        ("kernel_mlp", None, {"kv_bias": "kv", "combine": "sum"}),
        ("layernorm", None, {"location": "post"}),
        ("t5", None, {}),
        ("learned", None, {}),
        ("prefix_lm", None, {"prefix": 3}),
        ("random_tokens", None, {"start": 1, "end": 3}),
        ("sink", None, {}),
    ],
)
def test_first_party_plugins_pass(plugin: str, kind: str | None, params: dict[str, Any]) -> None:
    report = check_plugin(plugin, kind=kind, params=params)
    print(report)
    assert {outcome.name for outcome in report.skipped} <= {"backends", "triton functions"}


def test_the_pytest_plugin_is_light() -> None:
    code = "import sys, sinkbench.pytest_plugin; sys.exit(bool({'torch', 'pydantic'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
