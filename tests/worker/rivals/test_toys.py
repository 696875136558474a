"""The toy problems and the methods on them, in a short form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from preconditioner_worker.cli import main
from preconditioner_worker.rivals.toy_contenders import GRIDS, SOLVERS
from preconditioner_worker.rivals.toy_problems import (
    PROBLEMS,
    DegenerateLinear,
    Rosenbrock,
    is_solved,
    loss_of,
)
from preconditioner_worker.rivals.toys import ToyStudy


def test_rosenbrocks_residuals():
    problem = Rosenbrock(3.0)
    residuals = problem.residuals(torch.tensor([0.5, 2.0]), torch.tensor(0.1))
    torch.testing.assert_close(residuals, torch.tensor([0.1 * 10 * 1.75, 0.5]))
    random = np.random.default_rng(0)
    noise = [float(problem.draw(random)) for _ in range(200)]
    assert 0 <= min(noise) < 0.2
    assert 2.8 < max(noise) <= 3
    assert is_solved(problem, torch.ones(2, dtype=torch.float64))
    assert not is_solved(problem, torch.zeros(2, dtype=torch.float64))


def test_the_linear_problem_is_degenerate_and_can_be_solved():
    problem = DegenerateLinear()
    left, values, right = torch.linalg.svd(problem._target, full_matrices=False)
    assert values[0] / values[-1] == pytest.approx(1e5)
    exact = torch.cat([left * values, right]).flatten()
    assert float(loss_of(problem, exact, torch.ones(()))) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("name", ["Levenberg-Marquardt", "BFGS", "CurveBall"])
def test_second_order_methods_cross_the_valley_in_few_steps(name):
    for problem in (Rosenbrock(), Rosenbrock(3.0)):
        counts = [SOLVERS[name](problem, np.random.default_rng(seed), 200, GRIDS[name][0]) for seed in (0, 1)]
        assert all(count is not None and count < 60 for count in counts)


def test_curveball_is_ten_times_faster_than_sgd_and_adam():
    problem = Rosenbrock()
    curveball = SOLVERS["CurveBall"](problem, np.random.default_rng(0), 200, 1.0)
    for name, rate in (("SGD", 3e-3), ("Adam", 0.3)):
        assert SOLVERS[name](problem, np.random.default_rng(0), 10 * curveball, rate) is None


def test_a_run_that_overflows_is_given_up():
    assert SOLVERS["SGD"](Rosenbrock(), np.random.default_rng(0), 1000, 10.0) is None


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "toys.json"
    main(["curveball-toys", "--seeds", "2", "--tuning-seeds", "1", "--most", "8", "--json", str(path)])
    study = ToyStudy.model_validate(json.loads(path.read_text()))
    assert len(study.results) == len(PROBLEMS) * len(SOLVERS)
    found = {(r.problem, r.method): r for r in study.results}
    assert found["Rosenbrock", "SGD"].mean is None
    solved = found["Rosenbrock", "Levenberg-Marquardt"]
    assert (solved.solved, solved.seeds) == (2, 2)
    out = capsys.readouterr().out
    assert "never" in out
    assert "Levenberg-Marquardt" in out
