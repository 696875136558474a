"""The service is gone, and a trainer passes its bound on ages: the policy that it declared is seen to act."""

from __future__ import annotations

import time

import pytest

from fault_stage import BACK, until_fresh
from preconditioner_protos.history import Kind
from service_process import wait_for
from trainer_process import TrainerProcess

BOUND = 30
"""Steps: a few tenths of a second."""

TIMEOUT = 1.0
ACTS = {"graft": {"graft"}, "wait": {"breaker_opened", "graft", "breaker_closed"}}
"""What each policy does until the service is back; ``wait`` waits once first."""


@pytest.mark.parametrize(
    ("happens", "policy"),
    [
        ("frozen", "graft"),
        pytest.param("frozen", "wait", marks=pytest.mark.long_form),
        pytest.param("killed", "graft", marks=pytest.mark.long_form),
        pytest.param("killed", "wait", marks=pytest.mark.long_form),
    ],
)
def test_versions_beyond_the_bound(stage, fault_report, happens, policy):
    job = f"{policy}-while-{happens}"
    with (
        TrainerProcess(
            stage.service.address,
            connection={**stage.histories.trainer(), "job": job},
            seed=stage.seed(),
            max_staleness=BOUND,
            policy=policy,
            stale_timeout=TIMEOUT,
        ) as trainer,
        fault_report.fault(f"service {happens}, bound of {BOUND} steps, policy {policy}") as fault,
    ):
        until_fresh(trainer)
        began = time.monotonic()
        fault.injected("SIGSTOP of the server" if happens == "frozen" else "SIGKILL of the server")
        if happens == "frozen":
            stage.service.freeze()
        else:
            stage.service.kill()
        trainer.until(lambda: trainer.metrics["age"] > BOUND, what="a step beyond the bound")
        fault.detected("the bound was passed, the policy acts")
        trainer.until(lambda: trainer.metrics["age"] > 3 * BOUND, what="more of them")
        if happens == "frozen":
            stage.service.thaw()
        else:
            wait_for(lambda: not stage.service.survivors(), what="the end of Ray's processes")
            stage.supervise()
        fault.lifted()
        until_fresh(trainer)
        fault.recovered("every block has a newer version", within=BACK)
        assert trainer.close() == 0
        report = stage.judge(fault)
        since = [event for event in report.history.events if event.job == job and event.at > began]
        acted = {event.data["action"] for event in since if event.kind is Kind.POLICY_ACTED}
        assert acted >= ACTS[policy], f"{policy} did {acted}"
        in_vain = [event for event in since if event.kind is Kind.WAIT_ENDED and event.data["timed_out"]]
        assert bool(in_vain) == (policy == "wait")
