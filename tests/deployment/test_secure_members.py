"""Secure aggregation against a server that restarts, lies about who takes part, or tells clients different things."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import masking, wire
from fedgan_lightning.deployment.keys import make_node_key
from fedgan_lightning.deployment.secure import SecureSessions
from fedgan_lightning.deployment.session import sealed_of_facts, sealed_to_facts
from fedgan_lightning.deployment.signatures import Signatures
from fedgan_lightning.errors import ProtocolError, QuorumError
from fedgan_lightning.federation.secure import SecureAggregation
from tests.conftest import assert_states_equal
from tests.deployment.test_secure import LENIENT, TRAIN, Hand, deploy, grid_of, summary, weights

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Node keys of five sites, and their public halves."""
    folder = tmp_path_factory.mktemp("keys")
    for k in range(5):
        make_node_key(folder / f"site{k}")
    return folder


def signing(tmp_path, keys, *, sites: int = 4, **options) -> Hand:
    """Sites that know each other's keys; a fifth key is nobody's."""
    hand = Hand(tmp_path, [10, 20, 30, 40][:sites], secure=SecureAggregation(**options))
    for k, session in hand.sessions.items():
        session.signatures = Signatures(keys / f"site{k}", keys)
    return hand


def run(hand: Hand, *, keys=None):
    sessions = SecureSessions(hand, secure=hand.secure, weight=hand.weight, keys=keys)
    return sessions.run(range(len(hand.sizes)), lambda k: wire.content({"ask": "mask"}), **TRAIN)


# ---------------------------------------------------------------------- who takes part


@pytest.mark.parametrize("consistency", [False, True])
def test_sites_that_sign_their_keys_sum_up_as_ever(tmp_path, keys, consistency):
    plain, signed = Hand(tmp_path / "a", [10, 20, 30, 40]).run(), run(signing(tmp_path, keys, consistency=consistency))
    assert signed.means.keys() == plain.means.keys()
    assert_states_equal(signed.means["delta"], plain.means["delta"])


@pytest.mark.parametrize("lie", ["its own keys", "a site that there is not", "another size", "no signature"])
def test_a_server_that_puts_its_own_keys_in_between_gets_nothing(tmp_path, keys, lie):
    hand = signing(tmp_path, keys)
    fresh = masking.Keys.fresh()

    def swap(k, facts):
        if facts["ask"] != "share":
            return facts
        changed = {name: list(facts[name]) for name in ("mask_keys", "seal_keys", "sizes", "signatures", "clients")}
        if lie == "its own keys":
            other = 0 if k else 1
            changed["mask_keys"][other], changed["seal_keys"][other] = map(masking.public, (fresh.mask, fresh.seal))
        elif lie == "a site that there is not":
            for name, value in (("clients", 9), ("sizes", 5), ("signatures", b"x")):
                changed[name].append(value)
            changed["mask_keys"].append(masking.public(fresh.mask))
            changed["seal_keys"].append(masking.public(fresh.seal))
        elif lie == "another size":
            changed["sizes"][0 if k else 1] = 10**6
        else:
            changed["signatures"][0 if k else 1] = b""
        return {**facts, **changed}

    hand.edit_question = swap
    found = run(hand)
    assert found.means == {}
    told = {cause for _, cause in found.lost.values()}
    assert any("must be signed by the site whose they are" in own or "public key of every other" in own for own in told)


def test_the_server_refuses_what_others_would_not_believe_before_they_are_asked(tmp_path, keys):
    """One site signs with a key that is nobody's: the round goes on without it, and it is the one that is named."""
    hand = signing(tmp_path, keys)
    hand.sessions[2].signatures = Signatures(keys / "site4", keys)
    found = run(hand, keys=keys)
    assert found.refused == {2}
    assert "must be signed" in found.lost[2][1]
    assert found.means
    unsigned = signing(tmp_path / "b", keys)
    unsigned.sessions[1].signatures = None
    found = run(unsigned, keys=keys)
    assert found.refused == {1}
    assert found.means


def test_shares_that_nobody_can_open_name_the_site_that_sealed_them(tmp_path):
    hand = Hand(tmp_path, [10, 20, 30, 40])

    def junk(k, stage, content):
        if (k, stage) != (3, "share"):
            return content
        facts = wire.facts_of(content)
        sealed = dict.fromkeys(sealed_of_facts(facts), b"junk" * 50)
        return wire.content({**facts, **sealed_to_facts(sealed)})

    hand.edit_answer = junk
    found = hand.run()
    assert found.means == {}
    assert found.refused == {3}
    assert found.lost[3] == ("share", "3 of 3 others cannot open its shares")


@pytest.mark.parametrize("lie", ["junk", "another's", "one is missing", "none"])
def test_a_site_that_tells_no_shares_at_the_end_stops_nothing(tmp_path, lie, caplog):
    """Others are enough, whoever comes first in the list; it is named by the hash of the seed that was shared."""
    hand = Hand(tmp_path, [10, 20, 30, 40, 50])

    def edit(k, stage, content):
        if (k, stage) != (0, "unmask"):
            return content
        told = sealed_of_facts(wire.facts_of(content))
        changed = {
            "junk": {other: b"x" * len(share) for other, share in told.items()},
            "another's": {other: told[(other + 1) % 5] for other in told},
            "one is missing": {other: share for other, share in told.items() if other != 3},
            "none": {},
        }[lie]
        return wire.content(sealed_to_facts(changed))

    hand.edit_answer = edit
    found = hand.run()
    assert found.means, found.lost
    assert_states_equal(found.means["delta"], Hand(tmp_path / "b", [10, 20, 30, 40, 50]).run().means["delta"])
    if lie in ("junk", "another's"):
        assert "client 0 tells a share of client" in caplog.text
        assert not any(f"client {k} tells" in caplog.text for k in range(1, 5)), "nobody else is named"


