"""What an engine knows of all its groups together."""

from __future__ import annotations

import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo


def test_ranks_exchange_where_the_blocks_are():
    elsewhere, bias = nn.Parameter(torch.ones(4, 4, device="meta")), nn.Parameter(torch.ones(4))
    for groups in ([bias, elsewhere], [{"params": [bias]}, {"params": [bias.clone().detach(), elsewhere]}]):
        engine = Shampoo(groups, service=LocalExchange())._planned()
        assert engine.device.type == "meta"
    assert Shampoo([bias], service=LocalExchange())._planned().device.type == "cpu"
