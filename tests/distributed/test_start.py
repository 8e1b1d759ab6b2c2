"""Processes that do not find one another: one line within the time that is given them."""

from __future__ import annotations

import os
import socket

import pytest

from sinkbench.errors import HostError
from sinkbench.stopping import START_TIMEOUT
from sinkbench.testing import RankFailure, RunDistributed
from tests.distributed.runs import DEMO, prepare


def rank_starts(rank: int, world_size: int, environment: dict[str, str]) -> str:
    """The error that the start ends with."""
    import torch.distributed as dist

    from sinkbench.megatron import parallel

    dist.destroy_process_group()
    os.environ.update(environment)
    try:
        parallel.start(prepare(DEMO)[0])
    except HostError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("rank", "listens", "reason"),
    [("1", False, "Connection refused"), ("0", False, "1/2 clients joined"), ("1", True, "does not answer")],
)
def test_one_line_within_the_time(
    run_distributed: RunDistributed, capfd: pytest.CaptureFixture[str], rank: str, listens: bool, reason: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = str(other.getsockname()[1])
        if listens:
            other.listen()
        elif rank == "0":
            other.close()
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port, START_TIMEOUT: "1"}
        if listens:  # torch waits for ever, so that the process must end
            with pytest.raises(RankFailure, match="exit code 2"):
                run_distributed(1, rank_starts, environment)
            line = capfd.readouterr().out.splitlines()[-1]
        else:
            (line,) = run_distributed(1, rank_starts, environment)
    assert line.startswith(
        f"MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: the processes do not find one another"
    )
    assert reason in line
