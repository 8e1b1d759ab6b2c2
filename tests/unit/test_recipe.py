"""Recipes: order, blocks, provenance, sweeps, and the YAML that is written back."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbench import recipe, recipe_yaml
from sinkbench.errors import RecipeError
from tests.unit.conftest import Write


def test_scalars_follow_yaml_1_2() -> None:
    text = "[4e-4, 1e-3, 010, 0x10, 0o17, true, on, yes, 2024-01-01, ~, .inf, '1', 1_000, '']"
    values, _ = recipe_yaml.parse(text, "text")
    assert values == [
        *(0.0004, 0.001, 10, 16, 15, True, "on", "yes", "2024-01-01", None, float("inf"), "1", "1_000", "")
    ]
    assert [type(v) for v in values[:6]] == [float, float, int, int, int, bool]


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    | st.from_regex(r"\A([-+.0-9eExXobn~:_ ]{1,6}|yes|No|ON|null|1e-3|=|<<)\Z")
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abx-10", min_size=1), inner, max_size=4)
    ),
)


@settings(deadline=None)
@given(trees)
def test_dumped_values_read_back_equal(tree: object) -> None:
    text = recipe_yaml.dump(tree)
    values, _ = recipe_yaml.parse(text, "text")
    assert values == tree
    assert yaml.safe_load(text) == tree  # by other programs too


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000])
def test_nesting_has_a_limit(text: str) -> None:
    with pytest.raises(RecipeError, match="nested more than 20 deep"):
        recipe_yaml.parse(text, "text")


def test_order_of_layers(write: Write) -> None:
    write("a.yaml", "seed: 1\noptim: {lr: 1e-3, eps: 1e-6}\n")
    write("b.yaml", "seed: 2\noptim: {weight_decay: 0}\n")
    write("c.yaml", "extends: [small.yaml, a.yaml, b.yaml]\noptim:\n  lr: 2e-3\n")
    loaded = recipe.load("c.yaml", ["optim.weight_decay=0.5"])
    assert loaded.values["seed"] == 2
    assert loaded.values["optim"] == {"lr": 2e-3, "eps": 1e-6, "weight_decay": 0.5}
    places = ("seed", "optim.lr", "optim.eps", "optim.weight_decay", "train.steps")
    assert [loaded.provenance[key] for key in places] == [
        *("b.yaml:1", "c.yaml:3", "a.yaml:2", "command line", "small.yaml:5")
    ]
    assert "optim.betas" not in loaded.provenance


def test_extends_is_relative_to_its_file_and_may_meet_twice(write: Write) -> None:
    write("base/root.yaml", "seed: 7\n")
    write("base/left.yaml", "extends: root\noptim: {eps: 1e-6}\n")
    write("base/right.yaml", "extends: root.yaml\noptim: {clip_grad: 0.5}\n")
    write("top.yaml", "extends: [base/left, base/right]\n")
    values = recipe.load("top").values
    assert values == {"seed": 7, "optim": {"eps": 1e-6, "clip_grad": 0.5}}


@pytest.mark.parametrize(
    ("overrides", "attention"),
    [
        ([], {"name": "sigmoid", "normalize": False}),
        (["model.attention=softmax"], {"name": "softmax"}),
        (["model.attention.name=softmax"], {"name": "softmax"}),
        (["model.attention={name: elu}"], {"name": "elu"}),
        (["model.attention=sigmoid"], {"name": "sigmoid", "normalize": False}),
        (["model.attention.bias=fixed"], {"name": "sigmoid", "normalize": False, "bias": "fixed"}),
        # one command line is one layer: the order of its words does not matter
        (["model.attention.normalize=true", "model.attention.name=elu"], {"name": "elu", "normalize": True}),
        (["model.attention.name=elu", "model.attention.normalize=true"], {"name": "elu", "normalize": True}),
    ],
)
def test_another_name_replaces_a_block(write: Write, overrides: list[str], attention: object) -> None:
    write("s.yaml", "extends: small\nmodel:\n  attention: {name: sigmoid, normalize: false}\n")
    assert recipe.load("s", overrides).values["model"]["attention"] == attention


def test_a_replaced_block_leaves_no_provenance(write: Write) -> None:
    write("s.yaml", "model: {attention: {name: sigmoid, normalize: false}}\n")
    provenance = recipe.load("s", ["model.attention=softmax"]).provenance
    assert provenance == {
        "model": "s.yaml:1",
        "model.attention": "command line",
        "model.attention.name": "command line",
    }


def test_a_block_given_as_a_word_takes_parameters(write: Write) -> None:
    write("s.yaml", "model: {attention: sigmoid}\n")
    values = recipe.load("s", ["model.attention.normalize=false"]).values
    assert values["model"]["attention"] == {"name": "sigmoid", "normalize": False}


def test_parameters_without_a_name_go_to_the_default(write: Write) -> None:
    config = recipe.to_config(recipe.load("small", ["model.positional.base=500"]))
    assert (config.model.positional.name, config.model.positional.params) == ("rope", {"base": 500})


def test_another_data_source_replaces_the_data(write: Write) -> None:
    write("t.yaml", "extends: small\ndata: {source: indexed, train: [corpus]}\n")
    assert recipe.load("t", []).values["data"] == {"source": "indexed", "train": ["corpus"]}
    assert recipe.load("small", ["data.num_triggers=2"]).values["data"] == {
        "source": "bigram_backcopy",
        "num_triggers": 2,
    }


def test_one_of_two_alternatives_takes_the_others_place(write: Write) -> None:
    prepare = "{inputs: [texts], tokenizer: {train_vocab_size: 400}}"
    write("p.yaml", f"extends: small\ndata: {{source: indexed, prepare: {prepare}}}\n")
    loaded = recipe.load("p", ["data.train=mine"])
    assert loaded.values["data"] == {"source": "indexed", "train": "mine"}
    assert not any(key.startswith("data.prepare") for key in loaded.provenance)
    given = recipe.load("p", ["data.prepare.tokenizer.path=mine.json"]).values["data"]["prepare"]
    assert given == {"inputs": ["texts"], "tokenizer": {"path": "mine.json"}}

    write("t.yaml", "extends: p\ndata: {train: [mine]}\nsweep: [{data.prepare: {inputs: [a]}}, {seed: 1}]\n")
    prepared, trained = (run.values["data"] for run in recipe.expand(recipe.load("t")))
    assert prepared == {"source": "indexed", "prepare": {"inputs": ["a"]}}
    assert trained == {"source": "indexed", "train": ["mine"]}
    with pytest.raises(RecipeError, match="give exactly one of train and prepare"):
        recipe.to_config(recipe.load("p", ["data.train=mine", "data.prepare.text_field=a"]))


def test_dumped_config_loads_back_equal(write: Write) -> None:
    overrides = ["model.attention={name: sigmoid, normalize: false}", "optim.betas=[0.9, 0.99]", "seed=3"]
    config = recipe.to_config(recipe.load("small", overrides))
    write("again.yaml", recipe.dump(config))
    assert recipe.to_config(recipe.load("again.yaml")) == config


@pytest.mark.parametrize("value", ["true", "'5'", "5.5", "null", "[5]", ""])
def test_values_are_not_coerced(write: Write, value: str) -> None:
    with pytest.raises(RecipeError, match=r"^command line: train.steps: .*; write a whole number$"):
        recipe.to_config(recipe.load("small", [f"train.steps={value}"]))


def test_all_wrong_keys_are_named(write: Write) -> None:
    write("w.yaml", "extends: small\ntrain: {step: 5}\noptim: {lr: -1}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.to_config(recipe.load("w"))
    message = "w.yaml:2: train.step: unknown key (and 1 more: optim.lr); did you mean steps?"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([], "w.yaml:2: model: "),
        (["model.num_attention_heads=5"], "command line: model: "),
        (["model.hidden_size=65"], "command line: model: "),
    ],
)
def test_a_conflict_names_the_value_that_was_set_last(write: Write, overrides: list[str], where: str) -> None:
    write("w.yaml", "extends: small\nmodel: {num_attention_heads: 7}\n")
    with pytest.raises(RecipeError, match="hidden_size") as caught:
        recipe.to_config(recipe.load("w", overrides))
    assert str(caught.value).startswith(where)


def labels(runs: list[recipe.Recipe]) -> list[str]:
    return [recipe.to_config(run).label or "" for run in runs]


def test_a_grid_is_a_product_in_order(write: Write) -> None:
    write("g.yaml", "extends: small\nsweep: {optim.lr: [1e-4, 0.001], train.steps: [100, 300]}\n")
    runs = recipe.expand(recipe.load("g"))
    assert labels(runs) == [
        *("lr=0.0001,steps=100", "lr=0.0001,steps=300", "lr=0.001,steps=100", "lr=0.001,steps=300")
    ]
    assert [run.values["optim"]["lr"] for run in runs] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert runs[0].provenance["optim.lr"] == "g.yaml:2"
    assert all(run.sweep is None for run in runs)


def test_override_sets_pair_values_and_may_be_labelled(write: Write) -> None:
    write(
        "s.yaml",
        """\
        extends: small
        model: {attention: {name: sigmoid, normalize: true}}
        sweep:
          - {label: plain, model.attention: softmax}
          - {model.attention.normalize: false, optim.lr: 0.1}
          - {model.attention: {name: elu, normalize: false}}
        """,
    )
    runs = recipe.expand(recipe.load("s"))
    assert labels(runs) == ["plain", "normalize=false,lr=0.1", "attention=elu,normalize=false"]
    assert [run.values["model"]["attention"] for run in runs] == [
        {"name": "softmax"},
        {"name": "sigmoid", "normalize": False},
        {"name": "elu", "normalize": False},
    ]
    assert runs[0].provenance["label"] == "s.yaml:4"
    assert runs[1].provenance["label"] == recipe.GENERATED


def test_ambiguous_last_words_make_long_labels(write: Write) -> None:
    write("s.yaml", "extends: small\nsweep: {validation.every: [5], measure.every: [7]}\n")
    assert labels(recipe.expand(recipe.load("s"))) == ["validation.every=5,measure.every=7"]


def test_a_sweep_is_replaced_never_merged(write: Write) -> None:
    write("g.yaml", "extends: small\nsweep: {optim.lr: [1e-4]}\n")
    write("h.yaml", "extends: g\nsweep: {train.steps: [100]}\n")
    assert recipe.load("h").sweep == {"train.steps": [100]}
    assert recipe.load("h", ["sweep=null"]).sweep is None
    assert labels(recipe.expand(recipe.load("h", ["sweep=[{seed: 1}, {seed: 2}]"]))) == ["seed=1", "seed=2"]


def test_a_recipe_without_a_sweep_is_one_run(write: Write) -> None:
    loaded = recipe.load("small")
    assert recipe.expand(loaded) == [loaded]
    assert recipe.require_single(loaded) is loaded


def test_one_more_recipe_on_the_command_line(write: Write) -> None:
    write("budget.yaml", "optim: {lr: 1e-2}\ntrain: {global_batch_size: 2}\n")
    write("both.yaml", "extends: [small, budget]\n")
    loaded = recipe.load("small", ["extends+=budget", "optim.lr=3e-3"])
    assert loaded.values["optim"]["lr"] == 3e-3
    assert loaded.values["train"] == recipe.load("both").values["train"]
    assert loaded.provenance["train.global_batch_size"] == "budget.yaml:2"


def test_scale_changes_a_recipe_and_its_sweep_in_proportion(write: Write) -> None:
    write("s.yaml", "extends: small\nsweep:\n- {optim.lr: 1e-3, train.steps: 400}\n- {label: base}\n")
    factors = "{train.steps: 0.01, train.global_batch_size: 0.5, optim.lr: 10}"
    write("budget.yaml", f"optim: {{warmup_steps: 1}}\nscale: {factors}\n")
    loaded = recipe.load("s", ["extends+=budget"])
    runs = {run.values["label"]: run for run in recipe.expand(loaded)}
    configs = {label: recipe.to_config(run) for label, run in runs.items()}
    assert {label: (c.train.steps, c.optim.lr) for label, c in configs.items()} == {
        "lr=0.001,steps=400": (4, 1e-2),
        "base": (2, 4e-3),
    }
    assert [c.train.global_batch_size for c in configs.values()] == [4, 4]
    assert runs["base"].provenance["train.steps"] == "small.yaml:5, 200 x 0.01"
    # What the resolved recipe says is not scaled again; the command line is not scaled at all.
    write("again.yaml", recipe.dump(configs["base"]))
    assert recipe.to_config(recipe.load("again")) == configs["base"]
    assert recipe.load("small", ["extends+=budget", "train.steps=7"]).values["train"]["steps"] == 7
    # A smaller share of a whole number is at least 1, and nothing is none; a later layer replaces a factor.
    assert recipe.load("small", ["extends+=budget", "scale.train.steps=1e-6"]).values["train"]["steps"] == 1
    write("zero.yaml", "extends: [small, budget]\noptim: {min_lr: 0}\nscale: {optim.min_lr: 10}\n")
    assert recipe.load("zero").values["optim"]["min_lr"] == 0


@pytest.mark.parametrize("where", ["measure.metrics[0]: metric w8a8", "data[1]b", "runs[a]", "a[b", "[]"])
def test_what_is_no_key_has_no_origin(where: str) -> None:
    assert recipe.origin({"data.train": "command line"}, where) is None
