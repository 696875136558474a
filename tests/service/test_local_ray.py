"""A private Ray that does not start at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from preconditioner_service import local_ray


@pytest.fixture
def starts(monkeypatch):
    """The folders that Ray was to start in; it does so the third time only."""
    folders = []

    def init(**options):
        folders.append(Path(options["_temp_dir"]).parent)
        assert folders[-1].is_dir()
        if len(folders) < 3:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray, "init", init)
    return folders


def test_it_is_tried_again_in_a_directory_of_its_own(starts, caplog):
    directory = local_ray.start_private_ray(1, 100_000_000)
    try:
        assert [folder.is_dir() for folder in starts] == [False, False, True]
        assert directory.path == starts[-1]
    finally:
        directory.remove()


def test_the_last_error_is_raised_and_nothing_is_left(starts, monkeypatch):
    monkeypatch.setattr(local_ray, "_ATTEMPTS", 2)
    with pytest.raises(RuntimeError, match="timed out during startup"):
        local_ray.start_private_ray(1, 100_000_000)
    assert not any(folder.is_dir() for folder in starts)
