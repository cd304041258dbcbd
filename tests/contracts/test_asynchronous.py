"""Buffered asynchronous aggregation: the virtual clock by hand, limits in closed form, resume, executors, refusals.

Letters are those of the list of proofs in docs/methods.md, section 6.
"""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import (
    CheckpointError,
    ConfigurationError,
    DataError,
    FederatedOrchestrator,
    RoundRules,
    SecureAggregation,
    SequentialExecutor,
    ServerModule,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.algorithms import FedGAN, FedProx, Scaffold
from fedgan_lightning.asynchronous import Asynchronous, FixedDurations, LogNormalDurations, TraceDurations
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.virtual_clock import buffers
from fedgan_lightning.samplers import FractionOfClients
from fedgan_lightning.transforms import BFloat16, TopK
from tests.conftest import adam, assert_states_equal, federate, quiet_trainer, ring_data, ring_gan, sgd

EXECUTORS = {"sequential": SequentialExecutor, "vectorized": VectorizedExecutor}


def clock(*seconds, **options):
    return Asynchronous(durations=FixedDurations(by_client=seconds), **options)


def run(asynchronous, *, gan=None, executor=None, rules=None, **options):
    gan = ring_gan(optimizer=sgd).double() if gan is None else gan
    rules = RoundRules(asynchronous=asynchronous) if rules is None else rules
    options = {"rounds": 4, "local_steps": 2, "aggregator": WeightedMean("uniform"), **options}
    executor = SequentialExecutor() if executor is None else executor
    return federate(gan, ring_data(), rules=rules, executor=executor, **options)


def everything(result):
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.moments, **private}


# ---------------------------------------------------------------------- (d): the clock


def ages(settings_, count, *, num_clients=2):
    found = {}
    for version, own in enumerate(islice(buffers(settings_, num_clients=num_clients, seed=0), count)):
        for arrival in own.arrivals:
            found.setdefault(arrival.client_id, []).append((round(arrival.seconds, 9), version - arrival.version))
    return found


def test_two_clients_by_hand():
    """Durations 1 and 2.4, buffer 1."""
    found = ages(clock(1.0, 2.4, buffer_size=1), 14)
    assert [age for _, age in found[1]] == [2, 2, 3, 2]
    assert [seconds for seconds, _ in found[1]] == [2.4, 4.8, 7.2, 9.6]
    assert [age for _, age in found[0]] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert [seconds for seconds, _ in found[0]] == [float(t) for t in range(1, 11)]


def test_a_buffer_as_large_as_the_cohort_is_a_barrier():
    found = ages(clock(1.0, 2.4, 5.0, buffer_size=3), 6, num_clients=3)
    assert all(age == 0 for own in found.values() for _, age in own)
    rounds = list(islice(buffers(clock(1.0, 2.4, 5.0, buffer_size=3), num_clients=3, seed=0), 4))
    assert [own.seconds for own in rounds] == [5.0, 10.0, 15.0, 20.0]


@given(
    seconds=st.lists(st.floats(0.1, 20.0), min_size=1, max_size=8),
    data=st.data(),
    most=st.one_of(st.none(), st.integers(0, 3)),
)
@settings(max_examples=80)
def test_whatever_the_times_a_buffer_is_filled_by_different_clients(seconds, data, most):
    count = len(seconds)
    at_work = data.draw(st.integers(1, count))
    size = data.draw(st.integers(1, at_work))
    options = {"buffer_size": size, "concurrency": at_work, "most_stale": most}
    last = 0.0
    for version, own in enumerate(islice(buffers(clock(*seconds, **options), num_clients=count, seed=1), 30)):
        clients = [arrival.client_id for arrival in own.arrivals]
        assert len(clients) == len({*clients}) == size
        assert all(
            0 <= version - arrival.version <= (most if most is not None else version) for arrival in own.arrivals
        )
        assert last <= own.seconds
        assert len(own.at_work) == at_work
        assert all(0 <= started <= version + 1 for started in own.at_work.values())
        last = own.seconds


def test_with_fewer_at_work_everybody_has_a_turn():
    settings_ = Asynchronous(buffer_size=2, concurrency=3, durations=LogNormalDurations(spread=1.0, jitter=0.5))
    found = list(islice(buffers(settings_, num_clients=20, seed=0), 200))
    assert len({arrival.client_id for own in found for arrival in own.arrivals}) == 20


