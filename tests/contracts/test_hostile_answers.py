"""Answers of a client that means harm, before every aggregator, with and without a validator.

Nothing but three things may come of one: the others' result is to the bit that of a round without it; the run ends with
its name; or, where the answer is an honest one in another form, the result is that of the honest one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedgan_lightning import RoundRules, UpdateValidator
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.errors import QuorumError, UpdateError
from fedgan_lightning.federation.aggregation import WeightedSums
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.costs import CostLedger
from fedgan_lightning.federation.label_balance import DivergenceWeightedMean
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.report import RoundReport
from fedgan_lightning.federation.robust import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    NearestNeighborMixing,
    TrimmedMean,
)
from fedgan_lightning.federation.round import RoundRunner
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import ClientReport, ClientTask, Executor, UpdateSum
from fedgan_lightning.samplers import AllClients, SelectedClients
from fedgan_lightning.seeding import derive_seed
from fedgan_lightning.states import encode_statistics
from tests.conftest import finish, ring_data, ring_gan
from tests.contracts.test_aggregators import instantiable

#: Torch will take quantised tensors out; until then a client may send one.
pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")

CLIENTS, LIAR, STEPS = 7, 2, 2
NAN, INF, TINY = math.nan, math.inf, 1e-42


def by_label_laws():
    found = DivergenceWeightedMean()
    found.prepare(SimpleNamespace(label_counts=lambda: [[50 + k, 50 - k] for k in range(64)]))
    return found


AGGREGATORS = {
    "divergence": by_label_laws,
    "examples": WeightedMean,
    "uniform": lambda: WeightedMean("uniform"),
    "median": CoordinateMedian,
    "trimmed": lambda: TrimmedMean(0.2),
    "krum": lambda: Krum(num_bad=1),
    "multi-krum": lambda: Krum(num_bad=1, num_selected=3),
    "geometric": GeometricMedian,
    "mixing": lambda: NearestNeighborMixing(GeometricMedian(), num_bad=1),
}


def test_every_aggregator_is_covered():
    from fedgan_lightning.protocol import Aggregator

    assert {type(make()) for make in AGGREGATORS.values()} == {*instantiable(Aggregator)}


# ---------------------------------------------------------------------- honest answers, from real training


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)


class World:
    """A federation with moments, statistics and schedules, and what its clients answer to a state."""

    def __init__(self, *, rounds: int) -> None:
        self.runners = {}
        model = ring_gan(generator_scheduler=schedule)
        model.generator.layers.insert(1, nn.BatchNorm1d(16))
        data = ring_data(num_clients=CLIENTS, num_samples=560)
        data.setup("fit")
        policy = resolve(model, sync=None, optimizer_state="average", buffers="merge")
        options = {"accelerator": "cpu", "devices": 1}
        self.context = ClientContext(model, data, policy, ClientStore(), trainer_options=options)
        server = ServerModule(model)
        server.attach(policy)
        self.server = server
        self.round, positions = 0, ()
        for _ in range(rounds):
            self._answer(server.shared_state(), positions)
            found = finish(WeightedMean(), self.answers)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in found.delta.items():
                    parameters[name].add_(value)
            server._load_extras(found.extras)
            self.round, positions = self.round + 1, (positions[0] + STEPS if positions else STEPS,)
        self._answer(server.shared_state(), positions)

    def _answer(self, state, positions) -> None:
        self.state, self.work = state, {"steps": STEPS, "schedule_positions": positions}
        trainer = LocalTrainer(self.context)
        seeds = {k: derive_seed(0, "client", self.round, k) for k in range(CLIENTS)}
        self.answers = [trainer.run(ClientTask(k, self.round, seed, state, **self.work)) for k, seed in seeds.items()]

    def conduct(self, answers, *, aggregator, validated, clients=None, late="drop"):
        """Return what comes of a round with these answers."""
        key = (type(aggregator), str(sorted(map(str, vars(aggregator).items()))), validated, tuple(clients or ()), late)
        if key not in self.runners:  # each makes the schema of answers once
            self.runners[key] = RoundRunner(
                dataclasses.replace(self.context, store=ClientStore()),
                executor=Answering(),
                aggregator=aggregator,
                sampler=AllClients() if clients is None else SelectedClients(clients),
                rules=RoundRules(min_report_fraction=0.5, max_attempts=1, stale_updates=late),
                validator=UpdateValidator() if validated else None,
                seed=0,
                strikes={},
            )
        runner = self.runners[key]
        runner.executor.answers = answers
        task = ClientTask(-1, self.round, 0, self.state, **self.work)
        reports = [event for event in runner.run(self.server, task) if isinstance(event, RoundReport)]
        ledger = CostLedger()
        for report in reports:
            ledger.record(report)
        return SimpleNamespace(aggregate=reports[-1].total, summary=reports[-1], ledger=ledger), reports


class Answering(Executor):
    """Gives answers that were made before."""

    answers = ()

    def setup(self, context):
        pass

    def run(self, tasks):
        list(tasks)
        yield from self.answers

    def teardown(self):
        pass


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    """The first round, whose moments nobody was sent, and one to which all clients bring moments of the server's."""
    return {"first": World(rounds=0), "later": World(rounds=2)}


