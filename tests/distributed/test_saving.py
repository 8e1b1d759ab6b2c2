"""Saves in the background, faults in the middle of them, and checkpoints that are damaged or malicious."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reliability import whole_tensors
from sinkbench import recipe
from sinkbench.checkpoint import INFO, CheckpointStore, open_checkpoint, verify_files, write_info
from sinkbench.checksums import FileSum, hash_file
from sinkbench.config import CheckpointConfig
from sinkbench.errors import CheckpointError
from sinkbench.failpoints import NAMES, VARIABLE
from sinkbench.testing import RankFailure, RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, Run, prepare, train
from tests.distributed.test_resume import without_speed

RECIPE = (
    *SWIGLU,
    "train.steps=12",
    "checkpoint={every: 4, keep_last: 2}",
    "validation.every=0",
    "measure.every=0",
)
SYNCHRONOUS = "checkpoint.async=false"


@contextmanager
def failpoint(value: str) -> Iterator[None]:
    """Of the ranks that are started within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, value)
        yield


@pytest.fixture(scope="module")
def whole(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two data-parallel ranks that save synchronously and meet no fault."""
    folder = tmp_path_factory.mktemp("whole")
    return train(run_distributed, folder, (*RECIPE, SYNCHRONOUS, "checkpoint.keep_last=9"), "data")


def checkpoints(run: Run) -> set[str]:
    return {path.name for path in (run.folder / "checkpoints").iterdir()}


def differing(folder: Path, expected: Path) -> set[str]:
    """Which files of two checkpoints differ, but for the recipe, which says how it is saved, and the
    checksums, of which one is the recipe's."""
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in expected.iterdir()}
    names -= {INFO, "recipe.yaml"}
    return {name for name in names if (folder / name).read_bytes() != (expected / name).read_bytes()}


def assert_same_run(run: Run, whole: Run) -> None:
    assert without_speed(run) == without_speed(whole)
    # In a pickle, equal values that are one object differ from equal values that are two.
    common = [torch.load(path / "common.pt") for path in (run.checkpoint(12), whole.checkpoint(12))]
    assert common[0] == common[1]
    assert differing(run.checkpoint(12), whole.checkpoint(12)) <= {"common.pt"}
    verify_files(open_checkpoint(run.checkpoint(12)))


def test_in_the_background_the_same_files_are_written(
    run_distributed: RunDistributed, whole: Run, tmp_path: Path
) -> None:
    """While training goes on: each rank waits in the middle of its shards, one longer than the other."""
    with failpoint("save.shard@1:3+:sleep=0.01"):
        run = train(run_distributed, tmp_path, (*RECIPE, "checkpoint.keep_last=9"), "data")
    assert checkpoints(run) == {"step_4", "step_8", "step_12"}
    for step in (4, 8, 12):
        assert differing(run.checkpoint(step), whole.checkpoint(step)) == set()
    shards = {rank: list(run.checkpoint(8).glob(f"__{rank}_*.distcp")) for rank in (0, 1)}
    sizes = {rank: sum(path.stat().st_size for path in paths) for rank, paths in shards.items()}
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)  # every rank writes its part
    assert_same_run(run, whole)


@contextmanager
def an_engine(arguments: list[str]) -> Iterator[Any]:
    from sinkbench.megatron import parallel
    from sinkbench.megatron.training import Engine
    from sinkbench.model import build_stages, declare

    config, resolved = prepare(arguments)
    declared = declare(config, resolved, 65)
    with parallel.running(config) as layout:
        yield Engine(config, build_stages(config, declared, layout), layout)


def batch_of(engine: Any, number: int) -> dict[str, torch.Tensor]:
    length = engine.config.model.seq_length
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 65, (4, length + 1), generator=generator).to(engine.layout.device)
    weights = torch.ones(4, length, device=tokens.device)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def step(engine: Any, number: int) -> None:
    engine.train_step([batch_of(engine, number)])


ENGINE = ["demo.yaml", "label=null", "model={num_layers: 2, num_attention_heads: 2}", "train.precision=fp32"]