def test_durations_are_those_of_their_distribution():
    drawn = LogNormalDurations(median=3.0, spread=0.7)
    logs = torch.tensor([math.log(drawn.seconds(k, number=0, seed=0)) for k in range(2000)])
    assert float(logs.mean()) == pytest.approx(math.log(3.0), abs=0.06)
    assert float(logs.std()) == pytest.approx(0.7, abs=0.04)
    assert drawn.seconds(3, number=0, seed=0) == drawn.seconds(3, number=9, seed=0)
    assert LogNormalDurations(jitter=0.1).seconds(3, number=0, seed=0) != LogNormalDurations(jitter=0.1).seconds(
        3, number=1, seed=0
    )


def test_times_come_from_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,seconds\n0,1.5\n1,2\n0,2.5\n")
    trace = TraceDurations(path=str(path))
    assert [trace.seconds(0, number=k, seed=0) for k in range(3)] == [1.5, 2.5, 1.5]
    with pytest.raises(ConfigurationError, match="all 3 clients; got 2"):
        trace.check(num_clients=3)
    path.write_text("client,seconds\n0,-1\n")
    with pytest.raises(DataError, match="above 0"):
        TraceDurations(path=str(path))


# ---------------------------------------------------------------------- (a): synchronous federations


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["SGD", "Adam"])
def test_with_a_buffer_of_all_it_is_the_synchronous_federation_to_the_bit(optimizer, executor):
    found = [
        run(None, rules=rules, gan=ring_gan(optimizer=optimizer), executor=EXECUTORS[executor]())
        for rules in (RoundRules(), RoundRules(asynchronous=clock(1.0, 3.0, 2.0, 9.0, buffer_size=4)))
    ]
    assert_states_equal(*map(everything, found))


# ---------------------------------------------------------------------- (c): mass; staleness


def recorded(asynchronous, **options):
    """Return the server's parameters at both ends, and every accepted update with its age."""
    seen = []

    class Watch(SequentialExecutor):
        def run(self, tasks):
            for update in super().run(tasks):
                seen.append(update)
                yield update

    gan = ring_gan(optimizer=sgd).double()
    start = {name: value.detach().clone() for name, value in gan.named_parameters()}
    server, orchestrator, _ = run(asynchronous, gan=gan, executor=Watch(), **options)
    return start, server, seen, orchestrator


@pytest.mark.parametrize("kind", ["constant", "polynomial", "hinge"])
def test_the_server_moves_by_the_discounted_sum_over_k(kind):
    settings_ = clock(1.0, 2.4, 7.0, 4.0, buffer_size=2, staleness=kind, exponent=0.7, hinge=1)
    start, server, seen, _ = recorded(settings_, rounds=9)
    mass = {name: torch.zeros_like(value) for name, value in start.items()}
    rounds = list(islice(buffers(settings_, num_clients=4, seed=0), 9))
    order = [(version, k) for version, own in enumerate(rounds) for k in sorted(a.client_id for a in own.arrivals)]
    assert [update.client_id for update in seen] == [k for _, k in order]
    stale = 0
    for (version, _), update in zip(order, seen):
        tau = version - update.round
        stale += tau > 0
        factor = {
            "constant": 1.0,
            "polynomial": (1 + tau) ** -0.7,
            "hinge": 1.0 if tau <= 1 else 1 / (0.7 * (tau - 1) + 1),
        }
        for name, value in update.delta.items():
            mass[name] += factor[kind] * value / 2
    assert stale > 3
    for name, value in server.model.named_parameters():
        torch.testing.assert_close(value.detach() - start[name], mass[name], atol=1e-12, rtol=1e-9)


def test_clients_start_from_the_networks_that_they_were_given():
    """The start of a client's round is the server's state of its version, and no newer one."""
    states, started = {}, []

    class Watch(SequentialExecutor):
        def run(self, tasks):
            for task in tasks:
                started.append((task.round, {n: v.clone() for n, v in task.state.items()}))
                yield from super().run([task])

    import lightning as L

    class Remember(L.Callback):
        def on_round_start(self, trainer, server, info):
            states[info.round] = {n: v.detach().clone() for n, v in server.model.named_parameters()}

    from fedgan_lightning import FederatedOrchestrator as Orchestrator

    own = Orchestrator(
        rounds=6, local_steps=1, executor=Watch(),
        rules=RoundRules(asynchronous=clock(1.0, 2.4, 5.0, 3.0, buffer_size=1)),
    )  # fmt: skip
    quiet_trainer(own, Remember()).fit(ServerModule(ring_gan(optimizer=sgd)), datamodule=ring_data())
    assert any(version < number for number, (version, _) in enumerate(started))
    for version, state in started:
        assert_states_equal({n: state[n] for n in states[version]}, states[version])


