"""Processes that need no seconds to import torch: forks of one that has imported it and done nothing else."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from processes import family, kill

_FORKS = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "torch._dynamo",  # which the first optimizer of a process imports
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "pytest",
    "preconditioner_client",
    "preconditioner_protos.v1.preconditioner_pb2_grpc",
]


def start_fork(
    function: Callable[..., object],
    *arguments: object,
    output: Path,
    errors: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function in a process of its own, with our environment as it is now.

    When the function has returned, the process ends as the interpreter does after a script, with what is
    registered for that, and its exit status is 0 only if this goes well too. One thread per operation.

    Args:
        function: can be pickled.
        arguments: of it.
        output: a file that what it prints is added to.
        errors: the same of standard error; may be the same file.
        environment: more variables.
    """
    # Libraries count their threads when they are loaded, which only the server of the forks does.
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        # A process has one such server, and others that are imported later may have set what it loads.
        _FORKS.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()
    process = _FORKS.Process(
        target=_call, args=(function, arguments, output, errors, {**os.environ, **(environment or {})})
    )
    process.start()
    return process


def _call(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    output: Path,
    errors: Path,
    environment: Mapping[str, str],
) -> None:
    # Collecting what all forks share would copy it, which takes seconds at the end of each.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((output, sys.stdout), (errors, sys.stderr)):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)
    # By itself a fork leaves without exit handlers and without finalizing modules and libraries.
    ctypes.pythonapi.Py_Exit(0)


def end_fork(process: BaseProcess) -> None:
    """End it and what it has started, whatever they do."""
    if process.is_alive():
        assert process.pid is not None
        kill(reversed(family(process.pid)))
    process.join()
