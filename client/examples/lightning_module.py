"""A Lightning module whose optimizer is asynchronous Shampoo, or one that the preconditioner is attached to.

    pip install lightning
    python client/examples/lightning_module.py
    python client/examples/lightning_module.py --checkpoint run.ckpt --steps 100
    python client/examples/lightning_module.py --checkpoint run.ckpt --steps 200   # goes on at step 100
    python client/examples/lightning_module.py --precision bf16-mixed
    python client/examples/lightning_module.py --devices 2
    python client/examples/lightning_module.py --attach                            # inside of AdamW instead

Lightning calls ``optimizer.step(closure)``, which both take. The callback logs the metrics; with several
processes it also completes the checkpoints of an attached preconditioner.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from preconditioner_client import Shampoo, StalenessConfig, attach
from preconditioner_client.adapters import lightning_callback, metrics_source

CONTEXT = 16

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


class NextByte(lightning.LightningModule):
    """Guesses the next byte."""

    def __init__(self, service: str, attached: bool) -> None:
        super().__init__()
        self.service = service
        self.attached = attached
        self.model = nn.Sequential(
            nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Where the line changes."""
        if not self.attached:
            return Shampoo(self.named_parameters(), lr=3e-3, staleness=STALENESS, service=self.service)
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        attach(optimizer, self, staleness=STALENESS, service=self.service)
        return optimizer


def windows() -> TensorDataset:
    """Windows of the source of a module of the standard library, and the byte that follows each."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    pieces = text.unfold(0, CONTEXT + 1, 1)
    return TensorDataset(pieces[:, :-1], pieces[:, -1])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last loss and how many versions were adopted."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo in Lightning")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--attach", action="store_true", help="precondition inside of AdamW")
    parser.add_argument("--devices", default="auto", help="processes of DistributedDataParallel")
    parser.add_argument("--precision", default="32-true", help="Lightning's, as in bf16-mixed")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, and to save to")
    parser.add_argument("--log", help="folder for CSV logs")
    args = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        precision=args.precision,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        log_every_n_steps=10,
        logger=lightning.pytorch.loggers.CSVLogger(args.log) if args.log else False,
        callbacks=[lightning_callback()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NextByte(args.service, args.attach)
    saved = args.checkpoint if args.checkpoint and args.checkpoint.exists() else None
    trainer.fit(
        module, DataLoader(windows(), batch_size=32, shuffle=True), ckpt_path=saved, weights_only=True
    )
    if args.checkpoint:
        trainer.save_checkpoint(args.checkpoint)
    metrics = metrics_source(trainer.optimizers[0]).metrics()
    return {
        "loss": float(trainer.callback_metrics["loss"]),
        "step": metrics["step"],
        "versions_adopted": metrics["versions_adopted"],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
