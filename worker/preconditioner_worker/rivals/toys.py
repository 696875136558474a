"""CurveBall and others on the toy problems: iterations to the solution, mean and deviation over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from preconditioner_worker.rivals.toy_contenders import GRIDS, SOLVERS
from preconditioner_worker.rivals.toy_problems import GOAL, PROBLEMS, ToyProblem

FIRST_TUNING_SEED = 10_000


class ToyResult(BaseModel):
    """One method on one problem.

    Attributes:
        problem: name.
        method: name.
        setting: the best of the grid: a learning rate, or the first damping.
        seeds: how many.
        solved: on how many of them the goal was reached.
        mean: iterations, over those that were solved; None if none was.
        deviation: standard deviation of the same; None for fewer than two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    problem: str
    method: str
    setting: float
    seeds: int
    solved: int
    mean: float | None
    deviation: float | None


class ToyStudy(BaseModel):
    """All methods on all problems.

    Attributes:
        goal: noiseless loss at which a problem is solved.
        most: iterations after which a run is given up.
        tuning_seeds: how many seeds chose the settings.
        results: by problem, then by method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    goal: float
    most: int
    tuning_seeds: int
    results: list[ToyResult]


def study(
    seeds: int, *, most: int, tuning_seeds: int, report: Callable[[ToyResult], None] = lambda result: None
) -> ToyStudy:
    """Run everything.

    Args:
        seeds: of starts and noise.
        most: iterations after which a run is given up.
        tuning_seeds: other seeds, which choose each method's setting from its grid.
        report: called after each method on a problem.
    """
    results = []
    for problem in PROBLEMS.values():
        for method in SOLVERS:
            setting = _tuned(problem, method, most, tuning_seeds)
            counts = _iterations(problem, method, setting, most, range(seeds))
            solved = [count for count in counts if count is not None]
            result = ToyResult(
                problem=problem.name,
                method=method,
                setting=setting,
                seeds=seeds,
                solved=len(solved),
                mean=fmean(solved) if solved else None,
                deviation=stdev(solved) if len(solved) > 1 else None,
            )
            results.append(result)
            report(result)
    return ToyStudy(goal=GOAL, most=most, tuning_seeds=tuning_seeds, results=results)


def _tuned(problem: ToyProblem, method: str, most: int, seeds: int) -> float:
    """The setting with the lowest mean; a run that did not arrive counts twice the most iterations."""
    grid = GRIDS[method]
    if len(grid) == 1:
        return grid[0]
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)

    def cost(setting: float) -> float:
        counts = _iterations(problem, method, setting, most, tuning)
        return fmean(2 * most if count is None else count for count in counts)

    return min(grid, key=cost)


def _iterations(
    problem: ToyProblem, method: str, setting: float, most: int, seeds: Sequence[int]
) -> list[int | None]:
    return [SOLVERS[method](problem, np.random.default_rng(seed), most, setting) for seed in seeds]


def table(toys: ToyStudy) -> Table:
    """Methods down, problems across: mean ± deviation, and the share that was solved where it is not all."""
    problems = list(dict.fromkeys(result.problem for result in toys.results))
    shown = Table(
        title=f"iterations to a loss below {toys.goal:g}, at most {toys.most}", box=box.SIMPLE, padding=(0, 1)
    )
    shown.add_column("", no_wrap=True)
    for problem in problems:
        shown.add_column(problem.replace(", ", "\n"), justify="right", no_wrap=True)
    for method in SOLVERS:
        own = {result.problem: result for result in toys.results if result.method == method}
        shown.add_row(method, *(_cell(own[problem]) for problem in problems))
    return shown


def _cell(result: ToyResult) -> str:
    if result.mean is None:
        return "never"
    text = f"{result.mean:.0f}"
    if result.deviation is not None:
        text += f" ± {result.deviation:.0f}"
    return text if result.solved == result.seeds else f"{text}\n({result.solved} of {result.seeds})"
