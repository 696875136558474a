"""Scenarios of checkpoints of replicas. What they leave in the folder is read by other numbers of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from distributed_training import SCHEDULED, make_model, make_optimizer, train, weights
from preconditioner_client import BlockingConfig, GraftingConfig, LocalExchange, attach
from scripted_exchange import ScriptedExchange

STOP, END = 10, 24


def trained(steps, **settings):
    model = make_model()
    optimizer = make_optimizer(model, **settings)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_continues_as_uninterrupted(model, optimizer, **settings):
    """Train on to the end; the bits are those of a run that was never stopped."""
    assert optimizer.metrics()["step"] == STOP
    train(model, optimizer, range(STOP, END))
    whole, _ = trained(END, distributed="off", **settings)
    for (name, a), b in zip(model.named_parameters(), weights(whole), strict=True):
        assert torch.equal(a, b), f"{name}: up to {(a - b).abs().max()}"
    assert optimizer.metrics()["waits"] == 0


def resume(state, **settings):
    """A new model and optimizer, continued from a file's content."""
    model = make_model()
    optimizer = make_optimizer(model, **settings)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def flat(state):
    """Tensors and numbers of an optimizer's state dict, by parameter and key; not the epoch."""
    return {
        (index, key): value
        for index, of_parameter in state["state"].items()
        for key, value in of_parameter.items()
    }


def every_rank_resumes_from_its_own_part(folder):
    model, optimizer = trained(STOP)
    path = folder / f"part-{dist.get_rank()}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert_continues_as_uninterrupted(*resume(torch.load(path, weights_only=True)))


def a_consolidated_state_is_that_of_one_process(folder):
    model, optimizer = trained(STOP)
    last = dist.get_world_size() - 1
    optimizer.consolidate_state_dict(to=last)
    if dist.get_rank() == last:
        whole = optimizer.state_dict()
        torch.save({"model": model.state_dict(), "optimizer": whole}, folder / "whole.pt")
        _, single = trained(STOP, distributed="off")
        ours, theirs = flat(whole), flat(single.state_dict())
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key[1].endswith("last_snapshot") or not torch.is_tensor(value):
                assert value == theirs[key], key
            else:
                assert torch.equal(value, theirs[key]), key
    train(model, optimizer, [STOP])
    assert len(flat(optimizer.state_dict())) < len(flat(trained(STOP, distributed="off")[1].state_dict()))


def all_ranks_resume_from_one_file(folder):
    dist.barrier()
    assert_continues_as_uninterrupted(*resume(torch.load(folder / "whole.pt", weights_only=True)))


def ranks_resume_from_a_single_process(folder):
    model, optimizer = trained(STOP, distributed="off")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert_continues_as_uninterrupted(*resume(state))


def averages_of_blocks_resume_from_one_file(folder):
    settings = {"momentum_of": "preconditioned", "dampening": 0.9}
    model, optimizer = trained(STOP, **settings)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "averages.pt")
    dist.barrier()
    state = torch.load(folder / "averages.pt", weights_only=True)
    assert_continues_as_uninterrupted(*resume(state, **settings), **settings)


