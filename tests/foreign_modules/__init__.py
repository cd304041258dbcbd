"""Twelve LightningModules as other people write and publish them, only small. None of them knows of federation."""

from tests.foreign_modules.adversarial import DCGAN, WGANGP, TutorialGAN
from tests.foreign_modules.likelihood import (
    VAE,
    AutoEncoder,
    DeepEnergyModel,
    DenoisingDiffusion,
    EMACallback,
)
from tests.foreign_modules.styles_and_tables import StyleGAN, TableGAN
from tests.foreign_modules.translation import SRGAN, CycleGAN, Pix2Pix

__all__ = [
    "AutoEncoder",
    "CycleGAN",
    "DCGAN",
    "DeepEnergyModel",
    "DenoisingDiffusion",
    "EMACallback",
    "Pix2Pix",
    "SRGAN",
    "StyleGAN",
    "TableGAN",
    "TutorialGAN",
    "VAE",
    "WGANGP",
]
