"""Round rules and validation: who is asked, who is let in, when a round counts, and what a failing client changes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fedgan_lightning import (
    FederatedOrchestrator,
    RoundRules,
    SequentialExecutor,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import CoordinateMedian, Krum
from fedgan_lightning.errors import ConfigurationError, QuorumError, UpdateError
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.federation import rules as round_rules
from fedgan_lightning.federation.report import RoundReport
from fedgan_lightning.federation.schema import Schema
from fedgan_lightning.federation.selection import ClientSelection
from fedgan_lightning.federation.update_checks import check_size
from fedgan_lightning.protocol import ClientFailure, ClientReport, ClientUpdate
from fedgan_lightning.samplers import (
    AllClients,
    AvailableClients,
    FractionOfClients,
    PoissonSampling,
    SelectedClients,
)
from fedgan_lightning.transforms import ClipUpdates, LogMoments
from tests.conftest import adam, assert_states_equal, federate, quiet_trainer, ring_data, ring_gan, sgd

FAULTS = ("crash", "hang", "slow", "nan", "wrong_shape", "wrong_keys", "stale", "huge_norm")
FAULTS += ("wrong_size", "wrong_counts", "wrong_moments")


def faulty(executor=None, **options) -> FaultyExecutor:
    return FaultyExecutor(executor if executor is not None else SequentialExecutor(), **options)


def run(*, optimizer=sgd, rounds: int = 3, num_clients: int = 4, **options):
    data = ring_data(num_clients=num_clients)
    return federate(ring_gan(optimizer=optimizer), data, rounds=rounds, local_steps=2, **options)


def weights(result):
    return result[0].model.state_dict()


# ---------------------------------------------------------------------- validation


def update(**changes) -> ClientUpdate:
    fields = {"client_id": 3, "num_examples": 10, "delta": {"g.w": torch.ones(2, 2)}, "metrics": {}, "extras": {}}
    return ClientUpdate(**{**fields, **changes})


def checked(own: ClientUpdate) -> None:
    """Do to an update of somebody with 10 examples, or more than allowed, what the server does to all."""
    who, schema = f"client {own.client_id}", Schema({"delta": {"g.w": torch.zeros(2, 2)}, "extras": {}})
    check_size(who, own.num_examples, size=max(10, own.num_examples))
    delta, extras = schema.fitted(who, own.delta, own.extras, known={})
    schema.check(who, delta, extras, known={}, steps=(0, 100))
    UpdateValidator(max_norm=10.0, max_examples=100).check(own)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"delta": {"g.v": torch.ones(2, 2)}}, "differs in the entries g.v, g.w"),
        ({"delta": {"g.w": torch.ones(4)}}, r"g.w has shape \[4\], not \[2, 2\]"),
        ({"delta": {"g.w": torch.ones(2, 2).double()}}, "g.w is torch.float64, not torch.float32"),
        ({"delta": {"g.w": torch.tensor([[1.0, torch.nan], [0, 0]])}}, "g.w is not finite"),
        ({"extras": {"g.m": torch.ones(1)}}, "extras differs in the entries g.m"),
        ({"num_examples": 0}, "counts 0 examples"),
        ({"num_examples": 101}, "claims 101 examples, above the cap of 100"),
        ({"delta": {"g.w": torch.full((2, 2), 5.1)}}, "norm is 10.2, above the bound of 10"),
    ],
)
def test_what_cannot_be_right_is_refused_with_client_and_reason(changes, reason):
    checked(update())
    with pytest.raises(UpdateError, match=f"client 3: .*{reason}"):
        checked(update(**changes))


def test_what_clients_send_is_what_the_server_expects():
    for optimizer in (sgd, adam):
        result = run(optimizer=optimizer, validator=UpdateValidator())
        assert_states_equal(weights(result), weights(run(optimizer=optimizer)))
        assert result[1].ledger.events == {}


# ---------------------------------------------------------------------- one fault after the other


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_client_changes_nothing_for_the_others(fault):
    """The result is that of a run without it."""
    broken = run(
        executor=faulty(always={1: fault}),
        rules=RoundRules(min_report_fraction=0.5),
        validator=UpdateValidator(max_norm=100.0),
    )
    without = run(clients=SelectedClients([0, 2, 3]))
    assert_states_equal(weights(broken), weights(without))
    events, kind = broken[1].ledger.events, "failed" if fault in ("crash", "hang", "slow") else "rejected"
    assert events[kind] == 3
    named = [incident for incident in broken[1].ledger.incidents if incident["kind"] == kind]
    assert {incident["client_id"] for incident in named} == {1}
    assert all(incident["reason"] for incident in named)
    if fault == "slow":
        assert events["late"] == 2, "what came a round too late was dropped"


def test_a_client_that_answers_twice_counts_once_in_every_executor():
    for make in (SequentialExecutor, VectorizedExecutor):
        result = run(executor=faulty(make(), always={1: "twice"}), validator=UpdateValidator())
        assert_states_equal(weights(result), weights(run(executor=make())))
        assert result[1].ledger.events == {"rejected": 3}
        assert result[1].ledger.client_steps == 3 * 4 * 2
    with pytest.raises(UpdateError, match="client 1: was not asked, or has answered already. Mend this client"):
        run(executor=faulty(always={1: "twice"}))


@pytest.mark.parametrize("optimizer", [adam, sgd], ids=["moments", "no moments"])
@pytest.mark.parametrize("fault", ["wrong_size", "wrong_counts", "wrong_moments"])
def test_claims_are_not_believed_in_any_executor(fault, optimizer):
    """The others' result is that of a run without the liar; without a validator the run ends with its name."""
    for make in (SequentialExecutor, VectorizedExecutor):
        options = {"optimizer": optimizer, "rules": RoundRules(min_report_fraction=0.5), "validator": UpdateValidator()}
        broken = run(executor=faulty(make(), always={1: fault}), **options)
        without = run(executor=make(), clients=SelectedClients([0, 2, 3]), optimizer=optimizer)
        assert_states_equal(weights(broken), weights(without), atol=0 if make is SequentialExecutor else 1e-6)
        summary = json.loads(json.dumps(broken[1].ledger.summary(), allow_nan=False))
        assert summary["events"] == {"rejected": 3}
        assert summary["client_steps"] == 3 * 4 * 2
        assert summary["client_seconds"] > 0
        with pytest.raises(UpdateError, match="client 1: .* Mend this client"):
            run(executor=faulty(make(), always={1: fault}), optimizer=optimizer)


