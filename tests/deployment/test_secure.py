"""Secure aggregation over its wire: the protocol by hand, with clients that are lost and servers that lie, and whole
rounds over Flower's apps.
"""

from __future__ import annotations

import dataclasses
import json
import re
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning import SecureAggregation
from fedgan_lightning.__main__ import main
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import masking, wire
from fedgan_lightning.deployment.apps import STAGES, _site, serve_over
from fedgan_lightning.deployment.secure import SecureSessions
from fedgan_lightning.deployment.secure_users import SecureQueries, check_same_for_all
from fedgan_lightning.deployment.session import Session, sealed_of_facts, summand_to_content
from fedgan_lightning.deployment.shared_settings import SHARED, digest_of
from fedgan_lightning.deployment.sites import Sites
from fedgan_lightning.errors import ConfigurationError, ProtocolError, QuorumError, UpdateError
from fedgan_lightning.federation.secure import Summand
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import ClientTask
from tests.conftest import ROOT, assert_states_equal, ring_data, ring_gan
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import hostile, quoted, summary, weights
from tests.unit.test_secure import states_of

pytestmark = pytest.mark.flower

# ---------------------------------------------------------------------- the protocol, carried by hand

#: Hash of what all are asked.
SUBJECT = "state.rest"
TRAIN = {"kind": wire.TRAIN, "subject": SUBJECT}
COLUMNS = ("clients", "mask_keys", "seal_keys", "sizes", "signatures")


class Hand:
    """Sites in this process; a client is lost from the stage on that is named for it.

    Args:
        folder: Where sites keep their secrets.
        sizes: N_k by client.
        lost: Stage by client.
        secure: Settings of all.
    """

    digest = ""

    def __init__(self, folder, sizes, *, lost=None, secure=None, weighting="examples", states=states_of) -> None:
        self.secure, self.lost, self.sizes, self.states = secure or SecureAggregation(), lost or {}, sizes, states
        self.weight = WeightedMean(weighting).weight
        self.sessions = {
            k: Session(folder / str(k), client_id=k, secure=self.secure, weight=self.weight) for k in range(len(sizes))
        }
        self.seen: list[tuple[int, dict, object]] = []
        self.edit_question = lambda client_id, facts: facts
        self.edit_answer = lambda client_id, stage, content: content

    def node_of(self, client_id):
        return client_id

    def exchange(self, contents, **options):
        found, troubles = {}, {}
        for k, records in contents.items():
            facts = self.edit_question(k, wire.facts_of(records))
            order = ["advertise", "share", "mask", "consent", "unmask"]
            if order.index(facts["ask"]) >= order.index(self.lost.get(k, "unmask")) and k in self.lost:
                troubles[k] = "gone"
                continue
            try:
                content = self.edit_answer(k, facts["ask"], self.answer(k, facts))
            except (ProtocolError, ConfigurationError) as error:
                troubles[k] = str(error)
                continue
            found[k] = content
            self.seen.append((k, facts, content))
        return found, troubles

    def answer(self, k, facts):
        session = int(facts["session"])
        if facts["ask"] == "mask":
            self.sessions[k].open(session, sealed_of_facts(facts), subject=SUBJECT)
            return summand_to_content(self.sessions[k].masked(session, self.states(k)), facts={})
        site = _Site(k, self.sessions[k], self.sizes[k])
        return wire.content(STAGES[facts["ask"]](site, session, facts))

    def run(self):
        sessions = SecureSessions(self, secure=self.secure, weight=self.weight)
        return sessions.run(
            range(len(self.sizes)), lambda k: wire.content({"ask": "mask"}), kind=wire.TRAIN, subject=SUBJECT
        )


@dataclasses.dataclass
class _Site:
    """What the app asks of a site between two masked vectors."""

    client_id: int
    own: Session
    size: int

    def session(self):
        return self.own

    def facts(self):
        return {"num_examples": self.size}

    def allow_opening(self, session, subject, survivors):
        assert subject == SUBJECT