def rank_saves_slowly(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 needs a while to write. What each rank sees of it."""
    from sinkbench.saving import Saver

    os.environ[VARIABLE] = "save.fsync@1:1:sleep=1.5"
    store = CheckpointStore(folder)
    with an_engine(ENGINE) as engine:
        step(engine, 0)
        saver = Saver(store, engine.layout, CheckpointConfig())
        saver.save(engine, 1, "seed: 1\n")
        at_once = store.steps()
        threads = sum(thread.name == "checkpoint" for thread in threading.enumerate())
        saver.poll()
        step(engine, 1)
        saver.save(engine, 2, "seed: 2\n")  # waits: one at a time
        after_second = store.steps()
        for number in range(200):
            saver.poll()
            if not saver.in_flight:
                break
            step(engine, 2 + number)
        polled = store.steps()
        saver.finish()
        return {"at_once": at_once, "threads": threads, "after": after_second, "polled": polled}


def test_one_save_at_a_time_noticed_by_all(run_distributed: RunDistributed, tmp_path: Path) -> None:
    seen = run_distributed(2, rank_saves_slowly, tmp_path)
    assert [rank["at_once"] for rank in seen] == [[], []]
    assert seen[1]["threads"] == 1
    assert [(rank["after"], rank["polled"]) for rank in seen] == [([1], [1, 2])] * 2


def rank_trains(rank: int, world_size: int, arguments: list[str]) -> str:
    """The error that training ends with."""
    from sinkbench.trainer import train

    try:
        train(*prepare(arguments))
    except CheckpointError as error:
        return str(error)
    return ""


FULL_DISK = (
    "could not be saved (No space left on device); the checkpoints before it are untouched; free the disk"
)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        ("save.shard@1:3:enospc", ()),
        ("save.folder:1:enospc", (SYNCHRONOUS,)),
        pytest.param("save.rename:1:enospc", (), marks=pytest.mark.full),
        pytest.param("save.fsync@1:1:enospc", (SYNCHRONOUS,), marks=pytest.mark.full),
    ],
)
def test_a_failed_save_is_tried_again_when_the_next_is_due(
    run_distributed: RunDistributed,
    whole: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    at: str,
    options: tuple[str, ...],
) -> None:
    with failpoint(at):
        run = train(run_distributed, tmp_path, (*RECIPE, *options), "data")
    assert checkpoints(run) == {"step_8", "step_12"}
    printed = [line for line in capfd.readouterr().out.splitlines() if "could not be saved" in line]
    assert printed == [f"{run.checkpoint(4)}: {FULL_DISK}; the next checkpoint that is due will be tried"]
    assert_same_run(run, whole)


@pytest.mark.parametrize("options", [(), pytest.param((SYNCHRONOUS,), marks=pytest.mark.full)])
def test_the_last_save_must_not_fail(
    run_distributed: RunDistributed, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Every save from the third shard on fails; the first checkpoint stays."""
    arguments = [*RECIPE, *LAYOUTS["data"][1], *options, f"output_dir={tmp_path}"]
    with failpoint("save.fsync@1:3+:enospc"):
        errors = run_distributed(2, rank_trains, arguments)
    assert errors == [f"{tmp_path}/short/checkpoints/step_12: {FULL_DISK}"] * 2
    assert checkpoints(Run(tmp_path / "short")) == {"step_4"}


def test_the_folder_goes_away(run_distributed: RunDistributed, whole: Run, tmp_path: Path) -> None:
    """And a file is where it was: nothing can be saved until the last step."""
    run = Path(shutil.copytree(whole.folder, tmp_path / "short"))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    arguments = [*RECIPE, *LAYOUTS["data"][1], f"output_dir={tmp_path}"]
    errors = run_distributed(2, rank_trains, arguments)
    assert (
        errors
        == [
            f"{run}/checkpoints/step_12: could not be saved (Not a directory); "
            "the checkpoints before it are untouched; free the disk"
        ]
        * 2
    )


QUICK = ("save.shard", "save.replace")
"""Stages that every test run kills at; the others take as long again, each."""


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in NAMES]
)
def test_killed_at_every_stage_of_a_write(
    run_distributed: RunDistributed, whole: Run, tmp_path: Path, stage: str
) -> None:
    """Whichever rank comes there first, in the save of step 8, after which step 4 is pruned. Beforehand step
    8 is there and damaged, so that it is replaced."""
    shutil.copytree(whole.folder, tmp_path / "short")
    run = Run(tmp_path / "short")
    shutil.rmtree(run.checkpoint(12))
    (run.checkpoint(8) / "common.pt").write_bytes(b"damaged")
    resumed = (*RECIPE, "checkpoint.keep_last=1")
    with failpoint(stage), pytest.raises(RankFailure, match="exit code -9"):
        train(run_distributed, tmp_path, resumed, "data")
    train(run_distributed, tmp_path, resumed, "data")
    assert checkpoints(run) == {"step_12"}
    assert_same_run(run, whole)


# --- damage -----------------------------------------------------------------------------------------