def facts_of(outcome):
    """Return everything of a round that training goes on from."""
    found, summary = outcome.aggregate, outcome.summary
    states = {f"delta {n}": v for n, v in found.delta.items()} | {f"extras {n}": v for n, v in found.extras.items()}
    return states, (found.num_clients, found.num_examples, summary.schedule_positions, summary.mean_images)


def assert_same(outcome, expected) -> None:
    (states, numbers), (others, wanted) = facts_of(outcome), facts_of(expected)
    assert numbers == wanted
    assert states.keys() == others.keys()
    for name, value in states.items():
        assert value.dtype == others[name].dtype
        assert value.numpy().tobytes() == others[name].numpy().tobytes(), name


def assert_sane(outcome, calls) -> None:
    """The account of the round is JSON whatever a client says, and its sums are finite."""
    told = json.loads(json.dumps([outcome.ledger.summary(), *(call.plain() for call in calls)], allow_nan=False))
    assert 0 < told[0]["client_steps"] <= (CLIENTS + 2) * STEPS
    assert 0 <= told[0]["client_seconds"] < 3600
    assert {*told[0]["bytes_up"]} <= {"generator", "discriminator", "optimizer", "unknown"}
    metrics = outcome.summary.metrics()
    assert all(math.isfinite(value) for value in metrics.values())


# ---------------------------------------------------------------------- what a client may answer


def entry(part, pick, value):
    """Return a change of the first number of an entry; a function is called with the entry."""

    def change(own):
        states = {name: tensor.clone() for name, tensor in getattr(own, part).items()}
        name = next(name for name in states if name.endswith(pick))
        if callable(value):
            states[name] = value(states[name])
        else:
            states[name].view(-1)[0] = value
        return dataclasses.replace(own, **{part: states})

    return change


def every(part, pick, value):
    def change(own):
        states = dict(getattr(own, part))
        return dataclasses.replace(
            own, **{part: {n: torch.full_like(v, value) if n.endswith(pick) else v for n, v in states.items()}}
        )

    return change


def names(part, change):
    """Return a change of the list of entries."""
    return lambda own: dataclasses.replace(own, **{part: dict(change(list(getattr(own, part).items())))})


def field(**changes):
    return lambda own: dataclasses.replace(own, **changes)


def says(**metrics):
    told = {name.replace("__", "/"): value for name, value in metrics.items()}
    return lambda own: dataclasses.replace(own, metrics={**own.metrics, **told})


class Unreadable(dict):
    def items(self):
        raise RuntimeError("no items")

    def keys(self):
        raise RuntimeError("no keys")

    def __iter__(self):
        raise RuntimeError("no names")


