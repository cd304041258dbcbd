"""``flwr run`` on Flower's own simulation engine: real processes, Ray between them."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")
pytest.importorskip("ray", reason="needs the extra 'simulation' (Python 3.11 or later)")

from benchmarks.engine import compare

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def test_the_engine_gives_the_weights_of_the_sequential_executor(tmp_path):
    """The server's half parses its configuration in a thread while Ray is imported in another."""
    equal, seconds = compare(tmp_path, clients=3, rounds=2)
    assert equal
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"Flower's engine": 2, "sequential": 2}
