"""One's own data: data sets, loaders and data modules by client, whatever their items are."""

from __future__ import annotations

import logging

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from fedgan_lightning import FederatedDataModule, FederatedOrchestrator, SequentialExecutor, ServerModule
from fedgan_lightning.data.own import ClientDatasets
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.partitions import ClassesPerClient, FeatureShift, GivenIndices
from fedgan_lightning.protocol import FederatedData
from tests.conftest import federate, quiet_trainer, ring_gan

of = FederatedDataModule.from_datasets
divide = FederatedDataModule.from_dataset


class Items(Dataset):
    """Items that a function makes of their number."""

    def __init__(self, count, make):
        self.count, self.make = count, make

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.make(index)


class Seen(L.LightningModule):
    """Keeps the minibatches that reach it, in training steps of its own."""

    def __init__(self):
        super().__init__()
        self.net, batches = torch.nn.Linear(2, 2), []
        self.noted = lambda: batches  # an attribute would be put back before every client
        with torch.no_grad():
            self.net.weight.fill_(0.5)
            self.net.bias.fill_(0.0)

    def __deepcopy__(self, memo):
        copied = Seen()
        copied.load_state_dict(self.state_dict())
        copied.noted = self.noted
        return copied

    def training_step(self, batch, _):
        self.noted().append(batch)
        return (self.net(torch.rand(3, 2)) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(data, **options):
    """Return the minibatches that reach a module, and the server's weights."""
    model = Seen()
    server, _, _ = federate(model, data, **{"rounds": 1, **(options or {"local_steps": 2})})
    return model.noted(), server.model.net.weight.detach().clone()


def same(first, second):
    """Whether two minibatches are alike; tuples and lists are."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def minibatches(data, client_id=0, *, first_step=0, num_steps=4):
    return list(data.client_batches(client_id, first_step=first_step, num_steps=num_steps))


def pairs(count=20, shift=0):
    return TensorDataset(
        torch.arange(shift, shift + count).float().repeat(2, 1).T.contiguous(), torch.arange(count) % 3
    )


def number(index):
    return torch.full((2,), float(index))


FORMS = {
    "a dict": lambda i: {"image": number(i), "caption": f"number {i}", "label": i % 3},
    "nested": lambda i: {"views": (number(i), {"mask": np.ones((2, 2), dtype=bool)}), "id": i},
    "three values": lambda i: (number(i), i % 3, torch.tensor(0.5)),
    "x alone": number,
    "x in a tuple": lambda i: (number(i),),
    "a regression": lambda i: (number(i), torch.tensor([0.5, float(i)])),
    "NumPy": lambda i: np.full(2, i, dtype=np.float32),
    "whole numbers": lambda i: torch.tensor([i, i + 1]),
}


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    def test_any_batch_reaches_the_module_as_torch_collates_it(self, form):
        data = of({"here": Items(20, FORMS[form]), "there": Items(9, FORMS[form])}, batch_size=4)
        assert isinstance(data, FederatedData)
        assert isinstance(data, L.LightningDataModule)
        batches, _ = trained(data)
        positions = torch.randperm(20, generator=_epoch_of(0))[:4].tolist()
        expected = torch.utils.data.default_collate([FORMS[form](at) for at in positions])
        assert same(batches[0], expected)
        assert len(batches) == 4

    def test_pictures_become_pixels_wherever_they_are(self):
        red = Image.new("RGB", (4, 3), (255, 0, 0))
        (batch,) = minibatches(of([Items(3, lambda i: {"image": red, "label": i})], batch_size=2), num_steps=1)
        assert batch["image"].shape == (2, 3, 3, 4)
        assert batch["image"][0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]

    @pytest.mark.parametrize("limit", [1 << 20, 0], ids=["in memory", "as needed"])
    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda i: (Image.new("L", (5, 4), i), i % 2), (1, 4, 5)),
            (lambda i: (np.full((4, 5, 3), i, dtype=np.uint8), i % 2), (3, 4, 5)),
            (lambda i: (torch.full((3, 4, 5), i, dtype=torch.uint8), i % 2), (3, 4, 5)),
            (lambda i: (torch.full((4, 5), i, dtype=torch.uint8), i % 2), (1, 4, 5)),
        ],
        ids=["Pillow", "NumPy", "torch", "grey"],
    )
    def test_bytes_are_pixels_from_minus_one_to_one(self, make, shape, limit):
        data = of([Items(6, make)], batch_size=6, memory_limit=limit)
        ((x, y),) = minibatches(data, num_steps=1)
        assert data.has_samples == bool(limit)
        assert x.shape == (6, *shape)
        assert torch.equal(x[:, 0, 0, 0].sort().values, torch.arange(6) / 127.5 - 1)
        assert y.dtype == torch.int64

    def test_a_collate_function_of_ones_own_gets_the_items_as_they_are(self):
        data = of([Items(6, lambda i: [i] * (i + 1))], batch_size=3, collate_fn=lambda items: {"items": items})
        assert not data.has_samples
        assert sorted(len(own) for own in minibatches(data, num_steps=2)[0]["items"]) != []


def _epoch_of(client_id, epoch=0, seed=0):
    from fedgan_lightning.seeding import make_generator

    return make_generator(seed, "batches", client_id, epoch)


class TestOrder:
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_what_is_read_as_needed_comes_in_the_order_that_it_has_in_memory(self, drop_last):
        clients = {"a": pairs(23), "b": pairs(3), "c": pairs(64)}
        kept, read = (of(clients, batch_size=5, drop_last=drop_last, memory_limit=limit) for limit in (1 << 20, 0))
        assert (kept.has_samples, read.has_samples) == (True, False)
        for k in range(3):
            assert kept.steps_per_epoch(k) == read.steps_per_epoch(k)
            window = {"first_step": 3, "num_steps": 7}
            assert kept.batch_sizes(k, **window) == read.batch_sizes(k, **window)
            for (x, y), (x2, y2) in zip(minibatches(kept, k, **window), minibatches(read, k, **window)):
                assert torch.equal(x, x2)
                assert torch.equal(y, y2)

    def test_both_ways_train_the_same_gan(self):
        kept, read = (of([pairs(40), pairs(9)], batch_size=8, memory_limit=limit) for limit in (1 << 20, 0))
        first, second = (federate(ring_gan(), data, rounds=2, local_steps=3)[0] for data in (kept, read))
        assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))

    def test_workers_change_nothing(self):
        class Noisy(Items):
            def __getitem__(self, index):
                return {"x": number(index) + torch.rand(2), "y": float(np.random.rand())}

        (first, one), (second, two) = (
            trained(of([Noisy(9, None), Noisy(20, None)], batch_size=4, num_workers=n)) for n in (0, 2)
        )
        assert torch.equal(one, two)
        assert all(torch.equal(a["x"], b["x"]) and torch.equal(a["y"], b["y"]) for a, b in zip(first, second))

    @pytest.mark.parametrize("local", [{"local_steps": 3}, {"local_epochs": 1}], ids=["steps", "epochs"])
    def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_undisturbed_one(self, local):
        def data():
            return of(
                [Items(22, lambda i: {"x": number(i), "noise": torch.rand(1)}), Items(5, FORMS["a dict"])][:1],
                batch_size=4,
            )

        whole, _ = trained(data(), rounds=2, **local)
        again = minibatches(data(), num_steps=len(whole))
        assert all(torch.equal(a["x"], b["x"]) and torch.equal(a["noise"], b["noise"]) for a, b in zip(whole, again))
        rest = minibatches(data(), first_step=3, num_steps=len(whole) - 3)
        assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(whole[3:], rest))

    def test_reading_leaves_global_generators_alone(self):
        state = torch.get_rng_state()
        minibatches(of([Items(9, lambda i: {"x": torch.rand(2)})], batch_size=2))
        assert torch.equal(state, torch.get_rng_state())

    def test_data_that_are_drawn_anew_are_not_frozen_in_memory(self):
        data = of([Items(30, lambda i: (torch.rand(2), 0))], batch_size=30)
        assert not data.has_samples
        (first, _), (second, _) = minibatches(data, num_steps=2)
        assert not torch.equal(first.sort(0).values, second.sort(0).values)


class TestLoaders:
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_loader_brings_its_options_and_is_shuffled_by_the_seed(self, shuffle):
        loader = DataLoader(pairs(10), batch_size=4, shuffle=shuffle)
        data = of({"a": loader}, batch_size=64)
        assert data.steps_per_epoch(0) == 3
        assert [len(x) for x, _ in minibatches(data, num_steps=3)] == [4, 4, 2]
        assert of([DataLoader(pairs(10), batch_size=4, drop_last=True)]).steps_per_epoch(0) == 2
        other = of({"a": DataLoader(pairs(10), batch_size=4, shuffle=not shuffle)})
        assert torch.equal(minibatches(data)[0][0], minibatches(other)[0][0])

    def test_loaders_of_different_sizes_keep_them(self):
        data = of([DataLoader(pairs(10), batch_size=4), DataLoader(pairs(10), batch_size=2, drop_last=True)])
        assert [data.steps_per_epoch(k) for k in range(2)] == [3, 5]
        assert data.batch_sizes(1, first_step=0, num_steps=2) == [2, 2]

    def test_a_sampler_of_ones_own_keeps_its_order_and_draws_by_the_seed(self):
        class Backwards(torch.utils.data.Sampler):
            def __iter__(self):
                return iter(range(9, -1, -1))

            def __len__(self):
                return 10

        data = of([DataLoader(pairs(10), batch_size=4, sampler=Backwards())])
        found = [x[:, 0].tolist() for x, _ in minibatches(data, first_step=1, num_steps=3)]
        assert found == [[5.0, 4.0, 3.0, 2.0], [1.0, 0.0], [9.0, 8.0, 7.0, 6.0]]
        assert data.batch_sizes(0, first_step=1, num_steps=3) == [4, 2, 4]

        def weighted():
            sampler = WeightedRandomSampler([1.0] * 10, 8, generator=torch.Generator())
            return of([DataLoader(pairs(10), batch_size=4, sampler=sampler)])

        torch.manual_seed(5)
        whole = [x for x, _ in minibatches(weighted(), num_steps=6)]
        torch.manual_seed(6)
        assert all(map(torch.equal, whole[3:], [x for x, _ in minibatches(weighted(), first_step=3, num_steps=3)]))
        assert not torch.equal(whole[0], whole[2])

    def test_loaders_without_batch_size_and_iterable_data_are_counted(self, caplog):
        caplog.set_level(logging.INFO, logger="fedgan_lightning")

        class Endless(IterableDataset):
            def __iter__(self):
                return iter([number(i) for i in range(7)])

        batches = Items(3, lambda i: torch.ones(i + 1, 2))
        data = of({"own": DataLoader(batches, batch_size=None), "stream": DataLoader(Endless(), batch_size=3)})
        assert [data.num_examples(k) for k in range(2)] == [6, 7]
        assert [data.steps_per_epoch(k) for k in range(2)] == [3, 3]
        assert data.batch_sizes(0, first_step=0, num_steps=3) is None
        assert "client own: its minibatches are read once" in caplog.text
        assert [x[:, 0].tolist() for x in minibatches(data, 1, first_step=2, num_steps=2)] == [[6.0], [0.0, 1.0, 2.0]]
        assert len(trained(data)[0]) == 4
        assert of([Endless()], batch_size=2).num_examples(0) == 6, "an incomplete minibatch is dropped"
        assert of([Endless()], batch_size=9).num_examples(0) == 7, "unless there is no other"

    def test_any_iterable_of_minibatches_will_do_but_no_iterator(self):
        class Loader:
            def __iter__(self):
                return iter([torch.ones(4, 2), torch.zeros(2, 2)])

        assert of([Loader()]).num_examples(0) == 6
        with pytest.raises(
            DataError, match="loader of client a must yield minibatches again and again; got an iterator"
        ):
            of({"a": iter([torch.ones(4, 2)])})

    def test_a_data_module_is_prepared_and_its_hooks_are_applied(self):
        class Own(L.LightningDataModule):
            def prepare_data(self):
                self.ready = True

            def setup(self, stage):
                assert (stage, self.ready) == ("fit", True)
                self.data = pairs(12)

            def train_dataloader(self):
                return DataLoader(self.data, batch_size=4)

            def on_after_batch_transfer(self, batch, dataloader_idx):
                assert self.trainer.training
                return {"x": batch[0] + 100, "index": dataloader_idx}

        class Plain(Own):
            on_after_batch_transfer = L.LightningDataModule.on_after_batch_transfer

        data = of({"hospital": Own()})
        assert (data.num_examples(0), data.has_samples) == (12, False)
        assert all(int(batch["x"].min()) >= 100 for batch in trained(data)[0])
        assert of({"hospital": Plain()}).has_samples

    def test_a_data_module_that_knows_its_clients_is_taken_whole(self):
        class Sites(L.LightningDataModule):
            def client_dataloaders(self):
                return {"north": DataLoader(pairs(8), batch_size=4), "south": pairs(6)}

        data = FederatedDataModule.from_datamodule(Sites(), batch_size=4, memory_limit=0)
        assert data.client_names == ("north", "south")
        with pytest.raises(ConfigurationError, match="method client_dataloaders.*got LightningDataModule"):
            FederatedDataModule.from_datamodule(L.LightningDataModule())


class TestInMemory:
    def test_pairs_in_memory_are_what_our_own_sources_are(self):
        data = of({"a": pairs(30), "b": pairs(12)}, test=pairs(9), batch_size=4)
        assert isinstance(data, FederatedDataModule)
        data.setup()
        assert data.sample_shape == (2,)
        assert data.class_names == ("0", "1", "2")
        assert data.label_counts().tolist() == [[10, 10, 10], [4, 4, 4]]
        assert len(data.test_samples) == 9
        assert (data.client_names, data.has_samples) == (("a", "b"), True)

    def test_a_subset_has_the_names_of_its_whole(self):
        whole = pairs(30)
        whole.classes = ["cat", "dog", "fox"]
        assert of([Subset(whole, range(10)), Subset(whole, range(10, 30))]).class_names == ("cat", "dog", "fox")

    def test_test_data_must_be_like_the_clients(self):
        with pytest.raises(DataError, match="test must hold items like those of the clients"):
            of([pairs(9)], test=Items(4, FORMS["a dict"]))
        with pytest.raises(DataError, match="held-out samples must have some; got no test data"):
            _ = of([pairs(9)]).test_samples

    def test_more_than_the_limit_is_read_as_needed(self, caplog):
        of([pairs(20)], memory_limit=0, test=pairs(3))
        assert "test is not used: nothing can be measured" in caplog.text
        assert of([pairs(20)], memory_limit=160).has_samples
        assert not of([pairs(20)], memory_limit=159).has_samples

    def test_identities_are_no_classes(self):
        assert not of([Items(20, lambda i: (number(i), 10**6 + i))]).has_samples
        assert not of([Items(20, lambda i: (number(i), i - 1))]).has_samples


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        "clients, words",
        [
            ({"a": Items(0, number)}, "at least one sample; got client a with none"),
            ([pairs(3), []], "at least one sample; got client 1 with none"),
            ({}, "clients must be a mapping from names to data sets, or a list.*got none"),
            (pairs(3), "clients must be a mapping.*got an object of type TensorDataset.*from_dataset"),
            ({"a": 7}, "client a must be a Dataset, a DataLoader or a LightningDataModule; got an object of type int"),
            ({"a": "x"}, "client a must be a Dataset.*type str"),
            ({"a": type("NoLength", (), {"__getitem__": lambda self, i: i})()}, "client a must have a length"),
            ({"a": pairs(4), "b": Items(4, FORMS["a dict"])}, "built alike; got .* from client b, .* from a"),
            (
                {"a": Items(4, lambda i: (number(i), None))},
                "item 0 of client a .*must be such as can be collated.*None",
            ),
            ({"a": DataLoader(pairs(3), batch_size=4, drop_last=True, sampler=range(3))}, "client a .*got none"),
        ],
    )
    def test_it_is_refused_by_name_before_training(self, clients, words):
        with pytest.raises(DataError, match=words):
            of(clients)

    def test_an_item_that_cannot_be_read_is_named(self):
        def broken(i):
            if i == 3:
                raise OSError("truncated file")
            return number(i)

        with pytest.raises(DataError, match=r"item 3 of client north must be readable; got OSError: truncated file"):
            of({"north": Items(5, broken)})
        data = of({"north": Items(50, lambda i: {"x": broken(i)})}, batch_size=50)
        for workers in (0, 1):
            data = of({"north": Items(50, lambda i: {"x": broken(i)})}, batch_size=50, num_workers=workers)
            with pytest.raises(DataError, match=r"item 3 of client north must be readable; got OSError: truncated"):
                minibatches(data, num_steps=1)

    @pytest.mark.parametrize("limit", [1 << 20, 0])
    def test_unequal_shapes_name_client_and_item(self, limit):
        uneven = Items(9, lambda i: torch.zeros(3 if i == 5 else 2))
        with pytest.raises(DataError, match=r"item 5 of client north must be (?=.*\(2,\)).*\(3,\)"):
            minibatches(of({"north": uneven}, batch_size=9, memory_limit=limit), num_steps=1)

    def test_none_within_an_item_names_client_and_item(self):
        holes = Items(9, lambda i: {"x": number(i), "age": None if i == 4 else i})
        with pytest.raises(DataError, match=r"item 4 of client 0 .*an item that holds None.*age"):
            of([holes], batch_size=9)
        rare = Items(90, lambda i: {"x": number(i), "age": None if i == 4 else i})
        with pytest.raises(DataError, match=r"item 4 of client 0 .*an item that holds None.*age"):
            minibatches(of([rare], batch_size=90), num_steps=1)

    def test_deep_pictures_are_refused(self):
        with pytest.raises(DataError, match="item 0 of client 0 .*mode I;16, with more than 8 bits"):
            of([Items(4, lambda i: {"x": Image.new("I;16", (4, 4))})])


class TestOneDataset:
    def test_a_partition_divides_by_targets_and_keeps_items_where_they_are(self):
        whole = pairs(30)
        whole.targets = torch.arange(30) % 3
        for limit in (1 << 20, 0):
            data = divide(whole, partition=ClassesPerClient(1), num_clients=3, batch_size=4, memory_limit=limit)
            for k in range(3):
                assert all((y == k).all() for _, y in minibatches(data, k))

    @pytest.mark.parametrize("labels", [None, "kind", [i % 2 for i in range(20)], np.array(["b", "a"] * 10)])
    def test_labels_come_from_items_a_key_or_the_argument(self, labels):
        data = divide(
            Items(20, lambda i: {"x": number(i), "label": i % 2, "kind": str(i % 2)}),
            partition=ClassesPerClient(1),
            num_clients=2,
            labels=labels,
            batch_size=10,
        )
        assert [set((b["label"]).tolist()) for b in minibatches(data, 0, num_steps=2)] in ([{0}] * 2, [{1}] * 2)

    def test_a_natural_column_makes_one_client_per_value(self):
        items = Items(12, lambda i: {"x": number(i), "site": "north" if i % 3 else "south"})
        data = divide(items, by="site", batch_size=2)
        assert data.client_names == ("north", "south")
        assert [data.num_examples(k) for k in range(2)] == [8, 4]
        assert [divide(items, by=[i % 4 for i in range(12)]).num_clients, divide(items, num_clients=3).num_clients] == [
            4,
            3,
        ]
        with pytest.raises(DataError, match=r"item 0 of client of all must have a value of 'city'; got the keys"):
            divide(items, by="city")

    def test_an_unknown_partition_missing_labels_and_shifts_are_refused(self):
        items = Items(12, lambda i: {"x": number(i)})
        with pytest.raises(ConfigurationError, match="partition must be a Partition, or a partitioner"):
            divide(items, partition=3)
        with pytest.raises(DataError, match="ClassesPerClient must have labels"):
            divide(items, partition=ClassesPerClient(1))
        with pytest.raises(DataError, match="labels must have a value for each of 12 items; got 3"):
            divide(items, partition=ClassesPerClient(1), labels=[1, 2, 3])
        with pytest.raises(ConfigurationError, match="FeatureShift must have samples in memory"):
            divide(items, partition=FeatureShift(), num_clients=2)
        with pytest.raises(DataError, match="must have a length, and items by number"):
            divide(iter(()))
        shifted = divide(pairs(30), partition=FeatureShift(brightness=0.5), num_clients=2)
        assert shifted.shifts[0] != shifted.shifts[1]

    def test_positions_by_hand_must_be_there_once(self):
        assert divide(pairs(9), partition=GivenIndices([[0, 1], [8]]), num_clients=2).num_examples(1) == 1
        with pytest.raises(DataError, match="GivenIndices must list different positions in .0, 9. for 2 clients"):
            divide(pairs(9), partition=GivenIndices([[0, 1], [1]]), num_clients=2)


def test_the_fingerprint_follows_samples_sizes_and_order():
    def items(count=20, first=0):
        return Items(count, lambda i: {"x": number(i + first)})

    same = [of([items()], batch_size=4).fingerprint() for _ in range(2)]
    others = [
        of([items(21)], batch_size=4),
        of([items(first=1)], batch_size=4),
        of([items()], batch_size=5),
        of([items()], batch_size=4, seed=1),
        of([items()], batch_size=4, drop_last=False),
        of([DataLoader(items(), batch_size=4, sampler=range(20))]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *(own.fingerprint() for own in others)}) == 7
    assert isinstance(others[0], ClientDatasets)


def test_a_run_that_is_resumed_from_its_checkpoint_ends_as_the_undisturbed_one(tmp_path):
    def data():
        return of({"a": Items(22, lambda i: {"x": number(i), "noise": torch.rand(1)})}, batch_size=4)

    class Noisy(Seen):
        def training_step(self, batch, _):
            return (self.net(batch["x"] + batch["noise"]) / 30 - 1).square().mean()

    def run(rounds, ckpt_path=None):
        orchestrator = FederatedOrchestrator(rounds=rounds, local_steps=3, executor=SequentialExecutor())
        trainer = quiet_trainer(orchestrator)
        server = ServerModule(Noisy())
        trainer.fit(server, datamodule=data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return server.model.net.weight.detach().clone()

    whole = run(4)
    run(2)
    assert torch.equal(run(4, tmp_path / "last.ckpt"), whole)


class TestHuggingFace:
    """Data sets of Hugging Face, made in memory and read from disk."""

    @pytest.fixture
    def pictures(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(24)]
        made = datasets.Dataset.from_dict(
            {"image": images, "label": [i % 3 for i in range(24)], "site": list("ab") * 12}
        )
        made.save_to_disk(str(tmp_path / "set"))
        return datasets.load_from_disk(str(tmp_path / "set"))

    def test_a_set_is_divided_by_a_column_and_its_pictures_are_pixels(self, pictures):
        data = divide(pictures, by="site", batch_size=4)
        assert data.client_names == ("a", "b")
        (batch,) = minibatches(data, 0, num_steps=1)
        assert sorted(batch) == ["image", "label", "site"]
        assert batch["image"].shape == (4, 3, 4, 4)
        assert batch["site"] == ["a"] * 4
        assert torch.equal((batch["image"][:, 0, 0, 0] + 1).mul(127.5).round().long() % 3, batch["label"])
        assert len(trained(data)[0]) == 4

    def test_labels_divide_it_and_formats_are_kept(self, pictures):
        numbers = pictures.remove_columns(["image", "site"]).with_format("torch")
        data = divide(numbers, partition=ClassesPerClient(1), num_clients=3, batch_size=4, num_workers=1)
        assert [set(minibatches(data, k, num_steps=1)[0]["label"].tolist()) for k in range(3)] == [{0}, {1}, {2}]
        splits = pytest.importorskip("datasets").DatasetDict({"north": numbers, "south": numbers.select(range(5))})
        assert of(splits, batch_size=8).num_examples(1) == 5

    def test_its_streams_keep_their_order(self, pictures):
        data = of([pictures.to_iterable_dataset().remove_columns("image")], batch_size=5)
        assert data.num_examples(0) == 20
        assert minibatches(data, num_steps=1)[0]["label"].tolist() == [0, 1, 2, 0, 1]
