"""State of the optimizer as a state dict: stable keys, complete, free of anything but tensors and numbers.

Per parameter:

==============================  ================================================================
key                             value
==============================  ================================================================
``step``                        int, updates of this parameter; -1, and no other key, where ``attach``
                                leaves it alone
``exp_avg``                     EMA of the gradient, if ``beta1 > 0``
``second_moment``               of the grafting method, if it keeps one
``momentum_buffer``             if ``momentum > 0``, after the first step; with
                                ``momentum_of="preconditioned"`` the average of diagonal directions
``diagonal_statistics``         K-FAC only, of the weights of embeddings and BatchNorm; see
                                :mod:`preconditioner_client.kfac.diagonals`
``block.B.updates``             int, accumulations into the statistics of block B
``block.B.version``             int, step of the preconditioner in use, -1 without
``block.B.first_adopted``       int, step since which there is a version, -1 without
``block.B.last_snapshot``       int, step of the newest snapshot
``block.B.statistics.I``        (n, n) of the I-th preconditioned side
``block.B.preconditioner.I``    (n, n), 0 without a version
``block.B.average``             with ``momentum_of="preconditioned"`` only: of the block's shape
``block.B.in_flight.steps``     with a schedule only: (m,) int64, steps of the snapshots that it still waits
                                for, -1 in unused places
``block.B.in_flight.I``         with a schedule only: (m, n (n + 1) / 2), these snapshots, packed
==============================  ================================================================

B is the block's slice of the whole parameter (after merging of dimensions), as in ``0:512,512:1024``, so it
means the same whatever rank holds the block. Which keys an updated parameter has, and their shapes, follow
from shapes and settings alone, as ``torch.distributed.checkpoint`` needs it.

Per group: the scalar settings, and ``preconditioner_format``, ``preconditioner_step``,
``preconditioner_epoch`` and ``preconditioner_shards`` (over how many ranks a parameter's rows were divided).
The settings objects (``grafting``, ``statistics``, ``blocking``, ``root``) stand there as text, for people:
those of the program that loads hold. ``momentum_of`` is there if it was given, and must be the program's.

Every rank has the keys of the blocks that it owns; elementwise tensors are placed as their parameters are.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from preconditioner_client.block_state import block_state, restore_block
from preconditioner_client.distribution import Ranks, held_part, is_dtensor, like, local
from preconditioner_client.engine import Engine
from preconditioner_client.options import python_number
from preconditioner_client.plan import GroupPlan
from preconditioner_client.schedule import NEVER
from preconditioner_client.update_rule import blank_state, complete_state

if TYPE_CHECKING:
    from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer

logger = logging.getLogger("preconditioner_client")

FORMAT = 1
"""Version of the keys above; a checkpoint of another format is refused."""

FORMAT_KEY = "preconditioner_format"
STEP_KEY = "preconditioner_step"
EPOCH_KEY = "preconditioner_epoch"
SHARDS_KEY = "preconditioner_shards"

ELEMENTWISE = ("exp_avg", "second_moment", "momentum_buffer")
_SETTINGS = ("grafting", "statistics", "blocking", "root")
BLOCK = re.compile(r"block\.([0-9:,]+)\.(.+)")


def write(optimizer: PreconditionedOptimizer, engine: Engine) -> None:
    """Put everything that lives outside of ``optimizer.state`` into the groups and, as views, into it.

    ``torch.distributed.checkpoint`` asks by the state if an optimizer was initialised, and for some forms
    of a state dict which keys to load. So before the first update there is none, and then every trainable
    parameter has its keys, with zeros if it has had no gradient yet.
    """
    begun = bool(optimizer.state)
    for group, plan in zip(optimizer.param_groups, engine.plans, strict=True):
        group[FORMAT_KEY], group[STEP_KEY], group[EPOCH_KEY] = FORMAT, engine.step, engine.epoch
        group[SHARDS_KEY] = plan.shards
        for index, parameter in enumerate(group["params"]):
            if begun and parameter.requires_grad and "step" not in optimizer.state.get(parameter, {}):
                # A layer may have had batches in steps in which its weight had no gradient.
                known = optimizer.state.get(parameter, {})
                optimizer.state[parameter] = {**blank_state(group, parameter), **known}
            if parameter in optimizer.state:
                # Settings that were changed since the last step ask for what only the next one would make.
                complete_state(optimizer.state[parameter], group, parameter)
                for key, shape in optimizer.own_state_shapes(parameter).items():
                    blank = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
                    optimizer.state[parameter].setdefault(key, blank)
            if plan.rows[index] and parameter in optimizer.state:
                # What is under way stays out: copies of it would stay here until the next checkpoint.
                views = _block_states(engine, plan, index, lambda view: view, under_way=False)
                optimizer.state[parameter].update(views)


def block_states(engine: Engine, plan: GroupPlan, index: int) -> dict[str, Any]:
    """The ``block.*`` keys of one parameter, of the blocks of this rank; later steps do not change them."""
    return _block_states(engine, plan, index, torch.clone)


def _block_states(
    engine: Engine,
    plan: GroupPlan,
    index: int,
    taken: Callable[[torch.Tensor], torch.Tensor],
    under_way: bool = True,
) -> dict[str, Any]:
    return {
        f"block.{held.key}.{suffix}": value
        for held in plan.rows[index]
        for suffix, value in block_state(engine, held, taken, under_way).items()
    }


def exported(engine: Engine, state_dict: dict[str, Any], blocks: bool = True) -> dict[str, Any]:
    """The base class's state dict with the blocks of this rank, as copies, and without what needs pickle.

    Args:
        engine: that keeps the blocks.
        state_dict: of the base class.
        blocks: whether they are wanted.
    """
    # A scheduler may have left a number of numpy, which weights_only=True does not read.
    groups = [
        {key: repr(value) if key in _SETTINGS else python_number(value) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    states = {
        identity: {key: value for key, value in state.items() if not key.startswith("block.")}
        for identity, state in state_dict["state"].items()
    }
    for group, plan in zip(groups, engine.plans, strict=True):
        for index, identity in enumerate(group["params"]):
            if blocks and plan.rows[index]:
                states.setdefault(identity, {}).update(block_states(engine, plan, index))
    return {**state_dict, "state": states, "param_groups": groups}


def with_settings(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The groups of a checkpoint with the settings objects of the running program, and no state."""
    groups = [
        {**saved, **{key: group[key] for key in _SETTINGS}}
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state_dict, "state": {}, "param_groups": groups}


