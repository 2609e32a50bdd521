"""The migration guide: its code runs, its names exist, and the lines that no other test covers are true."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import higher
import pytest
import torch
from loops import mlp, sgd_for
from torch import nn

import lowmem_higher

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "lowmem_higher" / "MIGRATION.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_its_code_runs(number: int) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(BLOCKS[number], "MIGRATION.md", "exec"), namespace)
    learned = next(namespace["energy" if "energy" in namespace else "net"].parameters())
    assert learned.grad.norm() > 0


def test_its_first_lines_run_in_a_fresh_program() -> None:
    code = BLOCKS[0] + "assert higher is lowmem_higher"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_its_names_exist() -> None:
    parts = [lowmem_higher, lowmem_higher.patch, lowmem_higher.optim, lowmem_higher.optim.DifferentiableOptimizer]
    net = mlp()
    with lowmem_higher.innerloop_ctx(net, sgd_for(net)) as (fnet, diffopt):
        parts += [fnet, diffopt]
    names = {name for _, name in re.findall(r"`(higher|lowmem_higher|fmodel|diffopt|opt)\.(\w+)", GUIDE)}
    missing = {name for name in names if not any(hasattr(part, name) for part in parts)}
    assert missing <= {"encoder", "layers", "step"}  # of the reader's model, and of torch's optimizer
    files = re.findall(r"`(tests/\w+\.py)`", GUIDE)
    assert files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("every", [None, 2])
def test_a_loss_that_is_not_finite_is_refused(every: int | None) -> None:
    net = nn.Linear(2, 1)
    context = lowmem_higher.innerloop_ctx(net, sgd_for(net), checkpoint_every=every)
    with context as (fnet, diffopt), pytest.raises(ValueError, match="training has diverged"):
        diffopt.step(fnet(torch.ones(1, 2)).sum() * math.inf)


def test_adam_adds_eps_where_torch_does_and_higher_does_not() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def trained(library: Any) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        opt = torch.optim.Adam(net.parameters(), lr=0.1, eps=0.1)
        if library is None:
            for _ in range(3):
                opt.zero_grad()
                net(x).square().mean().backward()
                opt.step()
            return net.weight.detach()
        with library.innerloop_ctx(net, opt) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(fnet(x).square().mean())
            found: torch.Tensor = fnet.weight.detach()
        return found

    torchs = trained(None)
    assert torch.allclose(trained(lowmem_higher), torchs, rtol=1e-9)
    assert (trained(higher) - torchs).norm() > 0.1 * torchs.norm()
