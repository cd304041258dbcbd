"""Recommendation: the source of interactions, CFGAN's condition and networks, and the ranking metrics."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import GAN, FederatedDataModule, SequentialExecutor, ServerModule, VectorizedExecutor
from fedgan_lightning.callbacks import Recommendations
from fedgan_lightning.data.sources.interactions import most_popular
from fedgan_lightning.data.vocabulary import summed
from fedgan_lightning.errors import CheckpointError, ConfigurationError, DataError
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.evaluation.ranking import histories, preferences, ranked, ranking_values
from fedgan_lightning.losses import R1, NonSaturating
from fedgan_lightning.metrics import RankingQuality
from fedgan_lightning.networks import CFGANCondition, CFGANDiscriminator, CFGANGenerator
from fedgan_lightning.partitions import Natural
from fedgan_lightning.sources import Interactions
from tests.conftest import ROOT, adam, federate, quiet_trainer, ring_data, ring_gan, sgd
from tests.contracts.test_executors import assert_same, updates

DATA = ROOT / "tests" / "data"
CPU = torch.device("cpu")
ITEMS = 30


def source(**options) -> Interactions:
    options = {"num_items": ITEMS, "threshold": 3.0, "min_user": 5, "min_item": 3, **options}
    return Interactions(str(DATA / "ratings.csv"), **options)


def module(**options) -> FederatedDataModule:
    options = {"num_clients": 4, "batch_size": 8, **options}
    return FederatedDataModule(source(catalogue=str(DATA / "movies.csv")), **options)


def gan(items: int = ITEMS, **options) -> GAN:
    torch.manual_seed(0)
    options = {"generator_optimizer": adam, "discriminator_optimizer": adam, **options}
    pair = CFGANGenerator(items, hidden=(16,)), CFGANDiscriminator(items, hidden=(8,))
    return GAN(*pair, condition=CFGANCondition(items), **options)


def write(path, rows, header="userId,movieId,rating,timestamp"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def dense(users: int = 6, items: int = 8) -> list[tuple]:
    """Every user has every item; of user u, item i has time 10 u + i."""
    return [(user, item, 4.0, 10 * user + item) for user in range(users) for item in range(items)]


class TestSource:
    def test_a_sample_is_a_user_and_both_splits_hold_the_same_users_row_by_row(self):
        train, test = source().load("train"), source().load("test")
        assert train.x.shape == test.x.shape == (41, ITEMS)
        assert (train.columns["user"] == test.columns["user"]).all()
        assert set(train.x.unique().tolist()) == {0.0, 1.0}
        assert not bool((train.x * test.x).any()), "nothing is in both"
        everything = train.x + test.x
        assert int(everything.sum(1).min()) >= 5
        shares = test.x.sum(1) / everything.sum(1)
        assert float((shares - 0.2).abs().max()) < 0.1
        assert int(test.x.sum(1).min()) >= 1

    def test_vectors_are_the_file_s_ratings_of_at_least_the_threshold(self):
        own = source()
        joined = own.load("train").x + own.load("test").x
        with (DATA / "ratings.csv").open() as file:
            liked = {(row["userId"], row["movieId"]) for row in csv.DictReader(file) if float(row["rating"]) >= 3}
        for row, user in enumerate(own.users):
            expected = [float((user, item) in liked) for item in own.items]
            assert joined[row].tolist() == expected
        assert own.users == sorted(own.users, key=int)
        assert source(threshold=5.0, min_user=2, num_items=10).load("train").x.sum() < joined.sum() / 2

    def test_the_items_with_most_interactions_stay(self):
        few, many = source(num_items=10), source()
        counts = dict(zip(many.items, (many.load("train").x + many.load("test").x).sum(0).tolist()))
        assert set(few.items) <= set(many.items)
        assert min(counts[item] for item in few.items) + 1 >= max(
            counts[item] for item in set(many.items) - set(few.items)
        ), "users who left may have had one more"

    def test_filters_repeat_until_nobody_has_too_few(self, tmp_path):
        rows = dense(6, 5) + [(100, item, 4.0, 0) for item in range(2)] + [(0, 50, 4.0, 0), (100, 50, 4.0, 0)]
        path = write(tmp_path / "a.csv", rows)  # item 50 has two users until user 100 leaves
        assert Interactions(path, num_items=5, min_user=4, min_item=2).load("train").x.shape == (6, 5)
        with pytest.raises(DataError, match="6 items must have 2 interactions or more; got 5 such items"):
            Interactions(path, num_items=6, min_user=4, min_item=2).load("train")

    def test_the_items_are_what_clients_agree_on_and_a_later_run_starts_with(self, tmp_path):
        data = module()
        data.setup()
        found = data.train_samples.x
        names = data.state_dict()["items"]
        assert len(names) == ITEMS
        (tmp_path / "items.json").write_text(json.dumps(names))
        given = source(items=str(tmp_path / "items.json"))
        assert given.has_shared_metadata
        assert given.items == names
        assert torch.equal(given.load("train").x, found), "the same users, and the same held out"
        (tmp_path / "items.json").write_text(json.dumps(names[::-1]))
        turned = source(items=str(tmp_path / "items.json"))
        assert torch.equal((turned.load("train").x + turned.load("test").x).flip(1), found + data.test_samples.x)
        with pytest.raises(CheckpointError, match=r"a checkpoint must be used with the items that it was trained with"):
            FederatedDataModule(turned, num_clients=4, batch_size=8).load_state_dict({"items": names})

    def test_institutions_with_files_of_their_own_make_the_list_from_counts(self, tmp_path):
        """Of the item that the second does not have, its users have nothing; rare ones are told to nobody."""
        first = [*dense(6, 5), (0, 40, 4.0, 0), (1, 40, 4.0, 0)]
        second = [(user, item, 4.0, 0) for user in range(8) for item in (1, 2, 4, 30)]
        paths = [write(tmp_path / f"{k}.csv", rows) for k, rows in enumerate((first, second))]
        options = {"num_items": 6, "min_item": 3, "min_user": 3}
        told = [Interactions(path, **options).popularity() for path in paths]
        assert told == [dict.fromkeys("01234", 6), {"1": 8, "2": 8, "30": 8, "4": 8}]
        names = most_popular(summed(told), num_items=6)
        assert names == ["0", "1", "2", "3", "4", "30"]
        (tmp_path / "items.json").write_text(json.dumps(names))
        own = [Interactions(path, items=str(tmp_path / "items.json"), **options) for path in paths]
        joined = [one.load("train").x + one.load("test").x for one in own]
        assert joined[0].tolist() == [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]] * 6
        assert joined[1].tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]] * 8
        with pytest.raises(DataError, match="7 items must have counts; got 6 items"):
            most_popular(summed(told), num_items=7)

    @pytest.mark.parametrize(
        ("text", "received"),
        [
            ('{"a": 1}', "not a list of names"),
            ("[", "Expecting value"),
            ('["0", "0", "1"]', "3 names, 2 different"),
            ('["0", "1"]', "2 names, 2 different"),
        ],
    )
    def test_a_list_of_items_that_is_none_is_refused(self, text, received, tmp_path):
        (tmp_path / "items.json").write_text(text)
        with pytest.raises(DataError, match=rf"data.source.items .*; got .*{received}"):
            source(num_items=3, items=str(tmp_path / "items.json"))

    @given(seed=st.integers(0, 1000), fraction=st.sampled_from([0.05, 0.2, 0.5, 0.9]))
    @settings(max_examples=30, deadline=None)
    def test_every_user_s_share_is_held_out_by_the_order_of_its_keys(self, seed, fraction):
        """Against the definition, user by user."""
        draw = np.random.default_rng(seed)
        seen = draw.random((15, 12)) < 0.5
        pairs = np.array([(str(u), str(i)) for u, i in zip(*np.nonzero(seen))])
        times = draw.integers(0, 4, len(pairs)).astype(float)  # with ties
        own = Interactions("unread", num_items=12, holdout="latest", holdout_fraction=fraction)
        table = own._named(pairs, times, [str(item) for item in range(12)])
        for row in range(len(table.users)):
            mine = [k for k in range(len(pairs)) if table.rows[k] == row]
            mine.sort(key=lambda k: (-times[k], table.columns[k]))
            count = min(max(1, round(len(mine) * fraction)), len(mine) - 1)
            assert [bool(table.held[k]) for k in mine] == [place < count for place in range(len(mine))]

    def test_latest_holds_out_the_end_of_every_history(self, tmp_path):
        path = write(tmp_path / "a.csv", dense())
        own = Interactions(path, num_items=8, min_item=1, min_user=2, holdout="latest", holdout_fraction=0.25)
        assert own.load("test").x.tolist() == [[0.0] * 6 + [1.0] * 2] * 6

    def test_random_hold_out_depends_on_the_seed_and_not_on_the_order_of_the_file(self, tmp_path):
        rows = dense()
        paths = [write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", rows[::-1] + rows)]
        options = {"num_items": 8, "min_item": 1, "min_user": 2}
        first, second = (Interactions(path, **options).load("test").x for path in paths)
        assert torch.equal(first, second)
        assert not torch.equal(first, Interactions(paths[0], seed=1, **options).load("test").x)

    def test_other_files_are_read_by_column_names_and_without_ratings(self, tmp_path):
        rows = [(item, user) for user, item, *_ in dense()]
        path = write(tmp_path / "a.csv", rows, header="product,customer")
        own = Interactions(path, num_items=8, user="customer", item="product", rating=None, min_item=1, min_user=2)
        assert (own.load("train").x + own.load("test").x).min() == 1
        assert own.titles == own.items == [str(item) for item in range(8)]

    def test_natural_columns(self):
        data = module(partition=Natural("genre"))
        train = data.train_samples
        assert set(train.columns["genre"]) == {"Comedy", "Drama", "Horror", "War"}
        users = np.array([int(user) - 1 for user in train.columns["user"]])
        planted = np.array(["Comedy", "Drama", "Horror", "War"])[users % 4]
        assert (train.columns["genre"] == planted).mean() > 0.9, "each user has a taste"
        activity, counts = train.columns["activity"], train.x.sum(1).numpy()
        assert set(activity) == set(range(10))
        assert counts[activity == 9].min() >= counts[activity == 0].max()
        assert data.source.titles[0] == "Film 1, The (1960)"

    def test_a_client_may_be_a_single_user(self):
        data = module(partition=Natural("user"), num_clients=41, batch_size=1)
        data.setup()
        assert [data.num_examples(k) for k in range(41)] == [1] * 41
        (x, _), *_ = data.client_batches(7, first_step=0, num_steps=2)
        assert x.shape == (1, ITEMS)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"num_items": 0}, ConfigurationError, "num_items .* at least 1; got 0"),
            ({"min_user": 1}, ConfigurationError, "min_user .* at least 2; got 1"),
            ({"holdout_fraction": 1.0}, ConfigurationError, "holdout_fraction .* in .0, 1.; got 1.0"),
            ({"num_items": 41}, DataError, "41 items must have 3 interactions or more; got 40 such items"),
            ({"user": "customer"}, DataError, "must have the columns customer, .* got userId, .*customer is missing"),
            ({"rating": "movieId", "item": "rating", "threshold": 1e9}, DataError, "30 items must have"),
            (
                {"catalogue": "none.csv"},
                DataError,
                "data.source.catalogue must be a CSV file that can be read; got none.csv",
            ),
            ({"catalogue": str(DATA / "ratings.csv")}, DataError, "must have the columns movieId, title, genres"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, error, words):
        with pytest.raises(error, match=words):
            source(**options).load("train")

    def test_broken_numbers_and_strange_catalogues_are_named(self, tmp_path):
        path = write(tmp_path / "a.csv", [(1, 1, "good", 0)])
        with pytest.raises(
            DataError, match="every value of rating in .* must be a finite number.*; got .good. in line 2"
        ):
            Interactions(path, num_items=1).load("train")
        names = write(tmp_path / "c.csv", [("x", "Film", "War")], header="movieId,title,genres")
        with pytest.raises(DataError, match="the catalogue must name genres"):
            source(catalogue=names).load("train")
        sparse = write(tmp_path / "d.csv", [(user, user % 2, 4.0, 0) for user in range(9)])
        with pytest.raises(DataError, match="1 items must have 1 interactions or more; got 0"):
            Interactions(sparse, num_items=1, min_item=1, min_user=2).load("train")

    def test_the_real_file(self, shared):
        folder = shared / "movielens" / "ml-latest-small"
        own = Interactions(
            str(folder / "ratings.csv"), num_items=1800, threshold=3.0, catalogue=str(folder / "movies.csv")
        )
        train = own.load("train")
        assert train.x.shape == (697, 1800)
        assert int(train.x.sum() + own.load("test").x.sum()) == 66584
        assert "Toy Story (1995)" in own.titles
        assert len(set(train.columns["genre"])) >= 15


def drawn(condition: CFGANCondition, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    u = torch.rand(len(x), condition.num_random, generator=torch.Generator().manual_seed(seed))
    return condition.make(x, torch.zeros(len(x), dtype=torch.int64), u)


X = (torch.rand(64, ITEMS, generator=torch.Generator().manual_seed(1)) < 0.2).float()


class TestCondition:
    def test_masks_hold_items_that_were_not_bought_with_the_ratios_chance(self):
        x = X.repeat(40, 1)
        c = drawn(CFGANCondition(ITEMS, partial_masking=0.3, zero_reconstruction=0.8), x)
        assert c.shape == (len(x), 3, ITEMS)
        assert torch.equal(c[:, 0], x)
        assert not bool((c[:, 1:] * x[:, None]).any())
        for mask, ratio in ((c[:, 1], 0.3), (c[:, 2], 0.8)):
            assert set(mask.unique().tolist()) == {0.0, 1.0}
            assert float(mask[x == 0].mean()) == pytest.approx(ratio, abs=0.01)
        both = (c[:, 1] * c[:, 2])[x == 0].mean()
        assert float(both) == pytest.approx(0.24, abs=0.01), "drawn independently"

    def test_ratio_0_switches_a_part_off_and_u_1_draws_nothing(self):
        off = drawn(CFGANCondition(ITEMS, partial_masking=0, zero_reconstruction=0), X)
        assert not bool(off[:, 1:].any())
        assert CFGANCondition(ITEMS, zero_reconstruction=0).extra_losses(X, X, off) == {}
        full = CFGANCondition(ITEMS, partial_masking=1, zero_reconstruction=1)
        nothing = full.make(X, torch.zeros(64), torch.ones(64, 2 * ITEMS))
        assert not bool(nothing[:, 1:].any())
        assert torch.equal(drawn(full, X)[:, 1], 1 - X)

    def test_zero_reconstruction_in_closed_form(self):
        condition = CFGANCondition(4, alpha=0.5)
        x = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
        c = torch.stack([x, torch.zeros(2, 4), torch.tensor([[0, 1.0, 1, 0], [1.0, 0, 0, 0]])], dim=1)
        fake = torch.tensor([[0.9, 0.5, 0.25, 0.7], [0.1, 0.3, 0.2, 0.6]])
        found = condition.extra_losses(fake, x, c)
        expected = 0.5 * ((0.25 + 0.0625) + 0.01) / 2
        assert float(found["zero_reconstruction"]) == pytest.approx(expected)

    def test_it_maps_over_stacked_clients(self):
        condition = CFGANCondition(ITEMS)
        x, u = X.view(4, 16, ITEMS), torch.rand(4, 16, 2 * ITEMS)
        y = torch.zeros(4, 16)
        mapped = torch.vmap(condition.make)(x, y, u)
        alone = torch.stack([condition.make(*own) for own in zip(x, y, u)])
        torch.testing.assert_close(mapped, alone, rtol=0, atol=0)
        fake = torch.rand(4, 16, ITEMS)
        terms = torch.vmap(condition.extra_losses)(fake, x, mapped)["zero_reconstruction"]
        for own, *arguments in zip(terms, fake, x, mapped):
            torch.testing.assert_close(own, condition.extra_losses(*arguments)["zero_reconstruction"])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"partial_masking": 1.5}, "partial_masking .* in .0, 1.; got 1.5"),
            ({"zero_reconstruction": -0.1}, "zero_reconstruction .* in .0, 1.; got -0.1"),
            ({"alpha": -1.0}, "alpha .* at least 0; got -1.0"),
        ],
    )
    def test_bad_numbers(self, options, words):
        with pytest.raises(ConfigurationError, match=words):
            CFGANCondition(ITEMS, **options)

    def test_another_number_of_items_is_refused_before_training(self):
        for own in (CFGANCondition(29), CFGANCondition(31)):
            model = gan()
            model.condition = own
            with pytest.raises(ConfigurationError, match="number of items of the data; got samples of 30 items"):
                model.check_data((ITEMS,), 0)
        model = gan(12)
        model.condition = CFGANCondition(ITEMS)
        with pytest.raises(ConfigurationError, match="the generator accepts latents .* and conditions"):
            model.check_data((ITEMS,), 0)


def gradients(network) -> dict[str, float]:
    return {name: float(p.grad.abs().sum()) if p.grad is not None else 0.0 for name, p in network.named_parameters()}


class TestNetworks:
    def test_shapes_and_range(self):
        generator, discriminator = CFGANGenerator(ITEMS, hidden=(9, 7)), CFGANDiscriminator(ITEMS, hidden=(5,))
        c = drawn(CFGANCondition(ITEMS), X)
        wanted = generator(torch.zeros(64, 0), c)
        assert wanted.shape == (64, ITEMS)
        assert bool(((wanted > 0) & (wanted < 1)).all())
        assert discriminator(wanted, c).shape == (64, 1)
        assert (generator.latent_dim, generator.sample_shape, generator.num_classes) == (0, (ITEMS,), 0)
        assert [layer.out_features for layer in generator.layers[::2]] == [9, 7, ITEMS]

    def test_noise_changes_the_answer_where_there_is_some(self):
        generator = CFGANGenerator(ITEMS, latent_dim=3)
        c = drawn(CFGANCondition(ITEMS), X)
        assert not torch.equal(generator(torch.zeros(64, 3), c), generator(torch.ones(64, 3), c))

    def test_the_discriminator_sees_bought_and_masked_items_only(self):
        discriminator = CFGANDiscriminator(ITEMS)
        c = drawn(CFGANCondition(ITEMS, partial_masking=0.5), X)
        x = torch.rand(64, ITEMS, requires_grad=True)
        (seen,) = torch.autograd.grad(discriminator(x, c).sum(), x)
        visible = c[:, 0] + c[:, 1]
        assert bool((seen[visible == 0] == 0).all())
        assert bool((seen[visible == 1] != 0).all())

    @pytest.mark.parametrize("alpha", [0.0, 0.1])
    def test_the_adversarial_term_reaches_every_parameter_of_the_generator(self, alpha):
        torch.manual_seed(0)
        generator, discriminator = CFGANGenerator(ITEMS, hidden=(16,)), CFGANDiscriminator(ITEMS, hidden=(8,))
        condition = CFGANCondition(ITEMS, alpha=alpha)
        c = drawn(condition, X)
        fake = generator(torch.zeros(64, 0), c)
        terms = condition.extra_losses(fake, X, c)
        assert bool(terms) == (alpha > 0)
        adversarial = NonSaturating().generator(discriminator(fake, c))
        adversarial.backward()
        found = gradients(generator)
        assert min(found.values()) > 0, found

    def test_each_loss_term_reaches_every_parameter(self):
        torch.manual_seed(0)
        generator, discriminator = CFGANGenerator(ITEMS, hidden=(16,)), CFGANDiscriminator(ITEMS, hidden=(8,))
        condition = CFGANCondition(ITEMS)
        c = drawn(condition, X)
        fake = generator(torch.zeros(64, 0), c)
        condition.extra_losses(fake, X, c)["zero_reconstruction"].backward()
        assert min(gradients(generator).values()) > 0
        NonSaturating().discriminator(discriminator(X, c), discriminator(fake.detach(), c)).backward()
        assert min(gradients(discriminator).values()) > 0

    def test_widths_and_latents_that_cannot_be_are_refused(self):
        with pytest.raises(ConfigurationError, match=r"hidden .* each an integer of at least 1; got \(0,\)"):
            CFGANGenerator(ITEMS, hidden=(0,))
        with pytest.raises(ConfigurationError, match="latent_dim .* at least 0; got -1"):
            CFGANGenerator(ITEMS, latent_dim=-1)


class TestRanking:
    def test_closed_forms(self):
        scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
        seen = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
        wanted = torch.tensor([[0, 0, 1.0, 0, 1.0, 0], [0, 0, 0, 0, 0, 1.0]])
        assert ranked(scores, seen=seen).tolist() == [[1, 2, 3, 4, 5, 0], [5, 4, 3, 2, 1, 0]]
        found = ranking_values(scores, seen=seen, wanted=wanted)
        first = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
        assert found["ndcg20"] == pytest.approx((first + 1) / 2)
        assert found["precision5"] == pytest.approx((0.4 + 0.2) / 2)
        assert found["precision20"] == pytest.approx((2 + 1) / 20 / 2)
        assert found["recall20"] == 1.0
        assert found["mrr"] == pytest.approx((0.5 + 1) / 2)

    @given(seed=st.integers(0, 10_000), items=st.integers(22, 60))
    @settings(max_examples=30, deadline=None)
    def test_values_lie_in_the_unit_interval_and_the_truth_ranks_best(self, seed, items):
        generator = torch.Generator().manual_seed(seed)
        seen = (torch.rand(7, items, generator=generator) < 0.3).float()
        wanted = (torch.rand(7, items, generator=generator) < 0.4).float() * (1 - seen)
        keep = wanted.any(1)
        scores, seen, wanted = torch.randn(7, items, generator=generator)[keep], seen[keep], wanted[keep]
        if not len(seen):
            return
        found = ranking_values(scores, seen=seen, wanted=wanted)
        best = ranking_values(wanted, seen=seen, wanted=wanted)
        assert best["ndcg20"] == pytest.approx(1)
        assert best["mrr"] == 1
        for name, value in found.items():
            assert 0 <= value <= best[name] + 1e-12
        shuffled = torch.randperm(items, generator=generator)  # names of items do not matter
        again = ranking_values(scores[:, shuffled], seen=seen[:, shuffled], wanted=wanted[:, shuffled])
        assert again == pytest.approx(found)

    def test_ndcg_is_that_of_scikit_learn(self):
        from sklearn.metrics import ndcg_score

        generator = torch.Generator().manual_seed(0)
        wanted = (torch.rand(9, 50, generator=generator) < 0.3).float()
        scores = torch.randn(9, 50, generator=generator)
        ours = ranking_values(scores, seen=torch.zeros(9, 50), wanted=wanted)["ndcg20"]
        assert ours == pytest.approx(ndcg_score(wanted.numpy(), scores.numpy(), k=20))

    def test_popularity_is_a_fact_and_training_items_are_never_ranked(self):
        data, metric = module(), RankingQuality()
        facts = metric.prepare(data, device=CPU)
        assert facts["ranking_users"] == 41
        assert 0.1 < facts["ndcg20_popularity"] < 0.9
        assert {"precision5_popularity", "recall20_popularity", "mrr_popularity"} <= set(facts)
        seen, wanted = histories(data)
        assert torch.equal(seen, data.train_samples.x)
        assert ranking_values(seen, seen=seen, wanted=wanted)["ndcg20"] < 0.9, "knowing the past gives nothing"
        assert metric.compute(torch.zeros(2, ITEMS), None) == {}

    def test_users_are_matched_by_name_when_only_some_are_kept(self):
        data = module(max_samples=20)
        seen, wanted = histories(data)
        everyone = {user: row for row, user in enumerate(data.source.users)}
        rows = [everyone[user] for user in data.train_samples.columns["user"]]
        assert torch.equal(seen, data.source.load("train").x[rows])
        assert torch.equal(wanted, data.source.load("test").x[rows])

    def test_interactions_have_it_by_default_and_other_data_not(self):
        assert [type(metric) for metric in default_metrics(module())] == [RankingQuality]
        with pytest.raises(ConfigurationError, match="the same users in both splits.*got Ring"):
            RankingQuality().prepare(ring_data(), device=CPU)

    def test_a_model_without_purchases_is_refused(self):
        metric = RankingQuality()
        metric.prepare(module(), device=CPU)
        with pytest.raises(ConfigurationError, match="got GAN without a condition"):
            metric.inspect(ring_gan())


class TestFederation:
    def test_stacked_clients_train_as_one_by_one(self):
        options = {"generator_optimizer": sgd, "discriminator_optimizer": sgd, "penalties": [R1(0.1)]}
        one, other = (
            updates(executor, gan(**options), module(partition=Natural("genre")))
            for executor in (VectorizedExecutor(), SequentialExecutor())
        )
        assert_same(one, other, rtol=1e-5)
        assert all(update.metrics["zero_reconstruction"] > 0 for update in one[0].values())

    def test_single_users_federate(self):
        data = module(partition=Natural("user"), num_clients=41, batch_size=1)
        server, *_ = federate(gan(), data, rounds=2, local_steps=1, executor=VectorizedExecutor())
        before, after = gan().generator.state_dict(), server.model.generator.state_dict()
        assert all(not torch.equal(before[name], after[name]) for name in before)

    def test_training_beats_popularity_and_the_untrained_generator(self):
        data, metric = module(batch_size=32), RankingQuality()
        own = gan(
            generator_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
            discriminator_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
            g_steps=2,
        )
        facts, untrained = metric.prepare(data, device=CPU), metric.inspect(own)
        torch.manual_seed(1)
        quiet_trainer(max_epochs=1).fit(own, datamodule=data.pooled(num_steps=200))
        assert metric.inspect(own)["ndcg20"] > 1.2 * max(facts["ndcg20_popularity"], untrained["ndcg20"])


class TestRecommendations:
    def test_predict_writes_the_best_unseen_items_of_every_user(self, capsys):
        data, callback = module(), Recommendations(top=7)
        server = ServerModule(gan())
        quiet_trainer(callback).predict(server, datamodule=data)
        assert "wrote" in capsys.readouterr().out
        with Path("predictions/recommendations.csv").open() as file:
            lines = list(csv.DictReader(file))
        samples, names = data.train_samples, data.source.items
        assert len(lines) == 41 * 7
        scores = preferences(server.model, samples.x).masked_fill(samples.x > 0, -1)
        for row in (0, 17, 40):
            mine = [line for line in lines if line["user"] == data.source.users[row]]
            assert [int(line["rank"]) for line in mine] == list(range(1, 8))
            best = scores[row].topk(7)
            assert [line["item"] for line in mine] == [names[item] for item in best.indices]
            assert [float(line["score"]) for line in mine] == pytest.approx(best.values.tolist(), rel=1e-4)
            assert mine[0]["title"] == f"Film {mine[0]['item']}, The ({1959 + int(mine[0]['item'])})"

    def test_other_data_and_empty_lists_are_refused(self):
        with pytest.raises(ConfigurationError, match="top of Recommendations .* at least 1; got 0"):
            Recommendations(top=0)
        with pytest.raises(ConfigurationError, match="users of Interactions; got Ring"):
            quiet_trainer(Recommendations()).predict(ServerModule(ring_gan()), datamodule=ring_data())
