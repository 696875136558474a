"""Scenarios of pretended accelerators, one for each rank, whose collectives know no tensor of the host."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distributed_training import (
    EAGER,
    SCHEDULED,
    gradient,
    make_attached,
    make_model,
    make_optimizer,
    set_gradients,
    weights,
)
from guarded_training import Answering
from kfac_models import Words, batch, loss_of, seeded
from preconditioner_client import (
    KFAC,
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
)
from preconditioner_client import engine as engine_module
from pretend_cuda import pretended_cuda
from sharded_training import uneven

OVERLAP = DistributedConfig(overlap=True, bucket_bytes=600, communication_dtype=torch.bfloat16)
OFTEN = StalenessConfig(refresh_every=1, max_staleness=100)


@contextlib.contextmanager
def own_accelerator(lag=2):
    """The pretended device with the number of this rank, as after ``torch.cuda.set_device``."""
    with pretended_cuda(lag) as accelerator:
        torch.cuda.set_device(dist.get_rank())
        accelerator.device = torch.device("cuda", dist.get_rank())
        yield accelerator
        assert accelerator.runtime.contexts == {dist.get_rank()}


def guarded():
    """Within it the CPU takes the steps of an accelerator."""
    return patch.object(engine_module, "is_deferred", lambda device: True)


def train(model, optimizer, steps=range(12), within=contextlib.nullcontext):
    """The weights in the end, on the host; each step is within what ``within`` gives."""
    for step in steps:
        set_gradients(model, step, {2} if step % 3 == 1 else ())
        with within():
            optimizer.step()
    return [weight.cpu() for weight in weights(model)]


def assert_same(found, expected):
    for there, here in zip(found, expected, strict=True):
        assert torch.equal(there, here), f"up to {(there - here).abs().max()}"


def accelerators_give_the_bits_of_the_cpu(folder):
    eager = {"distributed": OVERLAP, "staleness": EAGER, "service": LocalExchange(3)}
    for settings, lag in (({}, 2), (eager, 0)):
        with guarded():
            model = make_model()
            here = train(model, make_optimizer(model, **settings))
        with own_accelerator(lag) as accelerator:
            model = make_model().to(accelerator.device)
            optimizer = make_optimizer(model, **settings)
            # Whatever the program's default device is.
            assert_same(train(model, optimizer, within=lambda: accelerator.device), here)
            assert optimizer.metrics()["versions_adopted"] > 0


def layers_on_accelerators_do_so_too(folder):
    def trained(device):
        model = seeded(Words).to(device)
        optimizer = KFAC(model, lr=1e-2, service=LocalExchange(1), staleness=StalenessConfig(refresh_every=2))
        for step in range(8):
            optimizer.zero_grad()
            part = slice(dist.get_rank(), None, dist.get_world_size())
            inputs, targets = (tensor[part].to(device) for tensor in batch(model, step))
            loss_of(model, inputs, targets).backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
        assert optimizer.metrics()["versions_adopted"] > 0
        return [weight.cpu() for weight in weights(model)]

    with guarded():
        here = trained("cpu")
    with own_accelerator(lag=0) as accelerator:
        assert_same(trained(accelerator.device), here)


def no_step_of_replicas_waits_for_their_accelerators(folder):
    with own_accelerator() as accelerator:
        for make in (
            lambda model: make_optimizer(model, service=Answering(), staleness=OFTEN),
            lambda model: make_optimizer(model, service=Answering(), staleness=OFTEN, distributed=OVERLAP),
            lambda model: make_attached(model, service=Answering(), staleness=OFTEN)[0],
        ):
            model = make_model().to(accelerator.device)
            optimizer = make(model)
            train(model, optimizer, [0])  # a session begins, and ranks compare what they train
            train(model, optimizer, range(1, 8), accelerator.no_waiting)


def a_state_is_collected_from_accelerators(folder):
    with guarded():
        model = make_model()
        single = make_optimizer(model, distributed="off")
        train(model, single)
    expected = single.state_dict()["state"]
    with own_accelerator() as accelerator:
        model = make_model().to(accelerator.device)
        optimizer = make_optimizer(model)
        train(model, optimizer)
        with accelerator.device:
            optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            found = optimizer.state_dict()["state"]
            for index, state in expected.items():
                for key, value in state.items():
                    if torch.is_tensor(value):
                        assert torch.equal(found[index][key].cpu(), value), key


def make_shards(device, **settings):
    """Rows of this rank, some of them none, and their optimizer; as after ``fully_shard``."""
    mesh = DeviceMesh(device.type, list(range(dist.get_world_size())))
    parameters = []
    for whole in uneven().parameters():
        rows = whole.detach().chunk(dist.get_world_size())
        own = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole.detach()[:0]
        parameters.append(nn.Parameter(as_shard(own.to(device), whole, mesh)))
    return parameters, Shampoo(parameters, blocking=BlockingConfig(block_size=8), lr=1e-2, **settings)


def as_shard(rows, whole, mesh):
    return DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def train_shards(parameters, optimizer, steps, within=contextlib.nullcontext, bad=None):
    """The rows in the end, on the host. In step ``bad`` the last rank's gradients hold infinity."""
    for step in steps:
        for index, parameter in enumerate(parameters):
            rows = gradient(parameter.shape, index, step).chunk(dist.get_world_size())
            own = rows[dist.get_rank()] if dist.get_rank() < len(rows) else rows[0][:0]
            if step == bad and dist.get_rank() == dist.get_world_size() - 1:
                own = own.fill_(float("inf"))
            own = own.to(parameter.to_local().device)
            parameter.grad = as_shard(own, parameter, parameter.device_mesh)
        with within():
            optimizer.step()
    return [parameter.to_local().detach().clone().cpu() for parameter in parameters]


def shards_on_accelerators_do_so_too(folder):
    settings = {"grafting": GraftingConfig(method="lamb"), "weight_decay": 0.1}
    scheduled = {"staleness": SCHEDULED, "service": LocalExchange(1)}
    with guarded():
        parameters, optimizer = make_shards(torch.device("cpu"), **settings, **scheduled)
        here = train_shards(parameters, optimizer, range(12), bad=9)
    with own_accelerator() as accelerator:
        parameters, optimizer = make_shards(accelerator.device, **settings, **scheduled)
        assert_same(train_shards(parameters, optimizer, range(12), bad=9), here)
        accelerator.synchronize()
        assert optimizer.metrics()["nonfinite_steps"] == 1
        optimizer.consolidate_state_dict()
        often = {"staleness": OFTEN, "service": Answering()}
        parameters, optimizer = make_shards(accelerator.device, **settings, **often)
        train_shards(parameters, optimizer, [0])
        train_shards(parameters, optimizer, range(1, 6), accelerator.no_waiting)


def parameters_that_no_backend_reaches_are_refused_by_name(folder):
    """As parameters on the host are where there is NCCL alone."""

    def gloo(store, rank, size, timeout):
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("cuda_only", gloo, devices=["cuda"])
    config = DistributedConfig(process_group=dist.new_group(backend="cuda_only"))
    optimizer = make_optimizer(model := make_model(), distributed=config)
    with pytest.raises(ValueError, match=r"0\.weight is on cpu.* only for cuda: .*cpu:gloo,cuda:nccl"):
        train(model, optimizer, [0])


SCENARIOS = [
    accelerators_give_the_bits_of_the_cpu,
    layers_on_accelerators_do_so_too,
    shards_on_accelerators_do_so_too,
    no_step_of_replicas_waits_for_their_accelerators,
    a_state_is_collected_from_accelerators,
    parameters_that_no_backend_reaches_are_refused_by_name,
]
