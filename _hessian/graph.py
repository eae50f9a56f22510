"""A traced network at one batch as operations: values, regions of parameter-free nodes, and affine nodes.

A value is a tensor that depends on trainable parameters. An operation makes one value from others. Neighbouring
parameter-free nodes whose results nobody else uses become one operation, so that no intermediate is ever a state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from _hessian.argument_checks import check_used
from _hessian.trace import LEAVES, Recorder, Traced

_CONSTANTS = (int, float, torch.Size, torch.dtype, torch.device)  # no functions of a tensor's values


class Value(NamedTuple):
    """A tensor with a tangent: an activation, or a parameter that is not reduced (no batch dimension).

    Flattened sample by sample: n = N × (numbers a sample), or the parameter's own n.
    """

    name: str
    shape: torch.Size
    batch_dim: int | None
    num_samples: int  # 1 without a batch dimension

    @property
    def size(self) -> int:
        return self.shape.numel()

    def flatten(self, x: Tensor) -> Tensor:
        """(k, *shape) → (k, n)."""
        return x.flatten(1) if not self.batch_dim else x.movedim(self.batch_dim + 1, 1).flatten(1)

    def unflatten(self, x: Tensor) -> Tensor:
        """The inverse of `flatten`."""
        if not self.batch_dim:
            return x.unflatten(1, self.shape)
        d = self.batch_dim
        return x.unflatten(1, (self.shape[d], *self.shape[:d], *self.shape[d + 1 :])).movedim(1, d + 1)


class Region(NamedTuple):
    """An operation before its derivatives: its output as a function of its inputs, with all else constant."""

    output: Value
    inputs: tuple[Value, ...]
    run: Callable[..., Tensor]
    module: nn.Module | None = None  # whose kind has closed forms


class AffineNode(NamedTuple):
    """h = z Wᵀ + b, of nn.Linear, a convolution (z unfolded) or nn.Embedding (z one-hot)."""

    output: Value
    inputs: Value | None  # z; None where it has no tangent
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    reduced: tuple[str | None, str | None]  # names of the parameters W and b that are used here alone
    live: tuple[Value | None, Value | None]  # W and b where they are values; None where they have no tangent
    module: nn.Module


class Graph(NamedTuple):
    operations: list[Region | AffineNode]  # in the order of execution
    tensors: dict[Value, Tensor]
    parameters: dict[str, Tensor]  # trainable, in the order of the network's parameters
    output: Value


class _AffineArguments(NamedTuple):
    """Of an affine node. W and b as nodes, or as names of parameters."""

    inputs: fx.Node
    weight: str | fx.Node
    bias: str | fx.Node | None
    module: nn.Module  # Linear, Conv1d, Conv2d or Embedding; Identity for F.linear


def _node(x: object) -> fx.Node:
    assert isinstance(x, fx.Node)
    return x


def _tensor(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return x


class Builder:
    """Turns a traced graph at one batch into operations. trainable: names of the parameters with a tangent.
    closed_forms: kinds of modules that are an operation each."""

    def __init__(
        self,
        traced: Traced,
        inputs: Sequence[Tensor],
        trainable: Sequence[str],
        closed_forms: tuple[type[nn.Module], ...] = (),
    ):
        self.traced, self.inputs, self.N, self._closed_forms = traced.module, inputs, len(inputs[0]), closed_forms
        *nodes, output = traced.module.graph.nodes
        if not isinstance(output.args[0], fx.Node):
            raise ValueError("the network must return one tensor (N, …), got a tuple or dict of them")
        self.output = output.args[0]
        self.results, self.one_more = self._run(inputs), self._run([torch.cat([x, x[:1]]) for x in inputs])
        parameters = dict(traced.module.named_parameters(remove_duplicate=False))
        self.names = {name: traced.names[id(p)] for name, p in parameters.items()}
        by_name = {traced.names[id(p)]: p.detach() for p in parameters.values()}
        self.parameters = {name: by_name[name] for name in trainable if name in by_name}
        self.tangent: set[fx.Node] = set()
        for node in nodes:
            depends = any(name in self.parameters for name in self._brought_in(node))
            depends = depends or not self.tangent.isdisjoint(node.all_input_nodes)
            is_constant = node.target == "detach" or isinstance(self.results[node], _CONSTANTS)
            if depends and not is_constant:
                self.tangent.add(node)
        needed, todo = {self.output}, [self.output]
        while todo:
            found = (set(todo.pop().all_input_nodes) & self.tangent) - needed
            needed |= found
            todo += found
        self.tangent &= needed
        self.nodes = [node for node in nodes if node in self.tangent]
        used = {name for node in self.nodes for name in self._brought_in(node)}
        check_used([name for name in trainable if name not in used])
        self.values = {node: self._value(node) for node in self.nodes if self._is_value(node)}
        self._check()

    def _run(self, inputs: Sequence[Tensor]) -> dict[fx.Node, object]:
        recorder = Recorder(self.traced)
        with torch.no_grad():
            recorder.run(*inputs)
        return recorder.results

    def _brought_in(self, node: fx.Node) -> list[str]:
        """The parameters that the node itself brings in."""
        if node.op == "get_attr":
            return [self.names[str(node.target)]] if node.target in self.names else []
        if node.op != "call_module":
            return []
        module = self.traced.get_submodule(str(node.target))
        return [self.names[f"{node.target}.{name}"] for name, _ in module.named_parameters()]

    def _is_value(self, node: fx.Node) -> bool:
        """Tuples and integers that depend on parameters are no values: they are computed where they are used."""
        result = self.results[node]
        return node in self.tangent and isinstance(result, Tensor) and result.is_floating_point()

    def _value(self, node: fx.Node) -> Value:
        result, other = _tensor(self.results[node]), _tensor(self.one_more[node])
        if node.op == "get_attr":
            return Value(self.names[str(node.target)], result.shape, None, 1)
        grown = [d for d, (m, n) in enumerate(zip(result.shape, other.shape, strict=True)) if m != n]
        if len(grown) > 1:
            raise ValueError(f"{node.name} of shape {tuple(result.shape)} has the batch in more than one dimension")
        return Value(node.name, result.shape, grown[0] if grown else None, self.N if grown else 1)

    def _check(self) -> None:
        if self.output not in self.values or self.values[self.output].batch_dim != 0:
            raise ValueError("the network must return one tensor (N, …) that depends on trainable parameters")
        out, other = _tensor(self.results[self.output]), _tensor(self.one_more[self.output])
        if not torch.allclose(out, other[: len(out)], rtol=1e-9, atol=1e-9 * float(out.abs().max())):
            raise ValueError(
                "the output of a sample changes with the other samples of the batch: the solve needs samples that "
                "don't mix. Call .eval() if a layer averages over the batch"
            )

    # affine operations

    def _affine(self, node: fx.Node) -> _AffineArguments | None:
        """z, W and b of an affine node."""
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            if not isinstance(module, LEAVES):
                return None
            has_bias = getattr(module, "bias", None) is not None
            bias = f"{node.target}.bias" if has_bias else None
            return _AffineArguments(_node(node.args[0]), f"{node.target}.weight", bias, module)
        if node.target is not F.linear:
            return None
        weight, bias_node = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        arguments = [x for x in (weight, bias_node) if isinstance(x, fx.Node)]
        if any(x in self.values and self.values[x].batch_dim is not None for x in arguments):
            return None
        bias_argument = None if bias_node is None else _node(bias_node)
        return _AffineArguments(_node(node.args[0]), _node(weight), bias_argument, nn.Identity())

    def _parameter(self, item: str | fx.Node | None) -> str | None:
        """The name of the trainable parameter that W or b is, or None."""
        if isinstance(item, fx.Node):
            item = str(item.target) if item.op == "get_attr" else None
        name = None if item is None else self.names.get(item)
        return name if name in self.parameters else None

    def _argument(self, item: str | fx.Node) -> Tensor:
        return self.traced.get_parameter(item).detach() if isinstance(item, str) else _tensor(self.results[item])

    # regions

    def _users(self, node: fx.Node) -> set[fx.Node]:
        """The values that are computed from it directly."""
        found: set[fx.Node] = set()
        for user in node.users:
            if user in self.tangent:
                found |= {user} if user in self.values else self._users(user)
        return found

    def _sources(self, nodes: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The values that a set of nodes is computed from, and those of the other nodes that must be run for it."""
        inputs, helpers, todo = set(), set(), list(nodes)
        while todo:
            for x in todo.pop().all_input_nodes:
                if x in self.values and x not in nodes:
                    inputs.add(x)
                elif x in self.tangent and x not in nodes and x not in helpers:
                    helpers.add(x)
                    todo.append(x)
        return [x for x in self.nodes if x in inputs], [x for x in self.nodes if x in nodes | helpers]

    def region(self, last: fx.Node, nodes: set[fx.Node]) -> Region:
        sources, run = self._sources(nodes)
        inputs = tuple(dict.fromkeys(self.values[x] for x in sources))  # a parameter once, however often it is got

        def function(*tensors: Tensor) -> Tensor:
            given = dict(zip(inputs, tensors, strict=True))
            interpreter = fx.Interpreter(self.traced)
            interpreter.env = self.results | {x: given[self.values[x]] for x in sources}
            for node in run:
                interpreter.env[node] = interpreter.run_node(node)
            return _tensor(interpreter.env[last])

        return Region(self.values[last], inputs, function, self._closed_form(last))

    def _closed_form(self, node: fx.Node) -> nn.Module | None:
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, self._closed_forms) else None

    def build(self, separate_biases: bool = False) -> Graph:
        """separate_biases: a bias is not reduced together with its weight, so that it can have another damping."""
        affine = {node: found for node in self.values if (found := self._affine(node)) is not None}
        uses: dict[str, int] = dict.fromkeys(self.parameters, 0)
        for node in self.nodes:
            if node.op == "get_attr" and (name := self._parameter(node)) is not None:
                uses[name] += sum(2 for user in node.users if user in self.tangent and user not in affine)
        for arguments in affine.values():
            for item, count in ((arguments.weight, 1), (arguments.bias, 2 if separate_biases else 1)):
                if (name := self._parameter(item)) is not None:
                    uses[name] += count
        closed = {x: {x} for x in self.values if self._closed_form(x) is not None}
        plain = [x for x in self.values if x.op != "get_attr" and x not in affine and x not in closed]
        kinds = {node: kind_of(self.region(node, {node}), self._inputs({node})) for node in plain}
        groups = self._merged(plain, kinds) | closed
        operations: list[Region | AffineNode] = []
        for node in self.nodes:
            if node in affine:
                operations.append(self._affine_operation(node, affine[node], uses))
            elif node in groups:
                operations.append(self.region(node, groups[node]))
        tensors = {value: _tensor(self.results[node]) for node, value in self.values.items()}
        tensors |= {Value(name, p.shape, None, 1): p for name, p in self.parameters.items()}
        return Graph(operations, tensors, self.parameters, self.values[self.output])

    def _inputs(self, nodes: set[fx.Node]) -> list[Tensor]:
        sources, _ = self._sources(nodes)
        return list({self.values[x]: _tensor(self.results[x]) for x in sources}.values())

    def _merged(self, plain: Sequence[fx.Node], kinds: dict[fx.Node, str]) -> dict[fx.Node, set[fx.Node]]:
        """Regions by their last node. A node whose only user is in a region joins it, if both are of one kind, or one
        of them is general."""
        last: dict[fx.Node, fx.Node] = {}
        kind = dict(kinds)  # of the region that ends there
        for node in reversed(plain):
            ends = {last.get(user) for user in self._users(node)}
            (end,) = ends if len(ends) == 1 and node is not self.output else (None,)
            if end is not None and (kind[end] == kinds[node] or "general" in (kind[end], kinds[node])):
                last[node] = end
                kind[end] = "general" if kinds[node] == "general" else kind[end]
            else:
                last[node] = node
        groups: dict[fx.Node, set[fx.Node]] = {}
        for node, end in last.items():
            groups.setdefault(end, set()).add(node)
        return groups

    def _affine_operation(self, node: fx.Node, arguments: _AffineArguments, uses: Mapping[str, int]) -> AffineNode:
        reduced: list[str | None] = []
        live: list[Value | None] = []
        for item in (arguments.weight, arguments.bias):
            name = self._parameter(item)
            own = name is not None and uses[name] == 1
            reduced.append(name if own else None)
            value = self.values.get(item) if isinstance(item, fx.Node) else None
            if name is not None and not own:
                value = Value(name, self.parameters[name].shape, None, 1)
            live.append(None if own else value)
        z, bias = arguments.inputs, arguments.bias
        return AffineNode(
            self.values[node],
            self.values.get(z),
            _tensor(self.results[z]),
            self._argument(arguments.weight),
            None if bias is None else self._argument(bias),
            (reduced[0], reduced[1]),
            (live[0], live[1]),
            arguments.module,
        )

    def _results_with_graph(self) -> dict[fx.Node, Tensor]:
        recorder = Recorder(self.traced)
        with torch.enable_grad():
            recorder.run(*self.inputs)
        return {node: _tensor(recorder.results[node]) for node in self.values}

    def with_graph(self, values: Collection[Value]) -> list[Tensor]:
        """The tensors of these values in one autograd graph with the parameters of the traced network."""
        return [x for node, x in self._results_with_graph().items() if self.values[node] in values]

    @property
    def outputs(self) -> Tensor:
        """The network's."""
        return _tensor(self.results[self.output])

    def adjoints(self, loss: Callable[[Tensor], Tensor]) -> dict[Value, Tensor]:
        """β of every value: the derivative of the loss, of the outputs, in it."""
        results = self._results_with_graph()
        nodes = [x for x in self.values if results[x].requires_grad]
        with torch.enable_grad():
            total = loss(results[self.output])
        found = torch.autograd.grad(total, [results[x] for x in nodes], allow_unused=True)
        return {
            self.values[x]: torch.zeros_like(self.results[x]) if beta is None else beta
            for x, beta in zip(nodes, found, strict=True)
        }


