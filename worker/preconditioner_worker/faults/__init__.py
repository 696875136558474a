"""Faults injected into real processes and connections, and the soak that draws them at random."""

from preconditioner_worker.faults.proxy import FaultyLink

__all__ = ["FaultyLink"]
