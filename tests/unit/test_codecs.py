"""Codes of updates: what they cost to the byte, their bounds in closed form, error feedback, hostile codes, resume."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import ConfigurationError, SequentialExecutor, UpdateError, UpdateValidator, VectorizedExecutor
from fedgan_lightning.algorithms import MDGAN, Scaffold
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.federation.aggregation import checked_states
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.federation.transforms.dense import packed_bits, unpacked_bits
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import ClientUpdate, UpdateEntry
from fedgan_lightning.transforms import (
    QSGD,
    BFloat16,
    ClipUpdates,
    Int8,
    LogMoments,
    PowerSGD,
    RandomSparse,
    RoundFacts,
    SignCompression,
    TopK,
)
from tests.conftest import adam, assert_states_equal, federate, ring_data, ring_gan, sgd, slow

CODECS = {
    "bfloat16": lambda **own: BFloat16(sections=["updates"], **own),
    "int8": Int8,
    "int8, nearest": lambda **own: Int8(stochastic=False, **own),
    "qsgd": QSGD,
    "top-k": lambda **own: TopK(share=0.1, **own),
    "random-k": lambda **own: RandomSparse(share=0.25, **own),
    "random-k, shared": lambda **own: RandomSparse(share=0.25, shared=True, **own),
    "power": lambda **own: PowerSGD(rank=1, **own),
    "signs": SignCompression,
}


def entry(*shape, dtype=torch.float32):
    return UpdateEntry(tuple(shape), dtype, group="delta", kind="vector")


def coded(codec, value, *, seed=0, round=0, state=None):
    """Return the codes of one entry, and what they stand for."""
    facts, own = RoundFacts(round, {}, seed), entry(*value.shape, dtype=value.dtype)
    codes = codec.encode(value, name="g.w", facts=facts, state=codec.kept(own) if state is None else state)
    return codes, codec.restore(codes, own, name="g.w", facts=RoundFacts(round, {}))


def size_of(codes):
    return sum(own.numel() * own.element_size() for own in codes.values())


# ---------------------------------------------------------------------- closed forms


def test_bfloat16_is_off_by_a_share():
    value = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    codes, found = coded(BFloat16(), value)
    assert float(((found - value) / value).abs().max()) <= 2.0**-8
    assert size_of(codes) == 2000


@pytest.mark.parametrize("stochastic", [True, False])
def test_int8_is_off_by_a_step_at_most(stochastic):
    value = torch.randn(7, 11)
    codes, found = coded(Int8(stochastic=stochastic), value)
    step = float(value.abs().max()) / 127
    assert float((found - value).abs().max()) <= step * (1.0 if stochastic else 0.5) * (1 + 1e-5)
    assert size_of(codes) == 77 + 4


@pytest.mark.parametrize(
    "codec", [Int8(), QSGD(levels=3), RandomSparse(share=0.25), RandomSparse(share=0.25, shared=True)]
)
def test_the_mean_over_draws_is_the_number(codec):
    value, count = torch.randn(8, dtype=torch.float64), 4_000
    found = torch.stack([coded(codec, value, seed=k, round=k)[1] for k in range(count)])
    error = (found.mean(0) - value).abs()
    assert bool((error <= 5 * found.std(0) / math.sqrt(count) + 1e-12).all())


def test_qsgd_of_three_and_four():
    """v = (3, 4), s = 1: each is sent with probability .6 and .8; the variance 10 is below its bound 35.4."""
    value = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = torch.stack([coded(QSGD(levels=1), value, seed=k)[1] for k in range(6_000)])
    assert found.unique().tolist() == [0.0, 5.0]
    assert (found > 0).double().mean(0).tolist() == pytest.approx([0.6, 0.8], abs=0.03)
    variance = float((found - value).square().sum(1).mean())
    assert variance == pytest.approx(10.0, abs=0.8)
    assert variance <= min(2 / 1, math.sqrt(2) / 1) * 25


@given(levels=st.integers(1, 127), size=st.integers(1, 200), seed=st.integers(0, 100))
@settings(max_examples=60)
def test_qsgd_s_size_and_its_bound(levels, size, seed):
    value = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    codes, found = coded(QSGD(levels=levels), value, seed=seed)
    assert size_of(codes) == math.ceil(size * math.ceil(math.log2(2 * levels + 1)) / 8) + 4
    assert float((found - value).abs().max()) <= float(value.norm()) / levels * (1 + 1e-5)


@given(bits=st.integers(1, 8), numbers=st.lists(st.integers(0, 255), max_size=50))
@settings(max_examples=60)
def test_bits_are_packed_and_found_again(bits, numbers):
    values = torch.tensor([own % 2**bits for own in numbers], dtype=torch.long)
    packed = packed_bits(values, bits=bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert torch.equal(unpacked_bits(packed, bits=bits, count=len(values)), values)


def test_random_places_lose_what_the_formula_says():
    """E |Q - v|^2 = (d / k - 1) |v|^2, over all pairs of places for d = 4, k = 2."""
    value = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    errors = []
    for places in itertools.combinations(range(4), 2):
        found = torch.zeros(4, dtype=torch.float64)
        found[list(places)] = 2 * value[list(places)]
        errors.append(float((found - value).square().sum()))
    drawn = [float((coded(RandomSparse(share=0.5), value, seed=k)[1] - value).square().sum()) for k in range(3000)]
    assert sum(errors) / 6 == pytest.approx(float(value.square().sum()))
    assert {round(own, 9) for own in drawn} == {round(own, 9) for own in errors}
    assert sum(drawn) / 3000 == pytest.approx(float(value.square().sum()), rel=0.05)


@pytest.mark.parametrize("size, share, expected", [(1000, 0.01, 10 * 8), (1000, 0.2, 200 * 4 + 125), (4, 0.25, 4 + 1)])
def test_the_largest_and_their_places(size, share, expected):
    value = torch.randn(size)
    codes, found = coded(TopK(share=share), value)
    count = max(1, round(size * share))
    assert size_of(codes) == expected
    kept = found.nonzero().flatten()
    assert {*kept.tolist()} == {*value.abs().topk(count).indices.tolist()}
    assert torch.equal(found[kept], value[kept])
    assert float((found - value).square().sum()) <= (1 - count / size) * float(value.square().sum()) * (1 + 1e-5)


def test_the_largest_of_four():
    """(4, 3, 2, 1), k = 1: 14 <= 22.5; signs of it lose 5."""
    value = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert float((coded(TopK(share=0.25), value)[1] - value).square().sum()) == 14.0
    assert float((coded(SignCompression(), value)[1] - value).square().sum()) == pytest.approx(5.0)


def test_a_matrix_of_rank_one_is_exact_after_one_pass():
    value = torch.outer(torch.randn(20, dtype=torch.float64), torch.randn(30, dtype=torch.float64))
    codes, found = coded(PowerSGD(rank=1), value)
    torch.testing.assert_close(found, value, atol=1e-12, rtol=1e-12)
    assert size_of(codes) == 8 * (20 + 30)


def test_a_warm_start_finds_the_largest_singular_vectors():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(20, 3))[0], torch.linalg.qr(torch.randn(15, 3))[0]
    value, codec = u @ torch.diag(torch.tensor([5.0, 2.0, 1.0])) @ v.T, PowerSGD(rank=1)
    state = codec.kept(entry(20, 15))
    errors = []
    for seed in range(12):
        codes, found = coded(codec, value, seed=seed, state=state)
        state = codec.next_state(codes, state)
        errors.append(float((found - value).norm()))
    assert errors[-1] == pytest.approx(math.sqrt(5.0), rel=1e-4)
    assert errors[-1] <= errors[0]


# ---------------------------------------------------------------------- all codecs


def update(seed=0, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    delta = {
        "generator.w": torch.randn(12, 9, generator=generator, dtype=dtype),
        "generator.b": torch.randn(7, generator=generator, dtype=dtype),
        "discriminator.k": torch.randn(6, 3, 3, 3, generator=generator, dtype=dtype),
    }
    return ClientUpdate(0, 10, delta, {}, {"generator.mean": torch.ones(3)}, round=seed)


def stages(chain, own):
    return chain.stages_of({}, Layout.of(own.delta), Layout.of(own.extras))


@pytest.mark.parametrize("name", CODECS)
def test_what_was_sent_and_what_is_kept_add_up(name):
    """sum of sent + e_T = sum of v, in float64."""
    chain = TransformChain([CODECS[name](error_feedback=True)])
    private, wanted, received = {}, {}, {}
    for seed in range(20):
        own = update(seed)
        if not private:
            private = chain.client_state(chain.stages(stages(chain, own)[0])[0])
        sent, private = chain.sent(own, private, {}, facts=RoundFacts(seed, {}, seed))
        seen = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts(seed, {}))
        for key, value in own.delta.items():
            wanted[key], received[key] = wanted.get(key, 0) + value, received.get(key, 0) + seen.delta[key]
    for key, value in wanted.items():
        rest = private.get(f"transform/0/residual/{key}", 0)
        torch.testing.assert_close(received[key] + rest, value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_the_server_decodes_what_the_client_meant(name, dtype):
    if name == "power" and dtype == torch.bfloat16:
        pytest.skip("torch has no QR of bfloat16")
    chain, own = TransformChain([ClipUpdates(max_norm=3.0), CODECS[name]()]), update(dtype=dtype)
    facts = RoundFacts(4, {}, 7)
    sent, _ = chain.sent(own, {}, {}, facts=facts)
    meant = chain.received(sent, {}, before=own, facts=facts)
    found = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts(4, {}))
    for key, value in meant.delta.items():
        assert value.dtype == dtype
        assert torch.equal(found.delta[key], value)
    assert torch.equal(found.extras["generator.mean"], own.extras["generator.mean"])


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e15])
@pytest.mark.parametrize("name", CODECS)
def test_nothing_and_very_little_and_very_much(name, value):
    own = dataclasses.replace(update(), delta={"g.w": torch.full((12, 9), value)})
    chain = TransformChain([CODECS[name]()])
    sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 1))
    found = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts()).delta["g.w"]
    assert bool(torch.isfinite(found).all())
    assert value > 0 or not bool(found.any())


HOSTILE = {
    "top-k": {"places": torch.tensor([-5, 10**6, 3, 3, 7, 2**31 - 1, 0, 1, 2, 4, 5], dtype=torch.int32)},
    "random-k": {"seed": torch.tensor(-5)},
    "qsgd": {"codes": torch.full((54,), 255, dtype=torch.uint8)},
    "int8": {"codes": torch.full((12, 9), -128, dtype=torch.int8)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_codes_that_no_client_forms_break_nothing(name):
    codec = TopK(share=0.1, error_feedback=False) if name == "top-k" else CODECS[name]()
    own = dataclasses.replace(update(), delta={"g.w": torch.randn(12, 9)})
    chain = TransformChain([codec])
    sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 1))
    delta = {**sent.delta, **{f"g.w/{part}": value for part, value in HOSTILE[name].items()}}
    found = chain.decoded("client 0", dataclasses.replace(sent, delta=delta), stages(chain, own), facts=RoundFacts())
    assert bool(torch.isfinite(found.delta["g.w"]).all())
    assert found.delta["g.w"].shape == (12, 9)


@pytest.mark.parametrize("name", CODECS)
def test_a_code_that_is_missing_or_not_finite_is_refused_by_name(name):
    chain, own = TransformChain([CODECS[name]()]), update()
    sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 1))
    code = next(key for key in sent.delta if key.startswith("generator.w/"))
    gone = dataclasses.replace(sent, delta={key: own for key, own in sent.delta.items() if key != code})
    with pytest.raises(UpdateError, match=f"client 3: {code} is a NoneType"):
        chain.decoded("client 3", gone, stages(chain, own), facts=RoundFacts())
    spoiled = {key: own * torch.nan if own.is_floating_point() else own for key, own in sent.delta.items()}
    with pytest.raises(UpdateError, match="client 3: generator.* is not finite"):
        chain.decoded("client 3", dataclasses.replace(sent, delta=spoiled), stages(chain, own), facts=RoundFacts())


# ---------------------------------------------------------------------- federations


def run(*transforms, gan=None, executor=None, **options):
    gan = ring_gan(optimizer=sgd) if gan is None else gan
    options = {"rounds": 4, "local_steps": 2, **options}
    executor = SequentialExecutor() if executor is None else executor
    return federate(gan, ring_data(), transforms=list(transforms), executor=executor, **options)


def everything(result):
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.moments, **server.algorithm_state, **private}


@pytest.mark.parametrize("name", CODECS)
def test_the_ledger_counts_what_is_sent(name):
    chain, gan = TransformChain([CODECS[name]()]), ring_gan(optimizer=sgd)
    delta = {key: value.detach() for key, value in gan.named_parameters()}
    own = ClientUpdate(0, 10, delta, {}, {}, round=0)
    sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 1))
    _, orchestrator, _ = run(CODECS[name]())
    assert sum(orchestrator.ledger.bytes_up.values()) == 4 * 4 * size_of(sent.delta)
    assert sum(orchestrator.ledger.bytes_down.values()) == 4 * 4 * size_of(delta)


@pytest.mark.parametrize("name", ["int8", "top-k", "power", *map(slow, sorted({*CODECS} - {"int8", "top-k", "power"}))])
def test_stacked_clients_send_the_same_codes(name):
    found = [
        everything(run(CODECS[name](error_feedback=True), gan=ring_gan(optimizer=sgd).double(), executor=executor))
        for executor in (SequentialExecutor(), VectorizedExecutor(), VectorizedExecutor(chunk_size=3))
    ]
    for other in found[1:]:
        assert_states_equal(other, found[0], atol=1e-6, rtol=1e-4)  # a rounding may tip a code


@pytest.mark.parametrize("name", CODECS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    from fedgan_lightning import FederatedOrchestrator, ServerModule
    from tests.conftest import quiet_trainer

    def made():
        return CODECS[name](error_feedback=True)

    whole = run(made(), rounds=5)
    _, _, trainer = run(made(), rounds=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = FederatedOrchestrator(rounds=5, local_steps=2, transforms=[made()], executor=SequentialExecutor())
    server, trainer = ServerModule(ring_gan(optimizer=sgd, seed=7)), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert_states_equal(everything((server, again, trainer)), everything(whole))


def test_moments_in_bfloat16_stay_squares_and_halve_their_bytes():
    full, half = (run(*own, gan=ring_gan(optimizer=adam)) for own in ((), (BFloat16(sections=["moments"]),)))
    up = [result[1].ledger.bytes_up["optimizer"] for result in (full, half)]
    counts = 4 * 4 * 4 * len([name for name in full[0].moments if name.endswith("/step")])
    assert up[1] - counts == (up[0] - counts) / 2
    for name, value in half[0].moments.items():
        torch.testing.assert_close(value, full[0].moments[name], rtol=0.1, atol=1e-4)
        assert not name.endswith("exp_avg_sq") or float(value.min()) >= 0


def test_residuals_of_an_update_that_does_not_count_are_forgotten():
    rules, validator = RoundRules(min_report_fraction=0.5), UpdateValidator()
    executor = FaultyExecutor(SequentialExecutor(), nan=0.3, crash=0.2)
    _, orchestrator, _ = run(TopK(share=0.1), executor=executor, rounds=8, rules=rules, validator=validator)
    assert {"rejected", "failed"} <= orchestrator.ledger.events.keys()
    for own in orchestrator.store.state_dict().values():
        assert all(bool(torch.isfinite(value).all()) for value in own.values())


@pytest.mark.parametrize("codec", [Int8(), TopK(share=0.2)])
def test_an_algorithm_s_vectors_are_coded_too(codec):
    _, plain, _ = run(algorithm=Scaffold())
    _, coded_, _ = run(codec, algorithm=Scaffold())
    assert coded_.ledger.bytes_up["control"] < 0.6 * plain.ledger.bytes_up["control"]
    sync = {"generator": "server", "discriminator": "local"}
    _, plain, _ = run(algorithm=MDGAN(), sync=sync)
    _, coded_, _ = run(Int8(), algorithm=MDGAN(), sync=sync)
    assert coded_.ledger.bytes_up["feedback"] < 0.3 * plain.ledger.bytes_up["feedback"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TopK(sections=["moments"]), "unexpected"),
        (lambda: BFloat16(sections=["weights"]), "sections of BFloat16 must be a list, each one of"),
        (lambda: BFloat16(sections=[]), "got none"),
        (lambda: TopK(share=0.0), "share of TopK"),
        (lambda: QSGD(levels=128), "levels of QSGD"),
        (lambda: PowerSGD(rank=0), "rank of PowerSGD"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises((ConfigurationError, TypeError), match=words):
        make()


@pytest.mark.parametrize("name", CODECS)
def test_masks_need_codes_that_add_up(name):
    if name == "random-k, shared":
        CODECS[name]().check(is_secure=True)
        return
    with pytest.raises(ConfigurationError, match="codes must be linear .* got .* under federation.secure"):
        CODECS[name]().check(is_secure=True)


@pytest.mark.parametrize("first", [TopK(share=0.2), RandomSparse(share=0.2)])
def test_what_is_left_of_a_sparse_code_can_be_coded_again(first):
    """[TopK, Int8]: numbers in one byte, places as they are; and the residual is that of both."""
    _, alone, _ = run(first)
    _, both, _ = run(first, Int8())
    assert sum(both.ledger.bytes_up.values()) < 0.85 * sum(alone.ledger.bytes_up.values())
    kept = {name for own in both.store.state_dict().values() for name in own}
    assert not any(name.startswith("transform/1/") for name in kept)


def test_sums_of_shared_places_are_decoded_as_sums():
    """What a server under secure aggregation sees: the mean of codes is the code of the mean."""
    from fedgan_lightning.protocol import UpdateSum

    chain, facts = TransformChain([RandomSparse(share=0.3, shared=True)]), RoundFacts(5, {})
    ups = [update(seed) for seed in (1, 2)]
    sent = [chain.sent(own, {}, {}, facts=RoundFacts(5, {}, seed))[0] for seed, own in enumerate(ups)]
    mean = {key: (sent[0].delta[key] + sent[1].delta[key]) / 2 for key in sent[0].delta}
    total = UpdateSum(5, (), mean, {"generator.mean": torch.ones(3)}, {})
    found = chain.decoded_sum("the sum", total, stages(chain, ups[0]), facts=facts)
    single = [chain.decoded("client", own, stages(chain, ups[0]), facts=facts) for own in sent]
    for key, value in found.delta.items():
        torch.testing.assert_close(value, (single[0].delta[key] + single[1].delta[key]) / 2, atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------------- moments for a byte


class TestLogMoments:
    SQUARE, MEAN = "optimizer/0/generator.w/exp_avg_sq", "optimizer/0/generator.w/exp_avg"

    @pytest.mark.parametrize("bits", [3, 4, 5, 8])
    def test_squares_lie_on_a_grid_and_their_mean_is_exact(self, bits):
        codec, own = LogMoments(bits=bits), UpdateEntry((64,), torch.float64)
        value = torch.randn(64, dtype=torch.float64).square() * 10.0 ** -torch.randint(0, 6, (64,))
        value[:8] = 0.0
        found, count = [], 3000
        for seed in range(count):
            codes = codec.encode(value, name=self.SQUARE, facts=RoundFacts(0, {}, seed), state={})
            found.append(codec.restore(codes, own, name=self.SQUARE, facts=RoundFacts()))
        drawn = torch.stack(found)
        assert size_of(codes) == 64 * bits // 8 + 8
        near = value > value.max() * 2.0 ** (codec.step - 24)
        ratio = (drawn / value)[:, near].log2().abs()
        assert float(ratio.max()) <= codec.step * (1 + 1e-9)
        error = (drawn.mean(0) - value).abs()[near]
        rare = 10 * value[near] * 2**codec.step / count  # Bernstein: a neighbour that is hardly ever drawn
        assert bool((error <= 5 * drawn.std(0)[near] / math.sqrt(count) + rare).all())
        assert torch.equal(drawn[0] == 0, value == 0)

    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_squares_that_stand_still_are_drawn_once(self, bits, dtype):
        """Whatever the largest of them does, and whoever has it: the grid is one for all."""
        codec, own = LogMoments(bits=bits), UpdateEntry((200,), dtype)
        first = (torch.rand(200, dtype=dtype) * 1e-6).clamp(min=1e-8)
        settled = None
        for seed in range(30):
            first[0] = 1.3e-6 * (1 + 0.07 * seed)
            codes = codec.encode(first, name=self.SQUARE, facts=RoundFacts(0, {}, seed), state={})
            first = codec.restore(codes, own, name=self.SQUARE, facts=RoundFacts())
            settled = first.clone() if settled is None else settled
            torch.testing.assert_close(first[1:], settled[1:], rtol=1e-6, atol=0.0)

    def test_a_square_that_moves_slowly_moves(self):
        """One percent a round, as with beta2 = .999 and ten steps; rounded to the nearest it would stand still."""
        codec, own, value = LogMoments(), UpdateEntry((2000,), torch.float64), torch.ones(2000, dtype=torch.float64)
        value[0] = 10.0
        for number in range(100):
            codes = codec.encode(value, name=self.SQUARE, facts=RoundFacts(0, {}, number), state={})
            value = codec.restore(codes, own, name=self.SQUARE, facts=RoundFacts())
            value = torch.cat([value[:1] * 0 + 10.0, value[1:] * 0.99])
        assert float(value[1:].mean()) == pytest.approx(0.99**100, rel=0.25)

    def test_a_mean_has_no_bit_or_two(self):
        with pytest.raises(ConfigurationError, match=r"LogMoments.mean_bits must be 0 or in \[2, 8\]; got 1. Zero has"):
            LogMoments(mean_bits=1)

    @pytest.mark.parametrize("mean_bits", [2, 4, 7])
    def test_means_are_measured_by_their_squares(self, mean_bits):
        chain = TransformChain([LogMoments(bits=8, mean_bits=mean_bits)])
        square = torch.rand(500, dtype=torch.float64) * 10.0 ** -torch.randint(0, 5, (500,))
        extras = {self.MEAN: 0.8 * square.sqrt() * (torch.rand(500) - 0.5), self.SQUARE: square}
        own = ClientUpdate(0, 10, {"generator.w": torch.zeros(500, dtype=torch.float64)}, {}, extras, round=0)
        sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 3))
        assert size_of(sent.extras) == math.ceil(500 * mean_bits / 8) + 500 + 8 + 8
        found = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts()).extras
        half = 2 ** (mean_bits - 1) - 1
        true, made = (extras[self.MEAN] / found[self.SQUARE].sqrt(), found[self.MEAN] / found[self.SQUARE].sqrt())
        largest = float((extras[self.MEAN] / square.sqrt()).abs().max())
        smallest = largest * 2.0 ** (-min(1.0, 7 / half) * (half - 1))
        assert bool(((made - true.clamp(-largest, largest)).abs() <= true.abs().clamp(min=smallest) + 1e-5).all())
        assert bool((made * true >= 0).all())
        assert float(made.abs().max()) <= largest, "m is never further from zero than v allows"
        if mean_bits == 7:
            assert float((made - true).abs().median()) < 0.1 * float(true.abs().median())
        assert float(found[self.SQUARE].min()) >= 0

    @pytest.mark.parametrize("mean_bits", [2, 3, 4])
    def test_means_are_right_on_average(self, mean_bits):
        codec, own, count = LogMoments(mean_bits=mean_bits), UpdateEntry((9,), torch.float64), 4000
        value = torch.tensor([0.0, 1.0, -1.0, 0.6, -0.3, 0.013, -0.001, 3.0, -9.0], dtype=torch.float64)
        found = []
        for seed in range(count):
            codes = codec.encode(value, name=self.MEAN, facts=RoundFacts(0, {}, seed), state={})
            found.append(codec.restore(codes, own, name=self.MEAN, facts=RoundFacts()))
        drawn = torch.stack(found)
        limit = 5 * drawn.std(0) / math.sqrt(count) + 20 * 9.0 / count
        assert bool(((drawn.mean(0) - value).abs() <= limit).all())
        assert not bool(drawn[:, 0].any())

    @pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
    def test_both_directions_cost_nine_bits_a_number_more_than_no_moments(self, executor):
        """Adam: 4 bytes of a weight, nine bits of moments; counts and scales by tensor."""
        costs = {}
        for kind, options in {
            "reset": {"optimizer_state": "reset"},
            "coded": {"transforms": [LogMoments(bits=5)]},
            "full": {},
        }.items():
            own = {"transforms": [], **options}
            gan = ring_gan(optimizer=adam)
            _, orchestrator, _ = run(*own.pop("transforms"), gan=gan, executor=executor(), rounds=5, **own)
            ledger = orchestrator.ledger
            costs[kind] = (sum(ledger.bytes_up.values()), sum(ledger.bytes_down.values()))
        tensors = 4 * 5 * 8  # of parameters: a count and two scales each, and bytes that are not full
        plain = costs["reset"][0]
        share = 1 + 9 / 32
        assert plain * share + tensors * 12 <= costs["coded"][0] <= plain * share + tensors * 14
        assert costs["full"][0] == plain * 3 + tensors * 4
        of_a_round = (costs["coded"][0] - plain) // 5
        assert costs["coded"][0] - costs["coded"][1] == of_a_round, "there are none to send in the first"

    @pytest.mark.parametrize("betas", [(0.0, 0.9), (0.5, 0.9), (0.0, 0.4), (0.9, 0.999)])
    @pytest.mark.parametrize("mean_bits", [2, 4, 8])
    def test_honest_clients_are_believed_whatever_the_decay(self, betas, mean_bits):
        """|m| <= sqrt(v / (1 - beta2)): rounded up by itself, m would leave what v allows, and the server refuse it."""

        def optimizer(parameters):
            return torch.optim.Adam(parameters, lr=1e-3, betas=betas)

        codec = LogMoments(bits=4, mean_bits=mean_bits)
        _, orchestrator, _ = run(codec, gan=ring_gan(optimizer=optimizer), rounds=6)
        assert orchestrator.ledger.client_runs == 6 * 4

    def test_the_variance_of_centred_rmsprop_stays_one(self):
        def optimizer(parameters):
            return torch.optim.RMSprop(parameters, lr=1e-4, alpha=0.5, centered=True)

        run(LogMoments(), gan=ring_gan(optimizer=optimizer), rounds=15, local_steps=8)
        chain = TransformChain([LogMoments()])
        square = torch.rand(1000, dtype=torch.float64) + 0.1
        names = {"square_avg": square, "grad_avg": 0.95 * square.sqrt()}
        extras = {f"optimizer/0/generator.w/{key}": value for key, value in names.items()}
        own = ClientUpdate(0, 10, {"generator.w": torch.zeros(1000, dtype=torch.float64)}, {}, extras, round=0)
        sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, 3))
        found = chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts()).extras
        square, mean = (found[f"optimizer/0/generator.w/{key}"] for key in names)
        assert float((square - mean.square()).min()) >= 0

    def test_first_rounds_are_not_cut(self):
        """sqrt(v) lags behind m at first: after five steps of beta2 = .999 their ratio is 14 times what it will be."""
        codec, own = LogMoments(), UpdateEntry((2000,), torch.float64)
        value = 12.0 + torch.rand(2000, dtype=torch.float64)
        codes = codec.encode(value, name=self.MEAN, facts=RoundFacts(0, {}, 1), state={})
        found = codec.restore(codes, own, name=self.MEAN, facts=RoundFacts())
        assert float(found.mean()) == pytest.approx(float(value.mean()), rel=0.02)

    def test_nothing_is_a_moment_too(self):
        gan = ring_gan(optimizer=adam)
        gan.discriminator.nothing = torch.nn.Parameter(torch.zeros(0))
        run(LogMoments(), gan=gan, rounds=2)

    def test_means_without_squares_pass_as_they_are(self):
        """Adamax has exp_avg and exp_inf."""

        def adamax(parameters):
            return torch.optim.Adamax(parameters, lr=1e-3)

        found = [
            run(*own, gan=ring_gan(optimizer=adamax))[1].ledger.bytes_up["optimizer"] for own in ((), (LogMoments(),))
        ]
        numbers = sum(own.numel() for own in ring_gan().parameters())
        assert found[0] - found[1] == pytest.approx(4 * 4 * (4 - 5 / 8) * numbers, rel=0.08)

    def test_what_clients_begin_with_is_what_was_sent(self):
        """The server's moments are in float32, a client's are those of codes."""
        seen = []

        class Watch(SequentialExecutor):
            def run(self, tasks):
                for task in tasks:
                    seen.append(task)
                    yield from super().run([task])

        server, _, _ = run(LogMoments(mean_bits=0), gan=ring_gan(optimizer=adam), executor=Watch(), rounds=2)
        moments = {n: v for n, v in seen[-1].state.items() if n.startswith("optimizer/")}
        assert moments.keys() == server.moments.keys()
        assert all(not bool(v.any()) for n, v in moments.items() if n.endswith("/exp_avg"))
        assert any(bool(v.any()) for n, v in moments.items() if n.endswith("/exp_avg_sq"))

    def test_under_masks_nothing_goes_down_in_codes(self):
        from types import SimpleNamespace

        from fedgan_lightning.deployment.secure_users import refuse_coded

        refuse_coded(SimpleNamespace(transforms=[Int8(), LogMoments(down=False)]))
        with pytest.raises(ConfigurationError, match=r"got LogMoments\(down=true\). Set its option down to false"):
            refuse_coded(SimpleNamespace(transforms=[LogMoments()]))

    def test_bfloat16_goes_down_too(self):
        costs = [run(BFloat16(down=down), gan=ring_gan(optimizer=sgd))[1].ledger for down in (False, True)]
        halves = [sum(own.bytes_down.values()) for own in costs]
        assert halves[1] == halves[0] / 2


# ---------------------------------------------------------------------- chains in which a transform would do nothing


@pytest.mark.parametrize(
    ("transforms", "options", "says"),
    [
        ([Int8(), QSGD()], {}, "got QSGD, number 2 of 2, which finds nothing"),
        ([Int8(), ClipUpdates(max_norm=1e-6)], {}, "got ClipUpdates, number 2 of 2"),
        ([SignCompression(), ClipUpdates(max_norm=1e-6)], {}, "got ClipUpdates, number 2 of 2"),
        ([BFloat16(), LogMoments()], {"optimizer_state": "average"}, "got LogMoments, number 2 of 2"),
        ([LogMoments()], {"optimizer_state": "reset"}, "got LogMoments, number 1 of 1"),
        ([BFloat16(sections=["buffers"])], {}, "got BFloat16, number 1 of 1"),
        ([Int8(), BFloat16(sections=["buffers"])], {}, "got BFloat16, number 2 of 2"),
        ([PowerSGD(rank=1), ClipUpdates(max_norm=1e-3)], {}, "got ClipUpdates, number 2 of 2"),
        ([TopK(share=0.5), Int8(), ClipUpdates(max_norm=1e-3)], {}, "got ClipUpdates, number 3 of 3"),
        ([Int8(), BFloat16(sections=["updates"], down=True)], {}, "got BFloat16, number 2 of 2.*down: only"),
    ],
)
def test_a_transform_that_finds_nothing_is_refused(transforms, options, says):
    with pytest.raises(ConfigurationError, match=f"must find something of an update.*{says}"):
        run(*transforms, gan=ring_gan(optimizer=adam), **options)


@pytest.mark.parametrize(
    "transforms",
    [
        [ClipUpdates(max_norm=1.0), Int8(), LogMoments()],
        [TopK(share=0.5), Int8()],
        [TopK(share=0.5), ClipUpdates(max_norm=1.0)],
        [Int8(), BFloat16(sections=["moments"])],
        [Int8(), BFloat16(sections=["updates"], down="only")],
        [BFloat16(sections=["moments", "buffers"]), ClipUpdates(max_norm=1.0)],
    ],
)
def test_chains_in_which_all_have_something_run(transforms):
    run(*transforms, gan=ring_gan(optimizer=adam), rounds=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "codec",
    [BFloat16(), Int8(), QSGD(), TopK(share=0.1), RandomSparse(share=0.1), PowerSGD(), SignCompression()],
    ids=lambda own: type(own).__name__,
)
def test_no_code_hides_a_number_that_is_not_finite(codec, value):
    """One of a hundred, which a random choice of ten leaves out nine times of ten."""
    chain = TransformChain([codec])
    weights = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    weights[3, 4] = value
    own = ClientUpdate(0, 10, {"generator.w": weights}, {}, {}, round=0)
    for seed in range(20):
        sent, _ = chain.sent(own, {}, {}, facts=RoundFacts(0, {}, seed))
        with pytest.raises(UpdateError, match="client 0"):
            checked_states(chain.decoded("client 0", sent, stages(chain, own), facts=RoundFacts(0, {}, seed)))


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ([RandomSparse(share=0.5), TopK(share=0.1)], "TopK, number 2 of 2.*behind RandomSparse"),
        ([TopK(share=0.5, error_feedback=False), SignCompression()], "SignCompression, number 2 of 2.*behind TopK"),
        ([TopK(share=0.5), ClipUpdates(max_norm=1.0), SignCompression()], "SignCompression, number 3 of 3"),
    ],
    ids=["random", "largest", "a clip between"],
)
def test_error_feedback_that_nobody_would_keep_is_refused(transforms, says):
    with pytest.raises(ConfigurationError, match=f"must be kept by what has made them.*{says}"):
        run(*transforms)


ROWS = {
    "largest, signs": lambda: [TopK(share=0.3), SignCompression()],
    "largest of the largest": lambda: [TopK(share=0.5), TopK(share=0.2)],
    "random, signs": lambda: [RandomSparse(share=0.3, error_feedback=True), SignCompression()],
    "random, largest, nearest": lambda: [
        RandomSparse(share=0.5, error_feedback=True),
        TopK(share=0.5),
        Int8(stochastic=False, error_feedback=True),
    ],
    "largest, moments, signs": lambda: [TopK(share=0.3), BFloat16(sections=["moments"]), SignCompression()],
    "largest, down, nearest": lambda: [
        TopK(share=0.3),
        BFloat16(sections=["updates"], down="only"),
        Int8(stochastic=False, error_feedback=True),
    ],
    "power, largest": lambda: [PowerSGD(rank=1), TopK(share=0.5)],
}


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_of_codes_has_sent_and_what_it_keeps_are_all_updates(row):
    chain = TransformChain(ROWS[row]())
    layout, nothing = Layout(("g.w",), ((12, 10),), (torch.float64,)), Layout((), (), ())
    private = chain.client_state(chain.entries({}, layout, nothing))
    given, arrived = torch.zeros(12, 10, dtype=torch.float64), torch.zeros(12, 10, dtype=torch.float64)
    for number in range(30):
        value = torch.randn(12, 10, dtype=torch.float64)
        update = ClientUpdate(client_id=0, num_examples=1, delta={"g.w": value}, metrics={}, round=number)
        facts = RoundFacts(number, {}, number)
        sent, private = chain.sent(update, private, {}, facts=facts)
        arrived += chain.received(sent, {}, before=update, facts=facts).delta["g.w"]
        given += value
        (kept,) = (own for name, own in private.items() if name.endswith("residual/g.w"))
        torch.testing.assert_close(arrived + kept, given, atol=1e-12, rtol=0.0)


def test_a_code_without_error_feedback_adds_its_noise_once():
    """What an unbiased code loses is made good by the next rounds' draws, and by nothing that is kept."""
    chain = TransformChain([TopK(share=0.3), QSGD(levels=1)])
    layout, nothing = Layout(("g.w",), ((12, 10),), (torch.float64,)), Layout((), (), ())
    private = chain.client_state(chain.entries({}, layout, nothing))
    value = torch.randn(12, 10, dtype=torch.float64)
    update = ClientUpdate(client_id=0, num_examples=1, delta={"g.w": value}, metrics={}, round=0)
    _, private = chain.sent(update, private, {}, facts=RoundFacts(0, {}, 0))
    (kept,) = (own for name, own in private.items() if name.endswith("residual/g.w"))
    largest = value.abs() >= value.abs().flatten().topk(36).values[-1]
    assert_states_equal({"w": kept}, {"w": torch.where(largest, 0.0, value)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CODECS)
def test_every_code_takes_half_precision(name, dtype):
    value = torch.randn(8, 6).to(dtype)
    _, found = coded(CODECS[name](), value)
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())
    assert found.shape == value.shape
    assert 0.0 < float((found - value).float().norm()) < 4.0 * float(value.float().norm()) or torch.equal(found, value)


