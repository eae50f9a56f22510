"""Train a 6-layer network on real images: gradient descent, Adam, exact Hessian, damped Newton, from one start.

    python3 simple_example.py                    # CIFAR-10 from ./data or the network, else the digits of scikit-learn
    python3 simple_example.py --data digits --seconds 20

All methods start from the same weights and see the same batches. They run in the same loop and differ in their step
alone. First the two Hessian methods run. Then gradient descent and Adam get the seconds that the exact Hessian took,
each at the best of several learning rates.

- Exact Hessian: the step −(H + εI)⁻¹ g, with the gradient g and the Hessian H of the batch's loss. ε grows until
  H + εI is positive definite. After each step it is adapted as in Levenberg-Marquardt.
- Damped Newton: `newton.DampedNewton`. It takes the gradient and the curvature of the whole batch, by conjugate
  gradients. The preconditioner is the exact solve on --curvature-batch samples.

The script prints a table and the winner by each measure. It writes loss.png under --out-dir.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hessian import DeepMLPWithTracking, factorize_hessian
from newton import DampedNewton

FIRST_ORDER: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "gradient descent": (torch.optim.SGD, (0.01, 0.03, 0.1, 0.3, 1.0)),  # learning rates to try
    "Adam": (torch.optim.Adam, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
}
TRIAL_SECONDS = 2.0  # of training at each learning rate, to choose one
DOWNLOAD_TIMEOUT = 10  # seconds


class DataError(Exception):
    """The images are missing or incomplete. The message names the path and says what to do."""


class NoNetworkError(Exception):
    """The download can't start. The message says why."""


Data = tuple[Tensor, Tensor]  # (N, pixels) standardized, (N,) class indices


class Images(NamedTuple):
    name: str
    train: Data
    test: Data


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
    try:  # torchvision downloads only what is missing
        parts = [CIFAR10(str(folder), train=flag, download=not extracted.exists()) for flag in (True, False)]
    except RuntimeError as error:  # torchvision: a checksum differs
        raise DataError(f"{extracted} is partial or corrupt: delete it and run again, or pass --data digits") from error
    train, test = ((torch.from_numpy(part.data).flatten(1), torch.tensor(part.targets)) for part in parts)
    return standardize("CIFAR-10", train, test, num_samples)


