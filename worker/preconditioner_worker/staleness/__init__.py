"""The staleness study: how late a preconditioner may be before training suffers.

Arms and controls are in :mod:`.arms` and :mod:`.controls`, the criteria in :mod:`.criteria`.
"""

from preconditioner_worker.staleness.analysis import Analysis, analyse
from preconditioner_worker.staleness.arms import Arm, ArmKind
from preconditioner_worker.staleness.criteria import Verdict
from preconditioner_worker.staleness.report import report
from preconditioner_worker.staleness.results import Study, StudyRun
from preconditioner_worker.staleness.specs import RunSpec, StudySettings
from preconditioner_worker.staleness.training import train

__all__ = [
    "Analysis",
    "Arm",
    "ArmKind",
    "RunSpec",
    "Study",
    "StudyRun",
    "StudySettings",
    "Verdict",
    "analyse",
    "report",
    "train",
]
