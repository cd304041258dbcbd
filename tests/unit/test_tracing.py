"""Recorded functions compute what interpreted ones do, and what cannot be recorded is interpreted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedgan_lightning.gan import networks, tracing
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.gan.tracing import MappedFunctions

CALLS = 3
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
            half = mapped.call(call, (values, x), name="linear")
        found, full = mapped.call(call, (values, x), name="linear"), torch.vmap(call)(values, x)
        torch.testing.assert_close(found, full)
        assert (half - full).abs().max() > 1e-4, "a positive control: half precision shows"


def test_a_record_is_used_from_the_first_call_on_and_runs_without_vmap(monkeypatch):
    mapped, x = MappedFunctions(), torch.randn(3, 4)
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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_call_computes_what_the_hundredth_does(name):
    """A process that has just resumed computes to the bit what one does that has never been interrupted."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    old, x = MappedFunctions(), torch.randn(4, 6, 3)

    def result(mapped):
        values = stacked(network)
        out = mapped.call(lambda own, x: functional_call(network, own, (x,)), (values, x), name=network)
        out.square().sum().backward()
        return [out.detach(), *(value.grad for value in values.values() if value.grad is not None)]

    for _ in range(100):
        late = result(old)
    for found, expected in zip(result(MappedFunctions()), late, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_not_baked_in(channels, layout):
    """What a convolution returns has strides that its channels decide; a record must not rely on those it saw."""
    convolution = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 2, 3)).double()
    mapped, values = MappedFunctions(), stacked(convolution, 2)

    def gradient_norms(gradient):
        return gradient.square().flatten(1).sum(1)

    def call(own, x):
        return functional_call(convolution, own, (x,))

    for step in range(12):
        x = torch.randn(8, channels, 6, 6, dtype=torch.float64)
        if step % 2:
            x = x.to(memory_format=layout)
        x = x.view(2, 4, channels, 6, 6) if x.is_contiguous() else x.unflatten(0, (2, 4))
        samples = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            mapped.call(call, (values, samples), name=convolution).sum(), samples, create_graph=True
        )
        found = mapped.call(gradient_norms, (gradient,), name=gradient_norms)
        torch.testing.assert_close(found, gradient.square().flatten(2).sum(2), atol=0, rtol=1e-12)


class Scaled(nn.Module):
    """A layer that reads a Python number, and one that counts its calls."""

    def __init__(self, factor=2.0, *, counts=False):
        super().__init__()
        self.settings, self.counts, self.calls = {"factor": [factor]}, counts, 0

    def forward(self, x):
        if self.counts:
            self.calls += 1
        return x * self.settings["factor"][0] * max(self.calls, 1)


def scaled(mapped, layer, x):
    return mapped.call(lambda own, x: functional_call(layer, own, (x,)), ({}, x), name=layer)


def test_a_number_that_changes_between_rounds_ends_the_record():
    mapped, layer, x = MappedFunctions(), Scaled(), torch.ones(2, 3)
    assert scaled(mapped, layer, x).unique().tolist() == [2.0]
    layer.settings["factor"][0] = 3.0
    mapped.renew()
    assert scaled(mapped, layer, x).unique().tolist() == [3.0]


def test_a_function_of_an_object_reads_its_numbers_anew_too():
    class Weight:
        value = 1.0

        def times(self, x):
            return x * self.value

    weight, mapped, x = Weight(), MappedFunctions(), torch.ones(2, 3)
    weight.value = 2.0
    assert mapped.call(weight.times, (x,), name=weight.times).unique().tolist() == [2.0]
    weight.value = 5.0
    mapped.renew()
    assert mapped.call(weight.times, (x,), name=weight.times).unique().tolist() == [5.0]
    records = dict(mapped._records)
    mapped.renew()
    assert dict(mapped._records) == records, "nothing has changed, so nothing is recorded again"


def test_a_mode_that_changes_ends_the_record():
    mapped, layer, x = MappedFunctions(), nn.BatchNorm1d(3).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    values = stacked(layer, 2)

    def call():
        return mapped.call(lambda own, x: functional_call(layer, own, (x,)), (values, x), name=layer)

    assert call().mean().abs() < 1e-12, "statistics of the minibatch"
    layer.eval()
    mapped.renew()
    torch.testing.assert_close(
        call(), torch.vmap(lambda own, x: functional_call(layer, own, (x,)))(values, x), atol=1e-12, rtol=0
    )


def test_a_layer_that_counts_its_calls_is_interpreted():
    mapped, layer, x = MappedFunctions(), Scaled(1.0, counts=True), torch.ones(2, 3)
    layer.calls = 0
    values = [scaled(mapped, layer, x)[0, 0].item() for _ in range(4)]
    assert values == sorted(set(values)), "every call sees the next number"


def test_a_private_attribute_counts_as_well():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self._calls = 0

        def forward(self, x):
            self._calls += 1
            return x * (2.0 if self._calls > 3 else 1.0)

    mapped, layer, x = MappedFunctions(), Late(), torch.ones(2, 3)
    values = [scaled(mapped, layer, x)[0, 0].item() for _ in range(6)]
    assert values[0] == 1.0
    assert values[-1] == 2.0


def test_a_closure_that_is_not_filled_yet_is_no_obstacle():
    def function(x):
        return x * 2 if x.dim() else later(x)

    mapped, x = MappedFunctions(), torch.ones(2, 3)
    assert mapped.call(function, (x,), name=function).unique().tolist() == [2.0]
    later = torch.neg
    assert later is torch.neg


def test_a_network_with_hooks_is_interpreted():
    mapped, layer, x, seen = MappedFunctions(), nn.Linear(3, 2), torch.ones(2, 5, 3), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(True))
    for _ in range(3):
        mapped.call(lambda own, x: functional_call(layer, own, (x,)), (stacked(layer, 2), x), name=layer)
    assert len(seen) == 3


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
