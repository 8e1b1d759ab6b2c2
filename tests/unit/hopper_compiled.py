"""Compiles a kernel for Hopper without a card, in the size that it is launched with, and prints what the
assembler says of it: of the unnormalised sigmoid at head size 96, the sums of columns of a softmax. Ends with
code 77 where this Triton has not got what it takes.

    python -m tests.unit.hopper_compiled forward|keys|queries|table|rows|columns|functions

The last prints which functions the kernels take, of a sigmoid and of one that makes a tensor.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZE = 64
PARTS = (64, 32)
"""Of the head size."""


def main(name: str) -> int:
    from sinkbench.attention import hopper

    if obstacle := hopper.missing():
        print(obstacle)
        return 77
    if name == "functions":
        print(_taken())
        return 0
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from sinkbench.attention import (
        hopper_backward,
        hopper_forward,
        hopper_importance,
        hopper_importance_kernels,
        hopper_table,
        tiles,
    )

    kernels: dict[str, Any] = {
        "forward": hopper_forward.forward,
        "keys": hopper_backward.backward_keys,
        "queries": hopper_backward.backward_queries,
        "table": hopper_table.table_gradient,
        "rows": hopper_importance_kernels.row_sums,
        "columns": hopper_importance_kernels.column_sums,
    }
    kernel = kernels[name]
    limits = {
        "queries": tiles.fixed("hopper queries", sum(PARTS), torch.bfloat16).registers,
        "columns": hopper_importance.COLUMNS["columns"].registers,
    }
    options = {"num_warps": 4} | ({"maxnreg": limits[name]} if name in limits else {})
    constants = _constants() | {"SHARED": True, "REGISTERS": True, "SOFTMAX": name == "columns"}
    blocks = {"q0", "q1", "k0", "k1", "v0", "v1", "do0", "do1"}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in blocks:
            columns = PARTS[int(argument[-1])]
            layout = gl.NVMMASharedLayout(2 * columns, 16, 4)
            return f"tensordesc<bf16[1,1,{SIZE},{columns}],{layout!r}>"
        if argument.endswith("_ptr"):
            return "*bf16" if argument in ("o_ptr", "dk_ptr", "dv_ptr", "dq_ptr") else "*fp32"
        return "fp32" if argument in ("scale", "eps") else "i32"

    names = kernel.arg_names
    source = GluonASTSource(
        kernel,
        {argument: kind(argument) for argument in names},
        {(n,): constants[argument] for n, argument in enumerate(names) if argument in constants},
        {
            (n,): [["tt.divisibility", 16]]
            for n, argument in enumerate(names)
            if argument.endswith("_ptr") or "stride" in argument
        },
    )
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"], encoding="utf-8")
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    print(said.stderr)
    return 0


def _taken() -> list[bool]:
    """With a driver that has a card's target and no card."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoCard:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    driver.set_active(NoCard())
    from sinkbench_plugins.attention import _triton

    from sinkbench.attention import hopper
    from tests.unit.making_function import makes_a_tensor

    return [hopper.takes(f, _triton.sigmoid_derivative) for f in (_triton.sigmoid, makes_a_tensor)]


def _constants() -> dict[str, Any]:
    from sinkbench_plugins.attention import _triton

    switches = {"BIAS", "WINDOW", "PREFIX", "DOCUMENTS", "SLOPE_GRADIENT", "PROXY"}
    return {
        "F": _triton.sigmoid_by_tanh,
        "DF": _triton.sigmoid_derivative,
        "NORMALIZE": 0,
        "POSITION": 0,
        "UNIT": 1.0,
        "PARTS": len(PARTS),
        **dict.fromkeys(("BLOCK_Q", "BLOCK_K", "BLOCK"), SIZE),
        **dict.fromkeys(switches, False),
        **dict.fromkeys(("delta_from", "lse_from", "proxy_ptr"), None),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
