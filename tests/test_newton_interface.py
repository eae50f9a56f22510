"""`DampedNewton` as an optimizer of torch: checkpoints, copies, options that change, and wrong input."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from _hessian.newton_options import initial_state
from hessian import DeepMLPWithTracking
from newton import DampedNewton
from tests.newton_oracles import closure_of, parameters_of, state_of
from tests.oracles import Case, raises

pytestmark = pytest.mark.slow

RESUMED = (
    (Case((6, 5), 14, inputs=4), {}, 12, {"gauss_newton"}),
    (Case((6, 5), 14, inputs=4), {"curvature_batch": 5, "weight_decay": 1e-3}, 12, {"gauss_newton"}),
    (Case((6, 5), 20, inputs=4), {"weight_decay": 0.05}, 21, {"gauss_newton", "hessian", "none"}),
    (Case((6, 5), 14, inputs=4), {"curvature": "hessian"}, 11, {"hessian"}),
    (Case((6, 5), 14, inputs=1, loss="mse"), {}, 12, {"gauss_newton"}),
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("case, options, steps, methods", RESUMED, ids=str)
def test_a_run_goes_on_bit_for_bit(case, options, steps, methods, dtype):
    """Stopped after some step, saved, and loaded into a new model and optimizer."""

    def build(seed: int = 0):
        model, x, y = case.build(seed=seed)
        return model.to(dtype), x.to(dtype), y.to(dtype) if y.is_floating_point() else y

    model, x, y = build()
    optimizer, states, seen = DampedNewton(model, **options), [], set()
    for _ in range(steps):
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        optimizer.step(closure_of(model, x, y))
        seen.add(optimizer.report.method)
    if dtype == torch.float64:
        assert seen == methods
    end = parameters_of(model)
    for stop in (1, steps // 2, steps - 7, steps - 4):
        buffer = io.BytesIO()
        torch.save(states[stop], buffer)
        buffer.seek(0)
        parameters, state = torch.load(buffer, weights_only=True)
        second, _, _ = build(seed=1)
        second.load_state_dict(parameters)
        optimizer = DampedNewton(second, **options)
        optimizer.load_state_dict(state)
        torch.randn(3)  # the global generator is not read
        for _ in range(steps - stop):
            optimizer.step(closure_of(second, x, y))
        assert torch.equal(parameters_of(second), end)


def test_a_copy_takes_the_same_step():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model)
    optimizer.step(closure_of(model, x, y))
    other, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, copied)):
        o.step(closure_of(m, x, y))
    assert torch.equal(parameters_of(model), parameters_of(other)) and copied.report == optimizer.report


def test_a_checkpoint_of_an_older_version_goes_on():
    """Its other keys are dropped. What it lacks gets its default; a version without conjugate gradients has none."""
    model, x, y = Case((6, 5), 14, inputs=4).build()
    saved = DampedNewton(model, curvature_batch=5).state_dict()
    old = {"step": 7, "damping": 0.25, "momentum": torch.ones(3), "data": (), "patience": 5, "polishing": True}
    saved["state"][0] = old
    del saved["param_groups"][0]["cg_iterations"]
    optimizer = DampedNewton(model, curvature_batch=5)
    optimizer.load_state_dict(saved)
    assert state_of(optimizer) == {**initial_state(0.25), "step": 7}
    assert optimizer.param_groups[0]["cg_iterations"] == 0
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted and state_of(optimizer)["step"] == 8


@pytest.mark.parametrize("route", ["gram", "sweep"])
def test_what_a_step_leaves_can_be_differentiated(route):
    torch.manual_seed(0)
    model = DeepMLPWithTracking(5, 4, 3, 3).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    optimizer = DampedNewton(model, route=route)
    loss = optimizer.step(lambda: model(x, y, track_activations=True))
    assert optimizer.report.accepted
    kept = [loss, *model.parameters(), *optimizer.state_dict()["state"][0].values()]
    assert not any(t.is_inference() for t in kept if isinstance(t, torch.Tensor))
    model(x, y).backward()


def test_options_may_be_changed_in_param_groups():
    """Gauss–Newton is asked for after a step with the exact Hessian."""
    case = Case((6, 5), 20, inputs=4, loss="mse")
    model, x, y = case.build()
    optimizer = DampedNewton(model, weight_decay=0.05)
    for _ in range(50):
        optimizer.step(closure_of(model, x, y))
        if optimizer.report.method == "hessian":
            break
    assert optimizer.report.method == "hessian"
    optimizer.param_groups[0]["curvature"] = "gauss_newton"
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.method == "gauss_newton"


def test_wrong_optimizer_arguments():
    model, x, y = Case((4,), 3).build()
    raises(
        TypeError, "must be a DeepMLPWithTracking or a TrackedNetwork, got Linear", DampedNewton, torch.nn.Linear(2, 2)
    )
    raises(ValueError, "unknown curvature 'fisher'", DampedNewton, model, curvature="fisher")
    raises(ValueError, "unknown metric", DampedNewton, model, metric="euclidean")
    raises(ValueError, "unknown route", DampedNewton, model, route="dense")
    raises(ValueError, "curvature_batch must be an integer ≥ 1", DampedNewton, model, curvature_batch=0)
    raises(
        TypeError,
        "closure must return the loss, got NoneType: .* `return model",
        DampedNewton(model).step,
        lambda: None,
    )
    raises(TypeError, "closure must be a function .*, got NoneType: pass lambda", DampedNewton(model).step)
    raises(TypeError, "closure must be a function .*, got Tensor", DampedNewton(model).step, model(x, y))
    raises(ValueError, "route='gram' has the Gauss–Newton", DampedNewton, model, route="gram", curvature="hessian")
    raises(ValueError, "weight_decay", DampedNewton, model, weight_decay=-1.0)
    raises(ValueError, "damping must be positive.*pass 1.0", DampedNewton, model, damping=0.0)
    raises(ValueError, "damping must be positive.*got '1'", DampedNewton, model, damping="1")
    raises(ValueError, "metric_damping must be positive.*pass None", DampedNewton, model, metric_damping=-1)
    raises(ValueError, "seed must be an integer, got None", DampedNewton, model, seed=None)
    raises(ValueError, "curvature_batch must", DampedNewton, model, curvature_batch=True)
    raises(ValueError, "cg_iterations must be an integer ≥ 0, .* got -1", DampedNewton, model, cg_iterations=-1)
    optimizer = DampedNewton(model)
    optimizer.param_groups[0]["route"] = "dense"
    raises(ValueError, "unknown route 'dense'", optimizer.step, closure_of(model, x, y))
    optimizer = DampedNewton(model)
    replaced, _, _ = Case((4,), 3).build()
    model.layers[0] = replaced.layers[0]
    raises(ValueError, "other parameters than at construction", optimizer.step, closure_of(model, x, y))
    optimizer = DampedNewton(model)
    raises(ValueError, "one parameter group", optimizer.add_param_group, {"params": []})
    tracked = model(x, y, track_activations=True)
    raises(ValueError, "not the loss that the model tracked", optimizer.step, lambda: model(x, y))
    assert tracked.requires_grad