def test_towards_the_model_is_fedasync():
    """w <- w + alpha s(tau) (w_i - w), one arrival at a time."""
    settings_ = clock(1.0, 2.4, 5.0, 3.0, buffer_size=1, toward="model", staleness="polynomial", exponent=0.5)
    gan = ring_gan(optimizer=sgd).double()
    versions = [{name: value.detach().clone() for name, value in gan.named_parameters()}]
    own = ServerModule(gan, optimizer=lambda p: torch.optim.SGD(p, lr=0.6))
    _, server, seen, _ = recorded(settings_, rounds=7, server=own)
    for number, update in enumerate(seen):
        now, then = versions[-1], versions[update.round]
        factor = 0.6 * (1 + number - update.round) ** -0.5
        versions.append({n: v + factor * (then[n] + update.delta[n] - v) for n, v in now.items()})
    assert any(update.round < number for number, update in enumerate(seen))
    for name, value in server.model.named_parameters():
        torch.testing.assert_close(value.detach(), versions[-1][name], atol=1e-12, rtol=1e-9)


def test_a_code_on_the_way_down_leaves_where_a_client_s_networks_lead():
    """At weight 1 the server's networks become those of the client, though it began with rounded ones."""
    settings_ = clock(1.0, 2.4, 5.0, 3.0, buffer_size=1, toward="model", staleness="constant")
    ends = {}

    class Watch(FedGAN):
        def answer(self, visit):
            ends[visit.tasks[0].round] = {n: own.clone() for n, own in visit.parameters.items()}
            return super().answer(visit)

    down = [BFloat16(sections=["updates"], down="only")]
    _, server, seen, _ = recorded(settings_, rounds=5, algorithm=Watch(), transforms=down)
    wanted = ends[seen[-1].round]
    assert_states_equal(dict(server.model.named_parameters()), wanted, atol=1e-12, rtol=0.0)


def test_the_ledger_counts_what_each_client_was_given():
    """The first networks have no moments with them, and clients that got these answer for rounds."""
    sent = []

    class Watch(SequentialExecutor):
        def run(self, tasks):
            for task in tasks:
                sent.append(sum(bytes_by_network(task.state).values()))
                yield from super().run([task])

    options = {"gan": ring_gan(optimizer=adam), "rounds": 6, "optimizer_state": "average", "executor": Watch()}
    _, orchestrator, _ = run(clock(1.0, 2.4, 7.0, 4.0, buffer_size=2), **options)
    assert len({*sent}) == 2
    assert sum(orchestrator.ledger.bytes_down.values()) == sum(sent)


# ---------------------------------------------------------------------- (b): stability under delay


@pytest.mark.parametrize("delay, limit", enumerate([2.0, 1.0, 0.6180, 0.4450, 0.3473, 0.2846]))
def test_a_delay_lowers_the_largest_stable_step(delay, limit):
    """f = w^2 / 2, tau + 1 equal clients in turn, buffer 1: stable iff eta < 2 sin(pi / (2 (2 tau + 1)))."""
    assert limit == pytest.approx(2 * math.sin(math.pi / (2 * (2 * delay + 1))), abs=1e-4)
    settings_ = clock(*[1.0 + 1e-9 * k for k in range(delay + 1)], buffer_size=1, staleness="constant")
    order = list(islice(buffers(settings_, num_clients=delay + 1, seed=0), 3000))
    taus = [version - own.arrivals[0].version for version, own in enumerate(order)]
    assert {*taus[delay:]} == {delay}
    for factor, converges in ((0.98, True), (1.02, False)):
        path = [1.0]
        for own in order:
            path.append(path[-1] - factor * limit * path[own.arrivals[0].version])
            if abs(path[-1]) > 1e6:
                break
        assert (abs(path[-1]) < 1e-2) == converges


