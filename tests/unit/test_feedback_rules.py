"""Rules by which one gradient is made of many discriminators': coefficients, limits, and what each objective prefers.

Letters are those of the list of proofs in docs/methods.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from fedgan_lightning.algorithms import F2A, F2U, UAGAN, MeanDiscriminator
from fedgan_lightning.federation.feedback.ensemble import mean_logit, per_sample
from fedgan_lightning.losses import Minimax, NonSaturating

# ---------------------------------------------------------------------- 3(a), 3(e), 3(f), and section 4: rules


def random_logits(seed=0, clients=5, samples=32, scale=2.0):
    source = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(clients, samples, generator=source, dtype=torch.float64)
    shares = torch.rand(clients, samples, generator=source, dtype=torch.float64)
    return logits, (shares / shares.sum(0)).log()


def test_log_odds_are_the_log_of_odds():
    """3(a)."""
    logits, weights = random_logits()
    belief = logits.sigmoid()
    odds = (weights.exp() * belief / (1 - belief)).sum(0)
    torch.testing.assert_close(UAGAN().combined(logits, weights), odds.log(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("loss", [NonSaturating(), Minimax()])
def test_coefficients_are_those_of_the_table(loss):
    logits, weights = random_logits()
    count = logits.shape[1]

    def slope(h):
        return -torch.sigmoid(-h) if isinstance(loss, NonSaturating) else -torch.sigmoid(h)

    one = torch.logsumexp(logits + weights, 0)
    expected = slope(one) * torch.softmax(logits + weights, 0) / count
    torch.testing.assert_close(UAGAN().coefficients(loss, logits, weights), expected, atol=1e-13, rtol=1e-11)
    best = logits.argmax(0)
    expected = slope(logits.max(0).values) * torch.nn.functional.one_hot(best, 5).T / count
    torch.testing.assert_close(F2U().coefficients(loss, logits, weights), expected, atol=1e-13, rtol=1e-11)
    belief, pi = logits.sigmoid(), weights.exp()
    mean = (pi * belief).sum(0)
    expected = slope(torch.logit(mean)) * pi * belief * (1 - belief) / (mean * (1 - mean)) / count
    torch.testing.assert_close(
        MeanDiscriminator().coefficients(loss, logits, weights), expected, atol=1e-13, rtol=1e-10
    )


def test_the_most_forgiving_is_found_sample_by_sample():
    """Section 4: the argmax against a loop, and not once for the batch."""
    logits, weights = random_logits(scale=3.0)
    weights[2, ::2] = -torch.inf
    found = F2U().coefficients(NonSaturating(), logits, weights)
    for s in range(logits.shape[1]):
        heard = [i for i in range(5) if torch.isfinite(weights[i, s])]
        best = max(heard, key=lambda i: float(logits[i, s]))
        assert found[:, s].nonzero().flatten().tolist() == [best]
    assert len(set(found.abs().argmax(0).tolist())) > 1


def test_f2a_lies_between_the_mean_and_the_most_forgiving():
    """Section 4: lambda = 0 is the mean of discriminators, lambda -> inf is F2U; the slope in lambda is a variance."""
    logits, _ = random_logits()
    weights = torch.full_like(logits, -np.log(5.0))
    torch.testing.assert_close(F2A(sharpness=0.0).combined(logits, weights), mean_logit(logits, weights))
    far = F2A(sharpness=1e6).combined(logits, weights)
    torch.testing.assert_close(far, logits.max(0).values, atol=1e-9, rtol=1e-9)
    sharpness = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    value = F2A().combined(logits, weights, sharpness).sigmoid()
    (slope,) = torch.autograd.grad(value.sum(), sharpness)
    belief = logits.sigmoid()
    chosen = torch.softmax(1.3 * belief, 0)
    assert float(slope) == pytest.approx(float((chosen * belief * (belief - value.detach())).sum()), abs=1e-10)


def test_a_client_without_a_class_has_no_say_on_it():
    """3(f): pi_i(y) = 0 and l_i = +50 change nothing, under every rule."""
    logits, weights = random_logits()
    weights[1] = -torch.inf
    for rule in (UAGAN, F2U, F2A, MeanDiscriminator):
        before = rule().coefficients(NonSaturating(), logits, weights)
        loud = logits.clone()
        loud[1] = 50.0
        after = rule().coefficients(NonSaturating(), loud, weights)
        assert torch.equal(before, after)
        assert not bool(after[1].any())


def test_a_class_that_nobody_has_moves_nothing():
    logits, weights = random_logits()
    weights[:, 3] = -torch.inf
    for rule in (UAGAN, F2U, F2A, MeanDiscriminator):
        found = rule().coefficients(NonSaturating(), logits, weights)
        assert bool(torch.isfinite(found).all())
        assert not bool(found[:, 3].any())


def test_a_patch_discriminator_s_word_is_the_mean_over_patches():
    logits, gradients = torch.randn(3, 4, 4), torch.randn(3, 1, 8, 8)
    one, own = per_sample(logits, gradients, leading=1)
    torch.testing.assert_close(one, logits.flatten(1).mean(1))
    torch.testing.assert_close(own, gradients / 16)


# ---------------------------------------------------------------------- 0, 1(f), 3(d): what every objective prefers


def common_share(clients, objective, *, steps=4000):
    """Descend on a tabular q over a common and one private cell for every client, with optimal discriminators.

    D is held in every step, so that the gradient by q is the loss of its logit in every cell; mirror descent.
    """
    p = torch.zeros(clients, clients + 1, dtype=torch.float64)
    p[:, 0] = 0.5
    p[torch.arange(clients), torch.arange(clients) + 1] = 0.5
    weights = torch.full((clients, clients + 1), -np.log(clients), dtype=torch.float64)
    log_q = torch.full((clients + 1,), -np.log(clients + 1), dtype=torch.float64)
    for _ in range(steps):
        logits = (p.log() - log_q).clamp(min=-700.0)
        log_q = torch.log_softmax(log_q - 0.5 * objective(logits, weights), 0)
    return float(log_q[0].exp())


def saturating(logit):
    return -softplus(logit)


SIGNATURE = {
    2: (0.5, 0.5877, 0.3333, 0.75),
    3: (0.5, 0.6607, 0.25, 1.0),
    4: (0.5, 0.7223, 0.2, 1.0),
    5: (0.5, 0.7743, 0.1667, 1.0),
    10: (0.5, 0.9311, 0.0909, 1.0),
}
RULES = {
    "UA-GAN": lambda logits, weights: saturating(UAGAN().combined(logits, weights)),
    "mean of losses": lambda logits, weights: (weights.exp() * saturating(logits)).sum(0),
    "F2U": lambda logits, weights: saturating(F2U().combined(logits, weights)),
    "mean of discriminators": lambda logits, weights: saturating(MeanDiscriminator().combined(logits, weights)),
}


@pytest.mark.parametrize("clients", SIGNATURE)
@pytest.mark.parametrize("rule", RULES)
def test_the_share_of_the_common_cell_is_that_of_the_table(rule, clients):
    expected = SIGNATURE[clients][list(RULES).index(rule)]
    assert common_share(clients, RULES[rule]) == pytest.approx(expected, abs=1e-3)


def test_of_one_client_all_rules_have_the_same_coefficients():
    logits, zero = torch.linspace(-3, 3, 7, dtype=torch.float64)[None], torch.zeros(1, 7, dtype=torch.float64)
    found = [own().coefficients(NonSaturating(), logits, zero) for own in (UAGAN, F2U, F2A, MeanDiscriminator)]
    for other in found:
        torch.testing.assert_close(other, -torch.sigmoid(-logits) / 7, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", [UAGAN, F2U, F2A, MeanDiscriminator])
def test_copies_of_one_client_say_what_the_one_says(rule):
    """3(c)."""
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64).expand(5, 7)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64).log()[:, None].expand(5, 7)
    found = rule().coefficients(NonSaturating(), logits, weights).sum(0)
    torch.testing.assert_close(found, -torch.sigmoid(-logits[0]) / 7, atol=1e-12, rtol=1e-12)


def test_a_generator_that_is_bad_everywhere_still_learns():
    """Discriminators that are sure of fakes, at logits of -30: under every rule dL/dl is -1 in all."""
    logits = torch.tensor([[-30.0], [-31.0], [-30.5]], dtype=torch.float64)
    weights = torch.full((3, 1), -np.log(3.0), dtype=torch.float64)
    for rule in (UAGAN, F2U, F2A, MeanDiscriminator):
        assert float(rule().coefficients(NonSaturating(), logits, weights).sum()) == pytest.approx(-1.0, abs=1e-6)


def test_lambda_leaves_zero():
    logits, weights = random_logits()
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F2A().combined(logits, weights, sharpness).sum(), sharpness)
    assert float(slope) > 0