def damage(folder: Path, rng: random.Random) -> str:
    """Changes a file of a checkpoint in one of five ways; says which."""
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "truncate", "delete", "append", "swap"))
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[rng.randrange(len(content)) :]
    elif kind == "append":
        content += rng.randbytes(rng.randrange(1, 100))
    elif kind == "swap":
        other = rng.choice([file for file in files if file != path])
        content = bytearray(other.read_bytes())
        other.write_bytes(path.read_bytes())
    path.write_bytes(content)
    if kind == "delete":
        path.unlink()
    return f"{kind} {path.name}"


def rank_meets_damage(
    rank: int, world_size: int, folder: Path, count: int
) -> tuple[dict[str, str], list[str]]:
    """Damages the newer of two checkpoints in many ways. Which were loaded with other weights, and which
    were loaded."""
    from sinkbench import saving

    rng, store = random.Random(20261124), CheckpointStore(folder / "checkpoints")
    wrong: dict[str, str] = {}
    taken: list[str] = []
    with an_engine(ENGINE) as engine:
        saver = saving.Saver(store, engine.layout, CheckpointConfig())
        for number in (1, 2):
            step(engine, number)
            saver.save(engine, number, "seed: 1\n")
        saver.finish()
        weights = [p.detach().clone() for p in engine.networks[0].parameters()]
        step(engine, 3)
        shutil.copytree(store.folder / "step_2", folder / "pristine")
        for _ in range(count):
            shutil.rmtree(store.folder / "step_2")
            shutil.copytree(folder / "pristine", store.folder / "step_2")
            how = damage(store.folder / "step_2", rng)
            found = saving.newest_good(store, engine.layout, "full")
            assert found is not None
            if found.step == 2:  # as after a line end of checkpoint.json is lost
                taken.append(how)
                saving.load(engine, found)
                if not all(map(torch.equal, engine.networks[0].parameters(), weights)):
                    wrong[how] = "loaded"
    return wrong, taken


def test_no_damage_is_loaded(run_distributed: RunDistributed, tmp_path: Path) -> None:
    ((wrong, taken),) = run_distributed(1, rank_meets_damage, tmp_path, 100)
    assert wrong == {}
    assert len(taken) < 3


def rank_saves(rank: int, world_size: int, folder: Path) -> None:
    from sinkbench.saving import Saver

    with an_engine(ENGINE) as engine:
        step(engine, 1)
        saver = Saver(CheckpointStore(folder), engine.layout, CheckpointConfig())
        saver.save(engine, 1, recipe.dump(engine.config))
        saver.finish()


def rank_loads_format_1(rank: int, world_size: int, folder: Path) -> bool:
    """Rewrites checkpoint.json as it was before there were checksums. Whether the weights come back."""
    from sinkbench import saving

    store = CheckpointStore(folder)
    found = store.open(1)
    sizes = {name: file.size for name, file in found.files.items() if name != "recipe.yaml"}
    info = {"format": 1, "step": 1, "layout": found.layout, "files": sizes}
    (found.folder / INFO).write_text(json.dumps(info, indent=2) + "\n")
    with an_engine(ENGINE) as engine:
        step(engine, 1)
        weights = [p.detach().clone() for p in engine.networks[0].parameters()]
        step(engine, 2)
        newest = saving.newest_good(store, engine.layout, "full")
        assert newest is not None
        saving.load(engine, newest)
        return all(map(torch.equal, engine.networks[0].parameters(), weights))


def test_format_1_is_loaded(run_distributed: RunDistributed, tmp_path: Path) -> None:
    run_distributed(1, rank_saves, tmp_path)
    assert run_distributed(1, rank_loads_format_1, tmp_path) == [True]


CHANGED = (
    "optim={lr: 1e-3, min_lr: 1e-5, warmup_steps: 0, schedule: cosine, betas: [0.5, 0.6], eps: 1e-5}",
    "optim={weight_decay: 0.3, weight_decay_on: matrices}",
)


def rank_changes_settings(rank: int, world_size: int, folder: Path) -> None:
    """A run that goes on with another ``optim`` trains as the recipe says: with what a new engine has whose
    weights, moments and step count are the checkpoint's."""
    from sinkbench import saving

    settings = ("lr", "betas", "eps", "weight_decay", "max_lr", "min_lr", "wd_mult")

    def groups(engine: Any) -> list[dict[str, Any]]:
        (part,) = engine.optimizer.chained_optimizers
        return [{name: group[name] for name in settings} for group in part.optimizer.param_groups]

    with an_engine([*ENGINE, *CHANGED]) as engine:
        engine.train_step([batch_of(engine, 1)])
        engine.train_step([batch_of(engine, 2)])
        expected = groups(engine)
    with an_engine([*ENGINE, *CHANGED]) as engine:
        saving.load(engine, CheckpointStore(folder).open(1))
        (part,) = engine.optimizer.chained_optimizers
        assert any(bool(state["exp_avg"].any()) for state in part.optimizer.state.values())
        step(engine, 2)
        assert groups(engine) == expected
        assert {float(state["step"]) for state in part.optimizer.state.values()} == {2.0}
        assert expected[0]["betas"] == (0.5, 0.6)
        assert len({group["weight_decay"] for group in expected}) == 2


