"""Byte-level language modelling on text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import (
    Batch,
    Evaluation,
    WorkloadError,
    evaluate_batches,
    generator,
    seeded,
)
from preconditioner_worker.workloads.transformer import Transformer, as_tokens

# Not prose of the standard library: tests, other people's packages, generated tables.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings",
     "pydoc_data", "__pycache__", "turtledemo", "ensurepip"}
)  # fmt: skip
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text.

    Attributes:
        train: uint8 tokens.
        held_out: uint8 tokens of other files.
        held_out_files: relative paths of the files held out.
        train_files: relative paths of the files trained on.
    """

    train: Tensor
    held_out: Tensor
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Of both texts: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]


def is_held_out(relative_path: str) -> bool:
    """Whether a file is held out: by a hash of its relative path, so a file never changes sides."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def find_files(root: Path, *, pattern: str) -> list[Path]:
    """Files of text under ``root`` in the order of their relative paths."""
    return sorted(
        (
            path
            for path in root.rglob(pattern)
            if path.is_file()
            and not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
            and not path.name.startswith("_sysconfigdata")
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def read_corpus(source: Path | None, *, least: int) -> Corpus:
    """Read a corpus into memory.

    Args:
        source: a folder, whose files are split as wholes; or one file, whose last tenth is held out; or None
            for the standard library of the running Python.
        least: bytes that each of the two parts must have.

    Raises:
        WorkloadError: there is no such text, or too little of it.
    """
    root = Path(sysconfig.get_path("stdlib")) if source is None else source
    if not root.exists():
        raise WorkloadError(f"text {str(root)!r} does not exist; give --text a text file or a folder")
    train: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    if root.is_file():
        data = root.read_bytes()
        cut = int(len(data) * (1 - HELD_OUT_SHARE))
        train[root.name], held_out[f"{root.name} (last tenth)"] = data[:cut], data[cut:]
    else:
        for path in find_files(root, pattern="*.py" if source is None else "*"):
            name = path.relative_to(root).as_posix()
            data = path.read_bytes()
            if b"\0" in data:  # not text
                continue
            (held_out if is_held_out(name) else train)[name] = data
    parts = {"training": b"\n".join(train.values()), "held-out": b"\n".join(held_out.values())}
    for part, data in parts.items():
        if len(data) < least:
            raise WorkloadError(
                f"text {str(root)!r} is too small: its {part} part has {len(data)} bytes of {least} needed; "
                f"give --text a larger file or folder"
            )
    return Corpus(as_tokens(parts["training"]), as_tokens(parts["held-out"]), tuple(train), tuple(held_out))


class TextWorkload:
    """A decoder Transformer that predicts the next byte.

    Args:
        corpus: where text is drawn from.
        context: bytes a sequence.
        batch_size: sequences a step.
        width: of the model.
        layers: of the model.
        heads: of the model.
        held_out_sequences: sequences of an evaluation, spread evenly over the held-out text.
    """

    name = "text"
    metric = "held-out loss (nats per byte)"

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int = 128,
        batch_size: int = 16,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        held_out_sequences: int = 128,
    ) -> None:
        self.corpus = corpus
        self._context = context
        self._batch_size = batch_size
        self._model = (width, layers, heads)
        starts = np.linspace(0, len(corpus.held_out) - context - 1, held_out_sequences).astype(np.int64)
        self._held_out = [self._cut(corpus.held_out, part) for part in np.array_split(starts, 4)]

    @classmethod
    def open(cls, source: Path | None = None) -> TextWorkload:
        """On the text at ``source``; None: the standard library."""
        return cls(read_corpus(source, least=20_000))

    def _cut(self, text: Tensor, starts: NDArray[np.int64]) -> Batch:
        rows = torch.from_numpy(starts)[:, None] + torch.arange(self._context + 1)
        tokens = text[rows].long()
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Workload`."""
        width, layers, heads = self._model
        with seeded(seed):
            return Transformer(256, self._context, width, layers, heads)

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Workload`."""
        starts = generator(seed, step).integers(
            len(self.corpus.train) - self._context - 1, size=self._batch_size
        )
        return self._cut(self.corpus.train, starts)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Workload`."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def evaluate(self, model: nn.Module) -> Evaluation:
        """See :class:`Workload`."""
        return evaluate_batches(self, model, self._held_out)
