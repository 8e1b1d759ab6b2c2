"""What stops a run once its recipe is read: each ends with exit code 2 and one line, and changes nothing.

Wrong recipes and plugins are in wrong_input.yaml.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sinkbench.checkpoint import open_checkpoint, verify_files
from sinkbench.errors import CheckpointError
from sinkbench.measure.runs import find_checkpoint
from sinkbench.testing import RunDistributed
from tests.unit.data_folder import write_folder
from tests.unit.test_wrong_input import contents

SMALL = """\
name: small
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn: none, seq_length: 16}
data: {source: bigram_backcopy}
optim: {lr: 4e-4, warmup_steps: 1}
train: {steps: 4, global_batch_size: 8, precision: fp32, device: cpu}
checkpoint: {every: 2}
measure: {every: 0}
log: {progress: false}
"""


def rank_calls(
    rank: int, world_size: int, command_module: str, arguments: Sequence[str]
) -> tuple[int, str, str]:
    """Runs a command; returns its exit code, output and errors."""
    from sinkbench import command

    command.REPORT_WAIT_S = 0.0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(command_module).main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml and a finished run of it, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    arguments = [str(folder / "small.yaml"), f"output_dir={folder}"]
    ((code, _, err),) = run_distributed(1, rank_calls, "sinkbench.pretrain", arguments)
    assert (code, err) == (0, "")
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of ``trained`` where the run is in ``runs``."""
    shutil.copytree(trained / "small", tmp_path / "runs" / "small")
    shutil.copy(trained / "small.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(
    results: Sequence[tuple[int, str, str]], line: str, before: dict[Path, bytes | None], work: Path
) -> None:
    wanted = re.escape(line).replace(r"\.\.\.", ".*")
    for code, out, err in results:
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert re.fullmatch(wanted, err.rstrip("\n")), err
    assert contents(work) == before


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: what is wrong.
        line: what must be printed; ... is anything.
        overrides: of the recipe.
        damage: done to the run's folder before.
        processes: of the job.
    """

    name: str
    line: str
    overrides: tuple[str, ...] = ()
    damage: Callable[[Path], object] = field(default=lambda run: None)
    processes: int = 1


OTHER_SEED = (
    "runs/small: it holds a run of another recipe (seed 1234 -> 7); set another name, or allow the change: "
    "'checkpoint.allow_change=[seed]'"
)
NEW = "name=new"
"""A run that has no folder yet."""

RUN_CASES = (
    Case(
        "processes do not divide",
        "command line: parallel: 3 processes are not divisible by tensor 2 x pipeline 1 x context 1 = 2; "
        "start a multiple of 2 processes (torchrun --nproc-per-node), or change parallel",
        overrides=(NEW, "parallel.tensor=2"),
        processes=3,
    ),
    Case(
        "global batch does not divide",
        "command line: train.global_batch_size: 9 is not divisible by the data-parallel size 2; "
        "change it, or the number of processes",
        overrides=(NEW, "train.global_batch_size=9"),
        processes=2,
    ),
    Case(
        "interleaved pipeline without enough micro-batches",
        "command line: train.micro_batch_size: the interleaved pipeline needs a multiple of 2 micro-batches, "
        "not 1; change train.micro_batch_size or train.global_batch_size",
        overrides=(
            NEW,
            "model.num_layers=4",
            "parallel={pipeline: 2, virtual_pipeline: 2}",
            "train.micro_batch_size=8",
        ),
        processes=2,
    ),
    Case(
        "batch that an interleaved pipeline cannot cut",
        "command line: train.global_batch_size: the interleaved pipeline needs a multiple of 2 "
        "micro-batches, which 7 sequences on one data-parallel rank do not give; change it",
        overrides=(
            NEW,
            "model.num_layers=4",
            "parallel={pipeline: 2, virtual_pipeline: 2}",
            "train.global_batch_size=7",
        ),
        processes=2,
    ),
    Case(
        "probe that context parallelism cannot cut",
        "command line: measure.length 14 is not divisible by 4, which parallel.context and parallel.sequence "
        "need; change one of them",
        overrides=(NEW, "parallel.context=2", "measure={every: 2, length: 14}"),
        processes=2,
    ),
    Case(
        "sdpa with sigmoid",
        "command line: model.backend: sdpa cannot compute a similarity other than softmax, which "
        "the attention needs here; write auto or eager",
        overrides=(NEW, "model.backend=sdpa", "model.attention=sigmoid"),
    ),
    Case(
        "unknown megatron field",
        "command line: model.megatron.hiden_dropout: megatron-core has no such field, or it has no effect in "
        "sinkbench's models; did you mean hidden_dropout?",
        overrides=(NEW, "model.megatron={hiden_dropout: 0.1}"),
    ),
    Case(
        "megatron field of a section",
        "command line: model.megatron.num_layers: a section of the recipe owns this field; set "
        "model.num_layers instead",
        overrides=(NEW, "model.megatron={num_layers: 3}"),
    ),
    Case(
        "megatron field of another type",
        "command line: model.megatron.hidden_dropout: 'much' is wrong (Input should be a valid number); "
        "change it",
        overrides=(NEW, "model.megatron={hidden_dropout: much}"),
    ),
    Case(
        "megatron field that megatron refuses",
        "command line: model.megatron: megatron-core refuses it (...); change "
        "num_layers_in_first_pipeline_stage",
        overrides=(NEW, "parallel.pipeline=2", "model.megatron={num_layers_in_first_pipeline_stage: 0}"),
        processes=2,
    ),
    Case(
        "vocabulary does not divide",
        "command line: parallel.tensor: the padded vocabulary of 128 is not divisible by 3; choose another "
        "tensor-parallel size",
        overrides=(NEW, "parallel.tensor=3", "model.num_attention_heads=3", "model.head_size=8"),
        processes=3,
    ),
    Case(
        "vocabulary too small",
        "command line: model.vocab_size: 60 is below the 65 tokens of the data; raise it, or leave it out",
        overrides=(NEW, "model.vocab_size=60"),
    ),
    Case(
        "another recipe",
        "runs/small: it holds a run of another recipe (optim.lr 0.0004 -> 0.01, seed 1234 -> 7); set another "
        "name, or allow the change: 'checkpoint.allow_change=[optim.lr, seed]'",
        overrides=("optim.lr=1e-2", "seed=7"),
    ),
    Case(
        "fewer steps than the checkpoint",
        "command line: train.steps: 3 is below the checkpoint's step 4; raise it, or set another name",
        overrides=("train.steps=3",),
        damage=lambda run: (run / "recipe.yaml").unlink(),
    ),
)


def checkpoint_case(name: str, line: str, damage: Callable[[Path], object]) -> Case:
    return Case(name, line, damage=lambda run: damage(run / "checkpoints" / "step_4"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change_info(folder: Path, **values: object) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


STEP_4 = "runs/small/checkpoints/step_4"
EARLIER = "delete the folder to go on from an earlier checkpoint"
OTHER_FORMAT = checkpoint_case(
    "another format",
    f"{STEP_4}: it has format 99, this version reads 1 and 2; use a matching sinkbench",
    lambda folder: (folder / "checkpoint.json").write_text('{"format": 99}'),
)
CHECKPOINT_CASES = (
    checkpoint_case(
        "no checkpoint.json",
        f"{STEP_4}: checkpoint.json is missing, so it is not a complete checkpoint; {EARLIER}",
        lambda folder: (folder / "checkpoint.json").unlink(),
    ),
    checkpoint_case(
        "truncated checkpoint.json",
        f"{STEP_4}/checkpoint.json: is damaged (JSONDecodeError: ...); {EARLIER}",
        lambda folder: truncate(folder / "checkpoint.json"),
    ),
    checkpoint_case(
        "checkpoint.json of something else",
        f"{STEP_4}/checkpoint.json: is damaged (AttributeError: ...); {EARLIER}",
        lambda folder: (folder / "checkpoint.json").write_text("[]"),
    ),
    OTHER_FORMAT,
    checkpoint_case(
        "no .metadata",
        f"{STEP_4}/.metadata: is missing; copy it again, or {EARLIER}",
        lambda folder: (folder / ".metadata").unlink(),
    ),
    checkpoint_case(
        "no shard",
        f"{STEP_4}/__0_0.distcp: is missing; copy it again, or {EARLIER}",
        lambda folder: (folder / "__0_0.distcp").unlink(),
    ),
    checkpoint_case(
        "truncated shard",
        f"{STEP_4}/__0_0.distcp: has ... bytes where checkpoint.json says ...; copy it again, or {EARLIER}",
        lambda folder: truncate(folder / "__0_0.distcp"),
    ),
    checkpoint_case(
        "flipped bit",
        f"{STEP_4}/__0_1.distcp: is not what was written (SHA-256 differs from checkpoint.json); "
        f"copy it again, or {EARLIER}",
        lambda folder: flip(folder / "__0_1.distcp"),
    ),
    checkpoint_case(
        "changed checkpoint.json",
        f"{STEP_4}/checkpoint.json: is damaged (ValueError: its checksum is another); {EARLIER}",
        lambda folder: change_info(folder, step=2),
    ),
    checkpoint_case(
        "no recipe",
        f"{STEP_4}/recipe.yaml: is missing; copy it again, or {EARLIER}",
        lambda folder: (folder / "recipe.yaml").unlink(),
    ),
)


@pytest.mark.parametrize("case", [*RUN_CASES, OTHER_FORMAT], ids=lambda case: case.name)
def test_pretrain_refuses(run_distributed: RunDistributed, work: Path, case: Case) -> None:
    case.damage(work / "runs" / "small")
    before = contents(work)
    arguments = ["small.yaml", *case.overrides]
    results = run_distributed(case.processes, rank_calls, "sinkbench.pretrain", arguments)
    assert_refused(results, case.line, before, work)


@pytest.mark.parametrize("case", CHECKPOINT_CASES, ids=lambda case: case.name)
def test_measure_refuses_a_damaged_checkpoint(
    run_distributed: RunDistributed, work: Path, case: Case
) -> None:
    case.damage(work / "runs" / "small")
    before = contents(work)
    results = run_distributed(1, rank_calls, "sinkbench.cli", ["measure", STEP_4])
    assert_refused(results, case.line, before, work)


@pytest.mark.parametrize("case", [c for c in CHECKPOINT_CASES if c is not OTHER_FORMAT], ids=lambda c: c.name)
def test_a_run_is_measured_and_converted_at_the_checkpoint_before_a_damaged_one(
    work: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    case.damage(work / "runs" / "small")
    before = contents(work)
    assert find_checkpoint(Path("runs/small"), None).step == 2
    assert find_checkpoint(Path("runs/small"), 2).step == 2
    with pytest.raises(CheckpointError):
        find_checkpoint(Path("runs/small"), 4)
    what, _, _ = case.line.partition("; ")
    (said,) = caplog.messages
    assert re.fullmatch(re.escape(what).replace(r"\.\.\.", ".*") + "; step 2 is used", said)
    assert contents(work) == before


def test_no_checkpoint_to_measure_is_good(work: Path) -> None:
    for step in (2, 4):
        truncate(work / STEP_4.replace("4", str(step)) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="no earlier checkpoint is good"):
        find_checkpoint(Path("runs/small"), None)


@pytest.mark.parametrize(
    ("target", "step", "line"),
    [
        (
            "runs/gone",
            None,
            "runs/gone: there is no such folder; give a run's folder or one of its checkpoints",
        ),
        ("runs", None, "runs: it holds no checkpoint; train it first, or name another folder"),
        (
            "runs/small",
            3,
            "runs/small/checkpoints/step_3: there is no such checkpoint; name a folder checkpoints/step_N",
        ),
    ],
)
def test_nothing_to_measure(work: Path, target: str, step: int | None, line: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(line)}$"):
        find_checkpoint(Path(target), step)


DAMAGED = [case for case in CHECKPOINT_CASES if case is not OTHER_FORMAT]
QUICK = ("flipped bit", "truncated checkpoint.json", "no shard")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.full) for c in DAMAGED],
)
def test_goes_on_from_the_checkpoint_before_the_damaged_one(
    run_distributed: RunDistributed, work: Path, case: Case
) -> None:
    """Which is named in one line, and written anew."""
    metrics = work / "runs" / "small" / "metrics.jsonl"
    before = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    case.damage(work / "runs" / "small")
    ((code, _, err),) = run_distributed(1, rank_calls, "sinkbench.pretrain", ["small.yaml"])
    what, _, _ = case.line.partition("; ")
    assert code == 0
    assert re.fullmatch(re.escape(what).replace(r"\.\.\.", ".*") + "; step 2 is used\n", err), err
    assert [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] == before
    verify_files(open_checkpoint(work / STEP_4))


def test_no_checkpoint_is_good(run_distributed: RunDistributed, work: Path) -> None:
    for step in (2, 4):
        truncate(work / STEP_4.replace("4", str(step)) / "__0_0.distcp")
    before = contents(work)
    line = (
        f"{STEP_4}/__0_0.distcp: has ... bytes where checkpoint.json says ..., and no earlier checkpoint is "
        "good; copy it again from elsewhere, or delete the folder checkpoints to start anew"
    )
    results = run_distributed(2, rank_calls, "sinkbench.pretrain", ["small.yaml"])
    assert_refused(results, line, before, work)


def test_folders_of_two_tokenizers(run_distributed: RunDistributed, work: Path) -> None:
    documents = [list(range(1, 30))] * 4
    for name in "ab":
        write_folder(Path(name), documents, documents, vocab_size=60, tokenizer_sha256=name * 64)
    before = contents(work)
    arguments = ["small.yaml", NEW, "data={source: indexed, train: [a, b]}"]
    results = run_distributed(1, rank_calls, "sinkbench.pretrain", arguments)
    assert_refused(results, "...b: was prepared with another tokenizer than a; ...", before, work)


def test_cuda_without_a_card(
    run_distributed: RunDistributed, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = contents(work)
    arguments = ["small.yaml", NEW, "train.device=cuda"]
    results = run_distributed(1, rank_calls, "sinkbench.pretrain", arguments)
    line = "command line: train.device: cuda is not available here; write auto or cpu"
    assert_refused(results, line, before, work)


def test_folder_of_a_live_run(run_distributed: RunDistributed, work: Path) -> None:
    before = contents(work)
    with (work / "runs" / "small" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = run_distributed(1, rank_calls, "sinkbench.pretrain", ["small.yaml"])
    line = "runs/small: another run is writing here; wait for it, or set another name"
    assert_refused(results, line, before, work)
    ((code, _, _),) = run_distributed(1, rank_calls, "sinkbench.pretrain", ["small.yaml"])
    assert code == 0


def test_every_rank_stops_where_the_main_one_does(run_distributed: RunDistributed, work: Path) -> None:
    """The main process alone opens the folder; the others raise its error."""
    before = contents(work)
    arguments = ["small.yaml", "seed=7", "parallel.tensor=2"]
    results = run_distributed(2, rank_calls, "sinkbench.pretrain", arguments)
    assert_refused(results, OTHER_SEED, before, work)


def test_exit_code_of_the_process(work: Path) -> None:
    before = contents(work)
    command = [sys.executable, "-m", "sinkbench.pretrain", "small.yaml", "seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_refused([(done.returncode, done.stdout, done.stderr)], OTHER_SEED, before, work)


def test_torchrun_prints_the_line_once_and_first(work: Path) -> None:
    before = contents(work)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sinkbench.pretrain", "small.yaml", "seed=7", "parallel.pipeline=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = done.stderr.splitlines()
    assert done.returncode != 0
    assert lines[0] == OTHER_SEED
    assert lines.count(OTHER_SEED) == 1
    assert "/sinkbench/" not in done.stderr  # torchrun prints a traceback, of its own files
    assert contents(work) == before
