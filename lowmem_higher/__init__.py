"""Exact meta-gradients through long inner loops, in memory that does not grow with the number of steps.

`import lowmem_higher as higher`, add `checkpoint_every=10` to `innerloop_ctx`, and change nothing else.
"""

from lowmem_higher import distributed, errors, optim, patch, testing, utils
from lowmem_higher.clip import clip_grad_norm, clip_grad_value
from lowmem_higher.errors import (
    BatchesHeldWarning,
    CompileFallbackWarning,
    DamagedFileWarning,
    ExternalModifiedError,
    HigherOrderError,
    HistoryFreedError,
    LowmemError,
    MemoryBudgetError,
    MixedFallbackWarning,
    NothingTrainedWarning,
    RanksDifferError,
    RecordError,
    ReplayMismatchError,
    RunDirectoryError,
    StoreError,
)
from lowmem_higher.innerloop import innerloop_ctx
from lowmem_higher.metagradient import MetaGradient, metagradient
from lowmem_higher.optim import create_diff_optim, get_diff_optim, register_optim
from lowmem_higher.patch import monkeypatch
from lowmem_higher.plan import Plan, plan
from lowmem_higher.report import Report
from lowmem_higher.stand_in import install_as_higher

__version__ = "0.1.0"

__all__ = [
    "BatchesHeldWarning",
    "CompileFallbackWarning",
    "DamagedFileWarning",
    "ExternalModifiedError",
    "HigherOrderError",
    "HistoryFreedError",
    "LowmemError",
    "MemoryBudgetError",
    "MetaGradient",
    "MixedFallbackWarning",
    "NothingTrainedWarning",
    "Plan",
    "RanksDifferError",
    "RecordError",
    "ReplayMismatchError",
    "Report",
    "RunDirectoryError",
    "StoreError",
    "clip_grad_norm",
    "clip_grad_value",
    "create_diff_optim",
    "distributed",
    "errors",
    "get_diff_optim",
    "innerloop_ctx",
    "install_as_higher",
    "metagradient",
    "monkeypatch",
    "optim",
    "patch",
    "plan",
    "register_optim",
    "testing",
    "utils",
]
