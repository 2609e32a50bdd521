"""What does pulling one step back take in mixed mode, against reverse over reverse mode?

    python benchmarks/mixed.py            # GPT-like nets of 6 and 24 blocks; minutes on one core; prints a table
    python benchmarks/mixed.py --quick    # a smoke test with tiny nets; writes nothing

Two steps are taken, each of whose carries is kept, and pulled back again and again (`retain_graph=True`), so that
nothing is replayed and what is done once for a program (the comparison with reverse mode) is over before anything is
measured. With Adam there is one rival more, `journal=True`, whose loop keeps each step's gradient.

Then the first step alone, where nobody wants the gradient of the initial weights: weights of examples are pulled back,
once, in a loop of its own for each measurement, with and without that comparison.

Peaks are live bytes (`lowmem_higher.testing.live_bytes`) beyond what the loop holds, in a run of their own. Times are
seconds of the processor on one thread, taken in turns, reverse mode first in each round; a ratio is the median over the
rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 2
TARGETS = {(6, "blocks"): 3.5, (24, "blocks"): 7.0, (24, "blocks, 4 parts"): 10.0}  # reverse mode's peak by this one
TIME_TARGET = 1.6


class Block(nn.Module):
    """A transformer block, pre-norm and causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, depth: int, width: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(tokens) + self.place)))
        return out


RIVALS: dict[str, dict[str, Any]] = {
    "reverse": {"pullback": "reverse"},
    "mixed": {"pullback": "mixed"},
    "blocks": {"pullback": "mixed", "blocks": (Block,)},
    "blocks, 4 parts": {"pullback": "mixed", "blocks": (Block,), "microbatches": 4},
}
OF_ADAM = {"blocks, journal": {**RIVALS["blocks"], "journal": True}}
FIRST: dict[str, dict[str, Any]] = {
    "reverse": {"verify": "off"},
    "mixed": {"pullback": "mixed", "verify": "off"},
    "mixed, compared": {"pullback": "mixed"},
}


@dataclass
class Row:
    """One rival on one net."""

    depth: int
    optimizer: str
    rival: str
    weight_bytes: int
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    memory_ratio: float = 1.0
    time_ratio: float = 1.0
    gradient_difference: float = 0.0