def kind_of(region: Region, inputs: Sequence[Tensor]) -> str:
    """'elementwise', 'linear' (its second derivatives are zero here) or 'general', by two derivatives along random
    directions."""
    generator = torch.Generator().manual_seed(0)

    def random(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    shape = region.output.shape
    if all(_broadcasts(x.shape, shape) for x in inputs):
        expanded = [x.expand(shape).clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = region.run(*expanded)
            if out.shape == shape:
                weight = random(out)
                plain = torch.autograd.grad(out.sum(), expanded, retain_graph=True, allow_unused=True)
                weighted = torch.autograd.grad((weight * out).sum(), expanded, allow_unused=True)
                pairs = [(a, b) for a, b in zip(plain, weighted, strict=True) if a is not None and b is not None]
                if all(torch.allclose(b, weight * a, rtol=1e-9, atol=0) for a, b in pairs):
                    return "elementwise"
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = region.run(*leaves)
        first = torch.autograd.grad((random(out) * out).sum(), leaves, create_graph=True, allow_unused=True)
        along = sum(((random(x) * x).sum() for x in first if x is not None and x.requires_grad), out.new_zeros(()))
        if not along.requires_grad:
            return "linear"
        second = torch.autograd.grad(along, leaves, allow_unused=True)
    return "linear" if all(x is None or not bool(x.any()) for x in second) else "general"


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(m in (1, n) for m, n in zip(reversed(shape), reversed(to), strict=False))
