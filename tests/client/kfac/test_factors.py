"""Factors of a batch against outer products that are made one example at a time, in float64 NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_models import Words, seeded
from preconditioner_client.kfac.factors import diagonal_direction, patches, unit_wise_direction
from preconditioner_client.kfac.layers import MatrixLayer, convolution_shape, find_layers
from preconditioner_client.kfac.recording import Recorder


def recorded(model, inputs, loss):
    """Layers after one batch, and by layer the inputs and output gradients of single examples' losses."""
    layers = find_layers(model)
    recorder = Recorder(layers, None)
    loss(model(inputs)).mean().backward()
    recorder.remove()
    return layers


def per_example(model, module, inputs, loss):
    """(inputs, output gradients) of a module, one example's loss at a time."""
    seen = []

    def hook(_, args, output):
        output.register_hook(lambda gradient: seen.append((args[0].detach().numpy(), gradient.numpy())))

    handle = module.register_forward_hook(hook)
    for value in loss(model(inputs)):
        value.backward(retain_graph=True)
    handle.remove()
    return seen


def squares(outputs):
    return (outputs * torch.linspace(0.5, 1.5, outputs.shape[-1])).square().flatten(1).sum(1)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2, bias=bias)))
    inputs = torch.randn(7, 5)
    layers = recorded(model, inputs, squares)
    for layer in layers.matrices:
        a_sum, g_sum = 0.0, 0.0
        # Every example's gradient is a row of its own; the others are 0.
        for example, (a, g) in enumerate(per_example(model, layer.module, inputs, squares)):
            a_one = np.append(a[example], 1.0) if bias else a[example]
            a_sum = a_sum + np.outer(a_one, a_one).astype(np.float64)
            g_sum = g_sum + np.outer(g[example], g[example]).astype(np.float64)
        assert layer.factors.examples == 7
        np.testing.assert_allclose(layer.factors.input, a_sum, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.factors.output, g_sum, rtol=1e-4, atol=1e-6)


def dense_patches(image, weight_shape, module):
    """All patches of one image, by loops; a patch as the kernel lies in memory."""
    _, channels, height, width = weight_shape
    padded = np.pad(image, ((0, 0), (module.padding[0],) * 2, (module.padding[1],) * 2))
    found = []
    rows = (padded.shape[1] - module.dilation[0] * (height - 1) - 1) // module.stride[0] + 1
    columns = (padded.shape[2] - module.dilation[1] * (width - 1) - 1) // module.stride[1] + 1
    for y in range(rows):
        for x in range(columns):
            down = y * module.stride[0] + module.dilation[0] * np.arange(height)
            right = x * module.stride[1] + module.dilation[1] * np.arange(width)
            window = padded[:, down][:, :, right]
            assert window.shape == (channels, height, width)
            found.append([*window.reshape(-1), 1.0])
    return np.array(found, dtype=np.float64)


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": 1}, {"stride": 2, "padding": (0, 1)}, {"dilation": (1, 2), "kernel_size": (3, 2)}],
    ids=["plain", "padded", "strided", "dilated"],
)
def test_convolution(settings):
    module = seeded(lambda: nn.Conv2d(**({"in_channels": 2, "out_channels": 3, "kernel_size": 3} | settings)))
    inputs = torch.randn(4, 2, 6, 5)
    [layer] = recorded(module, inputs, squares).matrices
    a_sum, g_sum = 0.0, 0.0
    for example, (a, g) in enumerate(per_example(module, module, inputs, squares)):
        patches = dense_patches(a[example], module.weight.shape, module)
        places = g[example].reshape(3, -1).astype(np.float64)
        assert places.shape[1] == len(patches)
        a_sum = a_sum + patches.T @ patches
        g_sum = g_sum + places @ places.T / len(patches)
    np.testing.assert_allclose(layer.factors.input, a_sum, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.factors.output, g_sum, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [(1, 0), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_patches_times_the_kernel_are_the_convolution(padding, mode):
    module = seeded(lambda: nn.Conv2d(2, 3, (3, 5), padding=padding, padding_mode=mode, bias=False))
    inputs = torch.randn(2, 2, 6, 7)
    product = patches(inputs, convolution_shape(module)) @ module.weight.flatten(1).T
    torch.testing.assert_close(product.mT.reshape(module(inputs).shape), module(inputs))


def test_a_convolution_over_one_dimension_is_one_over_two():
    one = seeded(lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2))
    two = nn.Conv2d(2, 3, (1, 3), padding=(0, 1), stride=(1, 2))
    two.load_state_dict({"weight": one.weight.unsqueeze(2), "bias": one.bias})
    inputs = torch.randn(4, 2, 7)
    [first] = recorded(one, inputs, squares).matrices
    [second] = recorded(two, inputs.unsqueeze(2), squares).matrices
    torch.testing.assert_close(first.factors.input, second.factors.input)
    torch.testing.assert_close(first.factors.output, second.factors.output)


def test_embedding_is_a_linear_layer_of_one_hot_inputs():
    model = seeded(Words)
    inputs = torch.tensor([[1, 1, 4], [0, 4, 8]])
    table, _ = recorded(model, inputs, lambda y: squares(y.flatten(0, 1))).matrices
    linear = nn.Linear(9, 5, bias=False)
    linear.weight.data = model.table.weight.detach().T.clone()
    model.table = linear
    hot = F.one_hot(inputs, 9).to(torch.float32)
    dense = next(
        layer
        for layer in recorded(model, hot, lambda y: squares(y.flatten(0, 1))).matrices
        if layer.module is linear
    )
    torch.testing.assert_close(torch.diag(table.factors.input), dense.factors.input)
    torch.testing.assert_close(table.factors.output, dense.factors.output)


def test_batches_add_up_and_evaluations_do_not():
    model = seeded(lambda: nn.Linear(4, 2))
    layers = find_layers(model)
    recorder = Recorder(layers, None)
    parts = torch.randn(3, 4), torch.randn(5, 4)
    for part in parts:
        squares(model(part)).mean().backward()
    model(torch.randn(9, 4))
    with torch.no_grad():
        model(torch.randn(9, 4))
    recorder.remove()
    whole = recorded(model, torch.cat(parts), squares).matrices[0].factors
    assert layers.matrices[0].factors.examples == 8
    torch.testing.assert_close(layers.matrices[0].factors.output, whole.output)
    torch.testing.assert_close(layers.matrices[0].factors.input, whole.input)


def test_a_scaled_loss_gives_the_same_factors():
    model = seeded(lambda: nn.Linear(4, 2))
    inputs = torch.randn(6, 4)
    expected = recorded(model, inputs, squares).matrices[0].factors
    layers = find_layers(model)
    recorder = Recorder(layers, lambda: 128.0)
    (128 * squares(model(inputs)).mean()).backward()
    recorder.remove()
    torch.testing.assert_close(layers.matrices[0].factors.output, expected.output)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training):
    module = seeded(lambda: nn.BatchNorm2d(3))
    module.weight.data = torch.randn(3)
    module.train(training)
    inputs = 2 * torch.randn(5, 3, 4, 4) + 1
    targets = torch.randn(5, 3, 4, 4)
    [layer] = recorded(module, inputs, lambda y: (y - targets).square().flatten(1).sum(1)).batch_norms
    expected = np.zeros((3, 3))
    outputs = module(inputs)
    for example in range(5):
        value = (outputs[example] - targets[example]).square().sum()
        s, b = (
            g.double().numpy() for g in torch.autograd.grad(value, module.parameters(), retain_graph=True)
        )
        expected += np.stack([s * s, s * b, b * b])
    examples, fisher = layer.fisher
    assert examples == 5
    np.testing.assert_allclose(fisher, expected, rtol=2e-4, atol=1e-3)


