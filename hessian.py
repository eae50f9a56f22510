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
eliminating it would swamp P with digits of no use, though H + εI is no worse. Such coordinates w of Y, and parts of X⊥,
whose pivot is ε, are left to the layer below. P is then a quadratic in t and w, and the next pivot that of Y and w:

    ½ [t; w]ᵀ [[P, bᵀ], [b, diag(d)]] [t; w]      [[εI + JᵀK J, JᵀK_tw], [·, diag(d)]]      K_tw = φ′bᵀ
    coupling    [S + JᵀK A; K_wt A + σb]

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
products with H; Bunch & Kaufman (1977), the pivoting; Duff & Reid (1983), delayed pivots; Eisenstat, Elman & Schultz
(1983), GCR, the residual-minimizing iteration used to refine.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral, Number
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_activations import ACTIVATIONS, Activation, initialize
from hessian_checks import (
    check_choices,
    check_combination,
    check_layers,
    check_loss,
    check_targets,
    checked_curvature,
    checked_damping,
    checked_nonnegative,
    checked_rtol,
    checked_vector,
    equal,
)
from hessian_costs import (
    DENSE_CHUNK,
    LayerShape,
    RouteCost,
    check_memory,
    count_operations,
    estimate_cost,
    layer_operations,
    natural_operations,
    num_parameters,
    prefers_many_classes,
    shapes_of_layers,
)
from hessian_linear_algebra import (
    BLOCK,
    NULL,
    UNIT_ROUNDOFF,
    MinimumNorm,
    Refined,
    SymmetricFactor,
    column_norms,
    factor_symmetric,
    minimum_norm,
    mirror,
    one_pool,
    refine,
    spectral_norm,
    subtract_gram,
    unit_columns,
)
from hessian_many_classes import ManyClassPivot

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

if TYPE_CHECKING:
    from hessian_gram import GramFactor

Damping = float | tuple[float, ...]

_REFINED_NUMBERS = 2**23  # right-hand sides are refined together up to this many numbers
# of the trial solve that decides whether a float32 factor will do: its residual, and in how many steps
_PROBE_RTOL, _PROBE_STEPS = 1e-8, 8
_TINY = 1e-30  # keeps 0/0 out
_GROWTH = 1e4  # a pivot that would add more than so many times the cost-to-go's natural size to it is carried
_DENSE_TRIAL = 3000  # a failed solve tries the dense route for its error message up to this many parameters


class SingularHessianError(torch.linalg.LinAlgError):
    """H + εI is singular, or v can't be reached to `rtol`. Carries what is known; the message says what to change.

    layer: 1 … L, the layer whose pivot is singular, or None. damping: as asked for, or that layer's. residual: the best
    relative residual ‖(H + εI)x − v‖/‖v‖ reached, the largest over the columns, or None where nothing was solved.
    """

    def __init__(self, message: str, *, layer: int | None = None, damping=None, residual: float | None = None):
        super().__init__(message)
        self.layer, self.damping, self.residual = layer, damping, residual


# ------------------------------------------------------------------------------------------------ the network


