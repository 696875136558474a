"""Scenarios of frameworks on several ranks: a run resumed from a checkpoint is the uninterrupted one."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_training
from distributed_shard_checkpoints import Warnings
from distributed_training import assert_replicas_are_equal, assert_same, on_all_ranks
from framework_training import data, make, small_model
from preconditioner_client.adapters import consolidate, hf_callback, lightning_callback, metrics_source

BEST = {
    "save_strategy": "best",
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "eval_steps": 12,
}
"""The only evaluation finds what is the best until then, and has it saved."""

ATTACHED = {"shampoo": False, "attached": True}


def assert_trained(model, optimizer, steps):
    """Replicas hold the same bits, and every rank has preconditioned blocks of its own."""
    assert_replicas_are_equal(model)
    told = on_all_ranks(metrics_source(optimizer).metrics())
    assert [metrics["step"] for metrics in told] == [steps] * len(told)
    assert min(metrics["blocks_with_version"] for metrics in told) > 0
    assert min(metrics["versions_adopted"] for metrics in told) > 0


class WithLoss(nn.Module):
    """As the ``Trainer`` wants it."""

    def __init__(self):
        super().__init__()
        self.model = small_model()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.model(x), labels)}


def train_with_hugging_face(folder, attached, resume=None, **settings):
    model = WithLoss()
    optimizer = make(model, attached)
    examples = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=20,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=examples,
        eval_dataset=examples,
        optimizers=(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)),
        callbacks=[hf_callback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert_trained(model, optimizer, 20)
    return model


def the_hugging_face_trainer_resumes_bit_for_bit(folder):
    """From the middle of its second epoch of eight steps, from the end of that, and from the best model."""
    for name, attached in ATTACHED.items():
        for step, settings in (
            (12, {"save_strategy": "steps", "save_steps": 12}),
            (16, {"save_strategy": "epoch"}),
            (12, BEST),
        ):
            path = folder / f"hugging-face-{name}-{settings['save_strategy']}"
            uninterrupted = train_with_hugging_face(path, attached, **settings)
            resumed = train_with_hugging_face(path, attached, str(path / f"checkpoint-{step}"), **settings)
            assert_same(resumed, uninterrupted)


def train_with_lightning(folder, attached, *callbacks, **settings):
    module = lightning_training.Module(attached)
    trainer = lightning_training.fit(
        module,
        folder,
        epochs=4,
        callbacks=[lightning_callback(), *callbacks],
        strategy="ddp",
        devices=dist.get_world_size(),
        **settings,
    )
    assert trainer.world_size == dist.get_world_size()
    assert_trained(module, trainer.optimizers[0], 32 // dist.get_world_size())
    return module


def lightning_resumes_bit_for_bit(folder):
    """From the end of an epoch: in the middle of one Lightning does not keep the place of a plain loader."""
    every = lightning_training.lightning.pytorch.callbacks.ModelCheckpoint
    for name, attached in ATTACHED.items():
        path = folder / f"lightning-{name}"
        saving = every(path, "{epoch}", save_top_k=-1)
        uninterrupted = train_with_lightning(path, attached, saving)
        resumed = train_with_lightning(
            path, attached, ckpt_path=path / "epoch=1.ckpt", enable_checkpointing=False
        )
        assert_same(resumed, uninterrupted)


def accelerated(attached):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    optimizer = make(model, attached)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    prepared = accelerator.prepare(model, optimizer, loader, scheduler)
    assert accelerator.num_processes == dist.get_world_size()
    accelerator.register_save_state_pre_hook(lambda *_: consolidate(prepared[1]))
    return accelerator, *prepared


def train_epoch(accelerator, model, optimizer, loader, scheduler):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def accelerate_resumes_bit_for_bit(folder):
    """It asks every rank for its state, which is no mistake after a consolidation."""
    log = Warnings()
    logging.getLogger("preconditioner_client").addHandler(log)
    for name, attached in ATTACHED.items():
        path = str(folder / f"accelerate-{name}")
        uninterrupted, resumed = accelerated(attached), accelerated(attached)
        for epoch in range(4):
            if epoch == 2:
                uninterrupted[0].save_state(path)
            train_epoch(*uninterrupted)
        assert not log.messages
        resumed[0].load_state(path)
        for _ in range(2):
            train_epoch(*resumed)
        for _, model, optimizer, *_ in (uninterrupted, resumed):
            assert_trained(model, optimizer, 32 // dist.get_world_size())
        assert_same(resumed[1], uninterrupted[1])
        if not attached:
            resumed[2].state_dict()
            assert "holds the blocks of that rank alone" in log.messages.pop()


def train_shards(model, optimizer):
    for x, y in DataLoader(TensorDataset(*data()), batch_size=4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def trained_shards(attached):
    """A sharded model after a few steps, and its optimizer."""
    model = fully_shard(small_model())
    optimizer = make(model, attached)
    train_shards(model, optimizer)
    return model, optimizer


def has_shards(optimizer):
    state = optimizer.state_dict()
    states = [*state["state"].values(), *state.get("preconditioner", {"state": []})["state"]]
    return any(isinstance(value, DTensor) for of_parameter in states for value in of_parameter.values())


def callbacks_leave_to_torch_what_is_sharded(folder):
    """But for a full state dict, which torch alone does not make whole.

    Saved and loaded by what the ``Trainer`` calls; itself it shards on accelerators only.
    """
    saving, two = SimpleNamespace(should_save=True), SimpleNamespace(world_size=dist.get_world_size())
    accelerator = SimpleNamespace(process_index=dist.get_rank(), wait_for_everyone=dist.barrier)
    for name, whole in (("SHARDED_STATE_DICT", False), ("FULL_STATE_DICT", True)):
        model, optimizer = trained_shards(attached=False)
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=name)
        prepared = SimpleNamespace(
            optimizer=optimizer,
            param_groups=optimizer.param_groups,
            accelerator_state=SimpleNamespace(fsdp_plugin=plugin),
        )
        hf_callback().on_step_end(two, None, saving, optimizer=prepared)
        assert has_shards(optimizer) != whole
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / name)
        weights = get_model_state_dict(model)
        resumed = fully_shard(small_model())
        set_model_state_dict(resumed, weights)
        other = make(resumed)
        load_fsdp_optimizer(plugin, accelerator, other, resumed, folder / name)
        assert other.metrics()["blocks_with_version"] == other.metrics()["blocks"] > 0
        train_shards(model, optimizer)
        train_shards(resumed, other)
        for (name_of, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local()), f"{name}: {name_of}"
    model, optimizer = trained_shards(attached=True)
    states = [get_optimizer_state_dict(model, optimizer)]
    before = optimizer.state_dict()["preconditioner"]["state"]
    trainer = SimpleNamespace(world_size=2, optimizers=[optimizer], is_global_zero=dist.get_rank() == 0)
    checkpoint = {"optimizer_states": list(states)}
    lightning_callback().on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint["optimizer_states"][0] is states[0]
    after = optimizer.state_dict()["preconditioner"]["state"]
    assert [state.keys() for state in before] == [state.keys() for state in after]


SCENARIOS = [
    the_hugging_face_trainer_resumes_bit_for_bit,
    lightning_resumes_bit_for_bit,
    accelerate_resumes_bit_for_bit,
    callbacks_leave_to_torch_what_is_sharded,
]