W, M, V, S = "layers.0.weight", "weight/exp_avg", "exp_avg_sq", "/step"

HOSTILE = {
    # values
    "NaN in the update": entry("delta", W, NAN),
    "infinity in the update": entry("delta", W, INF),
    "minus infinity everywhere": every("delta", "", -INF),
    "1e38 in the update": entry("delta", W, 1e38),
    "1e30 everywhere": every("delta", "", 1e30),
    "NaN in the last bias": entry("delta", "bias", NAN),
    "NaN in an extra": entry("extras", "running_mean", NAN),
    "infinity in a moment": entry("extras", M, INF),
    # shapes, dtypes, kinds
    "another shape": entry("delta", W, lambda own: own[:1]),
    "transposed": entry("delta", W, lambda own: own.T.contiguous()),
    "flat": entry("delta", W, lambda own: own.flatten()),
    "one dimension more": entry("delta", W, lambda own: own.unsqueeze(0)),
    "a number for a matrix": entry("delta", W, lambda own: own.sum()),
    "empty": entry("delta", W, lambda own: own[:0]),
    "huge": entry("delta", W, lambda own: torch.zeros(1).expand(10**6, 10**6)),
    "float64": entry("delta", W, lambda own: own.double()),
    "float16": entry("delta", W, lambda own: own.half()),
    "integers": entry("delta", W, lambda own: own.long()),
    "complex": entry("delta", W, lambda own: own.to(torch.complex64)),
    "sparse": entry("delta", W, lambda own: own.to_sparse()),
    "quantised": entry("delta", W, lambda own: torch.quantize_per_tensor(own, 0.1, 0, torch.qint8)),
    "without numbers": entry("delta", W, lambda own: own.to("meta")),
    "an array": entry("delta", W, lambda own: own.numpy()),
    "a list": entry("delta", W, lambda own: own.tolist()),
    "nothing for a tensor": entry("delta", W, lambda own: None),
    "float32 for a second moment": entry("extras", "running_var", lambda own: own.float()),
    # entries
    "an entry missing": names("delta", lambda own: own[1:]),
    "an entry too many": names("delta", lambda own: [*own, ("generator.more", torch.zeros(1))]),
    "an entry renamed": names("delta", lambda own: [("generator.other", own[0][1]), *own[1:]]),
    "two names swapped": names("delta", lambda own: [(own[1][0], own[0][1]), (own[0][0], own[1][1]), *own[2:]]),
    "no entries": field(delta={}),
    "no extras": field(extras={}),
    "a statistic missing": names("extras", lambda own: [pair for pair in own if "running_mean" not in pair[0]]),
    "a moment missing": names("extras", lambda own: [pair for pair in own if V not in pair[0]]),
    "all moments of a weight missing": names(
        "extras", lambda own: [pair for pair in own if "0.weight/" not in pair[0]]
    ),
    "moments of somebody unknown": names("extras", lambda own: [*own, ("optimizer/0/x/exp_avg", torch.zeros(1))]),
    "names that are numbers": names("delta", lambda own: list(enumerate(value for _, value in own))),
    "no mapping": field(delta=[torch.zeros(1)]),
    "nothing": field(delta=None, extras=None),
    "a mapping that cannot be read": field(delta=Unreadable(a=torch.zeros(1))),
    "a layout without its vectors": lambda own: dataclasses.replace(own, delta=Packed(Layout.of(own.delta), {})),
    "a layout of other vectors": lambda own: dataclasses.replace(
        own, delta=Packed(Layout.of(own.delta), {torch.float32: torch.zeros(3)})
    ),
    # rounds
    "a round long past": lambda own: dataclasses.replace(own, round=own.round - 2),
    "a round to come": lambda own: dataclasses.replace(own, round=own.round + 1),
    "half a round": lambda own: dataclasses.replace(own, round=own.round + 0.5),
    "a word for a round": field(round="now"),
    # counts
    "no examples": field(num_examples=0),
    "-1 examples": field(num_examples=-1),
    "one example more": lambda own: dataclasses.replace(own, num_examples=own.num_examples + 1),
    "2^62 examples": field(num_examples=2**62),
    "10^400 examples": field(num_examples=10**400),
    "half an example": lambda own: dataclasses.replace(own, num_examples=own.num_examples + 0.5),
    "a float of examples": lambda own: dataclasses.replace(own, num_examples=float(own.num_examples)),
    "True examples": field(num_examples=True),
    "NaN examples": field(num_examples=NAN),
    "a word for examples": field(num_examples="many"),
    # scalars
    "1e12 steps": says(steps=1e12),
    "-1 steps": says(steps=-1.0),
    "half a step": says(steps=0.5),
    "1e12 images": says(images=1e12),
    "-1e12 images": says(images=-1e12),
    "NaN images": says(images=NAN),
    "-1e308 seconds": says(seconds=-1e308),
    "infinite seconds": says(seconds=INF),
    "a round trip of -1e308": says(round_trip=-1e308),
    "a schedule at 1e12": says(schedule__0=1e12),
    "a schedule at -1": says(schedule__0=-1.0),
    "a schedule between two steps": says(schedule__0=0.5),
    "a schedule at NaN": says(schedule__0=NAN),
    "a second schedule": says(schedule__1=1.0),
    "a loss of NaN": says(loss_d=NAN),
    "a loss of 1e300": says(loss_d=1e300),
    "a loss that is a word": says(loss_d="low"),
    "a loss that is true": says(loss_d=True),
    "a loss of 10^400": says(loss_d=10**400),
    "a metric of the server's": says(update_norm__elsewhere=1.0),
    "a name with control characters": lambda own: says(**{"a\x1b[2J\nb": 1.0})(own),
    "a name of a megabyte": lambda own: says(**{"a" * 2**20: 1.0})(own),
    "no name": lambda own: says(**{"": 1.0})(own),
    "a million metrics": lambda own: dataclasses.replace(own, metrics=dict.fromkeys(map(str, range(10**4)), 1.0)),
    "no metrics": field(metrics=None),
    # moments and statistics
    "a negative mean of squares": entry("extras", V, -1.0),
    "all means of squares at -1": every("extras", V, -1.0),
    "1e38 for a mean of squares": every("extras", V, 1e38),
    "a mean without its squares": every("extras", M, 1e6),
    "a step count of -1": every("extras", S, -1.0),
    "a step count of 1e12": every("extras", S, 1e12),
    "a step count of 2.5": every("extras", S, -0.5),
    "a step count of NaN": every("extras", S, NAN),
    "a variance below zero": entry("extras", "running_var", -1.0),
    "a mean that is larger than its squares": entry("extras", "running_mean", 1e6),
    "1e38 for a statistic": entry("extras", "running_mean", 1e38),
}

