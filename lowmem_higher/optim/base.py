"""The differentiable optimizer: what every update rule shares.

NOTE [ Pure update rules ]

`torch.optim` steps write into parameters and state, and detach on the way; neither can be differentiated or replayed.
Here an update rule is a pure function of one parameter:

    new_param, new_state = rule(param, grad, state, group)

`state` holds what the rule keeps between steps (a momentum buffer, a step count), `group` the hyperparameters. The
rule changes nothing in place. Every float hyperparameter may be a tensor, and then it gets a gradient. The same
function serves the user's step, its replays and its pullback: `advance` below applies it to all parameters, and knows
nothing of where its inputs come from.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from lowmem_higher.current_step import CurrentStep, during
from lowmem_higher.optim.in_place import apply_rule_in_place, run_update
from lowmem_higher.optim.write_back import write_back
from lowmem_higher.report import Report
from lowmem_higher.structure import is_dtensor
from lowmem_higher.truncation import LastSteps

_JOINED_UP_TO = 1 << 14  # elements

ParamState = Mapping[str, Any]
State = list[dict[int, dict[str, Any]]]
Group = dict[str, Any]
Gradients = Sequence[Tensor | None]
GradCallback = Callable[[list[Tensor | None]], Gradients]


class Executor(Protocol):
    """Who carries out a step that is to be replayed later (the trajectory of a checkpointed context)."""

    def step(
        self,
        optimizer: DifferentiableOptimizer,
        loss: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        callback: GradCallback | None,
    ) -> None:
        """Take one step from `loss`, or from the function `loss` called with `args` and `kwargs`."""

    def outer(self, optimizer: DifferentiableOptimizer, loss: Tensor) -> Tensor:
        """The same value and gradient as `loss`, without its graph."""

    def scan(
        self,
        optimizer: DifferentiableOptimizer,
        fn: Callable[..., Tensor],
        batches: Sequence[Any],
        args: tuple[Any, ...],
    ) -> bool:
        """Take as many steps as there are batches, by traces; False, and nothing is changed, where that can't be."""


class Run(Protocol):
    """What knows the cost of a run, and the program of its last step."""

    @property
    def report(self) -> Report:
        """What the run has cost so far."""

    @property
    def program(self) -> object | None:
        """The last recorded step."""

    def count_step(self) -> None:
        """Count one step of the full unroll."""


