"""Standing in for `higher`: code that says `import higher` runs on this package."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType

import lowmem_higher

_NAMES = {"higher": "", "higher.optim": "optim", "higher.patch": "patch", "higher.utils": "utils"}


class StandIn:
    """Undoes `install_as_higher`, at the end of a `with` block or by `uninstall()`."""

    def __init__(self, installed: dict[str, ModuleType]) -> None:
        self._installed = installed

    def uninstall(self) -> None:
        """Let `import higher` mean what it meant before; modules that have imported it keep what they got."""
        for name, module in self._installed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install_as_higher() -> StandIn:
    """Make `import higher`, `higher.patch`, `higher.optim` and `higher.utils` mean this package, in this process.

    Call it before anything imports `higher`. Code that cannot be edited then runs here in the full unroll, with
    `higher`'s memory; `checkpoint_every=` in its call of `innerloop_ctx` is still what saves memory.

    Returns:
        A `StandIn`: call its `uninstall()`, or use it in a `with` statement. A second call changes nothing.

    Raises:
        ImportError: The real `higher` was imported before; the modules that did so would go on using it.

    Example:
        >>> import sys, lowmem_higher
        >>> real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "higher"}
        >>> with lowmem_higher.install_as_higher():  # in a program of your own, before the first `import higher`
        ...     import higher
        >>> higher.innerloop_ctx is lowmem_higher.innerloop_ctx
        True
        >>> sys.modules.update(real)
    """
    modules = {name: getattr(lowmem_higher, part) if part else lowmem_higher for name, part in _NAMES.items()}
    other = [name for name, module in modules.items() if sys.modules.get(name, module) is not module]
    if other:
        raise ImportError(
            f"{other[0]} was imported already, so what has imported it would go on using it beside this package. Call "
            "lowmem_higher.install_as_higher() first, at the top of the program."
        )
    new = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(new)
    return StandIn(new)
