"""Membership scores: pure functions (x, y) -> one number per sample, higher where it is more likely a member.

What each attacker has: generated samples (black box), those and samples of the population (calibrated, density ratio),
the discriminator (white box), or every update of a client (the server).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import softplus

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.neighbours import BLOCK, nearest
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

#: (samples (N, ...), labels (N,)) -> scores (N,).
Score = Callable[[Tensor, Tensor], Tensor]
#: Samples (N, ...) -> points (N, d) in which distances are measured.
Project = Callable[[Tensor], Tensor]
#: Share of the largest variance that is added to all of them: samples may lie in a plane.
RIDGE = 1e-6
#: Samples whose gradients are in memory at a time.
GRADIENTS = 16


def flat(x: Tensor) -> Tensor:
    """Return samples (N, ...) as points (N, d)."""
    points: Tensor = x.float().flatten(1)
    return points


def principal_components(samples: Tensor, *, number: int | None) -> Project:
    """Return the projection on the first principal components of samples (N, ...), or none.

    Args:
        samples: What the attacker has: generated samples, or samples of the population.
        number: Components d, cut to what there is; ``None`` keeps every number of a sample.
    """
    if number is None:
        return flat
    points = flat(samples).double()
    centre = points.mean(0)
    _, _, directions = torch.linalg.svd(points - centre, full_matrices=False)
    kept = directions[:number].T

    def project(x: Tensor) -> Tensor:
        points: Tensor = (flat(x).double() - centre) @ kept
        return points

    return project


# ---------------------------------------------------------------------- black box: generated samples


def distance_score(generated: Tensor) -> Score:
    """Return minus the distance to the nearest generated sample. Chen et al. 2020 (GAN-Leaks), full black box.

    It also follows how common a sample is, so that alone it is a poor measure of what leaks.

    Args:
        generated: Samples (M, ...).
    """
    rows = flat(generated)
    return lambda x, y: -nearest(flat(x), rows)[0]


def calibrated_score(target: Tensor, reference: Tensor) -> Score:
    """Return how much nearer the generator's samples are than a reference's: L(x, reference) - L(x, target).

    L is the distance to the nearest sample. The reference makes up for samples that lie near everything. Chen et al.
    2020 (GAN-Leaks, attack calibration).

    Args:
        target: Samples (M, ...) of the generator that is attacked.
        reference: Samples (R, ...) of a generator that had no members, or of the population itself.
    """
    near, far = distance_score(target), distance_score(reference)
    return lambda x, y: near(x, y) - far(x, y)


def monte_carlo_radius(candidates: Tensor, generated: Tensor, *, project: Project = flat) -> float:
    """Return the median over candidates of the distance to the nearest generated sample.

    Hilprecht et al. 2019 (median heuristic); it needs all candidates, members or not, and no membership.

    Args:
        candidates: Samples (N, ...).
        generated: Samples (M, ...).
        project: Where distances are measured.
    """
    return float(nearest(project(candidates), project(generated))[0].median())


@checked(radius="[0, inf)")
def monte_carlo_score(
    generated: Tensor, *, radius: float, variant: Literal["count", "log"] = "count", project: Project = flat
) -> Score:
    """Return an estimate of the generator's density around a sample. Hilprecht et al. 2019 (Monte-Carlo attack).

    ``count``: mean_i 1[d(x, g_i) <= e]. ``log``: mean_i 1[d(x, g_i) <= e] (1 + log(e / d(x, g_i))), the paper's minus
    log-distance in units of e, plus one: a neighbour never counts against a sample, whatever the unit. d is at least
    e / 10^6.

    Args:
        generated: Samples g_i (M, ...).
        radius: e: see :func:`monte_carlo_radius`.
        variant: Whether neighbours are counted or weighted by their distance.
        project: Where distances are measured.
    """
    points = project(generated)

    def score(x: Tensor, y: Tensor) -> Tensor:
        found = []
        for block in project(x).split(BLOCK):
            distances = torch.cdist(block, points)
            within = distances <= radius
            if variant == "log":
                ratio = max(radius, 1e-30) / distances.clamp_min(1e-6 * max(radius, 1e-30))
                found.append((within * (1 + ratio.clamp_min(1.0).log())).mean(1))
            else:
                found.append(within.to(points.dtype).mean(1))
        return torch.cat(found)

    return score


@checked(size="[1, inf)", repeats="[1, inf)", seed="[0, inf)")
def set_accuracy(inside: Tensor, outside: Tensor, *, size: int, repeats: int = 1000, seed: int = 0) -> float:
    """Return how often the sum of the scores of a set of members exceeds that of a set of non-members; .5 at best.

    Equal sums count half. Whether a whole set was used is easier to tell than for one sample. Hilprecht et al. 2019
    (set membership).

    Args:
        inside: Scores (M,) of members.
        outside: Scores (N,) of non-members.
        size: Samples in each set, drawn without replacement; at most M and N of them.
        repeats: Pairs of sets.
        seed: Seed of their choice.

    Raises:
        ConfigurationError: If a side has no scores.
    """
    if not len(inside) or not len(outside):
        raise ConfigurationError(
            message("both sets must have samples", received=f"{len(inside)}, {len(outside)}", fix="give some of both")
        )
    generator = make_generator(seed, "sets")

    def sums(scores: Tensor) -> Tensor:
        drawn = torch.rand(repeats, len(scores), generator=generator).argsort(1)[:, : min(size, len(scores))]
        return scores.double()[drawn].mean(1)

    first, second = sums(inside), sums(outside)
    return float(((first > second).double() + 0.5 * (first == second).double()).mean())


# ---------------------------------------------------------------------- generated samples and the population


def log_density(points: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the logarithm of a Gaussian kernel density estimate, (Q, d) -> (Q,).

    p(q) = mean_i N(q; p_i, h^2 S), S the covariance of the points, h = n^(-1 / (d + 4)) (Scott 1992).

    Args:
        points: (n, d), n >= 2.
    """
    points = points.double()
    count, dimension = points.shape
    covariance = torch.cov(points.T).reshape(dimension, dimension)
    ridge = RIDGE * float(covariance.diagonal().max().clamp_min(1e-12))
    bandwidth = covariance * count ** (-2 / (dimension + 4)) + ridge * torch.eye(dimension, dtype=points.dtype)
    factor = torch.linalg.cholesky(bandwidth)
    level = -factor.diagonal().log().sum() - 0.5 * dimension * math.log(2 * math.pi) - math.log(count)

    def whitened(rows: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
        return found

    centres = whitened(points)

    def density(queries: Tensor) -> Tensor:
        blocks = whitened(queries.double()).split(BLOCK)
        found = [(-0.5 * torch.cdist(block, centres).square()).logsumexp(1) + level for block in blocks]
        return torch.cat(found)

    return density


def density_ratio_score(generated: Tensor, reference: Tensor, *, components: int = 8) -> Score:
    """Return log p_G(x) - log p_R(x): where the generator puts more mass than the population does.

    Both densities are Gaussian kernel estimates (:func:`log_density`) in the principal components of the reference.
    van Breugel et al. 2023 (DOMIAS); they find it best where a generator overfits locally.

    Args:
        generated: Samples (M, ...), M >= 2.
        reference: Samples (R, ...) of the population that nobody trained on, R >= 2.
        components: Principal components d; kernel estimates fail in many dimensions.
    """
    project = principal_components(reference, number=components)
    of_generator, of_population = log_density(project(generated)), log_density(project(reference))

    def score(x: Tensor, y: Tensor) -> Tensor:
        points = project(x)
        return of_generator(points) - of_population(points)

    return score


# ---------------------------------------------------------------------- white box: the discriminator


def logit_score(discriminator: nn.Module) -> Score:
    """Return a score that is high for what a discriminator takes for real: its mean logit. Hayes et al. 2019 (LOGAN).

    Args:
        discriminator: (x, y) -> logits, or (logits, class logits).
    """
    own = next(discriminator.parameters())

    def score(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(discriminator):
            logits = mean_logits(discriminator(x.to(own.device, own.dtype), y.to(own.device)))
        return logits.float().cpu()

    return score


class evaluating:  # noqa: N801 - used as a statement, like torch.no_grad
    """A context in which a network is in evaluation mode."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.mode = network, network.training

    def __enter__(self) -> None:
        self.network.eval()

    def __exit__(self, *error: object) -> None:
        self.network.train(self.mode)


def mean_logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return one logit per sample (N,) of a discriminator's output: logits of any shape, perhaps with class logits."""
    logits = output[0] if isinstance(output, tuple) else output
    return logits.reshape(len(logits), -1).mean(1)


# ---------------------------------------------------------------------- the server: updates of a client


@checked()
def update_score(
    discriminator: nn.Module,
    rounds: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    *,
    measure: Literal["product", "cosine"] = "cosine",
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Score:
    """Return how far a client's updates point to where a sample would have moved the discriminator.

    sum_t <u_t, -grad L(x; theta_t)>, or the sum of the cosines of the two. The server has every u_t and theta_t, unless
    updates are masked; run it on raw updates and on clipped and noised ones. Nasr et al. 2019 (a
    passive server); the score of Andrew et al. 2023 with a sample's gradient in the place of a canary.

    Args:
        discriminator: (x, y) -> logits, or (logits, class logits); a pass must not mix samples.
        rounds: By round, theta_t (parameters and buffers by name), and the update of the client's discriminator
            (parameters by name; those without one count as unmoved).
        measure: Inner product, or cosine.
        loss: Logits (N,) -> loss per sample (N,); default softplus(-logit), that of real samples.

    Raises:
        ConfigurationError: If there are no rounds, or an update moves none of the discriminator's parameters.
    """
    names = {name for name, _ in discriminator.named_parameters()}
    if not rounds or any(not names & update.keys() for _, update in rounds):
        raise ConfigurationError(
            message(
                "every round must have an update of the discriminator's parameters",
                received=f"{len(rounds)} rounds, {sorted({key for _, own in rounds for key in own})[:3]}",
                fix="take names as in discriminator.named_parameters()",
            )
        )
    term = loss if loss is not None else lambda logits: softplus(-logits)

    def score(x: Tensor, y: Tensor) -> Tensor:
        with evaluating(discriminator):
            found = [_towards(discriminator, *own, x=x, y=y, measure=measure, loss=term) for own in rounds]
        return torch.stack(found).sum(0)

    return score


def _towards(
    discriminator: nn.Module,
    state: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    *,
    x: Tensor,
    y: Tensor,
    measure: str,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the score (N,) of one round."""
    moved = {name for name, _ in discriminator.named_parameters()} & update.keys()
    parameters = {name: state[name].detach() for name in sorted(moved)}
    direction = {name: update[name].detach().to(parameters[name]) for name in parameters}
    fixed = {name: value.detach() for name, value in state.items() if name not in moved}

    def losses(own: Mapping[str, Tensor], samples: Tensor, labels: Tensor) -> Tensor:
        output = functional_call(discriminator, {**fixed, **own}, (samples, labels))
        return loss(mean_logits(output))

    x = x.to(next(iter(parameters.values())))
    # A derivative along the update: all samples in one pass, and no gradient of any of them.
    products: Tensor = -jvp(lambda own: losses(own, x, y), (parameters,), (direction,))[1]
    if measure == "product":
        return products.detach()

    def one(own: Mapping[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return losses(own, sample.unsqueeze(0), label.unsqueeze(0))[0]

    squares = []
    for samples, labels in zip(x.split(GRADIENTS), y.split(GRADIENTS)):
        gradients = vmap(grad(one), in_dims=(None, 0, 0))(parameters, samples, labels)
        squares.append(torch.stack([own.flatten(1).square().sum(1) for own in gradients.values()]).sum(0))
    length = torch.stack([own.square().sum() for own in direction.values()]).sum().sqrt()
    return (products / (torch.cat(squares).sqrt() * length).clamp_min(1e-30)).detach()