def test_directions_of_batch_norm_solve_their_systems():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 2, 2, generator=generator, dtype=torch.float64)
    matrices = root @ root.mT
    s, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    fisher = torch.stack([matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]])
    unit_wise = torch.stack(unit_wise_direction(fisher, (s, b), 0.1), 1)
    damped = matrices + 0.1 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(unit_wise, torch.linalg.solve(damped, torch.stack([s, b], 1)))
    diagonal = diagonal_direction(fisher, (s, b), 0.1)
    torch.testing.assert_close(diagonal, (s / (fisher[0] + 0.1), b / (fisher[2] + 0.1)))


EMPTY = {
    "linear": (lambda: nn.Linear(4, 2), (4,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "batch_norm": (lambda: nn.BatchNorm2d(2).eval(), (2, 5, 5)),
    "embedding": (lambda: nn.Embedding(4, 2), (3,)),
}


@pytest.mark.parametrize(("make", "shape"), EMPTY.values(), ids=EMPTY)
def test_an_empty_batch_contributes_nothing(make, shape):
    module = seeded(make)
    layers = find_layers(module)
    [layer] = layers.all

    def backward(size):
        inputs = torch.ones(size, *shape, dtype=torch.long if isinstance(module, nn.Embedding) else None)
        module(inputs).square().sum().backward()

    def values():
        if isinstance(layer, MatrixLayer):
            return layer.factors.examples, layer.factors.output, layer.factors.input
        return layer.fisher

    recorder = Recorder(layers, None)
    backward(0)
    assert not any(torch.as_tensor(value).any() for value in values())
    layers.forget_batches()
    backward(3)
    before = copy.deepcopy(values())
    backward(0)
    recorder.remove()
    for value, expected in zip(values(), before, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_a_batch_norm_that_shares_its_scale_is_left_out():
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(4)))
    model[1].weight = model[0].weight
    model[2].bias = nn.LayerNorm(4).bias
    model.append(nn.LayerNorm(4))
    model[4].bias = model[2].bias
    assert [layer.name for layer in find_layers(model).all] == ["3"]


def test_what_is_known_and_what_is_not():
    tied = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "frozen": nn.Linear(2, 3).requires_grad_(False),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "norm": nn.BatchNorm1d(4),
            "plain_norm": nn.BatchNorm1d(4, affine=False),
            "layer_norm": nn.LayerNorm(4),
            "one": nn.Sequential(tied),
            "table": nn.Embedding(4, 4),
        }
    )
    model["table"].weight = tied.weight
    layers = find_layers(model)
    assert [layer.name for layer in layers.all] == ["linear", "norm"]
