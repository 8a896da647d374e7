"""What every test shares: the device, a seed, one thread."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """One thread a process: the suite runs two processes, and results must not depend on how work is split."""
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Say in the report what the tests ran on."""
    return f"torch {torch.__version__}, device {os.environ.get('DIFFLAYERS_TEST_DEVICE', 'cpu')}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test, from the environment variable DIFFLAYERS_TEST_DEVICE; the CPU by default."""
    return torch.device(os.environ.get("DIFFLAYERS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def start(device: torch.device) -> Iterator[None]:
    """Every test starts from the same random numbers, and makes its tensors on the device under test."""
    torch.manual_seed(0)
    if device.type == "cpu":
        yield
        return
    with device:
        yield
