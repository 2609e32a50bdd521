"""Which of torch's differentiable operators give the full unroll's gradient when their step is replayed?

    python benchmarks/operators.py            # 4 samples of each in every form; prints a summary, writes JSON
    python benchmarks/operators.py --quick    # one sample of each, as a function, native replay; writes nothing

The operators and their sample inputs are those of torch's own tests (`torch.testing._internal`, which needs the
package `expecttest`). Each sample is made into an inner problem of three steps: the operator's differentiable inputs
are learned tensors, shifted a little by the fast weights; the inner loss is a nonlinear function of all it returns,
with fixed weights; the outer loss is linear in the last fast weights. So the gradient of the learned inputs consists
of the operator's second derivatives and nothing else. It is compared with the full unroll's, with N=2 and both replays.

An operator is called as a function in the loop, in the model's forward, as a method, and in place, with float64 and
with complex128 inputs. "Beyond torch" is what not even the full unroll can differentiate twice on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import lowmem_higher

STEPS = 3
SETTINGS = [{"checkpoint_every": 2, "replay": replay} for replay in ("native", "torch")]
TOLERANCE = 1e-9
SHIFT = 1e-3  # how far the fast weights move an input: samples lie inside the operator's domain, some close to its edge
QUICK_SAMPLES = 4
WIDTH = 3  # fast weights for each input
FORMS = ("function", "module", "method", "in place")
DTYPES = (torch.float64, torch.complex128)

# Outcomes, from best to worst. The first two are exact.
EXACT, EXACT_FIRST_ORDER = "exact", "exact, the second derivative is zero"
BEYOND_TORCH = "torch cannot: no second derivative, no CPU kernel, or not finite"
REFUSED, WRONG = "refused", "wrong"


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # some operators' samples draw from the global generator


def _real_outputs(result: Any) -> list[Tensor]:
    """What a loss can be made of: the floating outputs, dense and real."""
    found = []
    for tensor in tree_flatten(result)[0]:
        if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
            dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
            found.append(torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense)
    return found


class Case:
    """One sample input of an operator as an inner problem.

    Args:
        operator: The entry of torch's database.
        call: The operator, its method or its in-place variant.
        sample: Its input.
        in_module: Whether the model's forward calls it, rather than the loop.
    """

    def __init__(self, operator: Any, call: Callable[..., Any], sample: Any, in_module: bool) -> None:
        self.operator, self.call, self.sample, self.in_module = operator, call, sample, in_module
        leaves, self.structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.learned = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.generator = torch.Generator().manual_seed(1)
        self.directions = [self._draw(WIDTH, *leaves[i].shape, dtype=leaves[i].dtype) for i in self.learned]
        self.start = [self._draw(WIDTH) for _ in self.learned]
        self.weights: list[Tensor] = []
        self.scales: list[float] = []
        self.rate = 0.0

    def _draw(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=self.generator)

    def apply(self, shifts: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The operator's outputs at the shifted inputs."""
        leaves = list(self.leaves)
        for index, shift, value, direction in zip(self.learned, shifts, inputs, self.directions, strict=True):
            leaves[index] = value + SHIFT * torch.tensordot(shift.to(direction.dtype), direction, 1)
        first, args, kwargs = tree_unflatten(leaves, self.structure)
        result = self.operator.gradcheck_wrapper(self.call, first, *args, **kwargs)
        if self.sample.output_process_fn_grad is not None:
            result = self.sample.output_process_fn_grad(result)
        return _real_outputs(result)

    def inner_loss(self, outputs: list[Tensor], shifts: list[Tensor]) -> Tensor:
        """Nonlinear in every output, and in the fast weights themselves."""
        loss = torch.stack([0.05 * shift.square().sum() for shift in shifts]).sum()
        for output, weight, scale in zip(outputs, self.weights, self.scales, strict=True):
            loss = loss + (weight * (output / scale).sin()).mean()
        return loss

    def prepare(self) -> None:
        """Fix the weights of the loss, and a learning rate with which the first step has length 0.3.

        Raises:
            ArithmeticError: The loss or its gradient is not finite.
            RuntimeError, NotImplementedError: torch cannot run or differentiate the operator here.
        """
        _seed()
        shifts = [start.clone().requires_grad_() for start in self.start]
        outputs = self.apply(shifts, tuple(self.leaves[i].clone().requires_grad_() for i in self.learned))
        self.weights = [self._draw(*output.shape) for output in outputs]
        self.scales = [1.0 + output.abs().max().item() for output in outputs]
        grads = torch.autograd.grad(self.inner_loss(outputs, shifts), shifts)
        norm = math.hypot(*(grad.norm().item() for grad in grads))
        if not math.isfinite(norm):
            raise ArithmeticError("the gradient of the operator is not finite at this sample")
        self.rate = 0.3 / (norm + 1e-3)

    def gradients(self, **settings: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The outer gradients, by the initial fast weights and by the learned inputs."""
        _seed()
        inputs = tuple(self.leaves[i].clone().requires_grad_() for i in self.learned)
        net = Shifts(self)
        optimizer = torch.optim.SGD(net.parameters(), lr=self.rate)
        with lowmem_higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for _ in range(STEPS):
                shifts = list(fnet.parameters())
                outputs = fnet(*inputs) if self.in_module else self.apply(shifts, inputs)
                diffopt.step(self.inner_loss(outputs, shifts))
            weights = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
            outer = torch.stack([(weights * shift).sum() for shift in fnet.parameters()]).sum()
        found = torch.autograd.grad(outer, [*net.parameters(), *inputs], allow_unused=True)
        return list(found[: len(inputs)]), list(found[len(inputs) :])

    def outcome(self, settings: list[dict[str, Any]]) -> tuple[str, str]:
        """How the sample came out, and why."""
        try:
            self.prepare()
            by_weights, by_inputs = self.gradients()
            if not all(grad is None or _dense(grad).isfinite().all() for grad in [*by_weights, *by_inputs]):
                raise ArithmeticError("the second derivative is not finite at this sample")
        except (RuntimeError, ArithmeticError, ValueError) as error:
            if isinstance(error, lowmem_higher.LowmemError):
                raise
            return BEYOND_TORCH, _first_line(error)
        for setting in settings:
            try:
                found = self.gradients(**setting)
            except lowmem_higher.LowmemError as error:
                return REFUSED, f"{type(error).__name__}: {_first_line(error)}"
            except Exception as error:  # noqa: BLE001  # an error that is not one of ours is a fault of ours, to be listed
                return WRONG, f"{setting['replay']}: {type(error).__name__}: {_first_line(error)}"
            for ours, theirs in zip([*found[0], *found[1]], [*by_weights, *by_inputs], strict=True):
                difference = _relative_difference(ours, theirs)
                if not difference <= TOLERANCE:
                    again = self.gradients()
                    repeats = all(map(_same, [*again[0], *again[1]], [*by_weights, *by_inputs]))
                    return WRONG, f"{setting['replay']}: differs by {difference:.1e}; the unroll repeats: {repeats}"
        second = any(grad is not None and bool(_dense(grad).any()) for grad in by_inputs)
        return (EXACT if second else EXACT_FIRST_ORDER), ""


class Shifts(nn.Module):
    """Holds the fast weights; its forward is the operator."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.shifts = nn.ParameterList([nn.Parameter(start.clone()) for start in case.start])

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.case.apply(list(self.shifts), inputs)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return _relative_difference(one, other) <= TOLERANCE


def _relative_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    difference, norm = (_dense(ours) - _dense(theirs)).norm().item(), _dense(theirs).norm().item()
    return difference / norm if norm else (math.inf if difference else 0.0)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def operators() -> list[Any]:
    """The entries of torch's database that have a derivative on a CPU in one of `DTYPES`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if op.supports_autograd and op.supported_backward_dtypes("cpu") & set(DTYPES)]


def cases(
    operator: Any, forms: tuple[str, ...], dtypes: tuple[torch.dtype, ...], limit: int
) -> Iterator[tuple[str, Case]]:
    """Samples of an operator that have a differentiable input, in each form that it has; `limit` spread over all."""
    calls = {"method": operator.get_method(), "in place": operator.get_inplace()}
    for dtype in dtypes:
        if dtype not in operator.supported_backward_dtypes("cpu"):
            continue
        _seed()
        samples = list(operator.sample_inputs("cpu", dtype, requires_grad=True))
        if 0 < limit < len(samples):
            samples = [samples[(2 * k + 1) * len(samples) // (2 * limit)] for k in range(limit)]
        for form in forms:
            call = calls.get(form, operator.get_op())
            for sample in samples if call is not None else ():
                case = Case(operator, call, sample, form == "module")
                if case.learned and not (form == "in place" and sample.broadcasts_input):
                    yield form if dtype is torch.float64 else f"{form}, complex", case


@dataclass
class Tally:
    """The outcomes of one operator."""

    name: str
    forms: dict[str, Counter[str]]
    reasons: dict[str, str]

    @property
    def outcome(self) -> str:
        """The worst of its samples; a sample that torch cannot differentiate counts only if there is no other."""
        seen = set().union(*self.forms.values())
        order = (WRONG, REFUSED, EXACT, EXACT_FIRST_ORDER, BEYOND_TORCH)
        return next((outcome for outcome in order if outcome in seen), BEYOND_TORCH)


def sweep(operator: Any, limit: int, quick: bool) -> Tally:
    """Try an operator. `quick` calls it as a function, up to the first sample with a second derivative."""
    tally = Tally(operator.full_name, {}, {})
    forms = FORMS[:1] if quick else FORMS
    dtypes = tuple(dtype for dtype in DTYPES if dtype in operator.supported_backward_dtypes("cpu"))
    for form, case in cases(operator, forms, dtypes[:1] if quick else dtypes, 0 if quick else limit):
        outcome, reason = case.outcome(SETTINGS[:1] if quick else SETTINGS)
        tally.forms.setdefault(form, Counter())[outcome] += 1
        if reason:
            tally.reasons.setdefault(outcome, f"{form}: {reason}")
        if quick and (outcome == EXACT or tally.forms[form][EXACT_FIRST_ORDER] == QUICK_SAMPLES):
            break
    if not tally.forms:
        tally.reasons[BEYOND_TORCH] = "no sample has a differentiable input"
    return tally


def summary(tallies: list[Tally]) -> dict[str, Any]:
    """Counts of operators and samples, and every operator that is not exact with its reason."""
    by_outcome = Counter(tally.outcome for tally in tallies)
    samples: Counter[str] = Counter()
    by_form: dict[str, Counter[str]] = {}
    for tally in tallies:
        for form, outcomes in tally.forms.items():
            samples.update(outcomes)
            by_form.setdefault(form, Counter()).update(outcomes)
    exact = by_outcome[EXACT] + by_outcome[EXACT_FIRST_ORDER]
    return {
        "operators": len(tallies),
        "exact": exact,
        "differentiable_twice": len(tallies) - by_outcome[BEYOND_TORCH],
        "with_second_derivative": by_outcome[EXACT],
        "outcomes": dict(by_outcome),
        "samples": dict(samples),
        "samples_by_form": {form: dict(outcomes) for form, outcomes in by_form.items()},
        "refused": {t.name: t.reasons[REFUSED] for t in tallies if REFUSED in t.reasons},
        "wrong": {t.name: t.reasons[WRONG] for t in tallies if WRONG in t.reasons},
        "beyond_torch": {t.name: t.reasons[BEYOND_TORCH] for t in tallies if t.outcome == BEYOND_TORCH},
    }


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
    exact = result["exact"]
    lines = ["| form | samples exact | refused | wrong | beyond torch |", "|---|---|---|---|---|"]
    for form, outcomes in result["samples_by_form"].items():
        count = outcomes.get(EXACT, 0) + outcomes.get(EXACT_FIRST_ORDER, 0)
        others = " | ".join(str(outcomes.get(outcome, 0)) for outcome in (REFUSED, WRONG, BEYOND_TORCH))
        lines.append(f"| {form} | {count} | {others} |")
    rest = [f"- `{name}` is refused: {reason}" for name, reason in result["refused"].items()]
    rest += [f"- `{name}` is **wrong**: {reason}" for name, reason in result["wrong"].items()]
    rest += [f"- `{name}` is beyond the full unroll: {reason}" for name, reason in result["beyond_torch"].items()]
    return "\n\n".join(
        [
            f"`{result['command']}`: {exact} of the {result['differentiable_twice']} operators that a full unroll can "
            f"differentiate twice give its gradient to {TOLERANCE:g} at every sample tried "
            f"({result['with_second_derivative']} of them with a second derivative that is not zero). "
            f"{result['operators']} operators in all, {sum(result['samples'].values()):,} samples, "
            f"{result['seconds']:.0f} s.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            "\n".join(lines),
            "\n".join(rest),
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="torch's operators, replayed", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4, help="of each operator, form and dtype; 0 for all (hours)")
    parser.add_argument("--quick", action="store_true", help="one sample of each operator; writes only with --out")
    parser.add_argument("--only", nargs="+", help="names of operators, as in torch's database")
    parser.add_argument("--out", type=Path, help="folder for the JSON; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick or arguments.only:
        arguments.no_readme = True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Sweep, print, save."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "operators",
        "command": ("python benchmarks/operators.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip(),
        "environment": common.environment(torch.device("cpu")),
    }
    tallies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's samples warn of prototypes and deprecations
        chosen = [op for op in operators() if not arguments.only or {op.name, op.full_name} & set(arguments.only)]
        for number, operator in enumerate(chosen, 1):
            tallies.append(sweep(operator, arguments.samples, arguments.quick))
            if sys.stderr.isatty():
                print(f"\r{number} of {len(chosen)}: {operator.full_name:60}", end="", file=sys.stderr)
    result |= summary(tallies)
    result["seconds"] = time.perf_counter() - started
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        common.write_json(arguments.out / "operators.json", result)
    if not arguments.no_readme:
        common.write_section("operators", section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
