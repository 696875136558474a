"""Judges what clients and services recorded against the rules that must always hold.

``check_history`` reads the files of any number of processes and returns what broke a rule. Every rule stands
in a module of its own under :mod:`preconditioner_worker.history.rules`.
"""

from preconditioner_worker.history.checking import Report, check_history, examine
from preconditioner_worker.history.violation import Expectations, Violation

__all__ = ["Expectations", "Report", "Violation", "check_history", "examine"]
