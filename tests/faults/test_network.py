"""The network between a trainer and a service: cut, healed, slow, lossy, narrow, half open.

In network namespaces where the machine has the right to make them, and through a TCP proxy; which, and with
what, the table says.
"""

from __future__ import annotations

import pytest

from fault_stage import until_fresh
from histories import Histories
from network_link import NamespaceLink, ProxyLink, why_no_namespaces
from service_process import wait_for
from step_times import check_step_times
from trainer_process import TrainerProcess

NO_NAMESPACES = why_no_namespaces()
ROUND_TRIP, LOSS, RATE = 0.2, 0.05, 1_000_000
NOTICED = 35.0
"""Seconds: keepalive asks after 20 and gives up 10 later."""
BACK = 20.0
"""Seconds from the healing of a broken connection to fresh versions: an attempt that hangs, and a pause."""


class Network:
    """A trainer and a service with a link between them, all well at the beginning and the end of a test."""

    def __init__(self, link, histories):
        self.link = link
        self.histories = histories
        self.service = link.make_service(histories.service())
        self.trainers = []

    def trainer(self, **staleness):
        self.trainers.append(
            TrainerProcess(
                self.link.reach(self.service),
                self.link.trainer_prefix,
                connection={"allow_plaintext": True, **self.histories.trainer()},
                # Else their matrices are the same, and the checker takes one's for the other's.
                seed=len(self.trainers),
                **staleness,
            )
        )
        return self.trainers[-1]

    def close(self):
        for trainer in self.trainers:
            trainer.close()
        self.service.stop()
        self.link.close()


def make_link(kind):
    if kind == "proxy":
        return ProxyLink()
    if NO_NAMESPACES:
        pytest.skip(f"{NO_NAMESPACES}: the same faults run through a TCP proxy")
    return NamespaceLink()


@pytest.fixture(
    scope="module",
    params=[
        "namespaces",
        # Both are run where both can be; in the short form the better one is enough.
        pytest.param("proxy", marks=() if NO_NAMESPACES else pytest.mark.long_form),
    ],
)
def network(request, tmp_path_factory):
    network = Network(make_link(request.param), Histories(tmp_path_factory.mktemp("history")))
    try:
        network.service.start()
        network.trainer()
        until_fresh(network.trainers[0])
        yield network
    finally:
        network.close()


@pytest.fixture
def trainer(network):
    return network.trainers[0]


@pytest.fixture
def begun(network, fault_report):
    """A row of the table that says how the fault is made here."""

    def begin(name):
        fault = fault_report.fault(f"{name} ({network.link.kind})")
        if network.link.note:
            fault.note(network.link.note)
        return fault

    return begin


def fresh(network, fault, within):
    """Every block of the first trainer has a version from after the healing, and no rule was broken."""
    until_fresh(network.trainers[0])
    fault.recovered("every block has new versions", within=within)
    network.histories.judge(fault)


def test_a_short_partition(network, trainer, begun):
    with begun("partition for 3 s, and heal") as fault:
        before = trainer.for_seconds(2)
        connections = trainer.metrics["connections"]
        network.link.cut()
        fault.injected("nothing passes, nobody is told")
        fault.nothing_to_notice()
        during = trainer.for_seconds(3)
        network.link.heal()
        fault.lifted()
        fresh(network, fault, within=10)
        assert trainer.metrics["connections"] == connections, "so short a partition breaks no connection"
        check_step_times(fault, before, during)


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.long_form)])
def test_latency_and_loss(network, trainer, begun, seconds):
    with begun(f"200 ms round trip with 5% loss for {seconds} s") as fault:
        before = trainer.for_seconds(2)
        network.link.shape(round_trip=ROUND_TRIP, loss=LOSS)
        fault.injected("both directions")
        fault.nothing_to_notice()
        adopted = trainer.metrics["versions_adopted"]
        during = trainer.for_seconds(seconds)
        network.link.heal()
        fault.lifted()
        assert trainer.metrics["versions_adopted"] > adopted, "versions arrive all the same"
        fresh(network, fault, within=10)
        check_step_times(fault, before, during)


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.long_form)])
def test_a_narrow_link(network, trainer, begun, seconds):
    with begun(f"1 Mbit/s for {seconds} s") as fault:
        before = trainer.for_seconds(2)
        network.link.shape(rate=RATE)
        fault.injected("both directions")
        fault.nothing_to_notice()
        adopted = trainer.metrics["versions_adopted"]
        during = trainer.for_seconds(seconds)
        network.link.heal()
        fault.lifted()
        assert trainer.metrics["versions_adopted"] > adopted, "versions arrive all the same"
        fresh(network, fault, within=10)
        check_step_times(fault, before, during)


@pytest.mark.long_form
def test_a_partition_longer_than_keepalive(network, trainer, begun):
    with begun("partition until both ends gave up, and heal") as fault:
        before = trainer.for_seconds(2)
        network.link.cut()
        fault.injected("nothing passes, nobody is told")
        during = trainer.until(lambda: not trainer.metrics["connected"], NOTICED, "the trainer's notice")
        assert fault.detected("keepalive") <= NOTICED
        wait_for(lambda: "stream detached" in network.service.log, NOTICED, "the service's notice")
        during += trainer.for_seconds(5)
        network.link.heal()
        fault.lifted()
        fresh(network, fault, within=BACK)
        check_step_times(fault, before, during)


@pytest.mark.long_form
def test_the_service_vanishes_without_a_word(network, trainer, begun):
    with begun("half-open: the service is gone, no FIN came") as fault:
        before = trainer.for_seconds(2)
        network.link.cut()
        network.service.kill()
        fault.injected("SIGKILL of the service behind a cut wire")
        wait_for(lambda: not network.service.survivors(), what="the end of Ray's processes")
        during = trainer.for_seconds(2)
        assert trainer.metrics["connected"], "half open: the trainer cannot know yet"
        known = len(trainer.steps)
        network.service.start()
        network.link.heal()
        fault.lifted()
        # It may have given up while the service started.
        during += trainer.until(
            lambda: any(not step.metrics["connected"] for step in trainer.steps[known:]),
            NOTICED,
            "the trainer's notice",
        )
        noticed = next(step for step in trainer.steps[known:] if not step.metrics["connected"])
        assert fault.detected("the reset of the new service, or keepalive", at=noticed.at) <= NOTICED
        fresh(network, fault, within=NOTICED + BACK)
        check_step_times(fault, before, during)


@pytest.mark.long_form
def test_the_trainer_vanishes_without_a_word(network, begun):
    with begun("half-open: the trainer is gone, no FIN came") as fault:
        lost = network.trainer()
        until_fresh(lost)
        seen = network.service.log.count("stream detached")
        network.link.cut()
        lost.process.kill()
        fault.injected("SIGKILL of a trainer behind a cut wire")
        wait_for(
            lambda: network.service.log.count("stream detached") >= seen + 2, NOTICED, "the service's notice"
        )
        assert fault.detected("keepalive of the service, for both trainers") <= NOTICED
        network.link.heal()
        fault.lifted()
        fresh(network, fault, within=BACK)
