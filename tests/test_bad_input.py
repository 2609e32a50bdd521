"""Bad input raises its own clear error, and leaves model, optimizer and torch as they were."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher

pytestmark = pytest.mark.usefixtures("float64")

Snapshot = Callable[[], Any]
SETTINGS: list[dict[str, Any]] = [{}, {"checkpoint_every": 2}, {"checkpoint_every": 2, "replay": "torch"}]
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    opt.step()
    return opt


def contents(value: Any) -> Any:
    """What is compared before and after: tensors by value and identity, the rest by equality."""
    if isinstance(value, Tensor):
        return (id(value), value.detach().tolist(), value.requires_grad)
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    return value


@contextlib.contextmanager
def unchanged(
    read_globals: Snapshot, model: nn.Module, opt: torch.optim.Optimizer, fmodel: Any = None, diffopt: Any = None
) -> Iterator[None]:
    """Model, optimizer, generators and torch's global state, and those of the loop, are the same after the block."""

    def read() -> dict[str, Any]:
        state = {
            "torch": read_globals(),
            "random numbers": torch.get_rng_state().tolist(),
            "parameters": contents(dict(model.named_parameters())),
            "buffers": contents(dict(model.named_buffers())),
            "gradients": contents([param.grad for param in model.parameters()]),
            "modes": [module.training for module in model.modules()],
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "classes": [type(module) for module in model.modules()],
            "optimizer": contents([{"params": group["params"]} | group for group in opt.param_groups]),
            "optimizer's state": contents([opt.state[param] for param in model.parameters() if param in opt.state]),
        }
        if fmodel is not None:
            state["fast weights"] = contents(list(fmodel.parameters()))
            state["times"] = len(fmodel._view.history)
            state["modes of fmodel"] = [module.training for module in fmodel.modules()]
            state["hyperparameters"] = contents(diffopt.param_groups)
            state["state of diffopt"] = contents(diffopt.state)
            state["steps"] = diffopt.report.steps
        return state

    before = read()
    yield
    after = read()
    for name, value in before.items():
        assert after[name] == value, name


# ------------------------------------------------------------------------------------------------ entering a context


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0, ValueError, "checkpoint_every=0 must be at least 1"),
        (-3, ValueError, "checkpoint_every=-3 must be at least 1"),
        (2.0, TypeError, "checkpoint_every=2.0 is a float.*whole number"),
        (float("nan"), TypeError, "is a float"),
        (True, TypeError, "checkpoint_every=True is a bool"),
        (False, TypeError, "checkpoint_every=False is a bool"),
        ("10", TypeError, "checkpoint_every='10' is a str"),
        (Fraction(2), TypeError, "is a Fraction"),
        (torch.tensor(3), TypeError, "is a Tensor"),
    ],
)
def test_checkpoint_every(value: Any, error: type[Exception], match: str, global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    with unchanged(global_state, model, opt), pytest.raises(error, match=match):
        higher.innerloop_ctx(model, opt, checkpoint_every=value).__enter__()


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"replay": "fast"}, "replay='fast' is unknown; it can be 'native' or 'torch'"),
        ({"replay": None}, "replay=None is unknown"),
        ({"pullback": "forward"}, "pullback='forward' is unknown"),
        ({"verify": True}, "verify=True is unknown; it can be 'new' or 'all' or 'off'"),
        ({"override": {"lr": [0.1, 0.2]}}, r"override\['lr'\] has 2 values; it needs 1"),
        ({"override": {"momentum": [0.5], "lr": []}}, r"override\['lr'\] has 0 values"),
    ],
)
@pytest.mark.parametrize("every", [None, 2])
def test_keywords_of_the_context(
    keywords: dict[str, Any], match: str, every: int | None, global_state: Snapshot
) -> None:
    model = net()
    opt = trained(model)
    with unchanged(global_state, model, opt), pytest.raises(ValueError, match=match):
        higher.innerloop_ctx(model, opt, checkpoint_every=every, **keywords).__enter__()


