"""A small decoder Transformer: pre-norm, learned positions, no biases, so that almost all is matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shape suffixes: B batch, T positions, S those looked at, D width, H heads, K width of a head, V vocabulary.


class Attention(nn.Module):
    """Causal self-attention, or attention to given positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Apart rather than fused: each has curvature of its own, and a preconditioner of its own.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def _split(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        return x_BTD.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(
        self, x_BTD: Tensor, memory_BSD: Tensor | None = None, visible_B11S: Tensor | None = None
    ) -> Tensor:
        """Mix positions.

        Args:
            x_BTD: what asks.
            memory_BSD: what is looked at; None: ``x_BTD`` itself.
            visible_B11S: which of it can be seen, by all alike; None: what is not later.
        """
        source = x_BTD if memory_BSD is None else memory_BSD
        q_BHTK, k_BHSK, v_BHSK = (
            self._split(f(x)) for f, x in ((self.query, x_BTD), (self.key, source), (self.value, source))
        )
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHSK, v_BHSK, attn_mask=visible_B11S, is_causal=visible_B11S is None
        )
        mixed: Tensor = self.output(y_BHTK.transpose(1, 2).reshape(x_BTD.shape))
        return mixed


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each on a residual branch behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.expand_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One layer."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        y_BTD: Tensor = self.contract(F.relu(self.expand(self.expand_norm(x_BTD))).square())
        return x_BTD + y_BTD


class Transformer(nn.Module):
    """Predicts the next token at every position.

    Args:
        vocabulary: number of tokens V.
        context: longest sequence T.
        width: D.
        layers: number of layers.
        heads: H; divides ``width``.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "contract.weight")):
                # Residual branches start small, or the stream grows with depth (GPT-2).
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits, (B, T, V)."""
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


def parameter_count(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def as_tokens(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor that owns its memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
