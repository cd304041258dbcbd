"""Aggregators: how updates become one."""

from __future__ import annotations

from fedgan_lightning.federation.aggregation import (
    WeightedMean,
)
from fedgan_lightning.federation.label_balance import (
    DivergenceWeightedMean,
)
from fedgan_lightning.federation.robust import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    NearestNeighborMixing,
    RobustAggregator,
    TrimmedMean,
)
from fedgan_lightning.protocol import (
    Aggregator,
)
