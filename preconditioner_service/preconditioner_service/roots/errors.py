"""What can go wrong with a root. Every message names the figure that failed and the way out."""

from __future__ import annotations


class RootError(ValueError):
    """No root is returned. The base of every error in this package."""


class InputError(RootError):
    """The arguments do not describe a symmetric matrix and a root of it."""


class ShapeError(InputError):
    """Neither a square matrix nor a packed upper triangle (nor a stack of them)."""


class EmptyError(InputError):
    """A matrix with no elements."""


class DtypeError(InputError):
    """Neither float32 nor float64."""


class OrderError(InputError):
    """The root's order p is not a positive rational within the supported range."""


class MethodError(InputError):
    """An unknown method, or one that cannot do what was asked of it."""


class NotFiniteError(RootError):
    """The matrix holds a NaN or an infinity."""


class AsymmetricError(RootError):
    """The matrix differs from its transpose by more than rounding."""


class IndefiniteError(RootError):
    """The matrix has an eigenvalue that is negative by more than rounding."""


class RangeError(RootError):
    """The root is correct but its elements do not fit the range of the output's dtype."""


class ResidualError(RootError):
    """No root within the residual bound, nor with any of the larger ridges that the budget allowed."""
