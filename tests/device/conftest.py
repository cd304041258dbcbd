"""The second device is started before any other work of the process, where tests of it are asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.device import second_device


def pytest_collection_finish(session: pytest.Session) -> None:
    if second_device.available() and any(item.get_closest_marker("second_device") for item in session.items):
        second_device.start()


@pytest.fixture(autouse=True)
def _is_there() -> None:
    if not second_device.available():
        pytest.skip("needs torch-xla, in an environment of its own: tests/device/README.md")


@pytest.fixture
def device() -> Callable[[], AbstractContextManager[second_device.Rules]]:
    """What is run inside ``with device():`` plays by CUDA's rules."""
    return second_device.played
