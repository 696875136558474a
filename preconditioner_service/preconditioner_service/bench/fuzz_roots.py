"""Random matrices, hostile ones among them, against what the roots promise."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from preconditioner_service.roots import (
    AbsoluteRidge,
    Conditioning,
    PseudoInverse,
    RelativeRidge,
    Root,
    RootError,
    TraceRidge,
    inverse_roots,
    pack,
    threads,
)

from .host import host, write_json

ORDERS = (1, 4 / 3, 2, 4, 6, 8, 0.5)
KINDS = (
    "wishart",
    "low rank",
    "graded",
    "clustered",
    "diagonal",
    "scaled",
    "zero",
    "noisy",
    "asymmetric",
    "indefinite",
    "not finite",
)
_BATCH = 16
_CHECKED_UP_TO_CONDITION = 1e8
_SLACK = 16.0


class FuzzRoots(BaseModel):
    """Compute roots of many random small matrices and check every result independently.

    A result counts as wrong if it is not finite, not exactly symmetric, has a residual beyond its bound, or
    differs from an independent decomposition by more than rounding and the dtype
    explain. An exception other than the documented ones counts as unexpected. Either fails the command.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    count: PositiveInt = Field(100_000, description="matrices")
    seed: NonNegativeInt = Field(0, description="of the random generator")
    largest: PositiveInt = Field(24, description="most rows")
    json_file: Path | None = Field(None, alias="json", description="write the result to this file")

    def cli_cmd(self) -> None:
        """Run, print a table and write the JSON file if asked.

        Raises:
            SystemExit: something was wrong or unexpected.
        """
        with threads(1):
            result = self.run()
        Console().print(_table(result))
        if self.json_file is not None:
            write_json(self.json_file, {"host": host(), **result})
        if result["wrong"] or result["unexpected"]:
            raise SystemExit(
                f"{result['wrong']} wrong, {result['unexpected']} unexpected: {result['examples']}"
            )

    def run(self) -> dict[str, Any]:
        """Return counts by kind of matrix and outcome, and examples of what went wrong."""
        rng = np.random.default_rng(self.seed)
        outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        totals: Counter[str] = Counter()
        examples: list[str] = []
        worst = 0.0
        began = time.perf_counter()
        for kind, stack, settings in _cases(rng, self.count, self.largest):
            try:
                results = inverse_roots(stack, **settings)
            except RootError as error:
                totals["matrices"] += len(stack)
                outcomes[kind][type(error).__name__] += len(stack)
                continue
            except Exception as error:  # any exception here is a finding
                totals["unexpected"] += len(stack)
                examples.append(f"{kind} {settings}: {error!r}")
                continue
            totals["matrices"] += len(stack)
            for matrix, result in zip(stack, results, strict=True):
                if isinstance(result, Root):
                    outcomes[kind]["root"] += 1
                    totals["retried"] += result.diagnostics.retries > 0
                    worst = max(worst, _ratio(result))
                    fault = _fault(matrix, result, settings)
                    if fault is not None:
                        totals["wrong"] += 1
                        examples.append(f"{kind} {settings}: {fault}")
                elif isinstance(result, RootError):
                    outcomes[kind][type(result).__name__] += 1
        return {
            "settings": self.model_dump(mode="json", exclude={"json_file"}),
            "matrices": totals["matrices"],
            "roots": sum(counter["root"] for counter in outcomes.values()),
            "retried": totals["retried"],
            "wrong": totals["wrong"],
            "unexpected": totals["unexpected"],
            "worst_residual_over_bound": worst,
            "seconds": time.perf_counter() - began,
            "outcomes": {kind: dict(counter) for kind, counter in outcomes.items()},
            "examples": examples[:10],
        }


def _cases(
    rng: np.random.Generator, count: int, largest: int
) -> Iterator[tuple[str, NDArray[Any], dict[str, Any]]]:
    """Yield batches of equal size and settings."""
    while count > 0:
        batch = min(_BATCH, count)
        count -= batch
        kind = KINDS[rng.integers(len(KINDS))]
        n = int(rng.integers(1, largest + 1))
        dtype = (np.float32, np.float64)[rng.integers(2)]
        stack = np.stack([_matrix(rng, kind, n) for _ in range(batch)]).astype(dtype)
        if kind == "not finite":
            stack[:, rng.integers(n), rng.integers(n)] = rng.choice([np.nan, np.inf, -np.inf])
        if rng.integers(4) == 0:
            stack = np.stack([pack(matrix) for matrix in stack])
        yield (
            kind,
            stack,
            {
                "p": ORDERS[rng.integers(len(ORDERS))],
                "conditioning": _conditioning(rng),
                "method": "schur_newton" if rng.integers(8) == 0 else "eigh",
                "dtype": (np.float32, np.float64)[rng.integers(2)],
            },
        )


