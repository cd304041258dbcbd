"""The moving average of a generator: its samples are less noisy than those of the weights that training has reached."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.gan.precision import FullPrecision

#: Buffer of an average that its network does not have.
IMAGES_SEEN = "images_seen"


class Average(FullPrecision):
    """What averages have beside what their networks have: full precision, and a way into pickles."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
        return _empty, (type(self).__bases__[1],), state


@functools.cache
def _ema_class(network_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Averaged{network_class.__name__}", (Average, network_class), {})


def _empty(network_class: Any) -> nn.Module:
    kind = _ema_class(network_class)
    return kind.__new__(kind)


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the network itself where ``torch.compile(network)`` is given."""
    return getattr(network, "_orig_mod", network)


def make_ema(network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` to average into: without gradients, with a count of the images that it has seen.

    Of a compiled network the copy is not compiled. It keeps its precision where ``network`` is turned to a narrower
    type: a step of a thousandth is none in bfloat16.
    """
    average = copy.deepcopy(uncompiled(network)).requires_grad_(False)
    network_class: Any = type(average)  # mypy takes a class for unhashable where it is an argument of a cache
    average.__class__ = _ema_class(network_class)
    average.register_buffer(IMAGES_SEEN, torch.zeros((), dtype=torch.float64))
    return average


@torch.no_grad()
def update_ema_(
    average: nn.Module, network: nn.Module, *, num_images: float, half_life: float, rampup: float | None = None
) -> None:
    """Move ``average`` towards ``network``: w_average <- b w_average + (1 - b) w with b = 2^(-num_images / h).

    h is the half-life; with a ramp-up, h = min(half-life, rampup x images seen so far, these included). Buffers are
    copied. Sources: Karras et al. 2018, section 4; the ramp-up: Karras et al. 2020, training settings.

    Args:
        average: What :func:`make_ema` returned; perhaps with a leading dimension of clients in all tensors.
        network: The network that it follows.
        num_images: Images that ``network`` has seen since the last call.
        half_life: Half-life in images.
        rampup: Share of the images seen that the half-life does not exceed; ``None``: none.
    """
    if not num_images:  # a round without clients
        return
    seen: Tensor = average.images_seen  # type: ignore[assignment]
    seen += num_images
    lives = torch.full_like(seen, half_life) if rampup is None else (rampup * seen).clamp(max=half_life)
    weight = 1 - 0.5 ** (num_images / lives)  # stays on the device: nobody waits for it
    averages: list[Tensor] = list(average.parameters())
    if averages:
        shaped = [weight.to(p.dtype).reshape(weight.shape + (1,) * (p.dim() - weight.dim())) for p in averages]
        torch._foreach_lerp_(averages, [new.to(old.dtype) for old, new in zip(averages, network.parameters())], shaped)
    buffers = dict(average.named_buffers())
    for name, value in uncompiled(network).named_buffers():
        buffers[name].copy_(value)
