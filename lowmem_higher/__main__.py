"""The command line: `python -m lowmem_higher demo`, `profile script.py`, `doctor`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from lowmem_higher import doctor, profile_script
from lowmem_higher.demo.options import OptionError, add_arguments, options_from

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
_FAILED, _BAD_OPTIONS, _INTERRUPTED = 1, 2, 130


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_OPTIONS, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those after the program's name; by default from the command line.

    Returns:
        The exit code: 0 if all went well, 1 if the job could not be done or `doctor` found a fault, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 for bad options, after one line on stderr; with code 0 after `--help`.
        BaseException: What a profiled script raises.
    """
    parser = _OneLineParser(
        prog="python -m lowmem_higher",
        description="Exact meta-gradients through long inner loops, in little memory.",
        epilog="New here? `demo` shows what it is for. Something odd? `doctor` looks at the installation.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    what = "learn which training labels are wrong, and compare memory, time and gradient with the full unroll"
    demo = commands.add_parser("demo", help=what, description=what, allow_abbrev=False)
    add_arguments(demo)
    what = "run a script and measure every inner loop in it: memory by phase, passes, seconds"
    profile = commands.add_parser("profile", help=what, description=what, allow_abbrev=False)
    profile_script.add_arguments(profile)
    what = "look at versions, devices and optional packages, probe torch, and prove small gradients; 1 if one is wrong"
    commands.add_parser("doctor", help=what, description=what, allow_abbrev=False)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return 0
    if parsed.command == "doctor":
        return doctor.doctor()
    if parsed.command == "profile":
        try:
            profile_script.profile_script(parsed)
        except OptionError as error:
            profile.error(str(error))
        return 0
    try:
        if missing := _missing_extras():
            print(f'{demo.prog}: needs {", ".join(missing)}: pip install "lowmem_higher[demo]"', file=sys.stderr)
            return _FAILED
        return _demo(parsed)
    except OptionError as error:
        demo.error(str(error))
    except KeyboardInterrupt:
        print(f"\n{demo.prog}: interrupted, nothing was saved", file=sys.stderr)
        return _INTERRUPTED


def _demo(parsed: argparse.Namespace) -> int:
    from lowmem_higher.demo import job  # needs the extras
    from lowmem_higher.demo.metalearning import DivergedError

    options = options_from(parsed)
    try:
        job.run(options)
    except (DivergedError, OSError) as error:
        print(f"python -m lowmem_higher demo: {error}", file=sys.stderr)
        return _FAILED
    return 0


def _missing_extras() -> list[str]:
    missing = []
    for module, package in _EXTRAS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return missing


if __name__ == "__main__":
    sys.exit(main())
