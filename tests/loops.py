"""Small inner loops whose gradients the tests compare: with the full unroll, with `higher`, with finite differences.

A loop is a function of a `Run`. The run gives it the number of steps, the library and the context; the loop names the
tensors to differentiate by, and returns the outer loss. All is float64 and tiny, and no loop converges: there any
gradient would be right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowmem_higher


class Run:
    """One run of a loop.

    Args:
        steps: How many inner steps.
        library: `lowmem_higher`, or the real `higher`.
        values: Other values for some named inputs (finite differences).
        settings: Keywords of `innerloop_ctx`.
    """

    def __init__(
        self, steps: int, /, library: Any = lowmem_higher, values: Mapping[str, Tensor] | None = None, **settings: Any
    ) -> None:
        self.steps = steps
        self.library = library
        self.settings = settings
        self.inputs: dict[str, Any] = {}
        self._values = values or {}
        self._generator = torch.Generator().manual_seed(0)

    def data(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def leaf(self, name: str, value: float | Tensor) -> Tensor:
        """A new leaf, whose gradient is asked for."""
        start = self._values.get(name, torch.as_tensor(value, dtype=torch.float64))
        self.inputs[name] = leaf = start.detach().clone().requires_grad_()
        return leaf

    def net(self, module: nn.Module) -> Any:
        """A float64 module with fixed weights, whose gradients are asked for."""
        module.double()
        with torch.no_grad():
            for name, param in module.named_parameters():
                start = self.data(*param.shape) * 0.6 + (1.0 if param.ndim == 1 and "norm" in name else 0.0)
                param.copy_(self._values.get(name, start))
                if param.requires_grad:
                    self.inputs[name] = param
        return module

    def context(
        self, net: nn.Module, opt: torch.optim.Optimizer, override: Mapping[str, Any] | None = None, **more: Any
    ) -> AbstractContextManager[tuple[Any, Any]]:
        keywords = {"copy_initial_weights": False, "override": override, **more, **self.settings}
        context: AbstractContextManager[tuple[Any, Any]] = self.library.innerloop_ctx(net, opt, **keywords)
        return context


Loop = Callable[[Run], Tensor]


def gradients(loop: Loop, steps: int, /, **settings: Any) -> dict[str, Tensor | None]:
    """The gradients of a loop's outer loss, by the names of its inputs."""
    run = Run(steps, **settings)
    outer = loop(run)
    found = torch.autograd.grad(outer, list(run.inputs.values()), allow_unused=True)
    return dict(zip(run.inputs, found, strict=True))


def rows(t: int) -> slice:
    """The batch of step t, out of 12 examples."""
    return slice(t % 4, t % 4 + 8)


def mlp(inputs: int = 3, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def sgd_for(net: nn.Module, lr: float = 0.1, momentum: float = 0.8) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)


# ------------------------------------------------------------------------------------------------ hyperparameters


