"""Scenarios of several ranks with one real service, whose address is in the environment."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distributed_service_runs as runs
from distributed_attached_shards import alone, assert_resumes, assert_same, trained
from distributed_kfac import SCHEDULED, own_part
from distributed_scaler import assert_skipped_by_all
from distributed_training import (
    assert_replicas_are_equal,
    make_attached,
    make_model,
    make_optimizer,
    on_all_ranks,
)
from given_service import ADDRESS, given_service, scheduled, status_of
from kfac_models import Convolutional, seeded
from kfac_models import train as train_kfac
from preconditioner_client import KFAC, LocalExchange, StalenessConfig
from preconditioner_client.adapters import metrics_source
from sharded_training import END, aligned


class Proxy:
    """A TCP port before the service that can be cut."""

    def __init__(self, target):
        host, port = target.split(":")
        self._target = (host, int(port))
        self._open = True
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """End all connections and refuse new ones."""
        self._open = False
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def restore(self):
        self._open = True

    def _accept(self):
        while True:
            near, _ = self._listener.accept()
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class Replica:
    """This rank's part of a training under DistributedDataParallel, with a batch of its own in every step.

    Args:
        optimizer: of the model.
        model: the same on all ranks.
    """

    def __init__(self, model, optimizer):
        self.optimizer = optimizer
        self.source = metrics_source(optimizer)
        self._model = model
        self._module = DistributedDataParallel(model)
        self._generator = torch.Generator().manual_seed(dist.get_rank())

    def step(self):
        """One step; then all replicas are compared."""
        x = torch.randn(8, 12, generator=self._generator)
        self.optimizer.zero_grad()
        self._module(x).sub(x[:, :8]).square().mean().backward()
        self.optimizer.step()
        assert_replicas_are_equal(self._model)

    def until(self, condition, seconds=40):
        """Train until all ranks' metrics, by rank, fulfil the condition."""
        began = time.monotonic()
        while True:
            self.step()
            told = on_all_ranks((self.source.metrics(), time.monotonic() - began))
            if condition([metrics for metrics, _ in told]):
                return
            # By one rank's clock, so that all stop together.
            assert told[0][1] < seconds, f"not within {seconds} s: {told}"

    def adopted(self):
        """Versions by rank, until now."""
        return on_all_ranks(self.source.metrics()["versions_adopted"])


BLOCKS = 14
"""Of the model, on one rank or on all together."""


def one_rank_loses_its_connection(folder):
    """Versions are adopted as they come, on every rank those of its own blocks."""
    proxy = Proxy(os.environ[ADDRESS])
    address = proxy.address if dist.get_rank() == 1 else os.environ[ADDRESS]
    staleness = StalenessConfig(refresh_every=3, max_staleness=100_000)
    settings = {"staleness": staleness, "service": given_service(address)}
    for kind in ("shampoo", "attached"):
        model, job = make_model(), f"lost-{kind}-on-{dist.get_world_size()}"
        if kind == "shampoo":
            optimizer = make_optimizer(model, lr=1e-4, job=job, **settings)
        else:
            optimizer, _ = make_attached(model, job=job, **settings)
        assert_replicas_are_bit_identical(Replica(model, optimizer), job, proxy)


def assert_replicas_are_bit_identical(replica, job, proxy):
    """Before, while and after rank 1 is without the service."""
    try:
        replica.until(lambda told: all(m["versions_adopted"] >= 20 for m in told))
        told = on_all_ranks(replica.source.metrics())
        if dist.get_rank() == 0:
            # The service knows one job, whose ranks are all there in one epoch.
            status = status_of(job)
            assert (status.epoch, status.ranks) == (told[0]["epoch"], dist.get_world_size())
            assert status.blocks == BLOCKS
        blocks = [metrics["blocks"] for metrics in told]
        assert sum(blocks) == BLOCKS
        assert min(blocks) > 0
        assert [metrics["blocks_with_version"] for metrics in told] == blocks
        if dist.get_rank() == 1:
            proxy.cut()
        replica.until(lambda told: not told[1]["connected"])
        began = replica.adopted()
        replica.until(lambda told: all(m["versions_adopted"] >= n + 20 for m, n in others(told, began)))
        lost = replica.adopted()
        assert lost[1] <= began[1] + blocks[1]
        proxy.restore()
        replica.until(lambda told: told[1]["versions_adopted"] >= lost[1] + 20)
        assert on_all_ranks(replica.source.metrics()["connections"])[1] >= 2
        assert on_all_ranks(replica.source.metrics()["waits"]) == [0] * dist.get_world_size()
    finally:
        proxy.restore()
        replica.source.close()


def others(told, began):
    """What the other ranks tell, with what each began with."""
    return [pair for rank, pair in enumerate(zip(told, began, strict=True)) if rank != 1]


def no_bit_depends_on_lost_connections(folder):
    """On a schedule: what was under way at rank 1 is offered again, and waited for."""
    proxy = Proxy(os.environ[ADDRESS])
    run = runs.Run("shampoo", address=proxy.address if dist.get_rank() == 1 else None)
    for step in range(runs.END):
        run.train([step])
        if step % 5 == 4:
            proxy.cut()
            proxy.restore()
    runs.assert_same(run.finish(), runs.of_one_process(folder, "shampoo"))
    assert on_all_ranks(run.source.metrics()["connections"] > 1)[1]


def a_scaler_skips_what_is_infinite_on_one_rank(folder):
    for kind in ("Shampoo", "fused"):
        assert_skipped_by_all(kind, **scheduled())


def an_attached_preconditioner_of_shards_resumes(folder):
    model = assert_resumes(folder / "attached", aligned, method="adam", **scheduled())
    single = trained(alone(aligned, method="adam", **scheduled()), range(END))
    assert_same(model, single[0])
    single[2].close()


def kfac_trains_as_with_inverses_in_process(folder):
    models = seeded(Convolutional), seeded(Convolutional)
    for model, exchange in zip(models, (given_service(), LocalExchange(4)), strict=True):
        optimizer = KFAC(model, lr=1e-2, service=exchange, staleness=SCHEDULED)
        train_kfac(DistributedDataParallel(model), optimizer, range(20), kind=model, part=own_part())
        assert_replicas_are_equal(model)
        metrics = optimizer.metrics()
        # There are fewer layers than four ranks.
        assert metrics["versions_adopted"] >= 4 * metrics["blocks"]
        assert sum(on_all_ranks(metrics["blocks"])) == 3
        assert metrics["refused"] == metrics["late_adoptions"] == 0
        optimizer.close()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


ON_TWO_RANKS = [
    one_rank_loses_its_connection,
    no_bit_depends_on_lost_connections,
    a_scaler_skips_what_is_infinite_on_one_rank,
    an_attached_preconditioner_of_shards_resumes,
    kfac_trains_as_with_inverses_in_process,
    *runs.ON_TWO_RANKS,
]
ON_FOUR_RANKS = [
    one_rank_loses_its_connection,
    kfac_trains_as_with_inverses_in_process,
    *runs.ON_FOUR_RANKS,
]
SCENARIOS = [*ON_TWO_RANKS, *(s for s in ON_FOUR_RANKS if s not in ON_TWO_RANKS)]
