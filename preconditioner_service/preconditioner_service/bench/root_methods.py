"""What might beat LAPACK's divide and conquer, tried on this host."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.linalg import lapack

from preconditioner_service.roots import spectrum, threads

from .host import host, write_json
from .roots import load_torch

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]
"""Eigenvalues (n,) and eigenvectors as columns (n, n)."""

_DRIFT = 0.05
_MOST_REFINEMENTS = 6
_GOOD = 1e-13


class BenchRootMethods(BaseModel):
    """Time candidates for the symmetric eigendecomposition, and say how accurate each is.

    One thread, CPU time, medians; all candidates in turn in every repetition. `error` is
    ||A - Q diag(w) Q^T|| / ||A||, `defect` is ||Q^T Q - I||, both in the Frobenius norm. "Previous vectors"
    start from the decomposition of statistics that have since drifted by 5%, as with an EMA.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    sizes: list[PositiveInt] = Field([64, 256, 512, 1024], description="rows of the matrices")
    repeats: PositiveInt = Field(5, description="repetitions for a size")
    batch: PositiveInt = Field(64, description="matrices in a batch, up to n = 128")
    json_file: Path | None = Field(None, alias="json", description="write the result to this file")

    def cli_cmd(self) -> None:
        """Measure, print a table and write the JSON file if asked.

        Raises:
            SystemExit: torch is missing.
        """
        torch = load_torch()
        torch.set_num_threads(1)
        with threads(1):
            rows = [row for n in self.sizes for row in self._measure(n, torch)]
        Console().print(_table(rows))
        if self.json_file is not None:
            result = {"host": {**host(), "torch": str(torch.__version__)}, "rows": rows}
            write_json(self.json_file, {**result, "settings": {"sizes": self.sizes, "repeats": self.repeats}})

    def _measure(self, n: int, torch: Any) -> list[dict[str, Any]]:
        rng = np.random.default_rng(n)
        old, new = (_wishart(rng, n) for _ in range(2))
        matrix = (1 - _DRIFT) * old + _DRIFT * new
        previous = divide_and_conquer(old)[1]
        candidates: dict[str, Callable[[], Pair]] = {
            "OpenBLAS dsyevd": lambda: divide_and_conquer(matrix),
            "the same, reflectors in larger blocks": lambda: larger_blocks(matrix),
            "OpenBLAS dsyevr (MRRR)": lambda: mrrr(matrix),
            "OpenBLAS dsyev (QR)": lambda: implicit_qr(matrix),
            "MKL float64 (torch)": lambda: mkl(matrix, torch, torch.float64),
            "MKL float32 (torch)": lambda: mkl(matrix, torch, torch.float32),
            "MKL float32 + refinement": lambda: refined(matrix, mkl(matrix, torch, torch.float32)[1]),
            "OpenBLAS float32": lambda: single(matrix),
            "OpenBLAS float32 + refinement": lambda: refined(matrix, single(matrix)[1]),
            "previous vectors + refinement": lambda: refined(matrix, previous),
            "previous vectors, rotated": lambda: rotated(matrix, previous),
        }
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        results = {name: run() for name, run in candidates.items()}
        for _ in range(self.repeats):
            for name, run in candidates.items():
                began = time.thread_time()
                run()
                seconds[name].append(time.thread_time() - began)
        if n <= 128:
            stack = np.stack([_wishart(rng, n) for _ in range(self.batch)])
            for name, whole in (
                ("numpy eigh, a stack at once", lambda: np.linalg.eigh(stack)),
                ("MKL, a stack at once", lambda: torch.linalg.eigh(torch.from_numpy(stack))),
            ):
                results[name] = results["OpenBLAS dsyevd"]
                seconds[name] = []
                for _ in range(self.repeats):
                    began = time.thread_time()
                    whole()
                    seconds[name].append((time.thread_time() - began) / self.batch)
        reference = median(seconds["OpenBLAS dsyevd"])
        return [
            {
                "n": n,
                "method": name,
                "seconds": median(times),
                "over_dsyevd": median(times) / reference,
                "error": _error(matrix, results[name]),
                "defect": float(np.linalg.norm(results[name][1].T @ results[name][1] - np.eye(n))),
            }
            for name, times in seconds.items()
        ]