class DifferentiableOptimizer:
    """An optimizer whose steps can be differentiated through. Made by `innerloop_ctx`, one subclass per rule.

    Args:
        other: The torch optimizer whose hyperparameters and state are taken over; its state is copied (a warm start).
        reference_params: The model's parameters, in the order of `fmodel.parameters()`.
        fmodel: The functional model that receives the new fast weights.
        device: Where the copied state goes; `None` leaves it where it is.
        override: `{hyperparameter: [value]}` or one value per parameter group; tensors get gradients.
        grad_callback: Called with the gradients of each step (None for frozen and unused parameters); returns those
            to use.
        track_higher_grads: Whether steps record the graph that differentiates through them.

    Raises:
        ValueError: An optimized parameter is not among `reference_params`, or `override` has another length.

    Memory:
        The full unroll keeps every step's graph. Under `checkpoint_every` a step leaves small objects only.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fnet, diffopt):
        ...     new_params = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        >>> [tuple(p.shape) for p in new_params]
        [(1, 2), (1,)]
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | None = None,
        override: Mapping[str, Sequence[Any]] | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        reference = list(reference_params)
        position = {id(param): index for index, param in enumerate(reference)}
        self.param_groups: list[Group] = []
        self.state: State = []
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            if any(id(param) not in position for param in group["params"]):
                raise ValueError(
                    "The optimizer holds a parameter that is not one of the model's, so its step would change nothing "
                    "in the model. Build it from the same model: opt = torch.optim.SGD(model.parameters(), lr=...)."
                )
            indices = [position[id(param)] for param in group["params"]]
            self._group_to_param_list.append(indices)
            self.param_groups.append(
                {"params": [None] * len(indices), **{k: v for k, v in group.items() if k != "params"}}
            )
            self.state.append(
                {
                    index: _copied_state(other.state[param], device, self.scalars)
                    for index, param in enumerate(group["params"])
                    if other.state.get(param)
                }
            )
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._executor: Executor | None = None
        self._run: Run | None = None
        if override is not None:
            self._apply_override(override)
        if fmodel is not None:
            fmodel._view.joined(self)

    @property
    def held(self) -> frozenset[int]:
        """The indices of the parameters that are optimized."""
        return frozenset(index for indices in self._group_to_param_list for index in indices)

    def parameter(self, group: int, position: int) -> int:
        """The index of a parameter among all, by its place in a group."""
        return self._group_to_param_list[group][position]

    first_order = False  # whether gradients treat each inner gradient as a constant
    affine = False  # whether the update is an affine function of the gradients: its derivative by them is a constant
    elementwise = False  # whether `update` treats each element alone, so that it may run on many parameters joined
    scalars: tuple[str, ...] = ("step",)  # state that is one number for a whole parameter

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """The pure update rule of one parameter; see NOTE [ Pure update rules ]."""
        raise NotImplementedError(
            f"{type(self).__name__} has no update rule. Write one: def update(self, param, grad, state, group): return "
            'param - group["lr"] * grad, {**state}.'
        )

    def gradients(
        self, loss: Tensor, params: Sequence[Tensor], *, create_graph: bool, retain_graph: bool = True
    ) -> list[Tensor | None]:
        """The gradient of `loss` for each parameter that is optimized, None for the others and for unused ones.

        A parameter that is not optimized is the same tensor at all times, and an ancestor of the optimized ones: asking
        for its gradient would run all earlier steps backward.

        Raises:
            ValueError: `loss` depends on none of them.
        """
        wanted = [index for index in sorted(self.held) if params[index].requires_grad]
        targets = [params[index] for index in wanted]
        create_graph = create_graph and not self.first_order
        found = (
            torch.autograd.grad(loss, targets, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
            if wanted
            else ()
        )
        if any(grad is not None and grad.layout is not torch.strided for grad in found):
            raise ValueError(
                "A gradient is a sparse tensor, of which torch has no second derivative. Build the layer with dense "
                "gradients: nn.Embedding(..., sparse=False)."
            )
        grads: list[Tensor | None] = [None] * len(params)
        for index, grad in zip(wanted, found, strict=True):
            grads[index] = grad
        if all(grad is None for grad in grads):
            raise ValueError(
                "The loss does not depend on the current fast weights, so the step would change nothing. Compute it "
                "with the functional model of this context (fmodel(x), not model(x)), after the previous step."
            )
        return grads

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **kwargs: Any) -> None:
        """What `higher` has in place of `update`: a subclass may override it instead.

        It reads the parameters `self.param_groups[group]["params"]`, their gradients `grouped_grads[group]` (None for
        frozen and unused ones), the state `self.state[group][position]`, a dictionary, and puts new tensors in place.
        """
        apply_rule_in_place(self, grouped_grads)

    @property
    def updates_in_place(self) -> bool:
        """Whether this class has an `_update` of its own."""
        return type(self)._update is not DifferentiableOptimizer._update

    def advance(
        self, params: Sequence[Tensor], grads: Gradients, state: State, groups: Sequence[Group]
    ) -> tuple[list[Tensor], State]:
        """One update of all parameters; those that it leaves alone stay the same objects."""
        if self.updates_in_place:
            return run_update(self, params, grads, state, groups)
        return self.apply_rule(params, grads, state, groups)

    def apply_rule(
        self, params: Sequence[Tensor], grads: Gradients, state: State, groups: Sequence[Group]
    ) -> tuple[list[Tensor], State]:
        """Apply the rule to every parameter that has a gradient; the others stay the same objects.

        An elementwise rule runs once on many small parameters, joined into one vector: the cost of a call is the same
        for each tensor, and for a small one is many times that of its arithmetic. Large ones are not worth the copy.
        """
        new_params, new_state = list(params), [dict(group_state) for group_state in state]
        for group, indices, old_state, entries in zip(groups, self._group_to_param_list, state, new_state, strict=True):
            group = {key: _as_scalar(value) for key, value in group.items()}
            joined = self._joins(group, old_state)
            for positions in self._batches(params, grads, indices, old_state, joined):
                batch = [indices[position] for position in positions]
                old = [old_state.get(position, {}) for position in positions]
                found = [grads[index] for index in batch]
                new_tensors, new_entries = self._update_batch([params[index] for index in batch], found, old, group)
                for position, index, tensor, entry in zip(positions, batch, new_tensors, new_entries, strict=True):
                    new_params[index], entries[position] = tensor, entry
        return new_params, new_state

    def _joins(self, group: Group, state: dict[int, dict[str, Any]]) -> bool:
        """Whether small parameters may be joined: no hyperparameter has a value for each element."""
        return self.elementwise and not any(map(_has_dimensions, group.values()))

    def _batches(
        self,
        params: Sequence[Tensor],
        grads: Gradients,
        indices: list[int],
        state: dict[int, dict[str, Any]],
        joined: bool,
    ) -> list[list[int]]:
        """The positions in a parameter group whose updates can be computed as one."""
        batches: dict[tuple[Any, ...], list[int]] = {}
        for position, index in enumerate(indices):
            if grads[index] is not None:
                param = params[index]
                alike: tuple[Any, ...] = (position,)
                if joined and not is_dtensor(param) and param.numel() <= _JOINED_UP_TO:
                    numbers = [(key, _compared(value)) for key, value in state.get(position, {}).items()]
                    alike = (param.dtype, param.device, *numbers)
                batches.setdefault(alike, []).append(position)
        return list(batches.values())

    def _update_batch(
        self, params: list[Tensor], grads: list[Any], state: list[dict[str, Any]], group: Group
    ) -> tuple[Sequence[Tensor], list[dict[str, Any]]]:
        if params[0].is_complex() and self.elementwise:  # real and imaginary parts count as elements, as in torch
            new_params, new_entries = self._update_batch(
                [_opened(param) for param in params],
                [_opened(grad) for grad in grads],
                [{key: _opened(value) for key, value in entry.items()} for entry in state],
                group,
            )
            shapes = [new.shape for new in new_params]
            return (
                [torch.view_as_complex(new) for new in new_params],
                [
                    {key: _closed(value, shape) for key, value in entry.items()}
                    for entry, shape in zip(new_entries, shapes, strict=True)
                ],
            )
        if len(params) == 1:
            new_param, new_entry = self.update(params[0], grads[0], state[0], group)
            return [new_param], [new_entry]
        joined = {
            key: value
            if not isinstance(value, Tensor) or all(entry[key] is value for entry in state)  # one number for all
            else _flatten_dense_tensors([entry[key] for entry in state])
            for key, value in state[0].items()
        }
        flat, new_joined = self.update(_flatten_dense_tensors(params), _flatten_dense_tensors(grads), joined, group)
        parts = {
            key: _taken_apart(value, params)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else [value] * len(params)
            for key, value in new_joined.items()
        }
        new_entries = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        return _taken_apart(flat, params), new_entries or [{} for _ in params]

    def step(
        self,
        loss: Tensor | Callable[..., Tensor],
        *args: Any,
        params: Iterable[Tensor] | None = None,
        override: Mapping[str, Sequence[Any]] | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Take one optimizer step and make its result the current fast weights.

        `step(loss, params, override, grad_callback)` in this order, as in `higher`, or `step(fn, *args, **kwargs)`.

        Args:
            loss: A scalar tensor that depends on the current fast weights; or a function, which is then called as
                `loss(fmodel, *args, **kwargs)` and must return one. Under `checkpoint_every` the function is called
                again at each replay. It must therefore take what changes from step to step as *arguments*: a variable
                captured by a closure has its last value by then.
            args: Passed to the function. Tensors are held by reference until the outer backward.
            params: The tensors to update, in the order of `reference_params`, for an optimizer without a functional
                model. With one, only its current fast weights are sensible, and the default.
            override: Replaces hyperparameters, for this step and those that follow, as in `higher`. To override a
                single step, override the next one back, or set `param_groups` afterwards.
            grad_callback: Replaces the optimizer's own callback in this step.
            kwargs: Passed to the function.

        Returns:
            All current fast weights, in the order of `fmodel.parameters()`; the new `params` if there is no such model.

        Raises:
            TypeError: `loss` is neither a tensor nor callable.
            ValueError: It is not a scalar, not finite, has no graph, or does not depend on the fast weights; there is
                neither a functional model nor `params`.
            RecordError: Under `checkpoint_every`: the recorder could not follow how `loss` was made.

        Memory:
            Cost in passes: one forward and one backward of the loss. Under `checkpoint_every` the outer backward adds
            at most one more first-order pass, and one second-order pass.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> def inner_loss(fnet, x):
            ...     return fnet(x).square().mean()
            >>> with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
            ...     for scale in range(1, 4):
            ...         _ = diffopt.step(inner_loss, torch.full((3, 2), float(scale)))
            >>> diffopt.report.steps
            3
        """
        if not callable(loss) and args:
            named: list[Any] = [params, override, grad_callback]
            if len(args) > 3 or any(value is not None for value in named[: len(args)]):
                raise TypeError(
                    "step(loss, params, override, grad_callback) got an argument too many, or one twice. Name them: "
                    "diffopt.step(loss, override=..., grad_callback=...)."
                )
            params, override, grad_callback, *_ = [*args, *named[len(args) :]]
            args = ()
        if not callable(loss) and (kwargs or isinstance(params, Tensor)):
            raise TypeError(
                "step(loss) got further arguments besides a tensor; they belong to step(fn, *args, **kwargs), where "
                "fn(fmodel, *args, **kwargs) computes the loss. Write step(loss, override=..., grad_callback=...)."
            )
        weights = new_weights = self._weights(params)
        groups, state = self.param_groups, self.state
        callback = grad_callback or self._grad_callback
        try:
            if override is not None:
                self.param_groups = [dict(group) for group in groups]
                self._apply_override(override)
            if self._executor is not None:
                self._executor.step(self, loss, args, kwargs, callback)
            else:
                value = loss(self._fmodel, *args, **kwargs) if callable(loss) else loss
                new_weights = self._unrolled_step(value, weights, callback)
        except BaseException:
            self.param_groups, self.state = groups, state
            raise
        if override is not None:  # the same dictionaries, since the user may hold them
            for group, new in zip(groups, self.param_groups, strict=True):
                group.update(new)
            self.param_groups = groups
        return list(new_weights or () if self._fmodel is None else self._fmodel._view.current)

    def scan(self, fn: Callable[..., Tensor], batches: Iterable[Any], *args: Any) -> list[Tensor]:
        """Take a step of `fn(fmodel, batch, *args)` for each batch: `step(fn, batch, *args)` many times.

        With `checkpoint_every` (or `checkpoints`) and `compile`, the whole scan is one node of the graph, and its steps
        run as flat or compiled code, the loop's included. That takes small nets a small part of the time. `fn` must be
        a function of its arguments then, as for any compiler: it reads tensors through them and the functional model.
        The first use of each trace in a scan, the 16th, the 256th ... is compared with `fn` itself (`verify`).

        Args:
            fn: The inner loss, a scalar tensor.
            batches: A sequence (a list, a dataset: something with a length and `[t]`), which is indexed again at
                replays, so that no batch is held; any other iterable is made a list. Numbers in a batch are baked into
                the code: give an index as a tensor.
            args: The same at all steps: a learned weight, data that batches index. Tensors get gradients.

        Returns:
            All current fast weights, as `step` does.

        Raises:
            ExternalModifiedError: In the backward: a tensor of a batch or of `args` was modified in place.
            ReplayMismatchError: A batch is another one when it is read again, or `fn` reads something in Python that
                changes.

        Warns:
            CompileFallbackWarning: The steps cannot be traced (random draws, branches on values, `truncate`, `journal`,
                a `grad_callback`, ...): they are taken one by one.

        Memory:
            That of single steps; no batch is held. Past weights inside the scan cannot be asked for. Cost in passes:
            that of single steps, and a few for comparisons.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net = torch.nn.Linear(4, 1)
            >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> x, weight = torch.randn(20, 4), torch.ones(20, requires_grad=True)
            >>> def inner_loss(fnet, index, x, weight):
            ...     return (weight[index] * fnet(x[index]).square().mean(1)).mean()
            >>> batches = torch.randint(20, (100, 5))
            >>> with higher.innerloop_ctx(net, opt, checkpoint_every=10, compile="trace") as (fnet, diffopt):
            ...     _ = diffopt.scan(inner_loss, batches, x, weight)
            ...     fnet(x).square().mean().backward()
            >>> weight.grad.shape, diffopt.report.steps
            (torch.Size([20]), 100)
        """
        given = _indexed(batches)

        def inner_loss(fmodel: Any, index: int, *args: Any) -> Tensor:
            return fn(fmodel, given[index], *args)

        if len(given) > 0 and (self._executor is None or not self._executor.scan(self, fn, given, args)):
            for index in range(len(given)):
                self.step(inner_loss, index, *args)
        return [] if self._fmodel is None else list(self._fmodel._view.current)

    def outer(self, loss: Tensor) -> Tensor:
        """A term of the outer loss, taken on the way: the same value and gradient, and no graph is held for it.

        A loss at every step (a multi-step loss, a learning curve) keeps its own activations, so memory grows with the
        steps again. Handed in here, a term is recorded like the loss of a step and run once more in the backward.

        Args:
            loss: A scalar tensor made from the current fast weights, in the loop.

        Returns:
            A scalar to add up, to weigh, to call `.backward()` on. In the full unroll `loss` itself.

        Raises:
            TypeError, ValueError: It is no scalar tensor, not finite, or has no graph.
            RecordError: The recorder could not follow how `loss` was made, or the context was left.

        Memory:
            References to what the term reads, until the backward; there, one first-order graph. Cost in passes: two
            first-order runs at most, with `checkpoint_every`.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
            >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=5) as (fnet, diffopt):
            ...     total = 0.0
            ...     for _ in range(20):
            ...         _ = diffopt.step(fnet(x).square().mean())
            ...         total = total + diffopt.outer((fnet(x) - 1).square().mean())
            ...     total.backward()
            >>> net.weight.grad.shape
            torch.Size([1, 2])

        References:
            Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019 (multi-step loss).
        """
        check_loss(loss)
        return loss if self._executor is None else self._executor.outer(self, loss)

    def _weights(self, params: Iterable[Tensor] | None) -> list[Tensor] | None:
        """The tensors to update if they are others than the current fast weights."""
        given = None if params is None else list(params)
        if self._fmodel is None and given is None:
            raise ValueError(
                "This optimizer was made without a functional model, so step needs the tensors that it updates: "
                "y, = diffopt.step(energy(y).sum(), params=[y])."
            )
        count = 1 + max(self.held, default=-1) if self._fmodel is None else len(self._fmodel._view.slots)
        if given is not None and len(given) < count:
            raise ValueError(
                f"step got {len(given)} tensors in params, and the optimizer was made with {count}. Give all, in their "
                "order, as step returned them: params = diffopt.step(loss, params=params)."
            )
        if self._fmodel is None:
            return given
        current = self._fmodel._view.current
        if given is None or (len(current) > 0 and all(map(operator.is_, given, current))):
            return None
        if self._executor is not None:
            raise ValueError(
                "params holds other tensors than the current fast weights, of which a checkpointed step is taken. Make "
                "them the current ones, fmodel.update_params(params), before the loss is computed."
            )
        return given

    def _unrolled_step(self, loss: Tensor, weights: list[Tensor] | None, callback: GradCallback | None) -> list[Tensor]:
        """The full unroll: every step's graph stays alive, as in `higher`."""
        check_loss(loss)
        view = None if self._fmodel is None else self._fmodel._view
        if view is not None:
            view.take_assigned()
        params = list(view.current) if weights is None and view is not None else list(weights or ())
        track = self._track_higher_grads
        last = LastSteps() if view is None else view.last
        with last.inner_gradient():
            grads = self.gradients(loss, params, create_graph=track)
        if callback is not None:
            grads = called_back(callback, grads, CurrentStep(last.taken, params))
        with torch.set_grad_enabled(track):
            new_params, new_state = self.advance(params, grads, self.state, self.param_groups)
        held = self.held
        # Whether new weights may be made from one that stays: NOTE [ The inner gradient is the partial derivative ].
        tied = callback is not None or self.updates_in_place
        tied = tied or any(param.requires_grad and index not in held for index, param in enumerate(params))
        if track and (tied or last.count is not None):
            new_params, new_state = _reached(last, params, new_params, self.state, new_state)
        self.state = new_state
        # Parts of a joined update share its storage; the user gets tensors of their own, which may be edited in place.
        new_params = [new.clone() if new._is_view() else new for new in new_params]
        if not track:
            new_params = [
                new if new is old else new.detach().requires_grad_()
                for new, old in zip(new_params, params, strict=True)
            ]
        if self._fmodel is not None:
            self._fmodel.update_params(new_params)
        last.taken += 1
        if self._run is not None:
            self._run.count_step()
        return new_params

    def commit(self, model: nn.Module, opt: torch.optim.Optimizer | None = None) -> None:
        """Write what the loop trained into the model and its torch optimizer, as if torch had trained them.

        The model's parameters get the current fast weights and its buffers (BatchNorm's statistics) the current ones,
        in place and detached; the optimizer's state gets ours, in the form that its own `step()` goes on from. Its
        hyperparameters stay as they are. Everything is checked before anything is written.

        Do it after the outer backward: an outer loss that reads the model's own parameters is spoilt by the writes, and
        autograd then refuses its backward.

        Args:
            model: The model that the context was opened with, or one of the same structure.
            opt: The torch optimizer over `model`'s parameters, with the groups of the one that the context was opened
                with. None: the optimizer state is not written.

        Raises:
            ValueError: There is no functional model; a parameter or buffer differs in shape or dtype; there are other
                buffers; `opt` holds other parameters.

        Memory:
            None but the state that the optimizer did not have yet. No pass.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = torch.optim.Adam(net.parameters())
            >>> with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
            ...     for _ in range(3):
            ...         _ = diffopt.step(fnet(torch.ones(1, 2)).sum())
            >>> diffopt.commit(net, opt)
            >>> torch.equal(net.weight, fnet.weight), opt.state[net.weight]["step"]
            (True, tensor(3.))
        """
        if self._fmodel is None:
            raise ValueError(
                "This optimizer was made without a functional model, so there is nothing to write into a model. Copy "
                "what step(loss, params=[y]) returned: with torch.no_grad(): y.copy_(new_y)."
            )
        write_back(self._fmodel, self.state, self._group_to_param_list, model, opt)

    def follow(self, executor: Executor | None, run: Run) -> None:
        """Let `executor` carry out the steps (None: the full unroll), and `run` say what they cost."""
        self._executor, self._run = executor, run

    def rules_only(self) -> DifferentiableOptimizer:
        """A copy that can `advance` and holds no tensor: what a replay needs of the optimizer."""
        rules = copy.copy(self)
        rules.state, rules.param_groups = [], []
        rules._fmodel = rules._grad_callback = rules._executor = rules._run = None
        return rules

    @property
    def report(self) -> Report:
        """What the run has cost so far, in passes, bytes and seconds: a `Report`, current at each reading."""
        return Report() if self._run is None else self._run.report

    @property
    def program(self) -> object | None:
        """The last recorded step; `print(diffopt.program)` shows it as code. None without `checkpoint_every`.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
            ...     _ = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
            >>> print(diffopt.program)
            def step_program(weights, externals, numbers):
                v0 = fmodel(externals[0])
                v1 = torch.Tensor.square(v0)
                v2 = torch.Tensor.mean(v1)
                return v2
        """
        return None if self._run is None else self._run.program

    def _apply_override(self, override: Mapping[str, Sequence[Any]]) -> None:
        for key, values in override.items():
            if len(values) not in (1, len(self.param_groups)):
                raise ValueError(
                    f"override[{key!r}] has {len(values)} values; it needs 1, or one for each of the "
                    f"{len(self.param_groups)} parameter groups, as in override={{{key!r}: [value]}}."
                )
            if not any(key in group for group in self.param_groups):
                known = ", ".join(repr(name) for name in self.param_groups[0] if name != "params")
                raise ValueError(
                    f"override[{key!r}] names no hyperparameter of this optimizer; it has {known}. Write one of them, "
                    "as in override={'lr': [value]}."
                )
            for index, group in enumerate(self.param_groups):
                group[key] = values[0] if len(values) == 1 else values[index]

    def __repr__(self) -> str:
        shown = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return f"{type(self).__name__}({len(shown)} parameter group(s), {shown})"


