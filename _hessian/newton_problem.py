"""What one step of `DampedNewton` works on: the objective and its gradient, and the samples that give the curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.input_span import InputSpan, is_wide
from _hessian.layers import LayerDerivatives, OutputHessian, TrackedBatch, same_shape_groups
from _hessian.newton_options import Options
from _hessian.trial_losses import Network, Objective


class Solution(NamedTuple):
    """x with (G + cI + λD) x = −g. The step of length a is a x; with a correction y, a x + a² y is tried too."""

    damping: float  # λ
    x: Tensor  # (P,)
    correction: Tensor | None = None  # (P,)


Solve = Callable[[Sequence[float]], list[Solution]]  # the solutions at some λ, without those where it fails


class Preconditioner(NamedTuple):
    """G + cI + λD with G of the sub-batch."""

    inverse: Callable[[Tensor], Tensor]  # its inverse times v (P,)
    metric: Callable[[Tensor], Tensor]  # (cI + λD) v


class StepProblem:
    """f(θ + x) ≈ f + gᵀx + ½ xᵀ(G + cI)x at one batch; with a wide first layer, in the span of its inputs."""

    def __init__(
        self,
        network: Network,
        batch: TrackedBatch,
        layers: tuple[LayerDerivatives, ...],
        options: Options,
        step: int,
    ):
        self.options, self.batch = options, batch
        N = len(batch.inputs)
        self.all_samples = options.uses_all_samples(N)
        self.conjugate_gradients = options.uses_conjugate_gradients(N)
        self.smallest_damping = _smallest_damping(float(batch.value), layers[-1].loss_hessian)
        self.span: InputSpan | None = None
        if is_wide(N, layers[0].inputs.shape[1], len(layers[0].weight)):
            self.span = InputSpan.build(layers[0], network.linears[0].bias)
            layers = (layers[0]._replace(weight=self.span.weight, inputs=self.span.inputs), *layers[1:])
        self.layers = layers  # of all samples
        self.objective = Objective(network, batch.inputs, batch.targets, options.weight_decay, self.span)
        self.theta = self.objective.theta
        self.gradient = _loss_gradient(layers)  # g (P,)
        if options.weight_decay:
            self.gradient = self.gradient + options.weight_decay * self.theta
        self.gradient_norm = float(torch.linalg.vector_norm(self.gradient))
        self.curvature_layers = layers  # of the sub-batch, if there is one
        if not self.all_samples:
            generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
            chosen = torch.randperm(N, generator=generator)[: options.curvature_samples(N)].sort().values
            self.curvature_layers = sub_batch(layers, chosen.to(layers[0].inputs.device))


def _smallest_damping(loss: float, output: OutputHessian) -> float:
    """Any λ of 1e-30 or less stands for 0. It is less where a cross-entropy, and the curvature with it, is below 1."""
    scale = 1.0
    if output.zero_sum:
        # the mean of Σ π over all classes but the likeliest: the loss of a right guess, with all its digits
        scale = float(output.diagonal.scatter(1, output.diagonal.argmax(1, keepdim=True), 0.0).sum())
    least_scale = 1e-200  # so that λ stays a number above 0
    return 1e-30 * min(max(loss, scale, least_scale), 1.0)


def _loss_gradient(layers: Sequence[LayerDerivatives]) -> Tensor:
    """∂loss/∂θ (P,): λᵀz̃ of each layer, its weight, then its bias."""
    pieces = []
    for members in same_shape_groups(layers):
        group, width = [layers[i] for i in members], layers[members[0]].weight.shape[1]
        if len(group) == 1:  # no copies of what may be large
            X = (group[0].adjoint.mT @ group[0].inputs)[None]
        else:
            X = torch.stack([x.adjoint for x in group]).mT @ torch.stack([x.inputs for x in group])
        pieces.append(torch.cat([X[:, :, :width].flatten(1), X[:, :, width:].flatten(1)], 1).flatten())
    return torch.cat(pieces)


def sub_batch(layers: Sequence[LayerDerivatives], chosen: Tensor) -> tuple[LayerDerivatives, ...]:
    """The derivatives of the mean loss over the chosen samples. What is linear in ∂loss grows by N/k."""
    factor = len(layers[0].inputs) / len(chosen)
    return tuple(
        layer._replace(
            inputs=layer.inputs[chosen],
            slope=layer.slope[chosen],
            curvature=layer.curvature[chosen] * factor,
            adjoint=layer.adjoint[chosen] * factor,
            output=layer.output and layer.output._replace(diagonal=layer.output.diagonal[chosen] * factor),
        )
        for layer in layers
    )


def batch_fingerprint(inputs: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Three sums over the samples, in any order of them. Another batch hardly ever has the same."""

    def weights(width: int) -> Tensor:
        return torch.arange(1, width + 1, dtype=inputs.dtype, device=inputs.device).cos()

    of_inputs = (inputs @ weights(inputs.shape[1])).double()
    of_targets = targets.double() if targets.ndim == 1 else targets.double() @ weights(targets.shape[1]).double()
    return float(len(inputs)), float(of_inputs.square().sum()), float((of_inputs * (of_targets + 1)).sum())