def sgd(run: Run) -> Tensor:
    """Every hyperparameter of SGD, and outer losses at several times."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    values = {"lr": 0.15, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.05}
    override = {name: [run.leaf(name, value)] for name, value in values.items()}
    outer = torch.zeros((), dtype=torch.float64)
    with run.context(net, torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5), override) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 5 == 2:
                outer = outer + (fnet(x[:3]) - 1).square().mean()
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return outer + fnet(x).tanh().sum()


def sgd_nesterov_groups(run: Run) -> Tensor:
    """Two groups, one with Nesterov momentum from a warm state; a frozen parameter, one not optimized, one unused."""
    net, x, y = (
        nn.ModuleDict({"body": mlp(3, 4), "head": nn.Linear(4, 1), "idle": nn.Linear(2, 2)}),
        run.data(12, 3),
        run.data(12, 1),
    )
    net["body"][0].bias.requires_grad_(False)
    run.net(net)
    for param in net["idle"].parameters():
        del run.inputs[f"idle.{'weight' if param.ndim == 2 else 'bias'}"]
    opt = torch.optim.SGD(
        [
            {"params": net["body"].parameters(), "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
            {"params": [net["head"].weight, *net["idle"].parameters()], "lr": 0.05},
        ],
        lr=0.1,
    )
    F.mse_loss(net["head"](net["body"](x)), y).backward()
    opt.step()
    override = {"lr": [run.leaf("lr of body", 0.1), run.leaf("lr of head", 0.2)]}
    with run.context(net, opt, override) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(F.mse_loss(fnet["head"](fnet["body"](x[rows(t)])), y[rows(t)]))
        return fnet["head"](fnet["body"](x)).sin().sum()


def _adam(run: Run, opt_class: type[torch.optim.Optimizer], warm: bool, **options: Any) -> Tensor:
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    opt = opt_class(net.parameters(), lr=0.05, **options)
    for _ in range(3 if warm else 0):
        opt.zero_grad()
        F.mse_loss(net(x), y).backward()
        opt.step()
    override: dict[str, Any] = {"lr": [run.leaf("lr", 0.05)], "eps": [run.leaf("eps", 0.01)]}
    override["weight_decay"] = [run.leaf("weight_decay", 0.1)]
    if warm or run.steps > 1:  # from a cold start the first step does not depend on them
        override["betas"] = [(run.leaf("beta1", 0.8), run.leaf("beta2", 0.95))]
    with run.context(net, opt, override) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def adam(run: Run) -> Tensor:
    return _adam(run, torch.optim.Adam, warm=False)


def adam_warm_amsgrad(run: Run) -> Tensor:
    return _adam(run, torch.optim.Adam, warm=True, amsgrad=True)


def adamw_warm(run: Run) -> Tensor:
    return _adam(run, torch.optim.AdamW, warm=True)


def edited_hyperparameters(run: Run) -> Tensor:
    """A learned schedule: `param_groups` edited between steps, and an override for some steps."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    log_lr, momentum = run.leaf("log_lr", -2.0), run.leaf("momentum", 0.6)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.param_groups[0]["lr"] = log_lr.exp() * 0.95**t
            loss = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
            diffopt.step(loss, override={"momentum": [momentum * (0.5 if t % 2 else 1.0)]})
        return fnet(x).square().sum() + 0.1 * momentum  # at T=1 the step does not depend on it


def callback(run: Run) -> Tensor:
    """Gradients scaled by learned factors and clipped by their norm."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    scales = [run.leaf(f"scale {index}", 0.5 + index) for index in range(4)]

    def scaled_and_clipped(grads: list[Tensor]) -> list[Tensor]:
        scaled = [scale * grad for scale, grad in zip(scales, grads, strict=True)]
        norm = torch.stack([grad.square().sum() for grad in scaled]).sum().sqrt()
        return [grad / (1 + norm) for grad in scaled]

    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean(), grad_callback=scaled_and_clipped)
        return fnet(x).tanh().sum()


# ---------------------------------------------------------------------------------------- what a step reads from
# outside


def example_weights(run: Run) -> Tensor:
    """Weights of examples through a sigmoid, taken once before the loop and once in it; a learned input; a learned
    L2."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    logits, prompt = run.leaf("logits", run.data(12)), run.leaf("learned input", run.data(4, 3))
    decay = run.leaf("log decay", -3.0)
    before = torch.sigmoid(logits)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            weights = torch.sigmoid(2 * logits[rows(t)]) if t % 2 else before[rows(t)]
            errors = (fnet(x[rows(t)]) - y[rows(t)]).square().squeeze(1)
            penalty = torch.stack([param.square().sum() for param in fnet.parameters()]).sum()
            loss = (weights * errors).mean() + fnet(prompt.tanh()).square().mean() + decay.exp() * penalty
            diffopt.step(loss)
        return fnet(x).tanh().sum()


_global_shift: list[Tensor] = []


