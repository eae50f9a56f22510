"""Tracing a network by torch.fx, in float64: norms and attention written out, nothing in place."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

_UNTRACEABLE = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


class Recorder(fx.Interpreter):
    """Runs the graph and keeps the result of every node."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.results: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.results[n] = result = super().run_node(n)
        return result


class Traced(NamedTuple):
    module: fx.GraphModule
    names: dict[int, str]  # of its parameters by id, as net.named_parameters() has them: a tied one has one name


class _Sizes(tuple):
    """The shape of a traced tensor: integers, but a proxy for the number of samples."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return _Sizes(found) if isinstance(index, slice) else found

    def numel(self):
        return math.prod(self)


class _Proxy(fx.Proxy):
    """Its sizes are known, so that loops, branches and asserts may depend on them."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return self.size()
        return self.dim() if name == "ndim" else super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        first, second = (x.shape for x in self.tracer.values(self.node))
        traced: Any = super().__getattr__("shape")
        found = _Sizes(m if m == n else traced[i] for i, (m, n) in enumerate(zip(first, second, strict=True)))
        return found if dim is None else found[dim]

    def dim(self) -> int:
        return self.tracer.values(self.node)[0].dim()

    def __len__(self) -> int:
        first, second = (len(x) for x in self.tracer.values(self.node))
        if first != second:
            raise fx.proxy.TraceError("the number of samples is taken as a length")
        return first


class _Tracer(fx.Tracer):
    """inputs: of the network, and the same with one more sample."""

    def __init__(self, leaves: tuple[type[nn.Module], ...], inputs: Sequence[Sequence[Tensor]]):
        super().__init__()
        self._leaves, self._inputs = leaves + _UNTRACEABLE, inputs
        self._interpreters: list[fx.Interpreter] = []
        self._runs = False  # what is called is run, not traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, LEAVES) and _as_in_torch(m)
        return known or isinstance(m, self._leaves) or _written_out(m) is not None or _plain(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m, forward, args, kwargs):
        return forward(*args, **kwargs) if self._runs else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self._runs else super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: Any) -> Iterator[fx.Proxy]:
        return iter([obj[i] for i in range(len(obj))])

    def values(self, node: fx.Node) -> list[Any]:
        """Of a node, for the inputs, and for one more sample."""
        if not self._interpreters:
            self._interpreters = [fx.Interpreter(self.root, False, self.graph) for _ in self._inputs]
            for interpreter, inputs in zip(self._interpreters, self._inputs, strict=True):
                interpreter.args_iter = iter(inputs)
        self._runs = True
        try:
            with torch.no_grad():
                for interpreter in self._interpreters:
                    for x in self.graph.nodes:
                        if x not in interpreter.env:
                            interpreter.env[x] = interpreter.run_node(x)
        finally:
            self._runs = False
        return [interpreter.env[node] for interpreter in self._interpreters]


def _as_in_torch(m: nn.Module) -> bool:
    """Whether it computes what its kind of torch does: no `forward` of its own, no hook."""
    kind = next(k for k in type(m).__mro__ if k.__module__.startswith("torch.nn"))
    methods = ("forward", "_conv_forward")
    own = any(x in vars(m) or getattr(type(m), x, None) is not getattr(kind, x, None) for x in methods)
    return not (own or m._forward_hooks or m._forward_pre_hooks)


def _plain(m: nn.Module) -> bool:
    """A module of torch without parameters."""
    return m.__module__.startswith("torch.nn") and not list(m.parameters()) and not list(m.children())


def trace(net: nn.Module, inputs: Sequence[Tensor], leaves: tuple[type[nn.Module], ...] = ()) -> Traced:
    """The graph of a float64 copy of `net`, norms and attention written out. The copy shares nothing with `net`.

    leaves: kinds of modules not to look into, which must have no parameters.
    """
    check_modules(net)
    original, net = net, copy.deepcopy(net).double()
    names = {id(p): name for name, p in net.named_parameters()}
    for module in list(net.modules()):
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 (modules have it by name only)
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention) and _as_in_torch(child):
                setattr(module, name, WrittenAttention(child))
    for name, module in net.named_modules():
        if isinstance(module, leaves) and list(module.parameters()):
            raise ValueError(
                f"{name} of kind {type(module).__name__} has parameters: closed forms are for modules without any. "
                "Make it of nn.Linear and a module that takes its output"
            )
    tracer = _Tracer(leaves, ([x.clone() for x in inputs], [torch.cat([x, x[:1]]) for x in inputs]))
    try:
        with _traced_factories():
            graph = tracer.trace(net, _defaults(net, len(inputs)))
    except NameError as error:  # torch.fx knows no name for the module
        raise TypeError(
            f"{type(net).__name__} calls a module that is not one of its own, {_place(error)}: a lambda that keeps a "
            "module is not copied with the network. Call self.… in `forward`"
        ) from error
    except (torch.fx.proxy.TraceError, TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"torch.fx can't trace {type(net).__name__}, {_place(error)}: {str(error).split('. ')[0]}. Control flow "
            "(if, assert, a loop's length) must not depend on data or on the number of samples: take torch.where for "
            "branches and for x[i] = y"
        ) from error
    traced = fx.GraphModule(net, graph)
    recorder = Recorder(traced)
    with torch.no_grad():
        recorder.run(*inputs)
    for node in list(graph.nodes):
        if node.op == "call_module" and (replacement := _written_out(traced.get_submodule(node.target))) is not None:
            result = recorder.results[node]
            with graph.inserting_before(node):
                node.replace_all_uses_with(replacement(graph, node, result.dim() if isinstance(result, Tensor) else 0))
            graph.erase_node(node)
        elif node.target is F.scaled_dot_product_attention:
            node.target = scaled_dot_product_attention
        elif node.target is F.layer_norm:
            node.target = layer_norm
        elif node.target is F.prelu:
            node.target = prelu
        else:
            _out_of_place(node)
    traced.recompile()
    _check_same(original, traced, names, inputs)
    return Traced(traced, names)


