"""Recorded functions compute what interpreted ones do, and what cannot be recorded is interpreted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedgan_lightning.gan import networks, tracing
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.gan.tracing import CALLS_BEFORE_RECORDING, MappedFunctions

CALLS = CALLS_BEFORE_RECORDING + 3
NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU()),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 5)), nn.Linear(5, 1)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
}


def stacked(network, count=4):
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    copies = {name: value.detach().expand(count, *value.shape).clone() for name, value in values.items()}
    return {
        name: value.requires_grad_(value.is_floating_point() and name in dict(network.named_parameters()))
        for name, value in copies.items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_records_give_outputs_gradients_and_statistics_of_interpretation(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    results = []
    for record in (True, False):
        mapped, values = MappedFunctions(), stacked(network)
        torch.manual_seed(1)
        for _ in range(CALLS):
            x = torch.randn(4, 6, 3, dtype=torch.float64)
            call = lambda own, x: functional_call(network, own, (x,))  # noqa: E731
            out = mapped.call(call, (values, x), name=name) if record else torch.vmap(call)(values, x)
            for value in values.values():
                value.grad = None
            out.square().sum().backward()
        gradients = {key: value.grad for key, value in values.items()}
        results.append((out.detach(), gradients, {key: value.detach() for key, value in values.items()}))
    (out, grads, states), (out_v, grads_v, states_v) = results
    torch.testing.assert_close(out, out_v, atol=1e-13, rtol=1e-12)
    for key in grads:
        torch.testing.assert_close(states[key], states_v[key], atol=1e-13, rtol=1e-12)
        assert (grads[key] is None) == (grads_v[key] is None)
        if grads[key] is not None:
            torch.testing.assert_close(grads[key], grads_v[key], atol=1e-12, rtol=1e-11)


def test_what_was_recorded_in_half_precision_is_not_used_for_full():
    """A step under autocast records the casts; the gradient penalty after it asks for full precision."""
    torch.manual_seed(0)
    network, mapped = NETWORKS["linear"](), MappedFunctions()
    values, x = stacked(network), torch.randn(4, 6, 3)

    def call(own, x):
        return functional_call(network, own, (x,))

    for _ in range(CALLS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = [mapped.call(call, (values, x), name="linear") for _ in range(2)][-1]  # one of them is the eighth
        found, full = mapped.call(call, (values, x), name="linear"), torch.vmap(call)(values, x)
        torch.testing.assert_close(found, full)
        assert (half - full).abs().max() > 1e-4, "a positive control: half precision shows"


def test_a_record_is_used_after_a_few_calls_and_runs_without_vmap(monkeypatch):
    mapped, x = MappedFunctions(), torch.randn(3, 4)
    for _ in range(CALLS):
        expected = mapped.call(lambda x: (x * 2).sum(), (x,), name="double")
    monkeypatch.setattr(torch, "vmap", lambda *_: pytest.fail("interpreted"))
    torch.testing.assert_close(mapped.call(lambda x: None, (x,), name="double"), expected)


def test_gradients_of_gradients_pass_through_records():
    network, mapped = NETWORKS["linear"]().double(), MappedFunctions()
    values = stacked(network)
    norms = []
    for _ in range(CALLS):
        x = torch.ones(4, 6, 3, dtype=torch.float64, requires_grad=True)
        out = mapped.call(lambda own, x: functional_call(network, own, (x,)), (values, x), name="net")
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        norms.append(torch.autograd.grad(gradient.square().sum(), values["0.weight"])[0])
    torch.testing.assert_close(norms[-1], norms[0], atol=1e-13, rtol=1e-12)


def test_what_looks_at_values_is_interpreted_or_refused_by_vmap_itself():
    mapped, x = MappedFunctions(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="vmap"):
        for _ in range(CALLS):
            mapped.call(lambda x: x if x.sum() > 0 else -x, (x,), name="branch")


def test_other_shapes_have_records_of_their_own_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(tracing, "MOST_RECORDS", 3)
    mapped = MappedFunctions()
    for count in range(1, 9):
        for _ in range(CALLS):
            out = mapped.call(lambda x: x.sum(), (torch.ones(2, count),), name="sum")
        assert out.tolist() == [count, count]
        assert len(mapped._records) <= 3


def test_spectral_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours = nn.Linear(6, 4).double()
    theirs = copy.deepcopy(ours)
    spectral_norm(ours)
    nn.utils.parametrizations.spectral_norm(theirs)
    part = theirs.parametrizations.weight[0]
    ours.parametrizations.weight[0].load_state_dict({"_u": part._u, "_v": part._v})
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-13, rtol=1e-12)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    grads = [layer.parametrizations.weight.original.grad for layer in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-11)
    assert isinstance(networks.DCGANDiscriminator(8, norm="spectral").features[0], nn.Conv2d)
