"""What every rank runs."""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(module: str, folder: Path, only: Sequence[str]) -> None:
    """Run the scenarios of a module, or those with the names in ``only``, each with the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    for scenario in importlib.import_module(module).SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        began = time.monotonic()
        try:
            scenario(folder)
            dist.barrier()
        except BaseException:
            print(
                f"FAILED {scenario.__name__} on rank {dist.get_rank()}\n{traceback.format_exc()}", flush=True
            )
            os._exit(1)  # the others may wait for this rank in a collective
        if dist.get_rank() == 0:
            print(f"PASSED {scenario.__name__} {time.monotonic() - began:.2f} s", flush=True)
    dist.destroy_process_group()