def _defaults(net: nn.Module, num_inputs: int) -> dict[str, object]:
    """The arguments of `forward` after the inputs, at their defaults: `targets=None` is a constant, no tensor."""
    last = list(inspect.signature(net.forward).parameters.values())[num_inputs:]
    return {p.name: p.default for p in last if p.default is None or isinstance(p.default, bool | int | float | str)}


def _place(error: Exception) -> str:
    """The line of the network that torch.fx stopped at."""
    skipped = (__file__, fx.__path__[0])
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(skipped)]
    return f"at line {frames[-1].lineno} of {Path(frames[-1].filename).name}, `{frames[-1].line}`"


def _check_same(net: nn.Module, traced: fx.GraphModule, names: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
    """That the graph computes what the network does: its outputs, and their derivative along random directions."""
    of = dict(net.named_parameters())
    trainable = [p for p in traced.parameters() if p.requires_grad]
    found = []
    for module, parameters in ((net, [of[names[id(p)]] for p in trainable]), (traced, trainable)):
        with torch.enable_grad():
            y = module(*inputs)
            if not isinstance(y, Tensor):
                return  # refused where the operations are made
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
            grads = torch.autograd.grad((weights * y).sum(), parameters, allow_unused=True) if y.requires_grad else ()
        pairs = zip(grads, parameters, strict=False)
        found.append(
            [y.detach(), torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs] or [y[:0]])]
        )
    if not bool(torch.isfinite(found[0][1]).all()):
        raise ValueError(
            "the derivatives of the network are NaN or infinite: look for infinity in the inputs and the parameters, "
            "and for sqrt(0) or 0/0 in `forward`"
        )
    for a, b in zip(*found, strict=True):
        size = float(a.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=1e-5 * size, equal_nan=True):
            raise ValueError(
                f"the graph that torch.fx traced of {type(net).__name__} has other outputs or derivatives than the "
                "network: take out in-place operations (h = h.tanh(), not h.tanh_()), torch.no_grad() in `forward` "
                "(take .detach()), and what is random (call .eval())"
            )


@contextmanager
def _traced_factories() -> Iterator[None]:
    """torch.zeros and its like, called with sizes of traced tensors, become nodes."""

    def traced(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            found = [x for x in _leaves((args, kwargs)) if isinstance(x, fx.Proxy)]
            if not found:
                return function(*args, **kwargs)
            return found[0].tracer.create_proxy("call_function", function, args, kwargs)

        return call

    names = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch, name, traced(getattr(torch, name))))
        yield


def _leaves(x: object) -> Iterator[object]:
    if isinstance(x, tuple | list):
        for item in x:
            yield from _leaves(item)
    elif isinstance(x, Mapping):
        yield from _leaves(list(x.values()))
    else:
        yield x


_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _out_of_place(node: fx.Node) -> None:
    """The same without changing its argument. Whether the result is the same is checked on the loss."""
    if node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]
    elif node.op == "call_method" and (name := str(node.target)).endswith("_") and not name.endswith("__"):
        node.target = name[:-1]
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}


def check_modules(net: nn.Module) -> None:
    """That no module is one that can't be copied or traced, or mixes samples, or is random."""
    for path, module in net.named_modules():
        kind = type(module).__name__
        name = path or "the network"
        if isinstance(module, _UNTRACEABLE):
            cure = "write it with nn.Linear (a cell as a loop over time steps) or nn.MultiheadAttention"
            raise TypeError(f"{name} is of kind {kind}, which torch.fx can't look into: {cure}")
        if isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod"):
            raise TypeError(f"{name} is wrapped (it is a {kind}): pass the plain module that was compiled or wrapped")
        if parametrize.is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            raise TypeError(
                f"{name} has a parametrized weight, which hides its parameters: compute the weight in "
                "`forward`, and call torch.nn.functional"
            )
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise TypeError(
                    f"{name} keeps a tensor with its graph as .{attribute}, and can't be copied: keep "
                    f"{attribute}.detach(), or nothing"
                )
        if any(p.is_complex() for p in module.parameters(recurse=False)):
            raise TypeError(f"{name} has complex parameters: make real ones of their real and imaginary parts")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name} has sparse gradients, which have no second derivative: pass sparse=False")
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} is a {kind} in training mode, which mixes the samples: call .eval() first")
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        random = random or isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        if module.training and (random or isinstance(module, nn.RReLU)):
            raise ValueError(f"{name} is a {kind} in training mode, which is random: call .eval() first")


