"""Transforms of updates: what they send, what the server makes of it, what they keep, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgan_lightning import ConfigurationError, SequentialExecutor, UpdateError, UpdateValidator
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import ClientUpdate, UpdateEntry
from fedgan_lightning.transforms import ClipUpdates, SignCompression
from fedgan_lightning.update_transform import RoundFacts, UpdateTransform
from tests.conftest import federate, ring_data, ring_gan, sgd


def update(seed=0, *, scale=1.0, dtype=torch.float32) -> ClientUpdate:
    generator = torch.Generator().manual_seed(seed)
    delta = {
        "generator.w": scale * torch.randn(3, 5, generator=generator, dtype=dtype),
        "discriminator.w": scale * torch.randn(7, generator=generator, dtype=dtype),
    }
    return ClientUpdate(0, 10, delta, {}, {"generator.mean": torch.ones(3)}, round=0)


def stages(chain, own):
    return chain.stages_of({}, Layout.of(own.delta), Layout.of(own.extras))


def through(chain, own, private=None):
    """Return what is sent, what the server makes of it, and what the client keeps."""
    sent, kept = chain.sent(own, private or {}, {}, facts=RoundFacts())
    return sent, chain.received(sent, {}, before=own, facts=RoundFacts()), kept


def norm(own, prefix=""):
    return float(torch.cat([v.flatten().double() for n, v in own.delta.items() if n.startswith(prefix)]).norm())


class Tight(UpdateTransform):
    """Says that no number is above a tenth, and changes none."""

    def schema(self, entries):
        return {name: dataclasses.replace(entry, bound=0.1) for name, entry in entries.items()}

    def client(self, update, *, entries, private, facts):
        return update, private


def test_a_bound_that_a_transform_sets_is_looked_at():
    own, chain = update(), TransformChain([Tight()])
    with pytest.raises(UpdateError, match="client 3"):
        chain.decoded("client 3", own, stages(chain, own), facts=RoundFacts())


class TestClipping:
    @given(seed=st.integers(0, 100), bound=st.floats(0.01, 100))
    def test_nobody_is_longer_than_the_bound_and_directions_stay(self, seed, bound):
        own, chain = update(seed), TransformChain([ClipUpdates(max_norm=bound)])
        sent, received, _ = through(chain, own)
        assert norm(sent) <= bound * (1 + 1e-5)
        factor = min(1.0, bound / norm(own))
        for name, value in own.delta.items():
            torch.testing.assert_close(received.delta[name], value * factor, rtol=1e-5, atol=1e-7)
        assert torch.equal(sent.extras["generator.mean"], own.extras["generator.mean"])

    def test_networks_may_have_bounds_of_their_own(self):
        own, chain = update(), TransformChain([ClipUpdates(max_norm=0.5, over="network")])
        sent, _, _ = through(chain, own)
        assert norm(sent, "generator") == pytest.approx(0.5, rel=1e-5)
        assert norm(sent, "discriminator") == pytest.approx(0.5, rel=1e-5)

    def test_a_bound_of_nothing_is_refused(self):
        with pytest.raises(ConfigurationError, match="max_norm of ClipUpdates .* above 0"):
            ClipUpdates(max_norm=0)


class TestSigns:
    def test_a_number_takes_a_bit(self):
        own, chain = update(), TransformChain([SignCompression()])
        sent, received, kept = through(chain, own)
        assert {n: (v.dtype, v.numel()) for n, v in sent.delta.items() if n.endswith("signs")} == {
            "generator.w/signs": (torch.uint8, 2),
            "discriminator.w/signs": (torch.uint8, 1),
        }
        for name, value in own.delta.items():
            expected = torch.where(value >= 0, 1.0, -1.0) * value.abs().mean()
            torch.testing.assert_close(received.delta[name], expected)
            torch.testing.assert_close(kept[f"transform/0/residual/{name}"], value - expected)

    def test_what_is_lost_comes_with_the_next(self):
        """With e_0 = 0: sum of what the server received = sum of updates - e_T."""
        chain, private, total, received = TransformChain([SignCompression()]), {}, 0.0, 0.0
        for seed in range(30):
            own = update(seed)
            _, seen, private = through(chain, own, private)
            total, received = total + own.delta["generator.w"], received + seen.delta["generator.w"]
        rest = private["transform/0/residual/generator.w"]
        torch.testing.assert_close(received + rest, total, rtol=1e-4, atol=1e-4)

    def test_without_feedback_nothing_is_kept(self):
        chain = TransformChain([SignCompression(error_feedback=False)])
        assert through(chain, update())[2] == {}
        assert chain.client_state(stages(chain, update())[0]) == {}

    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
    def test_any_number_of_numbers(self, size):
        own = dataclasses.replace(update(), delta={"g.w": torch.randn(size)})
        _, received, _ = through(TransformChain([SignCompression()]), own)
        assert torch.equal(received.delta["g.w"].sign(), torch.where(own.delta["g.w"] >= 0, 1.0, -1.0))

    def test_integers_pass_as_they_are(self):
        own = dataclasses.replace(update(), delta={"g.n": torch.arange(5)})
        _, received, _ = through(TransformChain([SignCompression()]), own)
        assert torch.equal(received.delta["g.n"], torch.arange(5))

    def test_masks_need_linear_codes(self):
        with pytest.raises(ConfigurationError, match="codes must be linear"):
            SignCompression().check(is_secure=True)


class TestServer:
    """What comes is checked before it is decoded, and again after it."""

    SPOILED = {
        "missing": lambda own: {n: v for n, v in own.items() if n != "generator.w/signs"},
        "shape": lambda own: {**own, "generator.w/signs": torch.zeros(3, dtype=torch.uint8)},
        "dtype": lambda own: {**own, "generator.w/signs": torch.zeros(2)},
        "NaN": lambda own: {**own, "generator.w/scale": torch.tensor(torch.nan)},
        "text": lambda own: {**own, "generator.w/scale": "1"},
    }

    @pytest.mark.parametrize("kind", SPOILED)
    def test_what_is_no_code_is_refused_by_name(self, kind):
        chain, own = TransformChain([SignCompression()]), update()
        sent, _, _ = through(chain, own)
        spoiled = dataclasses.replace(sent, delta=self.SPOILED[kind](dict(sent.delta)))
        with pytest.raises(UpdateError, match=r"client 3: generator.w/(signs|scale) (is|has shape)"):
            chain.decoded("client 3", spoiled, stages(chain, own), facts=RoundFacts())

    def test_the_server_decodes_what_the_client_meant(self):
        chain, own = TransformChain([ClipUpdates(max_norm=0.3), SignCompression()]), update()
        sent, received, _ = through(chain, own)
        decoded = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts())
        for name, value in received.delta.items():
            assert torch.equal(decoded.delta[name], value)

    def test_the_total_passes_the_chain_in_reverse(self):
        seen = []

        class Note(UpdateTransform):
            def __init__(self, name):
                self.name = name

            def client(self, update, *, entries, private, facts):
                return update, private

            def total(self, total):
                seen.append(self.name)
                return total

        TransformChain([Note("first"), Note("second")]).total(None)
        assert seen == ["second", "first"]


class FixedSum(UpdateTransform):
    """The sum of all updates over a fixed number: nobody's weight counts."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def schema(self, entries):
        return {
            name: dataclasses.replace(entry, rule="sum", denominator=self.divisor) if entry.kind == "vector" else entry
            for name, entry in entries.items()
        }

    def client(self, update, *, entries, private, facts):
        return update, private


