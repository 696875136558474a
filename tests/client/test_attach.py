"""The preconditioner in an optimizer that the user already has."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from scripted_exchange import ScriptedExchange

FRESH = StalenessConfig(refresh_every=1, max_staleness=5)
SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=4, max_staleness=20)


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.randn(32, 6) * torch.logspace(0, -2, 6), torch.randn(32, 3)


def backward(model, x, y, optimizer):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def train(model, x, y, optimizer, steps):
    for _ in range(steps):
        backward(model, x, y, optimizer)
        optimizer.step()


@pytest.mark.parametrize("grafting", ["sgd", "adagrad", "rmsprop", "adam", "lars", "lamb", "none"])
def test_under_plain_sgd_it_is_shampoo_itself(grafting):
    """The two share all machinery, so with SGD behind the hook the weights are the same to the bit."""
    settings = {
        "grafting": GraftingConfig(method=grafting),
        "statistics": StatisticsConfig(beta=0.9),
        "blocking": BlockingConfig(block_size=5),
        "staleness": FRESH,
        "service": LocalExchange(),
    }
    hooked, x, y = model_and_data()
    sgd = torch.optim.SGD(hooked.parameters(), lr=0.01)
    attach(sgd, hooked, **settings)
    direct, _, _ = model_and_data()
    shampoo = Shampoo(
        direct.named_parameters(), lr=0.01, beta1=0.0, **{**settings, "service": LocalExchange()}
    )
    train(hooked, x, y, sgd, 12)
    train(direct, x, y, shampoo, 12)
    for a, b in zip(hooked.parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_norm_of_every_block_stays_and_nothing_else_is_touched():
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    train(model, x, y, optimizer, 3)
    backward(model, x, y, optimizer)
    raw = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, gradient in raw.items():
        torch.testing.assert_close(seen[name].norm(), gradient.norm())
        assert torch.equal(seen[name], gradient) == name.endswith("bias")
    assert handle.metrics()["versions_adopted"] > 0


def test_it_learns_faster_than_the_optimizer_alone():
    losses = []
    for hooked in (False, True):
        model, x, _ = model_and_data()
        # A target that hangs on the directions in which the inputs are small.
        y = x[:, 3:] / x[:, 3:].std(dim=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if hooked:
            attach(optimizer, model, staleness=FRESH, service=LocalExchange())
        train(model, x, y, optimizer, 100)
        losses.append(float(backward(model, x, y, optimizer).detach()))
    assert losses[1] < 0.9 * losses[0]


def test_detach_restores_everything():
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = (len(optimizer._optimizer_step_pre_hooks), set(vars(optimizer)))
    plain_state = set(optimizer.state_dict())
    handle = attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    train(model, x, y, optimizer, 3)
    handle.detach()
    handle.detach()
    assert (len(optimizer._optimizer_step_pre_hooks), set(vars(optimizer))) == before
    assert set(optimizer.state_dict()) == plain_state
    backward(model, x, y, optimizer)
    raw = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), raw, strict=True):
        assert torch.equal(p.grad, g)
    attach(optimizer, model, staleness=FRESH, service=LocalExchange()).detach()


def test_only_one_at_a_time():
    model, _, _ = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters())
    attach(optimizer, model, service=LocalExchange())
    with pytest.raises(ValueError, match="attached already"):
        attach(optimizer, model, service=LocalExchange())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("grafting", ["sgd", "adam"])
def test_its_state_is_part_of_the_state_dict_and_resumes_bit_for_bit(make, grafting):
    def setup():
        model, x, y = model_and_data()
        optimizer = make(model.parameters(), lr=0.01)
        attach(
            optimizer,
            model,
            grafting=GraftingConfig(method=grafting),
            staleness=SCHEDULED,
            service=LocalExchange(),
        )
        return model, x, y, optimizer

    model, x, y, optimizer = setup()
    train(model, x, y, optimizer, 20)

    first, x, y, stopped = setup()
    train(first, x, y, stopped, 9)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": stopped.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second, x, y, resumed = setup()
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, x, y, resumed, 11)
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_with_and_without_it_load_into_each_other():
    model, x, y = model_and_data()
    plain = torch.optim.AdamW(model.parameters())
    train(model, x, y, plain, 2)
    hooked = torch.optim.AdamW(model.parameters())
    attach(hooked, model, staleness=FRESH, service=LocalExchange())
    hooked.load_state_dict(plain.state_dict())
    train(model, x, y, hooked, 2)
    plain.load_state_dict(hooked.state_dict())
    train(model, x, y, plain, 2)


def test_a_checkpoint_of_another_model_is_refused_by_name():
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters())
    attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    train(model, x, y, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    key = next(k for k in state["preconditioner"]["state"][0] if k.endswith("statistics.0"))
    state["preconditioner"]["state"][0][key] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"0\.weight: block\.\S+\.statistics\.0 has shape \(2, 2\)"):
        optimizer.load_state_dict(state)


def test_schedulers_clipping_accumulation_and_zero_grad():
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    first = None
    for _ in range(20):
        optimizer.zero_grad(set_to_none=True)
        for half in (slice(0, 16), slice(16, 32)):
            loss = nn.functional.mse_loss(model(x[half]), y[half]) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        first = first if first is not None else loss.item()
    assert loss.item() < first


def test_a_scaler_skips_an_infinite_step_before_it_reaches_statistics():
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if step == 3:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert handle.metrics()["step"] == 5


def test_a_group_added_later_joins_and_names_come_from_the_model():
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    exchange = ScriptedExchange()
    attach(optimizer, model, service=exchange)
    train(model, x, y, optimizer, 1)
    assert [b.name for b in exchange.session.blocks] == ["0.weight"]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, x, y, optimizer, 1)
    assert [b.name for b in exchange.session.blocks] == ["0.weight", "2.weight"]


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer():
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, service=LocalExchange())
    backward(model, x, y, optimizer)
    model[0].weight.grad[0, 0] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of 0\.weight holds 1 NaN"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def saved(optimizer):
    torch.save(optimizer, io.BytesIO())


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps, saved])
def test_an_optimizer_is_not_copied_without_its_preconditioner(take):
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = attach(optimizer, model, service=LocalExchange())
    train(model, x, y, optimizer, 2)
    with pytest.raises(TypeError, match=r"AdamW has a preconditioner attached.*state_dict\(\).*detach\(\)"):
        take(optimizer)
    handle.detach()
    take(optimizer)


def test_an_optimizer_with_state_is_attached_to_with_a_warning(caplog):
    model, x, y = model_and_data()
    first = torch.optim.AdamW(model.parameters())
    attach(first, model, service=LocalExchange())
    assert not caplog.records
    train(model, x, y, first, 2)
    second = torch.optim.AdamW(model.parameters())
    second.load_state_dict(first.state_dict())
    attach(second, model, service=LocalExchange())
    assert "call attach() before load_state_dict()" in caplog.text


def test_an_optimizer_that_makes_its_state_before_the_first_step_has_made_none(caplog):
    model, x, y = model_and_data()
    optimizer = torch.optim.Adagrad(model.parameters())
    attach(optimizer, model, service=LocalExchange()).detach()
    assert not caplog.records
    train(model, x, y, optimizer, 1)
    attach(optimizer, model, service=LocalExchange())
    assert "Adagrad has state already" in caplog.text


BEGINS_ANEW = "the preconditioner attached to it begins anew"


def attached(grafting="sgd"):
    model, x, y = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach(
        optimizer,
        model,
        grafting=GraftingConfig(method=grafting),
        staleness=SCHEDULED,
        service=LocalExchange(),
    )
    return model, x, y, optimizer, handle


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("grafting", ["sgd", "adam"])
def test_the_handle_is_saved_and_loaded_by_torch_distributed_checkpoint(grafting, tmp_path, caplog):
    whole, x, y, optimizer, _ = attached(grafting)
    train(whole, x, y, optimizer, 20)
    model, x, y, optimizer, handle = attached(grafting)
    train(model, x, y, optimizer, 9)

    def parts(model, optimizer, handle):
        own = get_optimizer_state_dict(model, optimizer)
        return {"model": model.state_dict(), "optimizer": own, "preconditioner": handle}

    dcp.save(parts(model, optimizer, handle), checkpoint_id=tmp_path)
    model, x, y, optimizer, handle = attached(grafting)
    state = parts(model, optimizer, handle)
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert handle.metrics()["step"] == 9
    assert BEGINS_ANEW not in caplog.text
    train(model, x, y, optimizer, 11)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_torch_saves_without_the_preconditioner_is_loaded_with_a_warning(caplog):
    model, x, y, optimizer, _ = attached()
    train(model, x, y, optimizer, 9)
    state = get_optimizer_state_dict(model, optimizer)
    model, _, _, optimizer, _ = attached()
    optimizer.load_state_dict(optimizer.state_dict())
    assert BEGINS_ANEW not in caplog.text
    set_optimizer_state_dict(model, optimizer, state)
    assert caplog.text.count(BEGINS_ANEW) == 1
    assert "handle.load_state_dict()" in caplog.text


def test_a_checkpoint_of_shampoo_is_refused_before_anything_is_changed():
    """Torch would take its groups, which lack what the optimizer reads in the next step."""
    model, x, y, optimizer, handle = attached()
    train(model, x, y, optimizer, 3)
    shampoo = Shampoo(model.named_parameters(), service=LocalExchange())
    train(model, x, y, shampoo, 2)
    with pytest.raises(ValueError, match=r"which preconditions by itself, as Shampoo, and lacks what AdamW"):
        optimizer.load_state_dict(shampoo.state_dict())
    train(model, x, y, optimizer, 1)
    assert handle.metrics()["step"] == 4


def test_with_a_plain_checkpoint_a_handle_that_has_trained_begins_anew(caplog):
    """Statistics of another run are of no use to this one."""
    model, x, y = model_and_data()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, x, y, plain, 3)
    runs = []
    for steps in (0, 9):
        other, x, y, optimizer, handle = attached("adam")
        train(other, x, y, optimizer, steps)
        epoch = handle.metrics()["epoch"]
        other.load_state_dict(model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        metrics = handle.metrics()
        assert (metrics["step"], metrics["blocks_with_version"]) == (0, 0)
        assert steps == 0 or metrics["epoch"] > epoch
        for of_parameter in handle.state_dict()["state"]:
            tensors = (value for value in of_parameter.values() if torch.is_tensor(value))
            assert not any(t.any() for t in tensors if t.is_floating_point())
        # Fewer than it takes for the first version.
        train(other, x, y, optimizer, 3)
        runs.append(list(other.parameters()))
    assert caplog.text.count(BEGINS_ANEW) == 2
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_grafting_that_keeps_a_moment_refuses_steps_without_it():
    model, x, y, optimizer, _ = attached("lars")
    train(model, x, y, optimizer, 3)
    _, _, _, other, _ = attached("adam")
    with pytest.raises(ValueError, match=r"0\.weight: .*lacks 'second_moment'.*take 'preconditioner' out of"):
        other.load_state_dict(optimizer.state_dict())


def test_a_complex_parameter_of_a_group_added_later_is_refused():
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, service=LocalExchange())
    train(model, x, y, optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]})
    backward(model, x, y, optimizer)
    with pytest.raises(ValueError, match=r"group1\.parameter0 is complex \(torch\.complex64\)"):
        optimizer.step()
    assert handle.metrics()["step"] == 1