class WrittenAttention(nn.Module):
    """nn.MultiheadAttention as functions that torch.fx can trace, with the same parameters under the same names."""

    def __init__(self, m: nn.MultiheadAttention):
        super().__init__()
        if m.in_proj_weight is None or m.bias_k is not None or m.add_zero_attn:
            raise TypeError(
                "nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn is not supported: write it with "
                "nn.Linear"
            )
        self.in_proj_weight, self.in_proj_bias, self.out_proj = m.in_proj_weight, m.in_proj_bias, m.out_proj
        self.num_heads, self.batch_first = m.num_heads, m.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key_padding_mask is not None:
            raise TypeError("nn.MultiheadAttention with key_padding_mask is not supported: pass attn_mask")
        W, b = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            q, k, v = F.linear(query, W, b).chunk(3, -1)
        else:
            w, c = W.chunk(3), (None, None, None) if b is None else b.chunk(3)
            q, k, v = F.linear(query, w[0], c[0]), F.linear(key, w[1], c[1]), F.linear(value, w[2], c[2])
        q, k, v = (self._heads(x) for x in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal and attn_mask is None)
        attended = attended.transpose(1, 2).flatten(2)  # (N, T, width)
        return self.out_proj(attended if self.batch_first else attended.transpose(0, 1)), None

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, T, width / heads)."""
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


# Written out, since the derivatives of torch's own kernels are wrong or missing under vmap.


def normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    x = normalized(x, list(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def group_normalized(x: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    return normalized(grouped, [-1], eps).reshape(x.shape)


def rms_normalized(x: Tensor, normalized_shape: Sequence[int], eps: float | None) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return _leaky_relu(x, weight.reshape(-1, *(1,) * (x.dim() - 2)) if x.dim() > 2 else weight)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise ValueError("attention with dropout_p > 0 is random: call .eval() first")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


_Replacement = Callable[[fx.Graph, fx.Node, int], fx.Node]


def _written_out(m: nn.Module) -> _Replacement | None:
    """What puts a module with parameters into the graph as functions of these, for outputs of so many dimensions."""
    options: dict[str, fx.node.Argument] = {}
    if not _as_in_torch(m):
        return None
    if isinstance(m, nn.LayerNorm):
        normalize: Callable[..., Tensor] = layer_norm
        options = {"normalized_shape": tuple(m.normalized_shape), "eps": m.eps}
    elif isinstance(m, nn.RMSNorm):
        normalize, options = rms_normalized, {"normalized_shape": tuple(m.normalized_shape), "eps": m.eps}
    elif isinstance(m, nn.GroupNorm):
        normalize, options = group_normalized, {"groups": m.num_groups, "eps": m.eps}
    elif isinstance(m, nn.modules.batchnorm._BatchNorm):
        normalize, options = F.batch_norm, {"eps": m.eps}
    elif isinstance(m, nn.PReLU):
        return _parametric_relu
    else:
        return None
    over_channels = not isinstance(m, nn.LayerNorm | nn.RMSNorm)

    def replacement(graph: fx.Graph, node: fx.Node, dims: int) -> fx.Node:
        """γ x + β of the normalized x."""
        names = ("running_mean", "running_var") if normalize is F.batch_norm else ()
        buffers = (graph.get_attr(f"{node.target}.{name}") for name in names)
        x = graph.call_function(normalize, (node.args[0], *buffers), options)
        for name, apply in (("weight", operator.mul), ("bias", operator.add)):
            if getattr(m, name, None) is not None:
                x = graph.call_function(apply, (x, _broadcast(graph, f"{node.target}.{name}", dims * over_channels)))
        return x

    return replacement


def _broadcast(graph: fx.Graph, name: str, dims: int) -> fx.Node:
    """A parameter over the channels of a tensor of so many dimensions; as it is for 0."""
    parameter = graph.get_attr(name)
    return graph.call_method("reshape", (parameter, -1, *(1,) * (dims - 2))) if dims > 2 else parameter


def _parametric_relu(graph: fx.Graph, node: fx.Node, dims: int) -> fx.Node:
    return graph.call_function(_leaky_relu, (node.args[0], _broadcast(graph, f"{node.target}.weight", dims)))


def _leaky_relu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)
