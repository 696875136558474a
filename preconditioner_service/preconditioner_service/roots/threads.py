"""How many threads BLAS and LAPACK may use in this process.

A Ray actor is placed by its `num_cpus`; BLAS libraries do not know of that and start a thread per core of the
host. numpy and scipy bring a BLAS library each, so both must be loaded before they can be bound: importing
this module does that.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

from .errors import InputError

_LOADED = (np, scipy.linalg)


class threads(threadpool_limits):  # type: ignore[misc]
    """Bind BLAS to n threads: for good when called, for a block when used in a `with` statement.

    `threads(2)` in an actor's constructor binds the process; `with threads(1): ...` puts the old limits back.
    The binding belongs to the process, not to the calling thread.

    Raises:
        InputError: n is not a positive integer.
    """

    def __init__(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"threads must be a positive integer, not {n!r}")
        super().__init__(limits=n, user_api="blas")
