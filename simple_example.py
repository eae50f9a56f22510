"""Train a 6-layer network on real images: gradient descent, Adam, exact Hessian, damped Newton, from one start.

    python3 simple_example.py                    # CIFAR-10 from ./data or the network, else the digits of scikit-learn
    python3 simple_example.py --data digits --seconds 20

All methods run the same loop on the same batches and differ in their step alone. Gradient descent and Adam take the
best of several rates, and are given the seconds that the exact Hessian took. That one raises its damping until the
inertia of H + εI says that it is positive definite, and then by the ratio of the actual to the predicted decrease.
Damped Newton (newton.py) takes gradient and curvature of the whole batch, by conjugate gradients preconditioned by
the exact solve on --curvature-batch samples.
Prints a table and who won by which measure, and writes loss.png under --out-dir.
"""

from __future__ import annotations

import argparse
import copy
import functools
import http.client
import math
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hessian import DeepMLPWithTracking, factorize_hessian
from newton import DampedNewton

RATES = {"gradient descent": (0.01, 0.03, 0.1, 0.3, 1.0), "Adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
PROBE_SECONDS = 2.0  # given to each rate
DOWNLOAD_TIMEOUT = 10  # seconds


class DataError(Exception):
    """The data asked for is not there, or not whole; the message names the path and what to do."""


class NoNetworkError(Exception):
    """The download can't start; the message says why."""


class Images(NamedTuple):
    name: str
    train: tuple[Tensor, Tensor]  # (N, pixels) standardized, (N,)
    test: tuple[Tensor, Tensor]


# --------------------------------------------------------------------------------------------------------- data


def load_images(data: str, folder: Path, num_samples: int) -> Images:
    if data == "digits":
        return load_digits(num_samples)
    try:
        return load_cifar10(folder, num_samples)
    except NoNetworkError as error:
        missing = f"CIFAR-10 is not in {folder} and can't be downloaded ({error})"
        if data == "cifar10":
            raise DataError(f"{missing}: put cifar-10-batches-py there, or pass --data digits") from error
        print(f"{missing}: running on scikit-learn's 8×8 digits.")
        return load_digits(num_samples)


def load_cifar10(folder: Path, num_samples: int) -> Images:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive, extracted = folder / CIFAR10.filename, folder / CIFAR10.base_folder
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise DataError(f"{archive} is partial or corrupt: delete it and run again, or pass --data digits")
    if not archive.exists() and not extracted.exists():
        check_network(CIFAR10.url)
    try:
        # neither is downloaded again where its checksums are right
        parts = [CIFAR10(str(folder), train=flag, download=not extracted.exists()) for flag in (True, False)]
    except RuntimeError as error:  # torchvision's word for a checksum that differs
        raise DataError(f"{extracted} is partial or corrupt: delete it and run again, or pass --data digits") from error
    train, test = ((torch.from_numpy(part.data).flatten(1), torch.tensor(part.targets)) for part in parts)
    return standardize("CIFAR-10", train, test, num_samples)


def check_network(url: str) -> None:
    """Raise NoNetworkError unless `url` answers within DOWNLOAD_TIMEOUT, name look-up and all."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT).close()
            outcome.append("")
        except (OSError, http.client.HTTPException) as error:
            outcome.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DOWNLOAD_TIMEOUT)
    error = outcome[0] if outcome else f"no answer in {DOWNLOAD_TIMEOUT} s"
    if error:
        raise NoNetworkError(error)


def load_digits(num_samples: int) -> Images:
    from sklearn.datasets import load_digits as load

    images, labels = (torch.from_numpy(array) for array in load(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return standardize("digits", (images[train], labels[train]), (images[test], labels[test]), num_samples)


def standardize(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_samples: int) -> Images:
    """The first samples of train, all of test, in float64, each pixel by the mean and spread of what is trained on."""
    if num_samples > len(train[0]):
        raise DataError(f"--samples {num_samples}: {name} has {len(train[0])} training images")
    train = (train[0][:num_samples].double(), train[1][:num_samples].long())
    mean, std = train[0].mean(0), train[0].std(0)
    std[std == 0] = 1
    return Images(name, ((train[0] - mean) / std, train[1]), ((test[0].double() - mean) / std, test[1].long()))


# ------------------------------------------------------------------------------------------------------ methods


class Step(NamedTuple):
    loss: float  # of the batch, before the step
    hessian_seconds: float  # all but the loss and its gradient: curvature, solves, trials
    converged: bool = False


StepFunction = Callable[[DeepMLPWithTracking, Tensor, Tensor], Step]


def loss_and_gradient(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    loss = model(x, y, track_activations=True)
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@torch.no_grad()
def move(model: DeepMLPWithTracking, step: Tensor) -> None:
    for p, s in zip(model.parameters(), step.split([p.numel() for p in model.parameters()]), strict=True):
        p.add_(s.view_as(p))


def gradient_descent(rate: float) -> StepFunction:
    def step(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Step:
        loss = model(x, y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(g, alpha=rate)
        return Step(loss.item(), 0.0)

    return step


def adam(rate: float) -> StepFunction:
    @functools.cache  # one for the run
    def optimizer_of(model: DeepMLPWithTracking) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), rate)

    def step(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Step:
        optimizer = optimizer_of(model)
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        return Step(loss.item(), 0.0)

    return step


def damped_newton(curvature_batch: int) -> StepFunction:
    @functools.cache
    def optimizer_of(model: DeepMLPWithTracking) -> DampedNewton:
        return DampedNewton(model, curvature_batch=curvature_batch)

    def step(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Step:
        optimizer = optimizer_of(model)
        started, forward = time.perf_counter(), 0.0

        def closure() -> Tensor:
            nonlocal forward
            begun = time.perf_counter()
            loss = model(x, y, track_activations=True)
            forward = time.perf_counter() - begun
            return loss

        loss = optimizer.step(closure)
        return Step(loss.item(), time.perf_counter() - started - forward, optimizer.converged)

    return step


class ExactHessianStep:
    """p = −(H + εI)⁻¹ g, with ε raised until H + εI is positive definite, so that p is a descent direction and the
    minimizer of a convex model; accepted when the loss falls, ε adapted as Levenberg and Marquardt do."""

    def __init__(self, damping: float = 1.0):
        self.damping = damping

    def __call__(self, model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Step:
        loss, g = loss_and_gradient(model, x, y)
        before, started, seconds = copy.deepcopy(model.state_dict()), time.perf_counter(), 0.0
        factorization = factorize_hessian(model, loss, self.damping)
        while not factorization.is_positive_definite:
            self.damping *= 4
            factorization = factorize_hessian(model, loss, self.damping)
        p = factorization.solve(-g)
        seconds = time.perf_counter() - started
        # decrease of the quadratic model, −gᵀp − ½pᵀHp, by (H + εI)p = −g
        predicted = -0.5 * float(g @ p) + 0.5 * self.damping * float(p @ p)
        move(model, p)
        with torch.no_grad():
            ratio = float(loss - model(x, y)) / predicted  # NaN: not accepted
        if not ratio > 1e-4:
            model.load_state_dict(before)
        if not ratio > 0.25:
            self.damping *= 4
        elif ratio > 0.75:
            self.damping = max(self.damping / 3, 1e-8)
        return Step(loss.item(), seconds)


class Run(NamedTuple):
    name: str
    steps: list[int]  # where the loss of all samples was taken
    seconds: list[float]
    losses: list[float]
    hessian_seconds: float
    train_accuracy: float
    test_accuracy: float


@torch.no_grad()
def loss_of(model: DeepMLPWithTracking, data: tuple[Tensor, Tensor]) -> float:
    return model(*data).item()


def train(
    name: str,
    start: DeepMLPWithTracking,
    images: Images,
    batch_size: int,
    step: StepFunction,
    max_seconds: float,
    max_steps: int,
) -> Run:
    """The one loop: `step` on the same sequence of batches from the same start, until `max_seconds` or `max_steps`.

    The loss of all samples is noted at the start of each epoch; where a batch is less than all, off the clock.
    """
    model, (x, y) = copy.deepcopy(start), images.train
    whole = batch_size == len(x)
    steps, times, losses, count, elapsed, hessian_seconds = [], [], [], 0, 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    with tqdm(total=round(max_seconds, 1), desc=name, disable=None, bar_format="{desc} {bar} {postfix}") as bar:
        converged = False
        while elapsed < max_seconds and count < max_steps and not converged:
            steps.append(count)
            times.append(elapsed)
            losses.append(math.nan if whole else loss_of(model, images.train))
            order = torch.arange(len(x)) if whole else torch.randperm(len(x), generator=generator)
            for batch in order.split(batch_size):
                started = time.perf_counter()
                done = step(model, x, y) if whole else step(model, x[batch], y[batch])
                elapsed += time.perf_counter() - started
                count += 1
                hessian_seconds += done.hessian_seconds
                converged = done.converged
                bar.set_postfix_str(f"step {count}, loss {done.loss:.3e}", refresh=False)
                bar.update(min(elapsed, max_seconds) - bar.n)
                if elapsed >= max_seconds or count >= max_steps or converged:
                    break
            if whole:
                losses[-1] = done.loss
    with torch.no_grad():
        accuracies = [(model(a).argmax(1) == b).double().mean().item() for a, b in (images.train, images.test)]
    losses.append(loss_of(model, images.train))
    return Run(name, [*steps, count], [*times, elapsed], losses, hessian_seconds, *accuracies)


# ------------------------------------------------------------------------------------------------------- report


def report(runs: list[Run]) -> None:
    print(f"\n{'method':32} {'steps':>7} {'loss':>10} {'train':>7} {'test':>7} {'seconds':>8} {'Hessian':>8}")
    for run in runs:
        share = run.hessian_seconds / max(run.seconds[-1], 1e-9)
        print(
            f"{run.name:32} {run.steps[-1]:7d} {run.losses[-1]:10.2e} {run.train_accuracy:7.1%} "
            f"{run.test_accuracy:7.1%} {run.seconds[-1]:8.1f} {share:8.0%}"
        )
    at = min(len(r.steps) for r in runs) - 2  # the last entry may stand in the middle of an epoch
    print()
    winner(f"training loss after {runs[0].steps[at]} steps each", [(r.name, r.losses[at]) for r in runs])
    winner("training loss at the end", [(r.name, r.losses[-1]) for r in runs])
    level = max(min(r.losses) for r in runs)
    times = [(r.name, next(t for t, loss in zip(r.seconds, r.losses, strict=True) if loss <= level)) for r in runs]
    winner(f"seconds to the training loss that all reached, {level:.1e}", times)
    winner("test accuracy", [(r.name, -r.test_accuracy) for r in runs])


def winner(measure: str, values: list[tuple[str, float]]) -> None:
    (first, a), (second, b) = sorted(values, key=lambda item: item[1])[:2]
    if a == b:
        print(f"By {measure}: a draw at {abs(a):.3g}.")
    else:
        print(f"By {measure}: {first} won, {abs(a):.3g} against {abs(b):.3g} for {second}.")


def plot(runs: list[Run], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for run in runs:
        axes[0].loglog([1 + step for step in run.steps], run.losses, label=run.name)
        axes[1].semilogy(run.seconds, run.losses, label=run.name)
    axes[0].set(xlabel="1 + step", ylabel="training loss", title=title)
    axes[1].set(xlabel="seconds")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("auto", "cifar10", "digits"), default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is, or is downloaded to")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/simple_example"))
    parser.add_argument("--samples", type=int, default=64, help="training images used")
    parser.add_argument("--batch-size", type=int, default=None, help="default: all samples")
    parser.add_argument("--curvature-batch", type=int, default=32, help="samples of damped Newton's exact solve")
    parser.add_argument("--hidden-dim", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each method at most")
    parser.add_argument("--steps", type=int, default=100, help="of the Hessian method at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("samples", "hidden_dim", "steps", "seconds", "batch_size", "curvature_batch"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return args


def run(args: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data, args.data_dir, args.samples)
    batch_size = min(args.batch_size or args.samples, args.samples)
    torch.manual_seed(args.seed)
    inputs = images.train[0].shape[1]
    start = DeepMLPWithTracking(inputs, args.hidden_dim, 10, 5, "tanh").double()
    num_parameters = sum(p.numel() for p in start.parameters())
    print(
        f"{images.name}: {args.samples} training images, batches of {batch_size}; {inputs} → 5 × {args.hidden_dim} "
        f"→ 10, {num_parameters:,} parameters, tanh, seed {args.seed}, {torch.get_num_threads()} threads"
    )
    setting = (start, images, batch_size)
    # what a process pays once (torch's optimizers import a compiler) is nobody's time
    damped_newton(args.curvature_batch)(copy.deepcopy(start), *images.train)
    newton = train("damped Newton", *setting, damped_newton(args.curvature_batch), args.seconds, args.steps)
    hessian = train("exact Hessian", *setting, ExactHessianStep(), args.seconds, args.steps)
    first_order = []
    for name, method in (("gradient descent", gradient_descent), ("Adam", adam)):
        probes = [train(f"rate {r:g}", *setting, method(r), PROBE_SECONDS, 10**9) for r in RATES[name]]
        print(f"{name}, loss by rate: " + ", ".join(f"{p.name[5:]}: {p.losses[-1]:.2e}" for p in probes))
        # a NaN is never the least
        best = min(
            zip(RATES[name], probes, strict=True),
            key=lambda pair: (not pair[1].losses[-1] < math.inf, pair[1].losses[-1]),
        )
        rate = best[0]
        first_order.append(train(f"{name}, rate {rate:g}", *setting, method(rate), hessian.seconds[-1], 10**9))
    runs = [*first_order, hessian, newton]
    report(runs)
    path = args.out_dir / "loss.png"
    plot(runs, f"{images.name}, {args.samples} images, 6 layers", path)
    print(f"\nPlot: {path}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (DataError, torch.linalg.LinAlgError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
