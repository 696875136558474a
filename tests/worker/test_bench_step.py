"""Launches of a step do not grow with the number of equal blocks; the command runs end to end."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from preconditioner_client import BlockingConfig, LocalExchange, Shampoo, StalenessConfig
from preconditioner_worker.bench_step import FrozenExchange, gpt2_parameters, launches_of
from preconditioner_worker.cli import main


def launches(matrices, exchange, refresh_every):
    params = [nn.Parameter(torch.randn(16, 8)) for _ in range(matrices)]
    optimizer = Shampoo(
        params,
        blocking=BlockingConfig(block_size=8),
        staleness=StalenessConfig(refresh_every=refresh_every, max_staleness=1000, policy="keep"),
        service=exchange,
    )
    for _ in range(2 * refresh_every + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.metrics()["blocks_with_version"] == 2 * matrices
    return launches_of(optimizer)


def test_an_ordinary_step_launches_the_same_for_four_times_the_blocks():
    few, many = launches(3, FrozenExchange(), 4), launches(12, FrozenExchange(), 4)
    assert many == few


def test_shapes_are_those_of_gpt2_small():
    parameters = gpt2_parameters(1 / 64, 12, torch.device("cpu"))
    assert len(parameters) == 2 + 12 * 12 + 2
    assert sum(p.ndim == 2 for p in parameters) == 2 + 12 * 4


@pytest.mark.timeout(120)
def test_the_command_times_all_contenders(tmp_path, capsys):
    target = tmp_path / "step.json"
    command = "bench step --scale 0.03 --layers 1 --steps 8 --refresh-every 2 --json"
    main([*command.split(), str(target)])
    result = json.loads(target.read_text())
    assert [cost["name"] for cost in result["costs"]] == [
        "AdamW (foreach)",
        "Shampoo, frozen",
        "Shampoo, asynchronous",
        "Shampoo, synchronous",
    ]
    assert result["costs"][3]["versions_adopted"] > 0
    assert all(cost["median_ms"] > 0 and cost["launches"] > 0 for cost in result["costs"])
    assert "optimizer.step()" in capsys.readouterr().out


def test_a_local_exchange_is_one_too():
    assert launches(2, LocalExchange(), 1) > 0