def test_the_keywords_after_the_first_six_have_no_position() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="positional"):
        higher.innerloop_ctx(model, opt, None, True, None, True, 10)  # type: ignore[misc]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_optimizer_of_another_model(setting: dict[str, Any], global_state: Snapshot) -> None:
    model, other = net(), net()
    opt = trained(other)
    with (
        unchanged(global_state, model, opt),
        pytest.raises(ValueError, match="holds a parameter that is not one of the model's"),
    ):
        higher.innerloop_ctx(model, opt, **setting).__enter__()
    extra = torch.optim.SGD([*model.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    with unchanged(global_state, model, extra), pytest.raises(ValueError, match="not one of the model's"):
        higher.innerloop_ctx(model, extra, **setting).__enter__()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_unsupported_optimizer(setting: dict[str, Any], global_state: Snapshot) -> None:
    """The error lists the supported ones and says how to add one; a subclass of a supported one is not supported
    either."""

    class Mine(torch.optim.SGD):
        pass

    model = net()
    for opt, match in (
        (torch.optim.LBFGS(model.parameters()), r"LBFGS has no differentiable.*line search.*torch\.optim\.Adam or SGD"),
        (torch.optim.SparseAdam(model.parameters()), r"SparseAdam has no.*sparse gradients.*torch\.optim\.Adam"),
        (Mine(model.parameters(), lr=0.1), r"Mine has no differentiable.*Adam, AdamW.*SGD.*register_optim\(Mine, "),
    ):
        with unchanged(global_state, model, opt), pytest.raises(ValueError, match=match):
            higher.innerloop_ctx(model, opt, **setting).__enter__()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_no_model_and_no_optimizer(setting: dict[str, Any], global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    for wrong in (nn.Linear, lambda x: x, None, list(model.parameters())):
        with (
            unchanged(global_state, model, opt),
            pytest.raises(TypeError, match=r"The model must be a torch.nn.Module"),
        ):
            higher.innerloop_ctx(wrong, opt, **setting).__enter__()
    for wrong in (torch.optim.SGD, None, model, "SGD"):
        with (
            unchanged(global_state, model, opt),
            pytest.raises(TypeError, match=r"The optimizer must be a torch.optim.Optimizer"),
        ):
            higher.innerloop_ctx(model, wrong, **setting).__enter__()
    with unchanged(global_state, model, opt), pytest.raises(RuntimeError, match=r"[Dd]evice"):
        higher.innerloop_ctx(model, opt, device="nowhere", **setting).__enter__()


def test_register_optim() -> None:
    with pytest.raises(TypeError, match="class of torch optimizers first"):
        higher.register_optim(nn.Linear, higher.optim.DifferentiableSGD)
    with pytest.raises(TypeError, match="subclass of DifferentiableOptimizer second"):
        higher.register_optim(torch.optim.Rprop, torch.optim.SGD)
    with pytest.raises(TypeError, match="first"):
        higher.register_optim(torch.optim.SGD(net().parameters(), lr=0.1), higher.optim.DifferentiableSGD)


# --------------------------------------------------------------------------------------------------------- taking a
# step


def shape_of_vector(fmodel: Any, model: nn.Module) -> Tensor:
    return fmodel(X).squeeze(1)


def nan(fmodel: Any, model: nn.Module) -> Tensor:
    return fmodel(X).mean() * float("nan")


def infinite(fmodel: Any, model: nn.Module) -> Tensor:
    return fmodel(X).mean() / 0.0


def without_graph(fmodel: Any, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return fmodel(X).mean()


def detached(fmodel: Any, model: nn.Module) -> Tensor:
    return fmodel(X).mean().detach()


def of_the_original_model(fmodel: Any, model: nn.Module) -> Tensor:
    model.eval()  # leaves the statistics alone
    try:
        return model(X).mean()
    finally:
        model.train()


def of_a_leaf(fmodel: Any, model: nn.Module) -> Tensor:
    return torch.tensor(1.0, requires_grad=True) * 2


def a_number(fmodel: Any, model: nn.Module) -> Any:
    return fmodel(X).mean().item()


def nothing(fmodel: Any, model: nn.Module) -> None:
    fmodel(X).mean()


def a_list(fmodel: Any, model: nn.Module) -> list[Tensor]:
    return [fmodel(X).mean()]


BAD_LOSSES: list[tuple[Any, type[Exception], str]] = [
    (shape_of_vector, ValueError, r"The loss has shape \(8,\); a step needs a scalar"),
    (nan, ValueError, "The loss is nan: training has diverged"),
    (infinite, ValueError, "The loss is -?inf: training has diverged"),
    (without_graph, ValueError, "The loss has no graph.*no_grad"),
    (detached, ValueError, "The loss has no graph.*detached"),
    (of_the_original_model, ValueError, r"does not depend on the current fast weights.*fmodel\(x\), not model\(x\)"),
    (of_a_leaf, ValueError, "does not depend on the current fast weights"),
    (a_number, TypeError, "needs a scalar tensor or a function that returns one, and got float"),
    (nothing, TypeError, "got NoneType"),
    (a_list, TypeError, "got list"),
]


@pytest.mark.parametrize(("make", "error", "match"), BAD_LOSSES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("how", ["loss", "function", "override"])
def test_a_loss_that_no_step_can_be_taken_from(
    make: Any, error: type[Exception], match: str, setting: dict[str, Any], how: str, global_state: Snapshot
) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **setting) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).square().mean())
        fmodel.eval()
        with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises(error, match=match):
            if how == "function":
                diffopt.step(lambda fmodel: make(fmodel, model))
            elif how == "override":
                diffopt.step(make(fmodel, model), override={"lr": [100.0]})
            else:
                diffopt.step(make(fmodel, model))
        fmodel.train()
        diffopt.step(fmodel(X).square().mean())
    fmodel(X).mean().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_loss_of_before_the_last_step(setting: dict[str, Any], global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        loss = fmodel(X).square().mean()
        diffopt.step(loss)
        error, match = (
            (higher.RecordError, "before the last step") if setting else (ValueError, "after the previous step")
        )
        with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises(error, match=match):
            diffopt.step(loss)


def test_a_step_outside_of_the_recording(global_state: Snapshot) -> None:
    """After the context, on a loss made before it or on one made after it; the error says what works there."""
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=2) as (fmodel, diffopt):
        diffopt.step(fmodel(X).square().mean())
        inside = fmodel(X).square().mean()
    fmodel.eval()
    match = r"after the context was left.*diffopt.step\(fn, \*args\)"
    for loss in (inside, fmodel(X).square().mean()):
        with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises(higher.RecordError, match=match):
            diffopt.step(loss)
    diffopt.step(lambda fmodel, x: fmodel(x).square().mean(), X)
    fmodel(X).mean().backward()


def test_a_loss_made_in_another_thread_or_before_the_context_is_refused(global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    before = model(X).square().mean()
    with (
        higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=2) as (fmodel, diffopt),
        unchanged(global_state, model, opt, fmodel, diffopt),
        pytest.raises((higher.RecordError, ValueError)),
    ):
        diffopt.step(before)


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_a_step_inside_of_a_recorded_call(setting: dict[str, Any], global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        fmodel.eval()
        loss = fmodel(X).square().mean()
        for inside in (
            lambda: diffopt.step(lambda fmodel: diffopt.step(fmodel(X).mean()) or fmodel(X).mean()),
            lambda: diffopt.step(loss, grad_callback=lambda grads: diffopt.step(loss) or grads),
        ):
            with (
                unchanged(global_state, model, opt, fmodel, diffopt),
                pytest.raises(higher.RecordError, match="inside"),
            ):
                inside()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_arguments_of_step(setting: dict[str, Any], global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        fmodel.eval()

        def loss() -> Tensor:
            return fmodel(X).square().mean()

        bad: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda: diffopt.step(loss(), X), TypeError, r"further arguments besides a tensor"),
            (lambda: diffopt.step(loss(), params=[]), ValueError, r"step got 0 tensors in params"),
            (lambda: diffopt.step(), TypeError, "loss"),
            (lambda: diffopt.step(loss(), override={"lr": [0.1, 0.2]}), ValueError, r"override\['lr'\] has 2 values"),
            (
                lambda: diffopt.step(loss(), override={"momentum": [0.0], "lr": []}),
                ValueError,
                r"override\['lr'\] has 0",
            ),
        ]  # fmt: skip
        for call, error, match in bad:
            with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises(error, match=match):
                call()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_misspelled_hyperparameter(setting: dict[str, Any], global_state: Snapshot) -> None:
    """`learning_rate` would be stored, read by nobody, and its gradient would be None."""
    model = net()
    opt = trained(model)
    with unchanged(global_state, model, opt), pytest.raises(ValueError, match=r"learning_rate.*lr"):
        higher.innerloop_ctx(model, opt, override={"learning_rate": [0.1]}, **setting).__enter__()
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        loss = fmodel.eval()(X).square().mean()
        with (
            unchanged(global_state, model, opt, fmodel, diffopt),
            pytest.raises(ValueError, match=r"learning_rate.*lr"),
        ):
            diffopt.step(loss, override={"learning_rate": [0.1]})


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (lambda grads: None, "grad_callback"),
        (lambda grads: grads[:-1], "grad_callback"),
        (lambda grads: [*grads, grads[0]], "grad_callback"),
        (lambda grads: [grad.sum() for grad in grads], "shape"),
        (lambda grads: [1.0 for _ in grads], "grad_callback"),
    ],
    ids=["nothing", "too few", "too many", "other shapes", "numbers"],
)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_grad_callback_returns(callback: Any, words: str, setting: dict[str, Any], global_state: Snapshot) -> None:
    """A gradient that is missing or broadcast would train something else."""
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        loss = fmodel.eval()(X).square().mean()
        with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises((TypeError, ValueError), match=words):
            diffopt.step(loss, grad_callback=callback)


