"""Flower's simulation engine on a workload of the speed comparison; prints the seconds of every round.

    python -m benchmarks.flower_peer ring64 --rounds 7

Needs ``flwr[simulation]``. One Ray worker per core, one CPU per client, all clients in every round; the client trains
as the hand-written loop does, on one thread. Seconds are those between two calls of the strategy's aggregation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from typing import Any

import torch

from benchmarks.workloads import WORKLOADS, PlainLoop

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
_LOOPS: dict[str, PlainLoop] = {}


def loop_of(name: str) -> PlainLoop:
    """Return the worker's resident pair of networks: it is made once per process."""
    if name not in _LOOPS:
        torch.set_num_threads(1)
        _LOOPS[name] = PlainLoop(WORKLOADS[name])
    return _LOOPS[name]


def main() -> None:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    name, workload = arguments.workload, WORKLOADS[arguments.workload]
    client_app, server_app = ClientApp(), ServerApp()
    moments: list[float] = []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        loop = loop_of(name)
        loop.both.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loop.client(loop.batches[int(context.node_config["partition-id"])], WORKLOADS[name].steps)
        content = {
            "arrays": ArrayRecord(loop.both.state_dict()),
            "metrics": MetricRecord({"num-examples": WORKLOADS[name].batch_size}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            result = super().aggregate_train(server_round, replies)
            moments.append(time.perf_counter())
            return result

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=workload.clients)
        start = ArrayRecord(PlainLoop(workload).both.state_dict())
        moments.append(time.perf_counter())
        strategy.start(grid=grid, initial_arrays=start, num_rounds=arguments.rounds)

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(
        server_app=server_app, client_app=client_app, num_supernodes=workload.clients, backend_config=backend
    )
    print(json.dumps({"seconds": [after - before for before, after in itertools.pairwise(moments)]}))


if __name__ == "__main__":
    main()
