"""Losses and penalties against closed forms, and the flow of gradients through all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedgan_lightning.gan import objectives, penalties

LOSSES = [
    objectives.Minimax(),
    objectives.NonSaturating(),
    objectives.LeastSquares(),
    objectives.Wasserstein(),
    objectives.Hinge(),
    objectives.RelativisticPairing(),
]
PENALTIES = [penalties.R1(2.0), penalties.R2(2.0), penalties.GradientPenalty(10.0)]


def sp(value: float) -> float:
    return math.log1p(math.exp(value))


def test_all_losses_are_covered():
    assert {type(loss) for loss in LOSSES} == set(objectives.AdversarialLoss.__subclasses__())
    assert {type(penalty) for penalty in PENALTIES} == set(penalties.Penalty.__subclasses__())


@pytest.mark.parametrize(
    "loss, discriminator, generator",
    [
        (objectives.Minimax(), sp(-2.0) + sp(-1.0), -sp(-1.0)),
        (objectives.NonSaturating(), sp(-2.0) + sp(-1.0), sp(1.0)),
        (objectives.LeastSquares(), 0.5 * 1.0 + 0.5 * 1.0, 0.5 * 4.0),
        (objectives.Wasserstein(), -3.0, 1.0),
        (objectives.Hinge(), 0.0, 1.0),
        (objectives.RelativisticPairing(), sp(-3.0), sp(3.0)),
    ],
    ids=repr,
)
def test_closed_forms_at_real_2_and_fake_minus_1(loss, discriminator, generator):
    real, fake = torch.full((4, 1), 2.0, dtype=torch.float64), torch.full((4, 1), -1.0, dtype=torch.float64)
    assert float(loss.discriminator(real, fake)) == pytest.approx(discriminator, abs=1e-12)
    assert float(loss.generator(fake, real)) == pytest.approx(generator, abs=1e-12)


def test_minimax_is_the_orders_objective():
    real, fake = torch.randn(50, 1).double(), torch.randn(50, 1).double()
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    value = d_real.log().mean() + (1 - d_fake).log().mean()
    torch.testing.assert_close(objectives.Minimax().discriminator(real, fake), -value)
    torch.testing.assert_close(objectives.Minimax().generator(fake), (1 - d_fake).log().mean())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 4, 4)])
def test_logits_of_any_shape_give_finite_scalars_even_when_huge(loss, shape):
    for size in (1.0, 1e4):
        real, fake = size * torch.randn(shape), size * torch.randn(shape)
        for value in (loss.discriminator(real, fake), loss.generator(fake, real)):
            assert value.shape == ()
            assert torch.isfinite(value)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_reach_both_sides_with_the_right_sign(loss):
    real, fake = (torch.full((4, 1), 0.5, requires_grad=True) for _ in range(2))
    loss.discriminator(real, fake).backward()
    assert (real.grad < 0).all(), "the discriminator raises real logits"
    assert (fake.grad > 0).all(), "and lowers generated ones"
    fake.grad = None
    loss.generator(fake, real.detach()).backward()
    assert (fake.grad < 0).all(), "the generator raises generated logits"


def test_saturating_gradient_vanishes_where_the_discriminator_is_sure_and_non_saturating_does_not():
    gradients = {}
    for loss in (objectives.Minimax(), objectives.NonSaturating()):
        fake = torch.full((1, 1), -12.0, requires_grad=True)
        loss.generator(fake).backward()
        gradients[type(loss).__name__] = float(fake.grad.abs())
    assert gradients["Minimax"] < 1e-4
    assert gradients["NonSaturating"] > 0.99


def test_relativistic_generator_without_real_logits_says_so():
    with pytest.raises(ValueError, match="must have the real logits; got None"):
        objectives.RelativisticPairing().generator(torch.zeros(2, 1))


def linear_critic(weight: torch.Tensor):
    return lambda x: x.flatten(1) @ weight


@pytest.mark.parametrize(
    "penalty, expected",
    [(penalties.R1(2.0), 25.0), (penalties.R2(2.0), 25.0), (penalties.GradientPenalty(10.0), 10.0 * 16.0)],
    ids=lambda value: type(value).__name__,
)
def test_penalties_of_a_linear_critic(penalty, expected):
    """For D(x) = <w, x>, ||grad|| = ||w|| = 5 everywhere: gamma/2 * 25 with gamma = 2, and 10 * (5 - 1)^2."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    x, fake = torch.randn(7, 2).double(), torch.randn(7, 2).double()
    value = penalty(linear_critic(weight), x, fake, torch.rand(7).double())
    assert float(value) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda value: type(value).__name__)
def test_penalties_have_gradients_in_the_critic_and_none_in_the_samples(penalty):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x, fake = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    penalty(net, x, fake, torch.rand(5)).backward()
    assert net[0].weight.grad.abs().sum() > 0
    assert fake.grad is None


def test_a_zero_gradient_gives_no_nan():
    critic = nn.Linear(3, 1)
    nn.init.zeros_(critic.weight)
    penalties.GradientPenalty()(critic, torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)).backward()
    assert torch.isfinite(critic.weight.grad).all()


def test_lazy_penalties_are_rarer_and_stronger_by_the_same_factor():
    lazy, x = penalties.R1(2.0, interval=4), torch.randn(6, 2).double()
    critic = linear_critic(torch.tensor([3.0, 4.0]).double())
    assert [step for step in range(9) if lazy.is_due(step)] == [0, 4, 8]
    assert float(lazy(critic, x, x, None)) == pytest.approx(4 * 25.0)
    with pytest.raises(ValueError, match="interval of R1 .* at least 1; got 0"):
        penalties.R1(interval=0)


def test_auxiliary_classifier_is_cross_entropy():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert float(objectives.auxiliary_classifier(logits, torch.tensor([0, 1]))) == pytest.approx(math.log(2))
