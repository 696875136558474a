"""Files that an earlier version wrote: this one reads them, and writes the same keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kept_checkpoints import KINDS, STEPS, make, train

FOLDER = Path(__file__).parent / "data"


def kept(kind):
    return torch.load(FOLDER / f"{kind}.pt", weights_only=True)


def ours(state_dict):
    """What is not torch's own: the states by parameter, and what stands beside them."""
    if "preconditioner" in state_dict:
        own = dict(state_dict["preconditioner"])
        return dict(enumerate(own.pop("state"))), own
    (group,) = state_dict["param_groups"]
    return state_dict["state"], {**group, "param_names": None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_never_change(kind):
    model, optimizer = make(kind)
    train(model, optimizer, range(STEPS))
    states, beside = ours(optimizer.state_dict())
    kept_states, kept_beside = ours(kept(kind)["optimizer"])
    assert {i: state.keys() for i, state in states.items()} == {
        i: state.keys() for i, state in kept_states.items()
    }
    assert beside.keys() == kept_beside.keys()
    assert beside["preconditioner_format"] == kept_beside["preconditioner_format"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_version_wrote_is_read_whole(kind):
    saved = kept(kind)
    model, optimizer = make(kind)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    states, beside = ours(optimizer.state_dict())
    kept_states, kept_beside = ours(saved["optimizer"])
    assert beside["preconditioner_step"] == kept_beside["preconditioner_step"] == STEPS
    assert beside["preconditioner_epoch"] > kept_beside["preconditioner_epoch"]
    for index, state in kept_states.items():
        for key, value in state.items():
            found = states[index][key]
            assert torch.equal(found, value) if torch.is_tensor(value) else found == value, (index, key)
    assert any(state.get("block.0:4,0:3.version", -1) > 0 for state in states.values())
    assert any(
        bool((state[key] >= 0).any())
        for state in states.values()
        for key in state
        if "in_flight.steps" in key
    )
    train(model, optimizer, range(STEPS, STEPS + 6))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
