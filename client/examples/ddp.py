"""``DistributedDataParallel`` with asynchronous Shampoo.

    torchrun --nproc-per-node 2 client/examples/ddp.py
    torchrun --nproc-per-node 2 client/examples/ddp.py --checkpoint state --steps 100
    torchrun --nproc-per-node 4 client/examples/ddp.py --checkpoint state --steps 200   # goes on, with more

Every block of the model has one owner among the ranks. Only the owner keeps its statistics, speaks to the
service and preconditions; the finished updates are gathered, so all replicas stay the same to the bit. The
state is spread over the ranks therefore, and ``torch.distributed.checkpoint`` is what saves all of it.

With ``--service embedded`` every rank has a service of its own. Where many ranks share a machine, let them
share one: start ``preconditioner-service serve`` and give its address.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel

from preconditioner_client import BlockingConfig, Shampoo, StalenessConfig

CONTEXT = 16

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


def batch(text: torch.Tensor, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the text, and the byte that follows each."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def digest(model: nn.Module) -> str:
    """Of all bits of all weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train on all ranks; returns this rank's loss and counters, and whether the replicas are the same."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
    ).to(device)
    replica = DistributedDataParallel(model)
    # Small blocks, so that there are some for every rank.
    optimizer = Shampoo(
        model.named_parameters(),
        lr=3e-3,
        blocking=BlockingConfig(block_size=128),
        staleness=STALENESS,
        service=args.service,
    )
    first = 0
    if args.checkpoint and args.checkpoint.exists():
        weights, state = get_state_dict(model, optimizer)
        saved: dict[str, Any] = {"model": weights, "optimizer": state, "step": 0}
        load(saved, checkpoint_id=args.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = saved["step"]

    loss = torch.tensor(float("nan"))
    for step in range(first, args.steps):
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())  # other data on every rank
        inputs, targets = batch(text)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(replica(inputs.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    if args.checkpoint:
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state, "step": args.steps}, checkpoint_id=args.checkpoint)
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest(model))
    metrics = optimizer.metrics()
    optimizer.close()
    return {
        "rank": dist.get_rank(),
        "loss": loss.item(),
        "step": metrics["step"],
        "blocks": metrics["blocks"],
        "versions_adopted": metrics["versions_adopted"],
        "replicas_are_identical": len(set(digests)) == 1,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as one of the processes that torchrun starts."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo under DistributedDataParallel")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save to")
    args = parser.parse_args(arguments)
    dist.init_process_group()
    try:
        return train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
