"""What frameworks do with an optimizer: wrap it, call it with closures, save it, load it."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from framework_training import data, make, small_model
from preconditioner_client import Shampoo
from preconditioner_client.adapters import lightning_callback, metrics_source
from scripted_exchange import ScriptedExchange


@pytest.fixture(scope="module")
def lightning_training():
    """Not at the top: Lightning takes seconds to import, in every process that collects tests."""
    import lightning_training

    return lightning_training


def equal_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def reference(attached, steps=8, skip=None):
    """The same training in a plain loop."""
    model = small_model()
    optimizer = make(model, attached)
    batches = list(DataLoader(TensorDataset(*data()), batch_size=8))
    for step in range(steps):
        if step == skip:
            continue
        optimizer.zero_grad()
        x, y = batches[step % len(batches)]
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


attached_or_not = pytest.mark.parametrize("attached", [False, True])


@attached_or_not
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_trains_as_a_plain_loop_does(lightning_training, tmp_path, attached, automatic):
    """Backward and clipping happen in the closure, and before the preconditioner's turn."""
    module = lightning_training.Module(attached, automatic)
    trainer = lightning_training.fit(module, tmp_path, enable_checkpointing=False)
    assert equal_weights(module.model, reference(attached))
    metrics = metrics_source(trainer.optimizers[0]).metrics()
    assert metrics["step"] == 8
    assert metrics["versions_adopted"] > 0


@attached_or_not
def test_a_batch_that_lightning_skips_reaches_no_statistics(lightning_training, tmp_path, attached):
    module = lightning_training.Module(attached, skip=3)
    trainer = lightning_training.fit(module, tmp_path, enable_checkpointing=False)
    assert equal_weights(module.model, reference(attached, skip=3))
    assert metrics_source(trainer.optimizers[0]).metrics()["step"] == 7


@attached_or_not
def test_lightning_resumes_bit_for_bit(lightning_training, tmp_path, attached):
    every = lightning_training.lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    uninterrupted = lightning_training.Module(attached)
    lightning_training.fit(uninterrupted, tmp_path, epochs=2, callbacks=[every])
    resumed = lightning_training.Module(attached)
    trainer = lightning_training.fit(
        resumed, tmp_path, epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt", enable_checkpointing=False
    )
    assert trainer.global_step == 16
    assert equal_weights(uninterrupted.model, resumed.model)


def test_lightning_collects_the_state_of_all_ranks_by_itself(lightning_training, tmp_path, monkeypatch):
    """It asks every optimizer for a method of this name, which is why it has it."""
    asked = []
    monkeypatch.setattr(Shampoo, "consolidate_state_dict", lambda self: asked.append(self))
    trainer = lightning_training.fit(lightning_training.Module(), tmp_path, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert asked == trainer.optimizers


@attached_or_not
def test_lightning_scales_the_loss_of_half_precision(lightning_training, tmp_path, attached):
    """Its precision plugin unscales and clips by itself, and calls step without a closure."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = lightning_training.lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    module = lightning_training.Module(attached)
    trainer = lightning_training.fit(module, tmp_path, enable_checkpointing=False, plugins=[plugin])
    assert metrics_source(trainer.optimizers[0]).metrics()["step"] == 8
    assert all(p.isfinite().all() for p in module.parameters())


def test_metrics_reach_the_loggers_of_lightning(lightning_training, tmp_path):
    logged = []

    class Logger(lightning_training.lightning.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    trainer = lightning_training.fit(
        lightning_training.Module(),
        tmp_path,
        callbacks=[lightning_callback()],
        enable_checkpointing=False,
        logger=Logger(),
        accumulate_grad_batches=2,
    )
    ours = [(step, m) for step, m in logged if "preconditioner/age_max" in m]
    assert [step for step, _ in ours] == [4]
    assert trainer.callback_metrics["preconditioner/step"] == 4


@attached_or_not
def test_accelerate_resumes_bit_for_bit(tmp_path, attached):
    x, y = data()

    def prepared():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = small_model()
        optimizer = make(model, attached)
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator, model, optimizer, batches):
        for number in batches:
            rows = slice(8 * (number % 8), 8 * (number % 8) + 8)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x[rows]), y[rows]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    first = prepared()
    train(*first, range(16))
    first[0].save_state(str(tmp_path / "state"))
    train(*first, range(16, 32))
    assert metrics_source(first[2]).metrics()["step"] == 16
    assert metrics_source(first[2]).metrics()["versions_adopted"] > 0
    second = prepared()
    second[0].load_state(str(tmp_path / "state"))
    train(*second, range(16, 32))
    assert equal_weights(first[1], second[1])


def test_the_train_and_eval_modes_of_an_accelerated_optimizer_pass():
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(make(small_model()))
    optimizer.train()
    optimizer.eval()
    assert not optimizer.step_was_skipped


def test_accelerate_frees_what_it_holds():
    accelerator = accelerate.Accelerator(cpu=True)
    model = small_model()
    optimizer = accelerator.prepare(make(model))
    model, optimizer = accelerator.free_memory(model, optimizer)
    assert optimizer is None


@attached_or_not
def test_parameters_that_a_framework_replaces_after_asking_for_the_state(attached):
    """As sharding does, and here to another shape: plans are made again while there was no step."""
    model = small_model()
    exchange = ScriptedExchange()
    optimizer = make(model, attached, service=exchange)
    optimizer.load_state_dict(optimizer.state_dict())
    part = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer.param_groups[0]["params"] = list(part.parameters())
    part(data()[0]).square().mean().backward()
    optimizer.step()
    assert [(b.name, b.sides) for b in exchange.session.blocks] == [
        ("0.weight", (8, 6)),
        ("2.weight", (3, 8)),
    ]
    assert len(optimizer.state_dict()["state"]) == 4


@attached_or_not
def test_accelerate_shards_with_fsdp2(attached):
    """It wraps the optimizer first, and puts DTensors in the place of its parameters only then."""
    expected = small_model()
    x, y = data()
    train_plainly = make(expected, attached)
    for _ in range(8):
        train_plainly.zero_grad()
        nn.functional.mse_loss(expected(x), y).backward()
        train_plainly.step()

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        # Without a GPU it offers no FSDP, though its code does not depend on one.
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        model = small_model()
        model, optimizer = accelerator.prepare(model, make(model, attached))
        assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
        for _ in range(8):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
        assert metrics_source(optimizer).metrics()["versions_adopted"] > 0
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q)
    finally:
        torch.distributed.destroy_process_group()


@attached_or_not
def test_accelerate_scales_the_loss_and_skips_an_infinite_step(attached):
    """Its wrapper, with a scaler as it makes for float16; on a GPU alone it makes one by itself."""
    accelerator = accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    model, expected = small_model(), small_model()
    x, y = data()
    optimizer = accelerate.optimizer.AcceleratedOptimizer(make(model, attached), scaler=scaler)
    plain = make(expected, attached)
    accelerator.gradient_state._set_sync_gradients(True)
    for step in range(9):
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if step == 4:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert optimizer.step_was_skipped == (step == 4)
        if step != 4:
            plain.zero_grad()
            nn.functional.mse_loss(expected(x), y).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            plain.step()
    assert equal_weights(model, expected)
    assert metrics_source(optimizer).metrics()["step"] == 8
    with pytest.raises(RuntimeError, match="closure cannot be used with GradScaler"):
        optimizer.step(lambda: None)
