"""A loop with Hugging Face Accelerate: accumulation, mixed precision and its own checkpoints.

    pip install accelerate
    python client/examples/accelerate_loop.py
    python client/examples/accelerate_loop.py --mixed-precision bf16
    python client/examples/accelerate_loop.py --checkpoint state --steps 100
    python client/examples/accelerate_loop.py --checkpoint state --steps 200     # goes on at step 100
    torchrun --nproc-per-node 2 client/examples/accelerate_loop.py       # or accelerate launch

``Accelerator.prepare`` wraps the optimizer; nothing else changes. With accumulation the optimizer, and so the
statistics, see whole gradients only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from preconditioner_client import Shampoo, StalenessConfig
from preconditioner_client.adapters import consolidate, metrics_source, scalars

CONTEXT = 16

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


def windows() -> TensorDataset:
    """Windows of the source of a module of the standard library, and the byte that follows each."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    pieces = text.unfold(0, CONTEXT + 1, 1)
    return TensorDataset(pieces[:, :-1], pieces[:, -1])


def small_model() -> nn.Module:
    """Guesses the next byte."""
    return nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last loss and how many versions were adopted."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo in a loop with Accelerate")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200, help="of the optimizer")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--accumulate", type=int, default=2, help="batches for one step of the optimizer")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save to")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        # Otherwise several processes without GPUs would each train alone.
        cpu=not torch.cuda.is_available(),
    )
    model = small_model()
    optimizer = Shampoo(model.named_parameters(), lr=3e-3, staleness=STALENESS, service=args.service)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    loader = DataLoader(windows(), batch_size=32, shuffle=True)
    model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    # The main process saves for all; each owns the statistics of some blocks.
    accelerator.register_save_state_pre_hook(lambda *_: consolidate(prepared))

    if args.checkpoint and args.checkpoint.exists():
        accelerator.load_state(str(args.checkpoint))
    metrics = metrics_source(prepared).metrics()
    loss = torch.tensor(float("nan"))
    batches = iter(loader)
    while metrics["step"] < args.steps:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            continue
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
        metrics = metrics_source(prepared).metrics()
        if accelerator.sync_gradients and metrics["step"] % 20 == 0:
            accelerator.print(f"step {metrics['step']}: loss {loss.item():.3f}", flush=True)
            accelerator.log(scalars(metrics), step=metrics["step"])
    if args.checkpoint:
        accelerator.save_state(str(args.checkpoint))
    return {"loss": loss.item(), "step": metrics["step"], "versions_adopted": metrics["versions_adopted"]}


if __name__ == "__main__":
    print(json.dumps(main()))
