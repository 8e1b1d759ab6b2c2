"""The ``sinkbench`` command. A subcommand's module is imported only when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from sinkbench import __version__
from sinkbench.command import Parser, run_command


@dataclass(frozen=True)
class Subcommand:
    """A word on the command line, and the module with ``add_arguments(parser)`` and ``run(args)``."""

    name: str
    module: str
    summary: str


SUBCOMMANDS = (
    Subcommand("plugins", "sinkbench.cli_plugins", "list or describe the plugins that are installed"),
    Subcommand("recipe", "sinkbench.cli_recipe", "show or list recipes"),
    Subcommand("data", "sinkbench.data.command", "turn documents into token files"),
    Subcommand("checkpoint", "sinkbench.cli_checkpoint", "list, verify or prune the checkpoints of a run"),
    Subcommand("measure", "sinkbench.cli_measure", "measure attention sinks of a run or a model"),
    Subcommand("report", "sinkbench.report.command", "compare runs on one HTML page"),
    Subcommand("sweep", "sinkbench.sweep", "run every variant of a recipe's sweep"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(arguments: Sequence[str]) -> int | None:
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes KEY=VALUE words only where they follow RECIPE at once, not after an option.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (overrides and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    code: int | None = import_module(args.module).run(args)
    return code


def build_parser(arguments: Sequence[str]) -> Parser:
    """The parser, with the arguments of the one subcommand that is called."""
    parser = Parser(
        prog="sinkbench", description="Pre-train with exchangeable attention; watch sinks emerge."
    )
    parser.add_argument("--version", action="version", version=f"sinkbench {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for subcommand in SUBCOMMANDS:
        command = commands.add_parser(
            subcommand.name, help=subcommand.summary, description=subcommand.summary
        )
        command.set_defaults(module=subcommand.module)
        if called == subcommand.name:
            import_module(subcommand.module).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
