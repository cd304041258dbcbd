"""What one update of a discriminator shows of the samples it was made from: gradient inversion without any search.

A linear layer W x + b whose input is the sample has dL/dW_j = delta_j x and dL/db_j = delta_j: the ratio of a row is
the sample itself (Phong et al. 2018; Geiping et al. 2020, proposition 3.1). Real samples are told from generated ones
by subtracting the latter's part, which a server that knows the latents computes itself. The same is then tried on what
the server has where updates are clipped, clipped and noised, or masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedgan_lightning.dp.audits.scores import evaluating
from fedgan_lightning.dp.audits.views import VIEWS, Gradient, Protection, norm_of, views
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked

#: (real logits, generated logits) -> the discriminator's loss, a scalar.
DiscriminatorLoss = Callable[[Tensor, Tensor], Tensor]
#: A row whose bias moved less than this share of the largest says nothing but rounding.
SMALLEST_ROW = 1e-6


@dataclass(frozen=True)
class Inversion:
    """Samples, and what was reconstructed of each from a step on it alone.

    Attributes:
        truth: Samples (N, ...).
        found: Reconstructions (N, ...) by view: ``raw``, ``clipped``, ``noised``, ``masked``.
        labels: The labels (N,), and those read off a projection embedding by view; empty without one.
    """

    truth: Tensor
    found: dict[str, Tensor]
    labels: dict[str, Tensor]

    def relative_errors(self) -> dict[str, float]:
        """Return the mean over samples of |found - truth| / |truth|, by view."""
        return {view: float(relative_error(own, self.truth).mean()) for view, own in self.found.items()}

    def cosines(self) -> dict[str, float]:
        """Return the mean over samples of the cosine of reconstruction and truth, by view."""
        return {view: float(cosine(own, self.truth).mean()) for view, own in self.found.items()}

    def label_accuracies(self) -> dict[str, float]:
        """Return the share of labels that were read correctly, by view; nothing without a projection embedding."""
        truth = self.labels.get("truth")
        if truth is None:
            return {}
        return {view: float((own == truth).double().mean()) for view, own in self.labels.items() if view != "truth"}


def logistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-r) + E softplus(f): the discriminator's loss of Goodfellow et al. 2014."""
    return softplus(-real).mean() + softplus(fake).mean()


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """Return |found - truth| / |truth| (N,) of samples (N, ...)."""
    difference, length = (own.double().flatten(1).norm(dim=1) for own in (found - truth, truth))
    errors: Tensor = difference / length.clamp_min(1e-30)
    return errors


def cosine(found: Tensor, truth: Tensor) -> Tensor:
    """Return the cosine (N,) of samples (N, ...) and their reconstructions."""
    found_by_sample: Tensor = torch.cosine_similarity(found.double().flatten(1), truth.double().flatten(1), dim=1)
    return found_by_sample


# ---------------------------------------------------------------------- what can be inverted


