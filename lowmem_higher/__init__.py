"""Exact meta-gradients through long inner loops, in memory that does not grow with the number of steps.

`import lowmem_higher as higher`, add `checkpoint_every=10` to `innerloop_ctx`, and change nothing else.
"""

from lowmem_higher import errors, optim, patch, testing
from lowmem_higher.errors import (
    ExternalModifiedError,
    HigherOrderError,
    HistoryFreedError,
    LowmemError,
    RecordError,
    ReplayMismatchError,
)
from lowmem_higher.innerloop import innerloop_ctx
from lowmem_higher.optim import create_diff_optim, get_diff_optim, register_optim
from lowmem_higher.report import Report

__version__ = "0.1.0"

__all__ = [
    "ExternalModifiedError",
    "HigherOrderError",
    "HistoryFreedError",
    "LowmemError",
    "RecordError",
    "ReplayMismatchError",
    "Report",
    "create_diff_optim",
    "errors",
    "get_diff_optim",
    "innerloop_ctx",
    "optim",
    "patch",
    "register_optim",
    "testing",
]
