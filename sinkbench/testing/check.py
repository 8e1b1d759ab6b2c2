"""``check_plugin``: everything that a plugin must hold to, in one call.

    from sinkbench.testing import check_plugin

    print(check_plugin("my_name"))                        # of an installed package
    print(check_plugin("my_name", params={"window": 8}))
    print(check_plugin(PLUGIN, kind="attention"))         # a Plugin that no package registers yet

or, in a test of the package, through sinkbench's pytest plugin:

    def test_mine(check_plugin):
        check_plugin("my_name")

Called from a script, it belongs under ``if __name__ == "__main__":``, because it starts processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sinkbench.api import Plugin
from sinkbench.errors import PluginError, SinkbenchError
from sinkbench.testing import (
    attention_checks,
    backend_checks,
    batch_checks,
    metric_checks,
    model_checks,
    module_checks,
)
from sinkbench.testing.distributed import warm_up
from sinkbench.testing.report import Outcome, Report
from sinkbench.testing.session import Check, Failed, Session, Skipped, describe_exception
from sinkbench.testing.subject import find_subject


class CheckPlugin(Protocol):
    """Type of ``check_plugin``, for tests that take it as a fixture."""

    def __call__(
        self,
        plugin: str | Plugin,
        *,
        params: Mapping[str, Any] | None = ...,
        kind: str | None = ...,
        recipe: Sequence[str] = ...,
        skip: Mapping[str, str] | None = ...,
    ) -> Report: ...


def check_plugin(
    plugin: str | Plugin,
    *,
    params: Mapping[str, Any] | None = None,
    kind: str | None = None,
    recipe: Sequence[str] = (),
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Checks a plugin in a tiny model on this machine's CPU; it takes half a minute.

    By itself: shapes, dtypes, the gradient against float64 finite differences, causality, determinism,
    independence of the rest of the batch, the sums of measured weights, and every backend that can compute
    it here against the eager one. In the model: training, tensor, sequence, pipeline and context
    parallelism over gloo against one process (losses, gradients, measurements), bf16, a checkpoint's round
    trip, and the export to transformers. What a kind has no use for is left out.

    Args:
        plugin: the name of an installed plugin, or a plugin whose ``build`` other processes can import.
        params: its parameters, as a recipe gives them.
        kind: needed if the name is registered under several kinds, or under none.
        recipe: further overrides of the tiny recipe (sinkbench/testing/tiny.yaml), ``key.path=value``.
        skip: names of checks to leave out, and why; the report says so.

    Returns:
        The report; print it to see what was checked and what was left out.

    Raises:
        AssertionError: some checks failed; the message lists all of them: what, where, how much, and what
            that usually means.
        PluginError: there is no such plugin.
    """
    subject = find_subject(plugin, kind, params or {}, recipe)
    checks = [check for check in CHECKS if subject.kind in check.kinds]
    unknown = sorted(set(skip or {}) - {check.name for check in checks})
    if unknown:
        known = ", ".join(check.name for check in checks)
        raise PluginError(f"skip {unknown[0]!r}", "there is no such check", f"choose of {known}")
    warm_up()
    with tempfile.TemporaryDirectory(prefix="check_plugin-") as folder:
        session = Session(subject, Path(folder))
        outcomes: list[Outcome] = []
        for check in checks:
            outcomes.append(_outcome(check, session, outcomes, skip or {}))
    report = Report(subject=str(subject), outcomes=tuple(outcomes))
    if report.failed:
        raise AssertionError(report.failures())
    return report


def _outcome(check: Check, session: Session, before: Sequence[Outcome], skip: Mapping[str, str]) -> Outcome:
    passed = {outcome.name for outcome in before if outcome.status == "passed"}
    lacking = [name for name in check.needs if name not in passed]
    if check.name in skip:
        return Outcome(name=check.name, status="skipped", detail=skip[check.name], usually=check.usually)
    if lacking:
        detail = f"needs the check {lacking[0]!r}, which did not pass"
        return Outcome(name=check.name, status="skipped", detail=detail, usually=check.usually)
    try:
        detail = check.run(session)
        return Outcome(name=check.name, status="passed", detail=detail, usually=check.usually)
    except Skipped as skipped:
        return Outcome(name=check.name, status="skipped", detail=str(skipped), usually=check.usually)
    except Failed as failed:
        return Outcome(name=check.name, status="failed", detail=str(failed), usually=check.usually)
    except SinkbenchError as error:
        return Outcome(name=check.name, status="failed", detail=str(error), usually=check.usually)
    except Exception as error:  # a plugin's code may raise anything
        detail = describe_exception(error)
        return Outcome(name=check.name, status="failed", detail=detail, usually=check.usually)


def build(session: Session) -> str:
    """The recipe with the plugin is valid, and its ``build`` returns what its kind asks for."""
    built = session.build()
    if session.subject.kind == "metric" and not (hasattr(built, "observe") or hasattr(built, "measure")):
        raise Failed(f"build returned {type(built).__name__}, which has neither observe nor measure")
    return type(built).__name__


CHECKS: tuple[Check, ...] = (
    Check(
        name="build",
        kinds=model_checks.ALL,
        run=build,
        usually="parameters that the plugin does not have, or a build for the wrong kind",
        needs=(),
    ),
    *attention_checks.CHECKS,
    *backend_checks.CHECKS,
    *module_checks.CHECKS,
    *batch_checks.CHECKS,
    *metric_checks.CHECKS,
    model_checks.TRAINING,
    *model_checks.MODEL_CHECKS,
    *model_checks.LAYOUT_CHECKS,
    *model_checks.AFTERWARDS,
)
"""In the order in which they are made."""