class Pulled:
    """Steps of one rival, ready to be pulled back as often as wanted."""

    def __init__(
        self, sizes: argparse.Namespace, depth: int, optimizer: str, settings: dict[str, Any], steps: int = STEPS
    ) -> None:
        import lowmem_higher

        torch.manual_seed(0)
        net = Net(depth, sizes.width, sizes.heads, sizes.words, sizes.length)
        self.params = list(net.parameters())
        opt = (
            torch.optim.SGD(self.params, lr=0.1, momentum=0.9)
            if optimizer == "sgd"
            else torch.optim.Adam(self.params, lr=1e-3, eps=1e-4)
        )
        tokens = torch.randint(0, sizes.words, (steps, sizes.batch, sizes.length + 1))
        self.weight = torch.ones(sizes.batch, requires_grad=True)
        vectors = [torch.randn_like(param) for param in self.params]
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=1, **settings) as (
            fnet,
            diffopt,
        ):
            for batch in tokens:
                logits = fnet(batch[:, :-1])
                losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].reshape(-1), reduction="none")
                diffopt.step((self.weight * losses.view(-1, sizes.length).mean(1)).mean())
            del logits, losses
            ends = zip(fnet.parameters(), vectors, strict=True)
            self.outer: Tensor = torch.stack([(param * vector).sum() for param, vector in ends]).sum()

    def pull_back(self) -> Tensor:
        """The outer gradient as one vector."""
        found = torch.autograd.grad(self.outer, [*self.params, self.weight], retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def pull_back_first(self) -> Tensor:
        """The gradient of the weights of examples alone."""
        return torch.autograd.grad(self.outer, self.weight, retain_graph=True)[0]


def measure(sizes: argparse.Namespace, depth: int, optimizer: str) -> list[Row]:
    """All rivals on one net."""
    from lowmem_higher.testing import live_bytes

    rivals = {**RIVALS, **(OF_ADAM if optimizer == "adam" else {})}
    pulled = {name: Pulled(sizes, depth, optimizer, settings) for name, settings in rivals.items()}
    rows = {
        name: Row(depth, optimizer, name, sum(param.nbytes for param in one.params)) for name, one in pulled.items()
    }
    expected = None
    for name, one in pulled.items():
        found = one.pull_back()  # the first time: compares with reverse mode
        if expected is None:
            expected = found
        if not float(found.norm()) > 0.0:
            raise RuntimeError("nothing was differentiated")
        rows[name].gradient_difference = float((found - expected).norm() / expected.norm())
        del found
        gc.collect()
        with live_bytes() as memory:
            one.pull_back()
        rows[name].peak_bytes = memory.peak
        rows[name].memory_ratio = rows["reverse"].peak_bytes / memory.peak
    for _ in range(sizes.rounds):
        for name, one in pulled.items():
            start = time.process_time()  # one thread: the time it was given, whoever else uses the machine
            one.pull_back()
            rows[name].seconds.append((time.process_time() - start) / STEPS)
    return with_ratios(rows)


def measure_first(sizes: argparse.Namespace, depth: int, optimizer: str) -> list[Row]:
    """The first step of all rivals, where the weights of examples alone are asked for."""
    from lowmem_higher.testing import live_bytes

    rows: dict[str, Row] = {}
    expected = None
    for name, settings in FIRST.items():
        one = Pulled(sizes, depth, optimizer, settings, steps=1)
        row = rows[name] = Row(depth, optimizer, name, sum(param.nbytes for param in one.params))
        with live_bytes() as memory:
            found = one.pull_back_first()
        expected = found if expected is None else expected
        row.peak_bytes = memory.peak
        row.memory_ratio = rows["reverse"].peak_bytes / memory.peak
        row.gradient_difference = float((found - expected).norm() / expected.norm())
    for _ in range(sizes.rounds):
        for name, settings in FIRST.items():
            one = Pulled(sizes, depth, optimizer, settings, steps=1)
            start = time.process_time()
            one.pull_back_first()
            rows[name].seconds.append(time.process_time() - start)
    return with_ratios(rows)


def with_ratios(rows: dict[str, Row]) -> list[Row]:
    """The rows, their times by that of reverse mode in the same round."""
    for row in rows.values():
        ratios = [mine / reverse for mine, reverse in zip(row.seconds, rows["reverse"].seconds, strict=True)]
        row.time_ratio = statistics.median(ratios)
    return list(rows.values())


def verdict(found: float, target: float | None, *, at_least: bool) -> str:
    """How a ratio stands to its target."""
    if target is None:
        return ""
    met = found >= target if at_least else found <= target
    return f" ({'at least' if at_least else 'at most'} {target:g}: {'met' if met else '**missed**'})"


def table(rows: list[Row]) -> str:
    """Nets and rivals down, with the targets of what was aimed at."""
    lines = [
        "| blocks | optimizer | pull-back | peak live bytes | in weights | reverse / peak | CPU seconds a step "
        "| time / reverse | gradient vs reverse |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = verdict(row.memory_ratio, TARGETS.get((row.depth, row.rival)), at_least=True)
        timed = verdict(row.time_ratio, TIME_TARGET if row.rival.startswith("blocks") else None, at_least=False)
        lines.append(
            f"| {row.depth} | {row.optimizer} | {row.rival} | {common.format_bytes(row.peak_bytes)} "
            f"| {row.peak_bytes / row.weight_bytes:.1f}x | {row.memory_ratio:.2f}{memory} "
            f"| {statistics.median(row.seconds):.3g} | {row.time_ratio:.2f}{timed} | {row.gradient_difference:.0e} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="mixed against reverse mode", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 24], help="blocks of the nets")
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adam"), default=["sgd", "adam"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny nets, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.depths, arguments.width, arguments.length, arguments.batch = [2], 8, 8, 8
        arguments.rounds, arguments.no_readme = 1, True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    environment = common.environment(torch.device("cpu"))
    command = ("python benchmarks/mixed.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip()
    start = time.perf_counter()
    rows: list[Row] = []
    first: list[Row] = []
    for optimizer in arguments.optimizers:
        for depth in arguments.depths:
            rows += measure(arguments, depth, optimizer)
            first += measure_first(arguments, depth, optimizer)
            print(f"[{time.perf_counter() - start:.0f} s] {optimizer}, {depth} blocks", flush=True)
    net = (
        f"GPT-like, width {arguments.width}, {arguments.heads} heads, {arguments.words} words, "
        f"{arguments.batch} examples of {arguments.length} tokens"
    )
    text = "\n\n".join(
        [
            f"`{command}`: {net}, float32, weighted examples.",
            f"Measured with {common.describe_environment(environment)}.",
            table(rows),
            "The first step, asked for the gradient of the weights of examples alone:",
            table(first),
        ]
    )
    print("\n" + text)
    result: dict[str, Any] = {
        "benchmark": "mixed",
        "command": command,
        "environment": environment,
        "net": net,
        "wall_seconds": time.perf_counter() - start,
        "rows": [asdict(row) for row in rows],
        "first": [asdict(row) for row in first],
    }
    if arguments.out is None:
        print(json.dumps(result, indent=1))
    else:
        common.write_json(arguments.out / "mixed.json", result)
        common.draw("mixed", result, arguments.out / "mixed.png")
    if not arguments.no_readme:
        common.write_section("mixed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
