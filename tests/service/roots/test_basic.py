"""The contract of inverse_root, without an oracle."""

from fractions import Fraction

import numpy as np
import pytest

from preconditioner_service.roots import (
    AbsoluteRidge,
    AsymmetricError,
    DtypeError,
    EmptyError,
    IndefiniteError,
    InputError,
    NotFiniteError,
    OrderError,
    PseudoInverse,
    RangeError,
    RelativeRidge,
    ResidualError,
    Root,
    RootError,
    ShapeError,
    TraceRidge,
    eigenbasis,
    inverse_root,
    inverse_roots,
    pack,
)


def wishart(n: int, seed: int = 0) -> np.ndarray:
    gradient = np.random.default_rng(seed).standard_normal((n, 2 * n))
    return gradient @ gradient.T


@pytest.mark.parametrize("n", [1, 2, 3, 17, 128, 300])
@pytest.mark.parametrize("p", [1, 2, 4, Fraction(4, 3), 4 / 3, 0.5])
def test_root_undoes_the_conditioned_matrix(n, p):
    matrix = wishart(n)
    root = inverse_root(matrix, p, dtype=np.float64)
    order = Fraction(p).limit_denominator(10)
    conditioned = matrix + root.diagnostics.ridge * np.eye(n)
    product = np.linalg.matrix_power(root.matrix, order.numerator) @ np.linalg.matrix_power(
        conditioned, order.denominator
    )
    np.testing.assert_allclose(product, np.eye(n), atol=1e-7)
    assert np.array_equal(root.matrix, root.matrix.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_equals_square(dtype):
    matrix = wishart(150).astype(np.float32).astype(dtype)
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    square, packed = inverse_root(matrix, 4), inverse_root(pack(matrix), 4)
    assert square.matrix.dtype == np.float32
    assert np.array_equal(square.matrix, packed.matrix)


def test_pack_is_the_upper_triangle_row_by_row():
    assert pack(np.arange(9.0).reshape(3, 3)).tolist() == [0, 1, 2, 4, 5, 8]


def test_input_is_never_modified():
    for matrix in (wishart(40), wishart(40).astype(np.float32), pack(wishart(40))):
        matrix.flags.writeable = False
        before = matrix.copy()
        inverse_root(matrix, 4)
        assert np.array_equal(matrix, before)


def test_nor_by_retries_pseudo_inverses_other_methods_and_stacks():
    singular = wishart(40)[:, :20] @ wishart(40)[:, :20].T
    for matrix, settings in (
        (singular, {"conditioning": AbsoluteRidge(0.0), "method": "eigh"}),
        (singular, {"conditioning": PseudoInverse(1e-9)}),
        (wishart(40), {"method": "schur_newton"}),
        (np.stack([wishart(40), singular]), {}),
        (wishart(40) + 1e-9 * np.triu(wishart(40)), {}),
    ):
        stack = matrix if matrix.ndim == 3 else matrix[None]
        stack.flags.writeable = False
        before = stack.copy()
        outcomes = inverse_roots(stack, 4, **settings)
        assert np.array_equal(stack, before)
        if settings.get("conditioning") == AbsoluteRidge(0.0):
            assert outcomes[0].diagnostics.retries > 0


@pytest.mark.parametrize("method", ["eigh", "schur_newton"])
@pytest.mark.parametrize("scale", [1e-20, 1.0])
def test_diagnostics_are_in_the_units_of_the_statistics(method, scale):
    matrix = scale * wishart(40)
    eigenvalues = np.linalg.eigvalsh(matrix)
    found = inverse_root(matrix, 4, method=method, dtype=np.float64).diagnostics
    assert found.method == method
    assert found.largest_eigenvalue == pytest.approx(eigenvalues[-1], rel=1e-6)
    assert found.smallest_eigenvalue == pytest.approx(eigenvalues[0], rel=1e-3)
    assert found.ridge == pytest.approx(1e-6 * eigenvalues[-1], rel=1e-6)
    condition = (eigenvalues[-1] + found.ridge) / (eigenvalues[0] + found.ridge)
    assert found.condition == pytest.approx(condition, rel=1e-3)
    assert (found.iterations > 0) == (method == "schur_newton")
    assert 0 < found.residual <= found.residual_bound
    assert found.seconds > 0
    assert (found.rank, found.retries, found.threshold) == (40, 0, 0.0)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (np.ones((2, 3)), ShapeError),
        (np.ones(4), ShapeError),
        (np.float64(3.0), ShapeError),
        (np.ones((2, 2, 2)), ShapeError),
        (np.ones((0, 0)), EmptyError),
        (np.ones(0), EmptyError),
        (np.eye(2, dtype=np.int64), DtypeError),
        (np.eye(2, dtype=np.float16), DtypeError),
        (np.eye(2, dtype=complex), DtypeError),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), NotFiniteError),
        (np.array([1.0, np.inf, 1.0]), NotFiniteError),
        (np.array([[-np.inf, 0.0], [0.0, 1.0]], dtype=np.float32), NotFiniteError),
        (np.array([[2.0, 1.0], [0.9, 2.0]]), AsymmetricError),
        (np.array([[2.0, 1e308], [-1e308, 2.0]]), AsymmetricError),
        (np.diag([1.0, -1e-3]), IndefiniteError),
        (-np.eye(3), IndefiniteError),
    ],
)
def test_bad_matrix_has_its_own_error(matrix, error):
    with pytest.raises(error) as caught:
        inverse_root(matrix, 4)
    assert isinstance(caught.value, RootError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "p", [0, -4, float("nan"), float("inf"), 3.14159265358979, 5000, Fraction(5000, 4999)]
)
def test_bad_order(p):
    with pytest.raises(OrderError):
        inverse_root(np.eye(2), p)


