"""What a task of the study must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from preconditioner_worker.staleness.specs import StudySettings
from preconditioner_worker.workloads.base import Batch


class Task(ABC):
    """A model, its data and its measure; all of it a function of seeds alone.

    Attributes:
        name: as used on the command line and in results.
        metric: what is measured on held-out data, with its unit: nats, in which the margin is fixed.
        about: data and model in words, for the report.
        max_side: sides longer than this are not preconditioned.
        settings: of a study that does not say otherwise.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    about: ClassVar[str]
    max_side: ClassVar[int]
    settings: ClassVar[StudySettings]

    @classmethod
    @abstractmethod
    def open(cls) -> Task:
        """The task as studies use it; made once per process."""

    @property
    @abstractmethod
    def data_digest(self) -> str:
        """Of what the numbers depend on beside code and seeds: 16 hexadecimal digits."""

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """A freshly initialised model."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """The batch of training step ``step`` (from 0)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch."""

    @abstractmethod
    def held_out_loss(self, model: nn.Module) -> float:
        """Over all held-out data."""
