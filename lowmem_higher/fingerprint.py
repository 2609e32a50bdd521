"""What tells one run from another: a resume must not mix two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher.agreement import Alone
from lowmem_higher.loop_function import LoopFunction
from lowmem_higher.replay_state import ModuleState
from lowmem_higher.settings import Settings
from lowmem_higher.step_log import checksum_of
from lowmem_higher.structure import is_dtensor, layout_of

_MATTERS_NOT = ("progress", "store", "steps")
_SHOWN = 200  # characters of a value in a message

Fingerprint = dict[str, Any]


def fingerprint_of(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int,
    settings: Settings,
    context: Mapping[str, Any],
    function: LoopFunction,
    ranks: Alone,
) -> Fingerprint:
    """What a run is made of, as plain values: names, shapes, numbers, and checksums of tensors."""
    named = list(model.named_parameters())
    params = [param for _, param in named]
    place = {id(param): index for index, param in enumerate(params)}
    attributes = ModuleState.capture(list(model.modules())).plain
    groups = [
        {**_plain(group, skip="params"), "params": [place.get(id(param)) for param in group["params"]]}
        for group in opt.param_groups
    ]
    state = [[place[id(param)], _plain(entry)] for param, entry in opt.state.items() if id(param) in place]
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        "torch version": torch.__version__,
        "model": _name(type(model)),
        "parameters": {name: _kind(param) + (" trained" if param.requires_grad else "") for name, param in named},
        "initial weights": checksum_of(params),
        "buffers": {name: _kind(buffer) for name, buffer in model.named_buffers()},
        "initial buffers": checksum_of(list(model.buffers())),
        "attributes of the modules": checksum_of(attributes),
        "optimizer": _name(type(opt)),
        "options of the optimizer": groups,
        "state of the optimizer": state,
        "steps": steps,
        "settings": {name: _shown(value) for name, value in chosen.items() if name not in _MATTERS_NOT},
        "override": _shown(context["override"]),
        "device": str(context["device"]),
        "default dtype": str(torch.get_default_dtype()),
        "meta": {name: _shown(tensor) for name, tensor in zip(function.names, function.tensors, strict=True)},
        "batches": len(function.batches) if hasattr(function.batches, "__len__") else "a function",
        "loss_fn": _name(function.loss_fn),
        "grad_callback": None if function.grad_callback is None else _name(function.grad_callback),
        "processes": None if ranks.world == 1 else ranks.world,
        "rank": None if ranks.world == 1 else ranks.rank,
        "outer": {str(step): _name(fn) for step, fn in function.terms.items()},
    }


def differences(saved: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs, in words."""
    found = []
    for key in {**saved, **now}:
        before, after = saved.get(key), now.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            parts = [part for part in {**before, **after} if before.get(part) != after.get(part)]
            found += [f"{key}, {part}: {_short(before.get(part))}, now {_short(after.get(part))}" for part in parts]
        else:
            found.append(f"{key}: {_short(before)}, now {_short(after)}")
    return found


def _plain(entry: Mapping[str, Any], skip: str = "") -> dict[str, Any]:
    return {str(key): _shown(value) for key, value in entry.items() if key != skip}


def _shown(value: Any) -> Any:
    """A value that JSON can hold, and that is equal for equal values."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # nan is not equal to itself
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"{_kind(value)} with checksum {checksum_of(value):08x}"
    if isinstance(value, Mapping):
        return {str(key): _shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return _name(value)


def _kind(tensor: Tensor) -> str:
    spread = f", {layout_of(tensor)}" if is_dtensor(tensor) else ""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device.type}{spread}"


def _name(value: Any) -> str:
    if not hasattr(value, "__qualname__"):
        value = type(value)
    return f"{value.__module__}.{value.__qualname__}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