def the_part_of_another_rank_is_refused_by_name(folder):
    _, optimizer = trained(STOP)
    torch.save(optimizer.state_dict(), folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    other = torch.load(folder / f"{(dist.get_rank() + 1) % dist.get_world_size()}.pt", weights_only=True)
    for distributed in ("auto", "off"):
        fresh = make_optimizer(make_model(), distributed=distributed)
        with pytest.raises(
            ValueError, match=r"\.weight: the checkpoint lacks the block .*consolidate_state_dict"
        ):
            fresh.load_state_dict(other)


def a_rank_that_does_not_take_part_cannot_get_the_whole(folder):
    _, optimizer = trained(2)
    with pytest.raises(ValueError, match="rank 99 is none of those"):
        optimizer.consolidate_state_dict(to=99)


def save_with_torch(folder):
    model, optimizer = trained(STOP)
    for name, options in OPTIONS.items():
        state = {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.save(state, checkpoint_id=folder / name)


OPTIONS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def load_with_torch(folder):
    for name, options in OPTIONS.items():
        model = make_model()
        exchange = LocalExchange(1)
        optimizer = make_optimizer(model, service=exchange)
        before = weights(model)
        state = {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        # torch made the state by a step with zero gradients: it must have left no other trace.
        assert optimizer.metrics()["step"] == 0
        assert exchange.counters()["connections"] == 0
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        dcp.load(state, checkpoint_id=folder / name)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        assert_continues_as_uninterrupted(model, optimizer)


def training_after_an_initialisation_by_torch_is_as_without_it(folder):
    model = make_model()
    optimizer = make_optimizer(model, dampening=0.5)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, range(12))
    other, _ = trained(12, dampening=0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def what_is_asked_before_the_first_step_does_not_spoil_loading(folder):
    """A frozen parameter has no state at all in torch's checkpoints."""
    for name, first in (
        ("nothing", lambda optimizer: None),
        ("state", lambda optimizer: optimizer.state_dict()),
    ):
        path = folder / f"before-{name}"
        pairs = []
        for _ in range(2):
            model = make_model()
            model[2].weight.requires_grad_(False)
            pairs.append((model, make_optimizer(model)))
        for step in range(STOP + 5):
            if step == STOP:
                model, optimizer = pairs[1]
                first(optimizer)
                state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.save({"optimizer": get_optimizer_state_dict(*pairs[0])}, checkpoint_id=path)
                dcp.load(state, checkpoint_id=path)
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
                model.load_state_dict(pairs[0][0].state_dict())
            for model, optimizer in pairs[: 1 + (step >= STOP)]:
                train(model, optimizer, [step], without={2})
        assert all(torch.equal(a, b) for a, b in zip(*map(weights, (pairs[0][0], pairs[1][0])), strict=True))


def a_trainable_parameter_that_never_had_a_gradient(folder):
    """torch asks for the state of every trainable parameter when it loads; it must have been saved."""
    uninterrupted = make_model()
    optimizer = make_optimizer(uninterrupted)
    train(uninterrupted, optimizer, range(STOP), without={2, 3})
    train(uninterrupted, optimizer, range(STOP, STOP + 7))
    saved = make_model()
    saving = make_optimizer(saved)
    train(saved, saving, range(STOP), without={2, 3})
    for name, options in OPTIONS.items():
        path = folder / f"never-{name}"
        wrapped = DistributedDataParallel(saved)
        state = {"optimizer": get_optimizer_state_dict(wrapped, saving, options=options)}
        dcp.save(state, checkpoint_id=path)
        for before in (0, 2):
            model = make_model()
            optimizer = make_optimizer(model)
            # One that has trained loads, too, whatever had gradients meanwhile.
            train(model, optimizer, range(before), without={2, 3})
            wrapped = DistributedDataParallel(model)
            state = {"optimizer": get_optimizer_state_dict(wrapped, optimizer, options=options)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(wrapped, optimizer, state["optimizer"], options=options)
            model.load_state_dict(saved.state_dict())
            train(model, optimizer, range(STOP, STOP + 7))
            for index, (a, b) in enumerate(zip(*map(weights, (model, uninterrupted)), strict=True)):
                assert torch.equal(a, b), f"{name}, {before} steps before: parameter {index}"


def an_attached_preconditioner_resumes_from_one_file(folder):
    uninterrupted, optimizer, _ = attached("adam")
    train(uninterrupted, optimizer, range(END))
    model, optimizer, handle = attached("adam")
    train(model, optimizer, range(STOP))
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), folder / "attached-part.pt")
    handle.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), folder / "attached.pt")
    dist.barrier()
    again, other, _ = attached("adam")
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="lacks the block"):
            other.load_state_dict(torch.load(folder / "attached-part.pt", weights_only=True))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(folder / "attached.pt", weights_only=True))
    train(again, other, range(STOP, END))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(uninterrupted), strict=True))


def attached(method):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = attach(
        optimizer,
        model,
        grafting=GraftingConfig(method=method),
        blocking=BlockingConfig(block_size=8),
        staleness=SCHEDULED,
        service=LocalExchange(1),
    )
    return model, optimizer, handle


def attached_parts(model, optimizer, handle):
    own = get_optimizer_state_dict(model, optimizer)
    return {"model": model.state_dict(), "optimizer": own, "preconditioner": handle}


def an_attached_preconditioner_is_saved_by_torch_beside_its_optimizer(folder):
    for method in ("sgd", "adam"):
        model, optimizer, handle = attached(method)
        train(model, optimizer, range(STOP))
        dcp.save(attached_parts(model, optimizer, handle), checkpoint_id=folder / f"attached-{method}")
    an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch(folder)


def an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch(folder):
    """On any number of ranks, bit for bit: the blocks of replicas are the same on all numbers."""
    for method in ("sgd", "adam"):
        uninterrupted, optimizer, _ = attached(method)
        train(uninterrupted, optimizer, range(END))
        model, optimizer, handle = attached(method)
        state = attached_parts(model, optimizer, handle)
        dcp.load(state, checkpoint_id=folder / f"attached-{method}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert handle.metrics()["step"] == STOP
        assert handle.metrics()["blocks_with_version"] == handle.metrics()["blocks"] > 0
        train(model, optimizer, range(STOP, END))
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(uninterrupted), strict=True))


def an_attached_preconditioner_is_not_stepped_by_torch(folder):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    exchange = ScriptedExchange()
    handle = attach(optimizer, model, service=exchange)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert handle.metrics()["step"] == 0
    assert exchange.session is None


def a_first_step_with_a_learning_rate_of_zero_counts(folder):
    exchange = ScriptedExchange()
    model = make_model()
    optimizer = make_optimizer(model, service=exchange)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    assert optimizer.metrics()["step"] == 1
    assert exchange.session is not None


SCENARIOS = [
    every_rank_resumes_from_its_own_part,
    a_consolidated_state_is_that_of_one_process,
    all_ranks_resume_from_one_file,
    ranks_resume_from_a_single_process,
    averages_of_blocks_resume_from_one_file,
    the_part_of_another_rank_is_refused_by_name,
    a_rank_that_does_not_take_part_cannot_get_the_whole,
    save_with_torch,
    load_with_torch,
    training_after_an_initialisation_by_torch_is_as_without_it,
    what_is_asked_before_the_first_step_does_not_spoil_loading,
    a_trainable_parameter_that_never_had_a_gradient,
    an_attached_preconditioner_resumes_from_one_file,
    an_attached_preconditioner_is_saved_by_torch_beside_its_optimizer,
    an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch,
    an_attached_preconditioner_is_not_stepped_by_torch,
    a_first_step_with_a_learning_rate_of_zero_counts,
]