def assert_mean(found, hand, kept) -> None:
    """Compare with the weighted mean of those that stayed, within the bound that is stated."""
    sizes = hand.sizes
    weights_of = {k: hand.weight(size) for k, size in enumerate(sizes)}
    share = sum(weights_of[k] for k in kept) / sum(weights_of.values())
    for group in ("delta", "extras"):
        for name, value in found.means[group].items():
            exact = sum(weights_of[k] * hand.states(k)[group][name].double() for k in kept)
            exact = exact / sum(weights_of[k] for k in kept)
            bound = hand.secure.error_bound(group, name, num_clients=len(kept), share=share)
            rounding = torch.finfo(value.dtype).eps * float(exact.abs().max())
            assert float((value.double() - exact).abs().max()) <= bound + rounding, name
    loss = sum(sizes[k] * (1.5 + k) for k in kept) / sum(sizes[k] for k in kept)
    assert float(found.means["metrics"]["loss_d"]) == pytest.approx(loss, abs=1e-7)


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_the_server_learns_the_mean_of_those_that_stay(tmp_path_factory, data):
    """Whoever is lost, at whatever stage, as long as enough are left."""
    sizes = data.draw(st.lists(st.integers(1, 1_000), min_size=3, max_size=5))
    at_most = len(sizes) - SecureAggregation().needed(len(sizes))
    stages = st.sampled_from(["share", "mask", "unmask"])
    lost = data.draw(st.dictionaries(st.integers(0, len(sizes) - 1), stages, max_size=at_most))
    weighting = data.draw(st.sampled_from(["examples", "uniform"]))
    hand = Hand(tmp_path_factory.mktemp("hand"), sizes, lost=lost, weighting=weighting)
    found = hand.run()
    kept = [k for k in range(len(sizes)) if lost.get(k, "unmask") == "unmask"]
    assert {*found.lost} == {*range(len(sizes))} - {*kept}
    assert_mean(found, hand, kept)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_below_the_threshold_nothing_is_opened(tmp_path, stage):
    found = Hand(tmp_path, [10, 20, 30, 40], lost={0: stage, 1: stage}).run()
    assert (found.means, {*found.lost}) == ({}, {0, 1, 2, 3})
    assert "the sum cannot be opened" in found.lost[3][1]


def test_secrets_lie_in_a_file_of_their_own_until_the_sum_is_opened(tmp_path):
    hand, modes = Hand(tmp_path, [10, 20, 30, 40], lost={2: "mask"}), []
    hand.edit_answer = lambda k, stage, content: (
        modes.append(stat.S_IMODE((tmp_path / str(k) / "secure.json").stat().st_mode)) if stage != "unmask" else None,
        content,
    )[1]
    assert hand.run().means
    assert modes
    assert {*modes} == {0o600}
    kept = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    stages = {name: (own["stage"], own["seed"], own["held"]) for name, own in kept.items()}
    assert {name for name, own in stages.items() if own == ("advertised", "", None)} == {"0", "1", "3"}, (
        "fresh keys alone"
    )
    assert kept["2"]["stage"] == "shared", "lost: until its next session"
    before = (tmp_path / "2" / "secure.json").read_text()
    hand.sessions[2].advertise(7, num_examples=30)
    assert '"stage": "shared"' in before
    assert '"held": null' in (tmp_path / "2" / "secure.json").read_text()
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_site_answers_each_message_once_and_in_order(tmp_path):
    hand = Hand(tmp_path, [10, 20, 30])
    assert hand.run().means
    first = hand.sessions[0]
    for k, facts, _ in [seen for seen in hand.seen if seen[0] == 0 and seen[1]["ask"] != "advertise"]:
        with pytest.raises(ProtocolError, match="go on from there, once; got (none|session)"):
            hand.answer(k, facts)
    first.advertise(1, num_examples=10)
    with pytest.raises(ProtocolError, match="session 1 must be shared and go on from there, .* session 1, adv"):
        first.open(1, {}, subject=SUBJECT)
    with pytest.raises(ProtocolError, match="session 2 must be advertised .* got session 1, advertised"):
        first.share(2, {}, subject=SUBJECT)


