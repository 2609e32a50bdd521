"""Few-shot classification (MAML): learn initial weights from which 5 inner steps on 3 images tell three digits apart.

A task is a choice of three digits in random order, so that the labels mean nothing before adapting; one image of each
to adapt to, 15 to be judged by. Half of the images train the initial weights, the other half are kept for the end, when
fresh tasks are adapted to by a few steps without a graph (`track_higher_grads=False`).

    python -m lowmem_higher.examples.few_shot

Measured: accuracy on unseen images is 81.7 % from random initial weights, 89.6 % from the learned ones, 83.8 % by the
nearest image. On digits never seen, with `--digits 7`, nothing is gained: 77.0 %, 75.3 % and 77.0 %; seven kinds are
too few to learn from. Five steps fit anywhere: peak 1.7 MiB here and on `higher`. A quarter of a minute of one core.

Finn et al., Model-agnostic meta-learning for fast adaptation of deep networks, ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.examples.options import parse, tell

WAYS, SHOTS, QUERIES = 3, 1, 15
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def nearest(task: Task) -> float:
    """The share that is right by the nearest image to adapt to, which learns nothing."""
    x, y, query_x, query_y = task
    return (y[torch.cdist(query_x, x).argmin(1)] == query_y).float().mean().item()


def digits_by_class() -> list[Tensor]:
    """For each digit its images, (about 180, 64), from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    found = torch.as_tensor(images, dtype=torch.float32) / 16
    return [found[torch.as_tensor(labels) == digit] for digit in range(10)]


def draw_task(classes: Sequence[Tensor]) -> Task:
    """A random task from these classes: images and labels to adapt to, images and labels to be judged by."""
    chosen = torch.randperm(len(classes))[:WAYS].tolist()
    images = [classes[digit][torch.randperm(len(classes[digit]))[: SHOTS + QUERIES]] for digit in chosen]
    support, query = zip(*[part.split([SHOTS, QUERIES]) for part in images], strict=True)
    labels = torch.arange(WAYS)
    return torch.cat(support), labels.repeat_interleave(SHOTS), torch.cat(query), labels.repeat_interleave(QUERIES)


def adapted(model: nn.Module, task: Task, steps: int, **settings: object) -> tuple[Tensor, float]:
    """Adapt to a task; returns the loss on its other images, with the graph to `model`, and the share that is right."""
    x, y, query_x, query_y = task
    inner = torch.optim.SGD(model.parameters(), lr=0.4)
    context = higher.innerloop_ctx(model, inner, copy_initial_weights=False, **settings)  # type: ignore[arg-type]
    with context as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fmodel(x), y))
        logits = fmodel(query_x)
    return F.cross_entropy(logits, query_y), (logits.argmax(1) == query_y).float().mean().item()


def accuracy(model: nn.Module, tasks: Sequence[Task], steps: int) -> float:
    """The mean share that is right after adapting, over tasks; nothing is learned."""
    return sum(adapted(model, task, steps, track_higher_grads=False)[1] for task in tasks) / len(tasks)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train and print; returns the accuracy on unseen images before and after."""
    options = parse(__doc__, arguments, steps=5, tasks=32, updates=30, digits=10, checkpoint_every=0)
    torch.manual_seed(options.seed)
    classes = digits_by_class()
    halves = [images[torch.randperm(len(images))].chunk(2) for images in classes]
    seen = [half for half, _ in halves][: options.digits]
    unseen = [draw_task([half for _, half in halves][options.digits % 10 :]) for _ in range(50)]
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WAYS))
    meta = torch.optim.Adam(model.parameters(), lr=0.003)
    before = accuracy(model, unseen, options.steps)
    for update in range(options.updates):
        meta.zero_grad()
        total = 0.0
        for _ in range(options.tasks):
            task = draw_task(seen)
            loss, _ = adapted(model, task, options.steps, **options.settings)
            (loss / options.tasks).backward()
            total += loss.item() / options.tasks
        meta.step()
        tell(update, options, f"loss after {options.steps} inner steps {total:.3f}")
    after = accuracy(model, unseen, options.steps)
    print(f"accuracy on unseen images after {options.steps} inner steps: {before:.1%} -> {after:.1%}")
    print(f"by the nearest image: {sum(map(nearest, unseen)) / len(unseen):.1%}")
    return before, after


if __name__ == "__main__":
    main()
