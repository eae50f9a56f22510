"""benchmark.py: every command prints its table, and the figures in it mean what their heading says."""

from __future__ import annotations

import math
import statistics
from itertools import groupby, islice

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import benchmark
from benchmarks.iterative import cg_to_rtol, curvlinops_product, minres_to_rtol
from benchmarks.landscape import DAMPINGS, newton_steps, point, text_windows, timed
from benchmarks.landscape import tasks as landscape_tasks
from benchmarks.memory import Case
from benchmarks.networks import gpt_problem, largest_state
from benchmarks.problems import BenchmarkError, dense_solve, in_units, network_problem, square_problem
from benchmarks.processes import in_process
from benchmarks.reach import NETS, measure
from benchmarks.report import markdown_row, table
from benchmarks.training.hessian_free import HessianFree, conjugate_gradients
from benchmarks.training.methods import step_function
from benchmarks.training.objective import FlatModel, Job, accurate_loss, batches
from benchmarks.training.problems import ALL, PARTS, PROBLEMS, initial_model, load, problem_named
from benchmarks.training.report import mean_difference, median_and_range, median_curve
from benchmarks.training.runs import Run, Session, run_method, stored_runs
from hessian import hessian_vector_product

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


# ------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    "command",
    (
        "width",
        "reach",
        "networks kinds",
        "networks blocks",
        "networks peers",
        "networks landscape",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("batch", "rhs", "memory", "curvature", "imagenet steps")),
    ),
)
def test_a_command_prints_and_writes_its_table(tmp_path, capsys, command):
    if command == "curvature":
        for rival in ("curvlinops", "laplace"):
            pytest.importorskip(rival, reason="pip install -r requirements-optional.txt")
    assert benchmark.main([*command.split(), "--quick", "--out-dir", str(tmp_path)]) == 0
    printed, name = capsys.readouterr().out, command.replace(" ", "-")
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    assert lines[0].startswith(f"`python3 benchmark.py {command} --quick`; 1 threads, ")
    assert "\n".join(lines) in printed and printed.endswith(f"Table: {tmp_path / name}.md\n")
    tables = [list(part) for is_table, part in groupby(lines, lambda line: line.startswith("|")) if is_table]
    columns = [{line.count("|") - line.count("\\|") for line in part} for part in tables]
    assert tables and all(len(part) > 2 for part in tables) and all(len(x) == 1 for x in columns)
    plotted = ("width", "batch", "rhs", "reach", "networks-blocks", "networks-landscape")
    assert (tmp_path / f"{name}.png").exists() == (name in plotted)


@pytest.mark.slow
def test_training_prints_its_table_and_story(tmp_path, capsys):
    out = ["--quick", "--out-dir", str(tmp_path)]
    assert benchmark.main(["training", "story", *out]) == 1
    assert capsys.readouterr().err.startswith("error: story needs runs of depth30 and depth100")
    for name in ("depth30", "depth100"):
        assert benchmark.main(["training", name, "--only", "newton,sgd", *out]) == 0
        printed = capsys.readouterr().out
        assert "\n| newton | – | " in printed and "\n| sgd | " in printed and "\n| adam" not in printed
    assert benchmark.main(["training", "story", *out]) == 0
    assert (tmp_path / "training-quick" / "story.png").stat().st_size > 5000


@pytest.mark.parametrize("wrong", ("", "nothing", "solve --threads 0", "training depth30 --only nobody"))
def test_wrong_flags_exit_with_2(wrong):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(wrong.split())
    assert stop.value.code == 2


