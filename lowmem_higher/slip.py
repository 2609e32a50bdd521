"""The slip of `copy_initial_weights`: a warning when an outer backward has trained nothing.

By default, as in `higher`, the initial fast weights are detached copies. An outer `backward()` that is meant for the
model's parameters then ends at these copies, and the meta-optimizer's step does nothing, without a word. That it was a
slip is certain enough when all of this holds, and only then a warning is given, once the functional model is gone:

* a `backward()` put gradients into the copies;
* what the inner steps are made of, their graph, ends at no other leaf: there was nothing else to learn in them;
* nobody asked for the weights of time 0, so nobody can read these gradients.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

from torch import Tensor

from lowmem_higher.errors import NothingTrainedWarning
from lowmem_higher.fast_weights import FunctionalView, StartOfHistory


def warn_of_slip(view: FunctionalView) -> None:
    """Watch the initial weights of a functional model for the slip."""
    reach = functools.partial(_reached, weakref.ref(view))
    for weight in view.current:
        if weight.requires_grad and weight.is_leaf:
            weight.register_post_accumulate_grad_hook(reach)
    weakref.finalize(view, _gone, view.start).atexit = False


def _reached(view: weakref.ref[FunctionalView], weight: Tensor) -> None:
    found = view()
    if found is not None and not found.start.judged and len(found.history) > 1:
        found.start.judged = True
        copies = {id(copy) for copy in found.history[0]} if isinstance(found.history[0], list) else set()
        found.start.slipped = _leads_nowhere_else(found.current, copies)


def _leads_nowhere_else(weights: list[Tensor], copies: set[int]) -> bool:
    """Whether the graph of the current weights ends at these leaves only."""
    pending: list[Any] = [weight.grad_fn for weight in weights if weight.grad_fn is not None]
    seen = set(pending)
    while pending:
        for node, _ in pending.pop().next_functions:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in copies:
                return False
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return bool(seen)


def _gone(start: StartOfHistory) -> None:
    if start.slipped and not start.asked:
        warnings.warn(
            "An outer backward through an inner loop has trained nothing: it ended at the detached copies of the "
            "initial weights, and the inner steps read nothing else that requires grad. For gradients in "
            "model.parameters() use innerloop_ctx(..., copy_initial_weights=False). If only what the outer loss itself "
            "reads is to be trained, track_higher_grads=False spares the unroll.",
            NothingTrainedWarning,
            stacklevel=2,
        )
