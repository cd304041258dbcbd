"""Networks, latent priors, conditions and codecs."""

from __future__ import annotations

from fedgan_lightning.gan.cfgan_condition import (
    CFGANCondition,
)
from fedgan_lightning.gan.conditions import (
    Codec,
    Condition,
)
from fedgan_lightning.gan.inpainting_mask import (
    InpaintingMask,
)
from fedgan_lightning.gan.networks import (
    ACGANDiscriminator,
    ACGANGenerator,
    CFGANDiscriminator,
    CFGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    InpaintingGenerator,
    MLPDiscriminator,
    MLPGenerator,
    PatchDiscriminator,
    ProfileDiscriminator,
    ProfileGenerator,
    R3GANDiscriminator,
    R3GANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    TextDiscriminator,
    TextGenerator,
)
from fedgan_lightning.gan.priors import (
    Gumbel,
    Normal,
    Prior,
    Uniform,
)
from fedgan_lightning.gan.text import (
    OneHot,
)
