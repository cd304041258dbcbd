"""How well pictures are completed: PSNR, SSIM, L1 in the hole and Fréchet distance, beside fills without a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import quantise
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.features import FeatureNet, FrozenNet
from fedgan_lightning.evaluation.federated_queries import CHUNK, FeatureMoments, FederatedQuery
from fedgan_lightning.evaluation.fid import FeatureSums, feature_sums, frechet_distance
from fedgan_lightning.evaluation.inpainting_baselines import FILLS
from fedgan_lightning.evaluation.metrics import Metric, client_sums, network, networks
from fedgan_lightning.gan.inpainting_mask import InpaintingMask
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

#: Standard deviation in pixels of SSIM's window: 1.5 as published, which does not fit pictures of fewer pixels a side.
WINDOW, SMALL_WINDOW, SMALL = 1.5, 0.5, 16


class Completion(Metric):
    """Pictures of the test split, each with a hole from a fixed seed, completed by the model.

    Reports ``completion_psnr`` in dB and ``completion_ssim`` of whole pictures, ``completion_l1``, the mean difference
    in the hole in shares of the range of pixels, ``completion_fid`` against the clients' data, from sums that add up
    over clients, and ``completion_spread``, the standard deviation in the hole between completions from different
    noise. The same of pictures filled with the mean of their known pixels, with the nearest known pixel, and by Telea's
    method where OpenCV is installed, are facts of the run, with ``completion_fid_floor`` of the whole pictures.

    PSNR is that of the mean squared error of all pictures together.

    Args:
        holes: The test's holes; default those of :class:`~fedgan_lightning.gan.inpainting_mask.InpaintingMask`.
        num_images: Pictures of the test split, drawn with the seed; at most all.
        seed: Seed of pictures, holes and noise.
        features: Feature network; default the small classifier for labelled data, else pixels.
    """

    needs_server_samples = True
    larger_is_better = ("completion_psnr", "completion_ssim", "completion_spread")

    @checked(num_images="[2, inf)", seed="[0, inf)")
    def __init__(
        self,
        holes: InpaintingMask | None = None,
        *,
        num_images: int = 2000,
        seed: int = 0,
        features: FeatureNet | None = None,
    ) -> None:
        self.holes = holes if holes is not None else InpaintingMask()
        self.num_images, self.seed, self.features = num_images, seed, features
        self.pictures = self.masked = torch.empty(0)
        self.net: FrozenNet | None = None
        self.real: FeatureSums | None = None

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        return [FeatureMoments(net) for net in networks(self.features, data, sent=sent)]

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.pictures, self.masked = pictures_with_holes(data, self.holes, count=self.num_images, seed=self.seed)
        self.net = network(self.features, data).to(device)
        sums = list(client_sums(data, self.net))
        self.real = sum(sums[1:], start=sums[0])
        facts: dict[str, Any] = {
            "completion_num_images": len(self.pictures),
            "completion_fid_floor": self._distance(self.pictures),
            "completion_fid_features": f"{self.net.name} (d={self.net.num_features})",
        }
        mask = self.masked[:, -1:]
        for name, fill in FILLS.items():
            try:
                filled = fill(self.masked[:, :-1], mask)
            except ConfigurationError as error:
                facts[f"completion_{name}"] = f"not measured: {error}"
                continue
            facts |= {f"completion_{key}_{name}": value for key, value in self.scores(filled).items()}
        return facts

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def inspect(self, model: nn.Module) -> dict[str, float]:
        check_completes(model)
        generators = (make_generator(self.seed, f"completion noise {turn}") for turn in range(2))
        first, second = (completed(model, self.masked, generator=generator) for generator in generators)
        mask = self.masked[:, -1:]
        # of two draws, the unbiased variance is half the squared difference
        variance = ((first - second) / 2).square().mul(mask).sum() / 2 / (mask.sum() * first.shape[1])
        values = {**self.scores(first), "spread": float(variance.sqrt())}
        return {f"completion_{name}": value for name, value in values.items()}

    def scores(self, filled: Tensor) -> dict[str, float]:
        """Return ``psnr``, ``ssim``, ``l1`` and ``fid`` of completed pictures (n, c, h, w), rounded to bytes first."""
        filled, mask = quantise(filled), self.masked[:, -1:]
        found = similarity(filled, self.pictures)
        apart = ((filled - self.pictures).abs() / 2 * mask).sum() / (mask.sum() * filled.shape[1])
        return {**found, "l1": float(apart), "fid": self._distance(filled)}

    def _distance(self, pictures: Tensor) -> float:
        assert self.net is not None
        assert self.real is not None
        return frechet_distance(self.real, feature_sums(self.net, pictures.split(CHUNK)))


def pictures_with_holes(
    data: FederatedDataModule, holes: InpaintingMask, *, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return pictures (n, c, h, w) of the test split and the same with holes (n, c + 1, h, w), fixed by the seed.

    Raises:
        ConfigurationError: If the data is no pictures.
    """
    if len(data.sample_shape) != 3:
        raise ConfigurationError(
            message(
                "what is completed must be pictures",
                received=f"samples of shape {list(data.sample_shape)}",
                fix="use an image source",
            )
        )
    samples = data.test_samples
    chosen = torch.randperm(len(samples), generator=make_generator(seed, "completion pictures"))[:count]
    x, y = samples.take(chosen)
    u = torch.rand(len(x), holes.num_random, generator=make_generator(seed, "completion holes"))
    return x, holes.make(x, y, u)


def completed(model: nn.Module, masked: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return the model's completions (n, c, h, w), on the CPU, of pictures with holes (n, c + 1, h, w)."""
    sample: Any = model.sample
    samples: Tensor = sample(len(masked), conditions=masked, generator=generator)
    return samples.detach().cpu().float()


def check_completes(model: nn.Module) -> None:
    """Refuse a model that was not trained to complete pictures.

    Raises:
        ConfigurationError: If it was not.
    """
    condition = getattr(model, "condition", None)
    if not isinstance(condition, InpaintingMask):
        raise ConfigurationError(
            message(
                "pictures must be completed by a GAN whose condition is InpaintingMask",
                received=f"{type(model).__name__} with condition {type(condition).__name__}",
                fix="set model.condition: InpaintingMask, and InpaintingGenerator; or leave Completion out",
            )
        )


def similarity(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return ``psnr`` in dB and ``ssim`` of pictures (n, c, h, w) in [-1, 1]; a perfect copy has PSNR infinity.

    PSNR = 10 log10(4 / MSE), MSE over all pictures. SSIM: Wang et al. 2004, with their Gaussian window of 1.5 pixels;
    of 0.5 pixels for pictures of less than 16 pixels a side, in which it does not fit.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    window = WINDOW if min(first.shape[2:]) >= SMALL else SMALL_WINDOW
    ratio = peak_signal_noise_ratio(first, second, data_range=2.0)
    index = structural_similarity_index_measure(first, second, data_range=2.0, sigma=window)
    assert isinstance(index, Tensor)
    return {"psnr": float(ratio), "ssim": float(index)}