#: Honest answers in another form: their result is that of the plain one.
HARMLESS = {
    "gradients required": lambda own: dataclasses.replace(
        own, delta={name: value.clone().requires_grad_() for name, value in own.delta.items()}
    ),
    "entries in another order": names("delta", lambda own: own[::-1]),
    "extras in another order": names("extras", lambda own: own[::-1]),
    "not contiguous": lambda own: dataclasses.replace(
        own, delta={n: torch.stack([v, v], -1)[..., 0] for n, v in own.delta.items()}
    ),
    "views of something larger": lambda own: dataclasses.replace(
        own, delta={n: torch.cat([v.flatten(), v.flatten()])[: v.numel()].view(v.shape) for n, v in own.delta.items()}
    ),
    "packed in another order": lambda own: dataclasses.replace(own, delta=Packed.of(dict([*own.delta.items()][::-1]))),
    "no word of its work": field(metrics={}),
    "no word of the round": field(round=None),
    "a discount of NaN": field(discount=NAN),
    "a discount of -5": field(discount=-5.0),
    "a discount of 1e9": field(discount=1e9),
    "more seconds than there were": says(seconds=1e17),
    "another number of images": says(images=3.0),
}

#: Numbers that an honest client could find, too: nobody can tell.
PLAUSIBLE = {
    "minus zero": every("delta", "", -0.0),
    "denormal numbers": every("delta", "", TINY),
    "a long update": every("delta", "", 1e3),
}


