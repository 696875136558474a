"""Matrix functions in float64, accurate, verified, at the speed of LAPACK.

    root = inverse_root(statistics, p=4, conditioning=RelativeRidge(1e-6))
    root.matrix            # (A + ridge I)^(-1/4), float32, exactly symmetric
    root.diagnostics       # condition, ridge, residual, ...

METHODS.md beside this file says which methods were tried and what they cost.
"""

from .basis import Eigenbasis, eigenbasis
from .calibration import Timing, calibrate
from .conditioning import AbsoluteRidge, Conditioning, PseudoInverse, RelativeRidge, TraceRidge
from .errors import (
    AsymmetricError,
    DtypeError,
    EmptyError,
    IndefiniteError,
    InputError,
    MethodError,
    NotFiniteError,
    OrderError,
    RangeError,
    ResidualError,
    RootError,
    ShapeError,
)
from .inverse import inverse_root, inverse_roots
from .result import Diagnostics, Method, Root
from .threads import threads
from .triangles import pack

__all__ = [
    "AbsoluteRidge",
    "AsymmetricError",
    "Conditioning",
    "Diagnostics",
    "DtypeError",
    "Eigenbasis",
    "EmptyError",
    "IndefiniteError",
    "InputError",
    "Method",
    "MethodError",
    "NotFiniteError",
    "OrderError",
    "PseudoInverse",
    "RangeError",
    "RelativeRidge",
    "ResidualError",
    "Root",
    "RootError",
    "ShapeError",
    "Timing",
    "TraceRidge",
    "calibrate",
    "eigenbasis",
    "inverse_root",
    "inverse_roots",
    "pack",
    "threads",
]
