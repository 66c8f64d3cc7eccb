"""A pytest plugin: this process has the second device type. With `--on-device` new tensors are on it by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .device import Control, build, install


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--second-device-cache", required=True, help="directory of the built library")
    parser.addoption("--on-device", action="store_true", help="tensors are made on the device")


def pytest_configure(config: pytest.Config) -> None:
    install(build(Path(config.getoption("--second-device-cache"))))
    if config.getoption("--on-device"):
        torch.set_default_device("second")


@pytest.fixture(autouse=True)
def device() -> Iterator[Control]:
    """What the device counts. At the end of a test nothing is left on its streams, and no memory was released under a copy."""
    control: Control = torch.second.control  # type: ignore[attr-defined]
    before = control.released_early()
    yield control
    torch.accelerator.synchronize()
    assert control.pending() == 0
    assert control.released_early() == before