def test_a_signature_of_no_list_stops_nothing(tmp_path, keys, caplog):
    hand = signing(tmp_path, keys, consistency=True)
    hand.edit_answer = lambda k, at, own: wire.content({"consent": b"junk"}) if (k, at) == (1, "consent") else own
    assert run(hand, keys=keys).means
    assert "client 1 signs no list of survivors" in caplog.text


def test_a_list_that_was_signed_counts_for_its_own_session_alone(tmp_path, keys):
    """The same number again, with other keys: what was signed before is no consent."""
    from fedgan_lightning.deployment.signatures import consent_text

    transcripts = [masking.transcript(77, {0: masking.Member(bytes([n]), b"s", 1)}, "subject") for n in (1, 2)]
    texts = [consent_text(77, [0, 1, 2], own) for own in transcripts]
    assert texts[0] != texts[1]
    signed = Signatures(keys / "site0", keys).sign(texts[0])
    checker = Signatures(None, keys)
    checker.check_consents(77, [0, 1, 2], {0: signed}, transcript=transcripts[0], needed=1)
    with pytest.raises(ProtocolError, match="must be signed by the site"):
        checker.check_consents(77, [0, 1, 2], {0: signed}, transcript=transcripts[1], needed=1)


# ---------------------------------------------------------------------- what is asked, and whose updates are in


def test_a_site_is_not_asked_for_something_else_than_the_others(tmp_path):
    """Another query for the victim under the same masks: its sum would be told apart."""
    hand = Hand(tmp_path, [10, 20, 30, 40])

    def lie(k, facts):
        return {**facts, "subject": "other"} if (k, facts["ask"]) == (1, "share") else facts

    hand.edit_question = lie
    found = hand.run()
    assert found.means == {}
    causes = " ".join(cause for _, cause in found.lost.values())
    assert "or another task" in causes or "that all members were told of" in causes


def test_different_lists_of_survivors_open_nothing_where_sites_sign_them(tmp_path, keys):
    """Shares of both secrets of a site need a majority for each list; with signatures one list is enough to stop it."""
    hand = signing(tmp_path, keys, consistency=True)

    def lie(k, facts):
        if facts["ask"] == "consent" and k == 0:
            return {**facts, "survivors": [0, 1, 2]}
        return facts

    hand.edit_question = lie
    found = run(hand)
    assert found.means == {}, "one signature is of another list"


# ---------------------------------------------------------------------- a restart


def strict(tmp_path) -> dict[int, dict[str, str]]:
    """Sites with a policy of their own, which is the default one."""
    path = tmp_path / "policy.yaml"
    path.write_text("most_queries_a_day: 100\n")
    return {k: {"policy": str(path)} for k in range(4)}


def checkpoint(tmp_path, name="secure"):
    return tmp_path / name / "checkpoints" / "last.ckpt"


def test_a_restart_from_an_older_checkpoint_tells_no_single_site(tmp_path):
    """Round 1 with four sites, then again with three: the two means would differ by the fourth site's own update."""
    told, rounds = strict(tmp_path), "--federation.rounds"
    options = [*LENIENT, "--federation.rules.max_attempts", "2"]
    deploy(tmp_path, grid_of(tmp_path / "state", told=told), *options, rounds, "1")
    shutil.copy(checkpoint(tmp_path), tmp_path / "older.ckpt")
    deploy(tmp_path, grid_of(tmp_path / "state", told=told), *options, rounds, "2")
    whole = weights(tmp_path, "secure")
    shutil.copy(tmp_path / "older.ckpt", checkpoint(tmp_path))

    class Away(type(grid_of(tmp_path / "state"))):
        def get_node_ids(self):
            gone = {103} if self.asked else set()  # it joins, and is away when the round is asked
            return [node for node in super().get_node_ids() if node not in gone]

    # The server has what was opened, and asks nobody again:
    grid = grid_of(tmp_path / "state", told=told)
    grid.__class__ = Away
    deploy(tmp_path, grid, *options, rounds, "2")
    assert_states_equal(weights(tmp_path, "secure"), whole)
    assert "train" not in {kind for _, kind in grid.asked}
    # Without that, or with a server that wants to know:
    shutil.copy(tmp_path / "older.ckpt", checkpoint(tmp_path))
    shutil.rmtree(tmp_path / "secure" / "opened")
    grid = grid_of(tmp_path / "state", told=told)
    grid.__class__ = Away
    with pytest.raises(QuorumError, match="fewer in each of 2 attempts"):
        deploy(tmp_path, grid, *options, rounds, "2")
    assert read_checkpoint(checkpoint(tmp_path))["global_step"] == 1
    record = (tmp_path / "state" / "audit.jsonl").read_text()
    assert "one group of sites alone" in record
    # With all four the same group is there again:
    deploy(tmp_path, grid_of(tmp_path / "state", told=told), *options, rounds, "2")
    assert summary(tmp_path, "secure")["status"] == "finished"
