"""The optimizer as a user meets it: settings, bad input, schedulers, closures, odd parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    ExchangeError,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from scripted_exchange import ScriptedExchange


def local(params, delay=0, **kwargs):
    kwargs.setdefault("staleness", StalenessConfig(refresh_every=2, max_staleness=20))
    return Shampoo(params, service=LocalExchange(delay), **kwargs)


def regression(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 6) * torch.logspace(0, -2, 6)
    y = torch.stack([x.sum(1) * 30, (x[:, 5] * 100).sin()], dim=1)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def train(model, loss, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return loss().item()


def test_the_common_case_learns_faster_than_its_diagonal_alone():
    model, loss = regression()
    shampoo = train(model, loss, local(model.parameters(), lr=1e-2), 150)
    model, loss = regression()
    diagonal = train(
        model, loss, local(model.parameters(), lr=1e-2, blocking=BlockingConfig(max_side=1)), 150
    )
    assert shampoo < 0.8 * diagonal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0, not 0.0"),
        ({"lr": -1e-3}, "lr must be > 0, not -0.001"),
        ({"lr": float("nan")}, "lr must be > 0, not nan"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), not 1.0"),
        ({"momentum": -0.1}, "momentum must be >= 0, not -0.1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"nesterov": True}, "nesterov needs momentum > 0"),
        ({"momentum_of": "updates"}, "momentum_of must be one of 'grafted', 'preconditioned', not 'updates'"),
        ({"momentum_of": "preconditioned"}, "momentum_of='preconditioned' needs momentum > 0, not 0.0"),
        (
            {"momentum_of": "preconditioned", "momentum": 0.9, "dampening": 1.0},
            r"momentum_of='preconditioned' needs dampening < 1, not 1\.0",
        ),
        (
            {"momentum_of": "preconditioned", "momentum": 0.9, "nesterov": True},
            "momentum_of='preconditioned' has no nesterov form: take 'grafted'",
        ),
        (
            {"grafting": "adam"},
            r"grafting must be a GraftingConfig, not 'adam': give GraftingConfig\(method=.., ",
        ),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        local([nn.Parameter(torch.ones(2, 2))], **settings)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="learning_rate"):
        local([nn.Parameter(torch.ones(2, 2))], learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"unknown key in a parameter group: \['weigth_decay'\]"):
        local([{"params": [nn.Parameter(torch.ones(2, 2))], "weigth_decay": 0.1}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraftingConfig(method="adamw"), "adamw"),
        (lambda: GraftingConfig(beta2=1.0), r"beta2 must be in \[0, 1\), not 1.0"),
        (lambda: StatisticsConfig(beta=1.0), "accumulation='sum'"),
        (lambda: BlockingConfig(block_size=0), "block_size must be >= 1, not 0"),
        (lambda: Ridge(value=-1), "ridge value must be finite and >= 0, not -1"),
        (lambda: RootConfig(exponent=0.0), "exponent must be finite and > 0"),
        (lambda: StalenessConfig(max_staleness=0), "max_staleness must be >= 1 step, not 0"),
        (
            lambda: StalenessConfig(max_staleness=5, refresh_every=10),
            "max_staleness 5 is smaller than the refresh interval 10",
        ),
        (lambda: StalenessConfig(max_staleness=5), "smaller than the refresh interval 10"),
        (lambda: StalenessConfig(adoption="scheduled", delay=3), "needs refresh_every"),
        (lambda: StalenessConfig(adoption="scheduled", refresh_every=3), "needs delay >= 1 step, not None"),
        (
            lambda: StalenessConfig(adoption="scheduled", refresh_every=10, delay=10, max_staleness=18),
            "delay \\+ refresh_every - 1 = 19",
        ),
        (lambda: StalenessConfig(delay=3), "delay belongs to adoption='scheduled'"),
        (lambda: StalenessConfig(policy="skip"), "skip"),
    ],
)
def test_settings_objects_validate_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_complex_parameter_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"encoder.*complex.*view_as_real"):
        local([("encoder", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])


def test_a_sparse_gradient_is_refused_by_name():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = local(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of weight is sparse"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    model, loss = regression()
    optimizer = local(model.named_parameters())
    train(model, loss, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss().backward()
    model[2].weight.grad[0, 1] = value
    with pytest.raises(ValueError, match=r"gradient of 2\.weight holds 1 NaN or infinite"):
        optimizer.step()
    for p, w in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, w)
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        for key, entry in state.items():
            same = torch.equal(entry, after["state"][index][key]) if torch.is_tensor(entry) else None
            assert same in (True, None)
            assert same or entry == after["state"][index][key]


def test_finite_gradients_whose_square_overflows_are_accepted():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = local([p], grafting=GraftingConfig(method="sgd"), blocking=BlockingConfig(max_side=1))
    p.grad = torch.full((3, 2), 1e25)
    optimizer.step()
    assert bool(torch.isfinite(p).all())


def test_parameters_of_every_kind():
    params = [
        nn.Parameter(torch.ones(())),
        nn.Parameter(torch.ones(5)),
        nn.Parameter(torch.ones(0, 4)),
        nn.Parameter(torch.randn(4, 3)),
        nn.Parameter(torch.randn(4, 3, 2, 2, 2)),
        nn.Parameter(torch.randn(4, 3), requires_grad=False),
        nn.Parameter(torch.randn(6, 4).to(torch.bfloat16)),
        nn.Parameter(torch.randn(6, 4).to(torch.float16)),
        nn.Parameter(torch.randn(6, 4).to(torch.float64)),
        nn.Parameter(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)),
    ]
    optimizer = local(params, lr=1e-2, blocking=BlockingConfig(block_size=4))
    before = [p.detach().clone() for p in params]
    for step in range(6):
        for index, p in enumerate(params):
            skipped = not p.requires_grad or (index == 3 and step % 2)
            p.grad = None if skipped else torch.randn_like(p)
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert bool(torch.isfinite(p.float()).all())
        assert p.dtype == b.dtype
        assert (p.numel() == 0 or not p.requires_grad) == torch.equal(p, b)


def test_groups_with_settings_of_their_own():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    exchange = ScriptedExchange()
    optimizer = Shampoo(
        [
            {"params": [a], "lr": 1.0, "beta1": 0.0, "grafting": GraftingConfig(method="sgd")},
            {
                "params": [b],
                "lr": 0.5,
                "beta1": 0.0,
                "root": RootConfig(exponent=0.5, ridge=Ridge(value=1e-3)),
                "grafting": GraftingConfig(method="none"),
            },
        ],
        service=exchange,
    )
    for p in (a, b):
        p.grad = torch.ones_like(p)
    start = [a.detach().clone(), b.detach().clone()]
    optimizer.step()
    torch.testing.assert_close(start[0] - a.detach(), torch.ones(4, 3))
    torch.testing.assert_close(start[1] - b.detach(), torch.full((4, 3), 0.5))
    first, second = exchange.session.blocks
    assert first.root_orders == (4.0, 4.0)
    assert second.root_orders == (2.0, 2.0)
    assert second.ridge.value == 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("statistics", StatisticsConfig(beta=0.5)),
        ("blocking", BlockingConfig(block_size=2)),
        ("root", RootConfig(exponent=0.5)),
    ],
)
def test_a_setting_that_comes_too_late_for_the_blocks_is_refused(key, value):
    """Nothing would come of it."""
    model, loss = regression()
    optimizer = local(model.parameters())
    made_with = optimizer.param_groups[0][key]
    train(model, loss, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key} of group 0 became .* set it back, or make a new optimizer"):
        train(model, loss, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.param_groups[0][key] = copy.deepcopy(made_with)
    train(model, loss, optimizer, 1)


def test_exponents_follow_the_number_of_preconditioned_sides():
    params = [
        nn.Parameter(torch.randn(4, 3)),
        nn.Parameter(torch.randn(30, 3)),
        nn.Parameter(torch.randn(4, 3, 5)),
    ]
    exchange = ScriptedExchange()
    optimizer = Shampoo(params, service=exchange, blocking=BlockingConfig(merge_dims=False, max_side=10))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    orders = {b.sides: b.root_orders for b in exchange.session.blocks}
    assert orders == {(4, 3): (4.0, 4.0), (3,): (2.0,), (4, 3, 5): (6.0, 6.0, 6.0)}


def test_a_learning_rate_scheduler_and_a_tensor_learning_rate():
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    plain = local([p], lr=0.1)
    tensor = local([q], lr=torch.tensor(0.1))
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20) for o in (plain, tensor)]
    for step in range(19):
        for w in (p, q):
            w.grad = torch.full_like(w, 1.0 + step)
        for optimizer, scheduler in zip((plain, tensor), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(p, q)


def cycled(optimizer, parameter, steps, scheduler):
    """Train on given gradients with a scheduler that cycles momentum as well."""
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, 1.0 + step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.05, 0.2, step_size_up=4),
    ],
    ids=["one cycle", "cyclic"],
)
def test_a_scheduler_that_cycles_momentum_cycles_beta1_as_it_does_with_adamw(schedule):
    ours, theirs = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    shampoo = local(
        [ours], lr=0.1, beta1=0.9, blocking=BlockingConfig(max_side=1), grafting=GraftingConfig(beta2=0.99)
    )
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    cycled(shampoo, ours, 10, schedule(shampoo))
    cycled(adamw, theirs, 10, schedule(adamw))
    assert "momentum_buffer" not in shampoo.state[ours]
    torch.testing.assert_close(ours, theirs)


def test_a_cycled_heavy_ball_stays_one():
    ours, theirs = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    none = {"blocking": BlockingConfig(max_side=1), "grafting": GraftingConfig(method="none")}
    shampoo = local([ours], lr=0.01, beta1=0.0, momentum=0.9, **none)
    sgd = torch.optim.SGD([theirs], lr=0.01, momentum=0.9)
    for optimizer, parameter in ((shampoo, ours), (sgd, theirs)):
        cycled(optimizer, parameter, 8, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10))
    torch.testing.assert_close(ours, theirs)


def test_a_copied_group_whose_momentum_is_cycled_has_no_heavy_ball_either():
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = local([first], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
    cycled(optimizer, first, 3, scheduler)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [second]})
    for _ in range(3):
        second.grad = torch.ones(3, 2)
        cycled(optimizer, first, 1, scheduler)
    assert "momentum_buffer" not in optimizer.state[second]
    before, after = (group["beta1"] for group in optimizer.param_groups)
    assert before == after


def test_memory_counts_no_momentum_that_is_an_average():
    plain, cycling = (local([nn.Parameter(torch.ones(64, 64))], lr=0.1) for _ in range(2))
    torch.optim.lr_scheduler.OneCycleLR(cycling, 0.2, total_steps=20)
    assert cycling.estimate_memory() == plain.estimate_memory()


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_with_cycled_momentum_resumes_bit_for_bit(momentum, consolidated):
    def begin():
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(3, 2))
        optimizer = local([parameter], lr=0.1, momentum=momentum)
        return parameter, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)

    whole, optimizer, scheduler = begin()
    cycled(optimizer, whole, 6, scheduler)
    if consolidated:
        optimizer.consolidate_state_dict()
    saved = copy.deepcopy((whole.detach(), optimizer.state_dict(), scheduler.state_dict()))
    cycled(optimizer, whole, 6, scheduler)
    resumed, optimizer, scheduler = begin()
    resumed.data.copy_(saved[0])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    cycled(optimizer, resumed, 6, scheduler)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_tensor_learning_rate_is_the_number_that_it_holds(dtype, decoupled):
    weights = []
    for lr in (torch.tensor(3e-2).item(), torch.tensor(3e-2)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        optimizer = local([p], lr=lr, weight_decay=0.1, decoupled_weight_decay=decoupled)
        for _ in range(4):
            p.grad = torch.randn(4, 3).to(dtype)
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model, loss = regression()
    optimizer = local(model.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    first = optimizer.step(closure).item()
    for _ in range(50):
        last = optimizer.step(closure).item()
    assert last < first


def test_a_step_without_any_gradient_is_none_at_all():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = local([p])
    assert optimizer.step() is None
    assert optimizer.metrics()["step"] == 0


def test_a_service_that_refuses_for_good_stops_training_with_its_reason():
    class Refusing(ScriptedExchange):
        def collect(self, step):
            raise ExchangeError("wrong token")

    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([p], service=Refusing())
    p.grad = torch.ones_like(p)
    with pytest.raises(ExchangeError, match="wrong token"):
        optimizer.step()


def test_metrics_are_plain():
    model, loss = regression()
    optimizer = local(model.parameters(), delay=1)
    train(model, loss, optimizer, 10)
    metrics = optimizer.metrics()
    for key, value in metrics.items():
        assert isinstance(value, int | float | list | bool | type(None)), key
    assert metrics["step"] == 10
    assert metrics["age_max"] <= metrics["max_staleness"]
    assert metrics["waits"] == 0
    assert set(metrics["ages"]) == {1}


def test_an_optimizer_is_not_copied_by_accident():
    optimizer = local([nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_one_exchange_serves_one_optimizer_at_a_time():
    exchange = LocalExchange()

    def made():
        model = nn.Linear(3, 2, bias=False)
        model.weight.grad = torch.ones(2, 3)
        return model, Shampoo(model.parameters(), service=exchange)

    _, first = made()
    first.step()
    model, second = made()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="this LocalExchange serves another optimizer"):
        second.step()
    assert torch.equal(model.weight, before)
    first.close()
    second.step()
    assert not torch.equal(model.weight, before)

    del second  # what is gone holds nothing
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = torch.ones(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, service=exchange)
    optimizer.step()
    _, last = made()
    with pytest.raises(ValueError, match="serves another optimizer"):
        last.step()
    handle.detach()
    last.step()
