"""A small encoder-decoder Transformer: pre-norm, learned positions.

Attention's matrices are those of layers that are called, which K-FAC watches, unlike those of
``nn.MultiheadAttention``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.transformer import Attention

# Shape suffixes: B batch, S source positions, T target positions, D width, V vocabulary.


class Perceptron(nn.Module):
    """Two layers of a position, four times as wide in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix channels."""
        y_BTD: Tensor = self.contract(F.relu(self.expand(x_BTD)))
        return y_BTD


class EncoderLayer(nn.Module):
    """Attention within the source, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron = Perceptron(width)

    def forward(self, x_BSD: Tensor, visible_B11S: Tensor) -> Tensor:
        """One layer; ``visible_B11S`` is false at padding."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), visible_B11S=visible_B11S)
        y_BSD: Tensor = x_BSD + self.perceptron(self.perceptron_norm(x_BSD))
        return y_BSD


class DecoderLayer(nn.Module):
    """Causal attention within the target, attention to the source, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.source_norm, self.perceptron_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.source_attention = Attention(width, heads), Attention(width, heads)
        self.perceptron = Perceptron(width)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, visible_B11S: Tensor) -> Tensor:
        """One layer; ``visible_B11S`` is false at the source's padding."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        x_BTD = x_BTD + self.source_attention(self.source_norm(x_BTD), memory_BSD, visible_B11S)
        y_BTD: Tensor = x_BTD + self.perceptron(self.perceptron_norm(x_BTD))
        return y_BTD


class EncoderDecoder(nn.Module):
    """Inputs are source tokens and the target so far, side by side.

    Args:
        vocabulary: number of tokens V.
        length: of source and target each, S = T.
        padding: the token that is none.
        width: D.
        layers: of the encoder, and as many of the decoder.
        heads: divides ``width``.
    """

    def __init__(
        self, *, vocabulary: int, length: int, padding: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self._length, self._padding = length, padding
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(length, width)
        self.target_positions = nn.Embedding(length, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)
            elif isinstance(module, Attention):
                for projection in (module.query, module.key, module.value, module.output):
                    nn.init.xavier_uniform_(projection.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the next target token, from tokens (B, S + T)."""
        source_BS, target_BT = tokens.split(self._length, dim=1)
        visible_B11S = (source_BS != self._padding)[:, None, None, :]
        memory_BSD = self.source(source_BS) + self.source_positions.weight
        for layer in self.encoder:
            memory_BSD = layer(memory_BSD, visible_B11S)
        memory_BSD = self.encoder_norm(memory_BSD)
        x_BTD = self.target(target_BT) + self.target_positions.weight
        for layer in self.decoder:
            x_BTD = layer(x_BTD, memory_BSD, visible_B11S)
        logits_BTV: Tensor = self.head(self.decoder_norm(x_BTD))
        return logits_BTV
