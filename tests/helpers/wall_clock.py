"""A wall clock that a test sets ahead or back, for the processes that it chooses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

DAY = 86_400
COMPILER = shutil.which("cc")


class Clock:
    """The wall clock of those who have ``environment``; their monotonic clock is the real one."""

    def __init__(self, folder):
        library, self._path = folder / "wall_clock.so", folder / "ahead"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_suffix(".c"), "-ldl"],
            check=True, timeout=60,
        )  # fmt: skip
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_FILE": str(self._path)}

    def set(self, ahead):
        """Seconds ahead of the real one."""
        part = self._path.with_suffix(".part")
        part.write_text(f"{ahead}\n")
        part.replace(self._path)