@pytest.mark.parametrize("fault", ["sign_flip", "noise"])
def test_attackers_send_updates_as_long_as_they_are_told(fault):
    data, lengths = ring_data(), {}
    for scale in (1.0, 10.0):
        executor = faulty(always={1: fault}, attack_scale=scale)
        server, *_ = federate(
            ring_gan(), data, rounds=1, local_steps=2, clients=SelectedClients([1]), executor=executor
        )
        start = ring_gan().state_dict()
        moved = [value - start[name] for name, value in server.model.state_dict().items()]
        lengths[scale] = float(sum(value.square().sum() for value in moved) ** 0.5)
        assert executor.facts()["attack_scale"] == scale
    assert lengths[10.0] == pytest.approx(10 * lengths[1.0], rel=1e-4)
    with pytest.raises(ConfigurationError, match="attack_scale .* above 0; got 0"):
        faulty(attack_scale=0)


def test_without_screening_an_update_that_cannot_be_right_ends_the_run():
    with pytest.raises(UpdateError, match="client 1"):
        run(executor=faulty(always={1: "nan"}))


def test_late_updates_count_at_a_discount():
    rules = {"min_report_fraction": 0.5, "stale_updates": "discount"}
    half, tenth = (
        run(rounds=2, executor=faulty(always={1: "slow"}), rules=RoundRules(discount=d, **rules)) for d in (0.5, 0.1)
    )
    dropped = run(rounds=2, executor=faulty(always={1: "slow"}), rules=RoundRules(min_report_fraction=0.5))

    def distance(result):
        return math.sqrt(sum(float((weights(result)[n] - v).square().sum()) for n, v in weights(dropped).items()))

    assert 0 < distance(tenth) < distance(half)


