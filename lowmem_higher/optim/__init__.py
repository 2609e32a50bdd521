"""Differentiable optimizers: a pure update rule for each torch optimizer, and the table that pairs them."""

from lowmem_higher.optim.adadelta import DifferentiableAdadelta
from lowmem_higher.optim.adafactor import DifferentiableAdafactor
from lowmem_higher.optim.adagrad import DifferentiableAdagrad
from lowmem_higher.optim.adam import DifferentiableAdam, DifferentiableAdamW
from lowmem_higher.optim.adamax import DifferentiableAdamax
from lowmem_higher.optim.asgd import DifferentiableASGD
from lowmem_higher.optim.base import DifferentiableOptimizer
from lowmem_higher.optim.hyperparameters import apply_trainable_opt_params, get_trainable_opt_params
from lowmem_higher.optim.in_place import _add, _addcdiv, _addcmul, _get_mask_closure, _maybe_mask
from lowmem_higher.optim.muon import DifferentiableMuon
from lowmem_higher.optim.nadam import DifferentiableNAdam
from lowmem_higher.optim.radam import DifferentiableRAdam
from lowmem_higher.optim.registry import create_diff_optim, get_diff_optim, register_optim
from lowmem_higher.optim.rmsprop import DifferentiableRMSprop
from lowmem_higher.optim.rprop import DifferentiableRprop
from lowmem_higher.optim.sgd import DifferentiableSGD

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableMuon",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "_add",
    "_addcdiv",
    "_addcmul",
    "_get_mask_closure",
    "_maybe_mask",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]