class TestFederation:
    def test_the_ledger_counts_what_is_sent(self):
        plain, coded = (
            federate(ring_gan(optimizer=sgd), ring_data(), rounds=2, local_steps=2, transforms=transforms)[1].ledger
            for transforms in ([], [SignCompression()])
        )
        assert sum(coded.bytes_up.values()) < 0.12 * sum(plain.bytes_up.values())
        assert coded.bytes_down == plain.bytes_down

    def test_a_bound_that_nobody_reaches_changes_nothing(self):
        plain, clipped = (
            federate(ring_gan(), ring_data(), rounds=2, local_steps=2, transforms=transforms)[0].model.state_dict()
            for transforms in ([], [ClipUpdates(max_norm=1e6)])
        )
        assert all(torch.equal(plain[name], clipped[name]) for name in plain)

    def test_coded_updates_of_a_hostile_client_are_left_out(self):
        class Liar(SequentialExecutor):
            def run(self, tasks):
                for own in super().run(tasks):
                    if own.client_id == 1:
                        spoiled = {n: torch.full_like(v, 200) for n, v in own.delta.items() if n.endswith("signs")}
                        own = dataclasses.replace(own, delta={**own.delta, **spoiled, "more": torch.ones(2)})
                    yield own

        from fedgan_lightning import RoundRules

        options = {"validator": UpdateValidator(), "rules": RoundRules(min_report_fraction=0.5)}
        _, orchestrator, _ = federate(
            ring_gan(optimizer=sgd), ring_data(), rounds=2, local_steps=1, executor=Liar(),
            transforms=[SignCompression()], **options,
        )  # fmt: skip
        assert orchestrator.ledger.events == {"rejected": 2}
        assert {own["client_id"] for own in orchestrator.ledger.incidents} == {1}

    def test_a_divisor_may_be_fixed(self):
        """sum_k delta_k / 8 over four clients is half of their uniform mean."""
        from fedgan_lightning.aggregators import WeightedMean

        def moved(**options):
            gan = ring_gan(optimizer=sgd)
            before = {name: value.detach().clone() for name, value in gan.named_parameters()}
            server, _, _ = federate(gan, ring_data(), rounds=1, local_steps=2, **options)
            return {name: value.detach() - before[name] for name, value in server.model.named_parameters()}

        mean, fixed = moved(aggregator=WeightedMean("uniform")), moved(transforms=[FixedSum(8.0)])
        for name in mean:
            torch.testing.assert_close(fixed[name], mean[name] / 2, rtol=1e-4, atol=1e-6)


def test_an_entry_says_what_becomes_of_it():
    entry = UpdateEntry((2,), torch.float32)
    assert (entry.group, entry.rule, entry.weight, entry.denominator, entry.kind) == (
        "extras", "aggregator", "one", None, "value",
    )  # fmt: skip
