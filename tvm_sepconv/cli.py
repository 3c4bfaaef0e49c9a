"""The command ``tvm-sepconv``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tvm_sepconv import __version__
from tvm_sepconv.bench import command as bench
from tvm_sepconv.bundle import BundleError
from tvm_sepconv.commands import (
    build,
    cache,
    cycles,
    deploy,
    doctor,
    gpu,
    inspect,
    logs,
    report,
    run,
    tune,
    verify,
)

COMMANDS = {
    "tune": tune,
    "build": build,
    "bench": bench,
    "inspect": inspect,
    "run": run,
    "verify": verify,
    "deploy": deploy,
    "logs": logs,
    "report": report,
    "cycles": cycles,
    "gpu": gpu,
    "cache": cache,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        The exit status: 2 for what the user can put right, 1 if nothing was found.
    """
    options = _options(arguments)
    try:
        status: int = COMMANDS[options.command].run(options)
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError, BundleError) as error:
        message = str(error)
    except ImportError as error:
        if error.name is not None:  # Python's own has one; without it it is an extra to install
            raise
        message = str(error)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # TVM's own errors are subclasses: no user's fault
            raise
        message = str(error)
    print(f"tvm-sepconv {options.command}: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names: an abbreviation may mean another one tomorrow."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; ends the process with what is wrong, as argparse does."""
    parser = _Parser(
        prog="tvm-sepconv",
        description="Tune, compile, time and deploy fused SeparableConv1D layers. "
        "`tvm-sepconv COMMAND --help` says more about each command.",
        epilog="To begin with: `tvm-sepconv doctor`, then `tvm-sepconv build MB-1`. A trained "
        "model's layers become a bundle by `tvm-sepconv build --keras FILE --output DIR`, or in "
        "Python by `tvm_sepconv.from_keras`, `from_torch` or `from_onnx`, and `tvm_sepconv.save`.",
    )
    parser.add_argument("--version", action="version", version=f"tvm-sepconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name, help=command.HELP, description=command.DESCRIPTION, epilog=command.EPILOG
            )
        )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # which argparse itself reports with the options of no command
        at_fault = commands.choices.get(options.command, parser)
        at_fault.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2, "\ntvm-sepconv: error: a COMMAND is needed\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
