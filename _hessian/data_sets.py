"""A loss over all batches of a data set: `track_batches`, and the system of its Hessian, a sum over the batches."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable
from tqdm import tqdm

from _hessian.costs import free_bytes
from _hessian.dense import check_product, factor_dense
from _hessian.factorization import Factor, System
from _hessian.layers import Damping, TrackedBatch, TrackedDataSet
from _hessian.settings import Settings


class TracksLosses(nn.Module):
    """A network that remembers the batch of its last tracked loss, or the batches."""

    _tracked: TrackedBatch | TrackedDataSet | None
    _joins_batches = False  # into one, in track_batches

    def _track(self, inputs: Tensor | tuple[Tensor, ...], targets: Tensor, loss: Tensor) -> None:
        kept = tuple(x.detach().clone() for x in inputs) if isinstance(inputs, tuple) else inputs.detach().clone()
        targets, value, *parameters = (t.detach().clone() for t in (targets, loss, *self.parameters()))
        autocast = torch.is_autocast_enabled(loss.device.type)
        self._tracked = TrackedBatch(kept, targets, weakref.ref(loss), value, parameters, autocast)

    def track_batches(self, loader: Iterable[Sequence], *, keep: bool = True) -> Tensor:
        """The mean loss () over all batches of `loader`, weighted by their sizes, tracked: that of a whole data set.

            loss = Σ_b (N_b / N) model(x_b, y_b),    N = Σ_b N_b

        loader: gives pairs (x, y), as `model(x, y, track_activations=True)` takes them. They are moved to the model's
        device. The loss can be passed to every function that takes a tracked one, but for what follows.

        keep=True keeps the batches. For `DeepMLPWithTracking` they become one batch, so nothing differs. For
        `TrackedNetwork` they stay on the CPU. H is then the sum of theirs, and factored by route 'dense' alone.
        keep=False reads the loader again in each pass over the data, and keeps a digest of each batch. Other batches
        raise ValueError. H is a sum too. `compute_layer_derivatives` and newton.py refuse such a loss.

        `loss.backward()` gives the gradient. It is computed here batch by batch: there is no graph of all batches, and
        no second derivative by autograd. Cost: one forward and backward pass; O(P) memory and what is kept.
        """
        if not keep and iter(loader) is loader:
            raise TypeError(
                "with keep=False the loader is read several times, but an iterator can be read once: pass a DataLoader "
                "or a list, or keep=True"
            )
        if getattr(self.loss, "reduction", "mean") == "sum":
            raise ValueError("the loss of a data set is a mean, and this one has reduction='sum': pass one with 'mean'")
        device, before = next(self.parameters()).device, [p.detach().clone() for p in self.parameters()]
        parameters = [p for p in self.parameters() if p.requires_grad and torch.is_grad_enabled()]
        total, gradients = 0.0, [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        batches: list[TrackedBatch] = []
        digests: list[bytes] = []
        sizes: list[int] = []
        for item in tqdm(loader, "tracking batches", disable=None, leave=False, delay=2):
            inputs, y = _checked_pair(item)
            moved = tuple(x.to(device) for x in inputs)
            loss = self(moved if len(moved) > 1 else moved[0], y.to(device), track_activations=True)
            tracked = self._tracked
            assert isinstance(tracked, TrackedBatch), "tracked just now"
            sizes.append(len(y))
            total += len(y) * loss.item()
            found = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
            for gradient, g in zip(gradients, found, strict=True):
                gradient.add_(0 if g is None else g, alpha=len(y))
            kept = (tuple(x.detach().cpu().clone() for x in inputs), y.detach().cpu().clone()) if keep else ((), y[:0])
            batches.append(tracked._replace(inputs=kept[0], targets=kept[1], parameters=[]))
            digests.append(b"" if keep else _digest(*inputs, y))
        if not batches:
            raise ValueError("the loader gave no batches: the mean loss of no samples has no Hessian")
        means = [(g / sum(sizes)).to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        mean: Tensor = _LossWithGradient.apply(loss.new_tensor(total / sum(sizes)), means, *parameters)
        read = batches if keep else _ReadAgain(loader, batches, digests)
        data = TrackedDataSet(read, sizes, weakref.ref(mean), mean.detach().clone(), before)
        self._tracked = _joined(data) if keep and self._joins_batches else data
        return mean

    def __getstate__(self) -> dict:
        # a copy has no tracked loss of its own: weak references neither copy nor pickle
        return {**self.__dict__, "_tracked": None}


class _LossWithGradient(torch.autograd.Function):
    """A loss whose gradient is at hand."""

    @staticmethod
    def forward(ctx: BackwardCFunction, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters, *gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises where a parameter has changed
        return None, None, *(outer * g for g in saved[len(saved) // 2 :])


def _checked_pair(item: Sequence) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs and targets of a batch of the loader."""
    if isinstance(item, tuple | list) and len(item) == 2:
        x, y = item
        inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
        if all(isinstance(t, Tensor) for t in (*inputs, y)):
            return inputs, y
    raise TypeError(
        f"the loader must give pairs (x, y) of tensors (x may be a tuple of them), got {type(item).__name__}: "
        "take, for example, DataLoader(TensorDataset(x, y), batch_size=100)"
    )


