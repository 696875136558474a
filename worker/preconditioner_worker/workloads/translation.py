"""Translation of an artificial language with a small encoder-decoder Transformer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, Evaluation, Workload, seeded
from preconditioner_worker.workloads.encoder_decoder import EncoderDecoder
from preconditioner_worker.workloads.language import MOST_WORDS, Language

PAD, BEGIN, END, FIRST_WORD = 0, 1, 2, 3
LENGTH = MOST_WORDS + 1
"""Tokens of a source or target: words and an end, padded."""
HELD_OUT_SENTENCES = 512
TRAINING, HELD_OUT = 0, 1

# Shape suffixes: B batch, S source positions, T target positions.


class TranslationWorkload(Workload):
    """Sentences of :class:`Language`, drawn anew at every step; held-out ones from a stream of their own.

    Args:
        vocabulary: words of the language.
        batch_size: sentences a step.
        width: of the model.
        layers: of encoder and decoder each.
        heads: of the model.
    """

    name = "translation"
    metric = "held-out loss (nats per token)"

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        batch_size: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        self._language = Language(vocabulary)
        self._batch_size = batch_size
        self._vocabulary = FIRST_WORD + vocabulary
        self._width, self._layers, self._heads = width, layers, heads
        self.held_out = self._draw((HELD_OUT,), HELD_OUT_SENTENCES)

    def _draw(self, entropy: tuple[int, ...], count: int) -> Batch:
        random = Generator(PCG64(SeedSequence(entropy)))
        source, before, after = (np.full((count, LENGTH), PAD) for _ in range(3))
        for row in range(count):
            words = self._language.sentence(random)
            translated = self._language.translate(words) + FIRST_WORD
            source[row, : len(words)], source[row, len(words)] = words + FIRST_WORD, END
            before[row, 0], before[row, 1 : len(words) + 1] = BEGIN, translated
            after[row, : len(words)], after[row, len(words)] = translated, END
        return Batch(torch.from_numpy(np.concatenate([source, before], axis=1)), torch.from_numpy(after))

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Workload`."""
        with seeded(seed):
            return EncoderDecoder(
                vocabulary=self._vocabulary,
                length=LENGTH,
                padding=PAD,
                width=self._width,
                layers=self._layers,
                heads=self._heads,
            )

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Workload`. Inputs are (B, S + T), targets (B, T) and padded with 0."""
        return self._draw((TRAINING, seed, step), self._batch_size)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Workload`. Padding counts for nothing."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """See :class:`Workload`."""
        was_training = model.training
        model.eval()
        outputs = model(self.held_out.inputs)
        model.train(was_training)
        loss = self.criterion(outputs, self.held_out.targets)
        words = self.held_out.targets != PAD
        right = (outputs.argmax(dim=-1) == self.held_out.targets)[words]
        return Evaluation(loss.item(), right.double().mean().item())
