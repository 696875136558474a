from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from service_process import TOKEN, ServiceProcess

EXAMPLES = Path(__file__).parents[3] / "client" / "examples"


@pytest.fixture(scope="session")
def service():
    """Address of one real service for all of these tests."""
    with ServiceProcess() as running:
        yield running.address


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The service's token, one thread, and frameworks that remember nothing of the test before."""
    monkeypatch.setenv("PRECONDITIONER_TOKEN", TOKEN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def example():
    """Gives an example as a module, by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