def read(optimizer: PreconditionedOptimizer, engine: Engine, state_dict: dict[str, Any]) -> None:
    """Take the state out of a checkpoint that passed :mod:`preconditioner_client.checkpoint_check`.

    The base class has the groups.
    """
    stored = []
    optimizer.state.clear()
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        states = [state_dict["state"].get(identity, {}) for identity in saved["params"]]
        stored.append(states)
        for parameter, state in zip(group["params"], states, strict=True):
            own = own_state(state, parameter, engine.ranks)
            if own:
                optimizer.state[parameter] = own
    first = state_dict["param_groups"][0]
    shards = first.get(SHARDS_KEY)
    restore_blocks(engine, stored, int(first[STEP_KEY]), int(first[EPOCH_KEY]), shards)


def restore_blocks(
    engine: Engine, stored: list[list[dict[str, Any]]], step: int, epoch: int, shards: int | None = None
) -> None:
    """Put the ``block.*`` keys of every parameter back, and continue at their step in a new epoch.

    Where the checkpoint was written with another number of shards, blocks whose slice it does not have start
    afresh, and one warning counts them: it has statistics of other rows, and no arithmetic turns them into
    statistics of these. Another counts those without statistics although their parameters had gradients in
    steps that must have brought some.

    Args:
        engine: with the plans that the states were checked against.
        stored: per group, per parameter its state.
        step: of the checkpoint.
        epoch: of the checkpoint.
        shards: see :func:`~preconditioner_client.checkpoint_check.check_state`.
    """
    refresher = engine.refresher
    versions, first, last = (np.full(refresher.versions.size, NEVER, dtype=np.int64) for _ in range(3))
    refresher.schedule.clear()
    afresh = lost = 0
    recut = shards is not None and shards != engine.ranks.shards
    for plan, states in zip(engine.plans, stored, strict=True):
        for rows, state in zip(plan.rows, states, strict=True):
            blocks: dict[str, dict[str, Any]] = {}
            for key, value in state.items():
                if match := BLOCK.fullmatch(key):
                    blocks.setdefault(match[1], {})[match[2]] = value
            for held in rows:
                own = blocks.get(held.key, {})
                # torch.distributed.checkpoint leaves what it did not find as it was: without any updates.
                if recut and not own.get("updates", 0):
                    own = {}
                    afresh += int(state.get("step", 1)) > 0
                lost += not recut and not own.get("updates", 0) and _must_have_had(plan, state, step)
                # Not all in the next step, but again spread over an interval.
                begin = refresher.last_snapshot(held.block) % refresher.config.interval + step
                block = held.block
                versions[block], first[block], last[block] = restore_block(engine, held, own, begin)
    if afresh:
        logger.warning(
            "%d of %d blocks of this rank start with new statistics: the checkpoint was written with other "
            "shards and does not have them",
            afresh,
            refresher.versions.size,
        )
    if lost:
        logger.warning(
            "%d of %d blocks of this rank start with new statistics: the checkpoint has none of them, though "
            "their parameters were updated. A full state dict of torch.distributed.checkpoint "
            "(full_state_dict=True) keeps the blocks of rank 0 alone: save without full_state_dict, or call "
            "consolidate_state_dict(to=0) on all ranks before get_optimizer_state_dict()",
            lost,
            refresher.versions.size,
        )
    refresher.restore(versions.tolist(), first.tolist(), last.tolist())
    engine.resume(step, epoch)


def _must_have_had(plan: GroupPlan, state: dict[str, Any], step: int) -> bool:
    """Whether a parameter had a gradient in a step whose gradient statistics take.

    Only its number of updates is known, where it is counted: it may have been without a gradient in just
    those steps, if there were enough of the others.
    """
    updates = int(state.get("step", 0))
    return updates > 0 and step // plan.settings.statistics.every > step - updates


def own_state(state: dict[str, Any], parameter: torch.Tensor, ranks: Ranks) -> dict[str, Any]:
    """What a parameter's saved state holds beside its blocks: copies, tensors placed as the parameter is.

    They keep their dtypes.
    """
    # A count in a tensor would go to the accelerator, and every step wait for it.
    return {
        key: int(value) if key == "step" else _placed(value, parameter, ranks)
        for key, value in state.items()
        if not key.startswith("block.")
    }


def _placed(value: Any, parameter: torch.Tensor, ranks: Ranks) -> Any:
    if not torch.is_tensor(value):
        return copy.copy(value)
    held = local(value) if is_dtensor(value) else held_part(parameter, value, ranks)
    return like(parameter, held.detach().clone().to(parameter.device))
