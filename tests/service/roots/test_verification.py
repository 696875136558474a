"""A bad root must not get past verification, whoever made it."""

import threading
from fractions import Fraction

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from preconditioner_service.roots import (
    AbsoluteRidge,
    MethodError,
    PseudoInverse,
    RelativeRidge,
    ResidualError,
    by_eigh,
    by_newton,
    calibrate,
    calibration,
    inverse,
    inverse_root,
    inverse_roots,
    lanczos,
    newton,
    spectrum,
    threads,
)
from preconditioner_service.roots.order import Order, as_order
from preconditioner_service.roots.verification import factors


def wishart(n, columns, seed=0):
    gradient = np.random.default_rng(seed).standard_normal((n, columns))
    return gradient @ gradient.T


def spoilt(kind):
    honest = spectrum.decompose

    def decompose(matrix):
        values, rows = honest(matrix)
        if kind == "eigenvalue":
            values[0] *= 1.01
        elif kind == "vector":
            rows[0] = np.roll(rows[0], 1)
        elif kind == "kept vector":
            rows[-1] = np.roll(rows[-1], 1)
        elif kind == "element":
            rows[3, 5] += 1e-3
        elif kind == "nan":
            rows[1, 1] = np.nan
        elif kind == "swapped":
            values[[1, 2]] = values[[2, 1]]
        return values, rows

    return decompose


@pytest.mark.parametrize("kind", ["eigenvalue", "vector", "element", "nan", "swapped"])
@pytest.mark.parametrize("p", [1, 4, Fraction(4, 3)])
@pytest.mark.parametrize("n", [24, 100])
def test_sabotaged_decomposition_is_not_published(monkeypatch, kind, p, n):
    monkeypatch.setattr(spectrum, "decompose", spoilt(kind))
    with pytest.raises(ResidualError, match=r"exceeds the bound .* after 3 retries"):
        inverse_root(wishart(n, 2 * n), p, method="eigh", conditioning=RelativeRidge(1e-6))


@pytest.mark.parametrize("p", [1, 4])
def test_sabotaged_product_is_not_published(monkeypatch, p):
    honest = by_eigh._gram

    def gram(factor, out):
        honest(factor, out)
        out[:, 2, 7] += 1e-5 * np.abs(out).max()

    monkeypatch.setattr(by_eigh, "_gram", gram)
    with pytest.raises(ResidualError):
        inverse_root(wishart(30, 60), p, method="eigh")


def test_sabotaged_newton_is_not_published(monkeypatch):
    honest = newton.coupled_newton

    def early(matrix, m, largest):
        root, iterations = honest(matrix, m, largest)
        return root * (1 + 1e-6), iterations

    monkeypatch.setattr(by_newton, "coupled_newton", early)
    with pytest.raises(ResidualError):
        inverse_root(wishart(30, 60), 4, method="schur_newton")


def test_one_sabotaged_matrix_of_a_batch(monkeypatch):
    honest, calls = spectrum.decompose, []

    def decompose(matrix):
        calls.append(matrix)
        values, rows = honest(matrix)
        if len(calls) == 3:
            rows[0] = 0.0
        return values, rows

    monkeypatch.setattr(spectrum, "decompose", decompose)
    results = inverse_roots(np.stack([wishart(20, 40, seed) for seed in range(6)]), 4, method="eigh")
    assert [isinstance(result, ResidualError) for result in results] == [i == 2 for i in range(6)]


def test_lapack_failure_is_a_root_error(monkeypatch):
    def decompose(matrix):
        raise np.linalg.LinAlgError("dsyevd did not converge (info = 3)")

    monkeypatch.setattr(spectrum, "decompose", decompose)
    with pytest.raises(ResidualError, match="did not converge"):
        inverse_root(np.eye(3), 4, method="eigh")


def test_pseudo_inverse_is_verified_too(monkeypatch):
    monkeypatch.setattr(spectrum, "decompose", spoilt("kept vector"))
    with pytest.raises(ResidualError):
        inverse_root(wishart(24, 12), 4, conditioning=PseudoInverse(1e-6))


def test_residual_bound_and_retry_budget():
    matrix = wishart(30, 15)
    tight = AbsoluteRidge(1e-11)
    loose = inverse_root(matrix, 4, conditioning=tight)
    assert loose.diagnostics.retries == 0
    stricter = loose.diagnostics.residual / 100
    retried = inverse_root(matrix, 4, conditioning=tight, residual_bound=stricter, retries=6)
    assert retried.diagnostics.retries > 0
    assert retried.diagnostics.residual <= stricter == retried.diagnostics.residual_bound
    assert retried.diagnostics.ridge == pytest.approx(1e-11 * 10.0**retried.diagnostics.retries, rel=1e-2)
    with pytest.raises(ResidualError, match="after 1 retries"):
        inverse_root(matrix, 4, conditioning=tight, residual_bound=1e-17, retries=1)


def test_newton_has_no_pseudo_inverse_and_says_so():
    with pytest.raises(MethodError, match="eigh"):
        inverse_root(np.eye(3), 4, conditioning=PseudoInverse(1e-6), method="schur_newton")
    assert inverse_root(np.eye(3), 4, conditioning=PseudoInverse(1e-6)).diagnostics.method == "eigh"


@pytest.mark.parametrize("p", [1, 2, 4, 8, 4 / 3, 0.5, Fraction(3, 7), Fraction(1, 5), Fraction(1000, 999)])
def test_factors_keep_the_exponent_small(p):
    order = as_order(p)
    running = Fraction(0)
    for is_b in factors(order):
        running += 1 if is_b else Fraction(order.exponent).limit_denominator(10_000)
        assert -1 / Fraction(order.numerator, order.denominator) < running <= 1
    assert running == 0
    assert (factors(order).count(True), factors(order).count(False)) == (order.denominator, order.numerator)


