"""Where samples come from, one file per modality."""

from fedgan_lightning.data.sources.base import Source
from fedgan_lightning.data.sources.bundled import Digits
from fedgan_lightning.data.sources.files import ArrayFile
from fedgan_lightning.data.sources.images import CelebA, ImageFolder, TorchvisionImages
from fedgan_lightning.data.sources.interactions import Interactions
from fedgan_lightning.data.sources.medical import MedMNIST, MedMNISTFile
from fedgan_lightning.data.sources.series import CSVProfiles
from fedgan_lightning.data.sources.text import TextFile
from fedgan_lightning.data.sources.toys import GaussianMixture, Grid, Ring, Segments, SwissRoll

__all__ = [
    "ArrayFile",
    "CSVProfiles",
    "CelebA",
    "Digits",
    "GaussianMixture",
    "Grid",
    "ImageFolder",
    "Interactions",
    "MedMNIST",
    "MedMNISTFile",
    "Ring",
    "Segments",
    "Source",
    "SwissRoll",
    "TextFile",
    "TorchvisionImages",
]