def _reached(
    last: LastSteps, params: Sequence[Tensor], new_params: Sequence[Tensor], state: State, new_state: State
) -> tuple[list[Tensor], State]:
    """What a step has made, with the gradient ending there once the step is out of reach."""
    reached_params = [new if new is old else last.reached(new) for new, old in zip(new_params, params, strict=True)]
    reached_state = [
        {
            index: {
                key: last.reached(value)
                if isinstance(value, Tensor) and value is not old.get(index, {}).get(key)
                else value
                for key, value in entry.items()
            }
            for index, entry in entries.items()
        }
        for entries, old in zip(new_state, state, strict=True)
    ]
    return reached_params, reached_state


def _indexed(batches: Iterable[Any]) -> Sequence[Any]:
    """Batches that can be read again."""
    readable = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
    return cast("Sequence[Any]", batches) if readable else list(batches)


def called_back(callback: GradCallback, grads: Gradients, step: CurrentStep) -> list[Tensor | None]:
    """The gradients that a callback wants used in a step.

    Raises:
        ValueError: It does not return one for each parameter, of the same shape.
    """
    with during(step):
        used: Any = callback(list(grads))
    fits = isinstance(used, (list, tuple)) and len(used) == len(grads)
    fits = fits and all(
        new is None or (isinstance(new, Tensor) and (old is None or new.shape == old.shape))
        for new, old in zip(used, grads, strict=True)
    )
    if not fits:
        raise ValueError(
            "grad_callback must return a list with one gradient for each parameter, of the same shape, or None: "
            "return [None if g is None else f(g) for g in grads]."
        )
    return list(used)


