"""The optimizers that Shampoo and K-FAC are measured against, and that torch does not have."""

from preconditioner_worker.rivals.curveball import CurveBall
from preconditioner_worker.rivals.lamb import LAMB
from preconditioner_worker.rivals.lars import LARS

__all__ = ["LAMB", "LARS", "CurveBall"]
