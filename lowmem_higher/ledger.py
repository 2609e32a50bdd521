"""Counts what a run costs: runs of steps, carries and externals that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from itertools import chain

from torch import Tensor

from lowmem_higher.report import Report, Timeline
from lowmem_higher.step import Carry, Journal
from lowmem_higher.structure import storages_of


def _nothing() -> None:
    return None


class Ledger:
    """Counts runs, and the bytes of the carries that are alive."""

    def __init__(self) -> None:
        self.steps = self.unrolled_steps = self.first_order_runs = self.second_order_runs = 0
        self.checkpoints = self.checkpoints_peak = 0
        self.carry_bytes = self.carries_bytes = self.carries_peak_bytes = 0
        self.externals_bytes = self.newest_externals_bytes = 0  # the latter: what the newest record has added
        self.update_runs = self.journal_bytes = 0
        self.stored_bytes = self.stored_peak_bytes = 0
        self.forward_seconds = self.backward_seconds = 0.0
        self._storages: Counter[tuple[int, int]] = Counter()
        self._timeline = Timeline()
        self.on_run: Callable[[], None] = _nothing  # after each run of a step

    def keep(self, carry: Carry) -> Carry:
        """Count a carry on the device until it is freed."""
        size = carry.nbytes
        self._add_carry(size)
        self.carry_bytes = max(self.carry_bytes, size)
        weakref.finalize(carry, self._add_carry, -size).atexit = False
        return carry

    def _add_carry(self, size: int) -> None:
        self.carries_bytes += size
        self.carries_peak_bytes = max(self.carries_peak_bytes, self.carries_bytes)

    def count_checkpoint(self, held: object) -> None:
        """Count a kept carry, wherever it is, until what stands for it is freed."""
        self._add_checkpoints(1)
        weakref.finalize(held, self._add_checkpoints, -1).atexit = False

    def _add_checkpoints(self, count: int) -> None:
        self.checkpoints += count
        self.checkpoints_peak = max(self.checkpoints_peak, self.checkpoints)

    def count_stored(self, stored: object, size: int) -> None:
        """Count bytes on host or disk until what stands for them is freed."""
        self._add_stored(size)
        weakref.finalize(stored, self._add_stored, -size).atexit = False

    def _add_stored(self, size: int) -> None:
        self.stored_bytes += size
        self.stored_peak_bytes = max(self.stored_peak_bytes, self.stored_bytes)

    def write(self, journal: Journal) -> Journal:
        """Count a step's journal until it is freed."""
        self.journal_bytes += journal.nbytes
        weakref.finalize(journal, self._forget, journal.nbytes).atexit = False
        return journal

    def _forget(self, size: int) -> None:
        self.journal_bytes -= size

    def count_first_order(self) -> None:
        """Count a first-order run."""
        self.first_order_runs += 1
        self.on_run()

    def count_second_order(self) -> None:
        """Count a second-order run."""
        self.second_order_runs += 1
        self.on_run()

    def count_unrolled(self, *, twice: bool) -> None:
        """Count a step of the full unroll, which runs once, with its graph."""
        (self.count_second_order if twice else self.count_first_order)()
        self.unrolled_steps += 1
        self.steps += 1

    def count_update(self) -> None:
        """Count a carry got by the update rule alone."""
        self.update_runs += 1
        self.on_run()

    def hold(self, externals: list[Tensor]) -> None:
        """Count the storages that a record refers to, each once."""
        before = self.externals_bytes
        for storage in chain.from_iterable(map(storages_of, externals)):
            key = (storage.data_ptr(), storage.nbytes())
            self._storages[key] += 1
            if self._storages[key] == 1:
                self.externals_bytes += storage.nbytes()
        self.newest_externals_bytes = self.externals_bytes - before

    def release(self, externals: list[Tensor]) -> None:
        """Count them off again."""
        for storage in chain.from_iterable(map(storages_of, externals)):
            key = (storage.data_ptr(), storage.nbytes())
            self._storages[key] -= 1
            if self._storages[key] == 0:
                del self._storages[key]
                self.externals_bytes -= storage.nbytes()

    def sample(self, phase: str, step: int) -> None:
        """Note what is held now."""
        self._timeline.add(phase, step, self.carries_bytes + self.externals_bytes)

    def report(self) -> Report:
        """The counts as a value."""
        return Report(
            self.steps,
            self.first_order_runs,
            self.second_order_runs,
            self.checkpoints,
            self.checkpoints_peak,
            self.carry_bytes,
            self.carries_peak_bytes,
            self.externals_bytes,
            self.forward_seconds,
            self.backward_seconds,
            self.update_runs,
            self.journal_bytes,
            self.stored_bytes,
            self.stored_peak_bytes,
            self.unrolled_steps,
            self._timeline.samples(),
        )