def _conditioning(rng: np.random.Generator) -> Conditioning:
    exponent = 10.0 ** rng.integers(-14, 0)
    choices: tuple[Conditioning, ...] = (
        RelativeRidge(1e-6),
        RelativeRidge(exponent),
        TraceRidge(exponent),
        AbsoluteRidge(exponent),
        AbsoluteRidge(0.0),
        PseudoInverse(exponent),
    )
    return choices[rng.integers(len(choices))]


def _matrix(rng: np.random.Generator, kind: str, n: int) -> NDArray[np.float64]:
    if kind == "zero":
        return np.zeros((n, n))
    if kind == "diagonal":
        return np.diag(10.0 ** rng.uniform(-20, 4, n))
    rank = max(1, n // int(rng.integers(1, 5))) if kind == "low rank" else 2 * n
    gradient = rng.standard_normal((n, rank))
    wishart: NDArray[np.float64] = gradient @ gradient.T
    if kind in ("graded", "clustered", "indefinite"):
        vectors = np.linalg.qr(wishart)[0]
        values = {
            "graded": 10.0 ** rng.uniform(-float(rng.uniform(0, 17)), 0, n),
            "clustered": rng.choice([1.0, 1.0 + 1e-15, 10.0 ** float(rng.uniform(-16, 0))], n),
            "indefinite": rng.uniform(-1, 1, n),
        }[kind]
        matrix = (vectors * values) @ vectors.T
        wishart = (matrix + matrix.T) / 2
    if kind == "scaled":
        wishart = wishart * 10.0 ** float(rng.uniform(-40, 34))
    if kind == "noisy":
        wishart = wishart * (1 + 1e-16 * rng.standard_normal((n, n)))
    if kind == "asymmetric":
        wishart = wishart * (1 + 10.0 ** float(rng.uniform(-17, 0)) * rng.standard_normal((n, n)))
    return wishart


def _ratio(root: Root) -> float:
    return root.diagnostics.residual / root.diagnostics.residual_bound


def _fault(matrix: NDArray[Any], root: Root, settings: dict[str, Any]) -> str | None:
    """Return what is wrong with a root, by an independent computation; None if nothing is."""
    figures = root.diagnostics
    out = root.matrix
    if not np.isfinite(out).all():
        return "not finite"
    if not np.array_equal(out, out.T):
        return "not symmetric"
    if not figures.residual <= figures.residual_bound:
        return f"residual {figures.residual} beyond {figures.residual_bound}"
    if figures.condition > _CHECKED_UP_TO_CONDITION:
        return None
    n = len(out)
    exact = matrix.astype(np.float64)
    if exact.ndim == 1:
        square = np.zeros((n, n))
        square[np.triu_indices(n)] = exact
        exact = square + np.triu(square, 1).T
    values, vectors = np.linalg.eigh((exact + exact.T) / 2)
    clipped = np.maximum(values, 0.0)
    exponent = -1.0 / settings["p"]
    if isinstance(settings["conditioning"], PseudoInverse):
        kept = clipped > figures.threshold
        if np.abs(clipped - figures.threshold).min() <= 1e-12 * clipped[-1]:
            return None
        powers = np.where(kept, np.where(kept, clipped, 1.0) ** exponent, 0.0)
    else:
        powers = (clipped + figures.ridge) ** exponent
    expected = (vectors * powers) @ vectors.T
    length = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(expected - out))
    eps = float(np.finfo(np.float64).eps)
    growth = figures.condition ** max(1.0, -exponent)
    allowed = _SLACK * max(1.0, -exponent) * n * eps * growth
    allowed += float(np.finfo(out.dtype).eps) + (0.0 if length else 1.0)
    if settings["method"] == "schur_newton" and figures.ridge > 0:
        # Eigenvalues are not clipped there.
        allowed += max(0.0, -float(values[0])) / figures.ridge * max(1.0, -exponent) * 2
    if error > allowed * max(length, 1e-300):
        return f"relative error {error / length:.3g} beyond {allowed:.3g}, condition {figures.condition:.3g}"
    return None


def _table(result: dict[str, Any]) -> Table:
    names = sorted({name for counts in result["outcomes"].values() for name in counts} - {"root"})
    title = (
        f"{result['matrices']} matrices, {result['roots']} roots, {result['retried']} after retries; "
        f"{result['wrong']} wrong, {result['unexpected']} unexpected exceptions; "
        f"largest residual / bound {result['worst_residual_over_bound']:.2g}; {result['seconds']:.1f} s"
    )
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("kind", "root", *names):
        short = name.removesuffix("Error")
        table.add_column(short, justify="left" if name == "kind" else "right")
    for kind, counts in result["outcomes"].items():
        table.add_row(kind, *(str(counts.get(name, 0)) for name in ("root", *names)))
    return table
