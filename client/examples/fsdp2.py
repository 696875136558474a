"""FSDP2 (``fully_shard``) with asynchronous Shampoo.

    torchrun --nproc-per-node 2 client/examples/fsdp2.py
    torchrun --nproc-per-node 2 client/examples/fsdp2.py --checkpoint state --steps 100
    torchrun --nproc-per-node 2 client/examples/fsdp2.py --checkpoint state --steps 200   # goes on
    torchrun --nproc-per-node 4 client/examples/fsdp2.py --replicas 2                     # HSDP

Every rank cuts the rows that it holds of a parameter into blocks of its own, and keeps their statistics:
nothing of the optimizer is gathered. On a mesh of two dimensions (HSDP) the replicas of a shard divide its
blocks among them. ``torch.distributed.checkpoint`` saves the state as it lies.

With ``--service embedded`` every rank has a service of its own. Where many ranks share a machine, let them
share one: start ``preconditioner-service serve`` and give its address.
"""

from __future__ import annotations

import argparse
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from preconditioner_client import Shampoo, StalenessConfig

CONTEXT = 16

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


def batch(text: torch.Tensor, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the text, and the byte that follows each."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train on all ranks; returns this rank's loss and counters."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
    ).to(device)
    shards = dist.get_world_size() // args.replicas
    if args.replicas > 1:
        mesh = init_device_mesh(device.type, (args.replicas, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard, which puts DTensors in the place of the parameters.
    optimizer = Shampoo(model.named_parameters(), lr=3e-3, staleness=STALENESS, service=args.service)

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
        loss = nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    if args.checkpoint:
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state, "step": args.steps}, checkpoint_id=args.checkpoint)
    metrics = optimizer.metrics()
    optimizer.close()
    return {
        "rank": dist.get_rank(),
        "loss": loss.item(),
        "step": metrics["step"],
        "blocks": metrics["blocks"],
        "versions_adopted": metrics["versions_adopted"],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as one of the processes that torchrun starts."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo under fully_shard")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=1, help="more than 1: HSDP with so many replicas")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save to")
    args = parser.parse_args(arguments)
    dist.init_process_group()
    try:
        return train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