def test_the_discount_is_a_factor_on_the_weight():
    from fedgan_lightning.aggregators import WeightedMean
    from tests.conftest import finish

    late = update(client_id=1, num_examples=30, delta={"g.w": torch.ones(2, 2)}, discount=0.5)
    result = finish(WeightedMean(), [update(num_examples=45, delta={"g.w": torch.zeros(2, 2)}), late])
    torch.testing.assert_close(result.delta["g.w"], torch.full((2, 2), 15 / 60))


def test_clients_with_enough_strikes_are_not_asked_any_more():
    _, orchestrator, _ = run(
        rounds=5,
        executor=faulty(always={2: "nan"}),
        rules=RoundRules(min_report_fraction=0.5),
        validator=UpdateValidator(strikes=2),
    )
    assert orchestrator.ledger.events == {"rejected": 2}
    assert orchestrator.ledger.client_runs == 4 + 4 + 3 + 3 + 3


# ---------------------------------------------------------------------- enough of them


def test_a_round_without_enough_answers_is_abandoned_and_tried_with_a_new_cohort():
    asked = []

    class Watching(SequentialExecutor):
        def run(self, tasks):
            listed = list(tasks)
            asked.append((listed[0].round, tuple(task.client_id for task in listed)))
            yield from super().run(listed)

    executor = faulty(Watching(), always={0: "crash", 1: "crash", 2: "crash"})
    result = run(
        rounds=4,
        num_clients=8,
        executor=executor,
        clients=FractionOfClients(0.5),
        rules=RoundRules(min_report_fraction=0.75, max_attempts=None),
    )
    abandoned = result[1].ledger.events["abandoned"]
    assert abandoned >= 1
    assert len(asked) == 4 + abandoned
    assert result[2].global_step == 4
    by_round: dict[int, set] = {}
    for round, cohort in asked:
        by_round.setdefault(round, set()).add(cohort)
    assert max(map(len, by_round.values())) > 1, "the second try asks others"


def test_an_abandoned_round_leaves_no_trace_in_client_state():
    options = {"sync": {"discriminator": "local"}, "rounds": 3}
    shaky = faulty(always={3: "crash"})
    with pytest.raises(QuorumError):
        run(executor=shaky, rules=RoundRules(min_report_fraction=1.0, max_attempts=2), **options)
    rates = {"crash": 0.4}
    result = run(executor=faulty(**rates), rules=RoundRules(min_report_fraction=1.0, max_attempts=None), **options)
    assert result[1].ledger.events["abandoned"] >= 1
    # Every client trained three times for good: its private optimizer says so, whatever was tried in between.
    for client_id in range(4):
        steps = [v for n, v in result[1].store.read(client_id).items() if n.endswith("/step")]
        assert all(float(step) == 6 for step in steps)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_is_not_let_in_keeps_its_private_state(fault):
    """Its round did not happen: neither in the average nor in its discriminator and moments."""
    rules, validator = RoundRules(min_report_fraction=0.5), UpdateValidator(max_norm=100.0)
    options = {"sync": {"discriminator": "local"}, "optimizer": adam, "rules": rules, "validator": validator}
    result = run(executor=faulty(always={1: fault}), **options)
    assert result[1].store.read(1) == {}
    assert all(result[1].store.read(client_id) for client_id in (0, 2, 3))


def test_a_late_update_that_is_refused_does_not_close_the_door_to_this_rounds():
    class LateAndBad(SequentialExecutor):
        """Client 1 answers every round, and once more the round before, with NaN."""

        def run(self, tasks):
            for own in super().run(tasks):
                if own.client_id == 1 and own.round:
                    nans = {name: torch.full_like(value, torch.nan) for name, value in own.delta.items()}
                    yield dataclasses.replace(own, round=own.round - 1, delta=nans)
                yield own

    late = RoundRules(stale_updates="discount")
    result = run(executor=LateAndBad(), rules=late, validator=UpdateValidator())
    assert result[1].ledger.events == {"rejected": 2}
    assert_states_equal(weights(result), weights(run(rules=late)))