def test_a_byte_up_and_two_down():
    ledger = run(Int8(), BFloat16(sections=["updates"], down="only"), gan=ring_gan(optimizer=sgd))[1].ledger
    sizes = [own.numel() for own in ring_gan().parameters()]
    assert sum(ledger.bytes_down.values()) == 4 * 4 * 2 * sum(sizes)
    assert sum(ledger.bytes_up.values()) == 4 * 4 * sum(size + 4 for size in sizes)


def test_moments_in_codes_down_alone():
    sizes = [
        {way: sum(getattr(own, f"bytes_{way}").values()) for way in ("down", "up")}
        for transforms in ([], [LogMoments()], [LogMoments(down="only")], [LogMoments(down=False)])
        for own in [run(*transforms, gan=ring_gan(optimizer=adam), optimizer_state="average")[1].ledger]
    ]
    plain, both, down, up = sizes
    assert (down["down"], down["up"]) == (both["down"], plain["up"])
    assert (up["down"], up["up"]) == (plain["down"], both["up"])
    assert both["down"] < plain["down"]
    assert both["up"] < plain["up"]


def test_codes_of_what_no_round_repeats_need_nobody_to_keep_anything():
    """Feedback is about other samples every round, and error feedback of it means nothing, whatever the default."""
    algorithm = {"algorithm": MDGAN(num_samples=16), "sync": {"generator": "server", "discriminator": "local"}}
    run(RandomSparse(share=0.5), SignCompression(), **algorithm, rounds=1)


def test_a_code_of_what_is_sent_to_nobody_is_refused():
    algorithm = {"algorithm": MDGAN(num_samples=16), "sync": {"generator": "server", "discriminator": "local"}}
    with pytest.raises(ConfigurationError, match="down must find something.*got BFloat16, number 1 of 1"):
        run(BFloat16(sections=["updates"], down=True), **algorithm)
    run(BFloat16(sections=["updates"]), **algorithm, rounds=1)