def captured(run: Run) -> Tensor:
    """Tensors that forward reaches without being given them: closure, global, attribute; leaves and not."""
    closure, attribute = run.leaf("closure", run.data(4)), run.leaf("attribute", run.data(4))
    _global_shift[:] = [run.leaf("global", run.data(4))]
    closure_made = closure.exp()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)
            self.scale = attribute
            self.gate = torch.sigmoid(2 * attribute)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner(x) * self.scale + closure * _global_shift[0])
            return self.outer(hidden * self.gate * closure_made)

    net, x, y = run.net(Net()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 3 == 1:
                fnet.gate = torch.sigmoid(attribute * (1 + t / 10))
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def returned_from_forward(run: Run) -> Tensor:
    """Forward returns, beside its result, tensors that it captured: a leaf, one that is not, and a weight."""
    leaf = run.leaf("leaf", run.data(3))
    made = (0.3 * run.leaf("made from", run.data(3))).exp()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.own = nn.Linear(3, 3), leaf

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(x) * made, "made": made, "leaf": self.own, "weight": self.layer.weight}

    net, x, y = run.net(Net()), run.data(12, 3), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            found = fnet(x[rows(t)])
            scaled = found["out"] * found["made"] + found["leaf"]
            diffopt.step((scaled - y[rows(t)]).square().mean() + 0.1 * found["weight"].square().sum())
        return fnet(x)["out"].tanh().sum()


def hyperparameters_from_weights(run: Run) -> Tensor:
    """The learning rate and a callback's factor are made from the weights; the optimizer holds a part of them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.log_lr = nn.Linear(3, 1), nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sin()

    net, x, y = run.net(Net()), run.data(12, 3), run.data(12, 1)
    opt = torch.optim.SGD(net.layer.parameters(), lr=0.1, momentum=0.6)
    with run.context(net, opt) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.param_groups[0]["lr"] = 0.2 * (fnet.log_lr - 1).exp() * fnet.layer.weight.norm()
            factor = fnet.layer.bias.mean().exp()
            loss = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
            diffopt.step(loss, grad_callback=lambda grads, f=factor: [None if g is None else f * g for g in grads])
        return fnet(x).tanh().sum()


def leaf_made_in_the_loop(run: Run) -> Tensor:
    """Learning to reweight (L2RW): the weights of the examples are made after the forward, in the loop."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            errors = (fnet(x) - y).square().squeeze(1)
            if t % 2:
                eps = torch.full(errors.shape, 0.1, dtype=torch.float64, requires_grad=True)
            else:
                eps = torch.full_like(errors, 0.1).requires_grad_()
            if t < 3:
                run.inputs[f"eps of step {t}"] = eps
            diffopt.step((eps * errors).sum())
        return fnet(x).tanh().sum()


# ------------------------------------------------------------------------------------------------------------ times


