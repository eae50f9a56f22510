"""Checks of what users pass. Each message says what came, what was expected, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Number
from typing import TypeVar

import torch
from torch import Tensor, nn

from _hessian.activations import ACTIVATIONS
from _hessian.layers import Damping, Inputs, TrackedBatch, TrackedDataSet
from _hessian.losses import LOSSES

T = TypeVar("T")
Tracked = TypeVar("Tracked", bound=TrackedBatch | TrackedDataSet)


def checked_widths(
    input_dim: int, hidden_dim: int | Sequence[int], num_classes: int, num_hidden_layers: int
) -> list[int]:
    """a_0 … a_L."""
    if not isinstance(num_hidden_layers, Integral) or num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers must be an integer ≥ 0, got {num_hidden_layers!r}")
    hidden = [hidden_dim] * num_hidden_layers if isinstance(hidden_dim, Number) else list(hidden_dim)
    if len(hidden) != num_hidden_layers:
        raise ValueError(
            f"hidden_dim has {len(hidden)} widths for num_hidden_layers={num_hidden_layers}: give one int, or one "
            "width a hidden layer"
        )
    widths = [input_dim, *hidden, num_classes]
    if not all(isinstance(width, Integral) and width >= 1 for width in widths):
        raise ValueError(f"input_dim, hidden_dim and num_classes must be integers ≥ 1, got {widths}")
    return widths


def check_kinds(activation: str, loss: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose {' or '.join(map(repr, LOSSES))}")


def check_inputs(x: Tensor, input_dim: int, dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[1:].numel() != input_dim:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of shape (N, …) with {input_dim} numbers a sample, got {shape}")
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != dtype and not (autocast and x.is_floating_point()):
        raise TypeError(f"x is {x.dtype} and the model {dtype}: convert x with x.to({dtype}), or the model")


def check_targets(loss: str, logits: Tensor, targets: Tensor, dtype: torch.dtype, values: bool) -> None:
    """Shape and dtype of targets, for a model of `dtype`; where `values`, in tracked calls, their values too."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}: make one by torch.as_tensor(targets)")
    indices = loss == "cross_entropy" and not targets.is_floating_point()
    shape, expected = (logits.shape[:1], torch.long) if indices else (logits.shape, dtype)
    if targets.shape != shape or targets.dtype != expected:
        kind = "class indices" if indices else "targets" if loss == "mse" else "class probabilities"
        raise ValueError(
            f"{kind} must be {expected} of shape {tuple(shape)}, got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if not values:
        return
    if len(logits) == 0:
        raise ValueError("the batch is empty: the mean loss of no samples has no Hessian")
    num_classes = logits.shape[1]
    if indices and bool(((targets < 0) | (targets >= num_classes)).any()):
        raise ValueError(
            f"class indices must lie in 0 … {num_classes - 1}, got {targets.min()} … {targets.max()}; "
            "drop samples to be ignored before the call"
        )
    if loss == "cross_entropy" and not indices:
        off, tolerance = (targets.double().sum(1) - 1).abs().max(), max(1e-4, torch.finfo(dtype).eps)
        if not bool((targets >= 0).all() & (off <= tolerance)):
            raise ValueError(
                "rows of class probabilities must be ≥ 0 and sum to 1: a row sum is off by "
                f"{off:.2g}, the smallest entry is {targets.min():.6g}"
            )


def check_network_call(inputs: Sequence[object], targets: object) -> None:
    """That a network is called with tensors."""
    for name, values in (
        ("x must be a tensor or a tuple of tensors", inputs),
        ("targets must be a tensor", (targets,)),
    ):
        if not values or not all(isinstance(x, Tensor) for x in values):
            raise TypeError(f"{name}, got {_kinds(values) or 'none'}: make one by torch.as_tensor, as from a list")


def _kinds(values: Sequence[object]) -> str:
    return " and ".join(f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in values)


def note_of_call(inputs: Sequence[object], parameters: Iterable[Tensor]) -> str:
    """A line to add to the error of a network that its inputs don't fit."""
    dtypes = ", ".join(sorted({str(p.dtype) for p in parameters}))
    return (
        f"The network was called with x: {_kinds(inputs)}; its parameters are {dtypes}. Where the dtypes differ, "
        "convert x or the network; else look for the shape (N, …) that the network takes"
    )


def check_outputs(inputs: Sequence[Tensor], outputs: object, targets: Tensor) -> None:
    """That inputs, outputs and targets have the N samples of the batch in their first dimension."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"the network must return one tensor (N, …), got {type(outputs).__name__}: wrap it in a module that "
            "returns the outputs of which the loss is"
        )
    if len({x.shape[:1] for x in (*inputs, outputs, targets)}) != 1 or outputs.dim() == 0:
        raise ValueError(
            "inputs and outputs must have the N samples of the batch in their first dimension, and so must targets: "
            f"got x {_kinds(inputs)}, outputs {_kinds([outputs])}, targets {_kinds([targets])}"
        )
    if len(outputs) == 0:
        raise ValueError("the batch is empty: the mean loss of no samples has no Hessian")


def check_same_shape(loss: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape or loss == "binary_cross_entropy" and not targets.is_floating_point():
        raise ValueError(
            f"targets of {loss} must have the outputs' shape and dtype, {_kinds([outputs])}, got {_kinds([targets])}: "
            "convert them by targets.view_as(outputs).to(outputs.dtype)"
        )


def check_class_targets(outputs: Tensor, targets: Tensor, class_dim: int, ignore_index: int, values: bool) -> None:
    """That targets are class probabilities, in the shape of the outputs, or class indices, without that dimension.
    values: check the indices too."""
    C, expected = outputs.shape[class_dim], outputs.select(class_dim, 0).shape
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return
    if targets.dtype != torch.int64 or targets.shape != expected:
        raise ValueError(
            f"class indices must be torch.int64 of shape {tuple(expected)}, for outputs {_kinds([outputs])} with "
            f"classes in dimension {class_dim}; got {_kinds([targets])}. If the classes are elsewhere, pass "
            "loss='cross_entropy' and class_dim=1 or -1 to TrackedNetwork"
        )
    used = targets[targets != ignore_index] if values else targets[:0]
    if values and not len(used):
        raise ValueError(f"all targets are {ignore_index}, which is ignored: the mean loss of none has no Hessian")
    if values and not bool(((used >= 0) & (used < C)).all()):
        raise ValueError(f"class indices must lie in 0 … {C - 1}, got {used.min()} … {used.max()}")


def check_grad_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a TrackedNetwork needs autograd: leave torch.inference_mode(), torch.no_grad() is fine")


def check_model(model: object, expected: type) -> None:
    if not isinstance(model, expected):
        raise TypeError(
            f"model must be a DeepMLPWithTracking or a TrackedNetwork, got {type(model).__name__}: wrap a network by "
            "model = TrackedNetwork(net) and call model(x, y, track_activations=True); a compiled or parallel model "
            "is to be unwrapped"
        )


def check_overrides(kind: type, base: type, *names: str) -> None:
    """That a subclass overrides all of these methods, or none."""
    overridden = [name for name in names if getattr(kind, name) is not getattr(base, name)]
    if overridden == [names[0]]:
        raise ValueError(f"{kind.__name__} overrides `{names[0]}` but not `{names[1]}`: override both")


def check_used(unused: Sequence[str]) -> None:
    if unused:
        raise ValueError(f"the loss does not depend on {', '.join(unused)}: set requires_grad=False there")


def _equal(p: Tensor, q: Tensor) -> bool:
    return p.dtype == q.dtype and p.device == q.device and torch.equal(p, q)


def check_tracked(tracked: Tracked | None, loss: Tensor, parameters: Sequence[Tensor]) -> Tracked:
    """`tracked`, checked: `loss` is its loss, and still that of the parameters."""
    if tracked is None or tracked.loss() is not loss:
        found = "no loss was tracked" if tracked is None else "this is not the loss that the model tracked last"
        raise ValueError(
            f"{found}: pass the very tensor that model(x, y, track_activations=True) returned, of the last such call. "
            "Terms added to it are not seen: for a weight decay ½w‖θ‖² pass the plain loss and damping + w, "
            "to DampedNewton weight_decay=w"
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss is {loss.item()}: look for NaN, infinity and overflow in inputs, targets and parameters"
        )
    if len(parameters) != len(tracked.parameters) or not all(map(_equal, parameters, tracked.parameters)):
        raise ValueError("the parameters changed since the loss was tracked: call the model on the batch again")
    return tracked


def as_one_batch(tracked: TrackedBatch[Inputs] | TrackedDataSet | None) -> TrackedBatch[Inputs]:
    """`tracked`, checked: one batch."""
    if tracked is None:
        raise ValueError("no loss was tracked: call model(x, y, track_activations=True) first")
    if isinstance(tracked, TrackedDataSet):
        raise ValueError(
            "the samples are needed as one batch: call model(x, y, track_activations=True), or pass keep=True to "
            "track_batches of a DeepMLPWithTracking"
        )
    return tracked


def check_trainable(parameters: Iterable[Tensor]) -> None:
    """That no parameter of a DeepMLPWithTracking is frozen."""
    if not all(p.requires_grad for p in parameters):
        raise ValueError(
            "some parameters are frozen (requires_grad=False): unfreeze them, or use TrackedNetwork, where they are "
            "constants"
        )


def check_linears(layers: Iterable[nn.Module], parameters: Iterable[Tensor]) -> None:
    """That the parameters are those of plain Linear layers, each with its own, in the order of `layers`."""
    layers = list(layers)
    if any(type(layer) is not nn.Linear for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers} - {"Linear"}))
        raise ValueError(f"`model.layers` must hold plain nn.Linear only, got {kinds}: replace what is not")
    if [id(p) for layer in layers for p in layer.parameters()] != list(map(id, parameters)):
        raise ValueError(
            "the parameters must be those of `model.layers`, none shared and none outside: untie shared weights, and "
            "make other parameters buffers"
        )


def check_loss(tracked: TrackedBatch, loss: Tensor, source: str = "the plain layers") -> None:
    """That `loss`, of the source, is the tracked one: no hook, no overridden forward."""
    if isinstance(tracked.inputs, Tensor) and not bool(torch.isfinite(tracked.inputs).all()):
        raise ValueError("x has infinite entries, where the derivatives are NaN: look for overflow in the data")
    tolerance = math.sqrt(torch.finfo(tracked.value.dtype).eps) if not tracked.autocast else 0.1
    if not bool((loss - tracked.value).abs() <= tolerance * (1 + loss.abs())):
        raise ValueError(
            f"the tracked loss is {tracked.value.item():.8g}, that of {source} {loss.item():.8g}: is there a hook, a "
            "changed buffer, another activation, a random layer, or an overridden forward? The solve can't see those: "
            "take it out, or call .eval() before the loss is tracked"
        )


@torch.no_grad()
def checked_vector(v: Tensor, num_parameters: int, device: torch.device, name: str = "v") -> Tensor:
    """v as (P, k) in float64, detached."""
    if not isinstance(v, Tensor) or v.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {getattr(v, 'dtype', type(v).__name__)}: convert it by "
            f"torch.as_tensor({name}, dtype=torch.float64)"
        )
    if v.dim() not in (1, 2) or v.shape[0] != num_parameters:
        raise ValueError(
            f"{name} must have shape ({num_parameters},) or ({num_parameters}, k), got {tuple(v.shape)}: one entry a "
            "parameter, as torch.nn.utils.parameters_to_vector(model.parameters()) orders them; k vectors as columns"
        )
    if v.device != device:
        raise ValueError(f"{name} is on {v.device} and the model on {device}: move it with {name}.to({str(device)!r})")
    v = v.detach().to(torch.float64)
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"{name} is NaN or infinite in {int((~torch.isfinite(v)).sum())} of its {v.numel()} entries: look for "
            "overflow where it was computed"
        )
    return v[:, None] if v.dim() == 1 else v


def _numbers(value: object) -> Tensor:
    """value as a float64 tensor; NaN for what isn't numbers."""
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return torch.tensor(math.nan)


def checked_damping(damping: float | Sequence[float], num_layers: int) -> Damping:
    values = _numbers(damping)
    if values.shape not in ((), (num_layers,)) or not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"damping must be a finite number, or one for each of the {num_layers} layers (in a TrackedNetwork: of the "
            f"parameter tensors), got {damping!r}"
        )
    return values.item() if values.dim() == 0 else tuple(values.tolist())