def test_a_failure_takes_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert benchmark.main(["shapes", "--quick", "--out-dir", str(tmp_path / "file")]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and str(tmp_path / "file") in err
    with pytest.raises(BenchmarkError, match=r"^benchmarks.memory .* ended with 1: ValueError: "):
        in_process("benchmarks.memory", Case(4, 4, 2, precision="float16"))


# ------------------------------------------------------------------------------------------------------- figures


def test_cells_have_three_digits():
    assert markdown_row([1234, 1234.5, 0.123456, None, "a"]) == "| 1,234 | 1,234 | 0.123 | – | a |"
    assert table(["x", "y"], [[1, 2]]) == ["| x | y |", "| --- | --- |", "| 1 | 2 |"]


def test_units_are_those_of_one_product():
    M = torch.randn(1000, 1000, dtype=torch.float64)
    units, unit = in_units({"twice": lambda: (M @ M, M @ M)}, repeats=5)
    assert 1.5 < units["twice"] < 20 and 0 < unit < 5


@pytest.mark.parametrize("method", (minres_to_rtol, cg_to_rtol))
def test_iterative_rivals_solve_the_same_system(method):
    problem = square_problem(4, 3, 3)
    f = problem.factorize(10.0)
    done = method(problem, f, max_seconds=60)
    A = problem.dense_hessian() + 10 * torch.eye(len(problem.v), dtype=torch.float64)
    counted: list[object] = []
    scipy.sparse.linalg.cg(A.numpy(), problem.v.numpy(), rtol=0.5e-8, callback=counted.append)
    assert done.reached and done.residual <= 1e-8 and abs(done.products - len(counted)) <= 1
    indefinite = method(problem, problem.factorize(1e-3), max_seconds=0.2)
    assert method is minres_to_rtol or indefinite.text(1.0).startswith("indefinite (")


def test_reach_counts_what_eigenvalues_say():
    problem = NETS[3].build()
    H = problem.dense_hessian()
    found = measure(problem, (H + H.mT) / 2, torch.linalg.eigvalsh(H), 0.1)
    assert found.inertia_error == {"plain": 0, "carried": 0} and found.near == 0
    assert max(found.log_error.values()) < 1e-9 and max(map(abs, found.residuals.values())) < 1e-8
    A = H + 0.1 * torch.eye(len(H), dtype=H.dtype)
    assert torch.allclose(dense_solve(A, problem.v), problem.solve(1e-8), rtol=1e-8)


def test_the_state_is_what_is_live_at_the_widest_cut():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            return z + torch.tanh(self.b(z))

    x, y = torch.randn(4, 5).double(), torch.randint(7, (4,))
    chain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    skip = Skip().double()
    for net, numbers in ((chain, 6), (skip, 7 + 7)):  # beside the branch, the stream
        assert largest_state(network_problem(net, x, y % 3).factorize()) == 4 * numbers
    one, three = (largest_state(gpt_problem(count, 16).factorize()) for count in (1, 3))
    assert one == three  # what was eliminated is no longer live


def test_points_of_the_landscape_are_those_of_eigenvalues():
    task = landscape_tasks(True, 0, 0, 0, 0)[1]
    model, data = task.start()
    found = point(model, data, 5)
    loss = model(*data, track_activations=True)
    H = hessian_vector_product(model, loss, torch.eye(sum(p.numel() for p in model.parameters())).double())
    mu = torch.linalg.eigvalsh((H + H.mT) / 2)
    assert found.below == tuple(int((mu < -e).sum()) for e in DAMPINGS) and found.step == 5
    assert found.logabsdet == pytest.approx((mu + DAMPINGS[0]).abs().log().sum().item()) and found.loss == loss.item()


def test_seconds_to_targets_are_of_the_first_losses_below_them():
    run = timed(iter((2.0, 0.05, 0.5, 1e-7, math.nan)), 60)
    first, second, third = run.to_targets
    assert first < second == third == run.rank[0] and run.steps == 3 and run.loss == 1e-7
    missed = timed(iter((2.0, 0.05, 0.04)), 60)
    assert missed.to_targets[1:] == [None, None] and run.rank < missed.rank
    for metric in ("parameter", "state"):
        losses = list(islice(newton_steps(*landscape_tasks(True, 0, 0, 0, 0)[1].start(), metric), 4))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_text_is_shifted_by_a_character():
    x, y = text_windows(3, 5)
    assert x.shape == y.shape == (3, 5)
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


def test_curvlinops_has_the_same_hessian_where_norms_are_written_out():
    pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch")
    problem = gpt_problem(1, 4, written_out=True)
    exact = hessian_vector_product(problem.model, problem.loss, problem.v)
    assert torch.allclose(curvlinops_product(problem), exact, rtol=1e-9, atol=1e-12)
    assert torch.allclose(exact, hessian_vector_product(*gpt_problem(1, 4)[::2], problem.v), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ training


def job(name: str, method: str, **changes) -> Job:
    problem = PROBLEMS[name]._replace(num_layers=4)
    return Job(problem, method, 0, 0.5, 0.01, None, 0.0, "loss", "test")._replace(**changes)


def started(job: Job) -> tuple:
    data = load(job.problem, job.seed, False).train
    return initial_model(job.problem, data[0].shape[1], job.seed), data


@pytest.mark.parametrize("method", ALL)
def test_every_method_lowers_the_loss(method):
    work = job("width16", method, rate={"sgd": 0.03, "lbfgs": 1.0, "hessian_free": 0.1}.get(method, 0.02))
    model, data = started(work)
    before = accurate_loss(model, *data).item()
    step = step_function(work, model, data)
    iterations = sum(step().iterations for _ in range(10))
    assert iterations >= 10 and accurate_loss(model, *data).item() < 0.97 * before


def test_the_accurate_loss_keeps_its_digits():
    model, (x, y) = started(job("depth30", "sgd"))
    assert torch.allclose(accurate_loss(model, x, y), model(x, y), rtol=1e-12)
    model.layers[-1].weight.data.zero_()
    model.layers[-1].bias.data.copy_(torch.eye(10)[3] * 60)
    wanted = 9 * math.exp(-60)  # log1p(9 exp(−60))
    assert math.isclose(accurate_loss(model, x, torch.full_like(y, 3)).item(), wanted, rel_tol=1e-12)


def test_the_flat_model_has_the_gradient_of_the_objective():
    model, (x, y) = started(job("depth30", "sgd"))
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(model(x, y), parameters)])
    theta = torch.cat([p.detach().flatten() for p in parameters])
    loss = model(x, y).item()
    flat = FlatModel(model, decay=0.3)
    assert math.isclose(flat.objective(x, y).item(), loss + 0.15 * float(theta @ theta), rel_tol=1e-12)
    assert torch.allclose(flat.gradient, gradient + 0.3 * theta, rtol=1e-12)
    assert math.isclose(flat.value_at(2 * theta, x, y), model(x, y).item() + 0.6 * float(theta @ theta), rel_tol=1e-12)


