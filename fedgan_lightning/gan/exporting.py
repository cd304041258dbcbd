"""A GAN outside of Python: its forward pass as ONNX or TorchScript."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Exporting:
    """Exports the generator that is sampled; part of :class:`~fedgan_lightning.gan.module.GAN`."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return latents, and labels where there are classes, of one sample."""
        module: Any = self
        like = next(module.generator.parameters())
        latents = torch.zeros(1, module.latent_dim, device=like.device, dtype=like.dtype)
        return (latents, torch.zeros(1, dtype=torch.int64, device=like.device)) if module.num_classes else (latents,)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Write G(z, y) in evaluation mode as ONNX; arguments as in Lightning.

        Args:
            file_path: Where to.
            input_sample: Latents, or latents and labels, for tracing; by default of one sample.
            **kwargs: For ``torch.onnx.export``.
        """
        module: Any = self
        module.sampling_generator()  # whose statistics are final before its operations are written down
        inputs = self.example_inputs() if input_sample is None else input_sample
        mode = module.training
        module.eval()
        try:
            return super().to_onnx(file_path, inputs, **kwargs)  # type: ignore[misc]
        finally:
            module.train(mode)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Return G(z, y) in evaluation mode as TorchScript; arguments as in Lightning.

        Args:
            file_path: Where to write it; ``None`` does not.
            method: ``script`` compiles the generator's code, ``trace`` records what it does.
            example_inputs: Latents, or latents and labels, for tracing; by default of one sample.
            **kwargs: For ``torch.jit``.
        """
        module: Any = self
        network = module.sampling_generator()
        mode = network.training
        network.eval()
        try:
            if method == "trace":
                inputs = self.example_inputs() if example_inputs is None else example_inputs
                exported = torch.jit.trace(network, inputs, **kwargs)
            else:
                exported = torch.jit.script(network, **kwargs)
        finally:
            network.train(mode)
        if file_path is not None:
            torch.jit.save(exported, str(file_path))
        return exported
