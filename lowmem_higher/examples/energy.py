"""An energy model: learn E(x, y) whose descent in y, from grey, completes an image, y, from its upper half, x.

The inner loop trains no model but the tensor y: a differentiable optimizer without a functional model, whose
`step(loss, params=[y])` returns the new y, which is projected back to [0, 1] after every step. The energy's weights
are the meta-parameters; they feed every inner step.

    python -m lowmem_higher.examples.energy

Measured: the mean squared error of completed images that were not seen is 0.0522, that of the mean image 0.0777. On
`higher` the program runs as it is, in the same memory. Ten seconds.

Such a loop is a full unroll. To checkpoint it, hold y in a module and open `innerloop_ctx` on that: see
`lowmem_higher/MIGRATION.md`.

Belanger, Yang and McCallum, End-to-end learning for structured prediction energy networks, ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.examples.options import parse, tell

HALF = 32


class Energy(nn.Module):
    """E(x, y), small where y goes with x."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Sequential(nn.Linear(2 * HALF, 64), nn.Softplus(), nn.Linear(64, 1))
        self.suggestion = nn.Linear(HALF, HALF)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The energy of each pair, (n,), from two halves, (n, 32) each."""
        joint: Tensor = self.joint(torch.cat([x, y], 1)).squeeze(1)
        total: Tensor = joint + (y - self.suggestion(x)).square().sum(1)
        return total


def completed(energy: nn.Module, x: Tensor, steps: int, learn: bool = True) -> Tensor:
    """The lower halves that `steps` steps of descent lead to, (n, 32), with the graph to the energy's weights."""
    y: Tensor = torch.full((len(x), HALF), 0.5, requires_grad=True)
    inner = torch.optim.SGD([y], lr=0.1, momentum=0.5)
    diffopt = higher.get_diff_optim(inner, [y], track_higher_grads=learn)
    for _ in range(steps):
        (y,) = diffopt.step(energy(x, y).sum(), params=[y])
        y = y.clamp(0, 1)
    return y


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train and print; returns the error on unseen images, that of the mean image and that of the energy."""
    options = parse(__doc__, arguments, steps=10, updates=200, batch=64)
    torch.manual_seed(options.seed)
    images = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
    images = images[torch.randperm(len(images))]
    (x, y), (test_x, test_y) = (part.split(HALF, 1) for part in images.split([1500, 297]))
    energy = Energy()
    meta = torch.optim.Adam(energy.parameters(), lr=0.01)
    for update in range(options.updates):
        batch = torch.randint(0, len(x), (options.batch,))
        loss = (completed(energy, x[batch], options.steps) - y[batch]).square().mean()
        meta.zero_grad()
        loss.backward()
        meta.step()
        tell(update, options, f"error {loss.item():.4f}")
    found = completed(energy, test_x, options.steps, learn=False).detach()
    of_the_mean = (y.mean(0) - test_y).square().mean().item()
    of_the_energy = (found - test_y).square().mean().item()
    print(f"error on unseen images: {of_the_mean:.4f} with the mean image, {of_the_energy:.4f} by descent")
    return of_the_mean, of_the_energy


if __name__ == "__main__":
    main()