def times(run: Run) -> Tensor:
    """Fast weights of several times, as tensors and as graph edges; outer losses at several times, and inner losses."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    checkpointed = run.settings.get("checkpoint_every") is not None
    outer = torch.zeros((), dtype=torch.float64)
    with run.context(net, torch.optim.Adam(net.parameters(), lr=0.05, eps=1e-20)) as (fnet, diffopt):
        for t in range(run.steps):
            loss = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
            outer = outer + 0.1 * (t % 3) * loss
            if t % 4 == 1:
                outer = outer + sum(param.sin().sum() for param in fnet.parameters())
            diffopt.step(loss)
        for time in {0, run.steps // 2, run.steps - 1}:
            past = list(fnet.parameters(time=time))
            outer = outer + past[0].cos().sum() + (past[2] * past[2]).sum()
            places = fnet.gradient_edges(time=time) if checkpointed else past
            run.inputs.update(
                {
                    f"{name} of time {time}": place
                    for (name, _), place in zip(net.named_parameters(), places, strict=True)
                }
            )
        run.inputs.update({f"{name} of the last time": place for name, place in fnet.named_parameters()})
        return outer + fnet(x).tanh().sum()


def from_past_weights(run: Run) -> Tensor:
    """Steps that start again from weights of an earlier time, and from interpolated ones (`update_params`,
    `params=`)."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    mix = run.leaf("mix", 0.3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 5 == 3:
                old, now = list(fnet.parameters(time=-3)), fnet.fast_params
                fnet.update_params([mix * p + (1 - mix) * q for p, q in zip(old, now, strict=True)])
            prediction = fnet(x[rows(t)], params=list(fnet.parameters(time=t // 2))) if t % 5 == 4 else fnet(x[rows(t)])
            diffopt.step((prediction - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum() + fnet(x, params=list(fnet.parameters(time=run.steps // 2))).sum() + mix


def manual_steps(run: Run) -> Tensor:
    """Steps by hand between the optimizer's; the parameters are used directly as well."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    rate = run.leaf("rate", 0.07)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 2 == 0:
                params = list(fnet.parameters())
                loss = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
                grads = torch.autograd.grad(loss, params, create_graph=True)
                fnet.update_params([p - rate * g for p, g in zip(params, grads, strict=True)])
            penalty = torch.stack([param.square().sum() for param in fnet.parameters()]).sum()
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean() + 0.1 * penalty)
        return fnet(x).tanh().sum()


def frozen_and_truncated(run: Run) -> Tensor:
    """A weight frozen for some steps, then trained again; momentum and weights cut off from their history."""
    net, x, y, lr = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("lr", 0.1)
    with run.context(net, sgd_for(net), {"lr": [lr]}) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 9 == 4:
                fnet.update_params([p.detach() if k == 0 else p for k, p in enumerate(fnet.parameters())])
            if t % 9 == 6:
                fnet.update_params(
                    [p.detach().requires_grad_() if k == 0 else p for k, p in enumerate(fnet.parameters())]
                )
            if t % 9 == 8:
                for entry in diffopt.state[0].values():
                    entry["momentum_buffer"] = 0.5 * entry["momentum_buffer"].detach()
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        start = list(fnet.parameters(time=0))
        return fnet(x).tanh().sum() + 0.1 * torch.stack([p.sin().sum() for p in start]).sum()


# --------------------------------------------------------------------------------------------------------------- nets


def batch_norm(run: Run) -> Tensor:
    """BatchNorm over convolutions: two training forwards a step, some evaluations between, the outer loss in eval."""
    net = nn.Sequential(
        nn.Conv1d(2, 3, 2, bias=False),
        nn.BatchNorm1d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(9, 4, bias=False),
        nn.BatchNorm1d(4, momentum=None),
        nn.Linear(4, 1),
    )
    run.net(net)
    x, y, scale = run.data(12, 2, 4), run.data(12, 1), run.leaf("scale", 0.5)
    with run.context(net, sgd_for(net, lr=0.05)) as (fnet, diffopt):
        for t in range(run.steps):
            first = fnet(x[rows(t)])
            with torch.no_grad():
                fnet(x[:5] * 2)  # counts in the statistics, though nothing depends on it
            second = fnet(x[rows(t + 1)] * scale)
            with torch.no_grad():
                fnet.eval()
                weight = fnet(x).std()
                fnet.train()
            diffopt.step((first - y[rows(t)]).square().mean() + weight * (second - first).square().mean())
        fnet.eval()
        return fnet(x).tanh().sum() + fnet[1].running_mean.sum().detach()


def dropout(run: Run) -> Tensor:
    """Dropout in the model and in the loop, noise drawn in the loop, evaluations that draw in between."""
    net = nn.Sequential(
        nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 4), nn.AlphaDropout(0.2), nn.Linear(4, 1)
    )
    run.net(net)
    x, y, spread = run.data(12, 3), run.data(12, 1), run.leaf("spread", 0.2)
    with run.context(net, sgd_for(net, lr=0.03)) as (fnet, diffopt):
        for t in range(run.steps):
            noisy = x[rows(t)] + spread * torch.randn(8, 3, dtype=torch.float64)
            prediction = F.dropout(fnet(noisy), 0.25)
            if t % 3 == 2:
                with torch.no_grad():
                    fnet(x)
                fnet.train(mode=not fnet.training)
            mask = torch.rand_like(prediction) < 0.7
            diffopt.step((mask * (prediction - y[rows(t)]).square()).mean())
        return fnet(x).tanh().sum()


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.again = nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.Linear(3, 2)
        self.decoder.weight = nn.Parameter(self.decoder.weight.detach())
        self.again.weight, self.again.bias = self.encoder.weight, self.encoder.bias
        self.register_parameter("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x))) + F.linear(self.again(x).cos(), self.encoder.weight.T)


def shared_weights(run: Run) -> Tensor:
    net, x = run.net(TiedAutoencoder()), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - x[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


class CheckpointedNet(nn.Module):
    """Blocks under `torch.utils.checkpoint`, with dropout and statistics inside; optionally a checkpoint in another."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
        self.nested = nested

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        for block in self.blocks:
            hidden = checkpoint(self.block, block, hidden, shift, use_reentrant=False)
        return self.last(hidden).tanh()

    def block(self, block: nn.Module, hidden: Tensor, shift: Tensor) -> Tensor:
        hidden = hidden + shift
        if self.nested:
            return hidden + checkpoint(block, hidden, use_reentrant=False) * self.last.weight
        return hidden + block(hidden)


def _checkpointed_model(run: Run, nested: bool) -> Tensor:
    net, x, y, shift = (
        run.net(CheckpointedNet(nested)),
        run.data(12, 3),
        run.data(12, 1),
        run.leaf("shift", run.data(4)),
    )
    outer = torch.zeros((), dtype=torch.float64)
    with run.context(net, sgd_for(net, lr=0.02, momentum=0.5)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 4 == 1:  # built now, differentiated after many more steps
                outer = outer + fnet(x, shift).cos().sum()
            diffopt.step((fnet(x[rows(t)], shift) - y[rows(t)]).square().mean())
        return outer + fnet(x, shift).tanh().sum()


def checkpoint_in_model(run: Run) -> Tensor:
    return _checkpointed_model(run, nested=False)


def nested_checkpoint_in_model(run: Run) -> Tensor:
    return _checkpointed_model(run, nested=True)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        out, hidden = self.cell(x, hidden)
        return self.head(out), hidden


def hidden_state(run: Run) -> Tensor:
    """A hidden state carried from step to step with its gradient, cut off now and then (truncation)."""
    net, x, y = run.net(Recurrent(nn.LSTM)), run.data(3, 12, 3), run.data(3, 12, 1)
    hidden = tuple(run.leaf(name, run.data(1, 3, 4)) for name in ("h", "c"))
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            prediction, hidden = fnet(x[:, t % 9 : t % 9 + 3], hidden)
            if t % 4 == 3:
                hidden = tuple(part.detach() for part in hidden)
            diffopt.step((prediction - y[:, t % 9 : t % 9 + 3]).square().mean())
        return fnet(x)[0].tanh().sum() + 0.01 * sum(part.sum() for part in hidden)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.attention, self.embed, self.head = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Embedding(7, 4),
            nn.Linear(4, 1),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.embed(tokens))
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


def transformer(run: Run) -> Tensor:
    net, y = run.net(Attention()), run.data(6, 1)
    tokens = torch.arange(30).reshape(6, 5) * 3 % 7
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        run.context(net, sgd_for(net, lr=0.02)) as (
            fnet,
            diffopt,
        ),
    ):
        for t in range(run.steps):
            diffopt.step((fnet(tokens.roll(t, 1)) - y).square().mean())
        return fnet(tokens).tanh().sum()


def submodules(run: Run) -> Tensor:
    """Submodules, slices and methods of the model called directly; weights read by name."""
    net, x, y = run.net(mlp(3, 3)), run.data(12, 3), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            hidden = fnet[0](x[rows(t)])
            out = fnet[1:](hidden) if t % 2 else F.linear(hidden.tanh(), fnet[2].weight, fnet[2].bias)
            diffopt.step((out - y[rows(t)]).square().mean() + fnet[0].weight.abs().sqrt().sum() * 0.01)
        return fnet(x).tanh().sum()


# --------------------------------------------------------------------------------------------------------------- glue


class Cube(torch.autograd.Function):
    """x^3 with a backward of its own, that no differentiation of forward would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x**3 * factor

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return cotangent * x.square() * factor, (cotangent * x).sum()


class CubeNet(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(3, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.inner(x).tanh(), self.factor)


def custom_function(run: Run) -> Tensor:
    """A custom `autograd.Function` in the loop and in the model."""
    factor = run.leaf("factor", 0.7)
    net, x, y = run.net(CubeNet(factor)), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((Cube.apply(fnet(x[rows(t)]), factor + 0.1) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def gradient_penalty(run: Run) -> Tensor:
    """Inner derivatives: by an input, by the weights, by a learned tensor."""
    net, x, y, shift = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("shift", run.data(3))
    with run.context(net, sgd_for(net, lr=0.05)) as (fnet, diffopt):
        for t in range(run.steps):
            batch = x[rows(t)].clone().requires_grad_()
            here = shift * 1.0  # by `shift` itself it would be the derivative through all earlier steps as well
            out = fnet(batch + here)
            loss = (out - y[rows(t)]).square().mean()
            (by_input,) = torch.autograd.grad(out.sum(), batch, create_graph=True)
            by_weight = torch.autograd.grad(loss, list(fnet.parameters()), create_graph=True)[0]
            (by_shift,) = torch.autograd.grad(out.sin().sum(), here, create_graph=True)
            penalty = (by_input.norm(dim=1) - 1).square().mean() + by_weight.square().sum() + by_shift.tanh().sum()
            diffopt.step(loss + 0.1 * penalty)
        return fnet(x).tanh().sum()


def in_place(run: Run) -> Tensor:
    """In-place writes: through views, into tensors made by zeros, into what the model returned."""
    net, x, y, weight = run.net(mlp(3, 3)), run.data(12, 3), run.data(12, 3), run.leaf("weight", run.data(8, 3))
    with run.context(net, sgd_for(net, lr=0.05)) as (fnet, diffopt):
        for t in range(run.steps):
            out = fnet(x[rows(t)])
            out[:, 0] *= 2
            column = out[:, 1]
            shifted = out - 1
            column.add_(weight[:, 0])
            out += y[rows(t)]
            collected = torch.zeros(4, 8, dtype=torch.float64)
            for index in range(3):
                collected[index] = (out[:, index] * weight[:, index]).sin()
            collected[3].copy_(shifted.mean(1))
            total = torch.zeros((), dtype=torch.float64)
            for part in collected:
                total += part.square().mean()
            diffopt.step(total)
        return fnet(x).tanh().sum()


def step_function(run: Run) -> Tensor:
    """`step(fn, *args)`, in turn with `step(loss)`."""
    if run.library is not lowmem_higher:
        raise ValueError("only lowmem_higher has step(fn, *args)")
    net, x, y, weight = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("weight", 1.3)

    def inner_loss(fnet: Any, x: Tensor, y: Tensor, *, weight: Tensor) -> Tensor:
        loss: Tensor = weight * (F.dropout(fnet(x), 0.2) - y).square().mean() + 0.1 * fnet[0].weight.square().sum()
        return loss

    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 3 == 2:
                diffopt.step((fnet(x) - y).square().mean())
            else:
                diffopt.step(inner_loss, x[rows(t)], y[rows(t)], weight=weight.square())
        return fnet(x).tanh().sum()


LOOPS: tuple[Loop, ...] = (
    sgd,
    sgd_nesterov_groups,
    adam,
    adam_warm_amsgrad,
    adamw_warm,
    edited_hyperparameters,
    callback,
    example_weights,
    captured,
    returned_from_forward,
    hyperparameters_from_weights,
    leaf_made_in_the_loop,
    times,
    from_past_weights,
    manual_steps,
    frozen_and_truncated,
    batch_norm,
    dropout,
    shared_weights,
    checkpoint_in_model,
    nested_checkpoint_in_model,
    hidden_state,
    transformer,
    submodules,
    custom_function,
    gradient_penalty,
    in_place,
    step_function,
)