def check_network(url: str) -> None:
    """Raise NoNetworkError unless `url` answers within DOWNLOAD_TIMEOUT seconds."""
    # In a process: a name look-up has no timeout of its own, and a thread could not be stopped.
    command = [sys.executable, "-c", "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])", url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise NoNetworkError(f"no answer in {DOWNLOAD_TIMEOUT} s") from error
    if done.returncode:
        raise NoNetworkError(done.stderr.strip().rpartition("\n")[2].partition(": ")[2])


def load_digits(num_samples: int) -> Images:
    from sklearn.datasets import load_digits as load

    images, labels = (torch.from_numpy(array) for array in load(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return standardize("digits", (images[train], labels[train]), (images[test], labels[test]), num_samples)


def standardize(name: str, train: Data, test: Data, num_samples: int) -> Images:
    """The first `num_samples` training images and all test images, float64.

    Each pixel is standardized by its mean and deviation over the training images used.
    """
    if num_samples > len(train[0]):
        raise DataError(f"--samples {num_samples}: {name} has {len(train[0])} training images")
    x, y = train[0][:num_samples].double(), train[1][:num_samples].long()
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1
    return Images(name, ((x - mean) / std, y), ((test[0].double() - mean) / std, test[1].long()))


# ------------------------------------------------------------------------------------------------------ methods


class Step(NamedTuple):
    loss: float  # of the batch, before the step
    hessian_seconds: float  # of everything but the loss and its gradient
    converged: bool = False


StepFunction = Callable[[DeepMLPWithTracking, Tensor, Tensor], Step]


def first_order(optimizer_class: Callable[..., torch.optim.Optimizer], learning_rate: float) -> StepFunction:
    @functools.cache  # one optimizer a run
    def optimizer_of(model: DeepMLPWithTracking) -> torch.optim.Optimizer:
        return optimizer_class(model.parameters(), lr=learning_rate)

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
        started, forward_seconds = time.perf_counter(), 0.0

        def closure() -> Tensor:
            nonlocal forward_seconds
            forward_started = time.perf_counter()
            loss = model(x, y, track_activations=True)
            forward_seconds = time.perf_counter() - forward_started
            return loss

        loss = optimizer.step(closure)
        return Step(loss.item(), time.perf_counter() - started - forward_seconds, optimizer.converged)

    return step


class ExactHessianStep:
    """θ ← θ − (H + εI)⁻¹ g, with ε adapted as in Levenberg-Marquardt.

    ε grows until H + εI is positive definite: then the step is a descent direction. It is taken if the loss falls.
    """

    def __init__(self, damping: float = 1.0):
        self.damping = damping

    def __call__(self, model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Step:
        loss = model(x, y, track_activations=True)
        parameters = list(model.parameters())
        g = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))
        started = time.perf_counter()
        while not (H := factorize_hessian(model, loss, self.damping)).is_positive_definite:
            self.damping *= 4
        p = H.solve(-g)
        hessian_seconds = time.perf_counter() - started
        # the quadratic model falls by −gᵀp − ½pᵀHp, and Hp = −g − εp
        predicted = -0.5 * float(g @ p) + 0.5 * self.damping * float(p @ p)
        with torch.no_grad():
            before = torch.nn.utils.parameters_to_vector(parameters)
            torch.nn.utils.vector_to_parameters(before + p, parameters)
            ratio = float(loss - model(x, y)) / predicted  # NaN is below every bound
            if not ratio > 1e-4:
                torch.nn.utils.vector_to_parameters(before, parameters)
        if not ratio > 0.25:
            self.damping *= 4
        elif ratio > 0.75:
            self.damping = max(self.damping / 3, 1e-8)
        return Step(loss.item(), hessian_seconds)


# --------------------------------------------------------------------------------------------------------- loop


class Run(NamedTuple):
    name: str
    steps: list[int]  # at the start of each epoch, and at the end
    seconds: list[float]  # then
    losses: list[float]  # of all training images, then
    hessian_seconds: float
    train_accuracy: float
    test_accuracy: float


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Batches without end, shuffled anew in each epoch, and whether each is the first of its epoch."""
    generator = torch.Generator().manual_seed(1)
    while True:
        if size == len(x):
            yield x, y, True
        else:
            for number, batch in enumerate(torch.randperm(len(x), generator=generator).split(size)):
                yield x[batch], y[batch], number == 0


@torch.no_grad()
def loss_of(model: DeepMLPWithTracking, data: Data) -> float:
    return model(*data).item()


@torch.no_grad()
def accuracy_of(model: DeepMLPWithTracking, data: Data) -> float:
    return (model(data[0]).argmax(1) == data[1]).double().mean().item()


def train(
    name: str,
    start: DeepMLPWithTracking,
    images: Images,
    batch_size: int,
    step: StepFunction,
    max_seconds: float,
    max_steps: int,
) -> Run:
    """Train a copy of `start` by `step` until `max_seconds`, `max_steps` or convergence. Only steps count as time."""
    model, whole = copy.deepcopy(start), batch_size == len(images.train[0])
    steps: list[int] = []
    seconds: list[float] = []
    losses: list[float] = []
    count, elapsed, hessian_seconds = 0, 0.0, 0.0
    with tqdm(total=round(max_seconds, 1), desc=name, disable=None, bar_format="{desc} {bar} {postfix}") as bar:
        for x, y, starts_epoch in batches(*images.train, batch_size):
            if starts_epoch:
                steps.append(count)
                seconds.append(elapsed)
                losses.append(math.nan if whole else loss_of(model, images.train))
            started = time.perf_counter()
            done = step(model, x, y)
            elapsed += time.perf_counter() - started
            count += 1
            hessian_seconds += done.hessian_seconds
            if whole:
                losses[-1] = done.loss
            bar.set_postfix_str(f"step {count}, loss {done.loss:.3e}", refresh=False)
            bar.update(min(elapsed, max_seconds) - bar.n)
            if elapsed >= max_seconds or count >= max_steps or done.converged:
                break
    losses.append(loss_of(model, images.train))
    accuracies = accuracy_of(model, images.train), accuracy_of(model, images.test)
    return Run(name, [*steps, count], [*seconds, elapsed], losses, hessian_seconds, *accuracies)


def train_at_best_rate(name: str, setting: tuple[DeepMLPWithTracking, Images, int], seconds: float) -> Run:
    """Try every learning rate for TRIAL_SECONDS, then train for `seconds` at the one with the least loss."""
    optimizer_class, rates = FIRST_ORDER[name]
    losses = {}
    for rate in rates:
        trial = train(f"rate {rate:g}", *setting, first_order(optimizer_class, rate), TRIAL_SECONDS, 10**9)
        losses[rate] = trial.losses[-1]
    print(f"{name}, loss by rate: " + ", ".join(f"{rate:g}: {loss:.2e}" for rate, loss in losses.items()))
    best = min(losses, key=lambda rate: (not losses[rate] < math.inf, losses[rate]))  # NaN last
    return train(f"{name}, rate {best:g}", *setting, first_order(optimizer_class, best), seconds, 10**9)


# ------------------------------------------------------------------------------------------------------- report


def report(runs: list[Run]) -> None:
    print(f"\n{'method':32} {'steps':>7} {'loss':>10} {'train':>7} {'test':>7} {'seconds':>8} {'Hessian':>8}")
    for run in runs:
        share = run.hessian_seconds / max(run.seconds[-1], 1e-9)
        print(
            f"{run.name:32} {run.steps[-1]:7d} {run.losses[-1]:10.2e} {run.train_accuracy:7.1%} "
            f"{run.test_accuracy:7.1%} {run.seconds[-1]:8.1f} {share:8.0%}"
        )
    at = min(len(r.steps) for r in runs) - 2  # the last start of an epoch that all reached
    print()
    print_winner(f"training loss after {runs[0].steps[at]} steps each", [(r.name, r.losses[at]) for r in runs])
    print_winner("training loss at the end", [(r.name, r.losses[-1]) for r in runs])
    common = max(min(r.losses) for r in runs)
    times = [(r.name, next(t for t, loss in zip(r.seconds, r.losses, strict=True) if loss <= common)) for r in runs]
    print_winner(f"seconds to the training loss that all reached, {common:.1e}", times)
    print_winner("test accuracy", [(r.name, -r.test_accuracy) for r in runs])


def print_winner(measure: str, values: list[tuple[str, float]]) -> None:
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
    parser.add_argument("--samples", type=int, default=64, help="training images")
    parser.add_argument("--batch-size", type=int, default=None, help="default: all samples")
    parser.add_argument("--curvature-batch", type=int, default=32, help="samples of damped Newton's exact solve")
    parser.add_argument("--hidden-dim", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0, help="limit of each method")
    parser.add_argument("--steps", type=int, default=100, help="limit of the two Hessian methods")
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
    # the first step of a process loads libraries: that is nobody's time
    damped_newton(args.curvature_batch)(copy.deepcopy(start), *images.train)
    newton = train("damped Newton", *setting, damped_newton(args.curvature_batch), args.seconds, args.steps)
    hessian = train("exact Hessian", *setting, ExactHessianStep(), args.seconds, args.steps)
    runs = [*(train_at_best_rate(name, setting, hessian.seconds[-1]) for name in FIRST_ORDER), hessian, newton]
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
