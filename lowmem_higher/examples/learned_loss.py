"""A learned loss: learn from digits 0 to 4 a loss that bears wrong labels, and train with it on digits 5 to 9.

    python -m lowmem_higher.examples.learned_loss

The loss is a net of 97 numbers that sees, for each class, the logarithm of the probability and whether the label says
so. It is added to the cross entropy, so that it starts as that. It is learned through 100 steps of training with labels
that are 40 % wrong: the outer loss is the cross entropy on clean images. Then it trains fresh nets on classes, labels
and images that it has not seen.

Measured: accuracy on clean images of digits 5 to 9 is 79.6 % after training with the cross entropy, and 87.7 % with the
learned loss (means of ten data sets). Peak 3.6 MiB, data included; on `higher` 16.1 MiB, in less than half of the time.
A minute of one core.

Bechtle et al., Meta-learning via learned loss, ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.examples.options import parse, tell

BATCH, WRONG = 50, 0.4
Task = tuple[Tensor, Tensor, Tensor, Tensor]


class LearnedLoss(nn.Module):
    """The cross entropy, and a learned function of (log probability, label) summed over the classes."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Linear(24, 1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), last)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over a batch, from logits (n, 5) and labels (n,)."""
        log_p = logits.log_softmax(1)
        features = torch.stack([log_p, F.one_hot(labels, 5).to(log_p)], 2)  # (n, 5, 2)
        extra: Tensor = self.net(features).sum((1, 2)).mean()
        return F.cross_entropy(logits, labels) + extra


def task(first: int) -> Task:
    """Of five digits: 400 images and labels to train on, 40 % of which are wrong, and the rest, clean."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels) - first
    chosen = ((y >= 0) & (y < 5)).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen))]
    x, y = x[chosen], y[chosen]
    wrong = torch.rand(400) < WRONG
    noisy = torch.where(wrong, (y[:400] + torch.randint(1, 5, (400,))) % 5, y[:400])
    return x[:400], noisy, x[400:], y[400:]


def trained(loss: nn.Module, x: Tensor, y: Tensor, steps: int, **settings: object) -> Any:
    """A new net trained with a loss, as a functional model with its graph to the loss's weights."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    inner = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    with higher.innerloop_ctx(net, inner, **settings) as (fnet, diffopt):  # type: ignore[arg-type]
        for _ in range(steps):
            index = torch.randint(len(x), (BATCH,))
            diffopt.step(loss(fnet(x[index]), y[index]))
    return fnet


def accuracy(loss: nn.Module, tasks: Sequence[Task], steps: int) -> float:
    """The mean share of clean images that fresh nets get right, the same nets and batches for each loss; no graph."""
    total = 0.0
    for seed, (x, y, clean_x, clean_y) in enumerate(tasks):
        torch.manual_seed(seed)
        net = trained(loss, x, y, steps, track_higher_grads=False)
        total += (net(clean_x).argmax(1) == clean_y).float().mean().item() / len(tasks)
    return total


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Learn and print; returns the accuracy on digits 5 to 9 with the cross entropy and with the learned loss."""
    options = parse(__doc__, arguments, steps=100, updates=50, checkpoint_every=10)
    torch.manual_seed(options.seed)
    loss, unseen = LearnedLoss(), [task(first=5) for _ in range(10)]
    meta = torch.optim.Adam(loss.parameters(), lr=0.01)
    for update in range(options.updates):
        x, y, clean_x, clean_y = task(first=0)
        net = trained(loss, x, y, options.steps, **options.settings)
        outer = F.cross_entropy(net(clean_x), clean_y)
        meta.zero_grad()
        outer.backward()
        meta.step()
        tell(update, options, f"cross entropy on clean images {outer.item():.3f}")
    found = accuracy(nn.CrossEntropyLoss(), unseen, options.steps), accuracy(loss, unseen, options.steps)
    print(f"accuracy on digits 5 to 9: {found[0]:.1%} with the cross entropy, {found[1]:.1%} with the learned loss")
    return found


if __name__ == "__main__":
    main()