@pytest.mark.parametrize("p", ["4", None, True, 1j])
def test_order_of_a_wrong_type(p):
    with pytest.raises(OrderError):
        inverse_root(np.eye(2), p)


def test_bad_settings():
    for bad in (lambda: RelativeRidge(-1.0), lambda: AbsoluteRidge(np.nan), lambda: PseudoInverse(1.0)):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(InputError):
        TraceRidge("1")
    with pytest.raises(DtypeError):
        inverse_root(np.eye(2), 4, dtype=np.float16)
    with pytest.raises(InputError):
        inverse_root(np.eye(2), 4, method="svd")
    with pytest.raises(InputError):
        inverse_root(np.eye(2), 4, conditioning=1e-6)
    with pytest.raises(InputError):
        inverse_root(np.eye(2), 4, residual_bound=1.5)
    for residual_bound in ("x", float("nan")):
        with pytest.raises(InputError, match="residual_bound"):
            inverse_root(np.eye(2), 4, residual_bound=residual_bound)
    for retries in (-1, 17, 1.5):
        with pytest.raises(InputError, match="retries"):
            inverse_root(np.eye(2), 4, retries=retries)
    with pytest.raises(DtypeError, match="'foo'"):
        inverse_root(np.eye(2), 4, dtype="foo")


def test_errors_name_the_figure_and_the_way_out():
    with pytest.raises(IndefiniteError, match=r"-0\.001 .* G G\^T"):
        inverse_root(np.diag([1.0, -1e-3]), 4)
    with pytest.raises(AsymmetricError, match=r"0\.1.*symmetrise"):
        inverse_root(np.array([[2.0, 1.0], [0.9, 2.0]]), 4)
    with pytest.raises(RangeError, match=r"1e75.*float64"):
        inverse_root(np.diag([1.0, 1e-300]), 4, conditioning=AbsoluteRidge(0.0))


def test_zero_matrix():
    zero = np.zeros((4, 4), np.float32)
    for conditioning in (RelativeRidge(1e-4), TraceRidge(1e-4), AbsoluteRidge(1e-4)):
        root = inverse_root(zero, 4, conditioning=conditioning)
        np.testing.assert_allclose(root.matrix, 10.0 * np.eye(4), rtol=1e-6)
        assert root.diagnostics.ridge == pytest.approx(1e-4)
    assert not inverse_root(zero, 4, conditioning=PseudoInverse(1e-6)).matrix.any()
    with pytest.raises(ResidualError, match="larger ridge"):
        inverse_root(zero, 4, conditioning=AbsoluteRidge(0.0))


