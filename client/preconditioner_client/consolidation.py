"""The state of all ranks on one of them.

Blocks travel one by one, straight from their owners, so that no other rank ever holds more than it keeps.

Until the next step the other ranks then show no sharded tensors, see :func:`without_shards`, so that
``torch.distributed.checkpoint`` finds every tensor whole on one rank or not at all. Its full state dict is
what rank 0 shows, so it is whole only if that rank has the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from preconditioner_client.block_state import blank_block_state, block_state
from preconditioner_client.distribution import is_dtensor
from preconditioner_client.engine import Engine
from preconditioner_client.plan import PlannedRow


def collect(engine: Engine, state_dict: dict[str, Any], to: int) -> dict[str, Any] | None:
    """Complete a rank's state dict with the other ranks' parts.

    Collective over all ranks that train these parameters.

    Args:
        engine: of the optimizer.
        state_dict: of this rank; its states are in the order of the parameters.
        to: global rank that gets the whole.

    Returns:
        The whole on rank ``to``, where sharded tensors are plain ones on the host; None elsewhere.

    Raises:
        ValueError: no rank of that number trains these parameters.
    """
    ranks = engine.ranks
    if not ranks.groups:
        return state_dict
    if not any(to in row for row in ranks.grid):
        raise ValueError(f"rank {to} is none of those that train these parameters: {ranks.grid}")
    here = receives(engine, to)
    states: dict[Any, dict[str, Any]] = {}
    for index, state in state_dict["state"].items():
        states[index] = {key: whole(value, here) for key, value in state.items()}
    for saved, parameters_states in zip(state_dict["param_groups"], _blocks(engine, to), strict=True):
        for index, blocks in zip(saved["params"], parameters_states, strict=True):
            if blocks:
                states.setdefault(index, {}).update(blocks)
    return {**state_dict, "state": states} if here else None


def receives(engine: Engine, to: int) -> bool:
    """Whether this rank gets the whole, so that its own blocks are wanted as copies."""
    return not engine.ranks.groups or dist.get_rank() == to


def whole(value: Any, here: bool) -> Any:
    """A sharded tensor as a plain one on the host, where it is wanted; all else as it is. Collective."""
    if not is_dtensor(value):
        return value
    full = value.full_tensor()
    return full.cpu() if here else None


def without_shards(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state without its sharded tensors, which another rank has whole.

    Beside the whole ``torch.distributed.checkpoint`` would take parts for overlapping chunks; and gathering
    them for a full state dict would wait for the rank that has the whole, and does not take part.
    """
    return {key: value for key, value in state.items() if not is_dtensor(value)}


def refuse_remains(held: Mapping[str, Any], state: Mapping[str, Any], rank: int, anew: str) -> None:
    """Refuse what was loaded into the state that :func:`without_shards` left of a parameter's.

    Args:
        held: of the parameter, on this rank.
        state: that is to be loaded.
        rank: that has the whole.
        anew: what a checkpoint can be loaded into, for the message.

    Raises:
        ValueError: it lacks the sharded tensors that are held.
    """
    lacks = any(is_dtensor(value) and key not in state for key, value in held.items())
    # A parameter that has had no update may have been saved without them.
    if lacks and state.get("step", 0) != 0:
        raise ValueError(
            f"the state dict has no sharded tensors: consolidate_state_dict(to={rank}) was called since the "
            f"last step, and until the next one rank {rank} alone has them. Load what that rank saved; "
            f"torch.distributed.checkpoint loads into the state dict of each rank, and needs {anew}"
        )


def _blocks(engine: Engine, to: int) -> list[list[dict[str, Any]]]:
    """Per group, per parameter the ``block.*`` keys that other ranks own; empty but on ``to``."""
    ranks = engine.ranks
    me = dist.get_rank()
    device = engine.device
    result: list[list[dict[str, Any]]] = []
    for plan in engine.plans:
        held = {(i, row.key): row for i, rows in enumerate(plan.rows) for row in rows}
        of_group: list[dict[str, Any]] = [{} for _ in plan.names]
        for block in plan.blocks:
            owner = ranks.grid[block.replica][block.shard]
            if owner == to or me not in (owner, to):
                continue
            if me == owner:
                _send(engine, held[block.member.parameter, block.key], to, device)
            else:
                average = block.member.place.shape if plan.settings.averages else None
                state = blank_block_state(block.sides, engine.refresher.config, average)
                _receive(state, owner, device)
                of_group[block.member.parameter].update(
                    {f"block.{block.key}.{k}": v for k, v in state.items()}
                )
        result.append(of_group)
    return result


def _send(engine: Engine, held: PlannedRow, to: int, device: torch.device) -> None:
    state = block_state(engine, held, lambda view: view)
    numbers = [value for value in state.values() if not torch.is_tensor(value)]
    dist.send(torch.tensor(numbers, device=device), to)
    for value in state.values():
        if torch.is_tensor(value):
            dist.send(value.to(device).contiguous(), to)


def _receive(state: dict[str, Any], owner: int, device: torch.device) -> None:
    """Fill the state of a block, in the order in which :func:`_send` takes it."""
    names = [key for key, value in state.items() if not torch.is_tensor(value)]
    numbers = torch.empty(len(names), dtype=torch.int64, device=device)
    dist.recv(numbers, owner)
    state.update(zip(names, numbers.tolist(), strict=True))
    for key, value in state.items():
        if torch.is_tensor(value):
            received = torch.empty_like(value, device=device)
            dist.recv(received, owner)
            state[key] = received.cpu()
