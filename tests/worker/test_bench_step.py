"""Launches of a step do not grow with the number of equal blocks; the command runs end to end."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    Grafting,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from preconditioner_worker import bench_step, step_timing
from preconditioner_worker.bench_step import FrozenExchange
from preconditioner_worker.cli import main
from preconditioner_worker.gpt2 import GPT2
from preconditioner_worker.step_timing import launches_of


def launches(matrices, exchange, refresh_every, make=Shampoo, dtypes=(torch.float32,), **settings):
    params = [nn.Parameter(torch.randn(16, 8, dtype=dtypes[i % len(dtypes)])) for i in range(matrices)]
    optimizer = make(
        params,
        blocking=BlockingConfig(block_size=8),
        staleness=StalenessConfig(refresh_every=refresh_every, max_staleness=1000, policy="keep"),
        service=exchange,
        **settings,
    )
    preconditioner = getattr(optimizer, "_attached_preconditioner", optimizer)
    for _ in range(2 * refresh_every + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert preconditioner.metrics()["blocks_with_version"] == 2 * matrices
    return launches_of(optimizer)


def attached(params, **settings):
    optimizer = torch.optim.SGD(params, lr=1e-3, foreach=True)
    attach(optimizer, **settings)
    return optimizer


COUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": False}
SETTINGS = {
    "default": {},
    "bfloat16": {"dtypes": (torch.bfloat16,)},
    "bfloat16, all that changes gradients": {"dtypes": (torch.bfloat16,), "maximize": True, **COUPLED},
    "float64": {"dtypes": (torch.float64,)},
    "several dtypes": {"dtypes": (torch.float32, torch.float64, torch.bfloat16), "maximize": True, **COUPLED},
    "several dtypes, lamb": {
        "dtypes": (torch.float32, torch.float64, torch.bfloat16),
        "grafting": GraftingConfig(method="lamb"),
    },
    "maximize": {"maximize": True},
    "coupled decay": COUPLED,
    "decoupled decay": {"weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "averages, grafted": {"momentum": 0.9, "momentum_of": "preconditioned", "dampening": 0.9},
    **{m.value: {"grafting": GraftingConfig(method=m), "weight_decay": 0.1} for m in Grafting},
    **{
        f"attached, {method.value}": {"make": attached, "grafting": GraftingConfig(method=method)}
        for method in Grafting
    },
    "attached, bfloat16": {"make": attached, "dtypes": (torch.bfloat16,)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_ordinary_step_launches_the_same_for_four_times_the_blocks(settings):
    few, many = (launches(count, FrozenExchange(), 4, **settings) for count in (3, 12))
    assert many == few


def test_the_model_is_gpt2_small():
    with torch.device("meta"):
        whole = GPT2()
    assert sum(p.numel() for p in whole.parameters()) == 124_439_808
    small = GPT2(1 / 64, layers=2)
    assert [p.shape for p in small.parameters() if p.ndim == 2][:3] == [(785, 12), (16, 12), (36, 12)]
    tokens = small.random_batch(3)
    assert small(tokens[:, :-1]).shape == (3, 16, 785)


def test_a_position_sees_only_what_stands_before_it():
    torch.manual_seed(0)
    model = GPT2(1 / 64, layers=2)
    tokens = model.random_batch(1)[:, :-1]
    other = tokens.clone()
    other[:, 9:] = 0
    assert torch.equal(model(tokens)[:, :9], model(other)[:, :9])
    assert not torch.equal(model(tokens)[:, 9], model(other)[:, 9])


NAMES = ["AdamW (foreach)", "Shampoo, frozen", "Shampoo, asynchronous", "Shampoo, synchronous"]


@pytest.mark.timeout(120)
def test_the_command_times_all_contenders(tmp_path, capsys):
    target = tmp_path / "step.json"
    command = "bench step --scale 0.03 --layers 1 --block-size 64 --steps 8 --refresh-every 2 --json"
    main([*command.split(), str(target)])
    result = json.loads(target.read_text())
    assert [cost["name"] for cost in result["costs"]] == NAMES
    assert result["batch_size"] is None
    assert result["costs"][3]["versions_adopted"] > 0
    assert all(cost["median_ms"] > 0 and cost["launches"] > 0 for cost in result["costs"])
    assert "optimizer.step()" in capsys.readouterr().out


def test_the_whole_training_step(tmp_path, capsys):
    result = bench_step.benchmark(
        scale=0.03,
        layers=1,
        batch_size=2,
        steps=8,
        block_size=64,
        refresh_every=2,
        device="cpu",
        service=LocalExchange(2),
        profile_file=tmp_path / "profile.txt",
    )
    assert [cost.name for cost in result.costs] == NAMES
    assert all(cost.median_ms > 0 for cost in result.costs)
    assert [cost.versions_adopted > 0 for cost in result.costs] == [False, False, True, True]
    Console().print(bench_step.table(result))
    assert "training step, batches of 2 sequences" in capsys.readouterr().out
    assert "aten::bmm" in (tmp_path / "profile.txt").read_text()


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "torch finds no GPU here"), ("gpu", "String should match pattern")]
)
def test_a_device_that_is_not_there(monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["bench", "step", "--device", device])
    assert message in capsys.readouterr().err


def test_a_service_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(step_timing, "FIRST_VERSIONS_TIMEOUT", 0.0)
    silent = LocalExchange(delay=10**6)
    with pytest.raises(TimeoutError, match="only 0 of"):
        bench_step.measure(
            "silent",
            lambda model: Shampoo(model.parameters(), service=silent),
            GPT2(1 / 64, layers=1),
            batch_size=None,
            steps=1,
            interval=1,
        )


def test_a_local_exchange_is_one_too():
    assert launches(2, LocalExchange(), 1) > 0


def test_a_step_is_not_timed_with_the_copies_beside_it(monkeypatch):
    waited = []

    class Waiting:
        def synchronize(self):
            waited.append(self)

    def whole_device(device):
        raise AssertionError(f"waited for all streams of {device}")

    training = Waiting()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(torch.cuda, "synchronize", whole_device)
    timer = step_timing.StepTimer(lambda m: torch.optim.SGD(m.parameters()), torch.nn.Linear(2, 2), None)
    timer._device = torch.device("cuda", 0)
    timer.times(1)
    assert waited == [training, training]
