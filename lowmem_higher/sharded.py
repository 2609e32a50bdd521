"""Models under FSDP2 (`torch.distributed.fsdp.fully_shard`): fast weights as shards, gathered while a module runs.

NOTE [ FSDP2 without its hooks ]

`fully_shard` makes each parameter a DTensor, of which a process holds a shard, and registers hooks that put gathered
weights of its own in place while a module runs. Those are the model's weights, not the fast weights, and the
collectives of these hooks are no part of a graph. So the copies of a model that an fmodel and its replays run lose
these hooks and get others that do the same to whatever weights are in place: before a unit runs, its shards are
gathered, differentiably, and after it the shards are back. A unit is what `fully_shard` was called on, without the
units inside.

The gradient of a gathered weight is another one on each process, and their mean belongs to the shard. That is how FSDP2
defines it, and it is written as DTensor's placement Partial("avg"), whose derivatives are DTensor's: a gather's
backward is a reduce-scatter, and that one's a gather.

So what is held for the backward (carries, journals) is this process's part alone. The graph of a step holds the
gathered weights of that step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowmem_higher.structure import is_dtensor

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The submodules that `fully_shard` was called on."""
    return [part for part in model.modules() if own_class(part) is not type(part)]


def own_class(part: nn.Module) -> type[nn.Module]:
    """The class of a module, before `fully_shard` changed it."""
    classes = type(part).__mro__
    for mixed_in, own in itertools.pairwise(classes):
        if mixed_in.__name__ == "FSDPModule" and mixed_in.__module__.startswith("torch.distributed"):
            return own
    return type(part)


def reshard(model: nn.Module) -> None:
    """Let the parameters of a model under FSDP2 be its shards, which they are not after every forward.

    Raises:
        TypeError: It is sharded in a way that fast weights cannot follow; the message names the way.
    """
    units: list[Any] = units_of(model)
    for unit in units:
        unit.reshard()
        policy = getattr(getattr(unit._get_fsdp_state(), "_fsdp_param_group", None), "mp_policy", None)
        if any(getattr(policy, name, None) for name in ("param_dtype", "reduce_dtype", "output_dtype")):
            raise TypeError(
                "The model was sharded with a MixedPrecisionPolicy, whose casts are hooks that fast weights do not "
                "pass through. Shard it without one, fully_shard(model), and run the loop under torch.autocast."
            )
    for parameter in model.parameters() if units else ():
        placements = getattr(parameter, "placements", ())
        if sum(placement.is_shard() for placement in placements) > 1:
            raise TypeError(
                f"A parameter is sharded in two ways ({placements}), by fully_shard and by tensor parallelism, and an "
                "inner loop can gather over one of them only. Use one of both: fully_shard(model) without "
                "parallelize_module(...)."
            )


def gather_at_calls(model: nn.Module, copies: dict[int, Any]) -> None:
    """Let the copies of the units of a model gather their shards while they run; see the note above.

    Args:
        model: The model.
        copies: By `id` of each of its modules, the copy.
    """
    for unit in units_of(model):
        copy = copies[id(unit)]
        for name in _HOOKS:
            hooks = copy.__dict__[name]
            for key in [key for key, hook in hooks.items() if _is_of_fsdp(hook)]:
                del hooks[key]
        for name in [name for name in copy.__dict__ if "composable_api_state_key" in name]:
            del copy.__dict__[name]
        gathering = _Gathering([(weakref.ref(copies[id(part)]), name) for part, name in _own_parameters(unit)])
        copy.register_forward_pre_hook(gathering.gather)
        copy.register_forward_hook(gathering.put_back, always_call=True)


def _is_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")


def _own_parameters(unit: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    inside = {id(part) for other in units_of(unit) if other is not unit for part in other.modules()}
    for part in unit.modules():
        if id(part) not in inside:
            for name, parameter in part._parameters.items():
                if parameter is not None and is_dtensor(parameter):
                    yield part, name


class _Gathering:
    """Puts gathered weights in place before a unit runs, and the shards back after it."""

    def __init__(self, places: list[tuple[weakref.ref[nn.Module], str]]) -> None:
        self._places = places
        self._shards: list[list[Any]] = []

    def gather(self, unit: nn.Module, args: Any) -> None:
        """Before the unit runs."""
        self._shards.append([self._module(place)._parameters[place[1]] for place in self._places])
        gathered: dict[int, Tensor] = {}
        for place, shard in zip(self._places, self._shards[-1], strict=True):
            if shard is not None and is_dtensor(shard):
                if id(shard) not in gathered:
                    gathered[id(shard)] = _whole(shard)
                self._module(place)._parameters[place[1]] = gathered[id(shard)]  # type: ignore[assignment]
        self._refresh()

    def put_back(self, unit: nn.Module, args: Any, output: Any) -> None:
        """After it, also if it raised."""
        for place, shard in zip(self._places, self._shards.pop(), strict=True):
            self._module(place)._parameters[place[1]] = shard
        self._refresh()

    def _refresh(self) -> None:
        for module in {id(self._module(place)): self._module(place) for place in self._places}.values():
            if isinstance(module, nn.RNNBase):  # reads its weights through a list of its own
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

    @staticmethod
    def _module(place: tuple[weakref.ref[nn.Module], str]) -> nn.Module:
        found = place[0]()
        assert found is not None  # its unit is running
        return found


def _whole(shard: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    found: Tensor = shard.full_tensor(grad_placements=[Partial("avg")] * shard.device_mesh.ndim)
    return found