def first_linear(discriminator: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Return the name of the linear layer that a discriminator's samples go into as they are, or ``None``.

    Args:
        discriminator: (x, y) -> logits, or (logits, class logits).
        x: Some samples (N, ...).
        y: Their labels (N,).
    """
    rows, found = x.flatten(1), []

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape == rows.shape and bool((inputs[0] == rows).all()):
                found.append(name)

        return hook

    layers = {name: own for name, own in discriminator.named_modules() if type(own) is nn.Linear}
    hooks = [own.register_forward_pre_hook(look(name)) for name, own in layers.items() if own.bias is not None]
    try:
        with torch.no_grad(), evaluating(discriminator):
            discriminator(x, y)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def discriminator_gradient(
    discriminator: nn.Module,
    real: tuple[Tensor, Tensor],
    fake: tuple[Tensor, Tensor],
    *,
    loss: DiscriminatorLoss = logistic_loss,
    of_fake_only: bool = False,
) -> Gradient:
    """Return the gradient of a discriminator's loss: minus the update of a step of SGD with learning rate 1.

    Adam's first moment after one step is the same but for a factor.

    Args:
        discriminator: (x, y) -> logits, or (logits, class logits).
        real: Samples (N, ...) and labels (N,).
        fake: Generated samples (M, ...) and labels (M,).
        loss: (real logits, generated logits) -> scalar; where it pairs the two, there is no part of the fakes alone.
        of_fake_only: Only the part of the generated samples: what a server computes that knows the latents.
    """
    with evaluating(discriminator):
        logits = [_logits(discriminator(*own)) for own in (real, fake)]
    total = loss(logits[0].detach() if of_fake_only else logits[0], logits[1])
    named = {name: own for name, own in discriminator.named_parameters() if own.requires_grad}
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(own) if found is None else found.detach()
        for (name, own), found in zip(named.items(), gradients)
    }


def _logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# ---------------------------------------------------------------------- the attack


def without_fakes(update: Mapping[str, Tensor], of_fakes: Mapping[str, Tensor], *, factor: float = 1.0) -> Gradient:
    """Return an update less the part of generated samples that the server knows.

    Args:
        update: What the server has, by name.
        of_fakes: F, by name.
        factor: f in [0, 1], by which clipping has shortened the update: see :func:`clip_factor`.
    """
    return {name: own - factor * of_fakes[name] for name, own in update.items()}


def clip_factor(update: Mapping[str, Tensor], of_fakes: Mapping[str, Tensor], *, layer: str) -> float:
    """Return the factor by which clipping has shortened an update, which the server is not told.

    The update is u = f (R + F) with F known. In the matrix [dW | db] of the first layer R and F have as many
    independent rows as samples each, and rank(u - f F) = rank(u) - rank(F) for the right f only, which is
    rank(F) / trace(u^+ F) (rank reduction, Wedderburn 1934). Noise on u makes it useless.

    Args:
        update: u, by name.
        of_fakes: F, by name.
        layer: Name of the first linear layer, of more rows than there are samples.
    """
    seen, known = _rows(update, layer).double(), _rows(of_fakes, layer).double()
    # Below these shares of the largest, singular values come from rounding.
    least = 1e-11 if update[f"{layer}.weight"].dtype == torch.float64 else 1e-5
    rank = int((torch.linalg.svdvals(known) > least * torch.linalg.matrix_norm(known, 2)).sum())
    trace = float((torch.linalg.pinv(seen, rtol=least) * known.T).sum())
    return min(1.0, rank / trace) if trace > 0 else 1.0


def _rows(update: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return [dW | db] (rows, inputs + 1) of a linear layer."""
    return torch.cat([update[f"{layer}.weight"], update[f"{layer}.bias"].unsqueeze(1)], dim=1)


def single_sample(update: Mapping[str, Tensor], *, layer: str) -> Tensor:
    """Return the sample (d,) of a step on one: sum_j db_j dW_j / sum_j db_j^2, the best fit to all rows' ratios.

    Args:
        update: By name, without the part of generated samples.
        layer: Name of the first linear layer.
    """
    weight, bias = update[f"{layer}.weight"].double(), update[f"{layer}.bias"].double()
    scale = bias.abs().max().clamp_min(1e-300)  # small updates have squares that are none
    weight, bias = weight / scale, bias / scale
    return (bias @ weight) / bias.square().sum().clamp_min(1e-300)


def row_candidates(update: Mapping[str, Tensor], *, layer: str) -> Tensor:
    """Return dW_j / db_j of all rows that moved (R, d): mixtures of the minibatch, and some rows of one sample alone.

    Args:
        update: By name.
        layer: Name of the first linear layer.
    """
    weight, bias = update[f"{layer}.weight"].double(), update[f"{layer}.bias"].double()
    moved = bias.abs() > SMALLEST_ROW * bias.abs().max()
    return weight[moved] / bias[moved].unsqueeze(1)


def best_row(candidates: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Return the row (d,) that comes nearest to any sample of the minibatch, and its relative error.

    Which row that is, only somebody knows who has the samples: it says what leaks at most, not what an attacker picks.

    Args:
        candidates: (R, d).
        truth: The minibatch (N, ...).
    """
    rows = truth.double().flatten(1)
    errors = torch.cdist(candidates, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.norm(dim=1)
    row = int(errors.min(1).values.argmin())
    return candidates[row], float(errors.min())


def moved_rows(update: Mapping[str, Tensor], *, embedding: str) -> Tensor:
    """Return the labels in a minibatch: the rows of a projection embedding that moved at all.

    Args:
        update: By name, without the part of generated samples.
        embedding: Name of the embedding.
    """
    sizes = update[f"{embedding}.weight"].double().norm(dim=1)
    labels: Tensor = (sizes > SMALLEST_ROW * sizes.max()).nonzero().flatten()
    return labels


def embedding_of(discriminator: nn.Module) -> str | None:
    """Return the name of a discriminator's embedding of labels, if it has exactly one."""
    found = [name for name, own in discriminator.named_modules() if isinstance(own, nn.Embedding)]
    return found[0] if len(found) == 1 else None


@checked()
def invert(
    discriminator: nn.Module,
    x: Tensor,
    y: Tensor,
    fake: tuple[Tensor, Tensor],
    *,
    loss: DiscriminatorLoss | None = None,
    protection: Protection | None = None,
    pairs: bool = False,
) -> Inversion:
    """Reconstruct samples, each from a discriminator's step on it and on one generated sample.

    The attacker knows the discriminator and, unless the loss pairs them, the generated sample. The factor of clipping
    is found by :func:`clip_factor`; under noise it is given away, so that what is shown leaks at most. With larger
    minibatches less is left: see :func:`batch_errors`.

    Args:
        discriminator: Begins with a linear layer on the samples; on the CPU.
        x: Samples (N, ...).
        y: Labels (N,).
        fake: Generated samples (N, ...) and their labels (N,).
        loss: (real logits, generated logits) -> scalar; default logistic.
        protection: Clip, noise and masks; default C = 1, z = 1.
        pairs: Whether the loss looks at both logits together: then nothing is subtracted.

    Raises:
        ConfigurationError: If the discriminator does not begin with a linear layer.
    """
    protection = protection if protection is not None else Protection()
    layer, embedding = _layer(discriminator, x, y), embedding_of(discriminator)
    options = {"loss": loss if loss is not None else logistic_loss}
    found: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    labels: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    for number in range(len(x)):
        real, made = (tuple(own[number : number + 1] for own in pair) for pair in ((x, y), fake))
        gradient = discriminator_gradient(discriminator, real, made, **options)  # type: ignore[arg-type]
        known = discriminator_gradient(discriminator, real, made, of_fake_only=True, **options)  # type: ignore[arg-type]
        for view, seen in views(gradient, protection, index=number).items():
            factor = 1.0
            if view == "clipped":  # by the attacker's own means
                factor = clip_factor(seen, known, layer=layer)
            elif view == "noised":  # told, since an attack that fails for want of it would say too much for the noise
                factor = min(1.0, protection.clip / max(norm_of(gradient), 1e-30))
            rest = seen if pairs else without_fakes(seen, known, factor=factor)
            found[view].append(single_sample(rest, layer=layer).view(x.shape[1:]))
            if embedding is not None:
                labels[view].append(rest[f"{embedding}.weight"].norm(dim=1).argmax())
    read = {view: torch.stack(own) for view, own in labels.items() if own}
    return Inversion(
        truth=x,
        found={view: torch.stack(own) for view, own in found.items()},
        labels={"truth": y, **read} if read else {},
    )


@checked(sizes="[1, inf)")
def batch_errors(
    discriminator: nn.Module,
    x: Tensor,
    y: Tensor,
    fake: tuple[Tensor, Tensor],
    *,
    sizes: tuple[int, ...] = (1, 2, 4, 8, 32),
    loss: DiscriminatorLoss | None = None,
    pairs: bool = False,
) -> dict[int, float]:
    """Return the relative error of the best row by the size of the minibatch, for raw updates; sizes beyond N are left.

    Args:
        discriminator: As in :func:`invert`.
        x: Samples (N, ...).
        y: Labels (N,).
        fake: Generated samples (N, ...) and their labels (N,).
        sizes: Samples in a minibatch, of each side.
        loss: (real logits, generated logits) -> scalar; default logistic.
        pairs: Whether the loss looks at both logits together: then nothing is subtracted.

    Raises:
        ConfigurationError: If the discriminator does not begin with a linear layer.
    """
    layer, term, found = _layer(discriminator, x, y), loss if loss is not None else logistic_loss, {}
    for size in sizes:
        if size > len(x):
            continue
        real, made = (x[:size], y[:size]), (fake[0][:size], fake[1][:size])
        gradient = discriminator_gradient(discriminator, real, made, loss=term)
        known = discriminator_gradient(discriminator, real, made, loss=term, of_fake_only=True)
        rest = gradient if pairs else without_fakes(gradient, known)
        found[size] = best_row(row_candidates(rest, layer=layer), x[:size])[1]
    return found


def _layer(discriminator: nn.Module, x: Tensor, y: Tensor) -> str:
    layer = first_linear(discriminator, x, y)
    if layer is None:
        raise ConfigurationError(
            message(
                "gradient inversion must have a discriminator that begins with a linear layer on the samples",
                received=type(discriminator).__name__,
                fix="leave it out: convolutions need a search that is not part of this program",
            )
        )
    return layer
