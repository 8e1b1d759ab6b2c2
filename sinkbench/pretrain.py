"""Pre-train a recipe: ``torchrun --nproc-per-node N -m sinkbench.pretrain RECIPE [key=value ...]``.

Without torchrun, ``python -m sinkbench.pretrain RECIPE`` trains in one process. The same command goes on
with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from sinkbench import plugins, recipe
from sinkbench.command import Parser, run_command
from sinkbench.errors import SinkbenchError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="sinkbench.pretrain", description=__doc__)
    parser.add_argument("recipe", help="path or name of a recipe")
    replace = "values that replace the recipe's"
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=replace)
    return run_command(lambda: _pretrain(parser.parse_args(argv)))


def _pretrain(arguments: argparse.Namespace) -> None:
    loaded = recipe.require_single(recipe.load(arguments.recipe, arguments.overrides))
    config = recipe.to_config(loaded)
    resolved = plugins.resolve(config, plugins.discover(), loaded.provenance)

    from sinkbench.trainer import train

    try:
        summary = train(config, resolved)
    except SinkbenchError as error:
        raise recipe.locate(error, loaded.provenance) from error
    if summary and int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
