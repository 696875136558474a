"""The next byte of real text: small enough that 12,000 steps take minutes, and such that directions matter.

Text is drawn anew at every step, so that held-out loss says how well a method optimises and not how much
it overfits. (A deep autoencoder of scikit-learn's digits overfits long before 12,000 steps, and the grafted
diagonal then ends below Shampoo: no task for this.)
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.staleness.specs import StudySettings
from preconditioner_worker.staleness.task import Task
from preconditioner_worker.workloads.base import Batch, generator, seeded
from preconditioner_worker.workloads.text import Corpus, read_corpus


class NextByte(nn.Module):
    """A feed-forward language model: embeddings of the last bytes, hidden layers, logits of the next."""

    def __init__(self, context: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        widths = [context * embedding, *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, 256) from bytes (batch, context)."""
        x = self.embedding(tokens).flatten(1)
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


class TextTask(Task):
    """The next byte of the standard library's source from the eight before it.

    Args:
        corpus: where text is drawn from.
        batch_size: predictions a step.
        held_out: predictions of an evaluation, spread evenly over the held-out text.
    """

    name = "text"
    metric = "held-out loss (nats per byte)"
    about = (
        "the next byte of the standard library's source from the eight before it, by a feed-forward language "
        "model with two hidden layers of 64; 128 predictions a step"
    )
    max_side = 128
    """The vocabulary is not preconditioned: one-sided for embedding and logits, as published."""
    settings = StudySettings(task=name)
    _context: ClassVar[int] = 8

    def __init__(self, corpus: Corpus, *, batch_size: int = 128, held_out: int = 4096) -> None:
        self.corpus = corpus
        self._batch_size = batch_size
        starts = np.linspace(0, len(corpus.held_out) - self._context - 1, held_out).astype(np.int64)
        self._held_out = self._cut(corpus.held_out, starts)

    @classmethod
    @cache
    def open(cls) -> TextTask:
        """On the source of the running Python's standard library; read once per process."""
        return cls(read_corpus(None, least=20_000))

    @property
    def data_digest(self) -> str:
        """See :class:`Task`."""
        return self.corpus.digest

    def _cut(self, text: Tensor, starts: NDArray[np.int64]) -> Batch:
        rows = torch.from_numpy(starts)[:, None] + torch.arange(self._context + 1)
        tokens = text[rows].long()
        return Batch(tokens[:, :-1], tokens[:, -1])

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Task`."""
        with seeded(seed):
            return NextByte(self._context, embedding=16, hidden=64, layers=2)

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Task`."""
        starts = generator(seed, step).integers(
            len(self.corpus.train) - self._context - 1, size=self._batch_size
        )
        return self._cut(self.corpus.train, starts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(batch.inputs), batch.targets)

    def held_out_loss(self, model: nn.Module) -> float:
        """Over all held-out predictions."""
        with torch.no_grad():
            return float(self.loss(model, self._held_out))
