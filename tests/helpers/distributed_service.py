"""Scenarios of several ranks with one real service, whose address is in the environment."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import replace

import grpc
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distributed_attached_shards import alone, assert_resumes, assert_same, trained
from distributed_scaler import assert_skipped_by_all
from distributed_training import (
    SCHEDULED,
    assert_replicas_are_equal,
    make_model,
    make_optimizer,
    on_all_ranks,
    train,
    weights,
)
from kfac_models import Convolutional, seeded
from kfac_models import train as train_kfac
from preconditioner_client import KFAC, LocalExchange, ServiceConfig, StalenessConfig
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc
from service_process import TOKEN
from sharded_training import END, aligned

ADDRESS = "TEST_SERVICE_ADDRESS"


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


def until(condition, model, optimizer, seconds=40):
    """Train until all ranks' metrics fulfil the condition; replicas are compared at every step."""
    began = time.monotonic()
    while True:
        train(model, optimizer, [optimizer.metrics()["step"]])
        assert_replicas_are_equal(model)
        told = on_all_ranks((optimizer.metrics(), time.monotonic() - began))
        if condition([metrics for metrics, _ in told]):
            return
        # By one rank's clock, so that all stop together.
        assert told[0][1] < seconds, f"not within {seconds} s: {told}"


def one_rank_loses_its_connection(folder):
    proxy = Proxy(os.environ[ADDRESS])
    address = proxy.address if dist.get_rank() == 1 else os.environ[ADDRESS]
    model = make_model()
    optimizer = make_optimizer(
        model,
        lr=1e-4,
        staleness=StalenessConfig(refresh_every=3, max_staleness=100_000),
        service=ServiceConfig(address=address, token=TOKEN),
    )
    try:
        until(lambda told: all(m["versions_adopted"] >= 20 for m in told), model, optimizer)
        if dist.get_rank() == 0:
            check_status(optimizer.metrics()["epoch"])
        if dist.get_rank() == 1:
            proxy.cut()
        until(lambda told: not told[1]["connected"], model, optimizer)
        began = on_all_ranks(optimizer.metrics()["versions_adopted"])
        until(lambda told: told[0]["versions_adopted"] >= began[0] + 20, model, optimizer)
        lost = on_all_ranks(optimizer.metrics()["versions_adopted"])
        assert lost[1] <= began[1] + optimizer.metrics()["blocks"]
        proxy.restore()
        until(lambda told: told[1]["versions_adopted"] >= lost[1] + 20, model, optimizer)
        assert on_all_ranks(optimizer.metrics()["connections"])[1] >= 2
        assert on_all_ranks(optimizer.metrics()["waits"]) == [0] * dist.get_world_size()
    finally:
        optimizer.close()


def check_status(epoch):
    """The service knows one job, whose ranks are all there in one epoch."""
    with grpc.insecure_channel(os.environ[ADDRESS]) as channel:
        stub = rpc.PreconditionerServiceStub(channel)
        metadata = [("authorization", f"Bearer {TOKEN}")]
        jobs = stub.GetStatus(pb.GetStatusRequest(), metadata=metadata, timeout=10).jobs
    assert [(job.epoch, job.ranks) for job in jobs] == [(epoch, dist.get_world_size())]


def scheduled():
    """Settings with which no bit depends on when what arrives."""
    schedule = replace(SCHEDULED, stale_timeout=30)
    return {"staleness": schedule, "service": ServiceConfig(address=os.environ[ADDRESS], token=TOKEN)}


def scheduled_runs_give_the_bits_of_one_process(folder):
    runs = []
    for distributed in ("auto", "off"):
        model = make_model()
        optimizer = make_optimizer(model, distributed=distributed, **scheduled())
        try:
            train(model, optimizer, range(24))
            assert optimizer.metrics()["wait_timeouts"] == 0
            assert optimizer.metrics()["versions_adopted"] > 0
        finally:
            optimizer.close()
        runs.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert_replicas_are_equal(model)


def a_scaler_skips_what_is_infinite_on_one_rank(folder):
    for kind in ("Shampoo", "fused"):
        assert_skipped_by_all(kind, **scheduled())


def an_attached_preconditioner_of_shards_resumes(folder):
    model = assert_resumes(folder / "attached", aligned, method="adam", **scheduled())
    single = trained(alone(aligned, method="adam", **scheduled()), range(END))
    assert_same(model, single[0])
    single[2].close()


def kfac_on_both_ranks(folder):
    """The same service inverts factors, and gives what is inverted in process."""
    schedule = StalenessConfig(refresh_every=3, adoption="scheduled", delay=4, max_staleness=10)
    models = seeded(Convolutional), seeded(Convolutional)
    service = ServiceConfig(address=os.environ[ADDRESS], token=TOKEN)
    for model, exchange in zip(models, (service, LocalExchange(4)), strict=True):
        optimizer = KFAC(model, lr=1e-2, service=exchange, staleness=schedule, job="kfac")
        size = 16 // dist.get_world_size()
        part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        train_kfac(DistributedDataParallel(model), optimizer, range(20), kind=model, part=part)
        assert_replicas_are_equal(model)
        metrics = optimizer.metrics()
        assert metrics["versions_adopted"] >= 4 * metrics["blocks"] > 0
        assert metrics["refused"] == metrics["late_adoptions"] == 0
        optimizer.close()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


SCENARIOS = [
    one_rank_loses_its_connection,
    scheduled_runs_give_the_bits_of_one_process,
    a_scaler_skips_what_is_infinite_on_one_rank,
    an_attached_preconditioner_of_shards_resumes,
    kfac_on_both_ranks,
]