def test_newton_iteration_alone():
    matrix = wishart(40, 80)
    root, iterations = newton.coupled_newton(matrix, 4, float(np.linalg.eigvalsh(matrix)[-1]))
    np.testing.assert_allclose(np.linalg.matrix_power(root, 4) @ matrix, np.eye(40), atol=1e-10)
    assert 0 < iterations < 30
    # Half of the largest eigenvalue is enough for convergence.
    other, _ = newton.coupled_newton(matrix, 4, 0.51 * float(np.linalg.eigvalsh(matrix)[-1]))
    np.testing.assert_allclose(other, root, atol=1e-10)


def test_newton_iteration_returns_the_best_iterate_where_the_next_is_worse(monkeypatch):
    matrix = wishart(12, 48)
    largest = float(np.linalg.eigvalsh(matrix)[-1])
    monkeypatch.setattr(newton, "MOST_ITERATIONS", 4)
    fourth, _ = newton.coupled_newton(matrix, 4, largest)
    monkeypatch.setattr(newton, "MOST_ITERATIONS", 100)
    honest, distances = newton._distance_from_identity, []

    def distance(iterate):
        distances.append(honest(iterate) * (1e3 if len(distances) > 4 else 1.0))
        return distances[-1]

    monkeypatch.setattr(newton, "_distance_from_identity", distance)
    root, iterations = newton.coupled_newton(matrix, 4, largest)
    assert iterations == 5
    assert min(distances) == distances[4] < distances[5]
    assert np.array_equal(root, fourth)


def test_calibration_is_measured_once_and_decides(monkeypatch):
    monkeypatch.setattr(calibration, "_timings", {})
    measured = []
    honest = calibration._measure
    monkeypatch.setattr(calibration, "_measure", lambda n: measured.append(n) or honest(n))
    monkeypatch.setattr(calibration, "SIZES", (16, 32))
    callers = [threading.Thread(target=calibrate) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(measured) == [16, 32]
    for eigh, product, expected in ((1.0, 1.0, "eigh"), (1e4, 1.0, "schur_newton")):
        table = {n: calibration.Timing(n, eigh, product) for n in (16, 32)}
        monkeypatch.setattr(calibration, "_timings", table)
        assert calibration.choose(20, Order(4, 1), RelativeRidge(1e-6)) == expected
        assert calibration.choose(20, Order(4, 1), PseudoInverse(1e-6)) == "eigh"
        assert inverse_root(wishart(20, 40), 4).diagnostics.method == expected


@pytest.mark.parametrize("n", [48, 160])
def test_auto_clips_also_where_newton_is_faster(monkeypatch, n):
    """Statistics summed in float32 from few gradients have eigenvalues below zero, and beside the ridge."""
    rng = np.random.default_rng(3)
    statistics = np.zeros((n, n), np.float32)
    for _ in range(40):
        gradient = rng.standard_normal((n, 2)).astype(np.float32) @ np.ones((2, 2), np.float32)
        statistics += gradient @ gradient.T
    harmless = wishart(n, 2 * n).astype(np.float32)
    stack = np.stack([statistics, harmless])
    expected = inverse_roots(stack, 4, method="eigh")
    monkeypatch.setattr(inverse, "choose", lambda *_: "schur_newton")
    found = inverse_roots(stack, 4)
    assert [root.diagnostics.method for root in found] == ["eigh", "schur_newton"]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.matrix - other.matrix).max() <= 1e-6 * np.abs(other.matrix).max()
        assert one.diagnostics.retries == 0
    # Asked for by name it is what it is: of B as it stands, or with a larger ridge.
    (unclipped,) = inverse_roots(stack[:1], 4, method="schur_newton")
    assert unclipped.diagnostics.method == "schur_newton"
    difference = np.abs(unclipped.matrix - expected[0].matrix).max()
    assert difference > 1e-6 * np.abs(expected[0].matrix).max()


def test_threads():
    def bound():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = bound()
    with threads(1):
        assert bound() == [1] * len(before)
    assert bound() == before
    with pytest.raises(ValueError, match="positive"):
        threads(0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1024, 4096])
def test_large(n):
    gradient = np.random.default_rng(0).standard_normal((n, n // 8), dtype=np.float32)
    root = inverse_root(gradient @ gradient.T, 4)
    assert root.diagnostics.residual <= root.diagnostics.residual_bound < 1e-4
    assert root.diagnostics.retries == 0
    assert np.array_equal(root.matrix, root.matrix.T)
    assert np.isfinite(root.matrix).all()


@pytest.mark.parametrize("n", [24, 200])
def test_the_largest_eigenvalue_is_found_though_the_first_vector_has_no_part_in_it(n):
    first = np.random.default_rng((lanczos._SEED, n)).standard_normal(n)
    direction = np.random.default_rng(0).standard_normal(n)
    direction -= first * (first @ direction) / (first @ first)
    direction /= np.linalg.norm(direction)
    for height in (3.0, 1000.0):
        matrix = np.eye(n) + height * np.outer(direction, direction)
        assert lanczos.largest_eigenvalue(matrix) == pytest.approx(1.0 + height, rel=1e-9)
        root = inverse_root(matrix, 4, method="schur_newton", dtype=np.float64)
        assert root.diagnostics.retries == 0
    assert lanczos.largest_eigenvalue(np.zeros((n, n))) == 0.0
    assert lanczos.largest_eigenvalue(-np.eye(n)) == pytest.approx(-1.0)
