"""What stacking alone can give on a machine: the MLP rows as batched matrix products, and nothing around them.

    python -m benchmarks.bare_stacks

No federation: no loading, no sums over clients, one generator of noise for all, statistics of nothing. A yardstick for
`benchmarks.speed`'s vectorized column, in one process; loop and stacks take turns.
"""

from __future__ import annotations

import os
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.speed import CORES, best_threads, quiet, timed_round, versions
from benchmarks.workloads import WORKLOADS, PlainLoop, Workload, adam

ROWS = ("ring64", "ring256", "digits", "mnist")


class Stack:
    """A network's layers, once per client; activations as they are in the network."""

    def __init__(self, network: nn.Module, clients: int) -> None:
        self.layers: list[nn.Module | tuple[Tensor, Tensor]] = []
        self.parameters: list[Tensor] = []
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().T.expand(clients, -1, -1).clone().requires_grad_()
                bias = layer.bias.detach().expand(clients, 1, -1).clone().requires_grad_()
                self.layers.append((weight, bias))
                self.parameters += [weight, bias]
            elif not list(layer.children()) and not isinstance(layer, (nn.Flatten, nn.Unflatten)):
                self.layers.append(layer)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.baddbmm(layer[1], x, layer[0]) if isinstance(layer, tuple) else layer(x)
        return x


def round_of(workload: Workload, batches: Tensor) -> float:
    """Return the seconds of all steps of a round with fresh optimizers."""
    generator, discriminator = workload.networks()
    g, d = Stack(generator, workload.clients), Stack(discriminator, workload.clients)
    shape = (workload.clients, workload.batch_size, int(generator.latent_dim))  # type: ignore[arg-type]
    started = time.perf_counter()
    opt_g, opt_d = adam(g.parameters), adam(d.parameters)
    for _ in range(workload.steps):
        with torch.no_grad():
            fake = g(torch.randn(shape))
        loss = (softplus(-d(batches)) + softplus(d(fake))).mean((1, 2)).sum()
        opt_d.zero_grad()
        loss.backward(inputs=d.parameters)
        opt_d.step()
        loss = softplus(-d(g(torch.randn(shape)))).mean((1, 2)).sum()
        opt_g.zero_grad()
        loss.backward(inputs=g.parameters)
        opt_g.step()
    return time.perf_counter() - started


def main(repeats: int = 5) -> None:
    quiet()
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # set by Lightning; a loop without it would not pay for it
    print(f"{time.strftime('%Y-%m-%d %H:%M')}; {versions()}\n")
    for name in ROWS:
        workload = WORKLOADS[name]
        loop, size = PlainLoop(workload), torch.Size(workload.sample_shape).numel()
        threads, batches = best_threads(loop), torch.rand(workload.clients, workload.batch_size, size)
        found: dict[int, list[float]] = {1: [], CORES: []}
        plain = []
        for _ in range(repeats + 1):
            plain.append(timed_round(loop, threads))
            for count, seconds in found.items():
                torch.set_num_threads(count)
                seconds.append(round_of(workload, batches))
        base = statistics.median(plain[1:])
        ratios = ", ".join(f"{base / statistics.median(own[1:]):.1f} x ({n} threads)" for n, own in found.items())
        print(f"{workload.title}: {ratios} of a loop that takes {base:.2f} s ({threads} threads)", flush=True)


if __name__ == "__main__":
    main()
