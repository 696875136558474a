"""GPT-2 as published, for measurements: its shapes, its tied embedding, any size; weights are random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, HEADS, HEAD_WIDTH, VOCABULARY, CONTEXT = 12, 12, 64, 50257, 1024
"""Of GPT-2 small."""

# Shape suffixes: B batch, T positions, D width, H heads, K width of a head, V vocabulary.


class Layer(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One layer."""
        batch, length, width = x_BTD.shape
        heads = self.query_key_value(self.attention_norm(x_BTD)).view(batch, length, 3, HEADS, -1)
        q_BHTK, k_BHTK, v_BHTK = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.output(y_BHTK.transpose(1, 2).reshape(batch, length, width))
        y_BTD: Tensor = self.contract(F.gelu(self.expand(self.expand_norm(x_BTD)), approximate="tanh"))
        return x_BTD + y_BTD


class GPT2(nn.Module):
    """A GPT-2.

    Args:
        scale: of width, vocabulary and context; 1 is GPT-2 small.
        layers: number of layers.
    """

    def __init__(self, scale: float = 1.0, layers: int = LAYERS) -> None:
        super().__init__()
        # The width of a head is what is scaled, so that 12 of them always divide the model's.
        width = HEADS * max(1, round(HEAD_WIDTH * scale))
        self.vocabulary = max(8, round(VOCABULARY * scale))
        self.context = max(8, round(CONTEXT * scale))
        self.tokens = nn.Embedding(self.vocabulary, width)
        self.positions = nn.Embedding(self.context, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits, (B, T, V)."""
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)

    def random_batch(self, size: int) -> Tensor:
        """Tokens of ``size`` sequences and the one that follows each, (B, T + 1), on the model's device."""
        return torch.randint(self.vocabulary, (size, self.context + 1), device=self.tokens.weight.device)
