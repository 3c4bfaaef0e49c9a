"""The command ``tvm-sepconv``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

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
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tvm-sepconv",
        description="Tune, compile, time and deploy fused SeparableConv1D layers. "
        "`tvm-sepconv COMMAND --help` says more about each command.",
    )
    parser.add_argument("--version", action="version", version=f"tvm-sepconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name, help=command.HELP, description=command.DESCRIPTION, epilog=command.EPILOG
            )
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