def test_changed_settings_of_the_optimizer_count(run_distributed: RunDistributed, tmp_path: Path) -> None:
    run_distributed(1, rank_saves, tmp_path)
    run_distributed(1, rank_changes_settings, tmp_path)


def rank_loads_of_another_device(rank: int, world_size: int) -> None:
    """A card's random state is of 16 bytes."""
    from sinkbench.megatron import state

    with an_engine(ENGINE) as engine:
        saved = state._random_state_object(engine).data
        expected = torch.rand(3)
        state._set_random_state(saved | {"device": torch.zeros(16, dtype=torch.uint8), "tracker": {}})
        assert torch.equal(torch.rand(3), expected)


def test_random_states_of_another_device(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_loads_of_another_device)


# --- malice -----------------------------------------------------------------------------------------


@dataclass
class Payload:
    """Leaves a file when it is unpickled."""

    path: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return os.system, (f"touch {self.path}",)  # type: ignore[return-value]


def poison_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def poison_index_within(folder: Path, payload: Payload) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_common(folder: Path, payload: Payload) -> None:
    torch.save({"optimizer": payload}, folder / "common.pt")


def poison_objects(folder: Path, payload: Payload) -> None:
    """The random states are no tensors but an object, which the index says where to find."""
    torch.save([payload], folder / "object.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, entry in metadata.storage_data.items():
        if index.fqn.startswith("random"):
            entry.relative_path = "object.distcp"
            entry.offset, entry.length = 0, (folder / "object.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_path(folder: Path, payload: Payload) -> None:
    """A tensor that is read from a file of someone else."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = f"../{folder.name}/{entry.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


POISONS = {
    "index": poison_index,
    "index within": poison_index_within,
    "common": poison_common,
    "objects": poison_objects,
    "path": poison_path,
}


def poisoned(good: Path, folder: Path, poison: Callable[[Path, Payload], None], payload: Payload) -> None:
    """A malicious copy of a checkpoint. Whoever makes one makes its checksums, too."""
    layout = open_checkpoint(good).layout
    shutil.copytree(good, folder)
    poison(folder, payload)
    (folder / INFO).unlink()
    files = {path.name: FileSum(path.stat().st_size, hash_file(path)) for path in folder.iterdir()}
    write_info(folder, step=1, layout=layout, files=files)


def rank_opens(rank: int, world_size: int, work: Path) -> dict[str, list[str]]:
    """Resumes, measures and converts malicious checkpoints. What each came to, by name."""
    from sinkbench import cli
    from sinkbench.export import commands

    outcomes: dict[str, list[str]] = {}
    warnings.simplefilter("ignore")
    for name in POISONS:
        checkpoint, run = work / name / "step_1", work / name
        outcomes[name] = []
        with an_engine(ENGINE) as engine:
            from sinkbench.saving import load

            try:
                load(engine, open_checkpoint(checkpoint))
                outcomes[name].append("loaded")
            except CheckpointError as error:
                outcomes[name].append(str(error))
        outcomes[name].append(str(cli.main(["measure", str(checkpoint), "--device", "cpu"])))
        outcomes[name].append(str(commands.to_hf([str(checkpoint), str(run / "out")])))
    return outcomes


def test_nothing_in_a_checkpoint_is_run(run_distributed: RunDistributed, tmp_path: Path) -> None:
    run_distributed(1, rank_saves, tmp_path / "good")
    marker = tmp_path / "was_here"
    for name, poison in POISONS.items():
        poisoned(tmp_path / "good" / "step_1", tmp_path / name / "step_1", poison, Payload(str(marker)))
    (outcomes,) = run_distributed(1, rank_opens, tmp_path)
    assert not marker.exists()
    for name, (resumed, measured, converted) in outcomes.items():
        assert resumed != "loaded", name
        assert "\n" not in resumed
        if name != "objects":  # of which only resuming has need
            assert measured == "2", name
        if name not in ("objects", "common"):
            assert converted == "2", name
    assert len(whole_tensors(tmp_path / "good" / "step_1")) > 10
