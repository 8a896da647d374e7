"""What every test shares: the device, a seed, one thread."""

import importlib
import os
import warnings

import pytest
import torch


def pytest_configure() -> None:
    """One thread a process: the suite runs two processes, and results must not depend on how work is split."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # forward mode imports this at its first use, which warns about torch.jit.script inside torch itself
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def pytest_report_header() -> str:
    """Say in the report what the tests ran on."""
    return f"torch {torch.__version__}, device {os.environ.get('DIFFLAYERS_TEST_DEVICE', 'cpu')}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test, from the environment variable DIFFLAYERS_TEST_DEVICE; the CPU by default."""
    return torch.device(os.environ.get("DIFFLAYERS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