def check_loss(loss: object) -> float:
    """The value of a loss; refuses what no step can be taken from: anything but a finite scalar tensor with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"step(loss) needs a scalar tensor or a function that returns one, and got {type(loss).__name__}. Write "
            "diffopt.step(loss), without .item() or .backward(), or diffopt.step(fn, *args)."
        )
    if loss.numel() != 1:
        raise ValueError(f"The loss has shape {tuple(loss.shape)}; a step needs a scalar: diffopt.step(loss.mean()).")
    if not loss.requires_grad:
        raise ValueError(
            "The loss has no graph: it does not require grad. Was it computed under torch.no_grad(), or detached? "
            "Compute it with fmodel(x) where gradients are enabled."
        )
    value: float = loss.detach().item()
    if not math.isfinite(value):
        raise ValueError(
            f"The loss is {value}: training has diverged, and every later gradient would be NaN. Lower the inner "
            "learning rate, or clip with grad_callback; to stop early, test torch.isfinite(loss) before the step."
        )
    return value


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0 instead of infinity.

    A second moment of 0 (a parameter that never got a gradient) is a constant of the run, but the chain rule would
    multiply its zero derivative by infinity and give NaN.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.sqrt()
    positive = x > 0
    root: Tensor = torch.where(positive, x, 1.0).sqrt() * positive
    return root


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the number 0; a tensor never is, since it may get a gradient."""
    return not isinstance(value, Tensor) and value == 0


