"""Pre-train a recipe: ``torchrun --nproc-per-node N -m sinkbench.pretrain RECIPE [key=value ...]``.

Without torchrun, ``python -m sinkbench.pretrain RECIPE`` trains in one process. The same command goes on
with a run that was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from sinkbench import plugins, recipe
from sinkbench.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="sinkbench.pretrain", description=__doc__)
    parser.add_argument("recipe", help="path or name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _pretrain(arguments.recipe, arguments.overrides))


def _pretrain(reference: str, overrides: Sequence[str]) -> None:
    loaded = recipe.require_single(recipe.load(reference, overrides))
    config = recipe.to_config(loaded)
    resolved = plugins.resolve(config, plugins.discover(), loaded.provenance)

    from sinkbench.trainer import train

    summary = train(config, resolved)
    if summary and int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
