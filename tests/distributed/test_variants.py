"""Variants under parallel layouts: the losses, gradient norms and sinks of one process; all combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from sinkbench import plugins
from sinkbench.config import Config
from sinkbench.errors import PluginError, RecipeError
from sinkbench.testing import RunDistributed
from tests.distributed.runs import prepare

STEPS = 4
BATCH = 8
TINY = (
    "demo.yaml",
    "model={num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, seq_length: 32}",
    "model={ffn: swiglu, ffn_hidden_size: 48, positional: rope}",
    f"train={{steps: {STEPS}, global_batch_size: {BATCH}, micro_batch_size: 2}}",
    "optim.warmup_steps=1",
    "measure={count: 6, length: 16, eps: 0.1, metrics: [sink, norms]}",
)
VARIANTS: dict[str, str] = {
    "scaled softmax": "model.attention={name: softmax, alpha: 0.5, window: 7}",
    "sink logit": "model.attention={name: softmax, sink_logit: learned}",
    "sink token": "model.attention={name: softmax, sink_token: true}",
    "kv bias": "model.attention={name: softmax, kv_bias: kv}",
    "shared kv bias": "model.attention={name: softmax, kv_bias: kv, kv_bias_shared: true}",
    "key bias": "model.attention={name: sigmoid, normalize: false, kv_bias: k, value_norm: 2}",
    "value bias": "model.attention={name: softmax, kv_bias: v}",
    "shared value bias": "model.attention={name: elu, kv_bias: v, kv_bias_shared: true}",
    "summed heads": "model.attention={name: softmax, combine: sum}",
    "elu": "model.attention={name: elu, normalize: false}",
    "kernel identity": "model.attention={name: kernel_identity}",
    "kernel elu": "model.attention={name: kernel_elu}",
    "kernel mlp": "model.attention={name: kernel_mlp, kv_bias: kv}",
    "no position": "model.positional=none",
    "absolute": "model.positional=absolute",
    "learned": "model.positional=learned",
    "alibi": "model.positional=alibi",
    "t5": "model.positional={name: t5, init_std: 0.5}",
    "relative": "model.positional=relative_reference",
    "post norm": "model.normalization={name: layernorm, location: post}",
    "sandwich norm": "model.normalization.location=sandwich",
    "prefix": "loss={name: prefix_lm, prefix: 5}",
    "random tokens": "data.transforms=[{name: random_tokens, start: 1, end: 3}]",
    "fixed token": "data.transforms=[{name: fixed_token, position: 2, token: 9}]",
    "geglu": "model.ffn=geglu",
    "reglu": "model.ffn=reglu",
    "swish": "model.ffn=swish",
    "gelu": "model.ffn=gelu",
    "relu": "model.ffn=relu",
}
LAYOUTS = {"tensor": "{tensor: 2}", "pipeline": "{pipeline: 2}", "context": "{context: 2}"}
ALSO = {"sequence": "{tensor: 2, sequence: true}"}
"""Not of the quick tests: each variant under sequence parallelism too."""

CANNOT = {("sink token", "context"), ("sink token", "sequence")}
"""A sequence that is one longer does not divide."""


def rank_trains(rank: int, world_size: int, names: Sequence[str], layout: str) -> dict[str, Any]:
    """Losses, gradient norms and the final probe of each variant."""
    from sinkbench.api import Batch
    from sinkbench.data.source import open_source
    from sinkbench.measure.probe import Probe
    from sinkbench.megatron import parallel
    from sinkbench.megatron.training import Engine
    from sinkbench.model import build_stages, declare

    found = {}
    for name in names:
        config, resolved = prepare((*TINY, VARIANTS[name], f"parallel={layout}"))
        source = open_source(config)
        declared = declare(config, resolved, source.vocab_size)
        place = parallel.start(config)
        engine = Engine(config, build_stages(config, declared, place), place)

        def ready(batch: Batch, declared: Any = declared) -> Batch:
            for change in declared.transforms:
                batch = change.transform(batch)
            transformed: Batch = declared.loss.transform(batch)
            return transformed

        losses, norms = [], []
        for step in range(STEPS):
            tokens = torch.from_numpy(source.sequences(step * BATCH, BATCH)["tokens"])
            result = engine.train_step([ready({"tokens": part}) for part in tokens.split(2)])
            losses.append(result.loss)
            norms.append(result.grad_norm)
        metrics: dict[str, Any] = {
            c.plugin.name: c.plugin.build(c.params, declared.context) for c in resolved.metrics
        }
        sequences = source.probe(config.measure.count, config.measure.length)
        probe = Probe(metrics, sequences, engine, declared.transforms).run()
        floats = {key: value for key, value in probe.items() if isinstance(value, float)}
        found[name] = {"losses": losses, "norms": norms, "probe": floats}
    return found


Trained = Callable[[str, str, bool], dict[str, Any]]


@pytest.fixture(scope="module")
def trained(run_distributed: RunDistributed) -> Trained:
    """``trained(variant, layout, quick)``: all quick cases of a layout are run together, and so are the
    others."""
    kept: dict[tuple[str, bool], dict[str, Any]] = {}

    def trained(name: str, layout: str, quick: bool) -> dict[str, Any]:
        if (layout, quick) not in kept:
            if layout == "one":
                names, processes, sizes = list(VARIANTS), 1, "{}"
            else:
                names = [n for n, where, is_quick in CASES if where == layout and is_quick == quick]
                processes, sizes = 2, (LAYOUTS | ALSO)[layout]
            kept[layout, quick] = run_distributed(processes, rank_trains, names, sizes, timeout=280)[0]
        found: dict[str, Any] = kept[layout, quick][name]
        return found

    return trained


def cases() -> Iterator[tuple[str, str, bool]]:
    """(variant, layout, quick): of each variant one layout is quick, in turn."""
    for number, name in enumerate(VARIANTS):
        possible = [layout for layout in LAYOUTS | ALSO if (name, layout) not in CANNOT]
        quick = [layout for layout in possible if layout in LAYOUTS]
        for layout in possible:
            yield name, layout, layout == quick[number % len(quick)]


CASES = list(cases())


@pytest.mark.parametrize(
    ("name", "layout", "quick"),
    [pytest.param(*case, marks=() if case[2] else pytest.mark.full, id="-".join(case[:2])) for case in CASES],
)
def test_layouts_train_the_same_model(trained: Trained, name: str, layout: str, quick: bool) -> None:
    expected, found = trained(name, "one", True), trained(name, layout, quick)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-3)
    assert found["probe"] == pytest.approx(expected["probe"], rel=2e-3, abs=1e-5)
    assert expected["losses"][0] != expected["losses"][-1]


def refusal(*overrides: str) -> str:
    """What is said of parts that do not go together."""
    from sinkbench.model import declare

    config, resolved = prepare((*TINY, *overrides))
    with pytest.raises(RecipeError) as caught:
        declare(config, resolved, 65)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["{context: 2}", "{tensor: 2, sequence: true}"])
def test_a_sink_token_says_what_cannot_split_it(layout: str) -> None:
    assert refusal(VARIANTS["sink token"], f"parallel={layout}") == (
        "model.attention: a sink token makes the sequence one longer, which sequence and context parallelism "
        "cannot split; set parallel.sequence: false and parallel.context: 1"
    )


def test_summed_heads_have_no_bias_of_their_projection() -> None:
    assert refusal(VARIANTS["summed heads"], "model.linear_bias=all") == (
        "model.linear_bias: all: the projection of summed heads (combine: sum) has no bias; set it to qkv or "
        "none, or heads to combine: concat"
    )


@pytest.mark.parametrize("position", ["alibi", "t5"])
def test_a_bias_may_not_make_positive_sums_zero(position: str) -> None:
    assert refusal(VARIANTS["kernel elu"], f"model.positional={position}") == (
        "model.positional: a position bias may make scores negative, and rows of this attention are divided "
        "by their sum, which may then be zero; choose a positional plugin without one, such as rope, or an "
        "attention whose rows are not divided (normalize: false)"
    )


@pytest.mark.parametrize(
    ("attention", "position"),
    [
        ("{name: kernel_elu, normalize: false}", "alibi"),
        ("kernel_identity", "t5"),
        ("kernel_mlp", "alibi"),
        ("sigmoid", "t5"),
        ("elu", "alibi"),
        # Its bias is never negative.
        ("kernel_elu", "relative_reference"),
    ],
)
def test_a_bias_where_sums_stay_away_from_zero(attention: str, position: str) -> None:
    from sinkbench.model import declare

    config, resolved = prepare((*TINY, f"model.attention={attention}", f"model.positional={position}"))
    assert declare(config, resolved, 65).positional.score_bias is not None


@pytest.mark.parametrize(
    ("attention", "warns"),
    [("{window: 31}", False), ("{window: 32}", True), ("{window: 32, sink_token: true}", False)],
)
def test_a_window_that_leaves_nothing_out(
    caplog: pytest.LogCaptureFixture, attention: str, warns: bool
) -> None:
    from sinkbench import trainer
    from sinkbench.model import declare

    trainer._warn_of_window(declare(*prepare((*TINY, f"model.attention={attention}")), 65))
    warning = "a window of 32 leaves out nothing of 32 tokens: this is full attention"
    assert [record.getMessage() for record in caplog.records] == [warning] * warns


# --- combinations -----------------------------------------------------------------------------------

PARAMETERS = {"prefix_lm": {"prefix": 3}}
"""Of plugins that need some."""
EXTRAS: dict[str, Any] = {"kv_bias": "kv", "combine": "sum", "sink_token": True, "window": 5}
"""Every first-party attention is built without options and with most of them."""
CANNOT_BE_BIASED = ("kernel_elu", ("alibi", "t5"))
"""Its rows are divided by sums that such a bias may bring to zero."""
PACKAGES = ("sinkbench", "sinkbench-newer-methods")


def combinations() -> Iterator[dict[str, Any]]:
    index = plugins.discover()

    def package(kind: str, name: str) -> str:
        return index.get(kind, name).package.distribution

    kinds = ("attention", "positional", "normalization", "loss")
    shipped = [[n for n in index.names(kind) if package(kind, n) in PACKAGES] for kind in kinds]
    locations = itertools.cycle(("pre", "post", "sandwich"))
    for number, (attention, position, norm, loss) in enumerate(itertools.product(*shipped)):
        if attention == CANNOT_BE_BIASED[0] and position in CANNOT_BE_BIASED[1]:
            continue
        extras = EXTRAS if number % 2 and package("attention", attention) == "sinkbench" else {}
        yield {
            "attention": {"name": attention, **extras},
            "positional": position,
            "normalization": {"name": norm, "location": next(locations)},
            "loss": {"name": loss, **PARAMETERS.get(loss, {})},
        }


def rank_builds_all(rank: int, world_size: int) -> list[tuple[dict[str, Any], float]]:
    """A loss of every combination, without training."""
    from sinkbench.megatron import parallel
    from sinkbench.model import build_stages, declare

    config, _ = prepare((*TINY, "model.num_layers=1"))
    index = plugins.discover()
    tokens = torch.randint(1, 65, (1, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(33)[None] > 9
    found = []
    with parallel.running(config) as layout, torch.no_grad():
        for parts in combinations():
            values = config.model_dump(mode="json", by_alias=True)
            loss = parts.pop("loss")
            values["model"] |= parts
            values |= {"loss": loss, "data": {"source": "indexed", "train": "unread"}}
            one = Config.model_validate(values)
            declared = declare(one, plugins.resolve(one, index), 65)
            (network,) = build_stages(one, declared, layout)
            losses = network(declared.loss.transform({"tokens": tokens, "loss_mask": mask}))
            found.append((parts | {"loss": loss}, float(losses.sum())))
    return found


def test_every_combination_builds(run_distributed: RunDistributed) -> None:
    (found,) = run_distributed(1, rank_builds_all, timeout=280)
    assert len(found) == ((7 + 5) * 7 - 2) * 2 * 3
    assert all(math.isfinite(loss) and loss > 0 for _, loss in found)


def test_a_response_needs_dialogues() -> None:
    with pytest.raises(PluginError) as caught:
        prepare((*TINY, "loss=response_lm"))
    assert str(caught.value).endswith(
        "loss response_lm: data.source bigram_backcopy has no responses; "
        "use indexed data prepared from dialogues"
    )
