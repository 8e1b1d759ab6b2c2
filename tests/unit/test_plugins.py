"""Plugin packages: discovery, clashes, broken ones, parameters, and whether a recipe's parts fit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest

from sinkbench import discovery, plugins, recipe
from sinkbench.command import run_command
from sinkbench.errors import PluginError, RecipeError
from tests.unit.conftest import Install, Write

DECAY = """\
from sinkbench.api import Params, Plugin, hookimpl

class DecayParams(Params):
    rate: float = 0.5
    steps: int = 3

@hookimpl
def sinkbench_attention():
    return [Plugin(name="decay", summary="a test", build=print, params=DecayParams)]
"""


def resolve(overrides: Sequence[str]) -> plugins.Resolved:
    loaded = recipe.load("small", overrides)
    return plugins.resolve(recipe.to_config(loaded), plugins.discover(), loaded.provenance)


def message(overrides: Sequence[str]) -> str:
    with pytest.raises(PluginError) as caught:
        resolve(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_first_party_plugins_come_through_entry_points() -> None:
    index = plugins.discover()
    assert index.broken == ()
    assert index.get("attention", "softmax").package.distribution == "sinkbench"
    for kind, name in [("normalization", "rmsnorm"), ("positional", "rope"), ("loss", "causal_lm")]:
        assert index.get(kind, name).plugin.name == name


def test_another_package_is_found_and_resolved(write: Write, install: Install) -> None:
    install("acme-decay", DECAY)
    chosen = resolve(["model.attention={name: decay, rate: 1}"]).attention
    assert (chosen.plugin.name, chosen.path) == ("decay", "model.attention")
    assert chosen.params.model_dump() == {"rate": 1.0, "steps": 3}
    assert str(chosen.package) == "acme-decay 1.0"
    assert chosen.package.id == "acme-decay:variants"


def test_each_hook_is_called_once(
    install: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install("acme-decay", DECAY)
    monkeypatch.setenv(discovery.TRACE, "1")
    plugins.discover()
    calls = [line for line in capfd.readouterr().err.splitlines() if "acme-decay:variants" in line]
    assert calls == ["sinkbench plugins: call sinkbench_attention of acme-decay:variants"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit('no GPU')", "SystemExit: no GPU"),
        (DECAY.replace("return [", "return 1, ["), "sinkbench_attention returned tuple instead of a list"),
        (DECAY.replace("return [", "return ['decay', "), "returned a list with a str instead"),
        (DECAY.replace("build=print", "build=3"), "whose build is not callable"),
        (DECAY.replace("params=DecayParams", "params=dict"), "whose params is not a subclass of Params"),
        (DECAY.replace("return [", "1 / 0\n    return ["), "raised ZeroDivisionError: division by zero"),
        (DECAY.replace("sinkbench_attention", "sinkbench_atention"), "unknown hook 'sinkbench_atention'"),
        (DECAY.replace("attention()", "attention(config)"), "definition: sinkbench_attention(config)"),
    ],
)
def test_a_broken_package_hurts_only_who_needs_it(
    write: Write, install: Install, source: str, error: str
) -> None:
    install("acme-decay", source)
    assert resolve([]).attention.plugin.name == "softmax"
    text = message(["model.attention=decay"])
    assert text.startswith("command line: model.attention: there is no attention 'decay', and the plugin ")
    assert "package acme-decay 1.0 is broken (" in text
    assert error in text


def test_a_name_provided_twice_is_an_error_only_when_used(
    write: Write, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-decay", DECAY)
    install("other-decay", DECAY, entry_point="more")
    assert resolve([]).attention.plugin.name == "softmax"
    text = message(["model.attention=decay"])
    assert "acme-decay 1.0 (acme-decay:variants)" in text
    assert "other-decay 1.0 (other-decay:more)" in text
    assert "SINKBENCH_PLUGINS=" in text
    for remedy in ("-other-decay:more", "-other_decay", "-more", "sinkbench,acme-decay"):
        monkeypatch.setenv(discovery.SELECTION, remedy)
        assert resolve(["model.attention=decay"]).attention.package.distribution == "acme-decay"


def test_a_package_cannot_take_a_first_party_name(write: Write, install: Install) -> None:
    install("acme-soft", DECAY.replace('"decay"', '"softmax"'), entry_point="softmax")
    text = message([])
    assert text.startswith("model.attention: attention 'softmax' is provided by ")
    assert "sinkbench:softmax" in text
    assert "-acme-soft:softmax" in text


def test_twice_in_one_package(write: Write, install: Install) -> None:
    one = 'Plugin(name="decay", summary="", build=print)'
    install("acme-decay", DECAY.replace("return [", f"return [{one}, "))
    assert message(["model.attention=decay"]).endswith("; rename one in acme_decay_module")


@pytest.mark.parametrize(
    ("selection", "kept"),
    [("", True), ("-acme-decay", False), ("-variants", False), ("sinkbench", False), ("acme-decay", True)],
)
def test_selection(install: Install, monkeypatch: pytest.MonkeyPatch, selection: str, kept: bool) -> None:
    install("acme-decay", DECAY)
    monkeypatch.setenv(discovery.SELECTION, selection)
    index = plugins.discover()
    assert ("decay" in index.names("attention")) is kept
    assert ("softmax" in index.names("attention")) is (selection != "acme-decay")


def test_unknown_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.SELECTION, "-similarty")
    with pytest.raises(PluginError, match=r"^SINKBENCH_PLUGINS: no plugin .*; did you mean similarity\?$"):
        plugins.discover()


def test_a_name_that_the_selection_leaves_out(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.SELECTION, "-similarity")
    assert "SINKBENCH_PLUGINS leaves out sinkbench:similarity" in message(["model.attention=sigmoid"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.attention.normalise=false",
            ["model.attention.normalise", "sigmoid", "did you mean normalize?"],
        ),
        (
            "model.attention.normalize=5",
            ["model.attention.normalize", "5 should be a valid boolean", "true or"],
        ),
        ("model.attention.bias=soft", ["model.attention.bias", "'soft'", "'none', 'fixed' or 'learned'"]),
        ("model.attention.bias_init=-3", ["bias_init has no effect", "; set bias to fixed or learned"]),
        ("model.attention.name=sigmod", ["no attention 'sigmod'", "did you mean sigmoid?"]),
        ("model.attention.name=rope", ["no attention 'rope'", "rope is a positional plugin"]),
        ("measure.metrics=[sink, norm]", ["measure.metrics[1]", "no metric 'norm'", "did you mean norms?"]),
        ("data.transforms=[{name: shift}]", ["data.transforms[0]", "no data transform 'shift'"]),
    ],
)
def test_wrong_names_and_parameters(write: Write, override: str, words: list[str]) -> None:
    text = message(["model.attention.name=sigmoid", override])
    assert text.startswith("command line: ")
    for word in words:
        assert word in text


@pytest.mark.parametrize("again", ["{name: sink, eps: [0.01]}", "{name: sink, eps: [0.3]}"])
def test_a_metric_that_is_listed_twice_is_refused(write: Write, again: str) -> None:
    write("s.yaml", f"extends: small\nmeasure:\n  metrics:\n  - {{name: sink, eps: [0.3]}}\n  - {again}\n")
    loaded = recipe.load("s")
    config = recipe.to_config(loaded)
    line = (
        "measure.metrics[1]: the metric 'sink' is listed twice, and its results would overwrite each other; "
        "list it once, with all values where it takes lists, as in {name: sink, eps: [0.3, 0.01]}"
    )
    with pytest.raises(RecipeError) as caught:
        plugins.resolve(config, plugins.discover(), loaded.provenance)
    assert str(caught.value) == f"s.yaml:5: {line}"
    with pytest.raises(RecipeError) as caught:
        plugins.resolve_metrics(config, plugins.discover())
    assert str(caught.value) == line
    both = ["measure.metrics=[{name: sink, eps: [0.3, 0.01]}, norms]"]
    assert [chosen.plugin.name for chosen in resolve(both).metrics] == ["sink", "norms"]


def test_a_wrong_parameter_names_its_file(write: Write) -> None:
    write("s.yaml", "extends: small\nmodel:\n  attention:\n    name: sigmoid\n    normalise: false\n")
    loaded = recipe.load("s")
    with pytest.raises(PluginError, match=r"^s\.yaml:5: model\.attention\.normalise: unknown key"):
        plugins.resolve(recipe.to_config(loaded), plugins.discover(), loaded.provenance)


def needy(requires: str, check: str) -> str:
    source = """\
        from sinkbench.api import Plugin, hookimpl

        def check(params, config):
            return CHECK

        @hookimpl
        def sinkbench_positional():
            return [Plugin(name="p", summary="", build=print, requires=frozenset(REQUIRES), check=check)]

        @hookimpl
        def sinkbench_loss():
            provides = frozenset({"own"})
            return [Plugin(name="l", summary="", build=print, requires=provides, provides=provides)]
        """
    return textwrap.dedent(source).replace("CHECK", check).replace("REQUIRES", requires)


def test_what_is_required_comes_from_another_part(write: Write, install: Install) -> None:
    install("acme", needy("{'own'}", "[]"))
    install(
        "acme2",
        needy("()", "[]").replace('"l"', '"l2"').replace('"p"', '"p2"').replace("requires=provides, ", ""),
    )
    assert resolve(["model.positional=p", "loss=l2"]).loss.plugin.name == "l2"
    assert "requires 'own'" in message(["loss=l"])  # what a plugin provides is for the others
    text = message(["model.positional=p"])
    assert text.startswith("command line: model.positional p: requires 'own', which l, l2 would provide; ")


def test_all_that_does_not_fit_is_in_one_line(write: Write, install: Install) -> None:
    install("acme", needy("{'cp', 'tp'}", "['head size 16 is odd', 'seq_length is even']"))
    text = message(["model.positional=p", "loss=l"])
    for number, problem in enumerate(
        ["head size 16 is odd", "seq_length is even", "requires 'cp'", "requires 'tp'", "requires 'own'"], 1
    ):
        assert f"({number}) " in text
        assert problem in text


def test_one_problem_keeps_its_remedy(write: Write, install: Install) -> None:
    install("acme", needy("()", "['seq_length 64 is above 32; lower it']"))
    text = message(["model.positional=p"])
    assert text == "command line: model.positional p: seq_length 64 is above 32; lower it"


@pytest.mark.parametrize(("check", "words"), [("1 / 0", "ZeroDivisionError"), ("'no'", "str, not a list")])
def test_a_broken_check_names_its_package(write: Write, install: Install, check: str, words: str) -> None:
    install("acme", needy("()", check))
    text = message(["model.positional=p"])
    assert words in text
    assert text.endswith("; repair the plugin package acme 1.0")


FOLDERS = """\
from pathlib import Path
from sinkbench.api import hookimpl