# ---------------------------------------------------------------------- (e): resume; executors; faults


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(cut, executor, tmp_path):
    def options():
        asynchronous = clock(1.0, 2.4, 7.0, 4.0, buffer_size=2)
        return {
            "rules": RoundRules(asynchronous=asynchronous),
            "executor": EXECUTORS[executor](),
            "transforms": [TopK(), BFloat16(sections=["updates"], down="only")],
        }

    whole = run(None, gan=ring_gan(optimizer=adam), **options(), rounds=7)
    _, _, trainer = run(None, gan=ring_gan(optimizer=adam), **options(), rounds=cut)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = FederatedOrchestrator(rounds=7, local_steps=2, aggregator=WeightedMean("uniform"), **options())
    server, trainer = ServerModule(ring_gan(optimizer=adam, seed=7)), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert_states_equal(everything((server, again, trainer)), everything(whole))
    assert again.ledger.bytes_down == whole[1].ledger.bytes_down


@pytest.mark.parametrize("before", [None, clock(1.0, 2.4, 7.0, 4.0, buffer_size=2)], ids=["synchronous", "clock"])
@pytest.mark.parametrize(
    "now", [clock(1.5, 2.4, 7.0, 4.0, buffer_size=2), clock(1.0, 2.4, 7.0, 4.0, buffer_size=3)], ids=["times", "buffer"]
)
def test_another_clock_is_refused_accepted_or_not(before, now, tmp_path):
    """It would say of rounds that are over, too, who worked on what."""
    _, _, trainer = run(before, rounds=3)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    for accepted in (False, True):
        again = FederatedOrchestrator(
            rounds=6, local_steps=2, aggregator=WeightedMean("uniform"), rules=RoundRules(asynchronous=now),
            executor=SequentialExecutor(),
        )  # fmt: skip
        again.accept_changes = accepted
        with pytest.raises(CheckpointError, match="federation.rules.asynchronous") as refused:
            quiet_trainer(again).fit(
                ServerModule(ring_gan(optimizer=sgd).double()), datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt"
            )
        assert "accept_changes" not in str(refused.value)


def test_how_late_updates_count_may_be_changed_where_that_is_accepted(tmp_path):
    def times(**options):
        return clock(1.0, 2.4, 7.0, 4.0, buffer_size=2, **options)

    _, _, trainer = run(times(), rounds=3)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = FederatedOrchestrator(
        rounds=6, local_steps=2, aggregator=WeightedMean("uniform"), executor=SequentialExecutor(),
        rules=RoundRules(asynchronous=times(staleness="hinge")),
    )  # fmt: skip
    again.accept_changes = True
    server, trainer = ServerModule(ring_gan(optimizer=sgd).double()), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert server.rounds_completed == 6


def test_stacked_clients_are_each_alone():
    """Versions of one round may differ, and each client starts from its own."""
    found = [
        everything(
            run(
                clock(1.0, 2.4, 7.0, 4.0, buffer_size=3),
                gan=ring_gan(optimizer=adam).double(),
                executor=own(),
                rounds=6,
            )
        )
        for own in (SequentialExecutor, VectorizedExecutor)
    ]
    assert_states_equal(*found, atol=1e-12, rtol=1e-9)


def test_only_networks_that_somebody_works_on_are_kept():
    _, orchestrator, _ = run(clock(1.0, 2.4, 50.0, 4.0, buffer_size=1), rounds=12)
    versions = {int(version) for version in orchestrator.arrivals.state_dict()["versions"]}
    assert 0 in versions  # of the slow one
    assert len(versions) <= 5


def test_what_fails_is_tried_again_and_what_lies_is_left_out():
    rules = RoundRules(min_report_fraction=0.5, asynchronous=clock(1.0, 2.4, 7.0, 4.0, buffer_size=3))
    executor = FaultyExecutor(SequentialExecutor(), nan=0.3, crash=0.2)
    server, orchestrator, _ = run(None, rules=rules, executor=executor, validator=UpdateValidator(), rounds=8)
    assert server.rounds_completed == 8
    assert {"rejected", "failed"} <= orchestrator.ledger.events.keys()


def test_the_age_of_updates_is_reported():
    import lightning as L

    seen = []

    class Look(L.Callback):
        def on_round_end(self, trainer, server, info, metrics):
            seen.append({name: own for name, own in metrics.items() if name.startswith("staleness/")})

    own = FederatedOrchestrator(
        rounds=5, local_steps=1, executor=SequentialExecutor(),
        rules=RoundRules(asynchronous=clock(1.0, 2.4, 9.0, 9.0, buffer_size=1)),
    )  # fmt: skip
    quiet_trainer(own, Look()).fit(ServerModule(ring_gan(optimizer=sgd)), datamodule=ring_data())
    assert [own["staleness/mean"] for own in seen] == [0.0, 0.0, 2.0, 1.0, 0.0]
    assert [own["staleness/virtual_seconds"] for own in seen] == [1.0, 2.0, 2.4, 3.0, 4.0]


