"""How a global module is sampled: by its own ``sample``, by ``forward(z)``, or by a given function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.hooks import SampleSource, offers
from fedgan_lightning.seeding import isolated_rng

#: What the number of samples is called elsewhere.
COUNTS = ("num_samples", "n_samples", "nsamples", "n_sample", "num_images", "batch_size", "bs", "num", "n", "count")
#: What the device is called elsewhere.
DEVICES = ("device", "current_device")
#: What the dimension of z is called elsewhere.
DIMENSIONS = ("latent_dim", "z_dim", "nz", "noise_dim", "zdim", "dim_z")
#: (module, number of samples) -> samples.
SampleWith = Callable[[Any, int], Tensor]


def sampler_of(model: nn.Module, sample_with: SampleWith | None = None) -> Callable[..., Tensor] | None:
    """Return a function (number, labels, generator, further options) -> samples; ``None`` where nobody knows how.

    Functions that take no generator draw from torch's, which is seeded for the call from the generator given and is
    afterwards what it was before.

    Args:
        model: The global module.
        sample_with: The user's function, which comes first.
    """
    if sample_with is not None:
        return _drawn(model, lambda count: sample_with(model, count))
    if offers(model, SampleSource):
        native: Callable[..., Tensor] = model.sample  # type: ignore[assignment]
        return native
    own = getattr(model, "sample", None)
    if callable(own) and (arguments := _arguments_of(own, model)) is not None:
        return _drawn(model, lambda count: own(**arguments(count)))
    dimension = _latent_dimension(model)
    if dimension is not None and _takes_one(model.forward):
        return _drawn(model, lambda count: model(torch.randn(count, dimension, device=_device(model))))
    return None


def trial(sampler: Callable[..., Tensor], shape: Sequence[int] | None) -> str | None:
    """Return why samples are of no use; ``None`` if two of them are as the data are.

    Args:
        sampler: Of a module that is no ``GAN``.
        shape: Shape of one sample of the data; ``None`` where that is not known.
    """
    try:
        found = sampler(2, labels=None, generator=torch.Generator().manual_seed(0))
    except Exception as error:
        return f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not isinstance(found, Tensor):
        return f"it returns a {type(found).__name__}, and no tensor"
    if shape is not None and tuple(found.shape) != (2, *shape):
        return f"two samples have the shape {list(found.shape)}, and those of the data {[2, *shape]}"
    return None


def _arguments_of(sample: Callable[..., Any], model: nn.Module) -> Callable[[int], dict[str, Any]] | None:
    """Return what to call a ``sample`` with, by the number of samples; ``None`` if it wants something else."""
    try:
        parameters = list(inspect.signature(sample).parameters.values())
    except (TypeError, ValueError):
        return None
    named = [own for own in parameters if own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)]
    count = next((own for own in named if own.name in COUNTS), None)
    if count is None and named and named[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and _is_count(named[0]):
        count = named[0]
    if count is None:
        return None
    others = [own for own in named if own is not count and own.default is own.empty]
    if any(own.name not in DEVICES for own in others) or any(own.kind is own.POSITIONAL_ONLY for own in parameters):
        return None
    fixed = {own.name: _device(model) for own in named if own.name in DEVICES}
    return lambda number: {count.name: number, **fixed}


def _is_count(parameter: inspect.Parameter) -> bool:
    """Whether a first parameter may be the number of samples, by its annotation or default."""
    kind = parameter.annotation
    return kind in (int, "int") or (isinstance(parameter.default, int) and not isinstance(parameter.default, bool))


def _takes_one(forward: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return False
    needed = [own for own in parameters if own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD]
    return len(needed) == 1


def _latent_dimension(model: nn.Module) -> int | None:
    homes = (model, getattr(model, "hparams", {}))
    for name in DIMENSIONS:
        for home in homes:
            value = home.get(name) if isinstance(home, dict) else getattr(home, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _drawn(model: nn.Module, draw: Callable[[int], Any]) -> Callable[..., Tensor]:
    def sample(count: int, *, labels: Any = None, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        modes = {part: part.training for part in model.modules()}
        try:
            with torch.no_grad(), isolated_rng(seed, device=_device(model)):
                model.eval()
                found: Tensor = draw(count)
        finally:
            for part, mode in modes.items():
                part.training = mode
        return found

    return sample
