"""Checks of the tiny model with the plugin in it: training, parallel layouts, checkpoints, export."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sinkbench.megatron.initialise import share
from sinkbench.testing import ranks
from sinkbench.testing.ranks import Share, Trained
from sinkbench.testing.session import CHANGE, Check, Failed, Session, Skipped, compare

ALL = frozenset({"attention", "normalization", "positional", "loss", "data_transform", "metric"})
IN_THE_MODEL = frozenset({"attention", "normalization", "positional"})
KNOWN_ENTRIES = frozenset({"trigger", "loss_mask"})
NEAR = 1e-4
"""Relative difference of losses under another layout: sums in another order give a hundredth of it."""
DRIFTS = 10
"""A layout may differ by so many times what a small change of the weights does, where that is more: rows
that are divided by sums near zero make much of little."""

LAYOUTS = {
    "tensor parallel": (2, 1, "parallel={tensor: 2}"),
    "sequence parallel": (2, 1, "parallel={tensor: 2, sequence: true}"),
    "pipeline parallel": (1, 2, "parallel={pipeline: 2}"),
    "context parallel": (1, 1, "parallel={context: 2}"),
}
"""Name -> tensor-parallel size, pipeline-parallel size, override; all on two ranks."""


def trains(session: Session) -> str:
    missing = sorted(session.declared.loss.needs - KNOWN_ENTRIES)
    if missing:
        raise Skipped(f"the loss needs {', '.join(missing)} of the data, which random tokens do not have")
    if session.subject.kind == "metric" and not hasattr(session.build(), "observe"):
        raise Skipped("a metric with forward passes of its own is not made in a run")
    losses = session.alone.losses
    if not all(math.isfinite(loss) for loss in losses):
        raise Failed(f"the losses of {len(losses)} steps are {_list(losses)}")
    if losses[0] == losses[-1]:
        raise Failed(f"the loss stays at {losses[0]:.6g} over {len(losses)} steps")
    bad = [s.name for s in session.alone.gradients if not s.gradient.isfinite().all()]
    if bad:
        raise Failed(f"the gradient of {', '.join(bad)} is not finite")
    if session.alone.idle and session.subject.kind in IN_THE_MODEL:
        raise Failed(f"the gradient of {', '.join(sorted(session.alone.idle))} is zero in every step")
    return f"losses {_list(losses)}"


def layout(name: str, session: Session) -> str:
    tensor, _, override = LAYOUTS[name]
    session.refuse_layout(override)
    trained: list[Trained] = session.on_ranks(2, ranks.rank_trains, (override,))
    alone = session.alone
    drifting = False
    for key in ("losses", "norms"):
        found, expected = getattr(trained[0], key), getattr(alone, key)
        far = _far(found, expected, [NEAR] * len(expected))
        if far:
            drifting = True
            far = _far(found, expected, [NEAR + DRIFTS * drift for drift in session.drift[key]])
        if far:
            what = "loss" if key == "losses" else "gradient norm"
            raise Failed(
                f"the {what} of step {far[0] + 1} is {found[far[0]]:.6g}, in one process "
                f"{expected[far[0]]:.6g}{_worst_gradient(trained, alone, tensor)}"
            )
    wrong = _worst_gradient(trained, alone, tensor)
    if wrong:
        raise Failed(f"losses are equal, but not every gradient{wrong}")
    if drifting:
        most = max(max(drifts) for drifts in session.drift.values())
        return f"as in one process but for rounding, which {CHANGE:.0e} of the weights makes {most:.1e}"
    _compare_probes(trained[0].probe, alone.probe)
    return f"losses {_list(trained[0].losses)} as in one process"


def _far(found: Sequence[float], expected: Sequence[float], tolerances: Sequence[float]) -> list[int]:
    """The steps that differ by more than their relative tolerance."""
    values = zip(found, expected, tolerances, strict=True)
    return [step for step, (a, b, near) in enumerate(values) if not math.isclose(a, b, rel_tol=near)]


def _worst_gradient(trained: Sequence[Trained], alone: Trained, tensor: int) -> str:
    """The parameter whose gradient on some rank differs most from that of one process, if any does."""
    expected = {s.name: s.gradient for s in alone.gradients}
    worst, text = 0.0, ""
    for rank, part in enumerate(trained):
        for one in part.gradients:
            whole = expected[one.name]
            ours = whole if one.dim is None else share(whole, one.dim, rank % tensor, tensor, one.gated)
            if one.gradient.shape != ours.shape:
                shapes = f"{list(one.gradient.shape)} instead of {list(ours.shape)}"
                return f"; the gradient of {one.name} has shape {shapes} on rank {rank}"
            error = _relative(one, ours, alone)
            if error > max(worst, 1e-3):
                worst = error
                text = f"; the gradient of {one.name} on rank {rank} differs by {100 * error:.3g} %"
    return text


def _relative(one: Share, ours: Any, alone: Trained) -> float:
    floor = 1e-6 * alone.norms[0]
    return float((one.gradient - ours).norm() / (ours.norm() + floor))


def _compare_probes(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found.keys() != expected.keys():
        raise Failed(f"the probe has {sorted(found)} instead of {sorted(expected)}")
    for key, value in expected.items():
        a, b = np.asarray(found[key], dtype=float), np.asarray(value, dtype=float)
        if a.shape != b.shape:
            raise Failed(f"measured {key} has shape {a.shape} instead of {b.shape}")
        if not np.allclose(a, b, rtol=2e-3, atol=1e-4, equal_nan=True):
            worst = float(np.nanmax(np.abs(a - b)))
            raise Failed(f"measured {key} differs from that of one process by {worst:.3g}")


def repeats(session: Session) -> str:
    seen = session.inspected
    text = compare("the model run again at once", seen.again, seen.whole, relative=0, absolute=0)
    (again,) = session.on_ranks(1, ranks.rank_trains, ())
    if again.losses != session.alone.losses:
        raise Failed(
            f"trained again, losses are {_list(again.losses)} instead of {_list(session.alone.losses)}"
        )
    return f"{text}, losses of a second training equal"


def causal(session: Session) -> str:
    seen = session.inspected
    if seen.at >= seen.whole.shape[1]:
        raise Skipped("the bidirectional prefix is as long as the sequence")
    before = slice(0, seen.at)
    return compare(
        f"hidden states before position {seen.at}, after a change of the tokens from there on,",
        seen.changed[:, before],
        seen.whole[:, before],
    )


def batch_invariant(session: Session) -> str:
    seen = session.inspected
    return compare("a sequence alone, beside others,", seen.alone, seen.whole[1:2])


def bf16(session: Session) -> str:
    (low,) = session.on_ranks(1, ranks.rank_trains, ("train.precision=bf16",))
    high = session.alone.losses
    if not all(math.isclose(a, b, rel_tol=0.03) for a, b in zip(low.losses, high, strict=True)):
        raise Failed(f"losses are {_list(low.losses)} in bf16 and {_list(high)} in fp32")
    return f"losses {_list(low.losses)}, {_list(high)} in fp32"


def checkpoint(session: Session) -> str:
    (found,) = session.on_ranks(1, ranks.rank_resumes, session.folder / "checkpoints")
    if found.different:
        raise Failed(f"after loading, {', '.join(found.different)} has other values than were saved")
    if found.straight != found.resumed:
        raise Failed(f"losses go on with {_list(found.resumed)} instead of {_list(found.straight)}")
    return f"losses go on with {_list(found.resumed)}, bit for bit"


def measurement(session: Session) -> str:
    probe = session.alone.probe
    for key in (key for key in probe if key.startswith("watched_")):
        if not np.isfinite(np.asarray(probe[key], dtype=float)).all():
            raise Failed(f"attention weights are not finite ({key.removeprefix('watched_')})")
    future = float(np.max(probe["watched_future"]))
    if future > 0 and not session.declared.loss.bidirectional_prefix:
        raise Failed(f"the model gives up to {future:.3g} of its attention to later tokens")
    rows = np.asarray(probe["watched_rows"])
    return f"rows of attention weights sum to {rows.min():.4g} .. {rows.max():.4g}"


def export(session: Session) -> str:
    if not session.subject.installed:
        raise Skipped("an export copies the source of an installed package: install yours, give its name")
    absent = [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if absent:
        raise Skipped(f"{' and '.join(absent)} not installed: pip install 'sinkbench[hf]'")
    saved = session.folder / "checkpoints" / "step_1"
    (found,) = session.on_ranks(1, ranks.rank_exports, saved, session.folder / "export")
    return compare(
        f"logits of the exported {found.class_name}",
        found.logits,
        found.expected,
        relative=1e-3,
        absolute=1e-4,
    )


def _list(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.5g}" for loss in losses)


_SPLIT = (
    "state of the whole model on one rank: declare parameters with the shape ('heads', ...), and take sizes "
    "from the tensors that a function is given, not from the context"
)

TRAINING = Check(
    name="training",
    kinds=ALL,
    run=trains,
    usually="a division by a sum that can be zero, an exponential without bound, or a parameter that is "
    "declared and not used",
)
LAYOUT_CHECKS = tuple(
    Check(name=name, kinds=ALL, run=partial(layout, name), usually=usually, needs=("build", "training"))
    for name, usually in (
        ("tensor parallel", _SPLIT),
        ("sequence parallel", f"a function that mixes positions; or {_SPLIT}"),
        (
            "pipeline parallel",
            "state that layers share outside of parameters: a stage holds some layers only",
        ),
        (
            "context parallel",
            "positions counted from the tensor's first row: use the positions that are given",
        ),
    )
)
MODEL_CHECKS = (
    Check(
        name="determinism of the model",
        kinds=ALL,
        run=repeats,
        usually="random numbers, or state that a forward pass changes",
        needs=("build", "training"),
    ),
    Check(
        name="causality of the model",
        kinds=IN_THE_MODEL,
        run=causal,
        usually="a statistic over positions, or a look at a later one",
        needs=("build", "training"),
    ),
    Check(
        name="batch invariance of the model",
        kinds=IN_THE_MODEL,
        run=batch_invariant,
        usually="a statistic over the batch",
        needs=("build", "training"),
    ),
    Check(
        name="measurement of the model",
        kinds=ALL - {"metric"},
        run=measurement,
        usually="weights of masked keys that are not zero, or scores that are not finite",
        needs=("build", "training"),
    ),
)
AFTERWARDS = (
    Check(
        name="bf16",
        kinds=ALL,
        run=bf16,
        usually="float32 and bf16 tensors in one operation: end in the input's dtype, x.to(input.dtype)",
        needs=("build", "training"),
    ),
    Check(
        name="checkpoint",
        kinds=ALL,
        run=checkpoint,
        usually="state that is neither a parameter nor a buffer",
        needs=("build", "training"),
    ),
    Check(
        name="export",
        kinds=IN_THE_MODEL,
        run=export,
        usually="build or a function uses something outside of its package, torch and its parameters",
        needs=("build", "training", "checkpoint"),
    ),
)
