"""The training problems: networks, data and initial weights."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from benchmarks.problems import Data, draw_weights, mnist_digits
from hessian import DeepMLPWithTracking

NEWTONS = ("newton", "newton_parameter", "newton_hessian", "newton_sweep", "newton_gauss_newton")
RIVALS = ("sgd", "adam", "muon", "lbfgs", "hessian_free")
ALL = (*NEWTONS, *RIVALS)
DEEP = ("newton", "newton_sweep", *RIVALS)
PLAIN = ("newton", *RIVALS)
MINIMUM = ("newton", "newton_gauss_newton", "lbfgs", "adam")

FIRST_SEED_OF_DATA_SETS = 300  # others than where the optimizer was developed
PARTS = {"digits": (1200, 237, 360), "mnist": (3500, 500, 1000)}  # images to train, to validate and to test


class Problem(NamedTuple):
    data: str  # digits, sine, mnist
    num_layers: int
    width: int
    seeds: int
    cap: float  # seconds a run
    methods: tuple[str, ...]
    samples: int | None = None  # a fixed batch of so many, for the loss alone; None: a data set, with test accuracy too
    gain: float | None = 1.2  # weights N(0, gain² / fan-in), biases 0; None: the model's own initialization
    weight_decay: float = 0.0  # w of ½ w ‖θ‖² in the objective
    accuracy_seeds: int = 10  # test accuracy is noisier than the loss

    @property
    def loss(self) -> str:
        return "mse" if self.data == "sine" else "cross_entropy"

    def seed_range(self, track: str) -> range:
        first = 0 if self.samples else FIRST_SEED_OF_DATA_SETS
        return range(first, first + (self.seeds if track == "loss" else self.accuracy_seeds))

    def settings(self) -> dict[str, object]:
        counts = ("methods", "seeds", "accuracy_seeds")
        return {name: value for name, value in self._asdict().items() if name not in counts}


PROBLEMS = {
    "depth30": Problem("digits", 30, 8, 5, 20, ALL, 32),
    "depth30_orthogonal": Problem("digits", 30, 8, 5, 20, PLAIN, 32, gain=None),
    "depth100": Problem("digits", 100, 8, 2, 60, DEEP, 32),
    "depth300": Problem("digits", 300, 8, 2, 60, DEEP, 32),
    "depth1000": Problem("digits", 1000, 8, 2, 60, PLAIN, 32),
    "depth1000_orthogonal": Problem("digits", 1000, 8, 2, 60, PLAIN, 32, gain=None),
    "width16": Problem("digits", 8, 16, 5, 15, ALL, 64),
    "regression": Problem("sine", 6, 8, 5, 20, ALL, 64),
    "minimum_regression": Problem("sine", 6, 8, 5, 30, MINIMUM, 64, weight_decay=1e-4),
    "minimum_depth30": Problem("digits", 30, 8, 5, 60, MINIMUM, 32, weight_decay=1e-3),
    "digits_6x32": Problem("digits", 6, 32, 5, 10, PLAIN, gain=1.0),
    "digits_30x16": Problem("digits", 30, 16, 5, 10, PLAIN, gain=1.0),
    "mnist_6x32": Problem("mnist", 6, 32, 5, 10, PLAIN, gain=1.0),
    "mnist_30x16": Problem("mnist", 30, 16, 5, 10, PLAIN, gain=1.0),
}


def problem_named(name: str, quick: bool) -> Problem:
    """Quick: one seed, half a second, and no network deeper than 30 layers."""
    problem = PROBLEMS[name]
    if not quick:
        return problem
    return problem._replace(seeds=1, accuracy_seeds=1, cap=0.5, num_layers=min(problem.num_layers, 30))


class Split(NamedTuple):
    train: Data
    validation: Data | None = None
    test: Data | None = None


@functools.cache  # MNIST is read from text, in seconds
def load_images(name: str) -> Data:
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    else:
        x, y = mnist_digits()
    return torch.from_numpy(x).double(), torch.from_numpy(y).long()


def load(problem: Problem, seed: int, validate: bool) -> Split:
    """The data parted by `seed`: float32 for MNIST, else float64; inputs standardized over the training part.

    validate: hold out a validation part. Else it is trained on too.
    """
    if problem.data == "sine":
        assert problem.samples is not None
        x = torch.linspace(-1, 1, problem.samples, dtype=torch.float64)[:, None]
        return Split((x, torch.sin(3 * math.pi * x) + 0.3 * torch.cos(9 * math.pi * x)))
    images, y = load_images(problem.data)
    num_train, num_validation, num_test = PARTS[problem.data]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, test = order[num_train:-num_test], order[-num_test:]
    train = order[: problem.samples or num_train + (not validate) * num_validation]
    mean, std = images[train].mean(0), images[train].std(0)
    std[std == 0] = 1
    x = (images - mean) / std
    if problem.data == "mnist":
        x = x.float()
    if problem.samples:
        return Split((x[train], y[train]))
    return Split((x[train], y[train]), (x[held_out], y[held_out]) if validate else None, (x[test], y[test]))


def initial_model(problem: Problem, num_inputs: int, seed: int) -> DeepMLPWithTracking:
    torch.manual_seed(seed)
    classes = 1 if problem.loss == "mse" else 10
    model = DeepMLPWithTracking(num_inputs, problem.width, classes, problem.num_layers - 1, "tanh", loss=problem.loss)
    model = model.double()
    if problem.gain is not None:
        draw_weights(model.parameters(), problem.gain)
    return model.float() if problem.data == "mnist" else model
