"""CurveBall against dense Gauss-Newton matrices in NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from preconditioner_worker.rivals import CurveBall
from preconditioner_worker.rivals.curveball import FACTOR, GaussNewton, adapted, solve

BATCH, INPUTS, HIDDEN, CLASSES = 7, 4, 3, 5


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()


def batches(count):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        yield (
            torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )


def unflatten(w):
    sizes = [(HIDDEN, INPUTS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)]
    parts = np.split(w, np.cumsum([int(np.prod(size)) for size in sizes])[:-1])
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def dense(w, x, y):
    """Loss, gradient (W,) and Gauss-Newton matrix (W, W) of softmax cross-entropy, by hand."""
    a, a0, b, b0 = unflatten(w)
    h = np.tanh(x @ a.T + a0)
    logits = h @ b.T + b0
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss, gradient, matrix = 0.0, np.zeros_like(w), np.zeros((len(w), len(w)))
    for n in range(len(x)):
        slope = b * (1 - h[n] ** 2)  # (C, H): d logits / d pre-activations
        jacobian = np.concatenate(
            [
                np.einsum("ch,i->chi", slope, x[n]).reshape(CLASSES, -1),
                slope,
                np.einsum("cd,h->cdh", np.eye(CLASSES), h[n]).reshape(CLASSES, -1),
                np.eye(CLASSES),
            ],
            axis=1,
        )
        hessian = np.diag(p[n]) - np.outer(p[n], p[n])
        loss -= np.log(p[n][y[n]]) / len(x)
        gradient += jacobian.T @ (p[n] - np.eye(CLASSES)[y[n]]) / len(x)
        matrix += jacobian.T @ hessian @ jacobian / len(x)
    return loss, gradient, matrix


def flat(tensors):
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])


def test_products_are_those_of_the_dense_matrix():
    model, (x, y) = small_model(), next(batches(1))
    names = [name for name, _ in model.named_parameters()]
    products = GaussNewton(model, F.cross_entropy, names, x, y)
    loss, gradient, matrix = dense(flat(model.parameters()), x.numpy(), y.numpy())
    vectors = [torch.randn_like(p) for p in model.parameters()]
    assert products.loss.item() == pytest.approx(loss)
    np.testing.assert_allclose(flat(products.gradient), gradient, rtol=1e-9, atol=1e-12)
    through = products.curvature_of_outputs(vectors)
    np.testing.assert_allclose(
        flat(products.pull_back(through.curved)), matrix @ flat(vectors), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_twelve_steps_are_those_of_the_paper(lr):
    model = small_model()
    optimizer = CurveBall(model, lr=lr, damping=1.0)
    w, z, damping = flat(model.parameters()), np.zeros(sum(p.numel() for p in model.parameters())), 1.0
    for step, (x, y) in enumerate(batches(12)):
        loss, g, matrix = dense(w, x.numpy(), y.numpy())
        h = matrix + damping * np.eye(len(w))
        dz = h @ z + g
        system = np.array([[dz @ h @ dz, z @ h @ dz], [z @ h @ dz, z @ h @ z]])
        beta, minus_rho = np.linalg.pinv(system, hermitian=True) @ np.array([g @ dz, g @ z])
        z = -minus_rho * z - beta * dz
        w = w + lr * z
        if step % 5 == 0:
            predicted = lr * g @ z + 0.5 * lr**2 * z @ h @ z
            gamma = (dense(w, x.numpy(), y.numpy())[0] - loss) / predicted
            damping *= 0.999**-5 if gamma < 0.5 else 0.999**5 if gamma > 1.5 else 1
        returned = optimizer.step(x, y, F.cross_entropy)
        assert returned.item() == pytest.approx(loss)
        np.testing.assert_allclose(flat(model.parameters()), w, rtol=1e-7, atol=1e-10)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping)
    assert (damping != 1.0) == (lr == 1.0)  # a short step is as good as its model


def test_lambda_follows_the_ratio():
    assert adapted(2.0, change=-0.4, predicted=-1.0) == 2.0 / FACTOR
    assert adapted(2.0, change=1.0, predicted=-1.0) == 2.0 / FACTOR
    assert adapted(2.0, change=-1.0, predicted=-1.0) == 2.0
    assert adapted(2.0, change=-1.6, predicted=-1.0) == 2.0 * FACTOR
    assert adapted(2.0, change=0.0, predicted=0.0) == 2.0


def test_singular_systems_have_the_solution_of_least_length():
    assert solve(4.0, 0.0, 0.0, 2.0, 0.0, precision=1e-7) == (0.0, 0.5)
    rho, beta = solve(1.0, 1.0, 1.0, 1.0, 1.0, precision=1e-7)  # z and dz are the same
    assert (rho, beta) == (pytest.approx(-0.5), pytest.approx(0.5))
    assert all(np.isnan(solve(float("inf"), 0.0, 1.0, 1.0, 1.0, precision=1e-7)))


def test_batch_norm_keeps_its_running_averages_as_one_forward_pass_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    plain = nn.BatchNorm2d(4)
    plain(model[0](x))
    optimizer = CurveBall(model, damping=1.0)
    losses = [optimizer.step(x, y, F.cross_entropy).item()]
    torch.testing.assert_close(model[1].running_mean, plain.running_mean)
    torch.testing.assert_close(model[1].running_var, plain.running_var)
    assert int(model[1].num_batches_tracked) == 1
    losses += [optimizer.step(x, y, F.cross_entropy).item() for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_it_refuses():
    model = small_model()
    with pytest.raises(ValueError, match="damping must be finite and >= 0, not -1"):
        CurveBall(model, damping=-1)
    optimizer = CurveBall(model)
    with pytest.raises(TypeError, match="missing 3 required positional arguments: 'inputs', 'targets'"):
        optimizer.step()
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_resumed_run_is_the_uninterrupted_one():
    model, data = small_model(), list(batches(8))
    optimizer = CurveBall(model)
    for batch in data[:4]:
        optimizer.step(*batch, F.cross_entropy)
    other = small_model()
    resumed = CurveBall(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in data[4:]:
        optimizer.step(*batch, F.cross_entropy)
        resumed.step(*batch, F.cross_entropy)
    np.testing.assert_array_equal(flat(model.parameters()), flat(other.parameters()))
