"""The text workload: deterministic, split by file, clear about text that will not do."""

from __future__ import annotations

import pytest
import torch

from preconditioner_worker.workloads import WorkloadError, open_workload
from preconditioner_worker.workloads.text import TextWorkload, is_held_out, read_corpus


@pytest.fixture(scope="module")
def workload() -> TextWorkload:
    return TextWorkload.open()


def test_batches_depend_on_seed_and_step_alone(workload):
    again = TextWorkload(workload.corpus)
    assert torch.equal(workload.batch(3, 7).inputs, again.batch(3, 7).inputs)
    assert not torch.equal(workload.batch(3, 7).inputs, workload.batch(3, 8).inputs)
    assert not torch.equal(workload.batch(3, 7).inputs, workload.batch(4, 7).inputs)


def test_targets_are_the_next_bytes(workload):
    inputs, targets = workload.batch(0, 0)
    assert inputs.shape == targets.shape == (16, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_models_depend_on_the_seed_alone_and_leave_torchs_generator_as_it_was(workload):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (workload.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_no_file_is_on_both_sides_of_the_split(workload):
    corpus = workload.corpus
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert all(is_held_out(name) for name in corpus.held_out_files)
    assert not any(is_held_out(name) for name in corpus.train_files)
    assert not any(name.startswith(("test/", "site-packages/")) for name in corpus.train_files)
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert 0.02 < share < 0.3


def test_evaluation_is_always_the_same_and_starts_near_chance(workload):
    model = workload.build_model(0)
    first = workload.evaluate(model)
    assert first == workload.evaluate(model)
    assert 5.4 < first.loss < 5.8  # ln 256 = 5.55
    assert model.training


def test_the_model_is_causal(workload):
    model = workload.build_model(0).eval()
    tokens = workload.batch(0, 0).inputs[:1]
    changed = tokens.clone()
    changed[0, 64:] = 0
    with torch.no_grad():
        assert torch.equal(model(tokens)[0, :64], model(changed)[0, :64])


def test_a_folder_of_text(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 2000)
    (tmp_path / "picture.png").write_bytes(b"\0" * 5000)
    corpus = read_corpus(tmp_path, least=1000)
    assert len(corpus.train_files) + len(corpus.held_out_files) == 40
    assert set(corpus.held_out.unique().tolist()) - {10} == {
        65 + int(name.removesuffix(".txt")) for name in corpus.held_out_files
    }


def test_of_one_file_the_last_tenth_is_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"a" * 9000 + b"b" * 1000)
    corpus = read_corpus(path, least=500)
    assert corpus.train.unique().tolist() == [97]
    assert corpus.held_out.unique().tolist() == [98]


def test_missing_and_small_text_are_refused(tmp_path):
    with pytest.raises(WorkloadError, match="does not exist; give --text"):
        read_corpus(tmp_path / "nowhere", least=1)
    small = tmp_path / "small.txt"
    small.write_text("too little")
    with pytest.raises(WorkloadError, match="training part has 9 bytes of 20000 needed"):
        open_workload("text", text=small)
    with pytest.raises(WorkloadError, match="belongs to the workload 'text'"):
        open_workload("digits", text=small)
    with pytest.raises(WorkloadError, match=r"'none'; there are .*digits.*text"):
        open_workload("none")