def test_conditionings_against_their_formulas():
    vectors = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    values = np.array([1e-9, 1.0, 8.0])
    matrix = (vectors * values) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    for conditioning, ridge in (
        (RelativeRidge(1e-3), 8e-3),
        (AbsoluteRidge(0.5), 0.5),
        (TraceRidge(1e-2), 3e-2),
    ):
        root = inverse_root(matrix, 2, conditioning=conditioning, dtype=np.float64)
        assert root.diagnostics.ridge == pytest.approx(ridge, rel=1e-8)
        expected = (vectors * (values + ridge) ** -0.5) @ vectors.T
        np.testing.assert_allclose(root.matrix, expected, rtol=1e-7)
    root = inverse_root(matrix, 2, conditioning=PseudoInverse(1e-6), dtype=np.float64)
    np.testing.assert_allclose(root.matrix, (vectors * [0.0, 1.0, 8.0**-0.5]) @ vectors.T, atol=1e-8)
    assert (root.diagnostics.rank, root.diagnostics.ridge) == (2, 0.0)
    assert root.diagnostics.threshold == pytest.approx(8e-6)


def test_rounding_level_faults_are_accepted():
    matrix = wishart(32).astype(np.float32)
    rank_one = np.outer(matrix[0], matrix[0])
    noise = np.random.default_rng(2).standard_normal((32, 32)).astype(np.float32)
    noisy = rank_one * (1 + np.finfo(np.float32).eps * noise)
    assert not np.array_equal(noisy, noisy.T)
    assert np.linalg.eigvalsh(noisy.astype(np.float64)).min() < 0
    root = inverse_root(noisy, 4)
    assert np.isfinite(root.matrix).all()
    assert root.diagnostics.retries == 0


def test_singular_without_ridge_is_retried_with_one():
    root = inverse_root(np.ones((6, 6)), 4, conditioning=AbsoluteRidge(0.0))
    assert root.diagnostics.retries > 0
    assert root.diagnostics.ridge > 0
    assert root.diagnostics.residual <= root.diagnostics.residual_bound
    with pytest.raises(ResidualError):
        inverse_root(np.ones((6, 6)), 4, conditioning=AbsoluteRidge(0.0), retries=0)


def test_batch_keeps_errors_in_place():
    stack = np.stack([wishart(20, seed) for seed in range(5)])
    stack[1] = np.nan
    stack[2, 0, 1] += 1.0
    stack[3] = -stack[3]
    results = inverse_roots(stack, 4)
    assert [type(r) for r in results] == [Root, NotFiniteError, AsymmetricError, IndefiniteError, Root]
    for i in (0, 4):
        assert np.array_equal(results[i].matrix, inverse_root(stack[i], 4).matrix)
    assert inverse_roots(np.zeros((0, 3, 3)), 4) == []


def test_float32_roots_whose_elements_would_lose_digits_are_refused():
    factor = np.random.default_rng(0).standard_normal((24, 48))
    matrix = factor @ factor.T
    top = inverse_root(matrix, 0.5, dtype=np.float64).matrix.max()

    def near(times):
        """The matrix whose root's largest element is so many times the least normal number."""
        return matrix * np.sqrt(top / (times * np.finfo(np.float32).tiny))

    with pytest.raises(RangeError, match="float64"):
        inverse_root(near(1.1), 0.5)
    exact = inverse_root(near(50), 0.5, dtype=np.float64).matrix
    error = np.linalg.norm(inverse_root(near(50), 0.5).matrix.astype(np.float64) - exact)
    assert error <= np.finfo(np.float32).eps * np.linalg.norm(exact)


@pytest.mark.parametrize("n", [3, 40, 150])
def test_an_eigenbasis_is_its_owners(n):
    first, second = (np.diag(np.arange(1.0, n + 1) * sign**2) for sign in (1, 2))
    second[0, 1] = second[1, 0] = 0.5
    basis = eigenbasis(first)
    values, vectors = basis.values.copy(), basis.vectors.copy()
    eigenbasis(second)
    inverse_root(second, 4)
    np.testing.assert_array_equal(basis.values, values)
    np.testing.assert_array_equal(basis.vectors, vectors)


def test_eigenbasis():
    matrix = wishart(50)
    basis = eigenbasis(matrix)
    assert (np.diff(basis.values) >= 0).all()
    np.testing.assert_allclose((basis.vectors * basis.values) @ basis.vectors.T, matrix, atol=1e-10)
    np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(50), atol=1e-13)
    shaken = eigenbasis(matrix * (1 + 1e-13))
    np.testing.assert_allclose(basis.vectors, shaken.vectors, atol=1e-9)
    tied = eigenbasis(np.array([[2.0, -1.0], [-1.0, 2.0]]))
    np.testing.assert_allclose(tied.vectors, np.sqrt(0.5) * np.array([[1, 1], [1, -1]]), atol=1e-15)
    np.testing.assert_allclose(eigenbasis(pack(matrix)).values, basis.values)
