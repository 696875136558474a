"""BatchNorm on digits, the deep autoencoder and translation: deterministic, exactly specified, learnable."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from preconditioner_client.kfac.layers import find_layers
from preconditioner_worker.rivals import CurveBall
from preconditioner_worker.workloads import WORKLOADS, AutoencoderWorkload, DigitsBatchNormWorkload
from preconditioner_worker.workloads.language import Language
from preconditioner_worker.workloads.translation import BEGIN, END, LENGTH, PAD, TranslationWorkload

NEW = {
    "digits-batchnorm": DigitsBatchNormWorkload(batch_size=16, channels=4),
    "autoencoder": AutoencoderWorkload(batch_size=16),
    "translation": TranslationWorkload(vocabulary=32, batch_size=8, width=16, heads=2, layers=1),
}


@pytest.fixture(params=NEW)
def workload(request):
    return NEW[request.param]


def test_batches_and_models_depend_on_the_seed_alone(workload):
    one, two = workload.batch(1, 30), workload.batch(1, 30)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.inputs, workload.batch(2, 30).inputs)
    first, second, other = (workload.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_few_steps_of_adam_and_of_curveball_lower_the_held_out_loss(workload):
    for build in (lambda model: torch.optim.Adam(model.parameters(), lr=1e-2), CurveBall):
        model = workload.build_model(0)
        optimizer = build(model)
        before = workload.evaluate(model)
        for step in range(8):
            inputs, targets = workload.batch(0, step)
            if isinstance(optimizer, CurveBall):
                optimizer.step(inputs, targets, workload.criterion)
                continue
            optimizer.zero_grad()
            workload.criterion(model(inputs), targets).backward()
            optimizer.step()
        assert workload.evaluate(model).loss < before.loss
        assert workload.evaluate(model) == workload.evaluate(model)


def test_all_are_there_by_name():
    assert {*NEW, "text", "digits"} == set(WORKLOADS)


def test_the_network_has_batch_norms():
    model = NEW["digits-batchnorm"].build_model(0)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model) == 3


def test_a_perfect_copy_has_no_divergence():
    workload = NEW["autoencoder"]
    pixels = workload.held_out.targets
    assert workload.criterion(torch.logit(pixels, eps=1e-7), pixels).item() == pytest.approx(0, abs=1e-3)
    model = workload.build_model(0)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [
        128, 64, 32, 8, 32, 64, 128, 64
    ]  # fmt: skip
    assert isinstance(model[-1], nn.Linear)
    assert sum(isinstance(layer, nn.Tanh) for layer in model) == 6  # none in the middle, none at the end


def test_translation_follows_its_rules():
    language = Language(32)
    lexicon = language.lexicon
    assert sorted(lexicon) == list(range(32))
    noun, adjective, verb, adverb = 4, 1, 2, 3
    words = np.array([verb, adjective, noun, adverb, verb + 4])
    # An adjective goes behind its noun, verbs to the end.
    assert language.translate(words).tolist() == [
        lexicon[w] for w in (noun, adjective, adverb, verb, verb + 4)
    ]
    # Word 8 is ambiguous: after an adjective it is the next word's translation.
    assert language.translate(np.array([adverb, 8])).tolist() == [lexicon[adverb], lexicon[8]]
    assert language.translate(np.array([adjective, 8])).tolist() == [lexicon[9], lexicon[adjective]]


def test_words_follow_zipf():
    language, random = Language(32), np.random.Generator(np.random.PCG64(1))
    words = np.concatenate([language.sentence(random) for _ in range(2000)])
    counts = np.bincount(words, minlength=32) / len(words)
    expected = 1 / np.arange(1, 33) / (1 / np.arange(1, 33)).sum()
    np.testing.assert_allclose(counts, expected, atol=0.01)


def test_inputs_are_source_and_shifted_target():
    inputs, targets = NEW["translation"].batch(0, 0)
    source, before = inputs.split(LENGTH, dim=1)
    assert (before[:, 0] == BEGIN).all()
    length = int((targets[0] != PAD).sum())
    assert torch.equal(before[0, 1:length], targets[0, : length - 1])
    assert targets[0, length - 1] == source[0, length - 1] == END
    assert (source[0, length:] == PAD).all()


def test_the_generator_is_specified_to_the_bit():
    inputs, targets = TranslationWorkload().batch(0, 0)
    tokens = torch.cat([inputs, targets], dim=1).numpy().astype("<i8")
    assert hashlib.sha256(tokens.tobytes()).hexdigest() == (
        "bd7488033166397a7e9e2105f2cbf83510224044949c50ddcbdd349d2667e070"
    )


def test_a_target_sees_its_past_and_the_source_but_no_padding():
    workload = NEW["translation"]
    model = workload.build_model(0).eval()
    inputs, _ = workload.batch(0, 0)
    source_length = int((inputs[0, :LENGTH] != PAD).sum())
    assert source_length < LENGTH
    with torch.no_grad():
        logits = model(inputs)[0]
        for place, first in ((0, 0), (LENGTH + 3, 3)):
            changed = inputs.clone()
            changed[0, place] = BEGIN  # a token that stands in neither
            differs = (model(changed)[0] != logits).any(dim=-1)
            assert not differs[:first].any()
            assert differs[first:].all()
        table = model.source_positions.weight
        table[source_length:] += 1.0  # what padding brings along
        assert torch.equal(model(inputs)[0], logits)


def test_kfac_watches_all_matrices_of_translation_but_positions():
    model, called = NEW["translation"].build_model(0), set()
    for layer in find_layers(model).matrices:
        layer.module.register_forward_hook(lambda module, *_: called.add(module.weight))
    model(NEW["translation"].batch(0, 0).inputs)
    assert {name for name, p in model.named_parameters() if p.ndim == 2 and p not in called} == {
        "source_positions.weight",
        "target_positions.weight",
    }
