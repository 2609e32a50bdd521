"""Memory of this process, read while something runs: live bytes, resident size, what CUDA's allocator gave out.

psutil is imported if it is there. A meter is read by several threads; each reading is one number.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from lowmem_higher.testing import live_bytes

_SAMPLES = 2000


class Meter(Protocol):
    """Bytes now, and the most there were since the last look."""

    @property
    def name(self) -> str:
        """What is measured, for tables and JSON."""

    def now(self) -> int:
        """Bytes now."""

    def take(self) -> int:
        """The most bytes since the last call; the next call starts from now."""


class LiveBytes(live_bytes):
    """Tensor storages, exact; a storage that is resized in place counts when somebody reads `current`."""

    name = "live bytes"

    def now(self) -> int:
        """Bytes now."""
        return self._current

    def take(self) -> int:
        """The most bytes since the last call."""
        most, self._peak = self._peak, self._current
        return most


class ResidentBytes:
    """The resident size of the process, seen when somebody looks: give it to a `Sampler` as well.

    Raises:
        ImportError: psutil is not installed.
    """

    name = "resident size"

    def __init__(self) -> None:
        self._process: Any = importlib.import_module("psutil").Process()
        self._most = 0

    def now(self) -> int:
        """Bytes now."""
        size = int(self._process.memory_info().rss)
        self._most = max(self._most, size)
        return size

    def take(self) -> int:
        """The most bytes that any look has seen since the last call."""
        now = self.now()
        most, self._most = self._most, now
        return most


class AllocatedBytes:
    """What CUDA's allocator gave out, on the device that has given out most. Each look resets its peak statistics."""

    name = "CUDA allocator"

    def now(self) -> int:
        """Bytes now; 0 before CUDA is used."""
        return max(map(torch.cuda.memory_allocated, _devices()), default=0)

    def take(self) -> int:
        """The most bytes since the last call."""
        most = 0
        for device in _devices():
            most = max(most, torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        return most


def _devices() -> range:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


@contextmanager
def cuda_snapshot(path: Path | None) -> Iterator[None]:
    """Record each allocation of CUDA memory, and save a snapshot at the end: drop it on pytorch.org/memory_viz."""
    if path is None:
        yield
        return
    torch.cuda.init()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


class Sampler:
    """Looks at meters from a thread of its own, every few milliseconds, at most 2,000 times evenly.

    Attributes:
        samples: `(seconds, bytes of each meter)`, in order.

    Example:
        >>> with Sampler([LiveBytes()], seconds=0.001) as sampler:
        ...     time.sleep(0.1)
        >>> sampler.samples[0][1]
        [0]
    """

    def __init__(self, meters: Sequence[Meter], seconds: float = 0.005) -> None:
        self._meters, self._wait = meters, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.perf_counter()
        self.samples: list[tuple[float, list[int]]] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            self.samples.append((time.perf_counter() - self._began, [meter.now() for meter in self._meters]))
            if len(self.samples) == _SAMPLES:
                del self.samples[1::2]
                self._wait *= 2
            self._stop.wait(self._wait)

    def __enter__(self) -> Sampler:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
