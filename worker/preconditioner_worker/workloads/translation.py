"""Translation of an artificial language with a small encoder-decoder Transformer."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, Evaluation, Workload, seeded
from preconditioner_worker.workloads.language import MOST_WORDS, Language

PAD, BEGIN, END, FIRST_WORD = 0, 1, 2, 3
LENGTH = MOST_WORDS + 1
"""Tokens of a source or target: words and an end, padded."""
HELD_OUT_SENTENCES = 512
TRAINING, HELD_OUT = 0, 1

Layer = TypeVar("Layer", nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# Shape suffixes: B batch, S source positions, T target positions, D width, V vocabulary.


class EncoderDecoder(nn.Module):
    """Pre-norm Transformer; inputs are source tokens and the target so far, side by side.

    Args:
        vocabulary: number of tokens V.
        width: D.
        layers: of the encoder, and as many of the decoder.
        heads: divides ``width``.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(LENGTH, width)
        self.target_positions = nn.Embedding(LENGTH, width)
        for embedding in (self.source, self.target, self.source_positions, self.target_positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)

        def layer(kind: type[Layer]) -> Layer:
            return kind(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

        self.encoder = nn.ModuleList(layer(nn.TransformerEncoderLayer) for _ in range(layers))
        self.decoder = nn.ModuleList(layer(nn.TransformerDecoderLayer) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the next target token, from tokens (B, S + T)."""
        source_BS, target_BT = tokens.split(LENGTH, dim=1)
        padding_BS = torch.zeros(source_BS.shape).masked_fill(source_BS == PAD, -math.inf)
        memory_BSD = self.source(source_BS) + self.source_positions.weight
        for layer in self.encoder:
            memory_BSD = layer(memory_BSD, src_key_padding_mask=padding_BS)
        memory_BSD = self.encoder_norm(memory_BSD)
        x_BTD = self.target(target_BT) + self.target_positions.weight
        causal_TT = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.decoder:
            x_BTD = layer(
                x_BTD, memory_BSD, tgt_mask=causal_TT, memory_key_padding_mask=padding_BS, tgt_is_causal=True
            )
        logits_BTV: Tensor = self.head(self.decoder_norm(x_BTD))
        return logits_BTV


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
        self._model = (FIRST_WORD + vocabulary, width, layers, heads)
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
            return EncoderDecoder(*self._model)

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
