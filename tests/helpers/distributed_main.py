"""What every rank runs: ``distributed_main.py MODULE FOLDER [SCENARIO ..]``, under torchrun."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    module, folder, *only = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    for scenario in importlib.import_module(module).SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        began = time.monotonic()
        try:
            scenario(Path(folder))
            dist.barrier()
        except BaseException:
            print(
                f"FAILED {scenario.__name__} on rank {dist.get_rank()}\n{traceback.format_exc()}", flush=True
            )
            os._exit(1)  # the others may wait for this rank in a collective: torchrun ends them
        if dist.get_rank() == 0:
            print(f"PASSED {scenario.__name__} {time.monotonic() - began:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
