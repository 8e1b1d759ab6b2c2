"""The benchmarks of a training step run, and give what their tables need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
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


@pytest.mark.parametrize(("kernel", "kind"), [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matmul"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
    ("backward_keys", "attention"),
    ("triton_red_fused__to_copy_arange_eq_exp_logsumexp_mul_sub_0", "loss"),
    ("triton_red_fused__fused_rms_norm_add_0", "norm"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ("triton_poi_fused_mul_silu_0", "other"),
])  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert train_step.kind_of(kernel) == kind