def test_no_vector_is_masked_twice(tmp_path):
    """Two vectors under the same masks would tell their difference."""
    hand, asked = Hand(tmp_path, [10, 20, 30]), []
    hand.edit_answer = lambda k, stage, content: (asked.append((k, stage)), content)[1]
    sessions = hand.sessions

    def again(k, facts):
        if facts["ask"] == "unmask" and k == 0:
            query = next(own for client, own, _ in hand.seen if client == 0 and own["ask"] == "mask")
            with pytest.raises(ProtocolError, match="must be shared and go on from there, once; .* masked"):
                sessions[0].open(int(query["session"]), sealed_of_facts(query), subject=SUBJECT)
            asked.append("again")
        return facts

    hand.edit_question = again
    assert hand.run().means
    assert "again" in asked


@pytest.mark.parametrize("column", ["sizes", "mask_keys"])
def test_a_server_that_tells_one_client_otherwise_gets_nothing_from_it(tmp_path, column):
    """Shares are sealed together with the hash of what their sender was told."""
    hand = Hand(tmp_path, [10, 20, 30, 40])

    def lie(k, facts):
        if facts["ask"] == "share" and k == 0:
            other = list(facts[column])
            other[1] = 1_000_000 if column == "sizes" else masking.public(masking.Keys.fresh().mask)
            return {**facts, column: other}
        return facts

    hand.edit_question = lie
    found = hand.run()
    assert found.means == {}
    assert "client 1 has a list of other members, keys or weights" in found.lost[0][1]


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda facts: {**facts, "seal_keys": [facts["seal_keys"][0]] * 3}, "members must have keys of their own"),
        (
            lambda facts: {**facts, **{name: facts[name][:2] for name in COLUMNS}},
            "a session must have at least 3 members; got 2",
        ),
        (lambda facts: {**facts, "sizes": [10, 20, 0]}, "members must count at least one example; got 0"),
    ],
)
def test_members_that_cannot_be_are_refused(tmp_path, edit, reason):
    hand = Hand(tmp_path, [10, 20, 30])
    hand.edit_question = lambda k, facts: edit(facts) if facts["ask"] == "share" and k == 0 else facts
    assert reason in hand.run().lost[0][1]


@pytest.mark.parametrize(
    "survivors, reason",
    [
        ([0, 1], "3 members must be left; got 2"),
        ([1, 2, 3], "survivors must be mem"),
        ([0, 1, 9], "survivors must be mem"),
    ],
)
def test_a_server_cannot_have_a_sum_of_too_few_opened(tmp_path, survivors, reason):
    """Nor ask again: the secrets are gone with the query."""
    hand = Hand(tmp_path, [10, 20, 30, 40], lost=dict.fromkeys(range(4), "unmask"))
    assert hand.run().means == {}
    session = int(hand.seen[-1][1]["session"])
    with pytest.raises(ProtocolError, match=reason):
        hand.sessions[0].unmask(session, survivors)
    with pytest.raises(ProtocolError, match="got none"):
        hand.sessions[0].unmask(session, [0, 1, 2])


def test_shares_that_were_tampered_with_open_nothing(tmp_path):
    hand = Hand(tmp_path, [10, 20, 30, 40], lost={1: "mask"})

    def spoil(k, stage, content):
        if stage == "unmask" and k == 0:
            shares = sealed_of_facts(wire.facts_of(content))
            spoiled = {j: text[:10] + bytes([text[10] ^ 1]) + text[11:] for j, text in shares.items()}
            return wire.content({"others": sorted(spoiled), "texts": [spoiled[j] for j in sorted(spoiled)]})
        return content

    hand.edit_answer = spoil
    found = hand.run()
    assert found.means == {}
    assert {*found.lost} == {0, 1, 2, 3}


def test_an_update_of_another_shape_is_left_out_and_the_others_are_opened(tmp_path):
    def states(k):
        found = states_of(k)
        return {**found, "delta": {"g.other": torch.zeros(3)}} if k == 1 else found

    hand = Hand(tmp_path, [10, 20, 30, 40], states=states)
    found = hand.run()
    assert found.lost == {1: ("reply", "its update differs from the others' in entries, shapes or dtypes")}
    assert_mean(found, hand, [0, 2, 3])


