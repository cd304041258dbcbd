"""Transforms of updates between client and aggregator, one file each."""

from fedgan_lightning.federation.transforms.clipping import ClipUpdates
from fedgan_lightning.federation.transforms.private import PrivateUpdates
from fedgan_lightning.federation.transforms.signs import SignCompression

__all__ = ["ClipUpdates", "PrivateUpdates", "SignCompression"]
