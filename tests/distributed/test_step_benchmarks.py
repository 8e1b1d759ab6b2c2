"""The benchmarks of a training step run, and give what their tables need."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention, fusion_curves, save_overhead, train_step
from benchmarks.step_profile import (
    EDGE,
    LISTED_GAPS,
    MARK,
    Gap,
    Kernel,
    _one_step,
    covered,
    gaps_between,
    kernels_of,
    kind_of,
    summary_of_gaps,
)
from sinkbench.testing import RunDistributed

pytestmark = pytest.mark.full


def rank_measures(rank: int, world_size: int, path: Path) -> list[dict[str, Any]]:
    few = ["--steps", "2", "--warmup", "1", "--micro-batch", "1", "--micro-batches", "2"]
    return train_step.main(["--device", "cpu", "--tiny", *few, "--json", str(path)])


def test_a_row_for_every_model_and_subject(run_distributed: RunDistributed, tmp_path: Path) -> None:
    (rows,) = run_distributed(1, rank_measures, tmp_path / "rows.json", timeout=280)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    usual = [("ours", "softmax"), ("ours", train_step.SIGMOID), ("megatron", "softmax"), ("plain", "softmax")]
    found = [(row["model"], row["subject"], row["variant"]) for row in rows]
    assert found == [(model, *case) for model in ("60m", "1b") for case in usual]
    for row in rows:
        assert row["loss"] == pytest.approx(6.2, abs=0.5), "near log 512 for random tokens"
        assert row["kinds_ms"]["matmul"] > 0
        assert len(row["step_s"]) == 2


def rank_compares(rank: int, world_size: int) -> float:
    from benchmarks import cpu_step

    return cpu_step.main(["--pairs", "2", "model={seq_length: 32, num_layers: 1}"])


def test_the_ratio_on_a_cpu(run_distributed: RunDistributed) -> None:
    (ratio,) = run_distributed(1, rank_compares)
    assert 0 < ratio < 100


def rank_takes_turns(rank: int, world_size: int) -> list[tuple[str, list[float]]]:
    from benchmarks import step_turns

    few = ["--micro-batch", "1", "--micro-batches", "2", "--turns", "3", "--steps", "1"]
    ways = step_turns.main(
        ["--device", "cpu", "--tiny", *few, "--", "-room -fills", "train.fused=[]", "plain"]
    )
    return [(way.name, way.turns_s) for way in ways]


def test_ways_by_turns(run_distributed: RunDistributed) -> None:
    (found,) = run_distributed(1, rank_takes_turns)
    assert [name for name, _ in found] == ["-room -fills", "train.fused=[]", "plain"]
    assert all(len(turns) == 3 and min(turns) > 0 for _, turns in found)


@pytest.mark.parametrize(("kernel", "kind"), [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matmul"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
    ("backward_keys", "attention"),
    ("triton_red_fused__to_copy_arange_eq_exp_logsumexp_mul_sub_0", "loss"),
    ("triton_red_fused__fused_rms_norm_add_0", "norm"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ("void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int>>", "optimizer"),
    ("void cuApplyRMSNorm<c10::BFloat16, float, c10::BFloat16>(c10::BFloat16*, float*)", "norm"),
    ("void cuComputeGradInput<c10::BFloat16, float, c10::BFloat16, false>(c10::BFloat16 const*)", "norm"),
    ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<>", "norm"),
    ("_update", "optimizer"),
    ("_squares", "optimizer"),
    ("_add_rows", "gradients"),
    ("column_sums", "attention"),
    ("triton_poi_fused_mul_silu_split_0", "activation"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
    ("triton_poi_fused_add_mul_neg_slice_slice_backward_0", "rotary"),
    ("void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>>", "gradients"),
    ("Memcpy DtoD (Device -> Device)", "other"),
])  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_only_what_occupies_the_card_counts_and_once() -> None:
    trace: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "a", "ts": 1000.0, "dur": 3000.0},
        {"cat": "kernel", "name": "b", "ts": 2000.0, "dur": 1000.0},
        {"cat": "gpu_memset", "name": "c", "ts": 6000.0, "dur": 500.0},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "ts": 0.0, "dur": 9000.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 10.0},
        {"name": "process_name", "ph": "M"},
    ]
    kernels = kernels_of(trace)
    assert kernels == [Kernel("a", 1.0, 4.0), Kernel("b", 2.0, 3.0), Kernel("c", 6.0, 6.5)]
    assert covered(kernels) == pytest.approx(3.5)


def test_gaps_are_when_no_stream_has_a_kernel() -> None:
    kernels = [
        Kernel("short", 2.0, 2.5),  # within another stream's
        Kernel("long", 1.0, 4.0),
        Kernel("at once", 4.0, 5.0),
        Kernel("late", 5.25, 6.0),
        Kernel("later", 8.0, 9.0),
    ]
    assert gaps_between(kernels) == [Gap(5.0, 0.25, "at once", "late"), Gap(6.0, 2.0, "late", "later")]
    assert covered(kernels) + 2.25 == 8.0


def test_gaps_by_size() -> None:
    gaps = [
        Gap(10 + n, ms, f"before {n}", "after") for n, ms in enumerate((0.001, 0.0015, 0.002, 0.05, 0.1, 3))
    ]
    summary = summary_of_gaps(gaps, 9.0)
    sizes = summary["sizes"]
    counts = {"below 2 us": 2, "below 10 us": 1, "below 100 us": 1, "longer": 2}
    assert {name: size["count"] for name, size in sizes.items()} == counts
    assert [size["ms"] for size in sizes.values()] == pytest.approx([0.0025, 0.002, 0.05, 3.1])
    assert summary["total_ms"] == pytest.approx(3.1545)
    assert summary["longest"][0] == {"ms": 3, "at_ms": 6.0, "before": "before 5", "after": "after"}
    assert [gap["ms"] for gap in summary["longest"]] == [3, 0.1, 0.05, 0.002, 0.0015, 0.001]
    many = summary_of_gaps([Gap(n, 1.0, "", "") for n in range(LISTED_GAPS + 5)], 0.0)
    assert len(many["longest"]) == LISTED_GAPS


def test_a_step_is_between_two_marks() -> None:
    mark = f"at::cuda::(anonymous namespace)::{MARK}(long)"
    marks = [Kernel(mark, 2.0, 2.25), Kernel(mark, 8.0, 8.25)]
    kernels = [Kernel("before", 1.0, 2.0), *marks, Kernel("first", 3.0, 5.0), Kernel("last", 5.0, 7.5)]
    found, start, end = _one_step(kernels)
    assert ([kernel.name for kernel in found], start, end) == (["first", "last"], 2.25, 8.0)
    gaps = gaps_between([Kernel(EDGE, start, start), *found, Kernel(EDGE, end, end)])
    assert gaps == [Gap(2.25, 0.75, EDGE, "first"), Gap(7.5, 0.5, "last", EDGE)]
    assert covered(found) + sum(gap.ms for gap in gaps) == end - start
    with pytest.raises(ValueError, match="1 kernels named spin_kernel"):
        _one_step(marks[:1])


def rank_scales(rank: int, world_size: int, layout: str, path: Path) -> list[dict[str, Any]]:
    few = ["--steps", "2", "--warmup", "1", "--micro-batch", "2", "--micro-batches", "2", "--no-profile"]
    chosen = ["--models", "60m", "--subjects", "ours", "--variants", "softmax"]
    return train_step.main([layout, "--device", "cpu", "--tiny", *few, "--against", str(path), *chosen])


@pytest.mark.parametrize("layout", [
    "parallel.overlap=true", "parallel={tensor: 2, sequence: true}",
    "parallel.pipeline=2", "parallel.context=2",
])  # fmt: skip
def test_two_processes(run_distributed: RunDistributed, tmp_path: Path, layout: str) -> None:
    one = {"model": "60m", "subject": "ours", "variant": "softmax", "tokens_per_second": 100.0}
    (tmp_path / "one.json").write_text(json.dumps([one]))
    rows = run_distributed(2, rank_scales, layout, tmp_path / "one.json")
    for (row,) in rows:
        assert row["efficiency"] == pytest.approx(row["tokens_per_second"] / 200)
        assert row["cards"] == 2
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"])


def rank_lists(rank: int, world_size: int) -> list[dict[str, Any]]:
    few = ["--steps", "1", "--warmup", "1", "--micro-batch", "1", "--micro-batches", "1", "--no-profile"]
    chosen = ["--models", "60m", "--subjects", "ours", "--variants", "no_such_attention"]
    listed = ["attention_biases/biases/kv", "model_architecture/ffn/ffn=relu"]
    rows = train_step.main(["--device", "cpu", "--tiny", *few, *chosen, "softmax", *listed])
    networks = [one for one in gc.get_objects() if type(one).__name__ == "Network"]
    held = sum(weight.untyped_storage().nbytes() for network in networks for weight in network.parameters())
    assert held == 0, "of models that were measured"
    return rows


def test_a_row_that_fails_stops_no_other(run_distributed: RunDistributed) -> None:
    (rows,) = run_distributed(1, rank_lists)
    assert "no_such_attention" in rows[0]["problem"]
    assert [row["to_softmax"] > 0 for row in rows[1:]] == [True] * 3


def rank_draws(rank: int, world_size: int, path: Path) -> list[dict[str, Any]]:
    return fusion_curves.main(["--tiny", "--steps", "4", "--json", str(path), "optim.lr=1e-2"])


def test_curves_of_fusions(run_distributed: RunDistributed, tmp_path: Path) -> None:
    (rows,) = run_distributed(1, rank_draws, tmp_path / "rows.json")
    assert [row["curve"] for row in rows] == list(fusion_curves.CURVES)
    assert all(row["passed"] for row in rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    apart = fusion_curves.compared("apart", [2.0, 1.1], [2.0, 1.0], 1e-2)
    assert not apart["passed"]
    assert apart["at_step"] == 2
    assert apart["largest"] == pytest.approx(0.1)


def rank_saves(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    shape = ["model={num_layers: 2, hidden_size: 64, ffn_hidden_size: 96, seq_length: 64, vocab_size: 512}"]
    small = ["train={precision: fp32, device: cpu, global_batch_size: 2}", "data={source: bigram_backcopy}"]
    where = ["--folder", str(folder)]
    return save_overhead.main(["default_60m", *shape, *small, "--steps", "12", *where])


def test_save_overhead(run_distributed: RunDistributed, tmp_path: Path) -> None:
    results = run_distributed(2, rank_saves, tmp_path / "runs")
    for result in results:
        assert result["ratio"] == pytest.approx(result["in_background_s"] / result["without_s"])
        assert result["waiting_s"] > 0
        assert result["complete_s"]["first"] >= result["held_s"]["first"] > 0
    steps = 10 + 2 * 12 + 1
    assert [path.name for path in (tmp_path / "runs/default_60m/checkpoints").iterdir()] == [f"step_{steps}"]


def test_attention_against_its_bars(tmp_path: Path) -> None:
    rows = attention.main(["--bars", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    barred = {row["variant"] for row in rows if "bar" in row}
    assert barred == {*attention.BARS, "softmax"}
    for row in rows:
        if "problem" not in row and not row["backend"].startswith("importance"):
            assert row["ratio"] == pytest.approx(row["both_ms"] / rows[0]["both_ms"])
    left_out = attention.main(["--bars", "--device", "cpu", "--limit-s", "-1"])
    assert all("--limit-s" in row["problem"] and not row.get("passed") for row in left_out)
