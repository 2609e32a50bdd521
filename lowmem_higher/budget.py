"""A budget of memory: read from a keyword, and shared out between whole graphs of steps and kept carries.

NOTE [ Graphs or carries ]

A step whose graph is kept needs no other run: it costs what it costs in the full unroll. A step that starts from a kept
carry is run once more, the others are replayed as well, unless their graphs are built from that carry too, for a while,
in the backward. A graph takes many times the bytes of a carry.

If the number of steps is known, splits are tried, and the one with the fewest runs is taken. If it is not known, half
of the budget goes to graphs of the first steps, so that a loop that turns out to be short costs no more than the full
unroll; the rest to carries and to graphs of the backward, in equal parts, which serve the most steps without a replay.

Batches that a loop hands in from outside are held until the backward, and count. Room is left for them where the number
of steps is known; where it is not, carries give way while the loop runs. In both cases at least half of the slots stay:
with very few of them the runs grow with the square of the steps, and no number of slots makes room for batches that
fill the budget alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lowmem_higher.errors import MemoryBudgetError
from lowmem_higher.report import format_bytes
from lowmem_higher.schedule import optimal_runs

_SPLITS = 64  # that are tried


@dataclass(frozen=True)
class Sizes:
    """Bytes, measured on one step.

    Attributes:
        carry: Fast weights, optimizer state, buffers.
        graph: What a step of the full unroll keeps besides its batch.
        pullback: The peak of differentiating a step.
        batch: What a step holds that no earlier one did.
    """

    carry: int
    graph: int
    pullback: int
    batch: int = 0

    @property
    def least(self) -> int:
        """What one checkpoint needs."""
        return 4 * self.carry + self.pullback


@dataclass(frozen=True)
class Allotment:
    """How a budget is spent.

    Attributes:
        unrolled: Steps that keep their graphs.
        checkpoints: Carries held for the others.
        graphs: Of these others, how many graphs are built at once in the backward.
        spare: Bytes left for batches.

    Example:
        >>> Allotment(unrolled=0, checkpoints=9, graphs=1, spare=10).give_way(batches=30, carry=10)
        7
    """

    unrolled: int
    checkpoints: int
    graphs: int = 1
    spare: int = 0

    def give_way(self, batches: int, carry: int) -> int:
        """The carries that may be held beside so many bytes of batches."""
        fewer = self.checkpoints - math.ceil(max(0, batches - self.spare) / carry)
        return max(fewer, math.ceil(self.checkpoints / 2))


@functools.lru_cache(maxsize=64)
def allot(limit: int, sizes: Sizes, steps: int | None = None, held: int = 0) -> Allotment:
    """Share out `limit` bytes; see NOTE [ Graphs or carries ].

    Args:
        limit: Bytes.
        sizes: Of one step.
        steps: The number of steps to come, if it is known.
        held: Carries that are held already.

    Raises:
        MemoryBudgetError: One checkpoint does not fit.

    Example:
        >>> sizes = Sizes(carry=1, graph=10, pullback=16)
        >>> allot(220, sizes, steps=20)
        Allotment(unrolled=20, checkpoints=1, graphs=1, spare=0)
        >>> allot(220, sizes)
        Allotment(unrolled=10, checkpoints=51, graphs=6, spare=0)
        >>> allot(220, sizes, steps=1000)
        Allotment(unrolled=0, checkpoints=131, graphs=8, spare=0)
    """
    least = sizes.least + held * sizes.carry
    room = limit - least
    if room < 0:
        raise MemoryBudgetError(
            f"memory_budget={format_bytes(limit)} is too small for this loop, which takes at least "
            f"{format_bytes(least)}: {format_bytes(sizes.pullback)} to differentiate one step, and some carries of "
            f"{format_bytes(sizes.carry)}. Give that much, memory_budget={least}, or make the graph of a step smaller "
            "with a smaller batch."
        )
    graph = sizes.graph + sizes.batch
    if steps is None:
        unrolled = room // 2 // graph
        more = room // 4 // sizes.graph
        return Allotment(unrolled, 1 + (room - unrolled * graph - more * sizes.graph) // sizes.carry, 1 + more)

    def split(unrolled: int, graphs: int) -> tuple[bool, int, Allotment] | None:
        left = room - unrolled * graph - (graphs - 1) * sizes.graph
        if left < 0:
            return None
        batches = (steps - unrolled) * sizes.batch
        spare = min(left // 2, batches)
        found = Allotment(unrolled, 1 + (left - spare) // sizes.carry, graphs, spare)
        runs = 0 if unrolled == steps else optimal_runs(steps - unrolled, found.checkpoints, graphs)
        return spare < batches, runs, found

    most = min(steps, room // graph)
    unrolled_tried = sorted({most * part // _SPLITS for part in range(_SPLITS + 1)})
    graphs_tried = [2**power for power in range(steps.bit_length())]
    tried = itertools.starmap(split, itertools.product(unrolled_tried, graphs_tried))
    return min(filter(None, tried), key=operator.itemgetter(0, 1))[2]


_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(["", "K", "M", "G", "T"])}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate(["K", "M", "G", "T"], 1)}


def parse_budget(amount: float | str) -> int | float:
    """Bytes out of a number or of a text with a unit; a number between 0 and 1 stays the fraction that it is.

    Raises:
        ValueError: It cannot be read, or is not above 0.

    Example:
        >>> parse_budget("1.5 GiB"), parse_budget("2MB"), parse_budget(4096), parse_budget(0.5)
        (1610612736, 2000000, 4096, 0.5)
    """
    if isinstance(amount, float) and 0 < amount < 1:
        return amount
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([A-Z]*)", str(amount).strip().upper().replace("E", "e"))
    try:
        if found is not None and (size := int(float(found[1]) * _UNITS[found[2]])) > 0:
            return size
    except (KeyError, ValueError, OverflowError):
        pass
    raise ValueError(
        f"memory_budget={amount!r} is no amount of memory; give bytes, a text such as memory_budget='2GiB' "
        "(B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), or a fraction of the free memory, memory_budget=0.5."
    )


def budget_bytes(amount: float | str, model: nn.Module) -> int:
    """A budget in bytes; of a fraction, that of what is free now on the device of the model.

    Raises:
        ValueError: It cannot be read, or is a fraction of what nobody knows.
    """
    found = parse_budget(amount)
    if isinstance(found, int):
        return found
    free = free_bytes(model)
    if free is None:
        raise ValueError(
            f"memory_budget={amount!r} is a fraction of the free memory, which is not known for this device. Give "
            "bytes, or a text such as memory_budget='2GiB'."
        )
    return int(found * free)


def free_bytes(model: nn.Module) -> int | None:
    """What is free on the device of the model; None where that is not known."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    table = Path("/proc/meminfo")
    if device.type != "cpu" or sys.platform != "linux" or not table.exists():
        return None
    found = re.search(r"^MemAvailable: *(\d+) kB", table.read_text(encoding="ascii"), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
