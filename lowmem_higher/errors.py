"""The exceptions of this package, few and specific.

Bad arguments raise the built-in `TypeError` and `ValueError`. The classes here are for what only this package can
know: something the recorder could not follow, a replay that did not give what the user's code gave, a tensor that
changed since it was recorded, a derivative of a derivative through a checkpointed context.
"""

from __future__ import annotations


class LowmemError(RuntimeError):
    """Base of this package's own errors.

    Example:
        >>> issubclass(RecordError, LowmemError) and issubclass(LowmemError, RuntimeError)
        True
    """


class RecordError(LowmemError):
    """The step cannot be replayed, because the recorder did not see how a tensor was made (rule R9).

    The way out that always works is `diffopt.step(fn, *args)`: the engine then runs `fn` itself.
    """


class ReplayMismatchError(LowmemError):
    """A replayed step differs from what the user's code computed (rule R10)."""


class ExternalModifiedError(LowmemError):
    """A tensor that a recorded step reads was changed in place before the step was replayed (rule R4)."""


class HigherOrderError(LowmemError):
    """`create_graph=True` went through a checkpointed context, whose backward is first order."""


class NothingTrainedWarning(UserWarning):
    """An outer backward ended at the copies that `copy_initial_weights=True` makes, and at nothing else."""


class BatchesHeldWarning(UserWarning):
    """What steps read from outside is held for the outer backward alone, and takes more than the kept carries.

    Given once in a context, at a step, with `store="device"`. A batch that is cut from a resident dataset inside the
    loop is not held, nor is what `diffopt.step(fn, idx)` fetches.
    """


class MixedFallbackWarning(UserWarning):
    """A step program could not be pulled back with `pullback="mixed"`, and is pulled back by reverse mode instead."""


class CompileFallbackWarning(UserWarning):
    """Under `compile=True` some steps are not compiled; the message says why."""


class HistoryFreedError(LowmemError):
    """A step's record was asked for after a backward pass without `retain_graph=True` had freed it (rule R11)."""


class RanksDifferError(LowmemError):
    """The processes of a group are not at the same place of the same loop, or do not hold the same weights."""


class MemoryBudgetError(LowmemError):
    """A loop cannot run within its `memory_budget`, not even with one checkpoint."""


class StoreError(LowmemError):
    """A carry, a journal or a batch could not be put into its store, or did not come back with the bits that it had.

    Its cause, an `OSError` as a rule, is in `__cause__`.
    """


class RunDirectoryError(LowmemError):
    """A `run_dir` cannot be gone on from: another process works in it, it is another run's, its manifest is damaged."""


class DamagedFileWarning(UserWarning):
    """A file of a `run_dir` did not hold what was written; the run goes on from an earlier one: slower, and exact."""
