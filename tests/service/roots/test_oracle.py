"""Accuracy against 50 digits, over hostile inputs, for both methods."""

import importlib.util
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from preconditioner_service.roots import AbsoluteRidge, PseudoInverse, RelativeRidge, TraceRidge, inverse_root

_spec = importlib.util.spec_from_file_location("roots_oracle", Path(__file__).with_name("oracle.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
Oracle, relative_error = _module.Oracle, _module.relative_error

ORDERS = (1, Fraction(4, 3), 2, 4, 6, 8)
METHODS = ("eigh", "schur_newton")
DATA = Path(__file__).parent / "data" / "statistics.npz"


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def with_spectrum(values, seed=0):
    values = np.asarray(values, dtype=np.float64)
    vectors = orthogonal(len(values), seed)
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


def wishart(n, columns, seed=0):
    gradient = np.random.default_rng(seed).standard_normal((n, columns))
    return gradient @ gradient.T


def noisy(n):
    """Rank n/2 in float32, with negative eigenvalues and asymmetry at rounding level."""
    gradient = np.random.default_rng(3).standard_normal((n, n // 2)).astype(np.float32)
    matrix = gradient @ gradient.T
    noise = np.random.default_rng(4).standard_normal((n, n)).astype(np.float32)
    return (matrix * (1 + np.float32(6e-8) * noise)).astype(np.float32)


MATRICES = {
    "zero": lambda: np.zeros((5, 5)),
    "1x1": lambda: np.array([[3.0]]),
    "1x1 small": lambda: np.array([[3e-30]]),
    "2x2": lambda: np.array([[2.0, 1.0], [1.0, 2.0]]),
    "3x3 condition 9.9e5": lambda: with_spectrum([1 / 9.9e5, 0.3, 1.0]),
    "5x5 condition 3e6": lambda: with_spectrum([1 / 3e6, 1, 1, 1, 1.0]),
    "identity": lambda: np.eye(12),
    "diagonal": lambda: np.diag(np.geomspace(1e-5, 1e3, 12)),
    "rank 1": lambda: wishart(16, 1),
    "rank n/2": lambda: wishart(16, 8),
    "wishart": lambda: wishart(32, 64),
    "square wishart": lambda: wishart(24, 24),
    "clustered": lambda: with_spectrum(1 + np.finfo(float).eps * np.arange(16)),
    "two clusters": lambda: with_spectrum(np.r_[np.full(8, 1.01e-6), np.ones(8)]),
    "one small": lambda: with_spectrum(np.r_[1.01e-6, np.ones(23)]),
    "condition 1e3": lambda: with_spectrum(np.geomspace(1e-3, 1, 16)),
    "condition 1e6": lambda: with_spectrum(np.geomspace(1e-6, 1, 16)),
    "condition 1e9": lambda: with_spectrum(np.geomspace(1e-9, 1, 16)),
    "condition 1e12": lambda: with_spectrum(np.geomspace(1e-12, 1, 16)),
    "condition 1e16": lambda: with_spectrum(np.geomspace(1e-16, 1, 16)),
    "scale 1e-30": lambda: 1e-30 * wishart(12, 24),
    "scale 1e30": lambda: 1e30 * wishart(12, 24),
    "float32 subnormal": lambda: (1e-42 * wishart(6, 12)).astype(np.float32).astype(np.float64),
    "64 wishart": lambda: wishart(64, 128),
    "64 one small": lambda: with_spectrum(np.r_[1.01e-6, np.ones(63)]),
}
SLOW_ORDERS = {"64 wishart": (1, 4), "64 one small": (1, 4)}


@cache
def case(name):
    matrix = MATRICES[name]()
    matrix = np.tril(matrix) + np.tril(matrix, -1).T
    return matrix, Oracle(matrix)


def allowed(condition, n):
    return 1e-10 if condition <= 1e6 else 1e-16 * condition * n


def check(matrix, oracle, p, conditioning, method):
    root = inverse_root(matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    ridge = root.diagnostics.ridge
    condition = oracle.condition(ridge)
    error = relative_error(root.matrix, oracle.root(p, ridge))
    assert error <= allowed(condition, len(matrix)), (p, method, condition, root.diagnostics)
    assert np.array_equal(root.matrix, root.matrix.T)
    assert root.diagnostics.residual <= root.diagnostics.residual_bound
    return root


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MATRICES)
def test_relative_ridge(name, method):
    matrix, oracle = case(name)
    for p in SLOW_ORDERS.get(name, ORDERS):
        root = check(matrix, oracle, p, RelativeRidge(1e-6), method)
        largest = float(max(oracle.values)) or 1.0
        assert root.diagnostics.ridge == pytest.approx(1e-6 * largest, rel=1e-9)
        assert root.diagnostics.retries == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [name for name in MATRICES if name not in ("zero",) and not name.startswith(("rank", "64 w", "float32"))],
)
def test_without_a_ridge(name, method):
    matrix, oracle = case(name)
    for p in SLOW_ORDERS.get(name, ORDERS):
        root = check(matrix, oracle, p, AbsoluteRidge(0.0), method)
        if oracle.condition(0.0) < 1e13:
            assert root.diagnostics.retries == 0


@pytest.mark.parametrize(
    ("method", "low", "high", "seeds"),
    [
        # Where first-order correction ends, and where half of eps condition is more than 1e-10.
        ("eigh", 8e13, 3e14, (75, 81, 338, 439, 920, 964)),
        ("schur_newton", 8e5, 1e6, (395, 1224, 2143)),
    ],
)
def test_few_rows_of_which_one_in_hundreds_was_worse_than_promised(method, low, high, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 7))
        condition = 10 ** rng.uniform(np.log10(low), np.log10(high))
        matrix = with_spectrum(np.r_[1 / condition, np.ones(n - 1)], seed)
        check(matrix, Oracle(matrix), 1, AbsoluteRidge(0.0), method)


@pytest.mark.parametrize("method", METHODS)
def test_ridge_below_the_promised_condition(method):
    """A ridge of 1.02e-6 on a singular matrix: just inside what must be good to 1e-10."""
    for name in ("rank 1", "rank n/2"):
        matrix, oracle = case(name)
        for p in ORDERS:
            root = check(matrix, oracle, p, RelativeRidge(1.02e-6), method)
            assert root.diagnostics.condition < 1e6


@pytest.mark.parametrize("name", ["wishart", "rank n/2", "condition 1e3", "scale 1e30", "zero"])
def test_trace_ridge(name):
    matrix, oracle = case(name)
    for p in (1, 2, 4):
        check(matrix, oracle, p, TraceRidge(1e-3), "eigh")


@pytest.mark.parametrize(
    "name", ["rank 1", "rank n/2", "condition 1e3", "condition 1e9", "scale 1e-30", "identity"]
)
def test_pseudo_inverse(name):
    matrix, oracle = case(name)
    for p in ORDERS:
        root = inverse_root(matrix, p, conditioning=PseudoInverse(3e-7), dtype=np.float64)
        kept = [value for value in oracle.values if value > root.diagnostics.threshold]
        assert root.diagnostics.rank == len(kept)
        error = relative_error(root.matrix, oracle.pseudo_root(p, root.diagnostics.threshold))
        # Next to the threshold kept and dropped vectors mix by rounding over their gap.
        values = sorted(float(value) for value in oracle.values)
        gap = min(kept) - max([v for v in oracle.values if v <= root.diagnostics.threshold], default=0.0)
        mixing = 5e-15 * values[-1] / float(gap)
        assert error <= max(allowed(root.diagnostics.condition, len(matrix)), mixing), (p, root.diagnostics)


def test_negative_eigenvalues_and_asymmetry_at_rounding_level():
    matrix = noisy(16)
    mean = (matrix.astype(np.float64) + matrix.astype(np.float64).T) / 2
    oracle = Oracle(mean)
    assert np.linalg.eigvalsh(mean)[0] < 0
    for p in ORDERS:
        check(matrix, oracle, p, RelativeRidge(1e-6), "eigh")
        # Far below the negative eigenvalues: they count as zero, not as what they are.
        check(matrix, oracle, p, RelativeRidge(1e-11), "eigh")
    unclipped = Oracle(mean, clips=False)
    for p in ORDERS:
        # Newton's method never knows them, and takes the root of A + ridge I itself.
        check(matrix, unclipped, p, RelativeRidge(1e-6), "schur_newton")


@pytest.mark.parametrize("method", METHODS)
def test_captured_statistics(method):
    with np.load(DATA) as statistics:
        for name in statistics.files:
            matrix = statistics[name]
            if len(matrix) <= 32:
                oracle = real_oracle(name)
                check(matrix, oracle, 4, RelativeRidge(1e-6), method)
                check(matrix, oracle, 1, RelativeRidge(1e-4), method)


def test_larger_captured_statistics_have_the_same_root_by_both_methods():
    """Beside the smaller ones, which are held against the oracle."""
    with np.load(DATA) as statistics:
        larger = [statistics[name] for name in statistics.files if len(statistics[name]) > 32]
    assert larger
    for matrix in larger:
        for p in (1, 2, 4):
            roots = [
                inverse_root(matrix, p, conditioning=RelativeRidge(1e-6), method=method, dtype=np.float64)
                for method in METHODS
            ]
            assert [root.diagnostics.retries for root in roots] == [0, 0]
            assert relative_error(roots[0].matrix, roots[1].matrix) <= 1e-9


@cache
def real_oracle(name):
    with np.load(DATA) as statistics:
        return Oracle(statistics[name].astype(np.float64))


def test_float32_result_is_the_rounded_float64_result():
    matrix, _ = case("wishart")
    exact = inverse_root(matrix, 4, dtype=np.float64)
    assert np.array_equal(inverse_root(matrix, 4).matrix, exact.matrix.astype(np.float32))
