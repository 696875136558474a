"""B^(-1/p) to 50 digits, for matrices of up to some 64 rows.

The spectrum and its powers are mpmath's at 50 digits; only the last product is in the 80-bit (or wider) long
double, whose rounding is 1e-19: a thousand times finer than anything that is compared with it.
"""

from fractions import Fraction
from types import SimpleNamespace

import gmpy2
import mpmath
import numpy as np
from mpmath.matrices.eigen_symmetric import r_sy_tridiag, tridiag_eigen

DIGITS = 50
LONG = np.longdouble


class Entries(dict):
    """A square matrix as mpmath's algorithms want it."""

    def __init__(self, matrix):
        self.rows = len(matrix)
        super().__init__({at: gmpy2.mpfr(float(value)) for at, value in np.ndenumerate(matrix)})


def eigsy(matrix):
    """``mpmath.eigsy`` as lists of numbers of gmpy2: with mpmath's own they take eight times as long."""
    with mpmath.workdps(DIGITS), gmpy2.context(precision=mpmath.mp.prec):
        arithmetic = SimpleNamespace(
            dps=DIGITS,
            eps=gmpy2.exp2(1 - mpmath.mp.prec),
            sqrt=gmpy2.sqrt,
            hypot=gmpy2.hypot,
            isinf=gmpy2.is_infinite,
        )
        vectors = Entries(matrix)
        n = vectors.rows
        values, beside = [gmpy2.mpfr(0)] * n, [gmpy2.mpfr(0)] * n
        r_sy_tridiag(arithmetic, vectors, values, beside)
        tridiag_eigen(arithmetic, values, beside, vectors)
        return values, [[vectors[i, j] for j in range(n)] for i in range(n)]


class Oracle:
    """The exact spectral decomposition of one symmetric float64 matrix; negative eigenvalues count as zero.

    Args:
        matrix: (n, n).
        clips: False: they count as what they are.
    """

    def __init__(self, matrix, clips=True):
        assert np.finfo(LONG).eps < 1e-18, "needs a long double of 80 bits or more"
        values, vectors = eigsy(matrix)
        with mpmath.workdps(DIGITS):
            self.values = [mpmath.mpf(str(value)) for value in values]
            if clips:
                self.values = [max(value, mpmath.mpf(0)) for value in self.values]
        self.vectors = np.array([[LONG(str(entry)) for entry in row] for row in vectors])

    def condition(self, ridge):
        """Of B = A + ridge I."""
        with mpmath.workdps(DIGITS):
            smallest = min(self.values) + mpmath.mpf(ridge)
            return float((max(self.values) + mpmath.mpf(ridge)) / smallest) if smallest else float("inf")

    def root(self, p, ridge):
        """B^(-1/p) as long double."""
        order = Fraction(p).limit_denominator(100)
        with mpmath.workdps(DIGITS):
            exponent = -mpmath.mpf(order.denominator) / order.numerator
            powers = [LONG(str(mpmath.power(value + mpmath.mpf(ridge), exponent))) for value in self.values]
        return (self.vectors * np.array(powers)) @ self.vectors.T

    def pseudo_root(self, p, threshold):
        """(A^+)^(1/p), eigenvalues up to the threshold dropped."""
        order = Fraction(p).limit_denominator(100)
        with mpmath.workdps(DIGITS):
            exponent = -mpmath.mpf(order.denominator) / order.numerator
            powers = [
                LONG(str(mpmath.power(value, exponent))) if value > threshold else LONG(0)
                for value in self.values
            ]
        return (self.vectors * np.array(powers)) @ self.vectors.T


def relative_error(root, exact):
    """In the Frobenius norm."""
    difference = exact - root.astype(LONG)
    return float(np.sqrt((difference**2).sum()) / np.sqrt((exact**2).sum()))
