"""Transforms of updates, one kind a file."""

from fedgan_lightning.federation.transforms.clipping import ClipUpdates
from fedgan_lightning.federation.transforms.codec import UpdateCodec
from fedgan_lightning.federation.transforms.dense import QSGD, BFloat16, Int8
from fedgan_lightning.federation.transforms.moments import LogMoments
from fedgan_lightning.federation.transforms.power import PowerSGD
from fedgan_lightning.federation.transforms.private import PrivateUpdates
from fedgan_lightning.federation.transforms.signs import SignCompression
from fedgan_lightning.federation.transforms.sparse import RandomSparse, TopK

__all__ = [
    "QSGD",
    "BFloat16",
    "ClipUpdates",
    "UpdateCodec",
    "Int8",
    "LogMoments",
    "PowerSGD",
    "PrivateUpdates",
    "RandomSparse",
    "SignCompression",
    "TopK",
]