def test_a_client_that_counts_otherwise_than_when_it_joined_is_left_out(tmp_path):
    """Weights are shares of the sizes that members tell."""
    hand = Hand(tmp_path, [10, 20, 2**62, 40])
    told = [10, 20, 30, 40]
    sessions = SecureSessions(hand, secure=hand.secure, weight=hand.weight)
    options = {"kind": wire.TRAIN, "subject": SUBJECT, "size_of": told.__getitem__}
    found = sessions.run(range(4), lambda k: wire.content({"ask": "mask"}), **options)
    assert found.lost == {2: ("advertise", f"no keys ({2**62} examples, and 30 when it joined)")}
    assert {*found.members} == {0, 1, 3}
    assert found.means


@pytest.mark.parametrize("keys", ["copied", "another's", "none", "short"])
def test_keys_with_which_all_others_would_refuse_the_session_are_refused_first(tmp_path, keys):
    hand, known = Hand(tmp_path, [10, 20, 30, 40]), {}

    def lie(k, stage, content):
        if stage == "advertise":
            facts = wire.facts_of(content)
            known[k] = facts
            if k == 3:
                mask = {"another's": known[0]["mask_keys"][0], "none": b"", "short": b"\x00" * 32}
                facts = {**facts, "mask_keys": [mask.get(keys, facts["seal_keys"][0])]}
                return wire.content(facts)
        return content

    hand.edit_answer = lie
    found = hand.run()
    assert {*found.lost} == {3}
    assert found.lost[3][0] == "advertise"
    assert found.means


def test_a_layout_that_is_not_the_server_s_is_left_out_whatever_most_send(tmp_path):
    def refuse(client_id, layouts, facts):
        if "g.other" in layouts["delta"].names:
            raise UpdateError(f"client {client_id}: delta differs")

    def states(k):
        found = states_of(k)
        return {**found, "delta": {"g.other": torch.zeros(3)}} if k in (0, 1) else found

    hand = Hand(tmp_path, [10, 20, 30, 40, 50], states=states)
    sessions = SecureSessions(hand, secure=hand.secure, weight=hand.weight)
    found = sessions.run(
        range(5), lambda k: wire.content({"ask": "mask"}), kind=wire.TRAIN, subject=SUBJECT, check=refuse
    )
    assert found.lost == {k: ("reply", f"client {k}: delta differs") for k in (0, 1)}
    assert {*found.facts} == {2, 3, 4}


# ---------------------------------------------------------------------- masks


def test_masks_are_functions_of_all_of_their_seed_and_uniform():
    seed = bytes(range(32))
    narrow, wide = masking.mask(seed, narrow=40_000, wide=40_000)
    again, _ = masking.mask(seed, narrow=40_000, wide=40_000)
    assert np.array_equal(narrow, again)
    assert (narrow.dtype, wide.dtype) == (np.uint32, np.uint64)
    for vector, bits in ((narrow, 32), (wide, 64)):
        counts = np.bincount((vector >> np.array(bits - 4, vector.dtype)).astype(int), minlength=16)
        expected = vector.size / 16  # 15 degrees of freedom: mean 15, 60 is beyond 1e-6
        assert ((counts - expected) ** 2 / expected).sum() < 60
    # Flower's own takes the exclusive or of the seed's words: to it these two, and 2^224 others, are the same.
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    other = seed[4:] + seed[:4]
    theirs = [pseudo_rand_gen(own, 2**32, [(8,)])[0] for own in (seed, other)]
    assert np.array_equal(*theirs)
    assert not np.array_equal(masking.mask(other, narrow=8, wide=0)[0], narrow[:8])


