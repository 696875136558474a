"""What every rank runs: ``distributed_main.py FILE SCENARIO ARGUMENTS``, under torchrun."""

from __future__ import annotations

import importlib.util
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    path, scenario, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    spec = importlib.util.spec_from_file_location("scenarios", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenarios"] = module
    spec.loader.exec_module(module)
    getattr(module, scenario)(*arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