@pytest.mark.parametrize("validator", [None, UpdateValidator()], ids=["plain", "validated"])
def test_a_late_failure_does_not_close_the_door_to_this_rounds_answer(validator):
    class LateFailure(SequentialExecutor):
        """Client 1 answers every round, after news that it failed the round before."""

        def run(self, tasks):
            for own in super().run(tasks):
                if own.client_id == 1 and own.round:
                    yield ClientFailure(1, own.round - 1, stage="reply", cause="an error, at last")
                yield own

    options = {"sync": {"discriminator": "local"}, "validator": validator}
    result = run(executor=LateFailure(), **options)
    assert result[1].ledger.events == {"failed": 2}
    assert_states_equal(weights(result), weights(run(**options)))
    assert result[1].ledger.bytes_down == run(**options)[1].ledger.bytes_down


@pytest.mark.parametrize("late", ["drop", "discount"])
def test_an_answer_that_claims_the_round_before_keeps_no_private_state(late):
    class Claiming(SequentialExecutor):
        def run(self, tasks):
            for own in super().run(tasks):
                yield dataclasses.replace(own, round=own.round - 1) if own.client_id == 1 else own

    rules = RoundRules(min_report_fraction=0.5, stale_updates=late)
    result = run(executor=Claiming(), rules=rules, sync={"discriminator": "local"}, validator=UpdateValidator())
    assert result[1].ledger.events == {"late": 3}
    assert result[1].store.read(1) == {}
    assert result[1].store.read(0)


def test_a_lost_quorum_ends_the_run_with_a_named_error():
    with pytest.raises(QuorumError, match=r"must have 100% of its cohort; got fewer in each of 3 attempts of round 0"):
        run(executor=faulty(always={0: "hang"}), rules=RoundRules(max_attempts=3))


def test_a_run_of_which_all_clients_are_benched_ends_with_a_named_error():
    """It would otherwise come to its end with untrained weights."""
    with pytest.raises(QuorumError, match=r"left to be asked; got 0: 2 updates or more of clients \[0, 1, 2, 3\]"):
        run(
            rounds=9,
            validator=UpdateValidator(max_norm=1e-9, strikes=2),
            rules=RoundRules(min_report_fraction=0.25, max_attempts=20),
        )


def test_a_cohort_of_fewer_than_a_robust_rule_needs_is_filled_up():
    """By those whom chance has left out; a cohort that it left empty is a round without an update, as ever."""
    sizes = []

    class Counting(SequentialExecutor):
        def run(self, tasks):
            listed = list(tasks)
            sizes.append(len({task.client_id for task in listed}))
            yield from super().run(listed)

    options = {"clients": PoissonSampling(0.7), "aggregator": Krum(num_bad=1), "rules": RoundRules(max_attempts=1)}
    result = run(num_clients=8, rounds=9, executor=Counting(), **options)
    assert result[2].global_step == 9
    drawn = [len(PoissonSampling(0.7).sample(num_clients=8, round=r, seed=0)) for r in range(9)]
    assert sizes == [max(size, 5) if size else 0 for size in drawn]
    assert min(drawn) < 5, "a positive control"


def invitations(sampler, *, strikes, **options) -> ClientSelection:
    how = {"num_clients": 3, "rules": RoundRules(), "validator": UpdateValidator(strikes=1), "seed": 0, **options}
    return ClientSelection(sampler, strikes=strikes, **how)


