"""The public names of `higher`, at the same places, with the same arguments, doing the same; and standing in for it."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import TiedAutoencoder, mlp
from torch import Tensor, nn

import lowmem_higher

higher = pytest.importorskip("higher")

SIGNATURES = [
    "innerloop_ctx",
    "monkeypatch",
    "get_diff_optim",
    "register_optim",
    "patch.make_functional",
    "patch.monkeypatch",
    "patch.buffer_sync",
    "optim.get_diff_optim",
    "optim.register_optim",
    "optim.DifferentiableOptimizer.__init__",
    "utils.flatten",
    "utils.get_func_params",
    "utils._copy_tensor",
    "utils._recursive_copy_and_cast",
    "utils._recursive_map",
    "utils._is_container",
    "utils._find_param_in_list",
    "utils._get_param_mapping",
]


def found_in(library: Any, path: str) -> Any:
    for name in path.split("."):
        library = getattr(library, name)
    return library


@pytest.mark.parametrize("path", SIGNATURES)
def test_the_same_arguments_in_the_same_order(path: str) -> None:
    theirs = inspect.signature(found_in(higher, path)).parameters.values()
    ours = list(inspect.signature(found_in(lowmem_higher, path)).parameters.values())
    for expected, given in zip(theirs, ours, strict=False):
        if not path.startswith("utils._") and path != "optim.register_optim" and path != "register_optim":
            assert given.name == expected.name
        assert given.kind == expected.kind
        assert given.default == expected.default
    assert all(extra.kind is extra.KEYWORD_ONLY for extra in ours[len(theirs) :])


def test_a_step_takes_its_arguments_by_position() -> None:
    """`step(loss, params, override, grad_callback)`."""

    def stepped(library: Any) -> list[Tensor]:
        net = nn.Linear(2, 1)
        with torch.no_grad():
            net.weight.fill_(0.5)
            net.bias.fill_(0.1)
        with library.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fnet, diffopt):
            for _ in range(2):
                loss = fnet(torch.ones(3, 2)).square().sum()
                new = diffopt.step(loss, fnet.fast_params, {"lr": [0.2]}, lambda grads: [0.5 * g for g in grads])
        return list(new)

    for ours, theirs in zip(stepped(lowmem_higher), stepped(higher), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("arguments", [([], None, None, None), ([], {"lr": [1.0]}, None), (None, {"lr": [1.0]})])
def test_arguments_too_many_or_twice_are_refused(arguments: tuple[Any, ...]) -> None:
    net = nn.Linear(2, 1)
    diffopt = lowmem_higher.get_diff_optim(
        torch.optim.SGD(net.parameters(), lr=0.1), net.parameters(), lowmem_higher.monkeypatch(net)
    )
    with pytest.raises(TypeError, match="an argument too many, or one twice"):
        diffopt.step(torch.zeros((), requires_grad=True), *arguments, override={"lr": [2.0]})


# --------------------------------------------------------------------------------------------------------------- patch


@pytest.mark.parametrize("library", [higher, lowmem_higher], ids=["higher", "lowmem_higher"])
def test_make_functional(library: Any) -> None:
    net, x, called = mlp(), torch.randn(5, 3), []
    fnet = library.patch.make_functional(net, encapsulator=lambda *pair: called.append(pair))
    assert called == [(fnet, net)]
    assert isinstance(fnet, nn.Sequential)
    with pytest.raises(ValueError, match="params"):
        fnet(x)
    with pytest.raises(Exception, match="weights"):
        list(fnet.parameters())
    first, second = ([scale * p for p in net.parameters()] for scale in (1.0, 2.0))
    torch.testing.assert_close(fnet(x, params=first), net(x))
    assert fnet(x, params=second).grad_fn is not None
    torch.testing.assert_close(fnet(x), nn.functional.linear((2 * net[0](x)).tanh(), second[2], second[3]))
    assert all(a is b for a, b in zip(fnet.parameters(time=0), first, strict=True))
    assert all(a is b for a, b in zip(fnet.fast_params, second, strict=True))


@pytest.mark.parametrize("copy_initial_weights", [True, False])
def test_monkeypatch_and_a_loop_by_hand(copy_initial_weights: bool) -> None:
    def gradients_of(library: Any) -> list[Tensor]:
        torch.manual_seed(3)
        net, x = mlp().double(), torch.randn(5, 3, dtype=torch.float64)
        fnet = library.monkeypatch(net, copy_initial_weights=copy_initial_weights)
        opt = library.get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net.parameters(), fnet)
        for _ in range(3):
            opt.step(fnet(x).sin().mean())
        start = list(fnet.parameters(time=0)) if copy_initial_weights else list(net.parameters())
        return list(torch.autograd.grad(fnet(x).sin().sum(), start))

    for ours, theirs in zip(gradients_of(lowmem_higher), gradients_of(higher), strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_monkeypatch_without_history() -> None:
    fnet = lowmem_higher.monkeypatch(mlp(), track_higher_grads=False)
    assert not fnet.track_higher_grads
    fnet.update_params([2 * p for p in fnet.fast_params])
    with pytest.raises(ValueError, match="time=1"):
        list(fnet.parameters(time=1))


@pytest.mark.parametrize("library", [higher, lowmem_higher], ids=["higher", "lowmem_higher"])
def test_buffer_sync(library: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fnet = library.monkeypatch(net)
    net(torch.randn(8, 3))
    expected = net[1].running_mean.clone()
    assert not torch.equal(fnet.state_dict()["1.running_mean"], expected)
    library.patch.buffer_sync(net, fnet)
    assert torch.equal(fnet.state_dict()["1.running_mean"], expected)
    fnet(torch.randn(8, 3))
    assert torch.equal(net[1].running_mean, expected)
    assert not torch.equal(fnet.state_dict()["1.running_mean"], expected)


def test_buffer_sync_between_other_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in their buffers"):
        lowmem_higher.patch.buffer_sync(nn.BatchNorm1d(2), lowmem_higher.monkeypatch(nn.Linear(2, 2)))


def test_buffer_sync_under_checkpoints_is_exact() -> None:
    """New statistics set between two steps are part of the next carry."""

    def gradient(every: int | None) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(8, 3, dtype=torch.float64)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        net.eval()
        context = lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=every)
        with context as (fnet, diffopt):
            for t in range(5):
                if t == 3:
                    net[1].running_mean.add_(0.5)
                    lowmem_higher.patch.buffer_sync(net, fnet)
                diffopt.step((fnet(x) - 1).square().mean())
            return torch.autograd.grad(fnet(x).sin().sum(), net[0].weight)[0]

    expected = gradient(None)
    for every in (1, 2, 10):
        assert (gradient(every) - expected).norm() <= 1e-9 * expected.norm()


# --------------------------------------------------------------------------------------------------------------- utils

Point = namedtuple("Point", "x y")
NESTED: dict[str, Any] = {"a": [1, (2, torch.ones(2))], "b": {"c": {3}, "d": []}}


def test_utils_do_the_same() -> None:
    theirs, ours = higher.utils, lowmem_higher.utils
    assert [str(leaf) for leaf in ours.flatten(NESTED)] == [str(leaf) for leaf in theirs.flatten(NESTED)]
    assert ours.flatten(5) == theirs.flatten(5) == [5]
    for value in ([], (), {}, set(), 1, "ab", torch.ones(1), None):
        assert ours._is_container(value) == theirs._is_container(value)
    doubled = ours._recursive_map({"a": [1, (2, 3)]}, lambda x: 2 * x)
    assert doubled == theirs._recursive_map({"a": [1, (2, 3)]}, lambda x: 2 * x) == {"a": [2, (4, 6)]}
    assert ours._recursive_map(Point(1, [2]), lambda x: -x) == Point(-1, [-2])  # which `higher` cannot
    params = list(mlp().parameters())
    for param in (params[2], torch.ones(1)):
        assert ours._find_param_in_list(param, params) == theirs._find_param_in_list(param, params)
    net = TiedAutoencoder()
    for module in (net, nn.Sequential(net.encoder, net, net.encoder)):
        expected_seen: list[Tensor] = []
        seen: list[Tensor] = []
        expected = theirs._get_param_mapping(module, expected_seen, [])
        assert ours._get_param_mapping(module, seen, []) == expected
        assert all(a is b for a, b in zip(seen, expected_seen, strict=True))
        assert len(expected) > len(seen)


@pytest.mark.parametrize("safe_copy", [True, False])
def test_copies_of_tensors(safe_copy: bool) -> None:
    net = mlp()
    net[0].bias.requires_grad_(False)
    for library in (higher, lowmem_higher):
        found = library.utils.get_func_params(net, safe_copy=safe_copy)
        for copy, param in zip(found, net.parameters(), strict=True):
            assert copy.is_leaf
            assert copy is not param
            assert copy.requires_grad == param.requires_grad
            assert (copy.data_ptr() == param.data_ptr()) != safe_copy
            assert torch.equal(copy, param)
    source = {"a": [torch.ones(2, requires_grad=True) * 2, 3]}
    copied = lowmem_higher.utils._recursive_copy_and_cast(source, torch.device("cpu"))
    assert copied["a"][0].is_leaf
    assert copied["a"][0].requires_grad
    assert copied["a"][0] is not source["a"][0]
    assert copied["a"][1] == 3


# ------------------------------------------------------------------------------------------------------- standing in

THIRD_PARTY = """
import higher
import higher.optim as ho
from higher import innerloop_ctx, monkeypatch
from higher.patch import buffer_sync, make_functional
from higher.utils import flatten
import torch