def descend(param: Tensor, direction: Tensor, rate: Any) -> Tensor:
    """`param - rate * direction`, in one kernel where `rate` is a number."""
    if isinstance(rate, Tensor):
        return param - direction * rate
    return param.sub(direction, alpha=rate)


def lerp(old: Tensor, new: Tensor, weight_of_old: Any) -> Tensor:
    """`weight_of_old * old + (1 - weight_of_old) * new`: one step of a moving average."""
    if isinstance(weight_of_old, Tensor):
        return old * weight_of_old + new * (1 - weight_of_old)
    return old.mul(weight_of_old).add(new, alpha=1 - weight_of_old)


def _as_scalar(value: Any) -> Any:
    """A one-element tensor as a 0-dimensional one, so that it broadcasts without changing a parameter's shape."""
    if isinstance(value, Tensor) and value.ndim and value.numel() == 1:
        return value.reshape(())
    if isinstance(value, (tuple, list)):
        return type(value)(_as_scalar(item) for item in value)
    return value


def _opened(value: Any) -> Any:
    """A complex tensor as a real one, with one more dimension."""
    if isinstance(value, Tensor) and value.is_complex():
        return torch.view_as_real(value.resolve_conj())
    return value


def _closed(value: Any, shape: torch.Size) -> Any:
    return torch.view_as_complex(value) if isinstance(value, Tensor) and value.shape == shape else value


def _taken_apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a joined vector, which are no views of it: their backward is one node, and joins them again."""
    parts = _split(flat, [tensor.numel() for tensor in like])
    # Nobody else has the parts, so their shape may be changed without a view's bookkeeping.
    return [_unsafe_view(part, tensor.shape) for part, tensor in zip(parts, like, strict=True)]


_split, _unsafe_view = torch.ops.aten.split_with_sizes_copy.default, torch.ops.aten._unsafe_view.default


def _compared(value: Any) -> Any:
    """What must be equal in the state of parameters that are joined: numbers, also as tensors without dimensions."""
    if isinstance(value, Tensor):
        return None if value.ndim else id(value)
    return id(value) if type(value).__hash__ is None else value


def _has_dimensions(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, (tuple, list)) and any(map(_has_dimensions, value))


def _copied_state(state: Mapping[str, Any], device: torch.device | None, scalars: Sequence[str]) -> dict[str, Any]:
    """A detached copy of one parameter's torch.optim state; `scalars` become Python numbers."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            copied[key] = copy.deepcopy(value)
        elif key == "step":
            copied[key] = int(value.item())
        elif key in scalars:
            copied[key] = value.item()
        else:
            copied[key] = value.detach().clone().to(device or value.device)
    return copied
