"""Capture Kronecker statistics from a small byte-level Transformer, for tests of the roots.

    python capture_statistics.py statistics.npz

Trains a 1-layer, 32-wide Transformer with AdamW on the source text of Python's standard library for 120
steps on CPU and keeps, for a few weights, the sum of G G^T and G^T G over all steps and an EMA (0.95) of
them. Needs torch; nothing else in the tests does.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, CONTEXT, BATCH, STEPS, DECAY = 32, 64, 8, 120, 0.95
CAPTURED = {
    "attention": "block.self_attn.in_proj_weight",
    "output": "block.self_attn.out_proj.weight",
    "up": "block.linear1.weight",
    "down": "block.linear2.weight",
}


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, context) -> (batch, context, 256)."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.block(self.embed(tokens) + self.place, src_mask=mask, is_causal=True))


def main(target: str) -> None:
    """Train and write the statistics."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights = dict(model.named_parameters())
    kept: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        start = torch.randint(len(text) - CONTEXT - 1, (BATCH,))
        window = torch.stack([text[s : s + CONTEXT + 1] for s in start.tolist()]).long()
        loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, path in CAPTURED.items():
            gradient = weights[path].grad
            for side, product in (("left", gradient @ gradient.T), ("right", gradient.T @ gradient)):
                if len(product) > 64:
                    product = product[:64, :64]
                key = f"{name}_{side}"
                kept[f"{key}_sum"] = kept.get(f"{key}_sum", 0.0) + product
                kept[f"{key}_ema"] = DECAY * kept.get(f"{key}_ema", 0.0) + (1 - DECAY) * product
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    np.savez_compressed(target, **{key: value.numpy() for key, value in kept.items()})


if __name__ == "__main__":
    main(sys.argv[1])
