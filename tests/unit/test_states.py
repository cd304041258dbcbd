"""State algebra, policies, optimizer moments, the store, the ledger, seeds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from fedgan_lightning import states
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.aggregation import WeightedMean
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.store import ClientStore, StateFiles
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import ClientTask, ClientUpdate
from fedgan_lightning.seeding import derive_seed, isolated_rng
from fedgan_lightning.states import Kind
from tests.conftest import finish, ring_gan


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.critic = nn.Sequential(spectral_norm(nn.Linear(2, 3)), old_spectral_norm(nn.Linear(3, 1)))
        self.scale = nn.Parameter(torch.ones(1))


def test_every_entry_has_its_kind_and_network():
    entries = states.describe(Pair())
    kinds = {name: entry.kind for name, entry in entries.items()}
    assert kinds["generator.0.weight"] is Kind.PARAMETER
    assert kinds["generator.1.running_mean"] is Kind.STATISTIC
    assert kinds["generator.1.running_var"] is Kind.VARIANCE
    assert kinds["generator.1.num_batches_tracked"] is Kind.COUNTER
    assert kinds["critic.0.parametrizations.weight.original"] is Kind.PARAMETER
    assert kinds["critic.0.parametrizations.weight.0._u"] is Kind.SPECTRAL
    assert kinds["critic.1.weight_orig"] is Kind.PARAMETER
    assert {kinds["critic.1.weight_u"], kinds["critic.1.weight_v"]} == {Kind.SPECTRAL}
    assert entries["scale"].network == states.ROOT
    assert states.networks(Pair()) == (states.ROOT, "generator", "critic")


def test_merged_variance_is_that_of_the_pooled_data():
    """Four clients with means 0, 2, 4, 6 and unit variance: 6.0; the mean of the variances would say 1.0."""
    entries = {"m.running_mean": states.Entry("m", Kind.STATISTIC), "m.running_var": states.Entry("m", Kind.VARIANCE)}
    updates = []
    for client_id, mean in enumerate((0.0, 2.0, 4.0, 6.0)):
        buffers = {"m.running_mean": torch.full((1,), mean), "m.running_var": torch.ones(1)}
        updates.append(ClientUpdate(client_id, 10, {}, {}, states.encode_statistics(buffers, entries)))
    merged = states.decode_statistics(finish(WeightedMean(), updates).extras, entries)
    assert float(merged["m.running_mean"]) == pytest.approx(3.0)
    assert float(merged["m.running_var"]) == pytest.approx(6.0)
    wrong = np.mean([1.0 for _ in updates])
    assert abs(float(merged["m.running_var"]) - wrong) > 4, "the naive mean would have been caught"


def test_spectral_norm_holds_after_averaging_drifted_clients():
    """Averaging u and v as weights gives singular values far from 1; iterating them after loading repairs it."""
    torch.manual_seed(0)
    clients = []
    for _ in range(5):
        net = nn.Sequential(spectral_norm(nn.Linear(16, 16)), spectral_norm(nn.Linear(16, 16)))
        with torch.no_grad():
            for layer in net:
                layer.parametrizations.weight.original.add_(torch.randn(16, 16))
            for _ in range(20):
                net(torch.randn(4, 16))
        clients.append(net.state_dict())
    mean = {name: torch.stack([client[name] for client in clients]).mean(0) for name in clients[0]}

    def singular(net):
        net.eval()
        return [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in net]

    net = nn.Sequential(spectral_norm(nn.Linear(16, 16)), spectral_norm(nn.Linear(16, 16)))
    net.load_state_dict(mean)
    assert max(singular(net)) > 1.5, "the wrong way is visibly wrong"
    net.train()
    kinds = states.describe(net)
    states.load_entries(net, {n: v for n, v in mean.items() if kinds[n].kind is Kind.PARAMETER})
    states.refresh_spectral_norm(net)
    assert net.training
    assert all(0.95 <= value <= 1.05 for value in singular(net))


class TestPolicy:
    def test_defaults_average_everything_but_the_moving_average(self):
        policy = resolve(ring_gan(ema_half_life_images=10), sync=None, optimizer_state="average", buffers="merge")
        assert policy.sync == {"generator": "average", "discriminator": "average", "generator_ema": "server"}
        assert policy.absent_networks == ("generator_ema",)
        assert all(not name.startswith("generator_ema") for name in policy.shared_parameters)
        assert policy.private == []

    def test_local_networks_keep_their_moments_unless_told_otherwise(self):
        policy = resolve(ring_gan(), sync={"discriminator": "local"}, optimizer_state="reset", buffers="merge")
        assert policy.optimizer_state == {"generator": "reset", "discriminator": "keep"}
        assert {states.network_of(name) for name in policy.private} == {"discriminator"}
        explicit = resolve(
            ring_gan(), sync={"discriminator": "local"}, optimizer_state={"discriminator": "reset"}, buffers="merge"
        )
        assert explicit.optimizer_state["discriminator"] == "reset"

    def test_local_buffers_stay_with_the_client(self):
        merged, local = (resolve(Pair(), sync=None, optimizer_state="reset", buffers=b) for b in ("merge", "local"))
        assert "generator.1.running_var" in merged.shared_buffers
        assert local.shared_buffers == []
        assert "generator.1.running_var" in local.private

    @pytest.mark.parametrize(
        "options, words",
        [
            (
                {"sync": {"encoder": "average"}},
                "sync must name networks of the module, or patterns of its entries; got encoder. Choose from",
            ),
            (
                {"sync": {"generator": "sometimes"}},
                "one of average, local, server, served, exchange; got 'sometimes'",
            ),
            ({"optimizer_state": "forget"}, "one of reset, keep, average; got 'forget'"),
            ({"optimizer_state": {"critic": "keep"}}, "optimizer_state must name networks"),
            (
                {"sync": {"discriminator": "local"}, "optimizer_state": {"discriminator": "average"}},
                "moments must belong to averaged networks to be averaged",
            ),
            ({"buffers": "drop"}, "one of merge, local, estimate; got 'drop'"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options, words):
        options = {"sync": None, "optimizer_state": "reset", "buffers": "merge", **options}
        with pytest.raises(ConfigurationError, match=words):
            resolve(ring_gan(), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
)
def test_moments_survive_the_round_trip_and_the_next_step_is_the_same(make):
    def step(module, optimizer):
        module(torch.ones(3, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer, names = make(first.parameters()), [name for name, _ in first.named_parameters()]
    for _ in range(3):
        step(first, optimizer)
    moments = optimizer_state.collect(first, [optimizer], dict.fromkeys(names, "keep"))["keep"]
    assert all(name.startswith("optimizer/0/") for name in moments)
    second = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    second.load_state_dict(first.state_dict())
    fresh = make(second.parameters())
    optimizer_state.restore(second, [fresh], moments)
    step(first, optimizer)
    step(second, fresh)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    chosen = {name: "average" if name.startswith("1.") else "reset" for name in names}
    split = optimizer_state.collect(first, [optimizer], chosen)
    assert {name.split("/")[2] for name in split["average"]} == {"1.weight", "1.bias"}
    assert split["keep"] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=50),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5),
    ],
)
@pytest.mark.parametrize("warm", [True, False])
def test_the_clock_puts_a_fresh_schedule_where_it_was(make, warm):
    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, make(optimizer)

    optimizer, whole = fresh()
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    clock, found = optimizer_state.ScheduleClock(), []
    for start in range(0, 30, 5):
        optimizer, schedule = fresh()
        (clock if warm else optimizer_state.ScheduleClock()).forward([schedule], [start])
        for _ in range(5):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert found == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_store_forgets_what_was_not_committed(where, tmp_path):
    folders = iter(["first", "second"])

    def empty() -> ClientStore:
        return ClientStore(StateFiles(tmp_path / next(folders)) if where == "disk" else None)

    store = empty()
    store.write(3, {"w": torch.ones(2)})
    assert store.read(3) == {}
    store.commit()
    store.write(3, {"w": torch.zeros(2)})
    store.discard()
    assert store.read(3)["w"].tolist() == [1.0, 1.0]
    store.write(4, {})
    store.commit()
    assert len(store) == 1
    other = empty()
    other.load_state_dict(store.state_dict())
    assert other.read(3)["w"].tolist() == [1.0, 1.0]
    other.load_state_dict({})
    assert other.read(3) == {}
    assert len(other) == 0


def test_states_on_disk_are_files_by_client_and_those_of_an_earlier_run_are_removed(tmp_path):
    files = StateFiles(tmp_path)
    files[7] = {"generator.weight": torch.arange(6.0).view(2, 3).T, "optimizer/0/w/step": torch.tensor(3.0)}
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["client000007"]
    assert torch.equal(files[7]["generator.weight"], torch.arange(6.0).view(2, 3).T)
    assert files[7]["optimizer/0/w/step"].shape == ()
    before = files[7]["generator.weight"]
    files[7] = {"generator.weight": torch.zeros(3, 2)}
    assert before.sum() == 15, "what was read stays as it was"
    assert len(list(tmp_path.iterdir())) == 1, "the file of the state before is gone"
    assert len(StateFiles(tmp_path)) == 0
    assert not tmp_path.exists()


@pytest.mark.parametrize("source", ["plain", "packed"])
def test_what_is_stored_is_a_copy_in_one_vector_per_dtype(source):
    matrix, steps = torch.arange(6.0).view(2, 3), torch.tensor([3, 4])
    state = {"w": matrix[1], "optimizer/0/w/step": steps[1]}
    store = ClientStore()
    store.write(
        0, state if source == "plain" else Packed(Layout.of(state), {torch.float32: matrix[1], torch.int64: steps[1:]})
    )
    store.commit()
    matrix.zero_()
    steps.zero_()
    kept = store.read(0)
    assert (kept["w"].tolist(), int(kept["optimizer/0/w/step"])) == ([3.0, 4.0, 5.0], 4)
    assert kept.vectors[torch.float32].untyped_storage().nbytes() == 12, "a row does not keep the matrix of its stack"


def test_seeds_differ_in_every_argument_and_do_not_change_between_versions():
    seeds = {
        derive_seed(r, p, i, j) for r in range(3) for p in ("client", "cohort") for i in range(5) for j in range(5)
    }
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "client", 1, 2) == 6914143543034872968
    assert derive_seed(0, "client", 12) != derive_seed(0, "client", 1, 2)


def test_isolated_rng_restores_all_generators_even_after_an_error():
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    draws = []
    for _ in range(2):
        with pytest.raises(KeyError), isolated_rng(5):
            draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
            raise KeyError
    assert draws[0] == draws[1]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


def test_local_work_spans():
    assert ClientTask(0, 3, 0, {}, steps=5).span(steps_per_epoch=100) == (15, 5)
    assert ClientTask(0, 3, 0, {}, epochs=2).span(steps_per_epoch=10) == (60, 20)


def test_a_tied_parameter_travels_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = nn.Linear(3, 3), nn.Linear(3, 3)
            self.critic.weight = self.generator.weight

    assert "critic.weight" not in states.describe(Tied())
    assert {"generator.weight", "critic.bias"} <= set(states.describe(Tied()))


def test_the_clock_keeps_the_start_of_the_round_for_every_client():
    """Remembering one end twice used to evict the start, and the third client replayed the whole schedule."""

    class Counting(torch.optim.lr_scheduler.StepLR):
        steps = 0

        def step(self, *args):
            Counting.steps += 1
            super().step(*args)

    clock, replayed = optimizer_state.ScheduleClock(), []
    for start in range(0, 40, 5):
        for _ in range(4):
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
            schedule = Counting(optimizer, 7, 0.5)
            before = Counting.steps
            clock.forward([schedule], [start])
            replayed.append(Counting.steps - before)
            for _ in range(5):
                optimizer.step()
                schedule.step()
    assert replayed == [0] * 4 + [5, 0, 0, 0] * 7, "a round's own steps, once for all clients"


def test_a_schedule_that_does_not_count_is_refused():
    class Uncounted:
        """A schedule of somebody else's."""

    with pytest.raises(ConfigurationError, match="count their steps; got Uncounted"):
        optimizer_state.ScheduleClock().positions([Uncounted()])
