"""The rules of freshness: when snapshots leave, what is adopted when, and what happens beyond the bound."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from preconditioner_client import BlockingConfig, GraftingConfig, Shampoo, StalenessConfig, StatisticsConfig
from scripted_exchange import ScriptedExchange


class Run:
    """One matrix parameter under an optimizer whose exchange the test scripts."""

    def __init__(self, exchange=None, shapes=((4, 3),), blocking=None, grafting="none", **staleness):
        self.exchange = exchange or ScriptedExchange()
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        self.optimizer = Shampoo(
            self.params,
            lr=1.0,
            beta1=0.0,
            grafting=GraftingConfig(method=grafting),
            blocking=blocking,
            staleness=StalenessConfig(**staleness),
            service=self.exchange,
        )
        self.step_number = 0

    def step(self, times=1):
        """Gradients of one; returns by how much the first weight moved, as a multiple of the plain step."""
        for _ in range(times):
            before = self.params[0].detach().clone()
            for p in self.params:
                p.grad = torch.ones_like(p)
            self.optimizer.step()
            self.step_number += 1
            moved = float((before - self.params[0].detach())[0, 0])
        return moved

    def __getattr__(self, name):
        return self.optimizer.metrics()[name]


def test_snapshots_leave_every_k_steps_whether_or_not_answers_come():
    run = Run(refresh_every=5, max_staleness=50)
    run.step(17)
    assert run.exchange.steps_offered() == [5, 10, 15]


def test_by_default_a_snapshot_leaves_when_the_last_trip_is_back_at_most_every_ten_steps():
    run = Run(max_staleness=100)
    run.step(25)
    assert run.exchange.steps_offered() == [10]
    run.exchange.answer(0, 10)
    run.step()
    run.step()
    assert run.exchange.steps_offered() == [10, 27], "the answer came in step 26"
    run.exchange.answer(0, 27)
    run.step(9)
    assert run.exchange.steps_offered() == [10, 27]
    run.step()
    assert run.exchange.steps_offered() == [10, 27, 37]


def test_an_answer_that_never_comes_does_not_silence_a_block():
    run = Run(max_staleness=40)
    run.step(60)
    assert len(run.exchange.steps_offered()) >= 2


def test_snapshots_are_spread_over_the_interval():
    run = Run(shapes=[(8, 8)] * 10, refresh_every=10, max_staleness=50)
    run.step(40)
    per_step = [sum(s.step == t for s in run.exchange.offered) for t in range(20, 40)]
    assert max(per_step) == 1
    for block in range(10):
        steps = run.exchange.steps_offered(block)
        assert {b - a for a, b in itertools.pairwise(steps)} == {10}


def test_without_stagger_all_blocks_leave_together():
    run = Run(shapes=[(8, 8)] * 3, refresh_every=10, max_staleness=50, stagger=False)
    run.step(20)
    assert [s.step for s in run.exchange.offered] == [10, 10, 10, 20, 20, 20]


def test_a_version_is_used_from_the_first_step_after_arrival():
    run = Run(refresh_every=10, max_staleness=50)
    assert run.step(10) == pytest.approx(1.0)
    run.exchange.answer(0, 10, scale=2.0)
    assert run.step() == pytest.approx(4.0)  # both sides
    assert run.versions_adopted == 1
    assert run.ages == [1]


def test_older_equal_and_future_versions_are_dropped_and_counted():
    run = Run(refresh_every=1, max_staleness=50)
    run.step(10)
    run.exchange.answer(0, 8, scale=2.0)
    run.step()
    run.exchange.answer(0, 8, scale=9.0)
    run.exchange.answer(0, 3, scale=9.0)
    run.exchange.answer(0, 99, scale=9.0)
    assert run.step() == pytest.approx(4.0)
    assert run.outdated == 3
    assert run.versions_adopted == 1


def test_of_several_arrivals_in_one_step_the_newest_is_used():
    run = Run(refresh_every=1, max_staleness=50)
    run.step(10)
    run.exchange.answer(0, 7, scale=2.0)
    run.exchange.answer(0, 9, scale=3.0)
    run.exchange.answer(0, 8, scale=5.0)
    assert run.step() == pytest.approx(9.0)
    assert run.outdated + run.versions_adopted >= 2


def adopted(policy, **kwargs):
    """A run whose only version is of step 10, standing at step 20; the bound is 10."""
    run = Run(refresh_every=10, max_staleness=10, policy=policy, **kwargs)
    run.step(10)
    run.exchange.answer(0, 10, scale=2.0)
    run.step(10)
    assert run.age == 10
    assert run.waits == 0
    return run


def test_no_step_waits_while_the_age_is_within_the_bound():
    run = adopted("wait")
    assert run.exchange.waits == []
    assert run.blocks_grafted_stale == 0


def test_graft_never_applies_an_older_one(caplog):
    run = adopted("graft")
    with caplog.at_level(logging.WARNING):
        assert run.step() == pytest.approx(1.0)
        assert run.step() == pytest.approx(1.0)
    assert run.exchange.waits == []
    assert run.blocks_grafted_stale == 2
    assert run.age_max == 10
    assert len(caplog.records) == 1, "a state is logged once, not per step"


def test_keep_uses_the_stale_one_and_counts():
    run = adopted("keep")
    assert run.step() == pytest.approx(4.0)
    assert run.blocks_kept_stale == 1
    assert run.age_max == 11


def test_wait_waits_until_fresh():
    def deliver(exchange, timeout):
        exchange.answer(0, 20, scale=3.0)
        return True

    run = adopted("wait", exchange=ScriptedExchange(deliver))
    assert run.step() == pytest.approx(9.0)
    assert run.waits == 1
    assert run.wait_timeouts == 0
    assert run.age_max == 10


def test_wait_gives_up_at_its_timeout_and_then_no_step_waits_until_versions_arrive(caplog):
    run = adopted("wait", stale_timeout=0.01)
    with caplog.at_level(logging.WARNING):
        assert run.step() == pytest.approx(1.0)  # the diagonal step, not the stale preconditioner
        assert run.step(5) == pytest.approx(1.0)
    assert run.waits == 1
    assert run.wait_timeouts == 1
    assert run.breaker_open
    assert "1 blocks are older than 10 steps and nothing came within 0.0 s" in caplog.text
    run.exchange.answer(0, 20, scale=3.0)
    assert run.step() == pytest.approx(9.0)
    assert not run.breaker_open
    run.step(10)
    assert run.waits == 2, "closed again, so the bound holds again"


def test_a_refused_block_is_not_waited_for():
    run = adopted("wait")
    run.exchange.refuse(0, 20)
    assert run.step() == pytest.approx(1.0)
    assert run.exchange.waits == []
    assert run.refused == 1


def test_a_waiting_step_offers_its_newest_snapshot_to_a_new_connection():
    calls = []

    def reconnect(exchange, timeout):
        calls.append(len(exchange.offered))
        if len(calls) == 1:
            exchange.generation += 1
            return True
        exchange.answer(0, exchange.steps_offered()[-1], scale=3.0)
        return True

    run = adopted("wait", exchange=ScriptedExchange(reconnect))
    assert run.step() == pytest.approx(9.0)
    assert run.exchange.steps_offered()[-1] == 21


def test_a_new_connection_gets_the_newest_snapshots_with_the_next_step():
    run = Run(max_staleness=100)
    run.step(15)
    assert run.exchange.steps_offered() == [10]
    run.exchange.generation += 1
    run.step(6)
    assert run.exchange.steps_offered() == [10, 20]


class TestScheduled:
    def run(self, **kwargs):
        return Run(
            refresh_every=4,
            adoption="scheduled",
            delay=6,
            max_staleness=20,
            stagger=False,
            grafting="none",
            **kwargs,
        )

    def test_is_adopted_exactly_at_its_step_however_early_it_arrives(self):
        run = self.run()
        run.step(4)
        run.exchange.answer(0, 4, scale=2.0)
        assert [run.step() for _ in range(6)] == pytest.approx([1, 1, 1, 1, 1, 4])
        assert run.ages == [6]

    def test_several_snapshots_are_under_way_at_once(self):
        run = self.run()
        run.step(8)
        run.exchange.answer(0, 8, scale=3.0)
        run.exchange.answer(0, 4, scale=2.0)
        assert [run.step() for _ in range(7)] == pytest.approx([1, 4, 4, 4, 4, 9, 9])
        assert run.exchange.session.snapshots_in_flight == 3

    def test_a_service_that_is_gone_costs_no_more_memory_with_every_snapshot(self):
        run = self.run(policy="graft")
        run.step(100)
        refresher = run.optimizer._engine.refresher
        assert [snapshot.step for snapshot in refresher.schedule.under_way(0)] == [92, 96, 100]
        run.exchange.generation += 1
        run.step()
        assert run.exchange.steps_offered()[-3:] == [92, 96, 100]
        # One that is not waited for any more is adopted all the same.
        run.exchange.answer(0, 88, scale=2.0)
        assert run.step() == pytest.approx(4.0)

    def test_waits_only_at_the_step_where_it_is_due(self):
        def deliver(exchange, timeout):
            exchange.answer(0, 4, scale=2.0)
            return True

        run = self.run(exchange=ScriptedExchange(deliver))
        run.step(9)
        assert run.waits == 0
        assert run.step() == pytest.approx(4.0)
        assert run.waits == 1

    def test_giving_up_is_told_as_what_it_is_and_not_as_old_age(self, caplog):
        run = self.run()
        with caplog.at_level(logging.WARNING):
            run.step(10)
        assert run.wait_timeouts == 1
        assert "1 blocks lack the preconditioner that is due 6 steps after its snapshot" in caplog.text
        assert "older than" not in caplog.text.replace("no older than", "")

    def test_a_late_one_is_adopted_on_arrival_and_counted(self):
        run = self.run(policy="graft")
        run.step(12)
        run.exchange.answer(0, 4, scale=2.0)
        assert run.step() == pytest.approx(4.0)
        assert run.late_adoptions == 1

    def test_a_block_refused_for_longer_than_the_bound_is_not_waited_for_after_a_resume_either(self):
        def refusing(run, steps):
            for _ in range(steps):
                run.step()
                if run.step_number % 4 == 1:
                    run.exchange.refuse(0, run.step_number - 1)

        run = self.run()
        run.step(4)
        run.exchange.answer(0, 4)
        refusing(run, 28)
        assert run.refused > 0
        assert run.age == 28
        resumed = self.run()
        resumed.optimizer.load_state_dict(run.optimizer.state_dict())
        resumed.step_number = run.step_number
        for each in (run, resumed):
            refusing(each, 12)
            assert each.exchange.waits == []
            assert not each.breaker_open
        # One that the service owes is waited for.
        resumed.step(7)
        assert resumed.waits == 1

    def test_a_refusal_before_an_adoption_is_not_waited_for(self):
        """The schedule itself keeps within a bound of 9, but not without one of its versions."""
        run = Run(refresh_every=4, adoption="scheduled", delay=6, max_staleness=9, stagger=False)
        run.step(8)
        run.exchange.refuse(0, 8)
        run.exchange.answer(0, 4)
        run.step(8)
        run.exchange.answer(0, 12)
        run.step(2)
        assert run.versions_adopted == 2
        assert run.exchange.waits == []

    def test_a_new_connection_gets_the_very_snapshots_that_are_under_way(self):
        run = self.run()
        run.step(9)
        run.exchange.generation += 1
        run.step()
        assert run.exchange.steps_offered() == [4, 8, 4, 8]


def test_a_block_added_in_the_middle_joins_the_session():
    run = Run(refresh_every=5, max_staleness=50)
    run.step(7)
    added = torch.nn.Parameter(torch.ones(3, 2))
    run.optimizer.add_param_group({"params": [added]})
    run.params.append(added)
    run.step(5)
    assert len(run.exchange.session.blocks) == 2
    assert run.exchange.steps_offered(1) == [12]
    assert run.exchange.steps_offered(0) == [5, 10]


def test_unpreconditioned_parameters_make_no_blocks():
    run = Run(shapes=[(4, 3), (5,)], blocking=BlockingConfig(max_side=2))
    run.step(3)
    assert run.exchange.session is None
    assert run.blocks == 0


def test_a_direction_is_blended_in_from_its_first_version():
    exchange = ScriptedExchange()
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = Shampoo(
        [parameter],
        lr=1.0,
        beta1=0.0,
        grafting=GraftingConfig(method="none", blend_steps=3),
        staleness=StalenessConfig(refresh_every=1, max_staleness=50),
        service=exchange,
    )
    moved = []
    for step in range(1, 9):
        if step == 3:
            exchange.answer(0, 1, scale=3.0)
        before = parameter.detach().clone()
        parameter.grad = torch.ones(4, 3)
        optimizer.step()
        moved.append(float((before - parameter.detach())[0, 0]))
    # From 1 (diagonal) to 9 (both sides 3) in steps of a quarter.
    assert moved == pytest.approx([1, 1, 3, 5, 7, 9, 9, 9])


def test_statistics_every_k_steps():
    exchange = ScriptedExchange()
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Shampoo(
        [parameter],
        statistics=StatisticsConfig(accumulation="sum", every=3),
        staleness=StalenessConfig(refresh_every=1, max_staleness=50),
        service=exchange,
    )
    for _ in range(7):
        parameter.grad = torch.eye(2)
        optimizer.step()
    traces = [float(s.sides[0][0]) for s in exchange.offered]
    assert traces == [1, 1, 1, 2, 2], "and nothing leaves before there are any"
