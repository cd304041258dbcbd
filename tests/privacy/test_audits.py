"""Audits against closed forms, published values and mechanisms whose epsilon is known: no training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde, norm
from torch import nn
from torch.nn.functional import normalize, softplus

from fedgan_lightning.dp.audits import inversion, scores, statistics, views
from fedgan_lightning.dp.audits.inversion import batch_errors, invert
from fedgan_lightning.dp.audits.statistics import (
    advantage,
    canary_estimate,
    clopper_pearson,
    epsilon_from_rates,
    gaussian_epsilon,
    one_run_bound,
    one_run_guesses,
    tpr_at_fpr,
)
from fedgan_lightning.dp.audits.views import Protection
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.losses import NonSaturating, RelativisticPairing
from fedgan_lightning.networks import DCGANDiscriminator, MLPDiscriminator, MLPGenerator
from tests.conftest import digits_data


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return delta of one Gaussian of sensitivity over deviation mu (Balle and Wang 2018, theorem 8)."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


# ---------------------------------------------------------------------- rates


class TestRates:
    def test_the_interval_has_its_closed_form_at_the_ends(self):
        none, every = (clopper_pearson(successes=k, trials=20) for k in (0, 20))
        assert (none.lower, none.upper) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
        assert (every.lower, every.upper) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
        ten = clopper_pearson(successes=10, trials=100)  # Clopper and Pearson's own example: .049 to .176
        assert (ten.lower, ten.upper) == (pytest.approx(0.0490, abs=1e-4), pytest.approx(0.1762, abs=1e-4))
        with pytest.raises(ConfigurationError, match="at most trials.*5 of 4"):
            clopper_pearson(successes=5, trials=4)

    @given(st.integers(0, 30), st.integers(1, 30), st.floats(0.5, 0.99))
    def test_the_interval_holds_its_value_and_grows_with_confidence(self, successes, more, confidence):
        rate = clopper_pearson(successes=successes, trials=successes + more, confidence=confidence)
        wider = clopper_pearson(successes=successes, trials=successes + more, confidence=(1 + confidence) / 2)
        assert 0 <= wider.lower <= rate.lower <= rate.value <= rate.upper <= wider.upper <= 1

    def test_independent_others_give_about_the_rate_itself(self):
        found = [
            tpr_at_fpr(torch.randn(1000, generator=drawn(seed)), torch.randn(1000, generator=drawn(100 + seed)), fpr=f)
            for seed in range(40)
            for f in (0.1, 0.01)
        ]
        assert np.mean([own.tpr.value for own in found[::2]]) == pytest.approx(0.1, abs=0.01)
        assert np.mean([own.tpr.value for own in found[1::2]]) == pytest.approx(0.01, abs=0.003)
        covered = [own.fpr.lower <= rate <= own.fpr.upper for own, rate in zip(found, [0.1, 0.01] * 40)]
        assert np.mean(covered) >= 0.9

    def test_perfect_memory_is_found_out_and_says_how_much(self):
        point = tpr_at_fpr(torch.ones(100), torch.zeros(100), fpr=0.01)
        assert (point.tpr.value, point.fpr.value) == (1.0, 0.0)
        assert advantage(torch.ones(100), torch.zeros(100)) == 1.0

    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=60),
        st.lists(st.integers(0, 5), min_size=1, max_size=60),
        st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5]),
    )
    def test_ties_count_for_nobody(self, inside, outside, fpr):
        inside, outside = torch.tensor(inside).float(), torch.tensor(outside).float()
        point = tpr_at_fpr(inside, outside, fpr=fpr)
        assert point.fpr.successes <= fpr * len(outside) + 1e-9
        assert point.tpr.successes == int((inside > point.threshold).sum())
        true, false = ((s[:, None] > torch.arange(-1, 6)).double().mean(0) for s in (inside, outside))
        assert advantage(inside, outside) == pytest.approx(max(0.0, float((true - false).max())))

    def test_few_others_allow_no_false_positive(self):
        """With 50 of them .1 % is none, whatever is asked: the interval says that it may be up to 7 %."""
        outside = torch.arange(50.0)
        point = tpr_at_fpr(torch.tensor([48.5, 49.0, 49.5, 60.0]), outside, fpr=0.001)
        assert (point.tpr.successes, point.fpr.successes, point.threshold) == (2, 0, 49.0)
        assert point.fpr.upper == pytest.approx(1 - 0.025 ** (1 / 50))
        assert tpr_at_fpr(outside, outside, fpr=0.02).fpr.successes == 1

    def test_what_is_no_score_is_refused(self):
        for inside, outside, said in (
            (torch.ones(0), torch.ones(3), "members and non-members.*0 and 3"),
            (torch.tensor([math.nan]), torch.ones(3), "numbers.*NaN"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                tpr_at_fpr(inside, outside, fpr=0.1)
            with pytest.raises(ConfigurationError, match=said):
                advantage(inside, outside)
        with pytest.raises(ConfigurationError, match=r"\[0, 1\).*1"):
            tpr_at_fpr(torch.ones(1), torch.ones(1), fpr=1.0)

    @pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
    def test_a_bound_from_rates_lies_below_the_truth(self, z):
        """Telling N(1, z^2) from N(0, z^2) at a threshold fixed beforehand."""
        truth = statistics.gaussian_epsilon(mean=1.0, deviation=z, null_deviation=z, delta=1e-5)
        found = []
        for seed in range(5):
            inside, outside = (z * torch.randn(4000, generator=drawn(2 * seed + n)) + 1 - n for n in (0, 1))
            rates = [
                clopper_pearson(successes=int((own > 1.0).sum()), trials=len(own), confidence=0.95)
                for own in (inside, outside)
            ]
            found.append(epsilon_from_rates(tpr=rates[0], fpr=rates[1], delta=1e-5))
        assert 0.1 * truth < min(found)
        assert max(found) < truth

    def test_rates_that_say_nothing_give_no_bound(self):
        half = clopper_pearson(successes=50, trials=100)
        assert epsilon_from_rates(tpr=half, fpr=half, delta=1e-5) == 0.0
        all_of_them, none = (clopper_pearson(successes=k, trials=100) for k in (100, 0))
        low = 0.025**0.01
        assert epsilon_from_rates(tpr=all_of_them, fpr=none, delta=0.0) == pytest.approx(math.log(low / (1 - low)))


# ---------------------------------------------------------------------- one run


#: (m, r, v, delta) -> bound at p = .05: privacy.md, section 4; the first two are those of Steinke et al. 2023.
ONE_RUN = [
    (1000, 100, 75, 1e-4, 0.673),
    (100_000, 1510, 1439, 1e-5, 2.676),
    (200, 40, 40, 1e-5, 2.548),
    (200, 40, 30, 1e-5, 0.458),
    (100, 40, 40, 1e-5, 2.551),
    (50, 20, 20, 1e-5, 1.821),
    (1000, 200, 200, 1e-5, 4.167),
    (1000, 100, 50, 1e-5, 0.0),
]


class TestOneRun:
    @pytest.mark.parametrize("m, r, v, delta, expected", ONE_RUN)
    def test_published_values(self, m, r, v, delta, expected):
        bound = one_run_bound(num_canaries=m, guesses=r, right=v, delta=delta)
        assert bound == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("r", [1, 20, 100])
    def test_all_right_without_delta_is_a_closed_form(self, r):
        a = 0.05 ** (1 / r)
        expected = max(0.0, math.log(a / (1 - a)))
        assert one_run_bound(num_canaries=500, guesses=r, right=r, delta=0.0) == pytest.approx(expected, abs=1e-9)
        assert r != 100 or expected == pytest.approx(3.49, abs=0.005)

    @given(st.integers(1, 60), st.integers(0, 60), st.floats(0, 1e-3), st.integers(0, 300))
    def test_the_delta_term_lowers_the_bound_and_right_guesses_raise_it(self, r, v, delta, more):
        v = min(v, r)
        bound = one_run_bound(num_canaries=r + more, guesses=r, right=v, delta=delta)
        assert bound <= one_run_bound(num_canaries=r + more, guesses=r, right=v, delta=0.0) + 1e-9
        if v < r:
            assert bound <= one_run_bound(num_canaries=r + more, guesses=r, right=v + 1, delta=delta) + 1e-9
        assert bound <= one_run_bound(num_canaries=r + more, guesses=r, right=v, delta=delta, p=0.1) + 1e-9

    def test_forgetting_the_delta_term_would_say_too_much(self):
        """What many copies of the published code leave out."""
        wrong = one_run_bound(num_canaries=1000, guesses=100, right=75, delta=0.0)
        assert wrong > 0.673 + 0.01

    def test_counts_that_cannot_be_are_refused(self):
        for counts in ((10, 11, 5), (10, 5, 6)):
            with pytest.raises(ConfigurationError, match="right <= guesses <= num_canaries"):
                one_run_bound(num_canaries=counts[0], guesses=counts[1], right=counts[2], delta=0.0)

    def test_guesses_abstain_on_the_middle(self):
        scores_, coins = torch.tensor([5.0, 4, 3, 2, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
        found = one_run_guesses(scores_, coins, guesses=3)  # in: 5, 4; out: 0
        assert (found.num_canaries, found.guesses, found.right) == (6, 3, 2)
        assert one_run_guesses(scores_, coins, guesses=6).right == 2
        for wrong in ((scores_[:3], coins, 2), (scores_, coins, 7)):
            with pytest.raises(ConfigurationError, match="at most m guesses"):
                one_run_guesses(wrong[0], wrong[1], guesses=wrong[2])

    def test_equal_scores_are_not_told_apart_by_their_position(self):
        coins = torch.arange(1000) < 500  # those that are in stand first
        right = one_run_guesses(torch.zeros(1000), coins, guesses=400).right
        assert abs(right - 200) < 40
        assert one_run_guesses(torch.zeros(1000), coins, guesses=400, seed=1).right != right

    @pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
    def test_the_bound_of_a_bare_gaussian_mechanism_lies_below_the_truth(self, z):
        """Orthogonal canaries of length 1 and N(0, z^2): the score of each is its coin plus noise."""
        truth = gaussian_epsilon(mean=1.0, deviation=z, null_deviation=z, delta=1e-5)
        found = []
        for seed in range(5):
            generator = drawn(seed)
            coins = torch.rand(2000, generator=generator) < 0.5
            seen = coins.double() + z * torch.randn(2000, generator=generator, dtype=torch.float64)
            guesses = one_run_guesses(seen, coins, guesses=200)
            found.append(one_run_bound(**vars(guesses), delta=1e-5))
        assert max(found) < truth
        assert min(found) > {0.5: 2.0, 1.0: 1.0, 2.0: 0.2}[z], "an audit that always says 0 is of no use"


# ---------------------------------------------------------------------- canaries


def canary_cosines(*, z: float, count: int, dimension: int, seed: int) -> torch.Tensor:
    """Return cosines of canaries and the release: their sum, and N(0, z^2)."""
    generator = drawn(seed)
    canaries = normalize(torch.randn(count, dimension, generator=generator), dim=1)
    released = canaries.sum(0) + z * torch.randn(dimension, generator=generator)
    return canaries @ released / released.norm()


class TestCanaries:
    @pytest.mark.parametrize("z", [0.5, 1.0, 2.0, 4.0])
    def test_two_gaussians_of_equal_deviation_are_the_gaussian_mechanism(self, z):
        epsilon = gaussian_epsilon(mean=1.0, deviation=z, null_deviation=z, delta=1e-5)
        assert gaussian_delta(epsilon, 1 / z) == pytest.approx(1e-5, rel=1e-6)
        assert z != 1.0 or epsilon == pytest.approx(4.377178, abs=1e-6)

    @settings(max_examples=25)
    @given(st.floats(-3, 3), st.floats(0.3, 3))
    def test_the_epsilon_of_unequal_ones_is_what_integration_gives(self, mean, ratio):
        epsilon = gaussian_epsilon(mean=mean, deviation=ratio, null_deviation=1.0, delta=1e-3)
        x = np.linspace(-40, 40, 400_001)
        p, q = norm.pdf(x, mean, ratio), norm.pdf(x)
        deltas = [
            np.maximum(one - math.exp(epsilon) * other, 0).sum() * (x[1] - x[0]) for one, other in ((p, q), (q, p))
        ]
        assert max(deltas) <= 1e-3 + 1e-6
        assert epsilon == 0 or max(deltas) == pytest.approx(1e-3, abs=2e-5)

    @pytest.mark.parametrize(("z", "truth"), [(0.5, 9.997), (1.0, 4.377)])
    def test_a_thousand_canaries_estimate_epsilon(self, z, truth):
        found = [
            canary_estimate(canary_cosines(z=z, count=1000, dimension=10_000, seed=seed), dimension=10_000, delta=1e-5)
            for seed in range(3)
        ]
        assert np.mean(found) == pytest.approx(truth, rel=0.15)

    def test_canaries_that_were_not_in_estimate_next_to_nothing(self):
        null = torch.randn(1000, generator=drawn(0)) / 100
        assert canary_estimate(null, dimension=10_000, delta=1e-5) < 0.5
        with pytest.raises(ConfigurationError, match="at least two"):
            canary_estimate(null[:1], dimension=10_000, delta=1e-5)


# ---------------------------------------------------------------------- scores


class TestScores:
    def test_copies_score_highest_by_every_black_box(self):
        generator = drawn(0)
        generated, others, reference = torch.randn(3, 300, 6, generator=generator)
        members, radius = generated[:100], scores.monte_carlo_radius(torch.cat([generated[:100], others]), generated)
        for name, score in {
            "distance": scores.distance_score(generated),
            "calibrated": scores.calibrated_score(generated, reference),
            "count": scores.monte_carlo_score(generated, radius=radius / 4),
            "log": scores.monte_carlo_score(generated, radius=radius / 4, variant="log"),
            "density": scores.density_ratio_score(generated, reference, components=6),
        }.items():
            inside, outside = (score(own, torch.zeros(len(own))) for own in (members, others))
            assert inside.shape == (100,), name
            assert advantage(inside, outside) > 0.35, name

    def test_monte_carlo_counts_and_weighs_neighbours(self):
        generated = torch.tensor([[0.0], [0.5], [3.0], [9.0]])
        x, y = torch.tensor([[0.0], [3.5], [20.0]]), torch.zeros(3)
        count = scores.monte_carlo_score(generated, radius=1.0)(x, y)
        assert count.tolist() == [0.5, 0.25, 0.0]
        log = scores.monte_carlo_score(generated, radius=1.0, variant="log")(x, y)
        assert log[1] == pytest.approx((1 + math.log(2)) / 4)
        assert log[0] == pytest.approx((1 + math.log(1e6) + 1 + math.log(2)) / 4, rel=1e-5)
        assert log[2] == 0
        assert scores.monte_carlo_radius(x, generated) == 0.5  # of 0, .5 and 11
        zero = scores.monte_carlo_score(generated, radius=0.0, variant="log")(x, y)
        assert zero[0] > zero[1] == 0, "where most candidates are copies"

    def test_principal_components_keep_what_varies(self):
        x = torch.randn(50, 1, generator=drawn(0)) @ torch.tensor([[3.0, 4.0]]) + 7
        points = scores.principal_components(x, number=1)(x)
        assert points.shape == (50, 1)
        torch.testing.assert_close(torch.cdist(points, points), torch.cdist(x.double(), x.double()), atol=1e-5, rtol=0)
        assert torch.equal(scores.principal_components(x, number=None)(x), x)

    def test_the_density_is_that_of_scipy(self):
        points = (
            torch.randn(200, 3, generator=drawn(1), dtype=torch.float64)
            @ torch.diag(torch.tensor([1.0, 5, 0.2])).double()
        )
        queries = torch.randn(20, 3, generator=drawn(2), dtype=torch.float64)
        theirs = gaussian_kde(points.numpy().T, bw_method="scott").logpdf(queries.numpy().T)
        np.testing.assert_allclose(scores.log_density(points)(queries).numpy(), theirs, rtol=5e-3)

    def test_a_set_is_told_more_easily_than_a_sample(self):
        inside, outside = torch.randn(400, generator=drawn(0)) + 0.3, torch.randn(400, generator=drawn(1))
        one, many = (scores.set_accuracy(inside, outside, size=size) for size in (1, 50))
        assert 0.5 < one < 0.7
        assert many > 0.9
        assert scores.set_accuracy(outside, outside, size=50) == pytest.approx(0.5, abs=0.05)
        assert scores.set_accuracy(torch.ones(5), torch.ones(5), size=2) == 0.5

    @pytest.mark.parametrize("measure", ["product", "cosine"])
    @pytest.mark.parametrize("conditioning", ["none", "projection"])
    def test_updates_are_compared_with_gradients_sample_by_sample(self, measure, conditioning):
        torch.manual_seed(0)
        discriminator = MLPDiscriminator(
            (4,), hidden=(8,), num_classes=3 * (conditioning != "none"), conditioning=conditioning
        )
        discriminator.double()
        x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
        parameters = dict(discriminator.named_parameters())
        rounds = [
            (
                {n: own.detach() for n, own in parameters.items()},
                {n: torch.randn_like(own) for n, own in parameters.items()},
            )
            for _ in range(2)
        ]
        found = scores.update_score(discriminator, rounds, measure=measure)(x, y)
        for place in range(20):
            loss = softplus(-discriminator(x[place : place + 1], y[place : place + 1])).sum()
            own = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
            expected = 0.0
            for _, update in rounds:
                flat = torch.cat([update[n].flatten() for n in parameters])
                product = -float(own @ flat)
                expected += product if measure == "product" else product / float(own.norm() * flat.norm())
            assert float(found[place]) == pytest.approx(expected, rel=1e-9)

    def test_the_server_tells_members_from_raw_updates_and_not_from_noised_ones(self):
        torch.manual_seed(0)
        discriminator, data = MLPDiscriminator((1, 8, 8), hidden=(64,)), digits_data()
        x, y = data.train_samples.take(torch.arange(160))
        members, others = (x[:80], y[:80]), (x[80:], y[80:])
        state = {name: own.detach().clone() for name, own in discriminator.named_parameters()}
        gradient = torch.autograd.grad(softplus(-discriminator(*members)).mean(), list(discriminator.parameters()))
        raw = {name: -own for name, own in zip(state, gradient)}
        noised = views.noised(views.clipped(raw, clip=1.0), deviation=1.0, generator=drawn(0))
        found = {}
        for name, update in (("raw", raw), ("noised", noised)):
            score = scores.update_score(discriminator, [(state, update)])
            found[name] = advantage(score(*members), score(*others))
        assert found["raw"] > found["noised"]
        with pytest.raises(ConfigurationError, match="every round must have an update.*0 rounds"):
            scores.update_score(discriminator, [])
        with pytest.raises(ConfigurationError, match="1 rounds.*generator"):
            scores.update_score(discriminator, [(state, {"generator.w": torch.zeros(1)})])


# ---------------------------------------------------------------------- inversion


def digits_step(*, conditioning: str = "projection", slope: float = 0.2, dtype=torch.float32, count: int = 32):
    torch.manual_seed(0)
    classes = 10 * (conditioning != "none")
    discriminator = MLPDiscriminator(
        (1, 8, 8), hidden=(256, 256), num_classes=classes, conditioning=conditioning, slope=slope
    )
    generator = MLPGenerator(32, (1, 8, 8), hidden=(256, 256), num_classes=10)
    x, y = digits_data().train_samples.take(torch.arange(count) * 40)
    y_fake = torch.randint(10, (count,))
    with torch.no_grad():
        fake = generator(torch.randn(count, 32), y_fake)
    return discriminator.to(dtype), x.to(dtype), y, (fake.to(dtype), y_fake)


class TestInversion:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("conditioning", ["none", "projection"])
    def test_a_raw_update_is_the_sample_and_protected_ones_are_not(self, dtype, conditioning):
        step = digits_step(dtype=dtype, conditioning=conditioning)
        found = invert(*step, protection=Protection(clip=0.5, noise_multiplier=1.0))
        errors, cosines, labels = found.relative_errors(), found.cosines(), found.label_accuracies()
        assert errors["raw"] < (1e-6 if dtype == torch.float32 else 1e-14)
        assert errors["clipped"] < (1e-6 if dtype == torch.float32 else 1e-13), "a clip alone hides nothing"
        assert abs(cosines["noised"]) < 0.2
        assert abs(cosines["masked"]) < 0.2
        if conditioning == "projection":
            assert labels["raw"] == labels["clipped"] == 1.0
            assert max(labels["noised"], labels["masked"]) < 0.4
        else:
            assert labels == {}

    def test_less_noise_shows_more(self):
        step = digits_step()
        found = [
            invert(*step, protection=Protection(noise_multiplier=z)).cosines()["noised"]
            for z in (0.0, 1e-3, 0.01, 0.1, 1.0)
        ]
        assert found[0] == pytest.approx(1.0, abs=1e-6)
        assert found[1] > 0.99
        assert 0.6 < found[2] < 0.95
        assert max(map(abs, found[3:])) < 0.2

    def test_the_seed_of_noise_and_masks_changes_them(self):
        step = digits_step(count=2)
        found = [invert(*step, protection=Protection(seed=seed)).found for seed in (0, 0, 1)]
        for view in ("noised", "masked"):
            assert torch.equal(found[0][view], found[1][view])
            assert not torch.equal(found[0][view], found[2][view])

    def test_large_minibatches_show_less_unless_layers_are_sparse(self):
        leaky, sparse = (batch_errors(*digits_step(slope=slope)) for slope in (0.2, 0.0))
        assert leaky[1] < 1e-6 < leaky[2] < 0.05 < leaky[32]
        assert max(sparse.values()) < 1e-6, "with ReLU some row sees one sample alone"
        assert list(batch_errors(*digits_step(count=5))) == [1, 2, 4]

    def test_a_masked_update_does_not_depend_on_the_update(self):
        first, second = ({"w": torch.full((1000,), value)} for value in (0.0, 3.0))
        shown = [views.masked(own, max_update=4.0, generator=drawn(0))["w"] for own in (first, second)]
        for own in shown:  # uniform in [-8, 8)
            assert float(own.abs().max()) <= 8
            assert float(own.mean()) == pytest.approx(0, abs=0.5)
            assert float(own.std()) == pytest.approx(16 / math.sqrt(12), rel=0.05)
        # the same mask: what is left of the difference, modulo the ring
        difference = (shown[1].double() - shown[0].double()) % 16
        assert float((difference - 3.0).abs().max()) < 1e-5

    def test_a_clip_shortens_and_keeps_the_direction(self):
        update = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        assert views.clipped(update, clip=1.0)["b"] == pytest.approx(0.8)
        assert views.clipped(update, clip=9.0) == update
        assert views.clipped({"a": torch.zeros(1)}, clip=1.0)["a"] == 0

    @pytest.mark.parametrize("size", [1, 4, 32])
    def test_moved_rows_are_the_labels(self, size):
        discriminator, x, y, fake = digits_step()
        real, made = (x[:size], y[:size]), (fake[0][:size], fake[1][:size])
        gradient = inversion.discriminator_gradient(discriminator, real, made)
        of_fakes = inversion.discriminator_gradient(discriminator, real, made, of_fake_only=True)
        rest = inversion.without_fakes(gradient, of_fakes)
        embedding = inversion.embedding_of(discriminator)
        assert inversion.moved_rows(rest, embedding=embedding).tolist() == y[:size].unique().tolist()
        both = torch.cat([y[:size], fake[1][:size]]).unique().tolist()
        assert inversion.moved_rows(gradient, embedding=embedding).tolist() == both

    @settings(max_examples=15)
    @given(st.floats(0.01, 1.0), st.integers(1, 3))
    def test_the_factor_of_a_clip_is_found(self, factor, size):
        discriminator, x, y, fake = digits_step(dtype=torch.float64, count=3)
        real, made = (x[:size], y[:size]), (fake[0][:size], fake[1][:size])
        gradient = inversion.discriminator_gradient(discriminator, real, made)
        of_fakes = inversion.discriminator_gradient(discriminator, real, made, of_fake_only=True)
        short = {name: factor * own for name, own in gradient.items()}
        assert inversion.clip_factor(short, of_fakes, layer="features.1") == pytest.approx(factor, rel=1e-6)

    def test_a_loss_that_pairs_leaves_a_mixture(self):
        step, loss = digits_step(), RelativisticPairing()
        paired = invert(*step, loss=loss.discriminator, pairs=True)
        assert paired.relative_errors()["raw"] > 0.01
        plain = invert(*step, loss=NonSaturating().discriminator)
        assert plain.relative_errors()["raw"] < 1e-6

    def test_only_a_linear_layer_on_the_samples_can_be_inverted(self):
        x, y = torch.randn(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
        with pytest.raises(ConfigurationError, match="begins with a linear layer.*DCGANDiscriminator"):
            invert(DCGANDiscriminator(28, 1, width=4), x, y, (x, y))

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = MLPDiscriminator((4,), hidden=(8,))

            def forward(self, x, y):
                return self.inner(2 * x, y)

        assert inversion.first_linear(Scaled(), torch.randn(3, 4), torch.zeros(3)) is None
        assert (
            inversion.first_linear(MLPDiscriminator((4,), hidden=(8,)), torch.randn(3, 4), torch.zeros(3))
            == "features.1"
        )

    def test_a_protection_has_ranges(self):
        for given_, said in (
            ({"clip": 0.0}, "above 0"),
            ({"noise_multiplier": -1.0}, "at least 0"),
            ({"seed": -1}, "0"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                Protection(**given_)
