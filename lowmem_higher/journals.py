"""Where the journals of steps are: the newest one on the device, the others in the store, if there is one.

A replay reads a journal once for each carry that it recomputes, and does not hold it: see NOTE [ Hot and cold ].
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants
from lowmem_higher.step import HeldJournal, Journal
from lowmem_higher.store import Store, Stored


@dataclass(eq=False)
class Written:
    """The journal of step `time`, on the device or in a store."""

    time: int
    journal: Journal | None
    stored: Stored[Journal] | None = None

    def get(self) -> Journal:
        """The journal, on the device."""
        if self.journal is None:
            assert self.stored is not None
            return self.stored.get()
        self.journal.check_unmodified(self.time)
        return self.journal

    def cool(self, store: Store, constants: Constants) -> None:
        """Leave it to the store alone. One that was modified in place stays, and raises when it is asked for."""
        if self.journal is not None and self.journal.modified is None:
            self.stored = store.put(self.journal, self.time, constants)
            self.journal = None


class Journals:
    """Holds what `journal=True` keeps of each step.

    Args:
        store: Where all but the newest go; None leaves them where they are.
        constants: What all carries have in common, which is not stored.
        ledger: Counts them.
    """

    def __init__(self, store: Store | None, constants: Constants, ledger: Ledger) -> None:
        self._store = None if store is None else store.beside()
        self._constants, self._ledger = constants, ledger
        self._newest: weakref.ref[Written] | None = None

    def hold(self, journal: Journal, time: int) -> HeldJournal:
        """Hold the journal of step `time` for as long as what is returned is held.

        Raises:
            StoreError: The one before it could not be put into the store.
        """
        before = None if self._newest is None else self._newest()
        if self._store is not None and before is not None:
            before.cool(self._store, self._constants)
        written = Written(time, self._ledger.keep(journal))
        self._newest = weakref.ref(written)
        return written
