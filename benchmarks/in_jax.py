"""A problem of `problems.py` in JAX: the same weights and batches, the loop as one compiled function.

As an expert writes it: `lax.scan` over segments of about sqrt(T) steps, each under `jax.checkpoint`, and inside a scan
over steps that are checkpointed as well; the outer gradient by `jax.grad`, the whole of it jitted. Module by module the
net is turned into a function of its parameters, so that both sides compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from problems import GptBlock, Problem
from torch import nn
from torch.nn import functional as F

Apply = Callable[[Iterator[Any], Any], Any]  # takes the parameters that it needs from the front


def to_jax(module: nn.Module) -> Apply:
    """A module in training mode as a function; its parameters come in the order of `module.parameters()`."""
    import jax
    import jax.numpy as jnp

    def normalized(x: Any, axes: tuple[int, ...], eps: float) -> Any:
        return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + eps)

    match module:
        case nn.Sequential():
            parts = [to_jax(part) for part in module]

            def sequential(params: Iterator[Any], x: Any) -> Any:
                for part in parts:
                    x = part(params, x)
                return x

            return sequential
        case nn.Linear():
            biased = module.bias is not None

            def linear(params: Iterator[Any], x: Any) -> Any:
                x = x @ next(params).T
                return x + next(params) if biased else x

            return linear
        case nn.Conv2d():
            padding = [(size, size) for size in module.padding]

            def conv(params: Iterator[Any], x: Any) -> Any:
                x = jax.lax.conv_general_dilated(x, next(params), (1, 1), padding)
                return x + next(params)[:, None, None]

            return conv
        case nn.BatchNorm2d():
            return lambda params, x: (
                normalized(x, (0, 2, 3), module.eps) * next(params)[:, None, None] + next(params)[:, None, None]
            )
        case nn.LayerNorm():
            return lambda params, x: normalized(x, (-1,), module.eps) * next(params) + next(params)
        case nn.Embedding():
            return lambda params, x: next(params)[x]
        case nn.MaxPool2d():
            return lambda params, x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
            )
        case nn.Flatten():
            return lambda params, x: x.reshape(x.shape[0], -1)
        case nn.Tanh():
            return lambda params, x: jnp.tanh(x)
        case nn.ReLU():
            return lambda params, x: jax.nn.relu(x)
        case nn.GELU():
            return lambda params, x: jax.nn.gelu(x, approximate=False)
        case GptBlock():
            return _gpt_block(module, to_jax)
    raise NotImplementedError(type(module).__name__)


def _gpt_block(block: GptBlock, convert: Callable[[nn.Module], Apply]) -> Apply:
    import jax
    import jax.numpy as jnp

    norm, into, out, after, mlp = map(convert, (block.norm, block.into, block.out, block.after, block.mlp))
    heads = block.heads

    def apply(params: Iterator[Any], x: Any) -> Any:
        batch, length, width = x.shape
        q, k, v = jnp.split(into(params, norm(params, x)), 3, axis=-1)
        q, k, v = (part.reshape(batch, length, heads, -1).swapaxes(1, 2) for part in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        mixed = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(batch, length, width)
        x = x + out(params, mixed)
        return x + mlp(params, after(params, x))

    return apply


def _loss(problem: Problem) -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    if problem.loss is F.mse_loss:
        return lambda out, y: jnp.square(out - y).mean()
    return lambda out, y: -jnp.take_along_axis(jax.nn.log_softmax(out), y[..., None], axis=-1).mean()


@dataclass
class Compiled:
    """The whole loop with its outer gradient, compiled."""

    run: Callable[[], Any]
    compile_seconds: float
    peak_bytes: int  # arguments not counted

    def gradient(self) -> torch.Tensor:
        """All of it, flat, as `common.run` gives it."""
        import numpy

        weights, rate = self.run()
        return torch.cat([torch.from_numpy(numpy.array(part)).flatten() for part in (*weights, rate)])


def segment_length(steps: int) -> int:
    """The divisor of the number of steps next to its root."""
    return min((n for n in range(1, steps + 1) if steps % n == 0), key=lambda n: abs(n - math.sqrt(steps)))


def compiled(problem: Problem, steps: int) -> Compiled:
    """SGD with momentum 0.9, as the inner loop of `common.run`; gradients of initial weights and learning rate."""
    import time

    import jax
    import jax.numpy as jnp

    net, loss = to_jax(problem.model.body), _loss(problem)
    first = [jnp.asarray(param.detach().cpu().numpy()) for param in problem.model.parameters()]
    xs, ys = (
        jnp.stack([jnp.asarray(part.cpu().numpy()) for part in parts]) for parts in zip(*problem.batches, strict=True)
    )
    held_x, held_y = (jnp.asarray(part.cpu().numpy()) for part in problem.held_out)

    def outer(weights: Any, rate: Any, xs: Any, ys: Any, held_x: Any, held_y: Any) -> Any:
        def step(carry: Any, t: Any) -> Any:
            weights, momenta = carry
            x, y = xs[t % len(xs)], ys[t % len(ys)]
            grads = jax.grad(lambda p: loss(net(iter(p), x), y))(weights)
            momenta = [0.9 * m + g for m, g in zip(momenta, grads, strict=True)]
            return ([p - rate * m for p, m in zip(weights, momenta, strict=True)], momenta), None

        def segment(carry: Any, ts: Any) -> Any:
            return jax.lax.scan(jax.checkpoint(step), carry, ts)

        times = jnp.arange(steps).reshape(-1, segment_length(steps))
        carry = weights, [jnp.zeros_like(p) for p in weights]
        (weights, _), _ = jax.lax.scan(jax.checkpoint(segment), carry, times)
        return loss(net(iter(weights), held_x), held_y)

    arguments = (first, jnp.float32(problem.learning_rate), xs, ys, held_x, held_y)
    start = time.perf_counter()
    function = jax.jit(jax.grad(outer, argnums=(0, 1))).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = function.memory_analysis()
    peak = int(memory.temp_size_in_bytes + memory.output_size_in_bytes)
    return Compiled(lambda: jax.block_until_ready(function(*arguments)), seconds, peak)
