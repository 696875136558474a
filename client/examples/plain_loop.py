"""A plain PyTorch loop: one changed line, checkpoints, and metrics in TensorBoard.

    python client/examples/plain_loop.py
    python client/examples/plain_loop.py --checkpoint plain.pt          # go on with --steps 400
    python client/examples/plain_loop.py --attach                       # inside of AdamW instead
    python client/examples/plain_loop.py --tensorboard runs
    python client/examples/plain_loop.py --service 10.0.0.7:50051      # with PRECONDITIONER_TOKEN set

The model reads bytes of the standard library's source and guesses the next one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from preconditioner_client import Shampoo, StalenessConfig, attach
from preconditioner_client.adapters import log_to_tensorboard, metrics_source

CONTEXT = 16

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


def batch(text: torch.Tensor, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the text, and the byte that follows each."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last loss and how many versions were adopted."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo in a plain loop")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--attach", action="store_true", help="precondition inside of AdamW")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, and to save to")
    parser.add_argument("--tensorboard", help="folder of the event file")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
    ).to(device)

    optimizer: torch.optim.Optimizer
    if args.attach:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        attach(optimizer, model, staleness=STALENESS, service=args.service)
    else:
        # The changed line. Before: torch.optim.AdamW(model.parameters(), lr=3e-3)
        optimizer = Shampoo(model.named_parameters(), lr=3e-3, staleness=STALENESS, service=args.service)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)

    first = 0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["step"]
    writer = None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.tensorboard)

    loss = torch.tensor(float("nan"))
    for step in range(first, args.steps):
        inputs, targets = batch(text)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if writer:
                writer.add_scalar("loss", loss.item(), step)
                log_to_tensorboard(writer, optimizer, step)

    if args.checkpoint:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**saved, "scheduler": scheduler.state_dict(), "step": args.steps}, args.checkpoint)
    if writer:
        writer.close()
    metrics = metrics_source(optimizer).metrics()
    return {"loss": loss.item(), "step": metrics["step"], "versions_adopted": metrics["versions_adopted"]}


if __name__ == "__main__":
    print(json.dumps(main()))
