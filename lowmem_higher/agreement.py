"""Processes that run one loop together: what one of them decides, fails at or is told, all of them know.

Whatever depends on time or on a signal has to be decided by all at the same place, or their collectives would differ.
So each decision is a handshake (D5 of `distributed.py`) that carries two numbers: 48 bytes, and a rank that has come to
another place is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lowmem_higher import errors
from lowmem_higher.distributed import gathered, largest
from lowmem_higher.errors import RunDirectoryError


class Alone:
    """One process: it agrees with itself.

    Attributes:
        rank: Of this process.
        world: How many there are.
    """

    rank, world = 0, 1

    def most(self, what: str, first: float, second: float = 0.0) -> tuple[float, float]:
        """The largest of what the ranks say, number by number."""
        return first, second

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What one rank raises in the block is raised on all of them. There is no collective in the block."""
        yield


class Ranks(Alone):
    """The processes of a group.

    Args:
        group: The processes; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        on_cpu = "cpu:" in dist.get_backend_config(group)
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def most(self, what: str, first: float, second: float = 0.0) -> tuple[float, float]:
        """The largest of what the ranks say, number by number."""
        one, other = largest(self.group, what, self._device, (first, second))
        return one, other

    def told(self, what: str, value: Any) -> list[Any]:
        """What the ranks say, in their order."""
        return gathered(self.group, what, self._device, value)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What one rank raises in the block is raised on all of them. There is no collective in the block."""
        raised: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever it is, the others wait)
            raised = error
        if not any(self.most(what, raised is not None)):
            return
        said = self.told(f"the end of {what}", None if raised is None else (type(raised).__name__, str(raised)))
        if raised is not None:
            raise raised
        rank, (name, text) = next((rank, error) for rank, error in enumerate(said) if error is not None)
        raise getattr(errors, name, RunDirectoryError)(f"(rank {rank}) {text}")


def together_in(group: dist.ProcessGroup | None) -> Alone:
    """The processes that run a loop together."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return Ranks(group)
    return Alone()
