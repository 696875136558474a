"""Scheduled runs through one real service, on one rank or several, stopped and resumed: the same weights.

Where every rank sees the whole batch, the averaged gradient has the same bits on one rank, on two and on
four: sums of so many equal numbers, and halves and quarters of them, are exact.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import distributed_kfac
import kfac_models
from distributed_training import (
    assert_replicas_are_equal,
    make_attached,
    make_model,
    make_optimizer,
    on_all_ranks,
    weights,
)
from given_service import scheduled
from preconditioner_client.adapters import metrics_source

STOP, END = 12, 24

KINDS = {
    "shampoo": (make_model, make_optimizer),
    "attached": (make_model, lambda model, **settings: make_attached(model, **settings)[0]),
    # Factors that travel are rounded to this, and those of a single process are not.
    "kfac": (kfac_models.Words, lambda m, **s: distributed_kfac.make(m, factor_dtype=torch.float32, **s)),
    "kfac-in-parts": (kfac_models.Convolutional, distributed_kfac.make),
}


class Run:
    """A training on as many ranks as there are.

    Args:
        kind: one of ``KINDS``; every rank sees the whole batch, or with ``kfac-in-parts`` a part of it.
        job: its name at the service; default one of its own.
        address: of the service, where it is not that of the environment.
    """

    def __init__(self, kind, job=None, address=None):
        make, optimize = KINDS[kind]
        self.kind = kind
        self.model = kfac_models.seeded(make)
        self.optimizer = optimize(self.model, job=job, **scheduled(address))
        self.source = metrics_source(self.optimizer)
        self._module = DistributedDataParallel(self.model) if dist.is_initialized() else self.model

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            self._loss(step).backward()
            self.optimizer.step()
        return self

    def _loss(self, step):
        if "kfac" in self.kind:
            part = distributed_kfac.own_part() if self.kind.endswith("parts") else slice(None)
            inputs, targets = kfac_models.batch(self.model, step)
            return kfac_models.loss_of(self._module, inputs[part], targets[part])
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1000 + step))
        return self._module(x).sub(x[:, :8]).square().mean()

    def finish(self):
        """Train on to the end, in which everything comes in time; gives the weights."""
        self.train(range(self.source.metrics()["step"], END))
        metrics = self.source.metrics()
        assert metrics["versions_adopted"] >= 2 * metrics["blocks"]
        for counter in ("wait_timeouts", "late_adoptions", "refused", "blocks_grafted_stale"):
            assert metrics[counter] == 0, counter
        if dist.is_initialized():
            assert_replicas_are_equal(self.model)
        self.source.close()
        return weights(self.model)

    def save(self, folder):
        """In all ways: the part of each rank, all parts by torch, and all in one file."""
        torch.save(self.state(), folder / f"{self.kind}-{dist.get_rank()}.pt")
        dcp.save(self._parts(), checkpoint_id=folder / self.kind)
        self.optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save(self.state(), folder / f"{self.kind}-whole.pt")
        dist.barrier()

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, path):
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        assert self.source.metrics()["step"] == STOP
        return self

    def _parts(self):
        own = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": self.model.state_dict(), "optimizer": own}

    def load_with_torch(self, path):
        state = self._parts()
        dcp.load(state, checkpoint_id=path)
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        assert self.source.metrics()["step"] == STOP
        return self


def train_alone(folder):
    """For a process by itself: what the ranks compare theirs with."""
    for kind in ("shampoo", "attached", "kfac"):
        torch.save(Run(kind).finish(), folder / f"alone-{kind}.pt")


def of_one_process(folder, kind):
    return torch.load(folder / f"alone-{kind}.pt", weights_only=True)


def assert_same(found, expected):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"parameter {index}: up to {(a - b).abs().max()}"


def weights_are_those_of_a_single_process(folder):
    for kind in ("shampoo", "attached"):
        assert_same(Run(kind).finish(), of_one_process(folder, kind))


def weights_of_kfac_are_those_of_a_single_process_but_for_rounding(folder):
    """Of factors on their way to their owners; weights differ by less than 1e-4 of how far they move."""
    expected, begin = of_one_process(folder, "kfac"), weights(kfac_models.seeded(kfac_models.Words))
    for ours, theirs, start in zip(Run("kfac").finish(), expected, begin, strict=True):
        moved = float((theirs - start).abs().max())
        assert moved > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * moved)


def a_stopped_run_resumes_bit_for_bit(folder):
    assert_resumes("shampoo", folder, of_one_process(folder, "shampoo"))


def a_stopped_run_of_kfac_resumes_bit_for_bit(folder):
    """Two ranks with parts of the batch add up to the same bits in any order."""
    assert_resumes("kfac-in-parts", folder, Run("kfac-in-parts").finish())


def assert_resumes(kind, folder, expected):
    """What was saved from still has its sessions, as after a crash, when those that resume the job begin."""
    saved = Run(kind, job=kind).train(range(STOP))
    saved.save(folder)
    own = folder / f"{kind}-{dist.get_rank()}.pt"
    assert_all_blocks_are_under_way(own, saved.source.metrics()["blocks"])
    epochs = [saved.source.metrics()["epoch"]]
    saved.train(range(STOP, STOP + 4))
    for resume in (
        lambda: Run(kind, job=kind).load(own),
        lambda: Run(kind, job=kind).load(folder / f"{kind}-whole.pt"),
        lambda: Run(kind, job=kind).load_with_torch(folder / kind),
        # Goes back from where it has come to meanwhile.
        lambda: saved.load(own),
    ):
        resumed = resume()
        assert_same(resumed.finish(), expected)
        epochs.append(resumed.source.metrics()["epoch"])
    assert epochs == sorted(set(epochs))


def assert_all_blocks_are_under_way(path, blocks):
    """Some since the very last step, so that their answers were surely not there yet."""
    states = torch.load(path, weights_only=True)["optimizer"]["state"].values()
    steps = [value for state in states for key, value in state.items() if key.endswith("in_flight.steps")]
    assert len(steps) == blocks > 0
    newest = [int(of_block.max()) for of_block in steps]
    assert min(newest) > 0
    assert max(max(told) for told in on_all_ranks(newest)) == STOP


def a_run_resumes_from_one_file(folder):
    run = Run("shampoo", job="shampoo").load(folder / "shampoo-whole.pt")
    assert_same(run.finish(), of_one_process(folder, "shampoo"))


def a_run_resumes_from_the_parts_of_two_ranks(folder):
    run = Run("shampoo", job="shampoo").load_with_torch(folder / "shampoo")
    assert_same(run.finish(), of_one_process(folder, "shampoo"))


ON_TWO_RANKS = [
    weights_are_those_of_a_single_process,
    weights_of_kfac_are_those_of_a_single_process_but_for_rounding,
    a_stopped_run_resumes_bit_for_bit,
    a_stopped_run_of_kfac_resumes_bit_for_bit,
]
ON_FOUR_RANKS = [
    weights_are_those_of_a_single_process,
    weights_of_kfac_are_those_of_a_single_process_but_for_rounding,
    a_run_resumes_from_one_file,
    a_run_resumes_from_the_parts_of_two_ranks,
]
