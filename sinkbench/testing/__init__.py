"""For the tests of a plugin package: ``run_distributed`` calls a function on several gloo ranks of this
machine. Its pytest plugin gives it as a fixture."""

from sinkbench.testing.distributed import RankFailure, RunDistributed, run_distributed

__all__ = ["RankFailure", "RunDistributed", "run_distributed"]