# --------------------------------------------------------------------------------------------------------- going back


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_create_graph_through_a_checkpointed_context(setting: dict[str, Any], global_state: Snapshot) -> None:
    """The error names `checkpoint_every=None`; the graph is still there for a backward without create_graph."""
    model = net()
    opt = trained(model)
    opt.zero_grad()
    match = r"create_graph=True.*checkpoint_every=None"
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **setting) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).square().mean())
        outer = fmodel.eval()(X).square().mean()
        params = list(model.parameters())
        with unchanged(global_state, model, opt, fmodel, diffopt):
            with pytest.raises(higher.HigherOrderError, match=match):
                torch.autograd.grad(outer, params, create_graph=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of the reference cycle that create_graph=True makes
                with pytest.raises(higher.HigherOrderError, match=match):
                    outer.backward(create_graph=True)
    torch.autograd.grad(outer, params)


def test_create_graph_through_the_full_unroll() -> None:
    model = net()
    with higher.innerloop_ctx(model, trained(model), copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).square().mean())
        outer = fmodel.eval()(X).square().mean()
    first = torch.autograd.grad(outer, list(model.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), list(model.parameters()))
    assert all(grad.isfinite().all() for grad in second)
    assert any(grad.norm() > 0 for grad in second)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_times_and_weights(setting: dict[str, Any], global_state: Snapshot) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).square().mean())
        weights = list(fmodel.parameters())
        bad: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda: list(fmodel.parameters(time=4)), IndexError, "time=4 is out of range.*0 to 3"),
            (lambda: list(fmodel.parameters(time=-5)), IndexError, "time=-5 is out of range"),
            (lambda: fmodel.update_params(weights[:-1]), ValueError, "6 parameters, and 5 new ones"),
            (lambda: fmodel(X, params=[*weights, weights[0]]), ValueError, "6 parameters, and 7 new ones"),
            (lambda: fmodel.update_params([weight[:1] for weight in weights]), ValueError, "shape"),
        ]  # fmt: skip
        for call, error, match in bad:
            with unchanged(global_state, model, opt, fmodel, diffopt), pytest.raises(error, match=match):
                call()


@pytest.mark.parametrize("every", [None, 2])
def test_an_untracked_loop_has_no_past(every: int | None) -> None:
    model = net()
    opt = trained(model)
    with higher.innerloop_ctx(model, opt, track_higher_grads=False, checkpoint_every=every) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).square().mean())
        assert len(list(fmodel.parameters(time=0))) == len(list(fmodel.parameters(time=-1)))
        with pytest.raises(ValueError, match="time=2 was asked for, but track_higher_grads=False"):
            fmodel.parameters(time=2)
        with pytest.raises(RuntimeError, match="init_fast_params needs the history"):
            _ = fmodel.init_fast_params
