"""Flat graphs compiled by torch's inductor: `compile=True`.

On a CPU the kernels are called from C++, which takes half the time for small tensors, and twice as long to compile. On
a CUDA device they are recorded as a CUDA graph, which is launched at once. Its outputs lie in memory that the next
launch of any such graph writes to, so they are copied out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from lowmem_higher.errors import CompileFallbackWarning
from lowmem_higher.flat import FlatGraph


class Inductor:
    """Compiles flat graphs, and says once why something is not compiled."""

    def __init__(self) -> None:
        self._told = False

    def compiled(self, graph: FlatGraph, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Any]]:
        """A function of the same inputs with the same outputs; the graph itself if it cannot be compiled."""
        import torch._inductor  # takes seconds: on the first use

        devices = {tensor.device.type for tensor in inputs}
        logger = logging.getLogger("torch._inductor")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about itself
                options = {"cpp_wrapper": devices == {"cpu"}, "triton.cudagraphs": devices == {"cuda"}}
                run = torch._inductor.compile(fx.GraphModule({}, graph.graph), list(inputs), options=options)
                run(*inputs)
        except Exception as error:  # noqa: BLE001  (a compiler that is missing, a kernel that it cannot make: not documented)
            lines = str(error).strip().splitlines()
            self.give_up(f"the compiler raised {type(error).__name__}: {lines[0] if lines else ''}")
            return graph
        finally:
            logger.setLevel(level)

        def call(given: Sequence[Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(run(*given))

        def launch(given: Sequence[Tensor]) -> list[Any]:
            torch.compiler.cudagraph_mark_step_begin()  # what earlier launches gave has been copied
            return [value.clone() if isinstance(value, Tensor) else value for value in call(given)]

        return launch if devices == {"cuda"} else call

    def give_up(self, reason: str) -> None:
        """Warn, once in a context."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"compile=True: some steps are not compiled, since {reason}. Their gradient is the same.",
                CompileFallbackWarning,
                stacklevel=2,
            )
