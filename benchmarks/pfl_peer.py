"""pfl-research on a workload of the speed comparison, in two processes; prints the seconds of every round.

    torchrun --nproc_per_node 2 -m benchmarks.pfl_peer mnist --rounds 6

Needs ``pfl[pytorch]``. Every client trains as the hand-written loop does, on the process's one resident pair; the
engine resets the parameters, takes the difference, sums it over its processes and steps on the mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.workloads import WORKLOADS, PlainLoop


def main() -> None:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops.selector import get_default_framework_module
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.workload]
    loop = PlainLoop(workload)
    moments: list[float] = []

    class Pair(nn.Module):
        """The loop's two networks, as the engine wants them."""

        def __init__(self) -> None:
            super().__init__()
            self.both = loop.both

        def loss(self, *data: Any) -> Any:
            raise NotImplementedError

        def metrics(self, *data: Any) -> Any:
            return {}

    class Gans(FederatedAveraging):
        def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
            loop.client(loop.batches[int(user_dataset.user_id)], workload.steps)
            return model.get_model_difference(initial_model_state), Metrics()

    class Clock(TrainingProcessCallback):
        def on_train_begin(self, *, model: Any) -> Any:
            moments.append(time.perf_counter())
            return Metrics()

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            moments.append(time.perf_counter())
            return False, Metrics()

    pair = Pair()
    clients = itertools.cycle(range(workload.clients))
    data = FederatedDataset(
        lambda user: Dataset((np.zeros(1),), user_id=str(user)),
        lambda: next(clients),
        user_id_to_weight=dict.fromkeys(range(workload.clients), 1),
    )
    model = PyTorchModel(pair, torch.optim.SGD, torch.optim.SGD(pair.parameters(), lr=1.0))
    Gans().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=arguments.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=workload.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=workload.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=workload.batch_size),
        callbacks=[Clock()],
    )
    if get_default_framework_module().distributed.global_rank == 0:
        print(json.dumps({"seconds": [after - before for before, after in itertools.pairwise(moments)]}))


if __name__ == "__main__":
    main()
