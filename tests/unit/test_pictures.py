"""Pictures of partitions: bars are as high as the counts, whatever the number of clients."""

import numpy as np
import pytest

from fedgan_lightning.visuals import pictures

BLUE = np.array([0x33, 0x63, 0x8D])


def heights(picture: np.ndarray, clients: int) -> np.ndarray:
    """Return the pixels of ink above every client's middle, from the first bar's left edge to the last one's right."""
    ink = (np.abs(picture.astype(int) - BLUE).sum(2) < 30).sum(0)
    inside = np.flatnonzero(ink)
    edges = np.linspace(inside[0], inside[-1] + 1, clients + 1)
    return ink[((edges[1:] + edges[:-1]) / 2).astype(int)]


@pytest.mark.parametrize("clients", [2, 30, 150])
def test_a_bar_is_as_high_as_the_client_s_samples(clients):
    counts = np.random.default_rng(0).integers(10, 50, (clients, 1))
    found = heights(pictures.partition(counts, class_names=["samples"]), clients)
    assert np.allclose(found / found.max(), counts[:, 0] / counts.max(), atol=0.02)


def test_thousands_of_clients_are_one_outline(monkeypatch):
    """As many artists as clients take ten seconds to draw."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "draw", lambda self, renderer, *, draw=Figure.draw: (drawn.append(self), draw(self, renderer))
    )
    pictures.partition(np.ones((5000, 8), dtype=np.int64), class_names=[*"abcdefgh"])
    assert len(drawn[0].axes[0].patches) == 1
