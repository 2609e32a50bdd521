"""Writing the result of an inner loop back into the model and its torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def write_back(
    fmodel: nn.Module,
    state: Sequence[Mapping[int, Mapping[str, Any]]],
    places: Sequence[Sequence[int]],
    model: nn.Module,
    opt: torch.optim.Optimizer | None,
) -> None:
    """Write fast weights, buffers and optimizer state into `model` and `opt`; see `DifferentiableOptimizer.commit`.

    Args:
        fmodel: The functional model.
        state: The optimizer state, by parameter group and position in it.
        places: For each group, the index of each of its parameters among the model's.
        model: What is written into.
        opt: The torch optimizer, or None.
    """
    params = list(model.named_parameters())
    weights = list(fmodel.parameters())
    if len(params) != len(weights):
        raise ValueError(
            f"The model has {len(params)} parameters and the functional model {len(weights)}. Commit to the model that "
            "innerloop_ctx was given: diffopt.commit(model, opt)."
        )
    for (name, param), weight in zip(params, weights, strict=True):
        _check(name, param, weight)
    own, buffers = _buffers(model), _buffers(fmodel)
    if own.keys() != buffers.keys():
        names = ", ".join(sorted(own.keys() ^ buffers.keys()))
        raise ValueError(
            f"Model and functional model differ in their buffers: {names}. Commit to the model that innerloop_ctx was "
            "given, diffopt.commit(model, opt), and register buffers before the context."
        )
    for name, buffer in buffers.items():
        if buffer is not None and own[name] is not None:
            _check(name, own[name], buffer)
    if opt is not None:
        _check_optimizer(opt, [param for _, param in params], places, state)
    with torch.no_grad():
        for (_, param), weight in zip(params, weights, strict=True):
            param.copy_(weight)
        for name, buffer in buffers.items():
            before = own[name]
            if before is not None and buffer is not None:
                before.copy_(buffer)
            elif before is not buffer:  # set or taken away inside the loop
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._buffers[leaf] = None if buffer is None else buffer.detach().clone()
    if opt is not None:
        for group, entries in zip(opt.param_groups, state, strict=True):
            for position, param in enumerate(group["params"]):
                before = opt.state.pop(param, {})
                if entries.get(position):
                    opt.state[param] = {
                        key: _as_torch_keeps(value, before.get(key), param, group)
                        for key, value in entries[position].items()
                    }


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
    }


def _check(name: str, old: Tensor | None, new: Tensor) -> None:
    if old is not None and (old.shape != new.shape or old.dtype != new.dtype):
        raise ValueError(
            f"{name} is {old.dtype} of shape {tuple(old.shape)} in the model, and {new.dtype} of shape "
            f"{tuple(new.shape)} after the loop. Commit to the model that innerloop_ctx was given: "
            "diffopt.commit(model, opt)."
        )


def _check_optimizer(
    opt: torch.optim.Optimizer,
    params: Sequence[Tensor],
    places: Sequence[Sequence[int]],
    state: Sequence[Mapping[int, Mapping[str, Any]]],
) -> None:
    held = [[id(param) for param in group["params"]] for group in opt.param_groups]
    if held != [[id(params[index]) for index in indices] for indices in places]:
        raise ValueError(
            "The optimizer does not hold the model's parameters in the groups of the one that the context was opened "
            "with, so its state cannot be told apart. Commit to that optimizer, or to none: diffopt.commit(model)."
        )
    for group, entries in zip(opt.param_groups, state, strict=True):
        for position, entry in entries.items():
            for key, value in entry.items():
                before = opt.state.get(group["params"][position], {}).get(key)
                if isinstance(value, Tensor) and isinstance(before, Tensor) and before.ndim:
                    _check(f"The optimizer's {key}", before, value)


def _as_torch_keeps(value: Any, before: Any, param: Tensor, group: Mapping[str, Any]) -> Any:
    """A part of our state as torch.optim holds it: detached, and counts as tensors of their own dtype."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(before, Tensor):
            return torch.full_like(before, value)
        fused, capturable = group.get("fused"), group.get("capturable")
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
        return torch.tensor(float(value), dtype=dtype, device=param.device if fused or capturable else "cpu")
    if isinstance(value, Tensor):
        return value.detach().to(before if isinstance(before, Tensor) else param.device, copy=True)
    return value