def adapted(net, steps):
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
        assert isinstance(diffopt, ho.DifferentiableSGD)
        for _ in range(steps):
            diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        fnet(torch.ones(1, 2)).sum().backward()
    return net.weight.grad
"""


def run_alone(tmp_path: Any, code: str) -> str:
    (tmp_path / "third_party.py").write_text(THIRD_PARTY)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {sys.path[0]!r}]\n" + code
    root = lowmem_higher.__file__.rpartition("lowmem_higher")[0]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    return result.stdout


def test_code_that_imports_higher_runs_on_us(tmp_path: Any) -> None:
    out = run_alone(
        tmp_path,
        """
import lowmem_higher
stand_in = lowmem_higher.install_as_higher()
lowmem_higher.install_as_higher()  # once more changes nothing
import torch, third_party
assert third_party.higher is lowmem_higher and third_party.ho is lowmem_higher.optim
assert third_party.adapted(torch.nn.Linear(2, 1), 3).norm() > 0
stand_in.uninstall()
import higher
assert higher is not lowmem_higher and higher.__file__ != lowmem_higher.__file__
stand_in.uninstall()
assert sys.modules["higher"] is higher
try:
    lowmem_higher.install_as_higher()
except ImportError as error:
    print(error)
with_error = sys.modules["higher"] is higher and sys.modules["higher.optim"] is higher.optim
print(with_error)
""",
    )
    assert "higher was imported already" in out
    assert "install_as_higher() first, at the top of the program" in out
    assert out.endswith("True\n")


def test_a_with_block_ends_it_also_by_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "higher"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(KeyError), lowmem_higher.install_as_higher():
        assert importlib.import_module("higher.utils") is lowmem_higher.utils
        raise KeyError
    assert not any(name.partition(".")[0] == "higher" for name in sys.modules)


def test_every_way_to_import_a_public_name() -> None:
    makers: list[Callable[..., Any]] = [lowmem_higher.monkeypatch, lowmem_higher.patch.monkeypatch]
    assert makers[0] is makers[1]
    assert lowmem_higher.get_diff_optim is lowmem_higher.optim.get_diff_optim
    assert lowmem_higher.register_optim is lowmem_higher.optim.register_optim
    assert {"optim", "patch", "utils", "monkeypatch", "install_as_higher"} <= set(lowmem_higher.__all__)


# ---------------------------------------------------------------------------------------- optimizers without a model


def test_without_a_functional_model_step_needs_params() -> None:
    y = torch.ones(2, requires_grad=True)
    diffopt = lowmem_higher.get_diff_optim(torch.optim.SGD([y], lr=0.1), [y])
    with pytest.raises(ValueError, match=r"params=\[y\]"):
        diffopt.step(y.square().sum())
    with pytest.raises(ValueError, match="step got 0 tensors in params"):
        diffopt.step(y.square().sum(), params=[])
    (new,) = diffopt.step(lambda nothing, scale: scale * y.square().sum(), 0.5, params=[y])
    torch.testing.assert_close(new, 0.9 * y)
    with pytest.raises(ValueError, match="does not depend on the current fast weights"):
        diffopt.step(new.sum(), params=[y.clone()])


@pytest.mark.parametrize("every", [None, 2])
def test_params_are_the_fast_weights_where_there_is_a_model(every: int | None) -> None:
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=every) as (fnet, diffopt):
        x = torch.ones(3, 2)
        same = diffopt.step(fnet(x).sum(), params=fnet.parameters())
        assert all(a is b for a, b in zip(same, fnet.fast_params, strict=True))
        others = [2 * p for p in fnet.parameters()]
        loss = nn.functional.linear(x, *others).sum()
        if every is None:
            new = diffopt.step(loss, params=others)
            torch.testing.assert_close(new[0], others[0] - 0.3)
        else:
            with pytest.raises(ValueError, match=r"fmodel.update_params\(params\)"):
                diffopt.step(loss, params=others)