class _Tracked(NamedTuple):
    """The batch of the last tracked call; the loss by weak reference, so that its graph can be freed."""

    inputs: Tensor  # (N, a_0)
    targets: Tensor  # (N,) or (N, C)
    loss: Callable[[], Tensor | None]
    value: Tensor
    parameters: list[Tensor]
    autocast: bool


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
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if loss not in ("cross_entropy", "mse"):
            raise ValueError(f"unknown loss {loss!r}: choose 'cross_entropy' or 'mse'")
        self.activation, self.loss = activation, loss
        self.input_dim, self.num_classes = input_dim, num_classes
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in zip(widths, widths[1:], strict=False))
        # σ_ℓ of each layer; the output layer has none
        self.skips = tuple(float(residual and i == o) for i, o in zip(widths[:-1], hidden, strict=False)) + (0.0,)
        self._tracked: _Tracked | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (see the class docstring), from torch's global generator."""
        initialize(self.layers, self.skips, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, loss={self.loss!r}, skips={int(sum(self.skips))}"

    def activate(self, index: int, h: Tensor, z: Tensor) -> Tensor:
        """Output z_ℓ (…, N, a) of hidden layer `index` from its pre-activations h and its inputs z. Override both this
        and `activation_derivatives` to add a new kind of layer z_ℓ = f(h) + σ z, f elementwise (USAGE shows one)."""
        return _with_skip(self.skips[index], ACTIVATIONS[self.activation].value(h), z)

    def activation_derivatives(self, index: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of `activate` in h, elementwise, in the shape and dtype of h: (N, a); without an
        override, one call may serve several layers of one shape."""
        return ACTIVATIONS[self.activation].derivatives(h)

    def forward(self, x: Tensor, targets: Tensor | None = None, track_activations: bool = False) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[1:].numel() != self.input_dim:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of shape (N, …) with {self.input_dim} numbers a sample, got {shape}")
        dtype, autocast = self.layers[0].weight.dtype, torch.is_autocast_enabled(x.device.type)
        if x.dtype != dtype and not (autocast and x.is_floating_point()):
            raise TypeError(f"x is {x.dtype} and the model {dtype}: convert x with x.to({dtype}), or the model")
        z = x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        for index, linear in enumerate(self.layers[:-1]):
            z = self.activate(index, linear(z), z)
        logits = self.layers[-1](z)
        if targets is None:
            if track_activations:
                raise ValueError("track_activations=True needs targets: call model(x, y, track_activations=True)")
            return logits
        check_targets(self, logits, targets, values=track_activations)
        loss = self._loss(logits, targets)
        if track_activations:
            if loss.device.type == "mps":
                raise ValueError("the solve needs float64 and mps has none: move the model and the batch to the CPU")
            inputs, targets, *parameters = (t.detach().clone() for t in (x, targets, *self.parameters()))
            self._tracked = _Tracked(inputs, targets, weakref.ref(loss), loss.detach().clone(), parameters, autocast)
        return loss

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(logits, targets)
        # the default ignore_index, −100, would leave samples out of the mean: every index must be a class
        return F.cross_entropy(logits, targets, ignore_index=-(2**62))

    def __getstate__(self) -> dict:
        # a copy has no tracked loss of its own: weak references neither copy nor pickle
        return {**self.__dict__, "_tracked": None}


def _with_skip(skip: float, out: Tensor, z: Tensor | None) -> Tensor:
    """out + σ z; z is None, zero, before layer 1, and of another width than out where σ = 0."""
    return out + skip * z if skip and z is not None else out


# ---------------------------------------------------------------------------------------- per-layer derivatives


class OutputHessian(NamedTuple):
    """Λ_b = diag(d_b) − u_b u_bᵀ for each sample b; u_b = d_b/√(1ᵀd_b), so that Λ_b 1 = 0, or no such term."""

    diagonal: Tensor  # (N, C) d ≥ 0
    zero_sum: bool

    @property
    def rank_one(self) -> Tensor | None:
        """u (N, C), or None."""
        return self.diagonal * self.diagonal.sum(1, keepdim=True).rsqrt() if self.zero_sum else None

    def apply(self, s: Tensor) -> Tensor:
        """Λ s for s of shape (…, N, C)."""
        if not self.zero_sum:
            return self.diagonal * s
        # measured from the likeliest class, which changes nothing, so that nothing cancels where its π is nearly 1
        s = s.expand(*s.shape[:-2], *self.diagonal.shape)
        s = s - s.gather(-1, self.diagonal.argmax(-1, keepdim=True).expand(*s.shape[:-1], 1))
        return self.diagonal * (s - (self.diagonal * s).sum(-1, keepdim=True) / self.diagonal.sum(-1, keepdim=True))


class LayerDerivatives(NamedTuple):
    """What the solve needs of one layer z = f(h) + σ z_{ℓ-1}, h = z̃ W̃ᵀ: everything in float64, detached."""

    weight: Tensor  # (a, a′)  W, without the bias
    inputs: Tensor  # (N, d)   z̃, with a last column of ones where the layer has a bias
    slope: Tensor  # (N, a)    φ′(h); ones in the output layer
    curvature: Tensor  # (N, a) β φ″(h); zeros in the output layer
    adjoint: Tensor  # (N, a)  λ = β φ′(h) = ∂loss/∂h
    skip: float  # σ
    output: OutputHessian | None  # Λ in the output layer, else None
    # (a, a) Ω, in a hidden layer: the form has another term, Σ_b uᵀΩ u, u = X z̃_b (newton.py; unknown to route 'gram')
    penalty: Tensor | None = None


@torch.no_grad()
def compute_layer_derivatives(model: DeepMLPWithTracking) -> tuple[LayerDerivatives, ...]:
    """Derivatives of each layer at the batch last tracked, first layer first; the notation is the module's.

    One forward and one backward pass in float64 from the present parameters, by the closed forms of
    `ACTIVATIONS`; no autograd. Cost: O(N P). Every tensor is a new one. This is the one place that knows the kinds
    of layer: a model whose layers have the form z = f(h) + σ z_{ℓ-1} brings its own through `activate` and
    `activation_derivatives`. Not checked: that the parameters are those of the tracked loss (the callers check).
    Raises ValueError where nothing was tracked.
    """
    if not isinstance(model, DeepMLPWithTracking):
        raise TypeError(f"model must be a DeepMLPWithTracking, got {type(model).__name__}: see USAGE.md to convert one")
    if model._tracked is None:
        raise ValueError("no loss was tracked: call model(x, y, track_activations=True) first")
    check_layers(model, DeepMLPWithTracking)
    # forward: z̃, h
    z, targets = model._tracked.inputs.to(torch.float64), model._tracked.targets
    weights, inputs, pre_activations, ones = [], [], [], z.new_ones(len(z), 1)
    last = len(model.layers) - 1
    for index, linear in enumerate(model.layers):
        weight, bias = linear.weight.to(torch.float64, copy=True), linear.bias
        weights.append(weight)
        inputs.append(z.clone() if bias is None else torch.cat([z, ones], 1))  # (N, d)
        h = F.linear(z, weight, None if bias is None else bias.to(torch.float64))  # (N, a)
        pre_activations.append(h)
        if index < last:
            z = model.activate(index, h, z)
    check_loss(model, h)
    # the loss in the logits: λ_L and Λ
    N, C = h.shape
    if model.loss == "mse":
        adjoint = 2 * (h - targets.to(torch.float64)) / (N * C)
        output = OutputHessian(torch.full_like(h, 2 / (N * C)), zero_sum=False)
    else:
        probabilities = torch.softmax(h, 1)
        if targets.is_floating_point():
            total = targets.to(torch.float64).sum(1, keepdim=True)  # 1 but for rounding
            adjoint = (total * probabilities - targets.to(torch.float64)) / N
        else:
            total, onehot = 1.0, F.one_hot(targets, C).bool()
            others = probabilities.masked_fill(onehot, 0.0)  # π_y − 1 = −Σ_{c≠y} π_c, without cancellation
            adjoint = torch.where(onehot, -others.sum(1, keepdim=True), others) / N
        output = OutputHessian(total * probabilities / N, zero_sum=True)
    # backward: β_{ℓ-1} = λ_ℓ W_ℓ + σ_ℓ β_ℓ
    layers = [LayerDerivatives(weights[-1], inputs[-1], torch.ones_like(h), torch.zeros_like(h), adjoint, 0.0, output)]
    beta = adjoint @ weights[-1]
    derivatives = _activation_derivatives(model, pre_activations[:-1])
    for index in range(last - 1, -1, -1):
        first, second = derivatives[index]
        layer = LayerDerivatives(
            weights[index], inputs[index], first, beta * second, beta * first, model.skips[index], None
        )
        beta = _with_skip(layer.skip, layer.adjoint @ layer.weight, beta)
        layers.append(layer)
    return tuple(reversed(layers))


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
    if not isinstance(model, DeepMLPWithTracking):
        raise TypeError(f"model must be a DeepMLPWithTracking, got {type(model).__name__}: see USAGE.md to convert one")
    tracked = model._tracked
    if tracked is None or tracked.loss() is not loss:
        found = "no loss was tracked" if tracked is None else "this is not the loss that the model tracked last"
        raise ValueError(
            f"{found}: pass the very tensor that model(x, y, track_activations=True) returned, of the last such call. "
            "Terms added to it are not seen: for a weight decay ½w‖θ‖² pass the plain loss and damping + w"
        )
    parameters = list(model.parameters())
    if not all(p.requires_grad for p in parameters):
        raise ValueError("some parameters are frozen (requires_grad=False): H is that of all of them; unfreeze them")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {loss.item()}: look for overflow in the inputs or the parameters")
    if len(parameters) != len(tracked.parameters) or not all(map(equal, parameters, tracked.parameters)):
        raise ValueError("the parameters changed since the loss was tracked: call the model on the batch again")
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


def _blocks(layers: Sequence[LayerDerivatives], v: Tensor) -> list[Tensor]:
    """(P, k) → one (k, a, d) a layer, the bias as last column: model.parameters() has each weight, then its bias."""
    blocks, rest = [], v.mT.contiguous()  # (k, P)
    for layer in layers:
        (a, width), d = layer.weight.shape, layer.inputs.shape[1]
        weight, bias, rest = rest.tensor_split((a * width, a * d), 1)
        blocks.append(torch.cat([weight.unflatten(1, (a, width)), bias.unflatten(1, (a, d - width))], 2))
    return blocks


def _flatten(layers: Sequence[LayerDerivatives], blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of `_blocks`: one (k, a, d) a layer → (P, k)."""
    pieces = []
    for layer, block in zip(layers, blocks, strict=True):
        weight, bias = block.tensor_split((layer.weight.shape[1],), 2)
        pieces += [weight.flatten(1), bias.flatten(1)]
    return torch.cat(pieces, 1).mT


def _forward_tangent(layers: Sequence[LayerDerivatives], X: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields s_ℓ and t_{ℓ-1}, (k, N, a) each (t_0: None), for the blocks X_ℓ (k, a, d)."""
    t = None
    for layer, block in zip(layers, X, strict=True):
        s = layer.inputs @ block.mT
        if t is not None:
            s = s + t @ layer.weight.mT
        yield s, t
        t = _with_skip(layer.skip, layer.slope * s, t)


def _product(layers: Sequence[LayerDerivatives], v: Tensor) -> Tensor:
    """H v for v (P, k): the forward tangent, then the derivative of the backward pass along it.

    δλ_L = Λ s_L,  δβ_{ℓ-1} = δλ_ℓ W + λ X[:, :-1] + σ δβ_ℓ,  δλ_ℓ = φ′ δβ_ℓ + β φ″ s_ℓ
    (H X)_ℓ = δλᵀ z̃ + λᵀ [t_{ℓ-1}, 0]
    """
    X = _blocks(layers, v)
    tangents = list(_forward_tangent(layers, X))
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
        if t is not None:
            product[:, :, :width] += layer.adjoint.mT @ t
            back = delta_lambda @ layer.weight + layer.adjoint @ block[:, :, :width]
            delta_beta = _with_skip(layer.skip, back, delta_beta)
        products.append(product)
    return _flatten(layers, products[::-1])


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


class _Indefinite(Exception):
    """H + εI has a pivot, layer `index`'s counted from 0, that is not positive definite: see `_factorize_definite`."""

    def __init__(self, index: int):
        super().__init__(index)
        self.index = index


def _alike(layers: Sequence[LayerDerivatives]) -> Iterator[list[int]]:
    """Indices of neighbouring layers of one shape: what no recursion needs is computed for all of them at once."""
    shapes = [(x.weight.shape, x.inputs.shape) for x in layers]
    for _, members in groupby(range(len(shapes)), key=shapes.__getitem__):
        yield list(members)


class _Reduced(NamedTuple):
    """z̃ = R Qᵀ. Where N ≥ d, Q is the identity (None) and R = z̃."""

    basis: Tensor | None  # (d, r) Q
    rows: Tensor  # (N, r) R
    outside: Tensor | None  # (a′, a′) I − QQᵀ without the bias; None where Q is, or where layer 1 is the only such one


class _Formed(NamedTuple):
    """What a sweep needs of the layers that no damping changes."""

    reduced: list[_Reduced]
    scales: list[float]  # the natural size of the cost-to-go below each layer, see `_natural_scales`
    couplings: list[float]  # ‖λ‖ of each layer


def _form(layers: Sequence[LayerDerivatives]) -> _Formed:
    reduced = _reduced_inputs(layers)
    norms = torch.stack([torch.linalg.vector_norm(layer.adjoint) for layer in layers])
    return _Formed(reduced, _natural_scales(layers, reduced), norms.tolist())


def _reduced_inputs(layers: Sequence[LayerDerivatives]) -> list[_Reduced]:
    """Of every layer; one batched QR for those of one shape."""
    reduced = []
    for members in _alike(layers):
        inputs = [layers[i].inputs for i in members]
        N, d = inputs[0].shape
        if N >= d:
            reduced += [_Reduced(None, rows, None) for rows in inputs]
            continue
        Q, R = torch.linalg.qr(torch.stack(inputs).mT)
        outside = [None] * len(members)
        if members[-1] > 0:
            within = Q[:, : layers[members[0]].weight.shape[1]]
            outside = (within @ within.mT).neg_()
            outside.diagonal(dim1=1, dim2=2).add_(1)
        reduced += map(_Reduced, Q, R.mT.contiguous(), outside)
    return reduced


def _natural_scales(layers: Sequence[LayerDerivatives], reduced: Sequence[_Reduced]) -> list[float]:
    """The largest entry of the Hessian of the loss in t_{ℓ-1}, that is of the cost-to-go with nothing eliminated, and
    with the couplings λ of this layer and those above counted in as curvatures.

    With nothing eliminated samples don't mix: P (N, a, a), one pass down of O(N a³) a layer.
    """
    couplings = []
    for members in _alike(layers):
        adjoint, R = (
            torch.stack(x) for x in zip(*((layers[i].adjoint, reduced[i].rows) for i in members), strict=True)
        )
        couplings += adjoint.abs().amax((1, 2)) / R.abs().amax((1, 2)).clamp_min(_TINY)
    extremes, P = [], None
    for layer, coupling in zip(reversed(layers[1:]), reversed(couplings[1:]), strict=True):
        W = layer.weight
        if layer.output is not None:
            below = W.mT @ _output_times_weight(layer)
        else:
            slope_P = layer.slope[:, :, None] * P
            K = slope_P * layer.slope[:, None, :]
            K.diagonal(dim1=1, dim2=2).add_(layer.curvature)
            below = W.mT @ (K @ W)
            if layer.skip:
                cross = W.mT @ slope_P
                below = below + layer.skip * (cross + cross.mT) + layer.skip**2 * P
        below.diagonal(dim1=1, dim2=2).add_(coupling)
        extremes += torch.aminmax(below)
        P = below
    if not extremes:
        return [0.0]  # below layer 1 there is nothing
    return [0.0, *torch.stack(extremes[::-1]).abs().view(-1, 2).amax(1).tolist()]


class _CostToGo(NamedTuple):
    """½[t; w]ᵀ[[P, bᵀ], [b, diag(d)]][t; w], t of this layer's outputs and w what the layers above left."""

    P: Tensor  # (n, n)
    coupling: Tensor | None  # (k, n) b
    values: Tensor | None  # (k,) d
    definite: bool  # every pivot above was


class _Carried(NamedTuple):
    """What a layer leaves to the one below: pivots near 0 that couple strongly, whose elimination would lose digits.

    Some of the coordinates e = Fᵀ[Y; w] of its pivot, e = root · ω; and the parts U Z Q⊥ᵀ of X⊥.
    """

    rows: Tensor  # (k₁,) which of e
    root: Tensor  # (k₁,)
    left: Tensor | None  # (a, j) U, orthonormal
    outside: Tensor | None  # (d, d − r) Q⊥

    def of_perpendicular(self, V: Tensor) -> Tensor:
        """−Uᵀ V Q⊥, the linear term in Z, for V (k, a, d): (k, j (d − r))."""
        return -(self.left.mT @ V @ self.outside).flatten(1)

    def perpendicular(self, w: Tensor) -> Tensor:
        """U Z Q⊥ᵀ (k, a, d) for Z (k, j (d − r))."""
        Z = w.unflatten(1, (self.left.shape[1], -1))
        return self.left @ Z @ self.outside.mT


class _DensePivot(NamedTuple):
    """G = F Σ Fᵀ of [Y; w] and the whitened coupling F⁻¹B, of which everything else is made."""

    factor: SymmetricFactor
    coupling: Tensor | None  # (m, n′) F⁻¹B, the carried rows of it zero; None in layer 1

    def backward(self, q: Tensor, carried: _Carried | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From q (k, m): what `forward` needs of it, BᵀG⁻¹q (k, n′), and the linear terms of what is carried."""
        white, left = self.factor.whiten_vectors(q), None
        if carried is not None:
            left = carried.root * white[:, carried.rows]
            white[:, carried.rows] = 0.0
        self.factor.sign(white)
        return white, None if self.coupling is None else white @ self.coupling, left

    def forward(self, white: Tensor, t: Tensor | None, carried: _Carried | None, w: Tensor | None) -> Tensor:
        """−G⁻¹(q + B t) for t (k, n′), given what was carried, w (k, k₁)."""
        e = -white if t is None else self.factor.sign(t @ self.coupling.mT).add_(white).neg_()
        if carried is not None:
            e[:, carried.rows] = carried.root * w
        return self.factor.unwhiten_vectors(e)


class _Pivot(NamedTuple):
    reduced: _Reduced
    damping: float  # ε of this layer
    solver: _DensePivot | ManyClassPivot
    carried: _Carried | None


class _Memory:
    """Memory that is used again in every layer: the C library's allocator would leave holes that nothing fits.

    For temporaries, one at a time; and for pivots, where no more than the last `alive` of them are needed. None: each
    pivot is kept, in memory of its own.
    """

    def __init__(self, alive: int | None = None):
        self._alive = alive
        self._slots: dict[tuple, Tensor] = {}

    def temporary(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialized tensor that is valid until the next call."""
        return self._slot((), like, shape)

    def pivot(self, name: str, index: int, like: Tensor, *shape: int) -> Tensor:
        """An uninitialized tensor for layer `index`, valid until it is asked for `alive` layers further down."""
        return like.new_empty(shape) if self._alive is None else self._slot((name, index % self._alive), like, shape)

    def _slot(self, key: tuple, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if key not in self._slots or self._slots[key].numel() < size:
            self._slots.pop(key, None)  # freed before the larger one is made
            self._slots[key] = like.new_empty(size)
        return self._slots[key][:size].view(shape)


class _Count(NamedTuple):
    """Of eliminated pivots."""

    negative: int
    logabsdet: float


def _eliminate_layer(
    layers: Sequence[LayerDerivatives],
    index: int,
    formed: _Formed,
    epsilon: float,
    above: _CostToGo | None,
    many_classes: bool,
    definite_only: bool,
    memory: _Memory,
) -> tuple[_Pivot, _Count, _CostToGo | None]:
    """One step of the backward sweep: the pivot of layer `index`, what it counts, and the cost-to-go below it.

    The matrix of `above` is overwritten. definite_only: _Indefinite where a pivot is not positive definite.
    """
    layer, reduced = layers[index], formed.reduced[index]
    definite = above is None or above.definite
    (a, width), (N, r) = layer.weight.shape, reduced.rows.shape
    perpendicular = a * (layer.inputs.shape[1] - r)  # dimensions of X⊥
    if perpendicular and epsilon == 0:
        raise _singular(index, epsilon, f"{perpendicular} directions of its weights don't act on this batch")
    carried = coupling = values = P = None
    if many_classes and layer.output is not None:
        if epsilon == 0 and layer.output.zero_sum:
            raise _singular(index, epsilon, "the same row added to the weights of every class changes nothing")
        solver = ManyClassPivot.form(layer, reduced.basis, reduced.rows, epsilon)
        negative, logabsdet = solver.num_negative(), float(solver.logabsdet())
        definite = negative == 0
        if index:
            P = _output_cost_to_go(layer)
            solver.reduce(P)
    else:
        G, B, P = _form_pivot(layer, reduced, epsilon, above, memory, index)
        factor = factor_symmetric(G, epsilon, definite_only=definite_only, definite_first=definite)
        if factor is None and definite_only:
            raise _Indefinite(index)
        if factor is None:
            raise _singular(index, epsilon, "its pivot is exactly singular")
        negative, logabsdet = factor.num_negative, factor.logabsdet
        definite = definite and negative == 0
        if index:
            W = factor.whiten(B)
            del B
            carried, coupling, values = _carry(
                layer, reduced, epsilon, factor, W, formed.scales[index], formed.couplings[index]
            )
            if carried is not None:
                num_rows = len(carried.rows)
                negative -= int((values[:num_rows] < 0).sum())
                logabsdet -= float(values[:num_rows].abs().log().sum())
                perpendicular -= len(values) - num_rows
            subtract_gram(P, W, factor.signs)
        solver = _DensePivot(factor, W if index else None)
    if epsilon < 0:
        negative += perpendicular
    if perpendicular:
        logabsdet += perpendicular * math.log(abs(epsilon))
    if definite_only and negative:
        raise _Indefinite(index)
    if not math.isfinite(logabsdet):
        raise _singular(index, epsilon, "its pivot is singular, or overflowed")
    if P is not None:
        mirror(P)
        if reduced.basis is not None:  # − (λλᵀ) ⊗ (I − QQᵀ)/ε, without the bias, and without what is carried
            adjoint = layer.adjoint
            if carried is not None and carried.left is not None:
                adjoint = adjoint - (adjoint @ carried.left) @ carried.left.mT
            P.view(N, width, N, width).addcmul_(
                (adjoint @ adjoint.mT)[:, None, :, None], reduced.outside[:, None, :], value=-1 / epsilon
            )
    below = None if P is None else _CostToGo(P, coupling, values, definite)
    return _Pivot(reduced, epsilon, solver, carried), _Count(negative, logabsdet), below


def _carry(
    layer: LayerDerivatives,
    reduced: _Reduced,
    epsilon: float,
    factor: SymmetricFactor,
    W: Tensor,
    scale: float,
    norm: float,
) -> tuple[_Carried | None, Tensor | None, Tensor | None]:
    """Which pivots to leave to the layer below, their coupling to t_{ℓ-1} (k, n′) and their values (k,).

    A pivot whose elimination would add to the cost-to-go more than _GROWTH times its natural size, `scale`. norm: ‖λ‖.
    Rows of W that are carried are set to zero. ω is scaled so that all couplings to t are of the size of Y's.
    """
    if not 0 < scale < math.inf:  # nothing couples, or overflow, which is found elsewhere
        return None, None, None
    bound = _GROWTH * scale
    width = layer.weight.shape[1]
    carries_outside = reduced.basis is not None and norm > math.sqrt(bound * abs(epsilon))
    if not carries_outside and float(torch.linalg.vector_norm(W)) <= math.sqrt(bound):
        return None, None, None  # no row of W is longer than all of it
    length = torch.linalg.vector_norm(W, dim=1)
    rows = (length > math.sqrt(bound)).nonzero()[:, 0]
    left = outside = None
    if carries_outside:
        _, s, V = torch.linalg.svd(layer.adjoint, full_matrices=False)
        left = V[s * s > bound * abs(epsilon)].mT
        outside = torch.linalg.qr(reduced.basis, mode="complete").Q[:, reduced.basis.shape[1] :]  # (d, d − r)
        if left.shape[1] == 0:
            left = None
    if len(rows) == 0 and left is None:
        return None, None, None
    root = scale * torch.linalg.vector_norm(reduced.rows) / length[rows]
    coupling = root[:, None] * W[rows]
    values = root**2
    if factor.signs is not None:
        values = values * factor.signs[rows, 0]
    W[rows] = 0.0
    if left is None:
        return _Carried(rows, root, None, None), coupling, values
    of_perpendicular = torch.einsum("bi,kj->ijbk", layer.adjoint @ left, outside[:width])
    of_perpendicular = of_perpendicular.reshape(-1, W.shape[1])
    coupling = torch.cat([coupling, of_perpendicular])
    values = torch.cat([values, values.new_full((len(of_perpendicular),), epsilon)])
    return _Carried(rows, root, left, outside), coupling, values


def _singular(index: int, epsilon: float, why: str) -> SingularHessianError:
    message = f"H + damping·I is singular at layer {index + 1}, damping {epsilon:g}: {why}. Choose a larger damping"
    if epsilon == 0:
        message += "; for the minimum-norm solution of H x = v call hessian_inverse_vector_product with damping=0"
    return SingularHessianError(message, layer=index + 1, damping=epsilon)


def _output_times_weight(layer: LayerDerivatives) -> Tensor:
    """Λ_b W, (N, C, a′)."""
    return layer.output.apply(layer.weight.mT.unsqueeze(1)).permute(1, 2, 0)


def _output_cost_to_go(layer: LayerDerivatives) -> Tensor:
    """AᵀΛA of the last layer, block diagonal over the samples: (n′, n′)."""
    N, width = len(layer.inputs), layer.weight.shape[1]
    P = layer.weight.new_zeros(N, width, N, width)
    P.diagonal(dim1=0, dim2=2).copy_((layer.weight.mT @ _output_times_weight(layer)).permute(1, 2, 0))
    return P.view(N * width, N * width)


def _form_pivot(
    layer: LayerDerivatives,
    reduced: _Reduced,
    epsilon: float,
    above: _CostToGo | None,
    memory: _Memory,
    index: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """G, B, and the cost-to-go before layer ℓ's parameters are eliminated, TᵀPT + AᵀDA; that above is overwritten.

    Row (q, i) of G and B is entry Y[i, q], after them come those of w; row (b, i) of P and K is entry [b, i] of t_ℓ.
    Layer 1 needs only G.
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
        B = torch.einsum("bq,bik->qibk", R, _output_times_weight(layer)).reshape(r * a, n_below)
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
            G.view(r, a, r, a).addcmul_((R.mT @ R)[:, None, :, None], layer.penalty[:, None, :])
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
        if above.coupling is not None:
            G, B = _with_carried(layer, R, above, G, B)
        if first:
            return G, None, None
    # S: Y[i, q] meets t[b, k] by λ[b, i] Q[k, q]
    S = B[: r * a].view(r, a, N, width)
    if reduced.basis is None:
        S.diagonal(dim1=0, dim2=3)[:, :, :width].add_(layer.adjoint.mT[:, :, None])
    else:
        S.addcmul_(layer.adjoint.mT[:, :, None], reduced.basis[:width].mT[:, None, None, :])
    return G, B, P


def _with_carried(
    layer: LayerDerivatives, R: Tensor, above: _CostToGo, G: Tensor, B: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """G and B of [Y; w]: K_wt = P_wt φ′, K_ww = P_ww, and w meets t_{ℓ-1} by K_wt A + σ P_wt."""
    k, N, m = len(above.coupling), len(R), len(G)
    K = above.coupling * layer.slope.flatten()  # (k, n)
    extended = G.new_zeros(m + k, m + k)
    extended[:m, :m] = G
    extended[m:, :m] = (R.mT @ K.view(k, N, -1)).flatten(1)
    extended[:m, m:] = extended[m:, :m].mT
    extended[m:, m:].diagonal().copy_(above.values)
    if B is None:
        return extended, None
    rows = (K.view(k * N, -1) @ layer.weight).view(k, -1)
    if layer.skip:
        rows.add_(above.coupling, alpha=layer.skip)
    return extended, torch.cat([B, rows])


class _Sweep:
    """The backward sweep, done: its counts, and its pivots for solves, kept or recomputed.

    Kept are all pivots; or, where `checkpoint`, every √L-th cost-to-go, from which a solve recomputes the pivots, once
    on its way down and once up; or nothing, where not `solvable`. Every recomputation gives the same bits.
    """

    @torch.inference_mode()  # what torch does beside the arithmetic is a third of a small network's time
    def __init__(
        self,
        layers: Sequence[LayerDerivatives],
        epsilons: Sequence[float],
        formed: _Formed | None,
        many_classes: bool,
        *,
        definite_only: bool = False,
        solvable: bool = True,
        checkpoint: bool = False,
    ):
        self.layers, self.epsilons, self.formed, self._many_classes = layers, epsilons, formed, many_classes
        if formed is None:
            self.formed = _form(layers)
        self._length = math.isqrt(len(layers) - 1) + 1 if checkpoint else len(layers)  # of a segment
        self._segments: dict[int, _CostToGo | None] = {}  # highest layer of each: the cost-to-go above it
        self._pivots: list[_Pivot] | None = [] if solvable and not checkpoint else None  # last layer first
        negative, logabsdet, above = 0, 0.0, None
        memory = _Memory(None if self._pivots is not None else 1)
        for index in range(len(layers) - 1, -1, -1):
            if checkpoint and (len(layers) - 1 - index) % self._length == 0:
                self._segments[index] = _copied(above)
            pivot, count, above = self._eliminate(index, above, memory, definite_only)
            if self._pivots is not None:
                self._pivots.append(pivot)
            del pivot  # or it would live on while the next one is made
            negative, logabsdet = negative + count.negative, logabsdet + count.logabsdet
        self.num_negative, self.logabsdet = negative, logabsdet

    def _eliminate(self, index: int, above: _CostToGo | None, memory: _Memory, definite_only: bool = False):
        return _eliminate_layer(
            self.layers,
            index,
            self.formed,
            self.epsilons[index],
            above,
            self._many_classes,
            definite_only,
            memory,
        )

    def solve(self, v: Tensor) -> Tensor:
        """(H + εI)⁻¹v for v (P, k)."""
        with torch.inference_mode():
            x = _sweep_solve(self, v)
        return x.clone()  # for use in an autograd graph

    def downward(self) -> Iterator[_Pivot]:
        """The pivots, last layer first."""
        if self._pivots is not None:
            yield from self._pivots
        memory = _Memory(1)
        for top in self._segments:
            yield from self._segment(top, memory)

    def upward(self) -> Iterator[_Pivot]:
        """The pivots, first layer first."""
        if self._pivots is not None:
            yield from reversed(self._pivots)
        memory = _Memory(self._length)
        for top in reversed(self._segments):
            yield from reversed(list(self._segment(top, memory)))

    def _segment(self, top: int, memory: _Memory) -> Iterator[_Pivot]:
        above = _copied(self._segments[top])
        for index in range(top, max(top - self._length, -1), -1):
            pivot, _, above = self._eliminate(index, above, memory)
            yield pivot
            del pivot


def _copied(above: _CostToGo | None) -> _CostToGo | None:
    return None if above is None else above._replace(P=above.P.clone())


def _split(sweep: _Sweep, V: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Of each layer −(V Q)ᵀ (k, r, a), V⊥ = V − V Q Qᵀ (k, a, d), and λ V⊥ (k, N, a′) without the bias; None where
    zero."""
    inside, outside, coupled = [], [], []
    for members in _alike(sweep.layers):
        if sweep.formed.reduced[members[0]].basis is None:
            inside += [-V[i].mT for i in members]
            outside += [None] * len(members)
            coupled += [None] * len(members)
            continue
        blocks = torch.stack([V[i] for i in members])  # (g, k, a, d)
        bases = torch.stack([sweep.formed.reduced[i].basis for i in members])[:, None]  # (g, 1, d, r)
        within = blocks @ bases
        inside += within.mT.neg()
        outside += blocks.sub_(within @ bases.mT)
        if members[-1] == 0:  # below layer 1 there is nothing
            coupled.append(None)
            continue
        width = sweep.layers[members[0]].weight.shape[1]
        coupled += torch.stack([sweep.layers[i].adjoint for i in members])[:, None] @ blocks[..., :width]
    return inside, outside, coupled


def _join(
    sweep: _Sweep,
    Y: Sequence[Tensor],
    outside: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    carried: dict[int, tuple[_Carried, Tensor]],
) -> list[Tensor]:
    """X = Y Qᵀ + X⊥ (k, a, d) of each layer, X⊥ = (V − λᵀ[t, 0])(I − QQᵀ)/ε but for what was carried: `outside` is
    V(I − QQᵀ), `states` t_{ℓ-1} (k, N, a′), and `carried` has the parameters U Z Q⊥ᵀ."""
    X = []
    for members in _alike(sweep.layers):
        if outside[members[0]] is None:
            X += [Y[i] for i in members]
            continue
        free = torch.stack([outside[i] for i in members])
        bases = torch.stack([sweep.formed.reduced[i].basis for i in members])[:, None]  # (g, 1, d, r)
        last = states[members[-1]]
        if last is not None:
            width = last.shape[2]
            t = torch.stack([torch.zeros_like(last) if states[i] is None else states[i] for i in members])  # t_0 = 0
            coupled = torch.stack([sweep.layers[i].adjoint for i in members])[:, None].mT @ t  # (g, k, a, a′)
            free += (coupled @ bases[:, :, :width]) @ bases.mT
            free[..., :width] -= coupled
        for x, i in zip(free, members, strict=True):
            x /= sweep.epsilons[i]
            if i in carried and carried[i][0].left is not None:
                left, w = carried[i][0].left, carried[i][1]
                x += carried[i][0].perpendicular(w) - left @ (left.mT @ x)
        X += free.add_(torch.stack([Y[i] for i in members]) @ bases.mT)
    return X


def _sweep_solve(sweep: _Sweep, v: Tensor) -> Tensor:
    """One backward and one forward sweep for v (P, k): the direct solution of (H + εI) x = v."""
    layers = sweep.layers
    V, states = _blocks(layers, v), []
    inside, outside, coupled = _split(sweep, V)
    p = p_carried = None  # derivative of the cost-to-go at 0, in t_ℓ: (k, N, a), and in w: (k, k_w)
    for index, pivot in zip(range(len(layers) - 1, -1, -1), sweep.downward(), strict=True):
        layer, carried, width = layers[index], pivot.carried, layers[index].weight.shape[1]
        q = inside[index]
        if p is not None:
            slope_p = layer.slope * p
            q = q + pivot.reduced.rows.mT @ slope_p
        q = q.flatten(1) if p_carried is None else torch.cat([q.flatten(1), p_carried], 1)
        state, back, left = pivot.solver.backward(q, carried)
        states.append(state)
        if index == 0:
            break
        back = back.unflatten(1, (len(layer.inputs), -1))  # (k, N, a′)
        below = -back if p is None else _with_skip(layer.skip, slope_p @ layer.weight - back, p)
        p_carried = left
        if outside[index] is not None:
            pull = coupled[index]
            if carried is not None and carried.left is not None:
                free = outside[index][:, :, :width]
                pull = layer.adjoint @ (free - carried.left @ (carried.left.mT @ free))
                p_carried = torch.cat([p_carried, carried.of_perpendicular(V[index])], 1)
            below = torch.add(below, pull, alpha=1 / pivot.damping)
        p = below
    pivot = carried = None  # its memory is used again
    Y, inputs, t, w = [], [], None, None
    parameters = {}  # of what was carried: index → carried, U Z Q⊥ᵀ's Z
    for index, (pivot, state) in enumerate(zip(sweep.upward(), reversed(states), strict=True)):
        layer, rows, carried = layers[index], pivot.reduced.rows, pivot.carried
        a, num_rows = len(layer.weight), 0 if carried is None else len(carried.rows)
        solved = pivot.solver.forward(
            state, None if t is None else t.flatten(1), carried, None if carried is None else w[:, :num_rows]
        )  # (k, r a and what was carried into this layer)
        if carried is not None:
            parameters[index] = carried, w[:, num_rows:]
        y = solved[:, : rows.shape[1] * a].unflatten(1, (-1, a))  # (k, r, a)
        w = solved[:, rows.shape[1] * a :]
        Y.append(y.mT)
        inputs.append(t)
        s = rows @ y if t is None else rows @ y + t @ layer.weight.mT  # z̃ X⊥ᵀ = 0
        t = _with_skip(layer.skip, layer.slope * s, t)
    return _flatten(layers, _join(sweep, Y, outside, inputs, parameters))


# ------------------------------------------------------------------------------------------ factor and solve


def _dense_hessian(layers: Sequence[LayerDerivatives], num_parameters: int) -> Tensor:
    """H (P, P), by products with the columns of the identity, in chunks."""
    like = layers[0].weight
    H = like.new_empty(num_parameters, num_parameters)
    state = sum(layer.inputs.numel() + 4 * layer.slope.numel() for layer in layers) + num_parameters
    size = max(1, DENSE_CHUNK // (8 * state))
    for start in range(0, num_parameters, size):
        identity = like.new_zeros(num_parameters, min(size, num_parameters - start))
        identity.diagonal(-start).fill_(1)
        H[:, start : start + size] = _product(layers, identity)
    return H


class _Dense:
    """H + εI as a matrix, factored; H is kept for other dampings."""

    def __init__(self, layers, epsilons, formed: Tensor | None, definite_only: bool, dtype: torch.dtype):
        self.formed = _dense_hessian(layers, len(_damping_vector(layers, epsilons))) if formed is None else formed
        G = self.formed.to(dtype, copy=True)
        G.diagonal().add_(_damping_vector(layers, epsilons)[:, 0])
        factor = factor_symmetric(G, min(map(abs, epsilons)), definite_only=definite_only)
        if factor is None and definite_only:
            raise _Indefinite(0)
        if factor is None:
            damping = epsilons[0] if len(set(epsilons)) == 1 else tuple(epsilons)
            raise SingularHessianError(
                f"H + damping·I, factored densely at damping={damping}, has an exactly singular pivot: choose another",
                damping=damping,
            )
        self._factor, self.num_negative, self.logabsdet = factor, factor.num_negative, factor.logabsdet

    def solve(self, v: Tensor) -> Tensor:
        """(H + εI)⁻¹v for v (P, k)."""
        return self._factor.solve(v)


@dataclass(frozen=True, eq=False, repr=False)
class HessianFactorization:
    """H + εI + (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ, or with JᵀΛJ for H, factored at one batch and one set of parameters; see
    `factorize_hessian`. Where this class says H + εI, it means that matrix.

    Immutable: it holds copies of all it needs, and answers for the parameters at factor time after they change.
    """

    route: str  # 'sweep', 'dense' or 'gram'
    curvature: str  # 'hessian' or 'gauss_newton'
    damping: Damping  # as asked for: a float, or one a layer
    state_damping: float  # μ
    precision: str  # of the factor: 'float64', or 'mixed': float32
    keep: str  # 'solve' or 'inertia'
    checkpoint_layers: bool
    num_parameters: int
    num_negative_eigenvalues: int  # of H + εI, by Sylvester's law of inertia
    logabsdet: float  # log |det(H + εI)|
    _layers: tuple[LayerDerivatives, ...]  # as `_modified`: their form is all of the matrix but ε
    _epsilons: tuple[float, ...]
    _factor: _Sweep | _Dense | GramFactor | None
    _formed: object  # what the route forms whatever the damping: see `_factorize`

    @property
    def is_positive_definite(self) -> bool:
        return self.num_negative_eigenvalues == 0

    def __repr__(self) -> str:
        return (
            f"HessianFactorization(P={self.num_parameters}, {self._dampings()}, curvature={self.curvature!r}, "
            f"route={self.route!r}, precision={self.precision!r}, "
            f"num_negative_eigenvalues={self.num_negative_eigenvalues})"
        )

    def _dampings(self) -> str:
        state = f", state_damping={self.state_damping:g}" if self.state_damping else ""
        return f"damping={self.damping}{state}"

    def with_damping(self, damping: float | Sequence[float]) -> HessianFactorization:
        """The same matrix at another damping, all else as here: derivatives, QR, and where the route forms it H or the
        Gram matrix, are used again. Raises as `factorize_hessian` does."""
        damping = checked_damping(damping, len(self._layers))
        check_combination(self.route, self.curvature, self.state_damping, damping, self.checkpoint_layers)
        return self._again(damping, self.route)

    def _again(self, damping: Damping, route: str, precision: str | None = None) -> HessianFactorization:
        return _factorize(
            self._layers,
            damping,
            self.curvature,
            route,
            self.state_damping,
            precision=self.precision if precision is None else precision,
            keep=self.keep,
            checkpoint_layers=self.checkpoint_layers and route == "sweep",
            formed=self._formed if route == self.route and precision in (None, self.precision) else None,
        )

    def solve(self, v: Tensor, *, rtol: float | None = 1e-8) -> Tensor:
        """x with (H + εI) x = v, for v of shape (P,) or (P, k), float32 or float64; x has v's dtype, no graph.

        Refined until the residual stops falling, or with a float32 factor meets rtol. Each column then has
        ‖(H + εI)x − v‖ ≤ rtol ‖v‖, by an exact product in float64, before x is rounded to v's dtype; or
        SingularHessianError is raised, with the residual reached, and an rtol and (where two trials find one) a damping
        that will do. rtol=None: one direct sweep, no product, nothing checked (and to float32's digits only, where
        precision is 'mixed'). Cost: O(Σ m² + m n′) a column and a sweep, two or three sweeps as a rule; with
        checkpoint_layers, two factorizations a sweep.
        """
        columns = checked_vector(v, self.num_parameters, self._layers[0].weight.device)
        if self._factor is None:
            raise ValueError("factored with keep='inertia': factor with keep='solve' to solve")
        if rtol is None:
            return self._direct(columns).reshape(v.shape).to(v.dtype)
        rtol = checked_rtol(rtol)
        x, residual = self._refined(columns, rtol)
        if bool((residual <= rtol).all()):
            return x.reshape(v.shape).to(v.dtype)
        worst, column = residual.max(0)
        failed = columns[:, column, None]
        growth = float(column_norms(unit_columns(x[:, column, None])[0]) / column_norms(unit_columns(failed)[0]))
        growth *= float(x[:, column].abs().max() / failed.abs().max())
        reach = UNIT_ROUNDOFF * spectral_norm(self._product, columns) * growth
        mixed = ", precision='mixed'" if self.precision == "mixed" else ""
        tries = [(self.damping, "dense", "float64")] if self._may_try_dense() else []
        if self.precision == "mixed":
            tries = [(self.damping, self.route, "float64"), *tries]
        tries += self._larger(10.0, 1000.0)
        raise SingularHessianError(
            f"(H + damping·I)x = v was solved to a relative residual of {worst:.1e}, not to rtol={rtol:g}, at "
            f"{self._dampings()}{mixed}; float64 can't be expected below {reach:.0e}. "
            + self._advice(float(worst), failed, rtol, tries),
            damping=self.damping,
            residual=float(worst),
        )

    def residual(self, x: Tensor, v: Tensor) -> Tensor:
        """‖(H + εI)x − v‖/‖v‖ in float64 by an exact product: () for x and v of shape (P,), (k,) for (P, k)."""
        if x.shape != v.shape:
            raise ValueError(f"x and v must have one shape, got {tuple(x.shape)} and {tuple(v.shape)}")
        x_columns, columns = (checked_vector(y, self.num_parameters, self._layers[0].weight.device) for y in (x, v))
        unit, scale = unit_columns(columns)
        error = column_norms(unit - self._product(x_columns / scale))
        norm = column_norms(unit)
        return (error / torch.where(norm > 0, norm, 1.0)).reshape(v.shape[1:])

    def _direct(self, v: Tensor) -> Tensor:
        dtype = torch.float32 if self.precision == "mixed" else torch.float64
        with one_pool(v.device):  # layers may be recomputed: at another number of threads, to other bits
            return self._factor.solve(v.to(dtype)).to(torch.float64)

    def _product(self, v: Tensor) -> Tensor:
        return _product(self._layers, v) + _damping_vector(self._layers, self._epsilons) * v

    def _refined(self, v: Tensor, rtol: float, **limits) -> Refined:
        # a step on a float32 factor adds few digits: no more of them than asked for
        limits |= {"target": rtol if self.precision == "mixed" else 0.0}
        chunks = v.split(max(1, _REFINED_NUMBERS // len(v)), 1)  # refinement keeps up to 40 arrays of its columns
        parts = [refine(self._product, self._direct, chunk, rtol, **limits) for chunk in chunks]
        return Refined(*(torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)))

    def _probe(self) -> bool:
        """Whether a float32 factor refines a fixed random v to _PROBE_RTOL in _PROBE_STEPS, or would at the rate of the
        first of them."""
        if not math.isfinite(self.logabsdet):
            return False
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.num_parameters, 1, generator=generator, dtype=torch.float64)
        v = v.to(self._layers[0].weight.device)
        if bool(self._refined(v, _PROBE_RTOL, max_steps=1).residual <= _PROBE_RTOL ** (1 / _PROBE_STEPS)):
            return True
        return bool(self._refined(v, _PROBE_RTOL, max_steps=_PROBE_STEPS).residual <= _PROBE_RTOL)

    def _may_try_dense(self) -> bool:
        return self.route != "dense" and self.num_parameters <= _DENSE_TRIAL

    def _larger(self, *factors: float) -> list[tuple[Damping, str, str]]:
        """Settings to try in place of a failed solve: this damping times each factor, where that regularizes more."""
        if min(self._epsilons) <= 0:
            return []
        scaled = [tuple(factor * epsilon for epsilon in self._epsilons) for factor in factors]
        return [(e if isinstance(self.damping, tuple) else e[0], self.route, self.precision) for e in scaled]

    def _advice(self, worst: float, v: Tensor, rtol: float, tries: list[tuple[Damping, str, str]]) -> str:
        """What would do in place of a failed solve of v: the first of `tries` that works, or a larger rtol."""
        advice = "Pass another damping"
        for damping, route, precision in tries:
            try:
                residual = self._again(damping, route, precision)._refined(v, rtol).residual
            except (SingularHessianError, MemoryError):  # the error that is being written counts, not this one
                continue
            if bool((residual <= rtol).all()):
                changes = [
                    f"{name}={new!r}"
                    for name, new, old in (
                        ("damping", damping, self.damping),
                        ("route", route, self.route),
                        ("precision", precision, self.precision),
                    )
                    if new != old
                ]
                name = ", ".join(changes) + (" to factorize_hessian" if damping == self.damping else "")
                kept = f", the same state_damping={self.state_damping:g}" if self.state_damping else ""
                advice = f"Pass {name}{kept} (tried: it reaches {residual.max():.0e})"
                break
        return advice + (f", or rtol={2 * worst:.1e} to accept this answer" if worst < 0.4 else "")


def _damping_vector(layers: Sequence[LayerDerivatives], epsilons: Sequence[float]) -> Tensor:
    """Each parameter's damping, (P, 1)."""
    like = layers[0].weight
    return torch.cat(
        [like.new_full((len(x.weight) * x.inputs.shape[1], 1), e) for x, e in zip(layers, epsilons, strict=True)]
    )


def _in_float32(layer: LayerDerivatives) -> LayerDerivatives:
    output = layer.output and layer.output._replace(diagonal=layer.output.diagonal.float())
    penalty = None if layer.penalty is None else layer.penalty.float()
    tensors = {name: getattr(layer, name).float() for name in LayerDerivatives._fields[:5]}
    return layer._replace(output=output, penalty=penalty, **tensors)


def _factorize(
    layers: tuple[LayerDerivatives, ...],
    damping: Damping,
    curvature: str,
    route: str,
    state_damping: float = 0.0,
    *,
    precision: str = "float64",
    keep: str = "solve",
    checkpoint_layers: bool = False,
    definite_only: bool = False,
    formed: object = None,
    fell_back: bool = False,
) -> HessianFactorization:
    """The form of `layers` + damping·I, factored. curvature, state_damping: what `_modified` put into the layers.

    definite_only: raise _Indefinite where it is not positive definite. formed: what the route needs that no
    damping changes, if it was formed before (and is kept unchanged): the reduced inputs, H, or the Gram matrix.
    fell_back: from a float32 factor.
    """
    shapes, N = shapes_of_layers(layers), len(layers[0].inputs)
    epsilons = damping if isinstance(damping, tuple) else (damping,) * len(layers)
    if route == "auto":
        route = "sweep" if checkpoint_layers else _cheapest_route(shapes, N, curvature, state_damping, epsilons)
    check_memory(
        shapes,
        N,
        route,
        layers[0].weight.device,
        curvature=curvature,
        precision=precision,
        keep=keep,
        checkpoint_layers=checkpoint_layers,
        formed=formed is not None,
        may_gram=_may_gram(curvature, state_damping, epsilons),
        may_mix=not fell_back,
    )
    factored = tuple(map(_in_float32, layers)) if precision == "mixed" else layers
    try:
        with one_pool(layers[0].weight.device):
            if route == "sweep":
                factor = _Sweep(
                    factored,
                    epsilons,
                    formed,
                    prefers_many_classes(shapes, N),
                    definite_only=definite_only,
                    solvable=keep == "solve",
                    checkpoint=checkpoint_layers,
                )
            elif route == "dense":
                factor = _Dense(layers, epsilons, formed, definite_only, factored[0].weight.dtype)
            else:
                from hessian_gram import GramFactor  # it is made of this module's layers and products

                factor = GramFactor(factored, epsilons, formed)
        if not math.isfinite(factor.logabsdet):
            raise SingularHessianError(
                f"H + damping·I has a pivot at damping={damping} that is singular, or overflowed: choose another "
                "damping, or scale the inputs",
                damping=damping,
            )
    except SingularHessianError:
        if precision != "mixed":
            raise
        factor = None  # float32 overflowed, or rounded to a singular pivot
    if factor is not None:
        result = HessianFactorization(
            route,
            curvature,
            damping,
            state_damping,
            precision,
            keep,
            checkpoint_layers,
            num_parameters(shapes),
            factor.num_negative,
            factor.logabsdet,
            layers,
            epsilons,
            factor if keep == "solve" else None,
            factor.formed if keep == "solve" or route == "sweep" else None,
        )
        if precision == "float64" or keep == "inertia" or result._probe():
            return result
        del result
    del factor, factored, formed  # before the second factor takes their memory
    return _factorize(
        layers,
        damping,
        curvature,
        route,
        state_damping,
        keep=keep,
        checkpoint_layers=checkpoint_layers,
        definite_only=definite_only,
        fell_back=True,
    )


def _may_gram(curvature: str, state_damping: float, epsilons: Sequence[float]) -> bool:
    """The Gram route knows no state damping, and divides by ε."""
    return curvature == "gauss_newton" and state_damping == 0 and all(epsilons)


def _cheapest_route(
    shapes: tuple[LayerShape, ...], N: int, curvature: str, state_damping: float, epsilons: Sequence[float]
) -> str:
    operations = count_operations(shapes, N, _may_gram(curvature, state_damping, epsilons))
    return min(operations, key=operations.get)


def _factorize_definite(
    layers: tuple[LayerDerivatives, ...], damping: float, route: str, H: Tensor | None = None
) -> tuple[HessianFactorization | None, float]:
    """H + damping·I factored, and 1.0; or None where it is not positive definite, and the share of the operations done.

    The sweep stops at the first layer whose pivot has no Cholesky factor: for ε > 0, H + εI ≻ 0 ⇔ every pivot ≻ 0
    (Haynsworth). Its operations are counted; a dense factorization that fails counts as a whole one. route: 'sweep' or
    'dense'; H: if it was formed.
    """
    try:
        return _factorize(layers, damping, "hessian", route, definite_only=True, formed=H), 1.0
    except _Indefinite as stop:
        if route == "dense":
            return None, 1.0
        shapes, N = shapes_of_layers(layers), len(layers[0].inputs)
        many_classes = prefers_many_classes(shapes, N)
        operations = [layer_operations(shapes, index, N, many_classes) for index in range(len(shapes))]
        always = natural_operations(shapes, N)
        done = operations[stop.index].pivot + sum(map(sum, operations[stop.index + 1 :]))
        return None, (always + done) / (always + sum(map(sum, operations)))


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
    are left to the layer below, so that no digits are lost that H + damping·I has. Not checked: that eigenvalues of H
    are further from −ε than rounding, about 1e-15 ‖H‖ √P; those may be counted on the wrong side.
    """
    layers = _checked_derivatives(model, loss)
    damping, state_damping = checked_damping(damping, len(layers)), checked_nonnegative("state_damping", state_damping)
    check_choices(route=route, precision=precision, keep=keep)
    curvature = checked_curvature(curvature)
    check_combination(route, curvature, state_damping, damping, checkpoint_layers)
    layers = _modified(layers, curvature, state_damping)
    return _factorize(
        layers,
        damping,
        curvature,
        route,
        state_damping,
        precision=precision,
        keep=keep,
        checkpoint_layers=checkpoint_layers,
    )


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
        return _factorize(layers, damping, "hessian", "auto").solve(v, rtol=rtol)
    num_parameters = sum(p.numel() for p in model.parameters())
    columns = checked_vector(v, num_parameters, layers[0].weight.device)
    found = minimum_norm(
        lambda y: _product(layers, y),
        lambda shift: _factorize(layers, shift, "hessian", "auto"),
        columns,
        rtol,
    )
    if not bool((found.residual <= rtol).all()):
        raise _undamped_error(found, columns, rtol, v.dtype)
    return found.x.reshape(v.shape).to(v.dtype)


def _undamped_error(found: MinimumNorm, v: Tensor, rtol: float, dtype: torch.dtype) -> SingularHessianError:
    worst, column = found.residual.max(0)
    if found.curvature < NULL:
        factors = (1e4, 1e6)  # no small damping helps against a part of v that H does not see
        why = f"v is outside the range of H by {worst:.1e} of its norm, so that no x solves H x = v"
        if dtype == torch.float32 and worst < 1e-6:
            why += " (a float32 v is known to 6e-8 of its norm only: compute it in float64, from model.double())"
    else:
        factors = (100.0, 1e4)
        why = (
            f"what is left of v, {worst:.1e} of its norm, lies where the eigenvalues of H, about {found.curvature:.0e} "
            "of its norm, are too near 0 for float64"
        )
    advice = found.shifted._advice(float(worst), v[:, column, None], rtol, found.shifted._larger(*factors))
    return SingularHessianError(
        f"H x = v, undamped, was not solved to rtol={rtol:g}: {why}. {advice}", damping=0.0, residual=float(worst)
    )
