"""Where a round's time goes, and what a client costs beside its steps.

    python -m benchmarks.profile                          # ring64, sequential and vectorized
    python -m benchmarks.profile --workload mnist --executor sequential --threads 1

Shares come from Python's profiler, which slows Python more than arithmetic: read them as upper bounds of overhead. The
fixed cost is the time of a client's round of one step on a tiny batch, arithmetic included.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import statistics

import torch

from benchmarks.speed import TakeTurns, federate, fixed, quiet
from benchmarks.workloads import WORKLOADS

#: What to look for: name -> (part of the file's path, function).
PARTS = {
    "the clients' training steps": ("gan/module.py", "training_step"),
    ".. backward passes": ("", "<method 'run_backward' of 'torch._C._EngineBase' objects>"),
    ".. optimizer steps": ("torch/optim/adam.py", "step"),
    ".. losses of the discriminator": ("gan/steps.py", "discriminator_step"),
    ".. losses of the generator": ("gan/steps.py", "generator_step"),
    ".. drawing noise, one client": ("gan/module.py", "draw"),
    ".. drawing noise, a stack": ("gan/stacked.py", "draw"),
    "minibatches": ("data/samples.py", "__iter__"),
    "loading a client": ("federation/local.py", "_load"),
    "loading a stack": ("federation/vectorized_trainer.py", "_load"),
    "forming updates": ("federation/client_update.py", "client_updates"),
    "aggregation": ("federation/aggregation.py", "accumulate"),
    "reports": ("federation/receiver.py", "report"),
    "whole rounds": ("federation/orchestrator.py", "on_train_batch_start"),
}


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Return cumulative seconds by part."""
    found: dict[str, float] = {}
    for (path, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for name, (part, wanted) in PARTS.items():
            if function == wanted and part in path:
                found[name] = found.get(name, 0.0) + cumulative
    return found


def fixed_cost(chunk_size: int, threads: int) -> float:
    """Return milliseconds per client of a round of one step on two samples, with 64 clients."""
    tiny = dataclasses.replace(WORKLOADS["ring64"], steps=1, batch_size=2)
    turns = TakeTurns(None)
    federate(tiny, fixed(chunk_size, threads), rounds=12, callback=turns)
    return 1e3 * statistics.median(turns.seconds[2:]) / tiny.clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="ring64", choices=list(WORKLOADS))
    parser.add_argument("--executor", nargs="+", default=["sequential", "vectorized"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.workload]
    for kind in arguments.executor:
        size = 1 if kind == "sequential" else workload.clients
        federate(workload, fixed(size, arguments.threads), rounds=2, callback=TakeTurns(None))
        profile = cProfile.Profile()
        profile.enable()
        federate(workload, fixed(size, arguments.threads), rounds=arguments.rounds, callback=TakeTurns(None))
        profile.disable()
        found = shares(profile)
        whole = found["whole rounds"]
        print(f"\n{kind}, {workload.title}, {arguments.threads} threads: {whole / arguments.rounds:.2f} s a round")
        for name in PARTS:
            if name in found:
                print(f"  {name:<34}{1e3 * found[name] / arguments.rounds:9.1f} ms {found[name] / whole:6.1%}")
        cost = fixed_cost(1 if kind == "sequential" else 64, arguments.threads)
        print(f"  fixed cost: {cost:.2f} ms per client and round (one step on two samples, 64 clients)")


if __name__ == "__main__":
    main()
