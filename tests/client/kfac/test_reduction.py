"""What rounding to half precision leaves of a factor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from preconditioner_client.config import BlockingConfig, RootConfig, StatisticsConfig
from preconditioner_client.distribution import Ranks
from preconditioner_client.kfac.factor_stack import MATRIX, LayerSettings
from preconditioner_client.kfac.reduction import FactorReduction
from preconditioner_client.plan import plan_group


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one rank, whose collectives are copies."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(replica_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_a_factor_of_few_examples_stays_semi_definite_and_near(alone, dtype, size):
    settings = LayerSettings(
        blocking=BlockingConfig(),
        statistics=StatisticsConfig(),
        root=RootConfig(),
        kinds=(MATRIX,),
        similar_below=None,
    )
    plan = plan_group(settings, [torch.empty(20, 33)], ["layer"], ranks=alone)
    generator = torch.Generator().manual_seed(0)
    # Six examples, so that most eigenvalues are 0.
    spread = [torch.randn(6, n, generator=generator) * torch.logspace(0, -2, n) for n in (20, 33)]
    sums = [size * x.mT @ x for x in spread]
    reduced = FactorReduction([plan], alone, dtype, torch.device("cpu")).reduce({(0, 0): (6, sums)})
    for total, side in zip(sums, reduced[0, 0], strict=True):
        assert torch.equal(side, side.mT)
        values = torch.linalg.eigvalsh(side.double())
        assert values[0] > -1e-7 * values[-1]
        error = torch.linalg.matrix_norm((side - total / 6).double(), 2)
        assert error <= 2 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(total.double()) / 6
