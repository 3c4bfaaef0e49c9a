"""``tvm-sepconv doctor``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from tvm_sepconv import doctor, jit, targets
from tvm_sepconv.doctor import NOTE, OK, PROBLEM, WARNING, Finding
from tvm_sepconv.tracker import Address

HELP = "check this machine, or boards, for what building, tuning and running need"
DESCRIPTION = (
    "Look at everything that compiling, tuning and running layers needs, and say what to do about "
    "what is missing. With --rpc also at TVM's RPC tracker and the boards behind it. The exit "
    "status is 1 if there is a problem."
)
EPILOG = None
_COLOURS = {OK: "32", NOTE: "2", WARNING: "33", PROBLEM: "31;1"}
_INDENT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--target", metavar="T", help="which should be built, or runs on the boards"
    )
    parser.add_argument(
        "--rpc", metavar="HOST:PORT", help="of TVM's RPC tracker; 9190 is this host's"
    )
    parser.add_argument("--key", metavar="KEY", help="which the boards' servers registered with")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if options.key is not None and options.rpc is None:
        raise ValueError("`--key` needs --rpc too, the address of a tracker")
    target = None if options.target is None else targets.resolve(options.target)
    address = None if options.rpc is None else Address.parse(options.rpc)
    findings = []
    for finding in _findings(target, address, options.key):
        findings.append(finding)
        if not options.json:
            print(_line(finding), flush=True)
    problems, warnings = (sum(f.status == s for f in findings) for s in (PROBLEM, WARNING))
    if options.json:
        print(json.dumps({"problems": problems, "findings": [asdict(f) for f in findings]}))
    else:
        print(f"\n{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _findings(target: str | None, address: Address | None, key: str | None) -> Iterator[Finding]:
    yield from doctor.examine(target)
    if address is not None:
        if doctor.version("apache-tvm") is None:
            text = "measuring on boards needs the compiler here"
            yield Finding(PROBLEM, "boards", text, "pip install 'tvm-sepconv[compiler,tune]'")
        else:
            examine = jit.compiler("tvm_sepconv.compiler.tuning.boards_doctor").examine
            yield from examine(address, key, target)


def _line(finding: Finding) -> str:
    """A finding in one line, or more in a narrow terminal, and its remedy in another."""
    status = f"{finding.status:<9}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        status = f"\x1b[{_COLOURS[finding.status]}m{status}\x1b[0m"
    lines = _wrapped(finding.text)
    if finding.remedy:
        lines += _wrapped(f"→ {finding.remedy}")
    return f"{status}{finding.subject:<11}" + f"\n{' ' * _INDENT}".join(lines)


def _wrapped(text: str) -> list[str]:
    text = " ".join(text.split())
    if not sys.stdout.isatty():
        return [text]
    width = max(shutil.get_terminal_size().columns - _INDENT, 40)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
