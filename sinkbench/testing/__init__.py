"""For the tests of a plugin package.

``check_plugin`` checks a plugin in every respect; ``run_distributed`` calls a function on several gloo
ranks of this machine. sinkbench's pytest plugin gives both as fixtures.
"""

from sinkbench.testing.check import CheckPlugin, check_plugin
from sinkbench.testing.distributed import RankFailure, RunDistributed, run_distributed
from sinkbench.testing.report import Outcome, Report

__all__ = [
    "CheckPlugin",
    "Outcome",
    "RankFailure",
    "Report",
    "RunDistributed",
    "check_plugin",
    "run_distributed",
]
