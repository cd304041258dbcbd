"""The processes that share a run under the outer Trainer's own strategy, and what they tell each other.

Every rank trains its share of the cohort and takes the same server step. Once per round sums are reduced, and the
clients' scalars and private states exchanged. Nothing that travels is executed: numbers are JSON, tensors safetensors.
"""

from __future__ import annotations

import atexit
import json
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, FedGANError, RankError, RoundInterrupted, message
from fedgan_lightning.protocol import State


def leave_at_exit() -> None:
    """See that the process group is gone before the interpreter is.

    Lightning does so for NCCL alone. Threads of gloo that outlive the interpreter abort the process, a finished run
    included, with "terminate called without an active exception".
    """
    atexit.unregister(_leave)  # a second run in this process needs no second call
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """This process among those of the run; on its own by default.

    Args:
        rank: Its number.
        world_size: Number of processes.
        local_world_size: Of them on this host.
        device: Where tensors lie while they travel: what the process group's backend wants.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size
        self.device = torch.device(device)

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """Return the processes of a Trainer."""
        return cls(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            local_world_size=getattr(trainer, "num_devices", 1),
            device=trainer.strategy.root_device,
        )

    def share(self, costs: Mapping[int, int]) -> list[int]:
        """Return this rank's clients, in ascending order.

        The longest work goes first, each to the rank with least of it, as pfl-research does.

        Args:
            costs: Local steps by client.
        """
        loads, shares = [0] * self.world_size, [[] for _ in range(self.world_size)]  # type: ignore[var-annotated]
        for client_id in sorted(costs, key=lambda own: (-costs[own], own)):
            lightest = loads.index(min(loads))
            loads[lightest] += costs[client_id]
            shares[lightest].append(client_id)
        return sorted(shares[self.rank])

    def refuse_several(self, rule: str) -> None:
        """Refuse a run of several processes.

        Raises:
            ConfigurationError: If there are several; it states ``rule``.
        """
        if self.world_size > 1:
            raise ConfigurationError(
                message(rule, received=f"{self.world_size} devices", fix="set trainer.devices to 1")
            )

    def exchange(self, value: Any) -> list[Any]:
        """Return the plain values of all ranks, by rank."""
        if self.world_size == 1:
            return [value]
        return [json.loads(data) for data in self._gather(json.dumps(value).encode())]

    def exchange_states(self, states: Mapping[int, State]) -> dict[int, State]:
        """Return the states by client of all ranks together."""
        if self.world_size == 1:
            return dict(states)
        flat = {
            f"{k}|{name}": value.detach().cpu().contiguous() for k, own in states.items() for name, value in own.items()
        }
        merged: dict[int, dict[str, Tensor]] = {}
        for data in self._gather(save(flat)):
            for key, value in load(data).items():
                client_id, name = key.split("|", 1)
                merged.setdefault(int(client_id), {})[name] = value
        return dict(merged)

    def sum_(self, vector: Tensor) -> Tensor:
        """Return the sum of a vector over all ranks."""
        if self.world_size == 1:
            return vector
        travelling = vector.to(self.device)
        self._try(lambda: dist.all_reduce(travelling))
        return travelling.to(vector.device)

    def raise_if_any_rank_failed(self, failure: Exception | None) -> None:
        """Raise on every rank what failed on any of them, so that none waits for another.

        Raises:
            Exception: This rank's own ``failure``.
            RoundInterrupted: If another rank was asked to stop.
            RankError: If another rank failed.
        """
        if self.world_size > 1:
            stopped = isinstance(failure, RoundInterrupted)
            verdicts = self.exchange(None if failure is None else {"stopped": stopped, "text": str(failure)})
        else:
            verdicts = []
        if failure is not None:
            raise failure
        failed = [(rank, verdict) for rank, verdict in enumerate(verdicts) if verdict is not None]
        errors = [f"rank {rank}: {verdict['text']}" for rank, verdict in failed if not verdict["stopped"]]
        if errors:
            raise RankError("; ".join(errors))
        if failed:
            raise RoundInterrupted("the user asked to stop")

    def _gather(self, data: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        own = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self._try(lambda: dist.all_gather(sizes, own))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        self._try(lambda: dist.all_gather(parts, padded.to(self.device)))
        return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes)]

    def _try(self, collective: Any) -> None:
        """Raise a named error where a collective fails: the other side is gone."""
        try:
            collective()
        except RuntimeError as error:
            raise lost(str(error), rank=self.rank, world_size=self.world_size) from error


def lost_rank(error: RuntimeError) -> RankError | None:
    """Return the named error where another process was lost in a collective of Lightning's, such as a barrier.

    Args:
        error: What ended this process; ``None`` is returned unless ``torch.distributed`` raised it.
    """
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, FedGANError) or not frames or not frames[-1].startswith("torch.distributed"):
        return None
    rank, size = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    return lost(str(error), rank=dist.get_rank() if dist.is_initialized() else rank, world_size=size)


def lost(why: str, *, rank: int, world_size: int) -> RankError:
    """Return the error of a process that cannot go on because another has ended.

    Args:
        why: What is known; its first line is told.
        rank: This process.
        world_size: Number of processes.
    """
    return RankError(
        message(
            "all processes of a run must live until its end",
            received=f"rank {rank} of {world_size} lost another ({why.splitlines()[0][:120]})",
            fix="find out why it ended (memory?), and continue with --ckpt_path last",
        )
    )


def first_known(values: Sequence[Any]) -> Any:
    """Return the first value that is not ``None``, or ``None``."""
    return next((value for value in values if value is not None), None)


def flattened(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """Return the items of all lists in one."""
    return [item for items in lists for item in items]
