"""Network pairs, one file per family. Each states ``latent_dim``, ``sample_shape``, ``num_classes``,
``conditioning``.
"""

from fedgan_lightning.gan.networks.acgan import ACGANDiscriminator, ACGANGenerator
from fedgan_lightning.gan.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from fedgan_lightning.gan.networks.inpainting import InpaintingGenerator, PatchDiscriminator
from fedgan_lightning.gan.networks.interactions import CFGANDiscriminator, CFGANGenerator
from fedgan_lightning.gan.networks.mlp import MLPDiscriminator, MLPGenerator
from fedgan_lightning.gan.networks.profile import ProfileDiscriminator, ProfileGenerator
from fedgan_lightning.gan.networks.r3gan import R3GANDiscriminator, R3GANGenerator
from fedgan_lightning.gan.networks.resnet import ResNetDiscriminator, ResNetGenerator
from fedgan_lightning.gan.networks.scalar import QuadraticDiscriminator, ScaleGenerator
from fedgan_lightning.gan.networks.text import TextDiscriminator, TextGenerator

__all__ = [
    "ACGANDiscriminator",
    "ACGANGenerator",
    "CFGANDiscriminator",
    "CFGANGenerator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "InpaintingGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "PatchDiscriminator",
    "ProfileDiscriminator",
    "ProfileGenerator",
    "QuadraticDiscriminator",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "ScaleGenerator",
    "TextDiscriminator",
    "TextGenerator",
]
