"""What a measurement has to say about where it was made."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_info


def host() -> dict[str, Any]:
    """Return processor, libraries and their threads."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "scipy": metadata.version("scipy"),
        "blas": [
            {
                key: pool.get(key)
                for key in ("prefix", "internal_api", "version", "architecture", "num_threads")
            }
            for pool in threadpool_info()
        ],
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result for machines to read."""
    path.write_text(json.dumps(result, indent=2) + "\n")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