@hookimpl
def sinkbench_recipe_paths():
    return {"acme": Path(__file__).parent / "recipes"}
"""


def test_recipes_of_a_package(write: Write, install: Install) -> None:
    install("acme", FOLDERS)
    write("../site/acme/recipes/tiny.yaml", "extends: acme:_base/b\nname: tiny\n")
    write("../site/acme/recipes/_base/b.yaml", "seed: 5\n")
    assert recipe.load("acme:tiny").values == {"seed": 5, "name": "tiny"}
    with pytest.raises(RecipeError, match=r"^acme:tinny: there is no such recipe; did you mean tiny\.yaml"):
        recipe.load("acme:tinny")
    with pytest.raises(RecipeError, match="no package 'acne' offers recipes; did you mean acme"):
        recipe.load("acne:tiny")


def test_recipe_folders_that_clash_or_are_none(write: Write, install: Install) -> None:
    install("acme", FOLDERS)
    install("acme2", FOLDERS)
    with pytest.raises(PluginError, match=r"recipes of 'acme': offered by both .*SINKBENCH_PLUGINS=-acme"):
        recipe.load("acme:tiny")


def test_recipe_folders_of_the_wrong_type(write: Write, install: Install) -> None:
    install("acme", FOLDERS.replace('{"acme": Path(__file__).parent / "recipes"}', '"recipes"'))
    with pytest.raises(PluginError, match=r"^acme:variants: its hook sinkbench_recipe_paths returned str"):
        recipe.load("acme:tiny")


def test_plugins_and_recipes_need_no_torch() -> None:
    code = (
        "import sys; from sinkbench import plugins, recipe; plugins.discover();"
        "from sinkbench.measure import settings;"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


BROKEN_BUILD = """
from sinkbench.api import Plugin, hookimpl

def build(params, context):
    raise KeyError("scale")

@hookimpl
def sinkbench_attention():
    return [Plugin(name="broken", summary="a test", build=build)]
"""


def test_a_build_that_raises_names_plugin_and_package(
    install: Install, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.model import declare

    install("broken-build", BROKEN_BUILD)
    config = recipe.to_config(recipe.load("small", ["model.attention=broken"]))
    resolved = plugins.resolve(config, plugins.discover())

    def run() -> None:
        declare(config, resolved, 64)

    line = (
        "model.attention: plugin broken of broken-build 1.0: its build raised KeyError: 'scale'; repair it "
        "in broken_build_module; SINKBENCH_DEBUG=1 shows the traceback\n"
    )
    assert run_command(run) == 2
    assert capsys.readouterr().err == line
    monkeypatch.setenv("SINKBENCH_DEBUG", "1")
    assert run_command(run) == 2
    shown = capsys.readouterr().err
    assert shown.endswith(line)
    assert 'in build\n    raise KeyError("scale")' in shown
