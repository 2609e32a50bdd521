"""`python -m lowmem_higher profile script.py`: runs a script as python would, and measures every inner loop in it."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from lowmem_higher.demo.options import OptionError
from lowmem_higher.meters import AllocatedBytes, LiveBytes, Meter, ResidentBytes, cuda_snapshot
from lowmem_higher.profile import Profile
from lowmem_higher.stand_in import install_as_higher

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `profile` to a parser."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="save all figures, with a sample of them over time")
    add("--picture", type=Path, metavar="FILE", help="draw memory over time, for example run.png; needs matplotlib")
    add(
        "--snapshot",
        type=Path,
        metavar="FILE",
        help="CUDA: record each allocation, for the memory viewer at pytorch.org/memory_viz",
    )
    add(
        "--no-live-bytes",
        action="store_true",
        help="do not count live bytes of tensors, which takes about 20 microseconds for each of torch's operations; "
        "seconds are then the script's own",
    )
    add("--as-higher", action="store_true", help="let `import higher` in the script mean lowmem_higher")
    add("script", type=Path, metavar="script.py", help="the program to run")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def profile_script(parsed: argparse.Namespace) -> None:
    """Runs the script; then, however it ended, prints the profile on stderr and saves what was asked for.

    Raises:
        OptionError: An option cannot be used; nothing was run.
        BaseException: What the script raised, `SystemExit` and `KeyboardInterrupt` too.
    """
    script: Path = parsed.script
    code = _compiled(script)
    for name in ("json", "picture", "snapshot"):
        setattr(parsed, name, _writable(f"--{name}", getattr(parsed, name)))
    if parsed.picture is not None:
        _check_picture(parsed.picture)
    if parsed.snapshot is not None and not torch.cuda.is_available():
        raise OptionError(
            "argument --snapshot: no CUDA device here; --json and --picture show live bytes on any device"
        )
    meters = _meters(live=not parsed.no_live_bytes)
    profile = Profile(meters)
    try:
        with ExitStack() as stack:
            if parsed.as_higher:
                stack.enter_context(install_as_higher())
            stack.enter_context(cuda_snapshot(parsed.snapshot))
            module = stack.enter_context(_as_main(script, parsed.arguments))
            stack.enter_context(profile.watching())
            for meter in meters:
                if isinstance(meter, LiveBytes):
                    stack.enter_context(meter)
            exec(code, vars(module))
    except (Exception, KeyboardInterrupt):
        sys.excepthook = _without_ours(sys.excepthook, str(script.absolute()))
        raise
    finally:
        _finish(profile, parsed)


def _finish(profile: Profile, parsed: argparse.Namespace) -> None:
    print(f"\nprofile of {parsed.script}: {profile}", file=sys.stderr)
    live = any(isinstance(meter, LiveBytes) for meter in profile.meters)
    if live:
        print("seconds include the counting of live bytes; --no-live-bytes shows the script's own", file=sys.stderr)
    try:
        if parsed.json is not None:
            values = {
                "script": parsed.script.name,
                "arguments": parsed.arguments,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                **profile.as_dict(),
            }
            parsed.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if parsed.picture is not None:
            profile.plot(parsed.picture)
    except OSError as error:
        print(f"python -m lowmem_higher profile: nothing could be saved: {error}", file=sys.stderr)


def _meters(*, live: bool) -> list[Meter]:
    meters: list[Meter] = []
    try:
        meters.append(ResidentBytes())
    except ImportError:
        print("the resident size is left out: pip install psutil", file=sys.stderr)
    if live:
        meters.append(LiveBytes())
    if torch.cuda.is_available():
        meters.append(AllocatedBytes())
    return meters


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """A new module `__main__`, with `sys.argv` and `sys.path` as python would set them."""
    path = str(script.absolute())
    module = ModuleType("__main__")
    vars(module).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    argv, paths, main = sys.argv, sys.path, sys.modules["__main__"]
    sys.argv, sys.modules["__main__"] = [str(script), *arguments], module
    if not sys.flags.safe_path:
        sys.path = [str(script.resolve().parent), *paths[1:]]
    try:
        yield module
    finally:
        sys.argv, sys.path, sys.modules["__main__"] = argv, paths, main


def _compiled(script: Path) -> Any:
    path = str(script.absolute())
    loader = SourceFileLoader("__main__", path)
    try:
        return loader.source_to_code(loader.get_data(path), path)
    except OSError as error:
        raise OptionError(f"cannot read {str(script)!r}: {error.strerror}") from error
    except SyntaxError:
        sys.excepthook = _without_ours(sys.excepthook, path)
        raise


def _without_ours(hook: _Hook, path: str) -> _Hook:
    """A traceback that begins in the script, as if python had run it."""

    def short(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        begin = trace
        while begin is not None and begin.tb_frame.f_code.co_filename != path:
            begin = begin.tb_next
        if begin is None and not isinstance(error, SyntaxError):
            begin = trace
        return hook(kind, error.with_traceback(begin), begin)

    return short


def _writable(option: str, path: Path | None) -> Path | None:
    """The absolute path, since the script may go elsewhere."""
    if path is None:
        return None
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OptionError(f"argument {option}: cannot write to {str(path)!r}: {error.strerror}") from error
    if path.is_dir():
        raise OptionError(f"argument {option}: {str(path)!r} is a directory; name a file in it")
    return path.absolute()


def _check_picture(path: Path) -> None:
    try:
        backend = importlib.import_module("matplotlib.backend_bases")
    except ImportError as error:
        raise OptionError('argument --picture: needs matplotlib: pip install "lowmem_higher[plot]"') from error
    kinds = backend.FigureCanvasBase.filetypes
    if path.suffix[1:].lower() not in kinds:
        raise OptionError(f"argument --picture: no picture ends in {path.suffix!r}; choose from {', '.join(kinds)}")