def divide_and_conquer(matrix: Floats) -> Pair:
    """LAPACK xSYEVD."""
    values, vectors, _ = lapack.dsyevd(matrix, lower=1)
    return values, vectors


def larger_blocks(matrix: Floats) -> Pair:
    """xSYEVD in its three parts, the last one by larger blocks: what the service does with large matrices."""
    values, rows = spectrum.blocked(matrix.copy())
    return values, rows.T


def mrrr(matrix: Floats) -> Pair:
    """LAPACK xSYEVR: multiple relatively robust representations."""
    values, vectors, *_ = lapack.dsyevr(matrix, lower=1)
    return values, vectors


def implicit_qr(matrix: Floats) -> Pair:
    """LAPACK xSYEV."""
    values, vectors, _ = lapack.dsyev(matrix, lower=1)
    return values, vectors


def single(matrix: Floats) -> Pair:
    """LAPACK SSYEVD."""
    values, vectors, _ = lapack.ssyevd(matrix.astype(np.float32), lower=1)
    return values.astype(np.float64), vectors.astype(np.float64)


def mkl(matrix: Floats, torch: Any, dtype: Any) -> Pair:
    """What torch.linalg.eigh calls."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix).to(dtype))
    return values.double().numpy(), vectors.double().numpy()


def refined(matrix: Floats, vectors: Floats) -> Pair:
    """Refine approximate eigenvectors to float64; four products a step, up to six steps.

    Source: Ogita and Aishima, Iterative refinement for symmetric eigenvalue decomposition (Japan J. Indust.
    Appl. Math. 35, 2018), algorithm 1.
    """
    identity = np.eye(len(matrix))
    values: Floats = np.zeros(len(matrix))
    scale = float(np.linalg.norm(matrix))
    for _ in range(_MOST_REFINEMENTS):
        defect = identity - vectors.T @ vectors
        reduced = vectors.T @ (matrix @ vectors)
        values = np.diag(reduced) / (1.0 - np.diag(defect))
        off = float(np.linalg.norm(reduced - np.diag(values)))
        if off <= _GOOD * scale:
            break
        gap = values[None, :] - values[:, None]
        clustered = np.abs(gap) <= 2.0 * (off / len(matrix) + scale * float(np.abs(defect).max()))
        correction = np.where(
            clustered, 0.5 * defect, (reduced + values[None, :] * defect) / np.where(clustered, 1.0, gap)
        )
        vectors = vectors + vectors @ correction
    return values, vectors


def rotated(matrix: Floats, previous: Floats) -> Pair:
    """Decompose Q^T A Q, which is nearly diagonal, and turn Q by the result."""
    reduced = previous.T @ (matrix @ previous)
    values, vectors, _ = lapack.dsyevd((reduced + reduced.T) / 2, lower=1)
    return values, previous @ vectors


def _wishart(rng: np.random.Generator, n: int) -> Floats:
    gradient = rng.standard_normal((n, 2 * n))
    return gradient @ gradient.T / n


def _error(matrix: Floats, pair: Pair) -> float:
    values, vectors = pair
    return float(np.linalg.norm(matrix - (vectors * values) @ vectors.T) / np.linalg.norm(matrix))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="symmetric eigendecomposition, one thread", box=SIMPLE_HEAD)
    for name in ("n", "method", "ms", "/ dsyevd", "error", "defect"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(
            str(row["n"]),
            row["method"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['over_dsyevd']:.2f}",
            f"{row['error']:.1e}",
            f"{row['defect']:.1e}",
        )
    return table
