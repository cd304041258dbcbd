"""Partitions: which client holds which samples."""

from __future__ import annotations

from fedgan_lightning.data.given_partitions import (
    FlowerPartitioner,
    GivenIndices,
)
from fedgan_lightning.data.partition import (
    IID,
    ClassesPerClient,
    ClassLists,
    ClassMixes,
    Dirichlet,
    FeatureShift,
    Natural,
    Partition,
    QuantitySkew,
)