def test_what_a_client_sends_says_nothing_of_its_update(tmp_path):
    """Zeros and a large update are the same to who sees the vector: uniform numbers."""

    def states(k):
        large = torch.full((4096,), 3.9 if k == 0 else 0.0)
        return {"delta": {"g.w": large}, "extras": {}, "metrics": {"loss_d": torch.tensor(1.5 + k).double()}}

    hand = Hand(tmp_path, [10, 10, 10], states=states)
    found = hand.run()
    assert torch.allclose(found.means["delta"]["g.w"], torch.full((4096,), 1.3))
    for k in range(3):
        content = next(own for client, facts, own in hand.seen if (client, facts["ask"]) == (k, "mask"))
        vector = wire.state_of(content, "masked")["narrow"].numpy().view(np.uint32)
        counts = np.bincount((vector >> np.uint32(28)).astype(int), minlength=16)
        assert ((counts - 256) ** 2 / 256).sum() < 60
        plain = Summand.of(states(k), shares=dict.fromkeys(states(k), 1 / 3), secure=hand.secure).narrow
        assert not (vector == plain).any()


# ---------------------------------------------------------------------- whole rounds over Flower's apps

CONFIG = str(ROOT / "configs" / "ring8.yaml")
SHORT = [
    *("--federation.rounds", "1", "--federation.local_steps", "2", "--evaluation.num_samples", "50"),
    *("--model.init_args.generator.init_args.hidden", "[16]", "--data.source.init_args.num_samples", "2000"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
]
SECURE = ["--federation.secure", "SecureAggregation"]
#: Metrics in the samples themselves, of at most 50 of each site, and of all.
PIXELS = """[{class_path: FrechetDistance, init_args: {features: PixelFeatures, max_reals: 50}},
 {class_path: KernelDistance, init_args: {features: PixelFeatures}}]"""
LENIENT = ["--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The sites' folder: one for all tests, since a site is built once for equal settings, and that takes its time."""
    return tmp_path_factory.mktemp("sites")


def grid_of(state, *options, told=None) -> LoopbackGrid:
    nodes = {100 + k: {"client-id": k, "state": str(state), **(told or {}).get(k, {})} for k in range(4)}
    options = " ".join(quoted([*SHORT, *SECURE, *options]))
    return LoopbackGrid(nodes, run_config={"config": CONFIG, "options": options})


def deploy(tmp_path, grid, *options, name: str = "secure") -> None:
    serve_over(grid, ["--config", CONFIG, *SHORT, *SECURE, *options, "--run_dir", str(tmp_path / name)])


def simulate(tmp_path, *options) -> None:
    arguments = ["--config", CONFIG, *SHORT, *options, "--run_dir", str(tmp_path / "plain")]
    assert main(["fit", *arguments, "--federation.executor", "SequentialExecutor"]) == 0


def test_a_secure_round_is_the_round(tmp_path, state):
    """Weights, moments, statistics and costs; and nothing that a site sends is its update, in any form that it has."""
    grid, stream, asked = grid_of(state), [], {}

    def record(node, kind, reply):
        stream.extend(array.data for array in reply.content["arrays"].values())
        stream.append(repr(dict(reply.content["facts"])).encode())

    push = grid.push_messages

    def watch(messages):
        asked.update(
            {own.metadata.dst_node_id: own.content for own in messages if own.metadata.message_type == "train"}
        )
        return push(messages)

    grid.edit, grid.push_messages = record, watch
    deploy(tmp_path, grid)
    simulate(tmp_path)

    secure = SecureAggregation()
    bound = secure.error_bound("delta", num_clients=4)
    mine, theirs = (read_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("secure", "plain"))
    for name, value in mine["state_dict"].items():
        other = theirs["state_dict"][name]
        rounding = torch.finfo(torch.float32).eps * float(other.abs().max())
        assert float((value.double() - other.double()).abs().max()) <= bound + rounding, name
    moments = [checkpoint["server"]["moments"] for checkpoint in (mine, theirs)]
    assert moments[0]
    assert_states_equal(*moments, atol=1e-15, rtol=2e-7)

    found, expected = summary(tmp_path, "secure"), summary(tmp_path, "plain")
    assert found["client_steps"] == expected["client_steps"] == 8
    assert found["bytes_up"]["generator"] == expected["bytes_up"]["generator"]
    assert found["bytes_up"]["optimizer"] == pytest.approx(3 * expected["bytes_up"]["optimizer"], rel=0.01)
    assert 5_000 < found["bytes_up"]["secure"] < 20_000

    everything = b"".join(stream)
    assert len(everything) > 4 * 100_000
    for node, content in asked.items():
        site, (task, *_) = _site(grid.contexts[node]), wire.to_task(content)
        update = site.train(task, accepted=-1, digest=site.digest)  # the same: it is a function of the task
        groups = {"delta": update.delta, "extras": update.extras}
        coded = Summand.of(groups, shares=dict.fromkeys(groups, 0.25), secure=secure)
        own = [vector.numpy() for state in groups.values() for vector in Packed.of(state).vectors.values()]
        for vector in (*own, coded.narrow, coded.wide):
            for start in range(0, vector.size - 8, max(8, vector.size // 50)):
                piece = vector[start : start + 8]
                if piece.all():  # eight numbers in a row, none of them zero
                    assert piece.tobytes() not in everything
        for name in ("loss_d", "loss_g"):
            assert repr(update.metrics[name]).encode() not in everything


def test_a_site_that_is_lost_after_keys_were_shared_is_recovered(tmp_path, state):
    """Its masks are taken off with the shares of the others, and the round counts without it."""
    grid = grid_of(state)
    grid.silent = {101}
    deploy(tmp_path, grid, *LENIENT, "--federation.rules.timeout", "0.01")
    (incident,) = summary(tmp_path, "secure")["incidents"]
    assert (incident["client_id"], incident["reason"]) == (1, "reply: no answer within 0 s")
    simulate(tmp_path, "--federation.clients", "SelectedClients", "--federation.clients.clients", "[0, 2, 3]")
    bound = SecureAggregation().error_bound("delta", num_clients=3, share=0.75)
    assert_states_equal(weights(tmp_path, "secure"), weights(tmp_path, "plain"), atol=bound, rtol=1.2e-7)


def test_a_site_refuses_its_own_bad_update_by_name(tmp_path, state):
    """In the sum nobody could see it: a NaN would have become a finite number."""
    deploy(tmp_path, grid_of(state, told={2: hostile(tmp_path, "nan", source="Ring")}), *LENIENT)
    (incident,) = summary(tmp_path, "secure")["incidents"]
    assert incident["client_id"] == 2
    assert re.search("NaN or infinity in 'generator.* from client 2. Lower", incident["reason"])
    assert all(bool(torch.isfinite(value).all()) for value in weights(tmp_path, "secure").values())


CLAIMS = {
    "steps": (1e12, "says that it took 1e+12 steps, and was asked for 2"),
    "images": (-1.0, "says that it saw -1 images"),
    "seconds": (-1e308, "metric seconds is beyond belief"),
    "schedule/0": (1e12, "says that schedule/0 is at 1e+12"),
    "loss_d": (1.0, "says loss_d in the clear"),
}


def test_a_claim_beside_a_masked_vector_is_refused_before_the_sum_is_opened(tmp_path, state):
    """Another claim in every round."""
    grid, claims = grid_of(state), iter(CLAIMS.items())

    def lie(node, kind, reply):
        if (node, kind) == (101, "train"):
            name, (value, _) = next(claims)
            reply.content["facts"][f"metric|{name}"] = value

    grid.edit = lie
    deploy(tmp_path, grid, *LENIENT, "--federation.rounds", str(len(CLAIMS)))
    incidents = summary(tmp_path, "secure")["incidents"]
    for incident, (_, reason) in zip(incidents, CLAIMS.values(), strict=True):
        assert (incident["client_id"], incident["kind"]) == (1, "rejected")
        assert f"client 1: {reason}" in incident["reason"]


def test_a_sum_that_cannot_be_right_counts_for_nobody_and_names_nobody(tmp_path, state, caplog):
    """One site's moments are -1, under its masks: nobody can say whose."""
    grid = grid_of(state, told={2: hostile(tmp_path, "wrong_moments", source="Ring")})
    with pytest.raises(QuorumError, match="fewer in each of 2 attempts of round 0"):
        deploy(tmp_path, grid, *LENIENT, "--federation.rules.max_attempts", "2")
    assert caplog.text.count("in a sum that cannot be right, of whom nobody can be named") == 2 * 4
    assert "is negative, and no mean of squares or count is" in caplog.text


def test_krum_is_refused_before_any_site_is_asked(tmp_path, state):
    grid = grid_of(state)
    with pytest.raises(ConfigurationError, match="got Krum, which needs single updates. Use WeightedMean"):
        deploy(tmp_path, grid, "--federation.aggregator", "Krum")
    assert grid.asked == []


def test_a_site_answers_in_the_clear_only_where_its_own_configuration_lets_it(tmp_path, state):
    """Whatever a server asks; and weights that are not agreed upon are none."""
    from flwr.app import Message

    grid = grid_of(state)
    plain = LoopbackGrid(
        {100: {"client-id": 0, "state": str(tmp_path)}}, run_config={"config": CONFIG, "options": " ".join(SHORT)}
    )
    task = ClientTask(client_id=0, round=0, seed=1, state={}, steps=1)
    queries = [
        (grid, wire.content({"ask": "sums", "query": "feature moments", "limit": -1}, told={}), "query"),
        (grid, wire.from_task(task, accepted=-1, digest=""), "train"),
        (plain, wire.content({"ask": "advertise", "session": 1}), "query"),
    ]
    for asked, content, kind in queries:
        content["facts"]["run"], content["facts"]["joined"] = "r", _site(asked.contexts[100]).tag
        (reply,) = asked.pull_messages(asked.push_messages([Message(content, dst_node_id=100, message_type=kind)]))
        assert "federation.secure" in wire.facts_of(reply.content)["error"]

    data = ring_data()

    def digest(**federation):
        shared = dict.fromkeys(SHARED)
        settings = {"model": 0, "federation": {**shared, **federation}, "data": {"batch_size": 1}, "seed_everything": 0}
        return digest_of({**settings, "trainer": {"precision": "32-true"}}, data, ring_gan())

    assert digest(secure=None, aggregator="a") == digest(secure=None, aggregator="b")
    assert len({digest(secure=s, aggregator=a) for s in (None, "x", "y") for a in ("a", "b")}) == 5


def test_features_of_all_sites_are_summed_under_masks_too(tmp_path, state):
    """The server gets one sum, the same as that of all sites' sums; where a site is not in it, none."""
    grid = grid_of(state, "--evaluation.metrics", PIXELS)
    query = {"query": "feature moments", "kind": "pixels", "side": 0, "limit": 50}
    site_of = {k: _site(grid.contexts[100 + k]) for k in range(4)}
    sites = Sites(grid, num_clients=4, digest=site_of[0].digest)
    survey = SecureQueries(SecureSessions(sites, secure=SecureAggregation(), weight=float))
    cubes = {"query": "third powers", "kind": "pixels", "side": 0}
    for asked, names in ((query, ("total", "outer")), (cubes, ("third", "own"))):
        (found,) = survey.sums(asked, {})
        exact = [own.sums(asked, {}) for own in site_of.values()]
        assert int(found["count"]) == sum(int(own["count"]) for own in exact) >= 200
        for name in names:
            assert torch.allclose(found[name], sum(own[name] for own in exact), atol=2e-6, rtol=0)
    grid.away = {101}
    sites.refresh()
    asked = len(grid.asked)
    with pytest.raises(
        QuorumError, match=r"every site must be in the sums .* client 1 \(advertise: its site is not conn"
    ):
        survey.sums(query, {})
    assert len(grid.asked) == asked, "nobody was asked for anything: all less all but one is one site's own"


def test_sums_without_a_site_that_is_lost_on_the_way_are_not_opened(state):
    """Those of everybody, asked for later, would otherwise tell the lost one's."""

    class Leaving(LoopbackGrid):
        def push_messages(self, messages):
            listed = list(messages)
            self.kinds = [*getattr(self, "kinds", []), *(wire.facts_of(own.content)["ask"] for own in listed)]
            keys = super().push_messages(listed)
            if self.kinds[-1] == "sums":
                self._open = {key: own for key, own in self._open.items() if own.metadata.dst_node_id != 101}
            return keys

    grid = grid_of(state, "--evaluation.metrics", PIXELS)
    grid.__class__ = Leaving
    sites = Sites(grid, num_clients=4, digest=_site(grid.contexts[100]).digest)
    sessions = SecureSessions(sites, secure=SecureAggregation(), weight=float, timeout=1.0)
    with pytest.raises(QuorumError, match=r"client 1 \(reply: no answer within 1 s"):
        SecureQueries(sessions).sums({"query": "feature moments", "kind": "pixels", "side": 0, "limit": 50}, {})
    assert grid.kinds.count("sums") == 4
    assert "unmask" not in grid.kinds


def test_a_metric_whose_sums_cannot_be_masked_is_left_out_by_name(tmp_path, state, monkeypatch, caplog):
    """The others are measured, and the run goes on."""
    metrics = ["--evaluation.metrics", "[FrechetDistance, KernelDistance, ModeCoverage]"]
    monkeypatch.setattr("fedgan_lightning.federation.secure.SUMS_BOUND", 2e4)
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        deploy(tmp_path, grid_of(state, *metrics), *metrics, "--best.monitor", "fid")
    (line,) = [record.message for record in caplog.records if "is not measured" in record.message]
    assert re.search("KernelDistance is not measured: .*entries of sums must be at most 20000 .*Scale the data", line)
    final = summary(tmp_path, "secure")["final"]
    assert {"modes", "fid"} <= final.keys()
    assert "kid" not in final


def test_after_the_first_session_three_messages_are_enough(tmp_path):
    """Keys come along with the last message of the session before; whoever has told none is asked for them."""
    hand, asked = Hand(tmp_path, [10, 20, 30, 40]), []
    hand.edit_question = lambda k, facts: (asked.append((k, facts["ask"])), facts)[1]
    sessions = SecureSessions(hand, secure=hand.secure, weight=hand.weight)

    def run():
        asked.clear()
        return sessions.run(range(4), lambda k: wire.content({"ask": "mask"}), **TRAIN)

    first = run()
    assert {stage for _, stage in asked} == {"advertise", "share", "mask", "unmask"}
    second = run()
    assert [stage for k, stage in asked if k == 0] == ["share", "mask", "unmask"]
    assert_states_equal(first.means["delta"], second.means["delta"], atol=1e-7)
    assert first.members[0].mask != second.members[0].mask, "no key is used twice"
    hand.lost = {2: "unmask"}
    run()
    hand.lost = {}
    run()
    assert [k for k, stage in asked if stage == "advertise"] == [2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"own": {"algorithm/ratio": torch.zeros(3)}}, "got algorithm/ratio, for client 1 alone"),
        ({"coded": {"x": torch.zeros(1)}}, "got networks in codes"),
    ],
)
def test_a_site_under_masks_does_nothing_that_others_were_not_asked(change, words, tmp_path, state, monkeypatch):
    """A server that weighs all sites but one with nothing would have that one's answer for a sum."""
    honest = wire.from_task

    def crooked(task, **facts):
        return honest(dataclasses.replace(task, **change) if task.client_id == 1 else task, **facts)

    monkeypatch.setattr("fedgan_lightning.deployment.secure_users.wire.from_task", crooked)
    deploy(tmp_path, grid_of(state), *LENIENT)
    incidents = summary(tmp_path, "secure")["incidents"]
    assert {own["client_id"] for own in incidents} == {1}
    assert all(words in own["reason"] for own in incidents)


def test_nor_does_the_server_ask_it():
    task = ClientTask(client_id=2, round=0, seed=1, state={}, steps=1)
    check_same_for_all(task)
    with pytest.raises(ConfigurationError, match="got a, for client 2 alone"):
        check_same_for_all(dataclasses.replace(task, own={"a": torch.zeros(1)}))
    with pytest.raises(ConfigurationError, match="got networks to be handed on"):
        check_same_for_all(task, hands_on=True)
