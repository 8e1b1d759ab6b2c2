"""The settings of the paper in the shipped recipes, and budgets, which change the size of a run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinkbench import cli, recipe
from sinkbench.config import OptimConfig
from tests.recipes.shipped import NAMES

BUDGETS = ("cpu_minute", "h100_5min", "paper")
PAPER = [name for name in NAMES if name.startswith("paper/")]
VARIANT = ("attention", "positional", "normalization", "ffn", "tie_embeddings", "init")
"""What a budget leaves alone, in the section on the model."""


def runs(name: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Values of each run by label."""
    expanded = recipe.expand(recipe.load(f"sinkbench:{name}", list(overrides)))
    return {
        run.values.get("label") or "": recipe.to_config(run).model_dump(mode="json", by_alias=True)
        for run in expanded
    }


def variant(values: dict[str, Any]) -> dict[str, Any]:
    model, optim, data = values["model"], values["optim"], values["data"]
    return {
        **{key: model[key] for key in VARIANT},
        "loss": values["loss"],
        "transforms": data["transforms"],
        "decay": (optim["weight_decay"], optim["weight_decay_on"], optim["schedule"]),
    }


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", PAPER)
def test_a_budget_leaves_the_variant(name: str, budget: str) -> None:
    whole, scaled = runs(name), runs(name, f"extends+=_base/budget/{budget}")
    assert len(whole) == len(scaled)
    for before, after in zip(whole.values(), scaled.values(), strict=True):
        assert variant(after) == variant(before)
        if budget == "paper":
            assert after == before
        else:
            assert after["train"]["steps"] < before["train"]["steps"]
            assert after["train"]["global_batch_size"] < before["train"]["global_batch_size"]


def test_instruction_tuning_starts_from_the_last_checkpoint_of_the_default_run() -> None:
    (default,) = runs("paper/default.yaml").values()
    last = f"{default['output_dir']}/{default['name']}/checkpoints/step_{default['train']['steps']}"
    tuned = runs("paper/instruction_tuning/responses.yaml")
    assert {label: run["checkpoint"]["start_from"] for label, run in tuned.items()} == {
        "responses": last,
        "all_tokens": last,
    }
    small = runs("paper/instruction_tuning/responses.yaml", "extends+=_base/budget/cpu_minute")
    assert {run["checkpoint"]["start_from"] for run in small.values()} == {None}


def test_the_papers_budget_takes_another_back() -> None:
    (small,) = runs("default_60m.yaml", "extends+=_base/budget/h100_5min").values()
    both = [f"extends+=_base/budget/{budget}" for budget in ("h100_5min", "paper")]
    (back,) = runs("default_60m.yaml", *both).values()
    assert (small["train"]["steps"], small["train"]["global_batch_size"]) == (1000, 64)
    assert (back["train"]["steps"], back["train"]["global_batch_size"]) == (20_000, 512)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_leaves_the_end_of_a_schedule(budget: str) -> None:
    factor = 5 if budget == "cpu_minute" else 1
    for run in runs("paper/optimization/schedule.yaml", f"extends+=_base/budget/{budget}").values():
        config = OptimConfig.model_validate(run["optim"])
        assert config.end_lr == pytest.approx(0 if config.schedule == "wsd" else config.lr / 10)
        assert config.lr == pytest.approx(factor * 4e-4)


def test_a_budget_scales_what_belongs_to_rates_and_steps(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "extends: sinkbench:default_60m.yaml\noptim: {schedule: wsd, min_lr: 1e-4, decay_steps: 4000}\n"
    )
    for budget, min_lr, decay_steps in (
        ("cpu_minute", 5e-4, 40),
        ("h100_5min", 1e-4, 200),
        ("paper", 1e-4, 4000),
    ):
        loaded = recipe.load(path, [f"extends+=_base/budget/{budget}"])
        optim = recipe.to_config(loaded).optim
        assert optim.min_lr == pytest.approx(min_lr)
        assert optim.decay_steps == decay_steps


@pytest.mark.parametrize(("budget", "tokens"), [("h100_5min", 5e9), ("cpu_minute", 3.7e6)])
def test_a_budget_leaves_the_epochs_of_unique_data(budget: str, tokens: float) -> None:
    """
    Args:
        tokens: of the whole data, which for cpu_minute are of Python's documentation and library.
    """

    def epochs(run: dict[str, Any], tokens: float) -> float:
        train, data = run["train"], run["data"]
        seen = train["steps"] * train["global_batch_size"] * run["model"]["seq_length"]
        return float(seen / (tokens * data["unique_fraction"]))

    name = "paper/data_distribution/unique_data.yaml"
    whole, scaled = runs(name), runs(name, f"extends+=_base/budget/{budget}")
    for label, run in whole.items():
        assert epochs(scaled[label], tokens) == pytest.approx(epochs(run, 5e9), rel=0.05)


SETTINGS: dict[str, dict[str, Any]] = {
    "optim": {
        "lr": 4e-4,
        "min_lr": None,
        "schedule": "constant",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "weight_decay_on": "all",
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "clip_grad": 1.0,
    },
    "train": {"steps": 20_000, "global_batch_size": 512, "precision": "bf16"},
    "measure": {"eps": 0.3, "length": 64, "count": 100},
    "model": {
        "num_layers": 10,
        "hidden_size": 768,
        "num_attention_heads": 8,
        "ffn_hidden_size": 1536,
        "ffn": "swiglu",
        "linear_bias": "none",
        "tie_embeddings": False,
        "init": "paper",
        "seq_length": 2048,
        "vocab_size": 50_432,
        "num_query_groups": None,
        "head_size": None,
        "normalization": {"name": "rmsnorm", "eps": 1e-5},
        "positional": {"name": "rope", "base": 10_000},
        "parallel_residual": False,
        "attention": {"name": "softmax"},
    },
    "loss": {"name": "causal_lm"},
}
"""Of the paper's default run (Gu et al. 2410.10781), by section."""
LARGER = {"num_layers": 22, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5632}
OF_1B = {"model": LARGER, "train": {"steps": 40_000}}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "default_60m": {},
    "paper/default": {},
    "default_1b": OF_1B,
    "sigmoid_1b": OF_1B | {"model": LARGER | {"attention": {"name": "sigmoid", "normalize": False}}},
}
"""Recipe -> what else it says."""


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_of_the_paper(name: str) -> None:
    (values,) = runs(f"{name}.yaml").values()
    for section, settings in SETTINGS.items():
        expected = settings | OTHERS[name].get(section, {})
        assert {key: values[section][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "flops_per_token"),
    [
        ("default_60m", 59.0e6, 20_000, 680.7e6),
        ("default_1b", 1.13e9, 40_000, 7.956e9),
        ("sigmoid_1b", 1.13e9, 40_000, 7.956e9),
    ],
)
def test_settings_of_the_paper(
    capsys: pytest.CaptureFixture[str], name: str, parameters: float, steps: int, flops_per_token: float
) -> None:
    assert cli.main(["recipe", "show", name, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    derived = run["derived"]
    assert derived["parameters_without_tables"] == pytest.approx(parameters, rel=1e-3)
    assert derived["tokens"] == steps * 512 * 2048
    assert derived["flops_per_token"] == pytest.approx(flops_per_token, rel=1e-3)
