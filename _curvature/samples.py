"""Gradients and outputs of single samples, in float64, by a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from _hessian.costs import free_bytes
from _hessian.layers import TrackedBatch
from hessian import DeepMLPWithTracking, TrackedNetwork

Model = DeepMLPWithTracking | TrackedNetwork
Inputs = Tensor | tuple[Tensor, ...]
_CHUNK = 2**24  # numbers of gradients or Jacobians that are made together


def trainable(model: Model) -> list[Tensor]:
    """The parameters of H, in its order."""
    return [p for p in model.parameters() if p.requires_grad]


def num_parameters(model: Model) -> int:
    return sum(p.numel() for p in trainable(model))


def check_memory(what: str, needed: float, device: torch.device) -> None:
    if needed > (free := free_bytes(device)):
        raise MemoryError(
            f"{what} takes {needed / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free: ask for less"
        )


def flat(tensors: list[Tensor]) -> Tensor:
    """(P,) in float64, detached."""
    return torch.cat([t.detach().to(torch.float64).flatten() for t in tensors])


def in_float64(x: Inputs) -> Inputs:
    if isinstance(x, tuple) and len(x) == 1:
        return in_float64(x[0])
    if isinstance(x, tuple):
        return tuple(t.double() if t.is_floating_point() else t for t in x)
    return x.double() if x.is_floating_point() else x


def num_samples(x: Inputs) -> int:
    return len(x[0] if isinstance(x, tuple) else x)


def split(x: Inputs, size: int) -> list[Inputs]:
    """x in chunks of so many samples."""
    if isinstance(x, tuple):
        return list(zip(*(t.split(size) for t in x), strict=True))
    return list(x.split(size))


class Samples:
    """ℓ_b(θ) and f_b(θ), loss and outputs of one sample, at the present parameters of `model`; H is in those of its
    parameters that are not frozen."""

    def __init__(self, model: Model):
        self.model = copy.deepcopy(model).double()
        self.is_sum = getattr(model.loss, "reduction", "mean") == "sum"
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        self.num_parameters = sum(p.numel() for p in self.parameters.values())

    def tracked_batches(self, model: Model) -> list[tuple[Inputs, Tensor]]:
        """The inputs and targets of the tracked loss."""
        tracked = model._tracked
        assert tracked is not None, "checked with the loss"
        pairs: Iterable[tuple[Inputs, Tensor]] = (
            [(tracked.inputs, tracked.targets)]
            if isinstance(tracked, TrackedBatch)
            else ((x.inputs, x.targets) for x in tracked.batches)
        )
        return [(in_float64(x), y.double() if y.is_floating_point() else y) for x, y in pairs]

    def weight(self, count: int) -> float:
        """What a sample's loss counts in the loss of so many."""
        return 1.0 if self.is_sum else 1 / count

    def gradients(self, x: Inputs, y: Tensor, name: str = "the tracked loss") -> Iterator[Tensor]:
        """∇ℓ_b of chunks of samples, (k, P) each, by reverse mode under vmap. Each chunk's sum is compared with one
        plain backward pass: this checks torch's vmap, and that the loss is a plain mean over its samples, or a sum."""
        loss = partial(_loss_of_sample, self.model)
        of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        size = max(1, _CHUNK // self.num_parameters)
        for inputs, targets in zip(split(in_float64(x), size), split(in_float64(y), size), strict=True):
            inputs_of_sample = inputs if isinstance(inputs, tuple) else (inputs,)
            rows = of_samples(self.parameters, inputs_of_sample, targets)
            G = torch.cat([rows[name].flatten(1) for name in self.parameters], 1)
            expected = self.gradient(inputs, targets) / self.weight(len(targets))
            if not bool((G.sum(0) - expected).norm() <= 1e-8 * G.norm(dim=1).sum()):
                raise ValueError(
                    f"the gradients of single samples don't add up to that of {name}: it must be a plain mean over the "
                    "samples, or a sum. Class weights and ignored targets in a mean are not"
                )
            yield G

    @torch.enable_grad()
    def gradient(self, x: Inputs, y: Inputs) -> Tensor:
        """Of the loss of all these samples (P,), by a plain backward pass."""
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.model(x, y), leaves)
        return torch.cat([g.flatten() for g in grads])

    def jacobians(self, x: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs (k, C) and their Jacobians (k, C, P) of chunks of samples. Outputs of one sample are flattened."""
        outputs = partial(_outputs_of_sample, self.model)
        of_samples: Callable[..., tuple[Mapping[str, Tensor], Tensor]] = torch.func.vmap(
            torch.func.jacrev(outputs, has_aux=True), in_dims=(None, 0)
        )
        one = split(in_float64(x), 1)[0]
        with torch.no_grad():
            size = max(1, _CHUNK // (self.num_parameters * self.model(one).numel()))
        for inputs in split(in_float64(x), size):
            rows, values = of_samples(self.parameters, inputs if isinstance(inputs, tuple) else (inputs,))
            yield values, torch.cat([rows[name].flatten(2) for name in self.parameters], 2)


def _batch_of_one(model: Model, x: tuple[Tensor, ...]) -> Inputs:
    batch = tuple(t[None] for t in x)
    return batch if isinstance(model, TrackedNetwork) else batch[0]


def _loss_of_sample(model: Model, parameters: Mapping[str, Tensor], x: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(parameters), (_batch_of_one(model, x), y[None]))


def _outputs_of_sample(model: Model, parameters: Mapping[str, Tensor], x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    outputs = torch.func.functional_call(model, dict(parameters), (_batch_of_one(model, x),)).flatten()
    return outputs, outputs
