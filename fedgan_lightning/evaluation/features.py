"""Feature networks for Fréchet distances and class counts: frozen, never federated, outside every state dict.

All take samples as the framework has them, float in [-1, 1] for images, and return (N, num_features).
"""

from __future__ import annotations

import copy
import hashlib
import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedgan_lightning.data.reading import reason, user_path
from fedgan_lightning.data.samples import ClientSamples, SampleForm, Samples, to_bytes
from fedgan_lightning.errors import ConfigurationError, SampleSizeError, message
from fedgan_lightning.files import cache_folder, remembered
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import isolated_rng, make_generator


class FrozenNet(nn.Module):
    """A feature network ready for use: evaluation mode whatever happens, no gradients.

    Args:
        net: Samples -> features (N, num_features), or -> (features, class logits).
        num_features: Dimension of the features.
        name: What it is, for reports.
        digest: Hash of its weights, for reports.
    """

    def __init__(self, net: nn.Module, *, num_features: int, name: str, digest: str) -> None:
        super().__init__()
        self.net = net.eval()
        for parameter in net.parameters():  # TorchScript has no requires_grad_
            parameter.requires_grad_(False)
        self.num_features, self.name, self.digest = num_features, name, digest

    def train(self, mode: bool = True) -> FrozenNet:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples to features (N, num_features)."""
        output = self.net(x)
        features: Tensor = output[0] if isinstance(output, tuple) else output
        return features

    def logits(self, x: Tensor) -> Tensor:
        """Map samples to class logits (N, C), for networks that classify."""
        output: tuple[Tensor, Tensor] = self.net(x)
        return output[1]

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """Map samples to their likeliest class (N,), on the CPU, for networks that classify."""
        return self.logits(x.to(next(self.parameters()).device, torch.float32)).argmax(1).cpu()


class FeatureNet(ABC):
    """Makes a feature network for a data set."""

    @abstractmethod
    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        """Return the network; ``samples`` is the training split."""


class PixelFeatures(FeatureNet):
    """The samples themselves, flattened: no training, no seed, no weights.

    Args:
        side: Pictures (C, H, W) larger than this are averaged down to ``side`` pixels a side first. A Fréchet distance
            in d dimensions needs many times d samples, and its matrix root takes d^3 operations.
    """

    @checked(side="[0, inf)")
    def __init__(self, side: int = 8) -> None:
        self.side = side

    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        shape = tuple(samples.x.shape[1:])
        if len(shape) == 3 and max(shape[1:]) > self.side:
            net = nn.Sequential(nn.AdaptiveAvgPool2d(self.side), nn.Flatten())
            size, name = shape[0] * self.side**2, f"pixels averaged to {self.side}x{self.side}"
        else:
            net, size, name = nn.Sequential(nn.Flatten()), int(np.prod(shape)), "pixels"
        return FrozenNet(net, num_features=size, name=name, digest="none")


class ClassifierFeatures(FeatureNet):
    """The 64 hidden features of a small classifier, trained once with a fixed seed and cached by hash.

    Two to three times more sensitive to lost classes, the typical failure of federated GANs, than pixels (measured).
    It is trained on the source's training split by whoever runs the experiment; it is a ruler, and never part of the
    federation.

    Args:
        epochs: Passes over at most 20 000 training samples.
        seed: Seed of its training.
        cache: Folder for trained networks; default ``$FEDGAN_CACHE`` or ``~/.cache/fedgan_lightning``.
    """

    num_features = 64

    @checked(epochs="[1, inf)", seed="[0, inf)")
    def __init__(self, *, epochs: int = 8, seed: int = 0, cache: str | None = None) -> None:
        self.epochs, self.seed, self.cache = epochs, seed, cache

    def untrained(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        """Return the network before its training, for samples of this shape."""
        with isolated_rng(self.seed):
            net = Classifier(tuple(samples.x.shape[1:]), num_classes, is_image=samples.is_image)
        return FrozenNet(net, num_features=self.num_features, name="classifier", digest="")

    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        if isinstance(samples, SampleForm):
            raise SampleSizeError(
                message(
                    "ClassifierFeatures must have labelled samples to train on, at the server",
                    received="none",
                    fix="use PixelFeatures, or FileFeatures that all sites have",
                )
            )
        if samples.y is None or num_classes < 2:
            raise ConfigurationError(
                message(
                    "ClassifierFeatures must have labelled data of at least two classes",
                    received=f"{num_classes} classes",
                    fix="use PixelFeatures or InceptionFeatures",
                )
            )

        def read(path: Path) -> nn.Module:
            net = self.untrained(samples, num_classes=num_classes).net.requires_grad_(True)
            net.load_state_dict(torch.load(path, weights_only=True))
            return net

        def make() -> nn.Module:
            net = self.untrained(samples, num_classes=num_classes).net.train().requires_grad_(True)
            with isolated_rng(self.seed):
                train_classifier(net, samples, epochs=self.epochs, seed=self.seed)
            return net

        net = remembered(
            self._path(samples, num_classes),
            read=read,
            make=make,
            write=lambda made, file: torch.save(made.state_dict(), file),
        )
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values()))
        return FrozenNet(net, num_features=self.num_features, name="classifier", digest=digest.hexdigest()[:12])

    def _path(self, samples: Samples, num_classes: int) -> Path:
        digest = hashlib.sha256(f"v2 {samples.digest} {num_classes} {self.epochs} {self.seed}".encode())
        return cache_folder(self.cache) / f"classifier-{digest.hexdigest()[:16]}.pt"


class InceptionFeatures(FeatureNet):
    """The 2048 pooled features of the FID Inception network, on images made RGB and uint8.

    Args:
        weights_path: Local file of the torch-fidelity weights; ``None`` lets torch-fidelity download them.
    """

    @checked()
    def __init__(self, weights_path: str | None = None) -> None:
        self.weights_path = weights_path

    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        shape = tuple(samples.x.shape[1:])
        if not samples.is_image or shape[0] not in (1, 3):
            raise ConfigurationError(
                message(
                    "InceptionFeatures must have images of 1 or 3 channels",
                    received=f"{samples.x.dtype} data of shape {list(shape)}",
                    fix="use PixelFeatures",
                )
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            net = NoTrainInceptionV3("inception-v3-compat", ["2048"], self.weights_path)
        except (OSError, ModuleNotFoundError, RuntimeError) as error:
            raise ConfigurationError(
                message(
                    "InceptionFeatures must have torch-fidelity and the Inception weights",
                    received=f"weights_path={self.weights_path} ({type(error).__name__}: {str(error).splitlines()[0]})",
                    fix="run pip install 'fedgan-lightning[inception]'; offline, set weights_path to a local file",
                )
            ) from error
        digest = "torch-fidelity"
        if self.weights_path is not None:
            digest = hashlib.sha256(Path(self.weights_path).read_bytes()).hexdigest()[:12]
        return FrozenNet(_Bytes(net), num_features=2048, name="inception", digest=digest)


class FileFeatures(FeatureNet):
    """A network in a file that server and sites have, each its own copy, named by its hash: nothing of it travels.

    Whoever loads a TorchScript file runs what it says, so sites take one from somebody whom they trust with that;
    weights for a module that is installed run nothing. Both may give features, or features and class logits, such as
    those of a classifier that the federation has trained before (``configs/classifier.yaml``).

    Args:
        path: The file: TorchScript, or weights in safetensors.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        module: What the weights are of: samples (N, ...) -> features (N, d), or (features, logits (N, C)).
    """

    @checked()
    def __init__(self, path: str, sha256: str, *, module: nn.Module | None = None) -> None:
        self.path, self.sha256, self.module = user_path(path), sha256.lower(), module
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            fix = f"write what sha256sum {path} prints"
            raise ConfigurationError(message("sha256 must have 64 hexadecimal digits", received=sha256, fix=fix))

    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        net = self._loaded(self._read()).eval()
        with torch.no_grad():
            output = net(torch.zeros(2, *samples.x.shape[1:]))
        features = output[0] if isinstance(output, tuple) else output
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigurationError(
                message(
                    "a feature network must give features (N, d), or (features, logits), of samples (N, ...)",
                    received=f"{shape} of {self.path.name} for two samples of {list(samples.x.shape[1:])}",
                    fix="write a module that flattens them",
                )
            )
        return FrozenNet(net, num_features=features.shape[1], name=self.path.name, digest=self.sha256)

    def _read(self) -> bytes:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                message("FileFeatures must have its file", received=f"{self.path} ({error.strerror})", fix="copy it")
            ) from error
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise ConfigurationError(
                message(
                    f"{self.path} must have the SHA-256 that the settings name, {self.sha256}",
                    received=found,
                    fix="copy the file that the federation agreed upon",
                )
            )
        return content

    def _loaded(self, content: bytes) -> nn.Module:
        """Return the network of a file whose hash is right."""
        try:
            if self.module is None:
                scripted: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")
                return scripted
            net = copy.deepcopy(self.module)
            net.load_state_dict(load(content))
            return net
        except Exception as error:  # torch and safetensors have many
            what = "TorchScript" if self.module is None else f"weights of {type(self.module).__name__}"
            raise ConfigurationError(
                message(
                    f"{self.path} must hold {what}",
                    received=reason(error),
                    fix="name the module whose weights it holds" if self.module is None else "name its module",
                )
            ) from error


class ModuleFeatures(FeatureNet):
    """Any frozen module as a feature network.

    Args:
        module: Samples -> features (N, num_features).
        num_features: Dimension of the features.
        name: What it is, for reports.
    """

    @checked(num_features="[1, inf)")
    def __init__(self, module: nn.Module, num_features: int, *, name: str = "module") -> None:
        self.module, self.num_features, self.name = module, num_features, name

    def build(self, samples: Samples, *, num_classes: int) -> FrozenNet:
        digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in self.module.state_dict().values()))
        return FrozenNet(self.module, num_features=self.num_features, name=self.name, digest=digest.hexdigest()[:12])


class Classifier(nn.Module):
    """Two convolutions (images) or one hidden layer (vectors), then 64 features, then class logits."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, is_image: bool) -> None:
        super().__init__()
        if is_image:
            height, width = ((side + 3) // 4 for side in shape[1:])  # two convolutions of stride 2, padded
            self.trunk = nn.Sequential(
                nn.Conv2d(shape[0], 16, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, 2, 1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * height * width, ClassifierFeatures.num_features),
                nn.ReLU(),
            )
        else:
            self.trunk = nn.Sequential(
                nn.Flatten(),
                nn.Linear(int(np.prod(shape)), 128),
                nn.ReLU(),
                nn.Linear(128, ClassifierFeatures.num_features),
                nn.ReLU(),
            )
        self.head = nn.Linear(ClassifierFeatures.num_features, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return features, self.head(features)


def train_classifier(net: nn.Module, samples: Samples, *, epochs: int, seed: int) -> None:
    """Train a classifier in place on at most 20 000 of the samples: Adam 2e-3, batches of 64, cross-entropy.

    Args:
        net: Samples -> (features, class logits).
        samples: With labels.
        epochs: Passes over them.
        seed: Seed of choice and order.
    """
    generator = make_generator(seed, "classifier")
    kept = torch.randperm(len(samples), generator=generator)[:20_000]
    data = ClientSamples(samples=samples, indices=kept)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for positions in torch.randperm(len(data), generator=generator).split(64):
            x, y = data.take(positions)
            loss = cross_entropy(net(x.float())[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class _Bytes(nn.Module):
    """Float images in [-1, 1] -> rounded RGB bytes -> the wrapped network."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.net(to_bytes(x).expand(-1, 3, -1, -1))
        return features
