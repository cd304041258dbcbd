"""Samples, streams, partitions and sources."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedgan_lightning.data import given_partitions, sources
from fedgan_lightning.data import partition as parts
from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.order import MinibatchOrder
from fedgan_lightning.data.samples import BatchStream, ClientSamples, Samples, Shift
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.seeding import make_generator
from tests.conftest import quiet_trainer, ring_data


def labelled(n: int = 240, classes: int = 6) -> Samples:
    y = torch.arange(n) % classes
    return Samples(x=torch.randn(n, 2), y=y, columns={"site": (np.arange(n) * 7 % 5)})


class EveryFourth:
    """Has the interface of a partitioner of flwr-datasets."""

    def __init__(self, num_partitions):
        self.num_partitions, self._dataset = num_partitions, None

    @property
    def dataset(self):
        return self._dataset

    @dataset.setter
    def dataset(self, value):
        if self._dataset is not None:
            raise ValueError("The dataset should be assigned only once")
        self._dataset = value

    def load_partition(self, partition_id):
        return self.dataset.select(range(partition_id, len(self.dataset), self.num_partitions))


PARTITIONS = {
    "iid": parts.IID(),
    "dirichlet": parts.Dirichlet(0.3),
    "classes": parts.ClassesPerClient(2),
    "shuffled": parts.ClassesPerClient(2, shuffle=True),
    "lists": parts.ClassLists([[0, 1], [2, 3], [4, 5], [0, 5]]),
    "mixes": parts.ClassMixes([2, 1, 1, 2], [[1, 1, 0, 0, 0, 0], *[[0, 0, 0, 0, 1, 1]] * 2, [0, 0, 3, 3, 0, 0]]),
    "quantity": parts.QuantitySkew(0.5, min_samples=3),
    "natural": parts.Natural("site"),
    "label": parts.Natural("label"),
    "shift": parts.FeatureShift(parts.Dirichlet(1.0)),
    "given": given_partitions.GivenIndices([range(k, 240, 4) for k in range(4)]),
    "flower": given_partitions.FlowerPartitioner(EveryFourth(4)),
}
NEEDS = {"flower": "datasets"}


def partition_named(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return PARTITIONS[name]


class TestPartitionContract:
    def test_every_partition_is_covered(self):
        ours = {own for own in parts.Partition.__subclasses__() if own.__module__.startswith("fedgan_lightning.")}
        assert {type(partition) for partition in PARTITIONS.values()} == ours

    @pytest.mark.parametrize("name", PARTITIONS)
    def test_disjoint_sorted_complete_and_deterministic(self, name):
        partition = partition_named(name)
        samples = labelled()
        split = partition.split(samples, num_clients=4, seed=1)
        joined = np.concatenate(split)
        assert len(split) == 4
        assert len(set(joined.tolist())) == len(joined)
        assert all((np.diff(part) > 0).all() for part in split)
        assert len(joined) == len(samples)
        again = partition.split(samples, num_clients=4, seed=1)
        assert all(np.array_equal(first, second) for first, second in zip(split, again))

    @pytest.mark.parametrize("name", ["iid", "dirichlet", "shuffled", "quantity", "classes", "mixes"])
    def test_the_seed_matters(self, name):
        splits = [PARTITIONS[name].split(labelled(), num_clients=4, seed=seed) for seed in (1, 2)]
        assert not all(np.array_equal(*pair) for pair in zip(*splits))

    def test_mixes_give_sizes_and_shares(self):
        """Class 0 is scarcest: 40 of 240 are all dealt out, and the rest of the others is dropped."""
        split = parts.ClassMixes([3, 1], [[1, 1, 1, 1, 1, 1], [7, 1, 1, 1, 0, 0]]).split(
            labelled(), num_clients=2, seed=0
        )
        counts = np.stack([np.bincount(np.arange(240)[own] % 6, minlength=6) for own in split])
        assert counts[0].tolist() == [16] * 6
        assert counts[1].tolist() == [23, 3, 3, 3, 0, 0]

    @pytest.mark.parametrize("sizes, mixes", [([1], [[1.0] * 6]), ([1, 1, 1, 1], [[1.0] * 5] * 4), ([0], [[1.0]])])
    def test_mixes_that_do_not_fit_are_refused(self, sizes, mixes):
        with pytest.raises(DataError, match="ClassMixes"):
            parts.ClassMixes(sizes, mixes).split(labelled(), num_clients=4, seed=0)

    @pytest.mark.parametrize("absent", [2, 5])
    def test_mixes_may_leave_out_a_class_without_samples_and_not_deal_it_out(self, absent):
        kept = labelled().y != absent
        samples = Samples(x=labelled().x[kept], y=labelled().y[kept])
        shares = [0 if label == absent else 1 for label in range(6)]
        split = parts.ClassMixes([3, 1], [shares] * 2).split(samples, num_clients=2, seed=0)
        assert [len(own) for own in split] == [150, 50]
        with pytest.raises(DataError, match=rf"shares of classes \[{absent}\], of which there are none"):
            parts.ClassMixes([3, 1], [[1] * 6] * 2).split(samples, num_clients=2, seed=0)

    @pytest.mark.parametrize("name", PARTITIONS)
    def test_a_client_below_the_minimum_is_an_error(self, name):
        partition = copy.copy(partition_named(name))
        partition.min_samples = 1000
        with pytest.raises(DataError, match=r"at least 1000 samples.*(got client 0|got 240|need 4000)"):
            partition.split(labelled(), num_clients=4, seed=1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(20, 400), clients=st.integers(1, 10), seed=st.integers(0, 10**6), alpha=st.floats(0.05, 100))
def test_random_partitions_lose_and_share_nothing(n, clients, seed, alpha):
    samples = Samples(x=torch.zeros(n, 1), y=torch.arange(n) % 3)
    for partition in (parts.IID(), parts.QuantitySkew(alpha)):
        joined = np.concatenate(partition.split(samples, num_clients=clients, seed=seed))
        assert sorted(joined.tolist()) == list(range(n))
    cut = parts._cut(np.arange(n), np.random.default_rng(seed).dirichlet(np.full(clients, alpha)))
    assert np.concatenate(cut).tolist() == list(range(n))


def test_large_alpha_is_nearly_iid_and_small_alpha_is_not():
    samples = labelled(6000)
    spread = {}
    for alpha in (0.05, 1000.0):
        split = parts.Dirichlet(alpha).split(samples, num_clients=5, seed=0)
        counts = np.stack([np.bincount(samples.y.numpy()[part], minlength=6) for part in split])
        spread[alpha] = (counts / counts.sum(1, keepdims=True)).std(0).mean()
    assert spread[1000.0] < 0.02
    assert spread[0.05] > 0.2


def test_classes_per_client_gives_each_client_its_classes():
    samples = labelled(300, 6)
    split = parts.ClassesPerClient(2).split(samples, num_clients=3, seed=0)
    assert [sorted(set(samples.y.numpy()[part].tolist())) for part in split] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    "partition, samples, words",
    [
        (
            parts.ClassesPerClient(2),
            Samples(x=torch.zeros(50, 2)),
            "labels to split by; got a source without labels",
        ),
        (parts.Dirichlet(0.5), Samples(x=torch.zeros(50, 2)), "must have labels to split by"),
        (parts.Natural("writer"), labelled(), r"got 'writer'. Choose one of \['label', 'site'\]"),
        (parts.ClassLists([[0], [9], [1], [2]]), labelled(), r"got unknown \[9\]"),
        (parts.ClassLists([[0], [1]]), labelled(), "got 2 lists for 4 clients"),
        (parts.ClassesPerClient(7), labelled(), "got 7"),
    ],
)
def test_impossible_partitions_say_why(partition, samples, words):
    with pytest.raises(DataError, match=words):
        partition.split(samples, num_clients=4, seed=0)


def test_more_clients_than_values_is_an_error_and_fewer_deals_them_out():
    with pytest.raises(DataError, match="got 6 clients, 5 values"):
        parts.Natural("site").split(labelled(), num_clients=6, seed=0)
    split = parts.Natural("site").split(labelled(), num_clients=2, seed=0)
    assert sorted(len(part) for part in split) == [96, 144]


def test_feature_shift_changes_what_a_client_sees_and_keeps_images_in_range():
    data = FederatedDataModule(
        sources.Digits(), partition=parts.FeatureShift(contrast=0.5, brightness=0.5), num_clients=3
    )
    plain = FederatedDataModule(sources.Digits(), num_clients=3)
    for client_id in range(3):
        shift = data.shifts[client_id]
        x, original = (module.client_samples(client_id).take(torch.arange(20))[0] for module in (data, plain))
        assert np.array_equal(data.indices[client_id], plain.indices[client_id])
        torch.testing.assert_close(x, (original * shift.scale + shift.offset).clamp(-1, 1))
        assert not torch.equal(x, original)
    assert len({data.shifts[client_id] for client_id in range(3)}) == 3
    pooled = next(iter(data.pooled(num_steps=1).train_dataloader()))[0]
    assert pooled.abs().max() <= 1


class TestSamples:
    def test_bytes_become_floats_from_minus_one_to_one(self):
        samples = Samples(x=torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
        assert samples.take(torch.tensor([0, 1]))[0].flatten().tolist() == [-1.0, 1.0]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite_is_refused_with_the_count(self, bad):
        x = torch.zeros(5, 2)
        x[1, 0] = x[3, 1] = bad
        with pytest.raises(DataError, match="got NaN or infinity in 2 of 5 samples"):
            Samples(x=x)

    def test_empty_and_mismatched_are_refused(self):
        with pytest.raises(DataError, match="at least one sample"):
            Samples(x=torch.zeros(0, 2))
        with pytest.raises(DataError, match="5 samples, 4 labels"):
            Samples(x=torch.zeros(5, 2), y=torch.zeros(4, dtype=torch.int64))

    def test_a_client_is_a_map_style_dataset(self):
        view = ClientSamples(samples=labelled(), indices=torch.tensor([4, 9]), shift=Shift(scale=2.0))
        x, y = view[1]
        torch.testing.assert_close(x, 2 * view.samples.x[9])
        assert int(y) == int(view.samples.y[9])
        assert len(view) == 2


class TestBatchStream:
    @staticmethod
    def stream(first_step: int, num_steps: int, *, seed: int = 0, stream: int = 1) -> BatchStream:
        data = ClientSamples(samples=Samples(x=torch.arange(50.0).view(50, 1)), indices=torch.arange(50))
        return BatchStream(data, batch_size=8, seed=seed, stream=stream, first_step=first_step, num_steps=num_steps)

    @settings(max_examples=40, deadline=None)
    @given(total=st.integers(1, 40), cut=st.integers(0, 40))
    def test_step_s_is_the_same_minibatch_however_rounds_are_cut(self, total, cut):
        cut = min(cut, total)
        whole = [x for x, _ in self.stream(0, total)]
        parts_of_it = [x for window in (self.stream(0, cut), self.stream(cut, total - cut)) for x, _ in window]
        assert len(whole) == len(self.stream(0, total)) == total
        assert all(torch.equal(first, second) for first, second in zip(whole, parts_of_it))

    def test_an_epoch_visits_no_sample_twice_and_the_next_is_in_another_order(self):
        first, second = (torch.cat([x for x, _ in self.stream(start, 6)]).flatten() for start in (0, 6))
        assert len(set(first.tolist())) == 48
        assert not torch.equal(first, second)

    def test_seed_and_client_matter_and_the_global_generator_does_not(self):
        base = next(iter(self.stream(0, 1)))[0]
        torch.manual_seed(1234)
        state = torch.random.get_rng_state()
        assert torch.equal(base, next(iter(self.stream(0, 1)))[0])
        assert torch.equal(state, torch.random.get_rng_state())
        assert not torch.equal(base, next(iter(self.stream(0, 1, seed=1)))[0])
        assert not torch.equal(base, next(iter(self.stream(0, 1, stream=2)))[0])

    def test_a_client_smaller_than_a_minibatch_has_minibatches_of_all_that_it_holds(self):
        data = ClientSamples(samples=labelled(), indices=torch.arange(5))
        for drop_last in (True, False):
            options = {"batch_size": 8, "seed": 0, "stream": 3, "drop_last": drop_last}
            found = [x for x, _ in BatchStream(data, first_step=2, num_steps=4, **options)]
            assert [len(x) for x in found] == [5] * 4
            assert all(torch.equal(x.sort(0).values, data.samples.x[:5].sort(0).values) for x in found)
            assert not torch.equal(found[0], found[1]), "every epoch has its own order"

    def test_a_client_without_samples_is_refused(self):
        data = ClientSamples(samples=labelled(), indices=torch.arange(0))
        with pytest.raises(DataError, match="at least one sample; got client 3 with none"):
            BatchStream(data, batch_size=8, seed=0, stream=3, first_step=0, num_steps=1)

    @settings(max_examples=60, deadline=None)
    @given(
        held=st.integers(1, 40),
        batch_size=st.integers(1, 12),
        first=st.integers(0, 20),
        total=st.integers(0, 20),
        drop_last=st.booleans(),
    )
    def test_minibatches_are_consecutive_pieces_of_the_orders_of_their_epochs(
        self, held, batch_size, first, total, drop_last
    ):
        order = MinibatchOrder(held, batch_size, seed=5, stream=2, drop_last=drop_last)
        expected = []
        for epoch in range(first + total + 1):
            generator = make_generator(5, "batches", 2, epoch)
            pieces = torch.randperm(held, generator=generator).split(min(batch_size, held))
            expected += pieces if not drop_last or len(pieces[-1]) == min(batch_size, held) else pieces[:-1]
        sizes = order.sizes(first, total)
        found = order.positions(first, total).split(sizes) if total else ()
        assert sizes == [len(own) for own in expected[first : first + total]]
        assert all(map(torch.equal, found, expected[first : first + total]))
        assert len(expected) == order.steps_per_epoch * (first + total + 1)


class TestDataModule:
    def test_knows_shapes_before_reading(self):
        data = FederatedDataModule(sources.TorchvisionImages("CIFAR10", root="nowhere"))
        assert data.sample_shape == (3, 32, 32)
        assert data.num_classes == 10
        with pytest.raises(ConfigurationError, match="num_clients .* at least 1; got 0"):
            FederatedDataModule(sources.Digits(), num_clients=0)

    def test_clients_smaller_than_a_minibatch_have_an_epoch_of_one_step(self):
        data = FederatedDataModule(sources.Digits(), num_clients=40, batch_size=64)
        data.setup()
        assert [data.num_examples(0), data.steps_per_epoch(0)] == [36, 1]
        assert data.batch_sizes(0, first_step=3, num_steps=2) == [36, 36]

    def test_incomplete_minibatches_are_an_option_and_part_of_the_fingerprint(self):
        prints = set()
        for drop_last, steps, sizes in ((True, 2, [16, 16, 16]), (False, 3, [16, 16, 4])):
            data = FederatedDataModule(sources.Digits(), num_clients=40, batch_size=16, drop_last=drop_last)
            data.setup()
            stream = data.client_batches(0, first_step=3, num_steps=3)
            assert data.num_examples(0) == 36
            assert data.steps_per_epoch(0) == steps
            assert [len(x) for x, _ in data.client_batches(0, first_step=0, num_steps=3)] == sizes
            assert [len(x) for x, _ in stream] == data.batch_sizes(0, first_step=3, num_steps=3)
            prints.add(data.fingerprint())
        assert len(prints) == 2

    def test_what_is_no_source_or_loads_no_samples_is_refused_by_name(self):
        with pytest.raises(ConfigurationError, match="source .* a Source; got 'Digits'. .* Digits"):
            FederatedDataModule("Digits")

        class Own(sources.Digits):
            found: object = None

            def load(self, split):
                return self.found

        own = Own()
        own.found = (torch.zeros(9, 1, 8, 8), torch.zeros(9))
        with pytest.raises(DataError, match="a source must load Samples; got tuple"):
            FederatedDataModule(own, num_clients=2).setup()
        own.found = Samples(torch.zeros(99, 1, 8, 8), torch.arange(99) % 12)
        with pytest.raises(DataError, match=r"labels must be numbers in \[0, 10\).*got 0 to 11"):
            FederatedDataModule(own, num_clients=2, batch_size=4).setup()

    def test_the_next_epoch_of_a_control_goes_on_where_the_last_one_ended(self):
        class Seeing(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization, self.seen, self.w = False, [], torch.nn.Parameter(torch.zeros(1))

            def training_step(self, batch, _):
                self.seen.append(batch[0])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        whole, parts_of = Seeing(), Seeing()
        data = ring_data()
        quiet_trainer(max_epochs=1).fit(whole, datamodule=data.pooled(num_steps=12))
        quiet_trainer(max_epochs=3).fit(parts_of, datamodule=data.pooled(num_steps=4))
        assert len(parts_of.seen) == 12
        assert all(map(torch.equal, whole.seen, parts_of.seen))

    def test_classes_that_nobody_holds_are_named_once(self, caplog):
        data = FederatedDataModule(sources.Digits(), partition=parts.ClassesPerClient(2), num_clients=3)
        data.setup()
        data.setup("fit")
        left = len(data.train_samples) - sum(data.num_examples(k) for k in range(3))
        told = [text for text in caplog.messages if "no client holds a sample of 6, 7, 8, 9: " in text]
        assert len(told) == 1
        assert f"{left} of 1438 samples are left out" in told[0]
        caplog.clear()
        FederatedDataModule(sources.Digits(), partition=parts.ClassesPerClient(2), num_clients=5).setup()
        assert not caplog.messages

    def test_max_samples_keeps_a_seeded_subset(self):
        data = FederatedDataModule(sources.Digits(), num_clients=2, max_samples=100)
        assert len(data.train_samples) == 100
        assert int(data.label_counts().sum()) == 100

    def test_fingerprint_follows_who_holds_what(self):
        prints = {
            FederatedDataModule(sources.Digits(), partition=p, num_clients=4, batch_size=b, seed=s).fingerprint()
            for p, b, s in ((None, 8, 0), (None, 8, 1), (None, 16, 0), (parts.ClassesPerClient(5), 8, 0))
        }
        assert len(prints) == 4

    def test_controls_hold_what_they_should(self):
        data = FederatedDataModule(sources.Digits(), partition=parts.ClassesPerClient(2), num_clients=5, batch_size=8)
        assert len(data.pooled(num_steps=1).data) == data.label_counts().sum()
        only = data.client(2, num_steps=3)
        labels = torch.cat([y for _, y in only.train_dataloader()])
        assert set(labels.tolist()) <= {4, 5}
        assert len(labels) == 24


class TestSources:
    @pytest.mark.parametrize(
        "source, shape",
        [
            (sources.Digits(), (1, 8, 8)),
            (sources.Digits(16), (1, 16, 16)),
            (sources.Ring(num_samples=80), (2,)),
            (sources.Grid(num_samples=100), (2,)),
            (sources.SwissRoll(num_samples=90), (2,)),
            (sources.Segments(), (1,)),
        ],
    )
    def test_sources_keep_their_promises(self, source, shape):
        assert source.sample_shape == shape
        train, test = source.load("train"), source.load("test")
        assert tuple(train.x.shape[1:]) == tuple(test.x.shape[1:]) == shape
        assert torch.equal(train.x, source.load("train").x)
        if source.num_classes:
            assert set(train.y.tolist()) == set(range(source.num_classes))

    def test_digits_are_all_there_and_the_splits_are_disjoint(self):
        source = sources.Digits()
        assert len(source.load("train")) + len(source.load("test")) == 1797

    def test_toys_have_about_unit_variance(self):
        for source in (sources.Ring(), sources.Grid(), sources.SwissRoll()):
            assert source.load("train").x.std(0) == pytest.approx([1.0, 1.0], abs=0.06)

    def test_ring_modes_lie_on_the_scaled_circle_in_order(self):
        source = sources.Ring(num_samples=4000)
        train = source.load("train")
        assert source.centres.norm(dim=1) == pytest.approx(torch.full((8,), 2**0.5))
        within = (train.x - source.centres[train.y]).norm(dim=1) / source.sigma
        assert float((within < 3).float().mean()) == pytest.approx(1 - np.exp(-4.5), abs=0.01)

    def test_segments_are_the_nodes_of_the_midpoint_rule(self):
        samples = sources.Segments().load("train")
        assert samples.x.dtype == torch.float64
        assert float(samples.x[0]) == pytest.approx(-0.995)
        assert np.bincount(samples.columns["segment"]).tolist() == [40] * 5

    def test_mnist(self, shared):
        source = sources.TorchvisionImages("MNIST", root=str(shared), download=False)
        train, test = source.load("train"), source.load("test")
        assert (len(train), len(test)) == (60_000, 10_000)
        assert train.x.dtype == torch.uint8
        assert train.take(torch.arange(4))[0].min() == -1

    def test_pneumonia_mnist(self, shared):
        source = sources.MedMNISTFile(str(shared / "medmnist" / "pneumoniamnist.npz"), image_size=32)
        assert (source.sample_shape, source.num_classes) == ((1, 32, 32), 2)
        assert tuple(source.load("train").x.shape) == (4708, 1, 32, 32)
        assert source.load("test").y.shape == (624,)

    def test_a_set_of_medmnist_by_its_name(self, shared):
        source = sources.MedMNIST("pneumoniamnist", root=str(shared / "medmnist"))
        assert (source.sample_shape, source.num_classes, len(source.load("train"))) == ((1, 28, 28), 2, 4708)
        with pytest.raises(DataError, match="pneumoniamnist_64.npz must lie in the folder"):
            sources.MedMNIST("pneumoniamnist", root=str(shared / "medmnist"), size=64)

    def test_missing_torchvision_data_is_one_clear_error(self):
        with pytest.raises(DataError, match="MNIST must lie in the folder.*root='nowhere', download=False"):
            sources.TorchvisionImages("MNIST", root="nowhere", download=False).load("train")
        with pytest.raises(DataError, match="CelebA must lie in ROOT/celeba"):
            sources.CelebA(root="nowhere", download=False).load("train")

    def test_cifar10_and_celeba_read_files_as_torchvision_keeps_them(self, tmp_path, monkeypatch):
        """No download here: the files are written in the formats that torchvision reads."""
        import pickle

        from torchvision import datasets

        monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            entry = {"data": np.random.default_rng(0).integers(0, 255, (10, 3072), np.uint8), "labels": list(range(10))}
            (folder / name).write_bytes(pickle.dumps(entry))
        cifar = sources.TorchvisionImages("CIFAR10", root=str(tmp_path), download=False).load("train")
        assert tuple(cifar.x.shape) == (50, 3, 32, 32)

        monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
        base = tmp_path / "celeba"
        (base / "img_align_celeba").mkdir(parents=True)
        names = [f"{index:06d}.jpg" for index in range(1, 7)]
        for index, name in enumerate(names):
            Image.new("RGB", (178, 218), (40 * index, 0, 0)).save(base / "img_align_celeba" / name)
        attributes = ["Young", "Male", "Eyeglasses", "Smiling"]
        (base / "list_eval_partition.txt").write_text(
            "".join(f"{name} {0 if i < 4 else 2}\n" for i, name in enumerate(names))
        )
        (base / "identity_CelebA.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)))
        rows = "".join(
            f"{name} {' '.join('1' if i >> b & 1 else '-1' for b in range(4))}\n" for i, name in enumerate(names)
        )
        (base / "list_attr_celeba.txt").write_text(f"6\n{' '.join(attributes)}\n{rows}")
        boxes = "".join(f"{name} 0 0 1 1\n" for name in names)
        (base / "list_bbox_celeba.txt").write_text(f"6\nx y w h\n{boxes}")
        (base / "list_landmarks_align_celeba.txt").write_text(f"6\na b c d\n{boxes}")
        source = sources.CelebA(root=str(tmp_path), image_size=16, download=False)
        train = source.load("train")
        assert tuple(train.x.shape) == (4, 3, 16, 16)
        assert train.y.tolist() == [0, 8, 2, 10], "Young is bit 3, Male bit 1"
        assert source.class_names[10] == "no Eyeglasses Male no Smiling Young"
        assert train.columns["identity"].tolist() == [0, 1, 0, 1]

    def test_image_folder_with_and_without_classes(self, tmp_path):
        for site, level in (("berlin", 10), ("paris", 200)):
            (tmp_path / "p" / site).mkdir(parents=True)
            for index in range(10):
                Image.new("L", (20 + index, 30), level).save(tmp_path / "p" / site / f"{index}.png")
        plain = sources.ImageFolder(str(tmp_path / "p"), image_size=16)
        train = plain.load("train")
        assert train.y is None
        assert tuple(train.x.shape) == (18, 3, 16, 16)
        assert set(train.columns["folder"]) == {"berlin", "paris"}
        assert len(plain.load("test")) == 2
        classed = sources.ImageFolder(str(tmp_path / "p"), image_size=16, channels=1, classes=True)
        assert classed.class_names == ("berlin", "paris")
        samples = classed.load("train")
        assert set(samples.x[samples.y == 0].flatten().tolist()) == {10}
        with pytest.raises(DataError, match="must hold pictures.*got nowhere with none"):
            sources.ImageFolder("nowhere").load("train")
        (tmp_path / "p" / ".cache").mkdir()
        assert sources.ImageFolder(str(tmp_path / "p"), classes=True).class_names == ("berlin", "paris")
        (tmp_path / "p" / "paris" / "broken.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match="every picture must be readable"):
            sources.ImageFolder(str(tmp_path / "p")).load("train")

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_pictures_of_more_than_16_bits_are_refused_and_not_made_white(self, tmp_path, dtype):
        for index in range(3):
            values = np.linspace(0, 4095, 64).reshape(8, 8).astype(dtype)
            Image.fromarray(values).save(tmp_path / f"{index}.tif")
        with pytest.raises(DataError, match="8 or 16 bits a channel.*of mode [IF]"):
            sources.ImageFolder(str(tmp_path), image_size=8, channels=1).load("train")

    def test_pictures_stand_upright(self, tmp_path):
        picture, exif = Image.new("L", (8, 8)), Image.Exif()
        picture.putpixel((0, 0), 255)
        exif[0x0112] = 3  # turned by 180 degrees
        for index in range(3):
            picture.save(tmp_path / f"{index}.png", exif=exif)
        x = sources.ImageFolder(str(tmp_path), image_size=8, channels=1).load("train").x
        assert x[0, 0, 7, 7] == 255
        assert x[0, 0, 0, 0] == 0

    @pytest.mark.parametrize("channels", [1, 3])
    def test_npz_says_itself_how_many_channels_it_has(self, tmp_path, channels):
        arrays = {f"{split}_images": np.zeros((4, 8, 8, channels), np.uint8) for split in ("train", "test")}
        labels = {f"{split}_labels": np.zeros((4, 1), np.int64) for split in ("train", "test")}
        np.savez(tmp_path / "a.npz", **arrays, **labels)
        source = sources.MedMNISTFile(str(tmp_path / "a.npz"))
        assert source.sample_shape == (channels, 8, 8) == tuple(source.load("train").x.shape[1:])

    def test_npz_in_another_layout_is_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=np.zeros(3))
        with pytest.raises(DataError, match=r"no arrays \['test_images'"):
            sources.MedMNISTFile(str(tmp_path / "a.npz"))
        with pytest.raises(DataError, match="FileNotFoundError"):
            sources.MedMNISTFile(str(tmp_path / "b.npz"))
        np.savez(tmp_path / "p.npz", train_images=np.array([{"a": 1}], dtype=object))
        with pytest.raises(DataError, match="MedMNIST's layout"):
            sources.MedMNISTFile(str(tmp_path / "p.npz"))


class TestWhatMakesNoSense:
    def test_shifts_of_shifts_of_words_and_backwards(self):
        with pytest.raises(DataError, match="one shift"):
            parts.FeatureShift(parts.FeatureShift())
        with pytest.raises(ConfigurationError, match="brightness .* at least 0; got -1"):
            parts.FeatureShift(brightness=-1)
        words = Samples(x=torch.zeros(9, 4, dtype=torch.int64))
        with pytest.raises(DataError, match="must move pixels or measurements"):
            parts.FeatureShift().split(words, num_clients=3, seed=0)

    def test_a_negative_number_of_samples(self):
        with pytest.raises(ConfigurationError, match="max_samples .* at least 1 or None; got -5"):
            FederatedDataModule(sources.Digits(), max_samples=-5)

    def test_a_split_without_labels_beside_one_with(self):
        class Half(sources.Digits):
            def load(self, split):
                samples = super().load(split)
                return samples if split == "train" else Samples(x=samples.x)

        with pytest.raises(DataError, match="a test split without"):
            FederatedDataModule(Half()).test_samples  # noqa: B018 - the access is the test
