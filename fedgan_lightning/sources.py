"""Sources of samples, and what they are read into."""

from __future__ import annotations

from fedgan_lightning.data.samples import (
    Samples,
)
from fedgan_lightning.data.sources import (
    ArrayFile,
    CelebA,
    CSVProfiles,
    Digits,
    Grid,
    ImageFolder,
    Interactions,
    MedMNIST,
    MedMNISTFile,
    Ring,
    Segments,
    Source,
    SwissRoll,
    TextFile,
    TorchvisionImages,
)
from fedgan_lightning.data.vocabulary import (
    Vocabulary,
)
