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

from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack

Routine = Callable[..., None]

_ARGUMENTS: dict[str, tuple[ModuleType, str]] = {
    "dgemm": (cython_blas, "cciiiddididdi"),
    "dsyrk": (cython_blas, "cciiddiddi"),
    "dtrsm": (cython_blas, "cccciiddidi"),
    "dsytrd": (cython_lapack, "cididdddii"),
    "dstedc": (cython_lapack, "cidddidiiii"),
    "dormtr": (cython_lapack, "ccciididdidii"),
}
"""By name: c for characters, i for integers, d for a double or an array of them."""

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@lru_cache(maxsize=len(_ARGUMENTS))
def routine(name: str) -> Routine | None:
    """Return a routine, or None where this scipy has another interface than the usual one of 32-bit integers.

    Its arguments are pointers, as Fortran's are: bytes for characters, `integer` and `real` for scalars,
    addresses or `ctypes.c_void_p` for arrays, of which the caller keeps the memory alive.
    """
    module, arguments = _ARGUMENTS[name]
    capsule = getattr(module, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return None
    signature: bytes = _name(capsule)
    kinds = signature.decode().removeprefix("void (").removesuffix(")").split(", ")
    if "".join({"char *": "c", "int *": "i"}.get(kind, "d") for kind in kinds) != arguments:
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments))(_pointer(capsule, signature))


def need(name: str) -> Routine:
    """Return a routine.

    Raises:
        RuntimeError: this scipy has another interface.
    """
    found = routine(name)
    if found is None:
        raise RuntimeError(f"this build of scipy has no {name} of the usual interface")
    return found


def address(array: NDArray[Any]) -> int:
    """Return where a writable, C-contiguous array begins: in a third of the time of `array.ctypes.data`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def integer(value: int) -> Any:
    """Return an integer argument; it may serve many calls."""
    return ctypes.byref(ctypes.c_int(value))


def real(value: float) -> Any:
    """Return a float64 argument; it may serve many calls."""
    return ctypes.byref(ctypes.c_double(value))