def test_fedprox_holds_clients_near_what_they_were_given():
    found = [
        run(clock(1.0, 2.4, 7.0, 4.0, buffer_size=2), algorithm=FedProx(mu=1.0), executor=own(), rounds=5)
        for own in EXECUTORS.values()
    ]
    assert_states_equal(*map(everything, found), atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------------- what is refused before the first round


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: run(clock(1.0, 2.0, buffer_size=1)), "must be those of all 4 clients; got 2"),
        (lambda: run(Asynchronous(buffer_size=5)), "buffer_size must be at most 4, the clients at work; got 5"),
        (lambda: run(Asynchronous(buffer_size=2, concurrency=9)), "concurrency must be at most 4"),
        (lambda: run(Asynchronous(buffer_size=2), clients=FractionOfClients(0.5)), "must be left to the clock"),
        (lambda: run(Asynchronous(buffer_size=2), algorithm=Scaffold()), "got rules.asynchronous. Leave rules.async"),
        (lambda: FixedDurations(by_client=[1.0, 0.0]), "by_client of FixedDurations"),
        (lambda: Asynchronous(exponent=0.0), "exponent"),
        (
            lambda: RoundRules(asynchronous=Asynchronous(), stale_updates="discount"),
            "leave late updates to the buffer; got rules.stale_updates=discount",
        ),
        (
            lambda: RoundRules(asynchronous=Asynchronous(), over_selection=1.5),
            "got rules.over_selection=1.5",
        ),
        (
            lambda: FederatedOrchestrator(
                secure=SecureAggregation(max_update=1.0), rules=RoundRules(asynchronous=Asynchronous())
            ),
            "rules.asynchronous",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_nobody_works_twice_on_the_same_networks():
    """The same seed, networks and minibatches would give the same update again."""
    settings_ = Asynchronous(buffer_size=4, concurrency=4, durations=LogNormalDurations(spread=1.5))
    found = [
        (arrival.client_id, arrival.version)
        for own in islice(buffers(settings_, num_clients=8, seed=0), 300)
        for arrival in own.arrivals
    ]
    assert len(found) == len({*found})


@pytest.mark.parametrize("buffer_size", [1, 4])
def test_schedules_of_clients_move_by_the_steps_of_a_round(buffer_size):
    """Whatever the age of an answer: after 12 rounds of two steps they stand at 24, as in a synchronous federation."""
    gan = ring_gan(
        optimizer=sgd, discriminator_scheduler=lambda own: torch.optim.lr_scheduler.StepLR(own, step_size=1000)
    )
    _, orchestrator, _ = run(clock(4.0, 4.1, 4.2, 4.3, buffer_size=buffer_size), gan=gan, rounds=12)
    assert orchestrator._clock.schedules == (24,)


def test_a_trace_is_known_by_its_times_and_not_by_its_name(tmp_path):
    """A file that has moved goes on, and one whose times have changed does not."""

    def trace(name, *seconds):
        (tmp_path / name).write_text("client,seconds\n" + "".join(f"{k},{own}\n" for k, own in enumerate(seconds)))
        return Asynchronous(durations=TraceDurations(path=str(tmp_path / name)), buffer_size=2)

    _, _, trainer = run(trace("a.csv", 1.0, 2.4, 7.0, 4.0), rounds=3)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def again(asynchronous):
        federation = FederatedOrchestrator(
            rounds=5, local_steps=2, aggregator=WeightedMean("uniform"), executor=SequentialExecutor(),
            rules=RoundRules(asynchronous=asynchronous),
        )  # fmt: skip
        federation.accept_changes = True
        server = ServerModule(ring_gan(optimizer=sgd).double())
        quiet_trainer(federation).fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
        return server.rounds_completed

    assert again(trace("b.csv", 1.0, 2.4, 7.0, 4.0)) == 5
    with pytest.raises(CheckpointError, match="by the same one.*Restore federation.rules.asynchronous"):
        again(trace("a.csv", 1.5, 2.4, 7.0, 4.0))
