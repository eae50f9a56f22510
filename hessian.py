"""Solve (H + εI) x = v exactly, H the full Hessian of a deep network's loss.

The loss of an L-layer network is the mean over a batch of N samples; its Hessian in all P parameters is
P × P, symmetric, and indefinite almost everywhere. It is never formed. Along a change X_ℓ of every layer's
weights, the pre-activations change to first order by s_ℓ and the activations by t_ℓ,

    s_ℓ = z̃_{ℓ-1} X_ℓᵀ + t_{ℓ-1} W_ℓᵀ,    t_ℓ = φ′(h_ℓ) s_ℓ + σ_ℓ t_{ℓ-1},    t_0 = 0,

and the second-order change of the loss is a quadratic in these, a sum over layers that couples neighbours only:

    ⟨X, H X⟩ = ⟨s_L, Λ s_L⟩ + Σ_{ℓ<L} ⟨β_ℓ φ″(h_ℓ), s_ℓ²⟩ + 2 Σ_{ℓ>1} ⟨λ_ℓ, t_{ℓ-1} X_ℓ[:, :-1]ᵀ⟩.

So (H + εI) x = v is a control problem with parameters as controls and activations as state, and a block
tridiagonal system: one sweep from the last layer to the first eliminates layer after layer (a Riccati
recursion), one sweep back gives x. Time and memory are linear in L.

Notation (one letter, one meaning, here and in the code; the last column gives the source's names)

    N, L, C       samples of the batch, layers, classes
    a, d          width of layer ℓ; its inputs with the bias (d = a_{ℓ-1} + 1, or a_{ℓ-1} without bias)
    z̃  (N, d)     inputs of layer ℓ, with a column of ones for the bias
    W  (a, a′)    weights without the bias; h = z̃ W̃ᵀ with it; z = φ(h) + σ z_{ℓ-1}, σ = 1 on a skip, else 0
    β, λ (N, a)   ∂loss/∂z and ∂loss/∂h
    Λ  (N, C, C)  Hessian of the loss in the logits, one block a sample
    X  (a, d)     layer ℓ's block of the unknown x; V of the right-hand side
    J, A, S       Y ↦ R Yᵀ (D_x), t ↦ t Wᵀ (with φ′: ∇_z f), t ↦ λᵀ [t, 0] Q (D_D D_zx); all structured

Reduced parameters. X acts on s through z̃ = R Qᵀ only, of rank r ≤ min(N, d): X = Y Qᵀ + X⊥, X⊥Q = 0, and X⊥
meets nothing but ε and λ, so it is eliminated in closed form. Layer ℓ's pivot is of size m = a r ≤ N a.

    pivot       G = εI + JᵀK J                          (m, m)      K = φ′P φ′ + diag(β φ″)    (n, n), n = N a
    coupling    B = S + Jᵀ(K A + σ φ′P)                 (m, n′)     P, the cost-to-go of t_ℓ   (n, n)
    cost-to-go  P ← TᵀP T + AᵀD A − BᵀG⁻¹B − (λλᵀ) ⊗ (I − QQᵀ)/ε    T = φ′A + σI,  D = diag(β φ″)

Each G is factored as F Σ Fᵀ, Σ = ±1, by blocks: each diagonal block by Cholesky, where that exists, else by LDLᵀ with
Bunch–Kaufman pivots, after which products alone are left; where that would make the rest of G grow, with pivots from
all of it. B enters as F⁻¹B alone (a congruence), and no pivot is ever changed. By Sylvester and Haynsworth the signs in
all Σ are the inertia of H + εI, and its determinant is the product of theirs.

Carried pivots. G is a Schur complement of layers ℓ … L alone: where it has an eigenvalue near 0 that couples strongly,
its coordinates are left to the layer below, which eliminates them with its own (_hessian/carried_pivots.py).

State damping. With μ > 0, x is also charged for the change of pre-activations it causes, averaged over the batch:
(μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ is added to H, S_ℓ x = s_ℓ. That is D ← D + μ/N in the hidden layers, and nothing else changes.
The linearization of a deep net holds as long as all s are small, which a small x does not ensure. μ has the unit
of loss / pre-activation².

Cost. Factoring: Σ m³/3 + m²n′ + m n′² operations to leading order (blocks of b = min(128, m) rows add b m² + 2 b m n′),
so O(L (N a)³), and O(L (N a)²) memory; every further right-hand side O(Σ m² + m n′). A product with H costs two passes
through the network. Where P is smaller than the state N a, forming H (P products) and factoring it once is cheaper:
`route='auto'` counts and chooses.

Assumptions. Fully connected layers, with or without skips; elementwise activations; a loss whose Hessian in the
logits is diagonal minus rank one for every sample (cross-entropy, mean square). For relu, φ″ is taken as zero:
its Hessian is that of the piece the batch lies on. ε has the unit of loss / parameter²: scale the loss, and
you scale ε. An L2 term ½w‖θ‖² in the loss is damping + w.

References: A. Rahimi, The Hessian of tall-skinny networks is easy to invert, arXiv 2601.06096 (2025), solves the
same system without condensing the unit blocks; Pantoja (1988) and Dunn & Bertsekas (1989), Newton's step of a
multistage problem in linear time; Tassa, Erez & Todorov (2012), state damping in control; Pearlmutter (1994),
products with H; Bunch & Kaufman (1977), the pivoting; Eisenstat, Elman & Schultz (1983), GCR, the residual-minimizing
iteration used to refine.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.activations import ACTIVATIONS, Activation, initialize
from _hessian.argument_checks import (
    check_choices,
    check_combination,
    check_inputs,
    check_kinds,
    check_linears,
    check_loss,
    check_model,
    check_targets,
    check_tracked,
    checked_curvature,
    checked_damping,
    checked_nonnegative,
    checked_rtol,
    checked_vector,
    checked_widths,
)
from _hessian.carried_pivots import SweepInputs, carry, prepare, with_carried
from _hessian.checkpoints import Checkpoints, Memory
from _hessian.costs import (
    DENSE_CHUNK,
    LayerShape,
    RouteCost,
    num_parameters,
    prefers_many_classes,
    route_costs,
    shapes_of_layers,
)
from _hessian.factorization import Factor, HessianFactorization, Settings, Solver, factorize, undamped_failure
from _hessian.gram import GramFactor
from _hessian.layers import (
    LayerDerivatives,
    NotPositiveDefinite,
    OutputHessian,
    SingularHessianError,
    TrackedBatch,
    blocks_of,
    damping_vector,
    flatten_blocks,
    forward_tangent,
    with_skip,
)
from _hessian.many_classes import ManyClassPivot
from _hessian.pivots import CostToGo, Count, DensePivot, Pivot
from _hessian.reduced_parameters import Reduced, assemble_solution, split_right_hand_side
from _hessian.refinement import MinimumNorm, minimum_norm
from _hessian.symmetric_factor import BLOCK, SymmetricFactor, factor_symmetric, mirror, subtract_gram

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "DeepMLPWithTracking",
    "HessianFactorization",
    "LayerDerivatives",
    "OutputHessian",
    "RouteCost",
    "SingularHessianError",
    "compute_layer_derivatives",
    "estimate_cost",
    "factorize_hessian",
    "hessian_inverse_vector_product",
    "hessian_vector_product",
]

# ------------------------------------------------------------------------------------------------ the network


class DeepMLPWithTracking(nn.Module):
    """A fully connected network that remembers the batch of its last tracked loss, for the solve.

    hidden_dim: one width, or a sequence of `num_hidden_layers` widths. num_hidden_layers: L − 1; 0 is a linear model.
    activation: a key of `ACTIVATIONS` (relu: its second derivative is taken as zero). bias: in every layer.
    residual: a skip z = z_{ℓ-1} + φ(h) around every hidden layer whose input and output widths agree.
    loss: 'cross_entropy' (class indices (N,) or rows of probabilities (N, C); mean over the batch) or 'mse' (targets
    (N, C); mean over all N·C elements).

    `model(x)` gives logits (N, C), x of any shape (N, …) flattened; `model(x, y)` the loss;
    `model(x, y, track_activations=True)` the same loss, tracked: inputs and targets are copied and checked.
    Untracked, nothing is stored and no branch depends on the data (`torch.func` and `torch.compile` work).

    Initialized so that differences between samples survive forward, and gradients backward, at any depth (see
    `hessian_activations.initialize`), for inputs of about unit variance.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | Sequence[int],
        num_classes: int,
        num_hidden_layers: int,
        activation: str = "tanh",
        *,
        bias: bool = True,
        residual: bool = False,
        loss: str = "cross_entropy",
    ):
        super().__init__()
        widths = checked_widths(input_dim, hidden_dim, num_classes, num_hidden_layers)
        check_kinds(activation, loss)
        self.activation, self.loss = activation, loss
        self.input_dim, self.num_classes = input_dim, num_classes
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in zip(widths, widths[1:], strict=False))
        # σ_ℓ of each layer; the output layer has none
        self.skips = tuple(float(residual and i == o) for i, o in zip(widths[:-1], widths[1:-1], strict=False))
        self.skips += (0.0,)
        self._tracked: TrackedBatch | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (see the class docstring), from torch's global generator."""
        initialize(self.layers, self.skips, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, loss={self.loss!r}, skips={int(sum(self.skips))}"

    def activate(self, index: int, h: Tensor, z: Tensor) -> Tensor:
        """Output z_ℓ (…, N, a) of hidden layer `index` from its pre-activations h and its inputs z. Override both this
        and `activation_derivatives` to add a new kind of layer z_ℓ = f(h) + σ z, f elementwise (USAGE shows one)."""
        return with_skip(self.skips[index], ACTIVATIONS[self.activation].value(h), z)

    def activation_derivatives(self, index: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of `activate` in h, elementwise, in the shape and dtype of h: (N, a); without an
        override, one call may serve several layers of one shape."""
        return ACTIVATIONS[self.activation].derivatives(h)

    def forward(self, x: Tensor, targets: Tensor | None = None, track_activations: bool = False) -> Tensor:
        check_inputs(x, self.input_dim, self._dtype())
        z = x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        for index, linear in enumerate(self.layers[:-1]):
            z = self.activate(index, linear(z), z)
        logits = self.layers[-1](z)
        if targets is None:
            if track_activations:
                raise ValueError("track_activations=True needs targets: call model(x, y, track_activations=True)")
            return logits
        check_targets(self.loss, logits, targets, self._dtype(), values=track_activations)
        loss = self._loss(logits, targets)
        if track_activations:
            if loss.device.type == "mps":
                raise ValueError("the solve needs float64 and mps has none: move the model and the batch to the CPU")
            autocast = torch.is_autocast_enabled(x.device.type)
            inputs, targets, *parameters = (t.detach().clone() for t in (x, targets, *self.parameters()))
            self._tracked = TrackedBatch(
                inputs, targets, weakref.ref(loss), loss.detach().clone(), parameters, autocast
            )
        return loss

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(logits, targets)
        # the default ignore_index, −100, would leave samples out of the mean: every index must be a class
        return F.cross_entropy(logits, targets, ignore_index=-(2**62))

    def _dtype(self) -> torch.dtype:
        return next(self.layers.parameters()).dtype

    def _linears(self) -> list[nn.Linear]:
        """The layers, checked to be all of the model: what the closed forms describe."""
        check_linears(self.layers, self.parameters())
        overridden = type(self).activate is not DeepMLPWithTracking.activate
        if overridden and type(self).activation_derivatives is DeepMLPWithTracking.activation_derivatives:
            name = type(self).__name__
            raise ValueError(f"{name} overrides `activate` but not `activation_derivatives`: override both")
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def __getstate__(self) -> dict:
        # a copy has no tracked loss of its own: weak references neither copy nor pickle
        return {**self.__dict__, "_tracked": None}


# ---------------------------------------------------------------------------------------- per-layer derivatives


@torch.no_grad()
def compute_layer_derivatives(model: DeepMLPWithTracking) -> tuple[LayerDerivatives, ...]:
    """Derivatives of each layer at the batch last tracked, first layer first; the notation is the module's.

    One forward and one backward pass in float64 from the present parameters, by closed forms, without autograd. Cost:
    O(N P). Every tensor is a new one. Raises ValueError where nothing was tracked. Not checked: that the parameters are
    those of the tracked loss; the callers check that.

    This is the place to add a kind of layer. A model whose layers have the form z = f(h) + σ z_{ℓ-1} overrides
    `activate` and `activation_derivatives`.
    """
    check_model(model, DeepMLPWithTracking)
    tracked, linears = model._tracked, model._linears()
    if tracked is None:
        raise ValueError("no loss was tracked: call model(x, y, track_activations=True) first")
    # forward: z̃, h
    z = tracked.inputs.to(torch.float64)
    weights, inputs, pre_activations, ones = [], [], [], z.new_ones(len(z), 1)
    for index, linear in enumerate(linears):
        weight = linear.weight.to(torch.float64, copy=True)
        bias = None if linear.bias is None else linear.bias.to(torch.float64)
        weights.append(weight)
        inputs.append(z.clone() if bias is None else torch.cat([z, ones], 1))  # (N, d)
        h = F.linear(z, weight, bias)  # (N, a)
        pre_activations.append(h)
        if index < len(linears) - 1:
            z = model.activate(index, h, z)
    targets = tracked.targets.double() if tracked.targets.is_floating_point() else tracked.targets
    check_loss(tracked, model._loss(h, targets))
    adjoint, output = _output_derivatives(model.loss, h, targets)
    # backward: β_{ℓ-1} = λ_ℓ W_ℓ + σ_ℓ β_ℓ
    layers = [LayerDerivatives(weights[-1], inputs[-1], torch.ones_like(h), torch.zeros_like(h), adjoint, 0.0, output)]
    beta = adjoint @ weights[-1]
    derivatives = _activation_derivatives(model, pre_activations[:-1])
    for index, (first, second) in reversed(list(enumerate(derivatives))):
        layer = LayerDerivatives(
            weights[index], inputs[index], first, beta * second, beta * first, model.skips[index], None
        )
        beta = with_skip(layer.skip, layer.adjoint @ layer.weight, beta)
        layers.append(layer)
    return tuple(reversed(layers))


def _output_derivatives(loss: str, h: Tensor, targets: Tensor) -> tuple[Tensor, OutputHessian]:
    """λ_L (N, C) and Λ, of the loss in the logits h (N, C)."""
    N, C = h.shape
    if loss == "mse":
        return 2 * (h - targets) / (N * C), OutputHessian(torch.full_like(h, 2 / (N * C)), zero_sum=False)
    probabilities = torch.softmax(h, 1)
    if targets.is_floating_point():
        total = targets.sum(1, keepdim=True)  # 1 but for rounding
        return (total * probabilities - targets) / N, OutputHessian(total * probabilities / N, zero_sum=True)
    onehot = F.one_hot(targets, C).bool()
    others = probabilities.masked_fill(onehot, 0.0)  # π_y − 1 = −Σ_{c≠y} π_c, without cancellation
    adjoint = torch.where(onehot, -others.sum(1, keepdim=True), others) / N
    return adjoint, OutputHessian(probabilities / N, zero_sum=True)


def _activation_derivatives(model: DeepMLPWithTracking, h: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """φ′ and φ″ of each hidden layer; where one φ serves them all, those of one shape at once."""
    if getattr(model.activation_derivatives, "__func__", None) is not DeepMLPWithTracking.activation_derivatives:
        return [model.activation_derivatives(index, x) for index, x in enumerate(h)]
    found = []
    for _, group in groupby(h, key=lambda x: x.shape):
        found += zip(*model.activation_derivatives(0, torch.stack(list(group))), strict=True)
    return found


def _checked_derivatives(model: DeepMLPWithTracking, loss: Tensor) -> tuple[LayerDerivatives, ...]:
    """The derivatives, after every check that `loss` is the tracked one and still that of the parameters."""
    check_model(model, DeepMLPWithTracking)
    check_tracked(model._tracked, loss, list(model.parameters()))
    return compute_layer_derivatives(model)


def _modified(
    layers: tuple[LayerDerivatives, ...], curvature: str, state_damping: float
) -> tuple[LayerDerivatives, ...]:
    """The layers of another quadratic form: H or its Gauss–Newton part, plus (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ.

    All of ⟨X, H X⟩ is in Λ, β φ″ and λ: without the latter two its first term is left, and μ/N adds to β φ″.
    """
    if curvature == "gauss_newton":
        layers = tuple(
            x._replace(adjoint=torch.zeros_like(x.adjoint), curvature=torch.zeros_like(x.curvature)) for x in layers
        )
    if state_damping == 0:
        return layers
    hidden = [x._replace(curvature=x.curvature + state_damping / len(x.inputs)) for x in layers[:-1]]
    return (*hidden, layers[-1])


# ---------------------------------------------------------------------------------------------------- products


def _product(layers: Sequence[LayerDerivatives], v: Tensor) -> Tensor:
    """H v for v (P, k): the forward tangent, then the derivative of the backward pass along it.

    δλ_L = Λ s_L,  δβ_{ℓ-1} = δλ_ℓ W + λ X[:, :-1] + σ δβ_ℓ,  δλ_ℓ = φ′ δβ_ℓ + β φ″ s_ℓ
    (H X)_ℓ = δλᵀ z̃ + λᵀ [t_{ℓ-1}, 0]
    """
    X = blocks_of(layers, v)
    tangents = list(forward_tangent(layers, X))
    products, delta_beta = [], None
    for layer, block, (s, t) in zip(reversed(layers), reversed(X), reversed(tangents), strict=True):
        width = layer.weight.shape[1]
        if layer.output is not None:
            delta_lambda = layer.output.apply(s)
        else:
            delta_lambda = layer.slope * delta_beta + layer.curvature * s
        change = delta_lambda
        if layer.penalty is not None:
            change = change + (layer.inputs @ block.mT) @ layer.penalty
        product = change.mT @ layer.inputs
        if layer.penalty_shift is not None:
            product.add_(layer.penalty_shift * (layer.penalty @ block))
        if t is not None:
            product[:, :, :width] += layer.adjoint.mT @ t
            back = delta_lambda @ layer.weight + layer.adjoint @ block[:, :, :width]
            delta_beta = with_skip(layer.skip, back, delta_beta)
        products.append(product)
    return flatten_blocks(layers, products[::-1])


def _dense_hessian(layers: Sequence[LayerDerivatives]) -> Tensor:
    """H (P, P), by products with the columns of the identity, in chunks; checked by one more product."""
    like = layers[0].weight
    P = num_parameters(shapes_of_layers(layers))
    H = like.new_empty(P, P)
    state = sum(layer.inputs.numel() + 4 * layer.slope.numel() for layer in layers) + P
    size = max(1, DENSE_CHUNK // (8 * state))
    for start in range(0, P, size):
        identity = like.new_zeros(P, min(size, P - start))
        identity.diagonal(-start).fill_(1)
        H[:, start : start + size] = _product(layers, identity)
    # solves are certified by H: that must be the matrix of the products
    v = torch.randn(P, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    error, size_of_H = (H @ v - _product(layers, v)).norm(), torch.linalg.matrix_norm(H)
    if not bool(error <= 1e-10 * size_of_H * v.norm()) and bool(torch.isfinite(size_of_H)):
        raise ArithmeticError(
            f"the dense Hessian is off by {float(error / (size_of_H * v.norm())):.1e} of its norm from a product with "
            "the same vector: is the memory or a BLAS at fault? Try route='sweep'"
        )
    return H


def hessian_vector_product(
    model: DeepMLPWithTracking, loss: Tensor, v: Tensor, *, curvature: str = "hessian", state_damping: float = 0.0
) -> Tensor:
    """H v, exactly, for v of shape (P,) or (P, k), in the order of `model.parameters()`.

    Computed in float64 by the closed form above, whatever the model's dtype, and returned in v's dtype: the
    cost is two passes through the network for each column. `loss` is the tensor that the model tracked last.
    curvature, state_damping: of another matrix than H, (H or JᵀΛJ) + (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ; see `factorize_hessian`.
    Raises ValueError or TypeError for a loss or a v that doesn't fit; nothing outside is touched.
    """
    layers = _checked_derivatives(model, loss)
    layers = _modified(layers, checked_curvature(curvature), checked_nonnegative("state_damping", state_damping))
    columns = checked_vector(v, sum(p.numel() for p in model.parameters()), layers[0].weight.device)
    return _product(layers, columns).reshape(v.shape).to(v.dtype)


# ---------------------------------------------------------------------------------------- one layer eliminated


def _eliminate_layer(
    layers: Sequence[LayerDerivatives],
    inputs: SweepInputs,
    epsilons: Sequence[float],
    many_classes: bool,
    index: int,
    above: CostToGo | None,
    memory: Memory,
    definite_only: bool = False,
) -> tuple[Pivot, Count, CostToGo | None]:
    """One step of the backward sweep: the pivot of layer `index`, what it counts, and the cost-to-go below it.

    The matrix of `above` is overwritten. definite_only: NotPositiveDefinite where a pivot is not positive definite.
    """
    layer, reduced, epsilon = layers[index], inputs.reduced[index], epsilons[index]
    definite = above is None or above.definite
    (a, width), (N, r) = layer.weight.shape, reduced.rows.shape
    perpendicular = a * (layer.inputs.shape[1] - r)  # dimensions of X⊥
    if perpendicular and epsilon == 0:
        raise _singular(index, epsilon, f"{perpendicular} directions of its weights don't act on this batch")
    waiting = P = None
    if many_classes and layer.output is not None:
        if epsilon == 0 and layer.output.zero_sum:
            raise _singular(index, epsilon, "the same row added to the weights of every class changes nothing")
        pivot = ManyClassPivot.form(layer, reduced.basis, reduced.rows, epsilon)
        negative, logabsdet = pivot.num_negative(), float(pivot.logabsdet())
        definite = negative == 0
        if index:
            P = _output_cost_to_go(layer)
            pivot.reduce(P)
    else:
        G, B, P = _form_pivot(layer, reduced, epsilon, above, memory, index)
        factor = factor_symmetric(G, epsilon, definite_only=definite_only, definite_first=definite)
        if factor is None and definite_only:
            raise NotPositiveDefinite(index)
        if factor is None:
            raise _singular(index, epsilon, "its pivot is exactly singular")
        negative, logabsdet = factor.num_negative, factor.logabsdet
        definite = definite and negative == 0
        W = carried = None
        if index:
            W = factor.whiten(B)
            del B
            carried, waiting = carry(layer, inputs, index, epsilon, factor, W)
            if carried is not None:  # it counts below
                values = waiting.values[: len(carried.rows)]
                negative -= int((values < 0).sum())
                logabsdet -= float(values.abs().log().sum())
                perpendicular -= len(waiting.values) - len(values)
            W = subtract_gram(P, W, factor.signs)
        pivot = DensePivot(factor, W, carried)
    if epsilon < 0:
        negative += perpendicular
    if perpendicular:
        logabsdet += perpendicular * math.log(abs(epsilon))
    if definite_only and negative:
        raise NotPositiveDefinite(index)
    if not math.isfinite(logabsdet):
        raise _singular(index, epsilon, "its pivot is singular, or overflowed")
    if P is None:
        return pivot, Count(negative, logabsdet), None
    mirror(P)
    if reduced.basis is not None:  # − (λλᵀ) ⊗ (I − QQᵀ)/ε, without the bias, and without what is carried
        adjoint = layer.adjoint if pivot.carried is None else pivot.carried.rest(layer.adjoint)
        P.view(N, width, N, width).addcmul_(
            (adjoint @ adjoint.mT)[:, None, :, None], reduced.outside[:, None, :], value=-1 / epsilon
        )
    return pivot, Count(negative, logabsdet), CostToGo(P, waiting, definite)


def _singular(index: int, epsilon: float, why: str) -> SingularHessianError:
    message = f"H + damping·I is singular at layer {index + 1}, damping {epsilon:g}: {why}. Choose a larger damping"
    if epsilon == 0:
        message += "; for the minimum-norm solution of H x = v call hessian_inverse_vector_product with damping=0"
    return SingularHessianError(message, layer=index + 1, damping=epsilon)


def _output_cost_to_go(layer: LayerDerivatives) -> Tensor:
    """AᵀΛA of the last layer, block diagonal over the samples: (n′, n′)."""
    N, width = len(layer.inputs), layer.weight.shape[1]
    P = layer.weight.new_zeros(N, width, N, width)
    P.diagonal(dim1=0, dim2=2).copy_((layer.weight.mT @ layer.output.times(layer.weight)).permute(1, 2, 0))
    return P.view(N * width, N * width)


def _form_pivot(
    layer: LayerDerivatives,
    reduced: Reduced,
    epsilon: float,
    above: CostToGo | None,
    memory: Memory,
    index: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """G, B, and the cost-to-go before layer ℓ's parameters are eliminated, TᵀPT + AᵀDA; that above is overwritten.

    Row (q, i) of G and B is entry Y[i, q], after them come those of what waited; row (b, i) of P and K is entry [b, i]
    of t_ℓ. Layer 1 needs only G.
    """
    R, first = reduced.rows, index == 0
    (a, width), (N, r) = layer.weight.shape, R.shape
    W, n, n_below = layer.weight, N * a, N * width
    if layer.output is not None:
        Lambda = layer.output.apply(torch.eye(a, dtype=W.dtype, device=W.device)[:, None, :].expand(a, N, a))
        outer = (R[:, :, None] * R[:, None, :]).flatten(1)  # (N, r r)
        G = (outer.mT @ Lambda.transpose(0, 1).flatten(1)).view(r, r, a, a).transpose(1, 2).reshape(r * a, r * a)
        G.diagonal().add_(epsilon)
        if first:
            return G, None, None
        B = torch.einsum("bq,bik->qibk", R, layer.output.times(layer.weight)).reshape(r * a, n_below)
        P = _output_cost_to_go(layer)
    else:
        P, slope = above.P, layer.slope.flatten()
        if layer.skip and not first:
            slope_P = slope[:, None] * P  # φ′P
            K = slope_P * slope
        else:
            K = P.mul_(slope[:, None]).mul_(slope)
        K.diagonal().add_(layer.curvature.flatten())
        JK = torch.mm(R.mT, K.view(N, a * n), out=memory.temporary(K, r, a * n))
        G = memory.pivot("G", index, K, r * a, r * a)
        torch.bmm(R.mT.expand(r * a, r, N), JK.view(r * a, N, a), out=G.view(r * a, r, a))
        G.diagonal().add_(epsilon)
        if layer.penalty is not None:
            gram = R.mT @ R
            if layer.penalty_shift is not None:  # here Q = I
                gram.diagonal().add_(layer.penalty_shift)
            G.view(r, a, r, a).addcmul_(gram[:, None, :, None], layer.penalty[:, None, :])
        B = None
        if not first:
            KA = torch.mm(K.view(n * N, a), W, out=memory.temporary(K, n * N, width)).view(n, n_below)
            # where that fits, in the memory of K, which is done with
            below = K if n_below == n and not layer.skip else K.new_empty(n_below, n_below)
            torch.bmm(W.mT.expand(N, width, a), KA.view(N, a, n_below), out=below.view(N, width, n_below))
            if layer.skip:  # a = a′: TᵀPT + AᵀDA = AᵀKA + σ(Aᵀφ′P + Pφ′A) + σ²P
                cross = (W.mT @ slope_P.view(N, a, n)).view(n, n)
                below += layer.skip * (cross + cross.mT)
                below.add_(P, alpha=layer.skip**2)
                KA.add_(slope_P, alpha=layer.skip)
            # a small factor whitens it into new memory
            B = memory.pivot("B", index, K, r * a, n_below) if r * a > BLOCK else K.new_empty(r * a, n_below)
            P = below
            torch.mm(R.mT, KA.view(N, a * n_below), out=B.view(r, a * n_below))
        if above.waiting is not None:
            G, B = with_carried(layer, R, above.waiting, G, B)
        if first:
            return G, None, None
    # S: Y[i, q] meets t[b, k] by λ[b, i] Q[k, q]
    S = B[: r * a].view(r, a, N, width)
    if reduced.basis is None:
        S.diagonal(dim1=0, dim2=3)[:, :, :width].add_(layer.adjoint.mT[:, :, None])
    else:
        S.addcmul_(layer.adjoint.mT[:, :, None], reduced.basis[:width].mT[:, None, None, :])
    return G, B, P


class _Sweep:
    """The backward sweep, done: its counts, and its pivots for solves. These are kept, or with `checkpoint` recomputed;
    where not `solvable`, neither."""

    @torch.inference_mode()  # what torch does beside the arithmetic is a third of a small network's time
    def __init__(
        self,
        layers: Sequence[LayerDerivatives],
        epsilons: Sequence[float],
        inputs: SweepInputs | None,
        many_classes: bool,
        *,
        definite_only: bool = False,
        solvable: bool = True,
        checkpoint: bool = False,
    ):
        self.layers, self.epsilons = layers, epsilons
        self.inputs = prepare(layers) if inputs is None else inputs
        eliminate = partial(_eliminate_layer, layers, self.inputs, epsilons, many_classes)
        self._pivots: list[Pivot] = []  # last layer first
        self._checkpoints = Checkpoints(eliminate, len(layers)) if checkpoint else None
        self.num_negative, self.logabsdet, above = 0, 0.0, None
        keeps = solvable and not checkpoint
        memory = Memory(None if keeps else 1)
        for index in range(len(layers) - 1, -1, -1):
            if self._checkpoints is not None:
                self._checkpoints.keep(index, above)
            pivot, count, above = eliminate(index, above, memory, definite_only)
            if keeps:
                self._pivots.append(pivot)
            del pivot  # or it would live on while the next one is made
            self.num_negative, self.logabsdet = self.num_negative + count.negative, self.logabsdet + count.logabsdet

    def downward(self) -> Iterator[Pivot]:
        """The pivots, last layer first."""
        return iter(self._pivots) if self._checkpoints is None else self._checkpoints.downward()

    def upward(self) -> Iterator[Pivot]:
        """The pivots, first layer first."""
        return reversed(self._pivots) if self._checkpoints is None else self._checkpoints.upward()

    def solve(self, v: Tensor) -> Tensor:
        """(H + εI)⁻¹v for v (P, k)."""
        with torch.inference_mode():
            x = self._solve(v)
        return x.clone()  # for use in an autograd graph

    def _solve(self, v: Tensor) -> Tensor:
        """One backward and one forward sweep. What is carried has its coordinates beside t, and its slope beside p."""
        layers, reduced, states = self.layers, self.inputs.reduced, []
        V = blocks_of(layers, v)
        inside, outside, coupled = split_right_hand_side(layers, reduced, V)
        p = p_carried = None  # derivative of the cost-to-go at 0, in t_ℓ: (k, N, a), and in w: (k, k_w)
        for index, pivot in zip(range(len(layers) - 1, -1, -1), self.downward(), strict=True):
            layer, q = layers[index], inside[index]
            if p is not None:
                slope_p = layer.slope * p
                q = q + reduced[index].rows.mT @ slope_p
            q = q.flatten(1) if p_carried is None else torch.cat([q.flatten(1), p_carried], 1)
            state, back, p_carried = pivot.backward(q)
            states.append(state)
            if index == 0 or back is None:
                break
            back = back.unflatten(1, (-1, layer.weight.shape[1]))  # (k, N, a′)
            below = -back if p is None else with_skip(layer.skip, slope_p @ layer.weight - back, p)
            pull, free = coupled[index], outside[index]
            if pull is not None and free is not None:
                if pivot.carried is not None and pivot.carried.left is not None:
                    pull, of_outside = pivot.carried.split_outside(layer, V[index], free)
                    p_carried = of_outside if p_carried is None else torch.cat([p_carried, of_outside], 1)
                below = torch.add(below, pull, alpha=1 / self.epsilons[index])
            p = below
        del pivot  # its memory is used again
        Y, inputs, t, w, insert_carried = [], [], None, None, {}
        for index, (pivot, state) in enumerate(zip(self.upward(), reversed(states), strict=True)):
            layer, rows = layers[index], reduced[index].rows
            solved = pivot.forward(state, None if t is None else t.flatten(1), w)  # (k, r a and what waited)
            if pivot.carried is not None and pivot.carried.left is not None:
                insert_carried[index] = partial(pivot.carried.replace_outside, w=w)
            r, a = rows.shape[1], layer.weight.shape[0]
            y, w = solved.tensor_split((r * a,), 1)
            y = y.unflatten(1, (r, a))  # (k, r, a)
            Y.append(y.mT)
            inputs.append(t)
            s = rows @ y if t is None else rows @ y + t @ layer.weight.mT  # z̃ X⊥ᵀ = 0
            t = with_skip(layer.skip, layer.slope * s, t)
        return flatten_blocks(
            layers, assemble_solution(layers, reduced, self.epsilons, Y, outside, inputs, insert_carried)
        )


# ------------------------------------------------------------------------------------------ factor and solve


def _factor(
    layers: tuple[LayerDerivatives, ...], settings: Settings, formed: object, definite_only: bool
) -> tuple[Factor, object]:
    """The factor by settings.route, and what no damping changes; see `Solver`."""
    epsilons = settings.epsilons(len(layers))
    rounded = tuple(x.in_float32() for x in layers) if settings.precision == "mixed" else layers
    if settings.route == "dense":
        H = formed if isinstance(formed, Tensor) else _dense_hessian(layers)
        return _factor_dense(H.to(rounded[0].weight.dtype, copy=True), layers, settings, definite_only), H
    if settings.route == "gram":
        gram = GramFactor(rounded, epsilons, formed if isinstance(formed, Tensor) else None)
        return gram, gram.formed
    sweep = _Sweep(
        rounded,
        epsilons,
        formed if isinstance(formed, SweepInputs) else None,
        prefers_many_classes(shapes_of_layers(layers), len(layers[0].inputs)),
        definite_only=definite_only,
        solvable=settings.keep == "solve",
        checkpoint=settings.checkpoint_layers,
    )
    return sweep, sweep.inputs


def _factor_dense(
    G: Tensor, layers: Sequence[LayerDerivatives], settings: Settings, definite_only: bool
) -> SymmetricFactor:
    """G + diag(ε), factored in G's memory."""
    epsilons = settings.epsilons(len(layers))
    G.diagonal().add_(damping_vector(layers, epsilons)[:, 0])
    factor = factor_symmetric(G, min(map(abs, epsilons)), definite_only=definite_only)
    if factor is None and definite_only:
        raise NotPositiveDefinite(0)
    if factor is None:
        raise SingularHessianError(
            f"H + damping·I, factored densely at damping={settings.damping}, has an exactly singular pivot: choose "
            "another",
            damping=settings.damping,
        )
    return factor


_SOLVER = Solver(_product, _dense_hessian, _factor)
_factorize = partial(factorize, _SOLVER)


@torch.no_grad()
def factorize_hessian(
    model: DeepMLPWithTracking,
    loss: Tensor,
    damping: float | Sequence[float],
    *,
    curvature: str = "hessian",
    route: str = "auto",
    state_damping: float = 0.0,
    precision: str = "float64",
    keep: str = "solve",
    checkpoint_layers: bool = False,
) -> HessianFactorization:
    """Factor H + damping·I at the tracked `loss`, in float64: factor once, then `.solve` for thousands.

    damping: ε, in units of loss / parameter²; negative too (spectrum slicing: `.num_negative_eigenvalues` counts the
    eigenvalues of H below −ε); or one float a layer, first layer first. `.with_damping` factors the same at another.
    curvature: 'hessian', or 'gauss_newton' for the first term of the quadratic form only, JᵀΛJ, positive semidefinite.
    route: 'sweep' (layer by layer), 'dense' (H formed by products and factored; cheaper where P is small beside N times
    the width), 'gram' (Gauss–Newton by the matrix of N·C scaled outputs; cheaper where that is small), or 'auto' for
    the one with the fewest counted operations; `.route` tells which. state_damping: μ ≥ 0, in units of loss /
    pre-activation²; factors H + damping·I + (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ, S_ℓ x = s_ℓ the first-order change of hidden layer
    ℓ's pre-activations (N, a) along x: each unit's change costs μ times its mean square over the batch. It costs
    nothing; H + damping·I means this matrix below, and in the factorization.

    precision: 'mixed' factors in float32: a sweep in half of the memory, and less time where N times the width is
    large; solves are refined in float64 to the same certificate. A trial solve decides whether the float32 factor will
    do, or is made anew in float64: `.precision` tells. Inertia and determinant are then those of the float32 pivots:
    eigenvalues within 1e-5 ‖H‖ of −ε may be miscounted. keep: 'inertia' keeps nothing, for the counts alone (and with
    'mixed' makes no trial); a sweep then takes the memory of one layer. checkpoint_layers: keep every √L-th
    cost-to-go only and recompute the rest in each solve: O(√L (N a)²) memory, and three times the operations for a
    direct solve, two more for each refinement. `estimate_cost` tells operations and bytes before.

    Cost: Σ m³/3 + m²n′ + m n′² operations and the structured products of lower order; Σ m² + m n′ numbers kept;
    m = a·min(N, d), n′ = N a′.
    Raises ValueError or TypeError for a loss or an argument that doesn't fit, SingularHessianError for an exactly
    singular pivot, MemoryError where the estimate exceeds the device's free memory. Pivots near 0 that couple strongly
    are left to the layer below, so that no digits are lost that H + damping·I has.

    Not checked here: whether an eigenvalue of H lies within rounding of −ε, where it may be counted on the wrong side.
    As a rule that is 1e-15 ‖H‖ √P; with huge or collinear inputs 1e-9 ‖H‖ was seen. `.inertia_is_certified` tells.
    """
    layers = _checked_derivatives(model, loss)
    check_choices(route=route, precision=precision, keep=keep)
    settings = Settings(
        checked_damping(damping, len(layers)),
        checked_curvature(curvature),
        route,
        checked_nonnegative("state_damping", state_damping),
        precision,
        keep,
        checkpoint_layers,
    )
    check_combination(route, curvature, settings.state_damping, settings.damping, checkpoint_layers)
    return _factorize(_modified(layers, curvature, settings.state_damping), settings)


@torch.no_grad()
def hessian_inverse_vector_product(
    model: DeepMLPWithTracking, loss: Tensor, v: Tensor, damping: float | Sequence[float] = 0.0, *, rtol: float = 1e-8
) -> Tensor:
    """x with (H + damping·I) x = v to a relative residual of `rtol`: factor and solve. Arguments as there; x as v.

    damping = 0 gives the minimum-norm x with H x = v. H is singular for cross-entropy: such an x exists only for a v in
    the range of H, as a gradient is (a float32 gradient only to its rounding, 6e-8: use model.double(), or rtol=1e-6).
    Solved by a factorization at a small shift, refined on H itself. SingularHessianError where v is not in the
    range, or where the residual can't be reached in float64; the message names a damping that works.
    """
    layers = _checked_derivatives(model, loss)
    damping, rtol = checked_damping(damping, len(layers)), checked_rtol(rtol)
    if damping != 0 and any(damping if isinstance(damping, tuple) else (damping,)):
        return _factorize(layers, Settings(damping)).solve(v, rtol=rtol)
    columns = checked_vector(v, num_parameters(shapes_of_layers(layers)), layers[0].weight.device)

    def solve(rtol: float) -> MinimumNorm:
        return minimum_norm(
            lambda y: _product(layers, y), lambda shift: _factorize(layers, Settings(shift)), columns, rtol
        )

    found = solve(rtol)
    if not bool((found.residual <= rtol).all()):
        message = undamped_failure(found, columns, rtol, v.dtype, solve)
        raise SingularHessianError(message, damping=0.0, residual=float(found.residual.max()))
    return found.x.reshape(v.shape).to(v.dtype)


def estimate_cost(
    model: DeepMLPWithTracking,
    batch_size: int,
    *,
    curvature: str = "hessian",
    precision: str = "float64",
    keep: str = "solve",
    checkpoint_layers: bool = False,
) -> dict[str, RouteCost]:
    """Operations and bytes of `factorize_hessian` by each route that `curvature` has, from shapes alone.

    Arguments as there. {'sweep': …, 'dense': …, and for 'gauss_newton' 'gram': …}, each a `RouteCost`. Counted to
    leading order, within 10 % of what is done and allocated where n = N × width is 100 or more; below, overheads
    rule. Not counted: pivots that are carried (damping far below 1e-3), the model itself, and its autograd graph.
    """
    check_model(model, DeepMLPWithTracking)
    check_choices(precision=precision, keep=keep)
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer ≥ 1, got {batch_size!r}")
    zero_sum = model.loss == "cross_entropy"
    shapes = tuple(
        LayerShape(
            linear.out_features,
            linear.in_features,
            linear.in_features + (linear.bias is not None),
            bool(skip),
            zero_sum,
        )
        for linear, skip in zip(model._linears(), model.skips, strict=True)
    )
    costs = route_costs(
        shapes,
        int(batch_size),
        curvature=checked_curvature(curvature),
        precision=precision,
        keep=keep,
        checkpoint_layers=checkpoint_layers,
    )
    return dict(costs)
