"""BLAS and LAPACK routines that scipy carries for Cython but has no Python functions for.

They work on memory that is ours, with leading dimensions, and without the interpreter's lock. To Fortran a
C-contiguous array is the transposed matrix: our rows are its columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

Routine = Callable[..., None]

_ARGUMENTS: dict[str, tuple[ModuleType, str]] = {
    "dgemm": (cython_blas, "cciiiddididdi"),
    "dtrsm": (cython_blas, "cccciiddidi"),
    "dsytrd": (cython_lapack, "cididdddii"),
    "dstedc": (cython_lapack, "cidddidiiii"),
}
"""By name: c for characters, i for integers, d for a double or an array of them."""

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@lru_cache(maxsize=len(_ARGUMENTS))
def routine(name: str) -> Routine | None:
    """Return a routine, or None where this scipy has another interface than the usual one of 32-bit integers.

    Its arguments are those of Fortran: bytes for characters, numbers for scalars, arrays (views start at
    their first element), and a ctypes.c_int for what is written.
    """
    module, arguments = _ARGUMENTS[name]
    capsule = getattr(module, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return None
    signature: bytes = _name(capsule)
    kinds = signature.decode().removeprefix("void (").removesuffix(")").split(", ")
    if "".join({"char *": "c", "int *": "i"}.get(kind, "d") for kind in kinds) != arguments:
        return None
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments))(_pointer(capsule, signature))

    def call(*values: object) -> None:
        function(*map(_reference, values))

    return call


def _reference(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    if isinstance(value, bytes):
        return value
    if isinstance(value, ctypes.c_int):
        return ctypes.byref(value)
    return ctypes.byref(ctypes.c_int(value) if isinstance(value, int) else ctypes.c_double(value))  # type: ignore[arg-type]