@pytest.mark.parametrize("name", ("depth30", "regression"))
def test_products_of_hessian_free_are_those_of_gauss_newton(name):
    work = job(name, "hessian_free", decay=0.2)
    model, (x, y) = started(work)
    free = HessianFree(work, model, (x, y))
    v = torch.randn(len(free.flat.theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = model(x)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(e, free.flat.parameters, retain_graph=True)])
            for e in h.flatten()]  # fmt: skip
    J = torch.stack(rows)

    def loss_of(h: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(h, y) if name == "regression" else torch.nn.functional.cross_entropy(h, y)

    Lambda = torch.autograd.functional.hessian(loss_of, h.detach()).reshape(h.numel(), h.numel())
    assert torch.allclose(free.curvature()(v), J.T @ (Lambda @ (J @ v)) + 0.2 * v, rtol=1e-10, atol=1e-12)


def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    A, b = M @ M.T + torch.eye(8), torch.randn(8, dtype=torch.float64, generator=generator)
    iterates, q = conjugate_gradients(lambda v: A @ v, b, torch.zeros(8, dtype=torch.float64))
    x = torch.linalg.solve(A, b)
    assert torch.allclose(iterates[-1], x, rtol=1e-6) and math.isclose(q, -0.5 * float(b @ x), rel_tol=1e-9)


def test_parts_of_a_data_set_do_not_overlap():
    problem = PROBLEMS["digits_6x32"]
    split = load(problem, 300, validate=True)
    assert split.validation is not None and split.test is not None
    assert tuple(len(part[0]) for part in (split.train, split.validation, split.test)) == PARTS["digits"]
    rows = [row.numpy().tobytes() for part in (split.train, split.validation, split.test) for row in part[0]]
    assert len(rows) == 1797 and len(set(rows)) > 1790  # the digits themselves have a few twins
    assert split.train[0].mean(0).abs().max() < 1e-12
    assert len(load(problem, 300, validate=False).train[0]) == 1200 + 237
    another = load(problem, 301, validate=True).test
    assert another is not None and not torch.equal(another[1], split.test[1])


def test_batches_hold_every_sample_once_an_epoch():
    x = torch.arange(10)
    source = batches(x, x, 0, 4)
    epochs = [torch.cat([next(source)[0] for _ in range(3)]) for _ in range(2)]
    assert all(torch.equal(epoch.sort().values, x) for epoch in epochs) and not torch.equal(*epochs)
    assert torch.equal(next(batches(x, x, 0, None))[0], x)


def test_a_stored_run_is_used_again_unless_its_settings_change(tmp_path):
    problem = problem_named("depth30", quick=True)._replace(num_layers=4, cap=0.05)

    def done_anew(**changes) -> bool:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
        redo = changes.pop("redo", ())
        run_method(Session("test", tmp_path, redo, quick=True), problem._replace(**changes), "newton")
        return before != {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}

    assert done_anew() and not done_anew() and done_anew(redo=("newton",))
    assert list(stored_runs(tmp_path, problem, "loss")) == ["newton"]
    assert done_anew(gain=1.1) and not stored_runs(tmp_path, problem, "loss")


def run_of(**history: list[float]) -> Run:
    return Run({"seed": 0}, history, "cap", 1.0)


def test_the_best_step_is_that_of_validation():
    accuracies = {"validation": [0.5, 0.9, 0.9], "test": [0.1, 0.2, 0.3]}
    run = run_of(**accuracies, validation_loss=[1.0, 0.4, 0.3], loss=[3.0, 2.0, 1.0], seconds=[0.0, 1.0, 2.0])
    assert run.best_index() == 2 and run.at_best("test") == 0.3
    assert run.seconds_to(2.5) == 1.0 and run.seconds_to(0.5) == math.inf and run.last() == 1.0


def test_medians_ranges_and_differences():
    assert median_and_range([1.0, 3.0, 2.0], ".0f") == "2 (1–3)"
    assert median_and_range([1.0, math.inf, 3.0], ".0f", 20) == "3 (1–>20), 2 of 3"
    assert median_and_range([math.inf], ".0f", 20) == ">20"
    ours, theirs = {1: 95.0, 2: 96.0, 3: 97.0}, {1: 94.0, 2: 96.0, 3: 95.0, 4: 0.0}
    values = [1.0, 0.0, 2.0]
    error = statistics.stdev(values) * math.sqrt(1 / 3 + 360 / 1200)
    problem = PROBLEMS["digits_6x32"]._replace(accuracy_seeds=3)
    assert mean_difference(problem, ours, theirs) == f"+1.00 ± {error:.2f}"


def test_the_median_curve_keeps_the_last_value_of_a_run_that_ended():
    runs = [run_of(seconds=[0.0, 1.0], loss=[4.0, 2.0]), run_of(seconds=[0.0, 2.0], loss=[8.0, 6.0])]
    assert median_curve(runs, "seconds", "loss") == ([0.0, 1.0, 2.0], [6.0, 5.0, 4.0])