def test_a_round_for_which_only_benched_clients_are_there_passes_as_if_nobody_were(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("client,first_round,last_round\n0,0,0\n1,1,5\n2,1,5\n")
    asked = invitations(AvailableClients(str(trace)), strikes={0: 1})
    assert asked.select(0, 0) == ((), [], 0, 0)
    assert asked.select(1, 0).cohort == (1, 2)
    asked.strikes.update({1: 1, 2: 1})
    with pytest.raises(QuorumError, match=r"got 0: 1 updates or more of clients \[1, 2\] were refused"):
        asked.select(1, 0)


def test_a_round_that_a_trace_leaves_with_too_few_for_a_robust_rule_ends_the_run_before_anybody_trains(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("client,first_round,last_round\n0,0,9\n1,0,9\n2,0,0\n")
    asked = invitations(AvailableClients(str(trace)), strikes={}, needed=3)
    assert asked.select(0, 0).needed == 3
    with pytest.raises(QuorumError, match="at least 3 clients .*got 2. Ask more clients per round"):
        asked.select(1, 0)


def test_a_sampler_that_names_one_client_alone_asks_another_when_that_one_is_benched():
    """A round without anybody would count as done."""

    class Own(AllClients):
        def sample(self, *, num_clients, round, seed):
            return (0,)

    cohort, _, needed, goal = invitations(Own(), strikes={0: 1}).select(0, 0)
    assert (len(cohort), needed, goal) == (1, 1, 1)
    assert cohort[0] in (1, 2)
    with pytest.raises(QuorumError, match=r"got 0: 1 updates or more of clients \[0\]"):
        invitations(SelectedClients([0]), strikes={0: 1}).select(0, 0)


def test_a_robust_rule_that_benching_left_with_too_few_says_whom_it_benched():
    options = {"executor": faulty(always={0: "nan"}), "validator": UpdateValidator(strikes=1)}
    with pytest.raises(QuorumError, match=r"at least 5 clients .* got 4: 1 updates or more of clients \[0\]"):
        run(num_clients=5, rounds=4, aggregator=Krum(num_bad=1), rules=RoundRules(min_report_fraction=0.8), **options)


def test_a_quorum_that_a_robust_rule_asks_for_is_named():
    options = {"executor": faulty(always={0: "hang"}), "rules": RoundRules(min_report_fraction=0.5, max_attempts=2)}
    with pytest.raises(QuorumError, match="50% of its cohort, and Krum 5 updates; got fewer"):
        run(num_clients=5, aggregator=Krum(num_bad=1), **options)


class Clock:
    """Passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.perf_counter = 0.0, lambda: self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_tries_of_a_round_are_apart(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(round_rules, "time", clock)
    with pytest.raises(QuorumError):
        run(executor=faulty(always={0: "hang"}), rules=RoundRules(max_attempts=3, retry_delay_seconds=60.0))
    assert clock.now == pytest.approx(120.0), "between tries, and not after the last"


def test_a_value_that_some_clients_reported_is_their_mean():
    clients = (
        ClientReport(0, "answered", 10, {"loss": 1.0, "own": 4.0}),
        ClientReport(1, "answered", 30, {"loss": 3.0}),
    )
    means = RoundReport(0, 0, True, 2, 0.0, clients, population=2)._means()
    assert means == {"loss": 2.5, "own": 4.0}


@pytest.mark.parametrize("rule", [Krum(), CoordinateMedian()], ids=lambda own: type(own).__name__)
def test_a_discount_is_refused_where_all_updates_are_alike(rule):
    with pytest.raises(
        ConfigurationError, match="stale_updates=discount with .*, which treats all alike. Set rules.stale_updates"
    ):
        FederatedOrchestrator(rounds=1, local_steps=1, aggregator=rule, rules=RoundRules(stale_updates="discount"))


def test_a_late_update_at_full_weight_is_still_late():
    """It counts in the average, and not toward the goal."""
    rules = RoundRules(min_report_fraction=0.5, stale_updates="discount", discount=1.0)
    _, orchestrator, _ = run(rounds=3, executor=faulty(always={1: "slow"}), rules=rules)
    assert orchestrator.ledger.events == {"failed": 3, "late": 2}
    assert orchestrator.ledger.client_runs == 3 * 3 + 2


def test_metrics_that_are_no_numbers_are_refused_and_end_nothing():
    class Odd(SequentialExecutor):
        def run(self, tasks):
            for own in super().run(tasks):
                odd = {"schedule/0": math.nan, "steps": math.inf} if own.client_id == 2 else {}
                yield dataclasses.replace(own, metrics={**own.metrics, **odd})

    _, orchestrator, _ = run(executor=Odd(), rules=RoundRules(min_report_fraction=0.5), validator=UpdateValidator())
    assert orchestrator.ledger.events == {"rejected": 3}
    assert "metric steps is not finite" in orchestrator.ledger.incidents[0]["reason"]


def test_reserves_stand_in_for_clients_that_fail():
    rules = RoundRules(over_selection=1.5)
    always = {0: "crash", 1: "hang"}
    _, orchestrator, _ = run(
        num_clients=8, rounds=6, clients=FractionOfClients(0.5), rules=rules, executor=faulty(always=always)
    )
    assert orchestrator.ledger.client_runs == 6 * 4, "the goal was reached in every round"
    assert "abandoned" not in orchestrator.ledger.events
    assert orchestrator.ledger.events["failed"] > 0
    calm = run(num_clients=8, rounds=6, clients=FractionOfClients(0.5), rules=rules)
    assert_states_equal(weights(calm), weights(run(num_clients=8, rounds=6, clients=FractionOfClients(0.5))))


def test_empty_cohorts_are_rounds():
    _, orchestrator, trainer = run(rounds=6, clients=PoissonSampling(0.2))
    assert trainer.global_step == 6
    assert orchestrator.ledger.events == {}


def test_an_aggregator_that_needs_more_updates_than_a_round_has_is_refused_at_once():
    with pytest.raises(ConfigurationError, match="Krum must have 7 updates a round; got a cohort of 4"):
        run(aggregator=Krum(num_bad=2))


def test_a_first_cohort_that_is_small_by_chance_is_filled_up():
    sampler = PoissonSampling(0.7)
    first, *others = (len(sampler.sample(num_clients=8, round=r, seed=3)) for r in range(8))
    assert first < 7 <= max(others), "choose another seed"
    _, _, trainer = run(num_clients=8, rounds=8, seed=3, clients=sampler, aggregator=Krum(num_bad=2))
    assert trainer.global_step == 8


def test_robust_aggregation_in_a_federation():
    result = run(aggregator=Krum(num_bad=0, num_selected=4), rounds=2)
    plain = run(rounds=2)
    assert_states_equal(weights(result), weights(plain), atol=1e-6)  # equal sizes: four of four is the mean


# ---------------------------------------------------------------------- in simulation, from a seed


def test_faults_are_a_function_of_the_seed_and_the_same_in_both_executors():
    rates = dict.fromkeys(FAULTS, 0.05)
    options = {
        "rounds": 6, "num_clients": 8, "optimizer": sgd,
        "rules": RoundRules(min_report_fraction=0.25, max_attempts=None), "validator": UpdateValidator(max_norm=100.0),
    }  # fmt: skip
    first, again, stacked, other = (
        run(executor=faulty(executor, **rates), seed=seed, **options)
        for executor, seed in (
            (SequentialExecutor(), 0),
            (SequentialExecutor(), 0),
            (VectorizedExecutor(), 0),
            (SequentialExecutor(), 1),
        )
    )
    assert_states_equal(weights(first), weights(again))
    assert_states_equal(weights(first), weights(stacked), atol=1e-5, rtol=1e-5)
    assert first[1].ledger.events == again[1].ledger.events == stacked[1].ledger.events
    assert first[1].ledger.incidents == again[1].ledger.incidents
    assert first[1].ledger.incidents != other[1].ledger.incidents


def test_a_resumed_run_meets_the_same_faults(tmp_path):
    """Late updates and strikes ride in the checkpoint."""
    options = {
        "rules": RoundRules(min_report_fraction=0.25, stale_updates="discount", max_attempts=None),
        "validator": UpdateValidator(strikes=3, max_norm=100.0), "local_steps": 2,
    }  # fmt: skip
    rates = {"slow": 0.4, "nan": 0.2}

    def trainer_of(rounds):
        from fedgan_lightning import FederatedOrchestrator

        orchestrator = FederatedOrchestrator(rounds=rounds, executor=faulty(**rates), **options)
        return quiet_trainer(orchestrator, default_root_dir=str(tmp_path)), orchestrator

    from fedgan_lightning import ServerModule

    whole, orchestrator = trainer_of(6)
    module = ServerModule(ring_gan(optimizer=sgd))
    whole.fit(module, datamodule=ring_data())
    half, _ = trainer_of(3)
    half.fit(ServerModule(ring_gan(optimizer=sgd)), datamodule=ring_data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, resumed = trainer_of(6)
    other = ServerModule(ring_gan(optimizer=sgd))
    rest.fit(other, datamodule=ring_data(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert_states_equal(module.model.state_dict(), other.model.state_dict())
    assert orchestrator.ledger.events == resumed.ledger.events
    assert orchestrator.runner.selection.strikes == resumed.runner.selection.strikes
    assert orchestrator.ledger.events["late"] > 0


def test_events_are_in_the_metrics_and_the_summary():
    seen = []

    import lightning as L

    class Callback(L.Callback):
        def on_round_end(self, trainer, server, info, metrics):
            seen.append({name: value for name, value in metrics.items() if name.startswith("round/")})

    data = ring_data()
    executor = faulty(always={1: "nan", 2: "crash"})
    _, orchestrator, _ = federate(
        ring_gan(optimizer=sgd), data, Callback(), rounds=2, local_steps=1, executor=executor,
        rules=RoundRules(min_report_fraction=0.5), validator=UpdateValidator(),
    )  # fmt: skip
    assert [(own["round/rejected"], own["round/failed"]) for own in seen] == [(1, 1), (1, 1)]
    assert [own["round/clients"] for own in seen] == [2, 2], "those whose updates were let in"
    summary = json.loads(json.dumps(orchestrator.ledger.summary()))
    assert summary["events"] == {"failed": 2, "rejected": 2}
    assert [own["client_id"] for own in summary["incidents"]] == [1, 2, 1, 2]
    assert "not finite" in summary["incidents"][0]["reason"]


def test_faults_and_rules_that_cannot_be_are_refused():
    for make in (
        lambda: faulty(crash=0.7, hang=0.7),
        lambda: faulty(nan=-0.1),
        lambda: faulty(always={1: "sneeze"}),
        lambda: RoundRules(over_selection=0.9),
        lambda: RoundRules(min_report_fraction=0.0),
        lambda: RoundRules(timeout=0.0),
        lambda: RoundRules(stale_updates="keep"),
        lambda: RoundRules(discount=0.0),
        lambda: RoundRules(max_attempts=0),
        lambda: RoundRules(retry_delay_seconds=-1.0),
        lambda: UpdateValidator(max_norm=0.0),
        lambda: UpdateValidator(max_examples=0),
        lambda: UpdateValidator(strikes=0),
    ):
        with pytest.raises(ConfigurationError, match="must .*; got "):
            make()


@pytest.mark.parametrize(
    "transforms, is_coded", [([], False), ([ClipUpdates(max_norm=1.0)], False), ([LogMoments()], True)]
)
def test_only_what_is_encoded_travels_in_codes(transforms, is_coded):
    """A chain that leaves what the server sends as it is sends it as it is."""
    tasks = []

    class Watch(SequentialExecutor):
        def run(self, given):
            tasks.extend(listed := list(given))
            yield from super().run(listed)

    federate(ring_gan(optimizer=adam), ring_data(), rounds=2, executor=Watch(), transforms=transforms)
    assert [task.coded is not None for task in tasks[-4:]] == [is_coded] * 4
    assert all(task.state for task in tasks)
