"""What an inverse root costs beside the LAPACK calls in it, and beside what others do."""

from __future__ import annotations

import importlib
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
from scipy.linalg import blas, lapack

from preconditioner_service.roots import Root, inverse_roots, pack, threads

from .host import host, write_json

CONTENDERS = ("ours", "bare", "torch", "schur_newton")

_LEAST_SECONDS = 0.05
"""A contender runs that long before the next one does, so that each finds its own data in cache."""

Contender = Callable[[], float]


class BenchRoots(BaseModel):
    """Time inverse roots against bare LAPACK, the recipe of peers in torch, and Schur-Newton.

    One thread; times are the CPU time of that thread, which on an idle host is wall time. All contenders but
    Schur-Newton, which takes too long for that, run in turn in every repetition, and ratios are medians over
    repetitions, so that what else the host does falls on all of them. A run of a small size is a batch, and
    times are per root.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    sizes: list[PositiveInt] = Field([64, 128, 256, 512, 1024, 2048], description="rows of the matrices")
    order: float = Field(4.0, gt=0, description="p of A^(-1/p)")
    aspect: float = Field(2.0, gt=0, description="columns per row of the random gradient G in A = G G^T")
    packed: bool = Field(False, description="hand matrices over as packed upper triangles")
    batch: PositiveInt = Field(64, description="matrices in a batch")
    batched_up_to: int = Field(
        128, description="largest size in batches; the service sends small ones in such"
    )
    repeats: PositiveInt = Field(5, description="least repetitions for a size")
    seconds: float = Field(6.0, ge=0, description="least time for a size; more repetitions fill it")
    newton_up_to: int = Field(
        2048, description="largest size for Schur-Newton; from 1024 on it runs only once"
    )
    json_file: Path | None = Field(None, alias="json", description="write the result to this file")

    def cli_cmd(self) -> None:
        """Measure, print a table and write the JSON file if asked.

        Raises:
            SystemExit: torch is missing.
        """
        torch = load_torch()
        torch.set_num_threads(1)
        with threads(1):
            rows = [self._measure(n, torch) for n in self.sizes]
        result = {
            "host": {**host(), "torch": str(torch.__version__), "threads": 1},
            "settings": self.model_dump(mode="json", exclude={"json_file"}),
            "rows": rows,
        }
        Console().print(table(rows))
        if self.json_file is not None:
            write_json(self.json_file, result)

    def _measure(self, n: int, torch: Any) -> dict[str, Any]:
        count = self.batch if n <= self.batched_up_to else 1
        stack = statistics(n, count, self.aspect)
        contenders = {
            "ours": ours(stack, self.order, "eigh", self.packed),
            "bare": bare(stack, self.order),
            "torch": torch_recipe(stack, self.order, torch),
        }
        newton = ours(stack, self.order, "schur_newton", self.packed)
        inner = max(1, round(_LEAST_SECONDS / contenders["bare"]()))
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        started = time.perf_counter()
        while len(seconds["ours"]) < self.repeats or time.perf_counter() - started < self.seconds:
            names = list(contenders)
            turn = len(seconds["ours"]) % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(median(contenders[name]() for _ in range(inner)) / count)
        if n <= self.newton_up_to:
            seconds["schur_newton"] = [newton() / count for _ in range(1 if n >= 1024 else 3)]
        return {
            "n": n,
            "batch": count,
            "repetitions": len(seconds["ours"]),
            "seconds": {name: median(times) for name, times in seconds.items() if times},
            "ours_over": {
                name: median(a / b for a, b in zip(seconds["ours"], seconds[name], strict=False))
                for name in ("bare", "torch", "schur_newton")
                if seconds[name]
            },
        }


def load_torch() -> Any:
    """Return torch, which the service itself never loads.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise SystemExit(
            f"bench roots compares with torch, which cannot be imported here: {error}"
        ) from error


def statistics(n: int, count: int, aspect: float) -> NDArray[np.float32]:
    """Return Wishart statistics G G^T in float32, (count, n, n), G being (n, aspect * n)."""
    rng = np.random.default_rng(n)
    gradients = rng.standard_normal((count, n, max(1, round(aspect * n))), dtype=np.float32)
    return np.stack([gradient @ gradient.T for gradient in gradients])


def ours(stack: NDArray[np.float32], order: float, method: str, packed: bool) -> Contender:
    """All that the service does for a root: from float32 statistics to a verified float32 root."""
    matrices = np.stack([pack(matrix) for matrix in stack]) if packed else stack

    def run() -> float:
        began = time.thread_time()
        roots = inverse_roots(matrices, order, method=method)  # type: ignore[arg-type]
        seconds = time.thread_time() - began
        assert all(isinstance(root, Root) for root in roots), roots
        return seconds

    return run


def bare(stack: NDArray[np.float32], order: float) -> Contender:
    """The time inside `dsyevd` and `dsyrk` alone, in a loop, in place; what lies between is not counted."""

    def run() -> float:
        seconds = 0.0
        for matrix in stack:
            work = np.asfortranarray(matrix, dtype=np.float64)
            work[np.diag_indices(len(work))] += 1e-6 * work.max()
            began = time.thread_time()
            values, vectors, _ = lapack.dsyevd(work, lower=1, overwrite_a=1)
            seconds += time.thread_time() - began
            vectors *= np.maximum(values, values[-1] * 1e-6) ** (-0.5 / order)
            began = time.thread_time()
            blas.dsyrk(1.0, vectors, lower=1)
            seconds += time.thread_time() - began
        return seconds

    return run


def torch_recipe(stack: NDArray[np.float32], order: float, torch: Any) -> Contender:
    """The plain recipe of peers: float64 `eigh`, then `(Q * w) @ Q.T`, from float32 to float32."""
    tensors = [torch.from_numpy(matrix) for matrix in stack]

    def run() -> float:
        began = time.thread_time()
        for tensor in tensors:
            values, vectors = torch.linalg.eigh(tensor.double())
            values = values.clamp(min=0.0) + 1e-6 * values[-1]
            ((vectors * values.pow(-1.0 / order)) @ vectors.T).float()
        return time.thread_time() - began

    return run


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the measurements for people."""
    out = Table(title="milliseconds per root and ratios, one thread, medians", box=SIMPLE_HEAD)
    for name in ("n", "batch", "ours", "LAPACK", "torch", "Newton"):
        out.add_column(name, justify="right")
    for name in ("/ LAPACK", "/ torch", "/ Newton"):
        out.add_column(name, justify="right", style="bold")
    for row in rows:
        times = [row["seconds"].get(name) for name in CONTENDERS]
        ratios = [row["ours_over"].get(name) for name in CONTENDERS[1:]]
        out.add_row(
            str(row["n"]),
            str(row["batch"]),
            *("-" if value is None else f"{value * 1e3:.4g}" for value in times),
            *("-" if value is None else f"{value:.3f}" for value in ratios),
        )
    return out