def test_there_are_at_least_forty_kinds():
    assert len(HOSTILE) + len(HARMLESS) >= 100


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("validated", [False, True], ids=["plain", "validated"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
class TestEveryAggregator:
    def order(self, world, changed, place):
        others = [own for own in world.answers if own.client_id != LIAR]
        return [changed, *others] if place == "first" else [*others, changed]

    def test_a_hostile_answer_is_left_out_to_the_bit_or_named(self, worlds, aggregator, validated, place):
        world, make = worlds["later" if place == "first" else "first"], AGGREGATORS[aggregator]
        honest = [own for own in world.answers if own.client_id != LIAR]
        members = [own.client_id for own in honest]
        expected, _ = world.conduct(honest, aggregator=make(), validated=validated, clients=members)
        for kind, change in HOSTILE.items():
            answers = self.order(world, change(world.answers[LIAR]), place)
            if not validated:
                with pytest.raises(UpdateError, match=rf"client {LIAR}\b") as caught:
                    world.conduct(answers, aggregator=make(), validated=False)
                assert "; got " in str(caught.value), kind
                assert str(caught.value).isprintable(), kind
                continue
            outcome, calls = world.conduct(answers, aggregator=make(), validated=True)
            assert_same(outcome, expected)
            assert_sane(outcome, calls)
            (incident,) = outcome.ledger.incidents
            assert (incident["client_id"], incident["kind"]) == (LIAR, "rejected"), kind
            assert incident["reason"].isprintable(), kind

    def test_an_honest_answer_in_another_form_is_that_answer(self, worlds, aggregator, validated, place):
        world, make = worlds["later"], AGGREGATORS[aggregator]
        plain = self.order(world, world.answers[LIAR], place)
        expected, _ = world.conduct(plain, aggregator=make(), validated=validated)
        for change in HARMLESS.values():
            answers = self.order(world, change(world.answers[LIAR]), place)
            outcome, calls = world.conduct(answers, aggregator=make(), validated=validated)
            assert_same(outcome, expected)
            assert_sane(outcome, calls)

    def test_a_believable_answer_counts_like_any_other(self, worlds, aggregator, validated, place):
        world = worlds["later"]
        for change in PLAUSIBLE.values():
            answers = self.order(world, change(world.answers[LIAR]), place)
            outcome, calls = world.conduct(answers, aggregator=AGGREGATORS[aggregator](), validated=validated)
            assert outcome.aggregate.num_clients == CLIENTS
            assert_sane(outcome, calls)

    def test_a_second_answer_changes_nothing_or_is_named(self, worlds, aggregator, validated, place):
        world, make = worlds["later"], AGGREGATORS[aggregator]
        answers = self.order(world, world.answers[LIAR], place)
        expected, _ = world.conduct(answers, aggregator=make(), validated=validated)
        if not validated:
            with pytest.raises(UpdateError, match=f"client {LIAR}: was not asked, or has answered already"):
                world.conduct([*answers, world.answers[LIAR]], aggregator=make(), validated=False)
            return
        again = [world.answers[LIAR]] * 2
        twice = [*again, *answers] if place == "first" else [*answers, *again]
        outcome, calls = world.conduct(twice, aggregator=make(), validated=True)
        assert_same(outcome, expected)
        assert_sane(outcome, calls)

    @pytest.mark.parametrize("number", [99, -1, 2**70])
    def test_an_answer_of_nobody_is_left_out_or_named(self, worlds, aggregator, validated, place, number):
        world, make = worlds["later"], AGGREGATORS[aggregator]
        honest = [own for own in world.answers if own.client_id != LIAR]
        stranger = dataclasses.replace(world.answers[LIAR], client_id=number)
        answers = [stranger, *honest] if place == "first" else [*honest, stranger]
        if not validated:
            with pytest.raises(UpdateError, match=f"client {number}: was not asked"):
                world.conduct(answers, aggregator=make(), validated=False)
            return
        members = [own.client_id for own in honest]
        expected, _ = world.conduct(honest, aggregator=make(), validated=True, clients=members)
        outcome, calls = world.conduct(answers, aggregator=make(), validated=True)
        assert_same(outcome, expected)
        assert_sane(outcome, calls)


@pytest.mark.parametrize("answer", [None, "an update", 7, {"client_id": LIAR}])
def test_what_is_no_update_at_all_ends_the_run(worlds, answer):
    for validated in (False, True):
        with pytest.raises(UpdateError, match="an executor yields updates of clients, and not"):
            worlds["first"].conduct([answer], aggregator=WeightedMean(), validated=validated)


@pytest.mark.parametrize("number", ["2", None, 2.0, [2]])
def test_an_update_without_a_number_of_a_client_ends_the_run(worlds, number):
    changed = dataclasses.replace(worlds["first"].answers[LIAR], client_id=number)
    with pytest.raises(UpdateError, match="an executor yields updates of clients, and not"):
        worlds["first"].conduct([changed], aggregator=WeightedMean(), validated=True)


# ---------------------------------------------------------------------- late ones


@pytest.mark.parametrize("validated", [False, True], ids=["plain", "validated"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_hostile_late_answer_is_left_out_to_the_bit_or_named(worlds, weighting, validated):
    world = worlds["later"]
    expected, _ = world.conduct(world.answers, aggregator=WeightedMean(weighting), validated=validated, late="discount")
    for kind, change in HOSTILE.items():
        late = change(dataclasses.replace(world.answers[LIAR], round=world.round - 1))
        if late.round != world.round - 1 or ("schedule" in kind and "NaN" not in kind):
            continue  # of another round, or about schedules of one that is over: nobody goes on from these
        answers = [late, *world.answers]
        if not validated:
            with pytest.raises(UpdateError, match=rf"client {LIAR}\b"):
                world.conduct(answers, aggregator=WeightedMean(weighting), validated=False, late="discount")
            continue
        outcome, calls = world.conduct(answers, aggregator=WeightedMean(weighting), validated=True, late="discount")
        states, numbers = facts_of(outcome)
        others, wanted = facts_of(expected)
        assert numbers == wanted, kind
        assert all(torch.equal(states[name], others[name]) for name in others), kind
        assert_sane(outcome, calls)


def test_a_client_is_late_once_a_round(worlds):
    """Each late answer would add its share of weight."""
    world = worlds["later"]
    late = dataclasses.replace(world.answers[LIAR], round=world.round - 1)
    options = {"aggregator": WeightedMean(), "late": "discount"}
    expected, _ = world.conduct([late, *world.answers], validated=True, **options)
    outcome, _ = world.conduct([late, late, late, *world.answers], validated=True, **options)
    assert_same(outcome, expected)
    with pytest.raises(UpdateError, match=f"client {LIAR}: was not asked, or has answered already"):
        world.conduct([late, late], validated=False, **options)


# ---------------------------------------------------------------------- aggregators by themselves


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_that_refuses_has_changed_nothing(worlds, name):
    """Whatever part is wrong, whoever calls it."""
    aggregator, answers = AGGREGATORS[name](), worlds["first"].answers
    spoiled = {
        "delta": entry("delta", W, NAN),
        "extras": entry("extras", "running_mean", NAN),
        "shape of extras": entry("extras", "running_mean", lambda own: own[:1]),
        "a missing extra": names("extras", lambda own: own[1:]),
        "no discount": field(discount=0.0),
        "a large discount": field(discount=1e9),
        "examples": field(num_examples=2**62),
    }
    for change in spoiled.values():
        accumulator = aggregator.init()
        for own in answers[:2]:
            accumulator = aggregator.accumulate(accumulator, own)
        with pytest.raises(UpdateError, match=f"client {LIAR}"):
            aggregator.accumulate(accumulator, change(answers[LIAR]))
        for own in answers[3:]:
            accumulator = aggregator.accumulate(accumulator, own)
        found = aggregator.finalize(accumulator)
        expected = finish(aggregator, [own for own in answers if own.client_id != LIAR])
        for part in ("delta", "extras"):
            mine, theirs = getattr(found, part), getattr(expected, part)
            assert all(torch.equal(mine[entry_name], theirs[entry_name]) for entry_name in theirs)


def test_sums_of_different_entries_do_not_merge(worlds):
    aggregator, answers = WeightedMean(), worlds["first"].answers
    first = aggregator.accumulate(aggregator.init(), answers[0])
    before = {dtype: vector.clone() for dtype, vector in first.delta.vectors.items()}
    other = aggregator.accumulate(aggregator.init(), names("extras", lambda own: own[1:])(answers[1]))
    with pytest.raises(UpdateError, match="all updates of a round must have the same entries"):
        aggregator.merge(first, other)
    assert all(torch.equal(first.delta.vectors[dtype], before[dtype]) for dtype in before)
    assert isinstance(first, WeightedSums)


# ---------------------------------------------------------------------- moments that honest clients lack


def test_a_parameter_that_nobody_has_touched_has_no_moments_and_one_that_somebody_has_its_mean(worlds):
    world = worlds["first"]
    name = next(n.split("/")[2] for n in world.answers[0].extras if n.startswith("optimizer/1") and "bias" in n)

    def untouched(own):
        kept = {n: v for n, v in own.extras.items() if f"/{name}/" not in n}
        still = {n: torch.zeros_like(v) if n == name else v for n, v in own.delta.items()}
        return dataclasses.replace(own, delta=still, extras=kept)

    lacking = [untouched(own) for own in world.answers]
    outcome, _ = world.conduct(lacking, aggregator=WeightedMean(), validated=False)
    assert not [n for n in outcome.aggregate.extras if f"/{name}/" in n]
    some = [*lacking[:3], *world.answers[3:]]
    outcome, _ = world.conduct(some, aggregator=WeightedMean("uniform"), validated=True)
    moment = f"optimizer/1/{name}/exp_avg_sq"
    mean = sum(own.extras[moment].double() for own in world.answers[3:]) / CLIENTS
    torch.testing.assert_close(outcome.aggregate.extras[moment].double(), mean, rtol=1e-6, atol=1e-12)
    assert outcome.ledger.events == {}


# ---------------------------------------------------------------------- sums


def summed(world, *, spoil=lambda total: total, member=lambda own: own) -> UpdateSum:
    found = finish(WeightedMean(), world.answers)
    members = tuple(
        member(ClientReport(own.client_id, "answered", own.num_examples, {"steps": float(STEPS)}))
        for own in world.answers
    )
    return spoil(UpdateSum(world.round, members, found.delta, found.extras, {"loss_d": 1.0}))


SPOILED_SUMS = {
    kind: HOSTILE[kind]
    for kind in (
        *("NaN in the update", "1e38 in the update", "another shape", "an entry missing", "a moment missing"),
        *("all means of squares at -1", "a mean without its squares", "a step count of 1e12", "a variance below zero"),
    )
}


def test_a_sum_that_is_right_is_taken(worlds):
    world = worlds["later"]
    expected, _ = world.conduct(world.answers, aggregator=WeightedMean(), validated=False)
    outcome, _ = world.conduct([summed(world)], aggregator=WeightedMean(), validated=False)
    assert_same_means(outcome, expected)


def assert_same_means(outcome, expected) -> None:
    (states, numbers), (others, wanted) = facts_of(outcome), facts_of(expected)
    assert numbers[:2] == wanted[:2]
    assert numbers[3] == wanted[3]
    for name, value in states.items():
        torch.testing.assert_close(value, others[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [*SPOILED_SUMS, "a mean of NaN"])
def test_a_sum_that_cannot_be_right_is_a_round_that_does_not_count_and_names_nobody(worlds, kind, caplog):
    world = worlds["later"]
    spoil = SPOILED_SUMS.get(kind, field(metrics={"loss_d": NAN}))
    with pytest.raises(QuorumError, match="fewer in each of 1 attempts"), caplog.at_level("WARNING"):
        world.conduct([summed(world, spoil=spoil)], aggregator=WeightedMean(), validated=False)
    assert caplog.text.count("of whom nobody can be named") == CLIENTS


@pytest.mark.parametrize(
    "claim",
    [
        field(num_examples=2**62),
        field(metrics={"steps": 1e12}),
        field(metrics={"images": -1.0}),
        field(metrics={"schedule/0": 1e12}),
        field(metrics={"seconds": -1e308}),
    ],
)
def test_a_claim_about_one_client_of_a_sum_ends_the_run_with_its_name(worlds, claim):
    def member(own):
        return claim(own) if own.client_id == LIAR else own

    with pytest.raises(UpdateError, match=f"client {LIAR}: "):
        worlds["later"].conduct([summed(worlds["later"], member=member)], aggregator=WeightedMean(), validated=False)


# ---------------------------------------------------------------------- numbers in place of claims


def test_schedules_of_other_modules_follow_most_clients_and_no_single_one():
    def record(client_id, *positions, steps=4.0):
        return ClientReport(client_id, "answered", 10, {"steps": steps}, list(positions))

    def positions(*records):
        return RoundReport(0, 0, True, len(records), 0.0, records).schedule_positions

    assert positions(record(0, 8), record(1, 8), record(2, 400)) == (8,)
    assert positions(record(0, 8), record(1, 8), record(2, 0)) == (8,)
    assert positions(record(0, 8, 2), record(1, 8, 2), record(2)) == (8, 2), "whoever says nothing is not counted"
    assert positions(record(0, 8, 2), record(1, 8, 2), record(2, 8)) == (8, 2)
    assert positions(record(0, 4, steps=2.0), record(1, 8)) == (8,), "the longest leads"
    assert positions() == ()


def test_moments_of_gradients_that_nobody_has_are_refused_by_an_option(worlds):
    """1e10 for a mean of squares is believable, and would keep everybody from moving."""
    world = worlds["later"]
    frozen = every("extras", V, 1e10)(world.answers[LIAR])
    honest = [own for own in world.answers if own.client_id != LIAR]
    outcome, _ = world.conduct([frozen, *honest], aggregator=WeightedMean(), validated=True)
    assert outcome.aggregate.num_clients == CLIENTS
    validator = UpdateValidator(max_gradient=100.0)
    with pytest.raises(UpdateError, match=f"client {LIAR}: .*exp_avg_sq reaches 1e.10, above validator.max_gradient"):
        validator.check(frozen)
    for own in honest:
        validator.check(own)


def test_second_moments_that_travel_are_those_of_the_server():
    """A control of the suite: the world has statistics, moments and schedules for clients to lie about."""
    world = World(rounds=1)
    kinds = {name.rsplit("/", 1)[-1].rsplit(".", 1)[-1] for name in world.answers[0].extras}
    assert {"running_mean", "running_var", "step", "exp_avg", "exp_avg_sq"} <= kinds
    assert world.answers[0].metrics["schedule/0"] == 2 * STEPS
    assert encode_statistics({}, {}) == {}
