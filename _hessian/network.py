"""`TrackedNetwork`: any module that torch.fx can trace, and the system of its Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.argument_checks import (
    as_one_batch,
    check_class_targets,
    check_grad_mode,
    check_loss,
    check_network_call,
    check_outputs,
    check_same_shape,
    check_tracked,
    note_of_call,
)
from _hessian.costs import RouteCost, factor_operations, free_bytes
from _hessian.data_sets import DataSet, TracksLosses
from _hessian.dense import check_product, dense_matrix, factor_dense
from _hessian.elimination import Sweep
from _hessian.factorization import Factor
from _hessian.general_operation import ClosedForms, check_closed_forms
from _hessian.gram import GramFactor, ScaledJacobian
from _hessian.graph import Builder
from _hessian.graph_costs import checkpoint_starts, step_costs, sweep_cost
from _hessian.graph_gram import (
    NetworkGramSystem,
    convex_root,
    gram_cost,
    network_output,
    scaled_jacobian,
    state_scales,
)
from _hessian.graph_tangents import TANGENT_BYTES, gauss_newton_and_state_matrix, tangent_cost
from _hessian.layers import Damping, NotPositiveDefinite, TrackedBatch, TrackedDataSet
from _hessian.losses import accurate_loss
from _hessian.operations import Operation
from _hessian.program import GraphProgram, Products, StateProducts, make_program
from _hessian.settings import Settings, dampings
from _hessian.tables import html_table
from _hessian.trace import Traced, check_modules, trace

FEW_PARAMETERS = 500  # up to here the dense route took a third to 1.3 times as long: Python's time is not counted
NAMED_LOSSES = ("cross_entropy", "mse", "binary_cross_entropy")
_ELEMENTWISE_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
LossFunction = Callable[[Tensor, Tensor], Tensor]


class TrackedNetwork(TracksLosses):
    """A network of your own that remembers the batch of its last tracked loss, for the solve.

    net: any module that torch.fx can trace and whose samples don't mix, in eval mode. Its parameters are shared, not
    copied; those with requires_grad=False are constants, and H is that of the others. It takes x (N, …), or a tuple x
    of such tensors, and returns one tensor (N, …).

    loss: of outputs and targets. One of
    - 'cross_entropy', 'mse', 'binary_cross_entropy' (on logits): means over all elements;
    - a loss module of torch with reduction 'mean' or 'sum';
    - a function (outputs, targets) ↦ (N,) losses, of which the mean is taken.
    class_dim: 1 or −1, where the classes of a 'cross_entropy' are, if the targets' shape doesn't tell.
    closed_forms: your own derivatives (`OperationDerivatives`) by the kind of module, which has no parameters.

    `model(x)` is `net(x)`; `model(x, y)` the loss; `model(x, y, track_activations=True)` the same loss, tracked.
    """

    _accurate = False  # whether a tiny cross-entropy and its derivatives keep their digits

    def __init__(
        self,
        net: nn.Module,
        loss: str | LossFunction = "cross_entropy",
        *,
        class_dim: int | None = None,
        closed_forms: ClosedForms | None = None,
    ):
        super().__init__()
        if not isinstance(net, nn.Module) or isinstance(net, TracksLosses):
            raise TypeError(f"net must be a torch.nn.Module, none of this library's, got {type(net).__name__}")
        if loss not in NAMED_LOSSES and (not callable(loss) or isinstance(loss, type)):
            raise ValueError(
                f"unknown loss {loss!r}: choose {', '.join(map(repr, NAMED_LOSSES))}, or pass a function or a loss "
                "module, such as nn.CrossEntropyLoss()"
            )
        if getattr(loss, "reduction", "mean") == "none":
            raise ValueError("a loss module needs reduction='mean' or 'sum', got 'none'")
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim must be 1 or -1, got {class_dim!r}")
        check_closed_forms(closed_forms or {})
        self.net, self.loss, self.class_dim, self.closed_forms = net, loss, class_dim, dict(closed_forms or {})
        self._tracked: TrackedBatch[tuple[Tensor, ...]] | TrackedDataSet | None = None

    def forward(self, x: Tensor | tuple[Tensor, ...], targets: Tensor | None = None, track_activations: bool = False):
        inputs = x if isinstance(x, tuple) else (x,)
        if track_activations:
            check_grad_mode()
            check_modules(self.net)
        if targets is None and track_activations:
            raise ValueError("track_activations=True needs targets: call model(x, y, track_activations=True)")
        if targets is not None:
            check_network_call(inputs, targets)
        try:
            outputs = self.net(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            error.add_note(note_of_call(inputs, self.parameters()))
            raise
        if targets is None:
            return outputs
        check_outputs(inputs, outputs, targets)
        self._check_targets(outputs, targets, track_activations)
        loss = self.loss_value(outputs, targets)
        if track_activations:
            if loss.dim() != 0:
                raise ValueError(f"the loss must be one number, got shape {tuple(loss.shape)}")
            self._track(inputs, targets, loss)
        return loss

    def _check_targets(self, outputs: Tensor, targets: Tensor, values: bool) -> None:
        """Shape and dtype of targets, as far as the loss is known; where `values`, class indices too."""
        if self.loss in ("mse", "binary_cross_entropy") or isinstance(self.loss, _ELEMENTWISE_LOSSES):
            check_same_shape(self.loss if isinstance(self.loss, str) else type(self.loss).__name__, outputs, targets)
        elif self.loss == "cross_entropy" or isinstance(self.loss, nn.CrossEntropyLoss):
            if outputs.dim() < 2:
                raise ValueError(
                    f"a cross-entropy needs outputs (N, C) or (N, …, C), got {tuple(outputs.shape)}: return the logits "
                    "of the C classes, or take loss='binary_cross_entropy' for one logit"
                )
            class_dim = self._class_dim(outputs, targets) if isinstance(self.loss, str) else 1
            check_class_targets(outputs, targets, class_dim, getattr(self.loss, "ignore_index", -100), values)

    def loss_value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss ()."""
        if self.loss == "mse":
            return F.mse_loss(outputs, targets)
        if self.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(outputs, targets)
        if self.loss == "cross_entropy":
            logits = outputs.movedim(self._class_dim(outputs, targets), -1)
            if (
                self._accurate
                and not targets.is_floating_point()
                and logits.shape[-1] > 1
                and bool((targets >= 0).all())
            ):
                return accurate_loss("cross_entropy", logits.flatten(0, -2)[None], targets.flatten())[0]
            return F.cross_entropy(logits.movedim(-1, 1), targets)
        if isinstance(self.loss, nn.Module):
            return self.loss(outputs, targets)
        assert not isinstance(self.loss, str)
        losses = self.loss(outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise ValueError(
                f"a loss function must return one loss a sample, ({len(outputs)},), got {tuple(losses.shape)}: take "
                "reduction='none', or for one number a loss by name or a loss module"
            )
        return losses.mean()

    def _class_dim(self, outputs: Tensor, targets: Tensor) -> int:
        """Where the classes are: the dimension of the outputs that the targets lack."""
        if self.class_dim is not None or targets.is_floating_point() or outputs.dim() == 2:
            return self.class_dim or 1
        fitting = [d for d in (1, -1) if outputs.select(d, 0).shape == targets.shape]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} may have their classes in dimension 1 or in the last one: "
                "pass TrackedNetwork(net, loss, class_dim=1) or class_dim=-1"
            )
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} don't fit outputs of shape {tuple(outputs.shape)}: they must "
            "have all of its dimensions but that of the classes"
        )

    def __repr__(self) -> str:
        """In one line; `print(model.net)` shows the layers."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        frozen = sum(size for size, trainable in sizes if not trainable)
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)
        return (
            f"TrackedNetwork({type(self.net).__name__}, P={sum(size for size, trainable in sizes if trainable)}"
            f"{f', frozen={frozen}' if frozen else ''}, loss={loss!r}, tracked={self._tracked is not None})"
        )

    def _repr_html_(self) -> str:
        """The trainable parameter tensors, in the order of H."""
        rows = [(name, tuple(p.shape), f"{p.numel():,}") for name, p in self.named_parameters() if p.requires_grad]
        return f"<p>{escape(repr(self))}</p>" + html_table(("parameter", "shape", "entries"), rows)


@dataclass
class _Kept:
    """What is made when it is first asked for."""

    programs: dict[bool, GraphProgram] = field(default_factory=dict)  # by `separate_biases`
    builder: Builder | None = None
    products: Products | None = None
    states: StateProducts | None = None
    matrices: tuple[Tensor, Tensor] | None = None  # H and Σ SᵀS/N, where they are needed for many μ
    root: Tensor | None = None  # (N, C, K) S with Λ_b = S_b S_bᵀ
    jacobian: ScaledJacobian | None = None  # Sᵀ times the outputs' Jacobian, where it is needed for many λ


class Network(NamedTuple):
    """The system of a tracked network: H or JᵀΛJ, plus (μ/N) Σ SᵀS over its affine operations but the last."""

    net: nn.Module  # a float64 copy
    traced: Traced
    inputs: tuple[Tensor, ...]
    parameters: Mapping[str, int]
    loss: Callable[[Tensor], Tensor]
    gauss_newton: bool
    state_damping: float
    closed_forms: ClosedForms
    kept: _Kept

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def num_dampings(self) -> int:
        return len(self.parameters)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def program(self) -> GraphProgram:
        return self._make_program(False)

    def _make_program(self, separate_biases: bool) -> GraphProgram:
        if separate_biases not in self.kept.programs:
            program, self.kept.builder = make_program(
                self.traced,
                self.inputs,
                self.parameters,
                self.loss,
                self.gauss_newton,
                separate_biases,
                self.closed_forms,
            )
            self.kept.programs[separate_biases] = program
        return self.kept.programs[separate_biases]._replace(state_damping=self.state_damping / len(self.inputs[0]))

    def _products(self) -> Products:
        if self.kept.products is None:
            self.kept.products = Products(self.net, self.inputs, self.loss, self.gauss_newton)
        return self.kept.products

    def product(self, v: Tensor) -> Tensor:
        product = self._products()(v)
        return product + self.state_damping * self.state_product(v) if self.state_damping else product

    def state_product(self, v: Tensor) -> Tensor:
        """Σ SᵀS v/N for v (P, k), S v the change of the outputs of the affine operations but the last."""
        program = self.program
        if self.kept.states is None and self.kept.builder is not None:
            self.kept.states = StateProducts(self.kept.builder, program)
        assert self.kept.states is not None
        return self.kept.states(v) / len(self.inputs[0])

    def dense(self) -> Tensor:
        """H (P, P), with (μ/N) Σ SᵀS."""
        if not self.state_damping:
            matrices = self._by_tangents() if self.gauss_newton else None
            return self._by_products() if matrices is None else matrices[0]
        if self.kept.matrices is None:
            plain, matrices = self._replace(state_damping=0.0), self._by_tangents()
            states = self._by_columns(self.state_product, 64) if matrices is None else matrices[1]
            H = plain._by_products() if matrices is None or not self.gauss_newton else matrices[0]
            self.kept.matrices = H, states
        H, states = self.kept.matrices
        return torch.add(H, states, alpha=self.state_damping)

    def _by_tangents(self) -> tuple[Tensor, Tensor] | None:
        """JᵀΛJ and Σ SᵀS/N, each checked by a product. None where memory is short or torch is wrong."""
        try:
            if not self._has_tangents:
                return None
            G, states = gauss_newton_and_state_matrix(self.program, self.state_damping != 0)
            states /= len(self.inputs[0])
            if self.gauss_newton:
                check_product(G, self._products())
            if self.state_damping:
                check_product(states, self.state_product)
            return G, states
        except (ArithmeticError, RuntimeError):
            return None

    def _by_products(self) -> Tensor:
        """With few samples, columns are made together under vmap, as long as H is then that of a product."""
        columns = 512 // len(self.inputs[0])  # more samples fill the processor by themselves
        if columns > 1:
            products = self._products()
            try:
                return self._by_columns(lambda v: products.together(v) if v.shape[1] > 1 else products(v), columns)
            except (ArithmeticError, RuntimeError):  # torch's vmap has a wrong derivative, or none
                pass
        return self._by_columns(self.product, 64)

    def _by_columns(self, product: Callable[[Tensor], Tensor], columns: int) -> Tensor:
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        return dense_matrix(product, like, self.num_parameters, columns)

    def damping_vector(self, damping: Damping) -> Tensor:
        sizes = torch.tensor(list(self.parameters.values()), device=self.device)
        values = torch.tensor(dampings(damping, len(sizes)), dtype=torch.float64, device=self.device)
        return values.repeat_interleave(sizes)[:, None]

    def costs(self, settings: Settings) -> dict[str, RouteCost]:
        """Operations and bytes of each route, from the sizes of the operations."""
        P, tangents = self.num_parameters, tangent_cost(self.program, self.state_damping != 0)
        products = 12 * P * sum(x.pull_back_cost for x in self.program.operations)
        if self._has_tangents:
            forming = tangents.operations + (0 if self.gauss_newton else products)
        else:
            forming = products * (1 + len(self.program.operations) if self.state_damping else 1)
        costs = {
            "sweep": sweep_cost(self.program, settings),
            "dense": RouteCost(forming + factor_operations(P), 2 * P * P, self._dense_bytes()),
        }
        gram = self._gram_cost()
        return costs if gram is None else costs | {"gram": gram}

    def _root(self) -> Tensor | None:
        """S (N, C, K) with Λ_b = S_b S_bᵀ; None where the loss is not convex in the outputs."""
        if self.kept.root is None:
            self.kept.root = convex_root(self.program.loss_hessian)
        return self.kept.root

    def gram_system(
        self, metric: str, metric_damping: float, weight_decay: float, rest: Tensor | None, without_residual: bool
    ) -> NetworkGramSystem:
        """As `GramSystem`. After `choose_route`."""
        root, builder = self._root(), self.kept.builder
        assert root is not None and builder is not None, "checked with the route"
        if self.kept.jacobian is None:
            self.kept.jacobian = scaled_jacobian(self.program, root)
        scales = state_scales(self.program) if metric == "state" else [0.0] * len(self.parameters)
        adjoint = torch.func.grad(self.loss)(builder.outputs).view(len(root), -1)
        output = network_output(root, adjoint)
        return NetworkGramSystem(
            self.kept.jacobian, scales, output, metric, metric_damping, weight_decay, rest, without_residual
        )

    def _gram_cost(self) -> RouteCost | None:
        """None where the matrix has no such route."""
        root = self._root() if self.gauss_newton and not self.state_damping else None
        return None if root is None else gram_cost(self.program, root.shape[2])

    @property
    def _has_tangents(self) -> bool:
        """Whether a part of the dense matrix is formed by tangents: it has such a part, and the memory suffices."""
        needed = self.gauss_newton or self.state_damping != 0
        return needed and tangent_cost(self.program, False).bytes <= TANGENT_BYTES

    def _dense_bytes(self) -> float:
        matrices = 5 if self.state_damping else 3  # H, Σ SᵀS, their sum, its factor, and temporaries
        tangents = tangent_cost(self.program, False).bytes if self._has_tangents else 0
        return 8 * matrices * self.num_parameters**2 + tangents

    def choose_route(self, settings: Settings, *, formed: bool, may_mix: bool) -> str:
        route = settings.route
        if settings.keep == "disk" and route in ("dense", "gram"):
            raise ValueError("keep='disk' is for route='sweep': leave one of them out")
        if settings.keep == "disk" and self.device.type != "cpu":
            raise ValueError("keep='disk' is for the CPU: choose keep='solve' or checkpoint_layers=True")
        if route == "gram" and self._gram_cost() is None:
            raise ValueError("route='gram' needs a loss that is convex in the outputs: choose another route")
        if settings.checkpoint_layers or settings.keep == "disk":
            route = "sweep"
        elif route == "auto" and self.num_parameters <= FEW_PARAMETERS:
            route = "dense"
        elif route == "auto":
            costs = self.costs(settings)
            if not all(settings.epsilons(1)):
                costs.pop("gram", None)  # it divides by ε
            # large products: 4 to 13 times as many operations a second as in a sweep
            rates = {"sweep": 1.0, "dense": 6.0 if self.gauss_newton and self._has_tangents else 1.0, "gram": 6.0}
            route = min(costs, key=lambda name: costs[name].operations / rates[name])
        needed = self._bytes(route, settings) / (2 if formed and route != "sweep" else 1)
        free = free_bytes(self.device)
        if needed > free:
            raise MemoryError(
                f"the factorization by route={route!r} needs {needed / 1e9:.3g} GB, and {self.device} has "
                f"{free / 1e9:.3g} GB free. {self._what_fits(settings, route, free)}"
            )
        return route

    def _bytes(self, route: str, settings: Settings) -> float:
        if route == "dense":  # which needs no operations, whose derivatives may be wrong
            return self._dense_bytes()
        gram = self._gram_cost() if route == "gram" else None
        return sweep_cost(self.program, settings).bytes if gram is None else gram.bytes

    def _what_fits(self, settings: Settings, route: str, free: float) -> str:
        """The other options that need less memory than is free."""
        changes: dict[str, Settings] = {
            "route='sweep'": settings._replace(route="sweep"),
            "precision='mixed'": settings._replace(precision="mixed"),
            "checkpoint_layers=True": settings._replace(checkpoint_layers=True),
            "checkpoint_layers=True, precision='mixed'": settings._replace(checkpoint_layers=True, precision="mixed"),
            "keep='disk'": settings._replace(keep="disk", checkpoint_layers=False),
            "keep='inertia', for the counts alone": settings._replace(keep="inertia", checkpoint_layers=False),
        }
        fits = [
            name for name, new in changes.items() if new != settings and sweep_cost(self.program, new).bytes <= free
        ]
        others = [name for name in self.costs(settings) if name not in ("sweep", route)]
        fits += [f"route={name!r}" for name in others if self._bytes(name, settings) <= free]
        return f"What fits: {'; '.join(fits)}" if fits else "Use fewer samples, or freeze parameters"

    def factor(self, settings: Settings, formed: object, definite_only: bool) -> tuple[Factor, object]:
        if settings.route == "dense":
            H = formed if isinstance(formed, Tensor) else self.dense()
            vector = self.damping_vector(settings.damping)
            return factor_dense(H.clone(), vector, settings.damping, definite_only), H
        if settings.route == "gram":
            return self._gram_factor(settings, formed, definite_only)
        by_name = dict(zip(self.parameters, settings.epsilons(len(self.parameters)), strict=True))
        separate = any(len({by_name[name] for name in x.parameters}) > 1 for x in self.program.affine)
        program = self._make_program(separate)
        epsilons = {value: by_name[names[0]] for value, names in program.values().items()}
        starts = checkpoint_starts(program) if settings.checkpoint_layers and settings.keep == "solve" else ()
        if settings.precision == "mixed":
            program = program.in_float32()
        return Sweep(program, epsilons, definite_only=definite_only, keep=settings.keep, starts=starts), None

    def _gram_factor(
        self, settings: Settings, formed: object, definite_only: bool
    ) -> tuple[GramFactor, ScaledJacobian]:
        root, program = self._root(), self.program
        assert root is not None, "checked with the route"
        if settings.precision == "mixed":
            root, program = root.float(), program.in_float32()
        jacobian = formed if isinstance(formed, ScaledJacobian) else scaled_jacobian(program, root)
        factor = GramFactor(jacobian, settings.epsilons(len(self.parameters)))
        if definite_only and factor.num_negative:
            raise NotPositiveDefinite(0)
        return factor, jacobian

    def share_done(self, index: int) -> float:
        operations = [step.operations for step in step_costs(self.program)]  # last operation first
        return sum(operations[: len(operations) - index]) / sum(operations)


class NetworkAtBatch(NamedTuple):
    """A float64 copy of a network, traced at one batch."""

    copied: TrackedNetwork
    traced: Traced
    batch: TrackedBatch[tuple[Tensor, ...]]
    scale: float = 1.0  # of the loss

    def of_samples(self, index: Tensor) -> NetworkAtBatch:
        """The same network at some samples of the batch, (k,) indices. A loss that is a sum is scaled by N/k."""
        inputs = tuple(x[index] for x in self.batch.inputs)
        batch = self.batch._replace(inputs=inputs, targets=self.batch.targets[index])
        is_sum = getattr(self.copied.loss, "reduction", "mean") == "sum"
        return self._replace(batch=batch, scale=len(self.batch.inputs[0]) / len(index) if is_sum else 1.0)

    def system(self, curvature: str, state_damping: float = 0.0) -> Network:
        parameters = {name: p.numel() for name, p in self.copied.net.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("all parameters are frozen (requires_grad=False): H is that of those which are not")
        return Network(
            self.copied.net,
            self.traced,
            self.batch.inputs,
            parameters,
            lambda outputs: self.scale * self.copied.loss_value(outputs, self.batch.targets),
            curvature == "gauss_newton",
            state_damping,
            self.copied.closed_forms,
            _Kept(),
        )


def network_at_batch(model: TrackedNetwork, loss: Tensor) -> NetworkAtBatch:
    """Of a tracked loss of one batch, after every check that it is that of the parameters."""
    tracked = check_tracked(model._tracked, loss, list(model.parameters()))
    return _checked_at_batch(_in_float64(model), as_one_batch(tracked), loss.device)


def network_system(model: TrackedNetwork, loss: Tensor, curvature: str, state_damping: float) -> Network | DataSet:
    """The system at the tracked loss, after every check that it is that of the parameters."""
    tracked = check_tracked(model._tracked, loss, list(model.parameters()))
    copied = _in_float64(model)
    traces: dict[tuple[torch.Size, ...], Traced] = {}  # one serves all batches whose samples have the same shapes

    def network(batch: TrackedBatch[tuple[Tensor, ...]]) -> Network:
        shapes = tuple(x.shape[1:] for x in batch.inputs)
        at_batch = _checked_at_batch(copied, batch, loss.device, traces.get(shapes))
        traces[shapes] = at_batch.traced
        return at_batch.system(curvature, state_damping)

    return DataSet(tracked, network) if isinstance(tracked, TrackedDataSet) else network(tracked)


def _checked_at_batch(
    copied: TrackedNetwork,
    batch: TrackedBatch[tuple[Tensor, ...]],
    device: torch.device,
    traced: Traced | None = None,
) -> NetworkAtBatch:
    batch = _batch_in_float64(batch, device)
    check_loss(batch, copied(batch.inputs, batch.targets), "the network in float64")
    return NetworkAtBatch(copied, traced or _trace(copied, batch.inputs), batch)


def _trace(copied: TrackedNetwork, inputs: tuple[Tensor, ...]) -> Traced:
    return trace(copied.net, inputs, tuple(copied.closed_forms))


def resized(model: TrackedNetwork, batch_size: int, curvature: str) -> Network:
    """The system at so many samples of the batch last tracked, repeated if they are fewer."""
    if not isinstance(model._tracked, TrackedBatch):
        raise ValueError("the shape of a sample is not known: call model(x, y, track_activations=True) first")
    copied, tracked = _in_float64(model), model._tracked
    batch = _batch_in_float64(tracked, tracked.value.device)
    index = torch.arange(batch_size, device=batch.targets.device) % len(batch.inputs[0])
    return NetworkAtBatch(copied, _trace(copied, batch.inputs), batch).of_samples(index).system(curvature)


def operations_of(model: TrackedNetwork) -> tuple[Operation, ...]:
    """Those of the batch last tracked, with their derivatives."""
    tracked = model._tracked
    num_samples = len(tracked.inputs[0]) if isinstance(tracked, TrackedBatch) else 1
    return tuple(resized(model, num_samples, "hessian").program.operations)


def _in_float64(model: TrackedNetwork) -> TrackedNetwork:
    check_grad_mode()
    check_modules(model.net)
    loss = copy.deepcopy(model.loss).double() if isinstance(model.loss, nn.Module) else model.loss
    net = copy.deepcopy(model.net).double()
    copied = TrackedNetwork(net, loss, class_dim=model.class_dim, closed_forms=model.closed_forms)
    copied._accurate = True
    return copied


def _batch_in_float64(
    batch: TrackedBatch[tuple[Tensor, ...]], device: torch.device
) -> TrackedBatch[tuple[Tensor, ...]]:
    inputs, targets = (
        [x.to(device, torch.float64 if x.is_floating_point() else None) for x in part]
        for part in (batch.inputs, [batch.targets])
    )
    return batch._replace(inputs=tuple(inputs), targets=targets[0])