def checked_nonnegative(name: str, value: float) -> float:
    number = _numbers(value)
    if number.shape != () or not 0 <= number < math.inf:
        raise ValueError(f"{name} must be one finite number ≥ 0, got {value!r}")
    return number.item()


def checked_positive(name: str, value: float, cure: str) -> float:
    number = _numbers(value)
    if number.shape != () or not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}: {cure}")
    return number.item()


def checked_closure(closure: Callable[[], T] | None) -> Callable[[], T]:
    if not callable(closure):
        raise TypeError(
            f"the closure must be a function that returns the loss, got {type(closure).__name__}: pass "
            "lambda: model(x, y, track_activations=True)"
        )
    return closure


def checked_batch_size(batch_size: int) -> int:
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer ≥ 1, got {batch_size!r}")
    return int(batch_size)


def checked_curvature(curvature: str) -> str:
    if curvature not in ("hessian", "gauss_newton"):
        raise ValueError(f"unknown curvature {curvature!r}: choose 'hessian' or 'gauss_newton'")
    return curvature


def check_choices(**chosen: str) -> None:
    choices = {
        "route": ("auto", "sweep", "dense", "gram"),
        "precision": ("float64", "mixed"),
        "keep": ("solve", "disk", "inertia"),
    }
    for name, value in chosen.items():
        if value not in choices[name]:
            *others, last = map(repr, choices[name])
            raise ValueError(f"unknown {name} {value!r}: choose {', '.join(others)} or {last}")


def check_combination(
    route: str, curvature: str, state_damping: float, damping: Damping, checkpoint_layers: bool
) -> None:
    if route == "gram" and (curvature != "gauss_newton" or state_damping):
        raise ValueError("route='gram' needs curvature='gauss_newton' and state_damping=0: choose another route")
    if route == "gram" and not all(damping if isinstance(damping, tuple) else (damping,)):
        raise ValueError("route='gram' divides by damping: choose one other than 0, or another route")
    if checkpoint_layers and route not in ("auto", "sweep"):
        raise ValueError(f"checkpoint_layers=True is for route='sweep', got route={route!r}")


def checked_rtol(rtol: float) -> float:
    if not 0 < _numbers(rtol) < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol!r} (None, unchecked, is for `.solve` alone)")
    return rtol
