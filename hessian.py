"""Solve (H + εI) x = v exactly, H the full Hessian of a network's loss.

One elimination solves every network (_hessian/elimination.py). `TrackedNetwork` takes any. This file derives the
simplest case, `DeepMLPWithTracking`: fully connected layers in a chain, each one operation (_hessian/chain.py).

The loss is the mean over a batch of N samples. H is P × P for P parameters, symmetric, and almost always indefinite. It
is never formed. A change X_ℓ of every layer's weights changes the pre-activations to first order by s_ℓ and the
activations by t_ℓ,

    s_ℓ = z̃_{ℓ-1} X_ℓᵀ + t_{ℓ-1} W_ℓᵀ,    t_ℓ = φ′(h_ℓ) s_ℓ + σ_ℓ t_{ℓ-1},    t_0 = 0.

The second-order change of the loss is a sum over layers, in which only neighbours are coupled:

    ⟨X, H X⟩ = ⟨s_L, Λ s_L⟩ + Σ_{ℓ<L} ⟨β_ℓ φ″(h_ℓ), s_ℓ²⟩ + 2 Σ_{ℓ>1} ⟨λ_ℓ, t_{ℓ-1} X_ℓ[:, :-1]ᵀ⟩.

H itself couples every pair of layers. With the t_ℓ as further unknowns only neighbours are coupled, and the system is
block tridiagonal: a control problem, with parameters as controls and activations as state. The backward sweep
eliminates layer after layer, from the last to the first (a Riccati recursion). The forward sweep gives x. Time and
memory are linear in L.

Notation. Names in square brackets are those of Rahimi's paper. "Below" means nearer to the inputs.

    N, L, C       samples of the batch, layers, classes
    a, a′, d      width of layer ℓ; that of layer ℓ−1; inputs of layer ℓ with the bias (d = a′ + 1, or a′ without)
    n, n′         N a and N a′
    z̃  (N, d)     inputs of layer ℓ, with a column of ones for the bias
    W  (a, a′)    weights without the bias; h = z̃ W̃ᵀ with it; z = φ(h) + σ z_{ℓ-1}, σ = 1 on a skip, else 0
    β, λ (N, a)   ∂loss/∂z and ∂loss/∂h
    Λ  (N, C, C)  Hessian of the loss in the logits, one block a sample
    X  (a, d)     layer ℓ's block of the unknown x; V of the right-hand side
    R, Q          z̃ = R Qᵀ, Q (d, r) orthonormal, of rank r ≤ min(N, d)
    Y  (a, r)     the part of X that acts on the batch: X = Y Qᵀ + X⊥, X⊥ Q = 0
    J, A, S       Y ↦ R Yᵀ [D_x], t ↦ t Wᵀ [with φ′: ∇_z f], t ↦ λᵀ [t, 0] Q [D_D D_zx]; all structured

Reduced parameters. X acts on the batch through Y only. X⊥ enters only through ε and the term with λ, so it has a closed
form. Layer ℓ's pivot is of size m = a r ≤ n.

    pivot       G = εI + JᵀK J                          (m, m)      K = φ′P φ′ + diag(β φ″)    (n, n)
    coupling    B = S + Jᵀ(K A + σ φ′P)                 (m, n′)     P, the cost-to-go of t_ℓ   (n, n)
    cost-to-go  P ← TᵀP T + AᵀD A − BᵀG⁻¹B − (λλᵀ) ⊗ (I − QQᵀ)/ε    T = φ′A + σI,  D = diag(β φ″)

P is the quadratic in t_ℓ that is left when the layers above are eliminated (at their stationary point: H is
indefinite). Each G is factored as F Σ Fᵀ with Σ = ±1, and B enters as F⁻¹B alone (_hessian/symmetric_factor.py). No
pivot is ever changed. So, by Sylvester and Haynsworth, the signs in all Σ give the inertia of H + εI, and the
determinants multiply.

Carried pivots. G is a Schur complement of layers ℓ … L alone. It can have an eigenvalue near 0 that couples strongly,
though H + εI has none. Its coordinates are then eliminated in the layer below (_hessian/carried_pivots.py).

State damping. With μ > 0, (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ is added to H, where S_ℓ x = s_ℓ: D ← D + μ/N in the hidden layers. It
charges x for the changes of pre-activations that it causes. The linearization of a deep network holds as long as these
are small; a small x does not ensure that.

Cost. Factoring: Σ m³/3 + m²n′ + m n′² operations, so O(L (N a)³), and O(L (N a)²) memory. A solve: O(Σ m² + m n′). A
product with H: two passes through the network. Where P is below N a, forming H (_hessian/dense.py) and factoring it is
cheaper: `route='auto'` counts and chooses.

Assumptions. Layers as above, with elementwise activations. A loss whose Hessian in the logits is diagonal minus rank
one for every sample (cross-entropy, mean square). relu's φ″ is taken as zero. ε has the unit of loss / parameter²:
scale the loss, and you scale ε. For an L2 term ½w‖θ‖² in the loss pass damping + w.

References: A. Rahimi, The Hessian of tall-skinny networks is easy to invert, arXiv 2601.06096 (2025), the same system
with its unit blocks; Pantoja (1988) and Dunn & Bertsekas (1989), Newton's step of a multistage problem in linear time;
Tassa, Erez & Todorov (2012), state damping; Pearlmutter (1994), products with H.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.activations import ACTIVATIONS, Activation, initialize
from _hessian.argument_checks import (
    as_one_batch,
    check_choices,
    check_combination,
    check_inputs,
    check_kinds,
    check_linears,
    check_loss,
    check_model,
    check_overrides,
    check_targets,
    check_tracked,
    check_trainable,
    checked_batch_size,
    checked_curvature,
    checked_damping,
    checked_nonnegative,
    checked_rtol,
    checked_vector,
    checked_widths,
)
from _hessian.chain import ChainProgram, chain_program
from _hessian.checkpoints import even_starts
from _hessian.costs import (
    RouteCost,
    prefers_many_classes,
    route_costs,
    shapes_of_layers,
    shapes_of_linears,
)
from _hessian.data_sets import DataSet, TracksLosses, as_rows
from _hessian.dense import dense_hessian, factor_dense
from _hessian.elimination import Sweep
from _hessian.factorization import (
    Chain,
    Factor,
    HessianFactorization,
    Solver,
    System,
    factorize_system,
    undamped_failure,
)
from _hessian.gram import GramFactor, ScaledJacobian
from _hessian.layers import (
    LayerDerivatives,
    OutputHessian,
    SingularHessianError,
    TrackedBatch,
    TrackedDataSet,
    blocks_of,
    damping_vector,
    flatten_blocks,
    forward_tangent,
    with_curvature,
    with_skip,
)
from _hessian.losses import loss_derivatives, loss_value
from _hessian.network import TrackedNetwork, network_system, operations_of, resized
from _hessian.operations import Operation, OperationDerivatives
from _hessian.refinement import MinimumNorm, minimum_norm
from _hessian.settings import Settings

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "DeepMLPWithTracking",
    "HessianFactorization",
    "LayerDerivatives",
    "OperationDerivatives",
    "OutputHessian",
    "RouteCost",
    "SingularHessianError",
    "TrackedNetwork",
    "compute_layer_derivatives",
    "estimate_cost",
    "factorize_hessian",
    "hessian_inverse_vector_product",
    "hessian_vector_product",
]

# ------------------------------------------------------------------------------------------------ the network


class DeepMLPWithTracking(TracksLosses):
    """A fully connected network that remembers the batch of its last tracked loss, for the solve.

    hidden_dim: one width, or a sequence of `num_hidden_layers` widths. num_hidden_layers: L − 1; 0 is a linear model.
    activation: a key of `ACTIVATIONS` (relu: its second derivative is taken as zero). bias: in every layer.
    residual: a skip z = z_{ℓ-1} + φ(h) around every hidden layer whose input and output widths agree.
    loss: 'cross_entropy' (class indices (N,) or rows of probabilities (N, C); mean over the batch) or 'mse' (targets
    (N, C); mean over all N·C elements).

    `model(x)` gives logits (N, C), x of any shape (N, …) flattened; `model(x, y)` the loss;
    `model(x, y, track_activations=True)` the same loss, tracked: inputs and targets are copied and checked.
    Untracked calls store nothing (`torch.func` and `torch.compile` work).

    Initialized, for inputs of about unit variance, so that signals and gradients survive any depth
    (_hessian/activations.py).
    """

    _joins_batches = True

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
        self._tracked: TrackedBatch[Tensor] | TrackedDataSet | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (see the class docstring), from torch's global generator."""
        initialize(self._linears(), self.skips, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, loss={self.loss!r}, skips={int(sum(self.skips))}"

    def activate(self, index: int, h: Tensor, z: Tensor) -> Tensor:
        """Output z_ℓ (…, N, a) of hidden layer `index` from its pre-activations h and its inputs z. Override both this
        and `activation_derivatives` to add a new kind of layer z_ℓ = f(h) + σ z, f elementwise (USAGE shows one)."""
        return with_skip(self.skips[index], ACTIVATIONS[self.activation].value(h), z)

    def activation_derivatives(self, index: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of `activate` in h, elementwise, in the shape and dtype of h. In an override h is
        (N, a); the default may get several layers of one shape stacked, (g, N, a)."""
        return ACTIVATIONS[self.activation].derivatives(h)

    def forward(self, x: Tensor, targets: Tensor | None = None, track_activations: bool = False) -> Tensor:
        dtype = next(self.layers.parameters()).dtype
        check_inputs(x, self.input_dim, dtype)
        z = x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        for index, linear in enumerate(self.layers[:-1]):
            z = self.activate(index, linear(z), z)
        logits = self.layers[-1](z)
        if targets is None:
            if track_activations:
                raise ValueError("track_activations=True needs targets: call model(x, y, track_activations=True)")
            return logits
        check_targets(self.loss, logits, targets, dtype, values=track_activations)
        loss = loss_value(self.loss, logits, targets)
        if track_activations:
            if loss.device.type == "mps":
                raise ValueError("the solve needs float64 and mps has none: move the model and the batch to the CPU")
            self._track(x, targets, loss)
        return loss

    def _linears(self) -> list[nn.Linear]:
        """The layers, checked to be all of the model: what the closed forms describe."""
        check_linears(self.layers, self.parameters())
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]


# ---------------------------------------------------------------------------------------- per-layer derivatives

Model = DeepMLPWithTracking | TrackedNetwork


def compute_layer_derivatives(model: Model) -> tuple[LayerDerivatives, ...] | tuple[Operation, ...]:
    """Derivatives of each layer at the batch last tracked, first layer first; the notation is the module's.

    One forward and one backward pass in float64 from the present parameters, by closed forms. Cost: O(N P).
    Raises ValueError where nothing was tracked, or the loss is not the tracked one.
    Of a TrackedNetwork: its operations in order, each with `pull_back`, `push_forward` and `add_curvature`.
    """
    if isinstance(model, TrackedNetwork):
        return operations_of(model)
    check_model(model, DeepMLPWithTracking)
    return _derivatives_of(model, as_one_batch(model._tracked))


@torch.no_grad()
def _derivatives_of(model: DeepMLPWithTracking, tracked: TrackedBatch[Tensor]) -> tuple[LayerDerivatives, ...]:
    """`compute_layer_derivatives` of one batch."""
    check_overrides(type(model), DeepMLPWithTracking, "activate", "activation_derivatives")
    linears = model._linears()
    # forward: z̃, h
    z = tracked.inputs.to(linears[0].weight.device, torch.float64)
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
    targets = tracked.targets.to(z.device, torch.float64 if tracked.targets.is_floating_point() else None)
    check_loss(tracked, loss_value(model.loss, h, targets))
    adjoint, output = loss_derivatives(model.loss, h, targets)
    # backward: β_{ℓ-1} = λ_ℓ W_ℓ + σ_ℓ β_ℓ
    layers = [LayerDerivatives(weights[-1], inputs[-1], torch.ones_like(h), torch.zeros_like(h), adjoint, 0.0, output)]
    beta = adjoint @ weights[-1]
    derivatives = _activation_derivatives(model, pre_activations[:-1])
    for index, (first, second) in reversed(list(enumerate(derivatives))):
        W, z = weights[index], inputs[index]
        layer = LayerDerivatives(W, z, first, beta * second, beta * first, model.skips[index], None)
        beta = with_skip(layer.skip, layer.adjoint @ layer.weight, beta)
        layers.append(layer)
    return tuple(reversed(layers))


def _activation_derivatives(model: DeepMLPWithTracking, h: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """φ′ and φ″ of each hidden layer; where one φ serves them all, those of one shape at once."""
    if getattr(model.activation_derivatives, "__func__", None) is not DeepMLPWithTracking.activation_derivatives:
        return [model.activation_derivatives(index, x) for index, x in enumerate(h)]
    found: list[tuple[Tensor, Tensor]] = []
    for _, group in groupby(h, key=lambda x: x.shape):
        found += zip(*model.activation_derivatives(0, torch.stack(list(group))), strict=True)
    return found


def _checked_derivatives(model: DeepMLPWithTracking, loss: Tensor) -> tuple[LayerDerivatives, ...]:
    """The derivatives, after every check that `loss` is the tracked one and still that of the parameters."""
    check_model(model, DeepMLPWithTracking)
    parameters = list(model.parameters())
    check_tracked(model._tracked, loss, parameters)
    check_trainable(parameters)
    return _derivatives_of(model, as_one_batch(model._tracked))


# ---------------------------------------------------------------------------------------------------- products


def _product(layers: Sequence[LayerDerivatives], v: Tensor) -> Tensor:
    """H v for v (P, k): the forward tangent, then the derivative of the backward pass along it.

    δλ_L = Λ s_L,  δβ_{ℓ-1} = δλ_ℓ W + λ X[:, :-1] + σ δβ_ℓ,  δλ_ℓ = φ′ δβ_ℓ + β φ″ s_ℓ
    (H X)_ℓ = δλᵀ z̃ + λᵀ [t_{ℓ-1}, 0]
    """
    X = blocks_of(layers, v)
    tangents = list(forward_tangent(layers, X))
    products, delta_beta = [], layers[-1].adjoint  # not used in the output layer
    for layer, block, (s, t) in zip(reversed(layers), reversed(X), reversed(tangents), strict=True):
        width = layer.weight.shape[1]
        if layer.output is not None:
            delta_lambda = layer.output.apply(s)
        else:
            delta_lambda = layer.slope * delta_beta + layer.curvature * s
        product = delta_lambda.mT @ layer.inputs
        if t is not None:
            product[:, :, :width] += layer.adjoint.mT @ t
            back = delta_lambda @ layer.weight + layer.adjoint @ block[:, :, :width]
            delta_beta = with_skip(layer.skip, back, delta_beta)
        products.append(product)
    return flatten_blocks(layers, products[::-1])


def _dense_hessian(layers: Sequence[LayerDerivatives]) -> Tensor:
    return dense_hessian(layers, partial(_product, layers))


def hessian_vector_product(
    model: Model,
    loss: Tensor,
    v: Tensor,
    *,
    curvature: str = "hessian",
    state_damping: float = 0.0,
) -> Tensor:
    """H v, exactly, for v of shape (P,) or (P, k), in the order of `model.parameters()`.

    Computed in float64, whatever the model's dtype, and returned in v's dtype. Cost: two passes through the network per
    column. loss: the tensor that the model tracked last. curvature, state_damping: multiply by another matrix in place
    of H, as in `factorize_hessian`. Raises ValueError or TypeError for a loss or a v that doesn't fit.
    """
    system = _system(model, loss, curvature, state_damping)
    columns = checked_vector(v, system.num_parameters, system.device)
    return system.product(columns).reshape(v.shape).to(v.dtype)


# ------------------------------------------------------------------------------------------ factor and solve


def _factor(
    layers: tuple[LayerDerivatives, ...], settings: Settings, formed: object, definite_only: bool
) -> tuple[Factor, object]:
    """The factor by settings.route, and what no damping changes; see `Solver`."""
    epsilons = settings.epsilons(len(layers))
    rounded = tuple(x.in_float32() for x in layers) if settings.precision == "mixed" else layers
    if settings.route == "dense":
        H = formed if isinstance(formed, Tensor) else _dense_hessian(layers)
        dampings = damping_vector(layers, epsilons)
        return factor_dense(H.to(rounded[0].weight.dtype, copy=True), dampings, settings.damping, definite_only), H
    if settings.route == "gram":
        jacobian = formed if isinstance(formed, ScaledJacobian) else ScaledJacobian.of_chain(rounded)
        return GramFactor(jacobian, epsilons), jacobian
    many_classes = prefers_many_classes(shapes_of_layers(layers), len(layers[0].inputs))
    program = formed if isinstance(formed, ChainProgram) else chain_program(rounded, many_classes)
    by_value = {x.own: epsilon for x, epsilon in zip(program.operations, epsilons, strict=True)}
    starts = even_starts(len(layers)) if settings.checkpoint_layers and settings.keep == "solve" else ()
    return Sweep(program, by_value, definite_only=definite_only, keep=settings.keep, starts=starts), program


_SOLVER = Solver(_product, _dense_hessian, _factor)


def _system(model: Model, loss: Tensor, curvature: str = "hessian", state_damping: float = 0.0) -> System:
    """The matrix that is asked for, at the tracked loss."""
    curvature, state_damping = checked_curvature(curvature), checked_nonnegative("state_damping", state_damping)
    if isinstance(model, TrackedNetwork):
        return network_system(model, loss, curvature, state_damping)
    check_model(model, DeepMLPWithTracking)
    tracked = check_tracked(model._tracked, loss, list(model.parameters()))
    check_trainable(model.parameters())

    def chain(batch: TrackedBatch[Tensor]) -> Chain:
        return Chain(_SOLVER, with_curvature(_derivatives_of(model, batch), curvature, state_damping))

    return DataSet(tracked, lambda x: chain(as_rows(x))) if isinstance(tracked, TrackedDataSet) else chain(tracked)


@torch.no_grad()
def factorize_hessian(
    model: Model,
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

    damping: ε, in units of loss / parameter². It may be negative: `.num_negative_eigenvalues` counts the eigenvalues of
        H below −ε. Or one number per layer, first layer first (of a TrackedNetwork: per parameter tensor).
    curvature: 'hessian', or 'gauss_newton' for its positive semidefinite part JᵀΛJ, J the Jacobian of the outputs.
    route: 'sweep' (elimination), 'dense' (H is formed and factored; cheaper where P is below N × width),
        'gram' (Gauss–Newton by the matrix of N·C scaled outputs; cheaper where that is small; the loss must be convex
        in the outputs), or 'auto' for the one with the fewest counted operations. `.route` is the choice.
    state_damping: μ ≥ 0, in units of loss / pre-activation². Adds (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ to the matrix, S_ℓ x the
        first-order change of hidden layer ℓ's pre-activations (N, a). It adds no computation. H + damping·I stands for
        this matrix below.
    precision: 'mixed' factors in float32, in half of the memory, and faster where N × width is large. Solves are
        refined in float64 to the same certificate. A trial solve decides whether the float32 factor will do; else it
        is made anew in float64, as `.precision` says. Eigenvalues within 1e-5 ‖H‖ of −ε may be miscounted by it.
    keep: 'inertia' keeps nothing, for the counts alone; a sweep then takes the memory of one layer. 'disk' keeps the
        factor of a TrackedNetwork in temporary files, which every direct solve reads twice.
    checkpoint_layers: keep every √L-th cost-to-go only: O(√L (N a)²) memory. A direct solve then costs two
        factorizations, and so does each refinement step.

    Cost: Σ m³/3 + m²n′ + m n′² operations, m = a·min(N, d), n′ = N a′, and products of lower order; Σ m² + m n′ numbers
    are kept. `estimate_cost` gives the counts before.
    Raises ValueError or TypeError for a loss or an argument that doesn't fit, SingularHessianError for an exactly
    singular pivot, MemoryError where the estimate exceeds the device's free memory.

    Not checked here: whether an eigenvalue of H lies within rounding of −ε, where it may be counted on the wrong side.
    As a rule that is 1e-15 ‖H‖ √P; with huge or collinear inputs 1e-9 ‖H‖ was seen. `.inertia_is_certified` tells.
    """
    check_choices(route=route, precision=precision, keep=keep)
    system = _system(model, loss, curvature, state_damping)
    settings = Settings(
        checked_damping(damping, system.num_dampings),
        curvature,
        route,
        float(state_damping),
        precision,
        keep,
        checkpoint_layers,
    )
    check_combination(route, curvature, settings.state_damping, settings.damping, checkpoint_layers)
    return factorize_system(system, settings)


@torch.no_grad()
def hessian_inverse_vector_product(
    model: Model,
    loss: Tensor,
    v: Tensor,
    damping: float | Sequence[float] = 0.0,
    *,
    rtol: float = 1e-8,
) -> Tensor:
    """x with (H + damping·I) x = v to a relative residual of `rtol`: factor and solve. Arguments as there; x as v.

    damping = 0 gives the minimum-norm x with H x = v. H is singular for cross-entropy: such an x exists only for a v in
    the range of H, as a gradient is (a float32 gradient only to its rounding, 6e-8: use model.double(), or rtol=1e-6).
    Solved by a factorization at a small shift, refined on H itself. SingularHessianError where v is not in the
    range, or where the residual can't be reached in float64; the message names a damping that works.
    """
    system = _system(model, loss)
    damping, rtol = checked_damping(damping, system.num_dampings), checked_rtol(rtol)
    if damping != 0 and any(damping if isinstance(damping, tuple) else (damping,)):
        return factorize_system(system, Settings(damping)).solve(v, rtol=rtol)
    columns = checked_vector(v, system.num_parameters, system.device)
    factor_shifted = cache(lambda shift: factorize_system(system, Settings(shift)))

    def solve(rtol: float) -> MinimumNorm:
        return minimum_norm(system.product, factor_shifted, columns, rtol)

    found = solve(rtol)
    if not bool((found.residual <= rtol).all()):
        message = undamped_failure(found, columns, rtol, v.dtype, solve)
        raise SingularHessianError(message, damping=0.0, residual=float(found.residual.max()))
    return found.x.reshape(v.shape).to(v.dtype)


def estimate_cost(
    model: Model,
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
    Of a TrackedNetwork the samples last tracked are taken, repeated if they are fewer, and derivatives computed.
    """
    check_choices(precision=precision, keep=keep)
    settings = Settings(
        curvature=checked_curvature(curvature), precision=precision, keep=keep, checkpoint_layers=checkpoint_layers
    )
    if isinstance(model, TrackedNetwork):
        return resized(model, checked_batch_size(batch_size), curvature).costs(settings)
    check_model(model, DeepMLPWithTracking)
    shapes = shapes_of_linears(model._linears(), model.skips, zero_sum=model.loss == "cross_entropy")
    return dict(route_costs(shapes, checked_batch_size(batch_size), settings))
