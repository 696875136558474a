"""The large-batch check: final quality against batch size at a fixed number of epochs.

What is compared is in :mod:`.design`.
"""

from preconditioner_worker.large_batch.analysis import Analysis, Row, analyse
from preconditioner_worker.large_batch.cells import make
from preconditioner_worker.large_batch.design import StudySettings
from preconditioner_worker.large_batch.report import report
from preconditioner_worker.large_batch.results import Cell, CellRun, Study

__all__ = ["Analysis", "Cell", "CellRun", "Row", "Study", "StudySettings", "analyse", "make", "report"]
