"""Packed states are states: nothing is lost, nothing is mixed up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.report import norms
from fedgan_lightning.packing import Layout, Packed, is_finite, unstack

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64])
STATES = st.dictionaries(
    st.sampled_from(["generator.a", "generator.b", "discriminator.a", "scale", "optimizer/0/generator.a/exp_avg"]),
    st.tuples(SHAPES, DTYPES),
    max_size=5,
)


def make(described, *, leading=()):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-9, 9, (*leading, *shape), generator=generator).to(dtype)
        for name, (shape, dtype) in described.items()
    }


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_packing_keeps_names_order_shapes_dtypes_and_values(described):
    state = make(described)
    packed = Packed.of(state)
    assert list(packed) == list(state)
    for name, value in state.items():
        assert packed[name].dtype == value.dtype
        assert torch.equal(packed[name], value)
    assert Packed.of(packed) is packed
    assert Layout.from_plain(packed.layout.plain()) == packed.layout


@settings(max_examples=60, deadline=None)
@given(STATES, st.integers(1, 4))
def test_unstacking_gives_every_client_its_row(described, count):
    state = make(described, leading=(count,))
    rows = unstack(state)
    assert len(rows) == (count if state else 0)
    for index, row in enumerate(rows):
        assert all(torch.equal(row[name], value[index]) for name, value in state.items())


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_bytes_and_norms_are_those_of_the_entries(described):
    state = {name: value for name, value in make(described).items() if value.is_floating_point()}
    sizes = bytes_by_network(state)
    assert sum(sizes.values()) == sum(value.numel() * value.element_size() for value in state.values())
    assert bytes_by_network(Packed.of(state)) == sizes
    found = norms(state, ["generator", "discriminator"])
    for network in found:
        mine = [value.double().flatten() for name, value in state.items() if name.startswith(f"{network}.")]
        expected = float(torch.cat(mine).norm()) if mine else 0.0
        assert abs(found[network] - expected) <= 1e-5 * (1 + expected)


def test_a_packed_state_does_not_share_memory_with_what_it_was_made_of():
    state = {"generator.w": torch.zeros(3)}
    packed = Packed.of(state)
    state["generator.w"] += 1
    assert packed["generator.w"].tolist() == [0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32), max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
)
def test_finite_is_what_torch_calls_finite(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_numbers_whose_norm_overflows_are_finite_and_integers_always():
    assert is_finite(torch.full((9,), 3e38))
    assert not is_finite(torch.tensor([3e38, 3e38, torch.inf]))
    assert is_finite(torch.tensor([2**62, 2**62]))
