"""The ACGAN of FedGAN's table for MNIST and CIFAR-10 (Rasouli et al. 2020, appendix; z = 62, Adam 1e-3, (.5, .999)).

Two readings of the printed table: its BatchNorm on the two output heads is left out, because a normalised logit has
mean zero in every batch and cannot say "all of these are fake"; its sigmoid is inside the loss, which takes logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.networks.mlp import DiscriminatorHead, join_label
from fedgan_lightning.options import checked


class ACGANGenerator(nn.Module):
    """Linear 1024 BN ReLU; linear 128 maps BN ReLU; two 4x4 transposed convolutions of stride 2 (64, channels); tanh.

    Args:
        image_size: 28 or 32 pixels.
        channels: Colour channels.
        latent_dim: Dimension of z, 62 in the paper.
        num_classes: Classes C.
        width: Maps of the first transposed convolution, 64 in the paper; other widths scale with it.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(
        image_size="[1, inf)", channels="[1, inf)", latent_dim="[1, inf)", num_classes="[0, inf)", width="[1, inf)"
    )
    def __init__(
        self,
        image_size: int = 28,
        channels: int = 1,
        *,
        latent_dim: int = 62,
        num_classes: int = 10,
        width: int = 64,
    ) -> None:
        super().__init__()
        side = quarter(image_size)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim + num_classes, 16 * width),
            nn.BatchNorm1d(16 * width),
            nn.ReLU(),
            nn.Linear(16 * width, 2 * width * side * side),
            nn.BatchNorm1d(2 * width * side * side),
            nn.ReLU(),
            nn.Unflatten(1, (2 * width, side, side)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) and labels (N,) to images (N, channels, image_size, image_size) in [-1, 1]."""
        images: Tensor = self.layers(join_label(z, y, self.num_classes))
        return images


class ACGANDiscriminator(nn.Module):
    """Conv 64 leaky ReLU; conv 128 BN leaky ReLU; linear 1024 BN leaky ReLU; heads of 1 and C logits.

    Args:
        image_size: 28 or 32 pixels.
        channels: Colour channels.
        num_classes: Classes C.
        width: Maps of the first convolution, 64 in the paper; other widths scale with it.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(image_size="[1, inf)", channels="[1, inf)", num_classes="[0, inf)", width="[1, inf)")
    def __init__(self, image_size: int = 28, channels: int = 1, *, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        side = quarter(image_size)
        self.num_classes, self.conditioning = num_classes, "auxiliary"
        self.sample_shape = (channels, image_size, image_size)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * side * side, 16 * width),
            nn.BatchNorm1d(16 * width),
            nn.LeakyReLU(0.2),
        )
        self.head = DiscriminatorHead(16 * width, num_classes=num_classes, conditioning="auxiliary")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map images to logits (N, 1) and class logits (N, C)."""
        output: Tensor | tuple[Tensor, Tensor] = self.head(self.features(x), y)
        return output


def quarter(image_size: int) -> int:
    """Return image_size / 4.

    Raises:
        ConfigurationError: If the size is not 28 or 32.
    """
    if image_size not in (28, 32):
        raise ConfigurationError(
            message(
                "FedGAN's ACGAN must have images of 28 or 32 pixels",
                received=f"image_size={image_size}",
                fix="resize the images, or use DCGANGenerator and DCGANDiscriminator",
            )
        )
    return image_size // 4