def _digest(*tensors: Tensor) -> bytes:
    found = hashlib.blake2b()
    for x in tensors:
        found.update(f"{x.dtype}{tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _joined(data: TrackedDataSet) -> TrackedBatch[Tensor]:
    """Batches of a fully connected network as one."""
    rows = [as_rows(batch) for batch in data.batches]
    device = data.value.device
    inputs, targets = (torch.cat(x).to(device) for x in ([r.inputs for r in rows], [r.targets for r in rows]))
    return TrackedBatch(inputs, targets, data.loss, data.value, data.parameters, rows[0].autocast)


def as_rows(batch: TrackedBatch[tuple[Tensor, ...]]) -> TrackedBatch[Tensor]:
    """The batch with its inputs as (N, a_0)."""
    (x,) = batch.inputs
    return TrackedBatch(x.reshape(len(x), -1), *batch[1:])


class _ReadAgain:
    """The batches of a loader, read anew in each pass, and checked to be those that were tracked."""

    def __init__(self, loader: Iterable[Sequence], tracked: Sequence[TrackedBatch], digests: Sequence[bytes]):
        self._loader, self._tracked, self._digests = loader, tracked, digests

    def __iter__(self) -> Iterator[TrackedBatch[tuple[Tensor, ...]]]:
        count = len(self._tracked)
        for index, (item, batch, digest) in enumerate(zip_longest(self._loader, self._tracked, self._digests)):
            if item is not None and batch is not None:
                inputs, y = _checked_pair(item)
                if _digest(*inputs, y) == digest:
                    yield batch._replace(inputs=inputs, targets=y)
                    continue
            raise ValueError(
                f"the loader gave other batches than when they were tracked (the first is {index + 1}, and there were "
                f"{count}): it must give the same ones in each pass, without shuffle or random augmentation, or pass "
                "keep=True to track_batches"
            )


class DataSet:
    """The system of a sum over batches, weighted by their sizes. system_of: that of one batch."""

    def __init__(self, tracked: TrackedDataSet, system_of: Callable[[TrackedBatch], System]):
        self._tracked, self._system_of = tracked, system_of
        self._first = system_of(next(iter(tracked.batches)))
        self._H: Tensor | None = None  # once it is formed

    @property
    def num_parameters(self) -> int:
        return self._first.num_parameters

    @property
    def num_dampings(self) -> int:
        return self._first.num_dampings

    @property
    def device(self) -> torch.device:
        return self._first.device

    def damping_vector(self, damping: Damping) -> Tensor:
        return self._first.damping_vector(damping)

    def product(self, v: Tensor) -> Tensor:
        return self._mean(lambda system: system.product(v)) if self._H is None else self._H @ v

    def dense(self) -> Tensor:
        if self._H is None:
            H = self._mean(lambda system: system.dense())
            check_product(H, self.product)
            self._H = H
        return self._H

    def _mean(self, of: Callable[[System], Tensor]) -> Tensor:
        """Σ_b (N_b / N) of(system of b)."""
        sizes, total = self._tracked.sizes, None
        passes = tqdm(self._tracked.batches, "batches", len(sizes), disable=None, leave=False, delay=2)
        for size, batch in zip(sizes, passes, strict=True):
            part = of(self._system_of(batch)) * (size / sum(sizes))
            total = part if total is None else total.add_(part)
        assert total is not None, "there is a batch"
        return total

    def choose_route(self, settings: Settings, *, formed: bool, may_mix: bool) -> str:
        options = {
            f"route={settings.route!r}": settings.route not in ("auto", "dense"),
            "precision='mixed'": settings.precision == "mixed",
            "checkpoint_layers=True": settings.checkpoint_layers,
            "keep='disk'": settings.keep == "disk",
        }
        if chosen := [name for name, is_chosen in options.items() if is_chosen]:
            raise ValueError(
                f"{' and '.join(chosen)} needs all samples in one batch: leave it out, or track them as one batch "
                "(for DeepMLPWithTracking: track_batches with keep=True)"
            )
        needed, free = (8 if formed else 24) * self.num_parameters**2, free_bytes(self.device)
        if needed > free:
            raise MemoryError(
                f"the factorization by route='dense' needs {needed / 1e9:.3g} GB, and {self.device} has "
                f"{free / 1e9:.3g} GB free. What may fit: frozen parameters, or one batch, which has other routes"
            )
        return "dense"

    def factor(self, settings: Settings, formed: object, definite_only: bool) -> tuple[Factor, object]:
        H = formed if isinstance(formed, Tensor) else self.dense()
        return factor_dense(H.clone(), self.damping_vector(settings.damping), settings.damping, definite_only), H

    def share_done(self, index: int) -> float:
        return 1.0  # of a dense factorization
