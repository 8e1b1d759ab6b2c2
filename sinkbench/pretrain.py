"""Pre-train a recipe: ``torchrun --nproc-per-node N -m sinkbench.pretrain RECIPE [key=value ...]``.

Without torchrun, ``python -m sinkbench.pretrain RECIPE`` trains in one process. The same command goes on
with a run that was interrupted. SIGTERM, SIGINT or SIGUSR1 to any process finishes the step, writes a
checkpoint and exits with code 75, as does train.max_minutes; a second signal exits at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from sinkbench import plugins, preflight, recipe, stopping
from sinkbench.command import Parser, leave_the_word_to_others, run_command
from sinkbench.errors import SinkbenchError, Stopped


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="sinkbench.pretrain", description=__doc__)
    parser.add_argument("recipe", help="path or name of a recipe")
    replace = "values that replace the recipe's"
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=replace)
    return run_command(lambda: _main(parser.parse_args(argv)))


def _main(arguments: argparse.Namespace) -> None:
    preflight.check_launcher()
    stopping.die_with_launcher()
    with stopping.outside_steps(arguments.recipe):
        try:
            _pretrain(arguments)
        except (SinkbenchError, Stopped):
            raise  # one line, which run_command prints
        except Exception as error:
            if stopping.under_torchrun():
                _tell_launcher(error)
            raise


def _tell_launcher(error: Exception) -> None:
    """Puts the error into torchrun's summary, which has the first of all ranks on top. A rank that lost its
    connection to one that is gone has no error of its own."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from sinkbench.megatron.parallel import lost_peer

    if lost_peer(error):
        leave_the_word_to_others()
    get_error_handler().record_exception(error)


def _pretrain(arguments: argparse.Namespace) -> None:
    loaded = recipe.require_single(recipe.load(arguments.recipe, arguments.overrides))
    config = recipe.to_config(loaded)
    resolved = plugins.resolve(config, plugins.discover(), loaded.provenance)
    try:
        preflight.check_host(config)
        from sinkbench.data.source import open_source

        source = open_source(config)  # before torch is imported, which takes seconds
        from sinkbench.trainer import train

        summary = train(config, resolved, source)
    except SinkbenchError as error:
        raise recipe.locate(error, loaded.provenance) from error
    if summary and int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
