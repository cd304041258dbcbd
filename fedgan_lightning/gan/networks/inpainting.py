"""Networks that complete pictures: a gated encoder-decoder, and a discriminator of patches. Neither is normalised.

Sources: Yu et al. 2019 (gated convolutions, patches under spectral normalisation, hinge), Isola et al. 2017 (U-Net,
patches).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, interpolate, pixel_shuffle, pixel_unshuffle

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.options import checked


class InpaintingGenerator(nn.Module):
    """(z, c) -> x (1 - m) + m U(x (1 - m), m, z): the known pixels as they are, the hole from a gated U-Net.

    Every layer is a gated convolution elu(a) sigmoid(b). The latents are constant channels of the input, so that there
    may be more than one completion. Halvings are strided, doublings repeat pixels, and the maps of equal size before
    and after are joined; two layers at the coarsest, one of them dilated, see across the hole. With ``cell`` > 1 the
    U-Net works on cells of so many pixels a side, their pixels as channels, which takes a cell^2-th of the time.

    U is linear in training and cut to [-1, 1] in evaluation: a tanh saturates at the background's value, the best
    constant under L1, and learns no more.

    Args:
        image_size: Side in pixels; a multiple of cell 2^halvings.
        channels: Colour channels.
        latent_dim: Channels of noise.
        width: Channels at full size; doubled at every halving.
        halvings: How often the side is halved.
        cell: Pixels a side that are one place of the U-Net.

    Raises:
        ConfigurationError: If the side cannot be halved so often, or a number is less than 1.
    """

    #: Shapes count here, and not strides.
    channels_last = True
    #: Where its pictures lie.
    output_range = (-1.0, 1.0)

    @checked(
        image_size="[1, inf)",
        channels="[1, inf)",
        latent_dim="[1, inf)",
        width="[1, inf)",
        halvings="[1, inf)",
        cell="[1, inf)",
    )
    def __init__(
        self,
        image_size: int = 28,
        channels: int = 1,
        *,
        latent_dim: int = 4,
        width: int = 16,
        halvings: int = 2,
        cell: int = 1,
    ) -> None:
        super().__init__()
        _check(image_size, width=width, halvings=halvings, cell=cell)
        self.latent_dim, self.sample_shape, self.num_classes = latent_dim, (channels, image_size, image_size), 0
        widths = [width * 2**level for level in range(halvings + 1)]
        self.cell = cell
        self.enter = GatedConv2d((channels + 1) * cell**2 + latent_dim, width)
        self.down = nn.ModuleList(GatedConv2d(w, 2 * w, stride=2) for w in widths[:-1])
        self.across = nn.ModuleList(GatedConv2d(widths[-1], widths[-1], dilation=dilation) for dilation in (1, 2))
        self.up = nn.ModuleList(GatedConv2d(3 * w, w) for w in reversed(widths[:-1]))
        self.leave = nn.Conv2d(width, channels * cell**2, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Map latents (N, latent_dim) and conditions (N, channels + 1, side, side) to pictures (N, channels, ...)."""
        known, mask = condition[:, :-1], condition[:, -1:]
        seen = pixel_unshuffle(condition, self.cell)
        noise = z[:, :, None, None].expand(-1, -1, seen.shape[2], seen.shape[3])
        maps = [self.enter(torch.cat([seen, noise], dim=1))]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        x = maps.pop()
        for layer in self.across:
            x = layer(x)
        for layer in self.up:
            x = layer(torch.cat([interpolate(x, scale_factor=2.0), maps.pop()], dim=1))
        made = pixel_shuffle(self.leave(x), self.cell)
        return known + mask * (made if self.training else made.clamp(-1, 1))


class PatchDiscriminator(nn.Module):
    """(x, c) -> logits (N, 1, side / 2^halvings, ...), one for each patch; every layer under spectral normalisation.

    It sees the picture and the mask. Patches overlap: at two halvings one is 26 pixels a side.

    Args:
        image_size: Side in pixels; a multiple of 2^halvings.
        channels: Colour channels.
        width: Channels after the first layer; doubled at every halving after it.
        halvings: How often the side is halved.

    Raises:
        ConfigurationError: If the side cannot be halved so often, or a number is less than 1.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(image_size="[1, inf)", channels="[1, inf)", width="[1, inf)", halvings="[1, inf)")
    def __init__(self, image_size: int = 28, channels: int = 1, *, width: int = 16, halvings: int = 2) -> None:
        super().__init__()
        _check(image_size, width=width, halvings=halvings)
        self.sample_shape, self.num_classes, self.conditioning = (channels, image_size, image_size), 0, "channels"
        layers: list[nn.Module] = []
        before = channels + 1
        for level in range(halvings):
            layers += [spectral_norm(nn.Conv2d(before, width * 2**level, 4, 2, 1)), nn.LeakyReLU(0.2)]
            before = width * 2**level
        layers += [spectral_norm(nn.Conv2d(before, before, 3, padding=1)), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map pictures (N, channels, side, side) and conditions (N, channels + 1, side, side) to logits."""
        logits: Tensor = self.trunk(torch.cat([x, condition[:, -1:]], dim=1))
        return logits


class GatedConv2d(nn.Module):
    """elu(a) sigmoid(b), where a and b are the halves of a 3x3 convolution's channels. Yu et al. 2019, equation 3.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        stride: 2 halves the side.
        dilation: Pixels between taps.
    """

    def __init__(self, before: int, after: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.both = nn.Conv2d(before, 2 * after, 3, stride, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, before, h, w) to (N, after, h / stride, w / stride)."""
        values, gates = self.both(x).chunk(2, dim=1)
        gated: Tensor = elu(values) * gates.sigmoid()
        return gated


def _check(image_size: int, *, width: int, halvings: int, cell: int = 1) -> None:
    factor = cell * 2**halvings
    if image_size < factor or image_size % factor:
        raise ConfigurationError(
            message(
                f"image_size must be a multiple of {factor}, for {halvings} halvings of cells of {cell}",
                received=image_size,
                fix="resize the source's images, or lower halvings or cell",
            )
        )
