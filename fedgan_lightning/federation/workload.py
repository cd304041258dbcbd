"""What a local step costs in operations and memory, counted and not timed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.parity_check import shortened
from fedgan_lightning.protocol import ClientTask

#: Largest stack: beyond it nothing is left of the overhead that stacking saves.
LARGEST_STACK = 64
#: Memory of a stack on a CPU, and its share of a GPU's.
STACK_BYTES, DEVICE_SHARE = 4 * 1024**3, 0.25
#: Weights, gradients, and two moments.
COPIES = 4


@dataclass(frozen=True)
class Workload:
    """One local step of one client.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, forward and backward.
        saved_bytes: What its forward passes keep for their backward passes.
        weight_bytes: Size of the module's parameters and buffers.
    """

    flops: int
    saved_bytes: int
    weight_bytes: int

    def describe(self) -> str:
        """Return the operations in words."""
        return f"{self.flops / 1e6:.3g} million operations per client step"


class CountedOperations(TorchDispatchMode):
    """Adds up the operations that torch knows a formula for; unlike torch's own counter it sets no hooks on modules,
    which gradients of gradients do not bear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


def measured_workload(context: ClientContext, task: ClientTask) -> Workload:
    """Return what a local step of the task's client costs, by taking one.

    Args:
        context: What clients are trained with; its store is not to be written.
        task: A client's task.

    Raises:
        ClientError: If the client fails.
    """
    saved: dict[tuple[int, int], int] = {}

    def keep(value: Tensor) -> Tensor:
        saved[value.data_ptr(), value.numel()] = value.numel() * value.element_size()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    (short,) = shortened([task], steps=1)
    trainer = LocalTrainer(context)
    privacy = getattr(context.model, "privacy", None)
    with CountedOperations() as counted, nullcontext() if privacy is not None else hooks:
        trainer.run(short)
    weights = sum(value.numel() * value.element_size() for value in context.model.state_dict().values())
    kept = sum(saved.values()) if privacy is None else privacy.chunk_size * weights  # torch.func bears no such hooks
    return Workload(flops=counted.flops, saved_bytes=kept, weight_bytes=weights)


def stack_size(context: ClientContext, work: Workload) -> int:
    """Return how many such clients fit into a stack, at least 2."""
    limit = STACK_BYTES
    if context.device.type == "cuda":
        limit = int(DEVICE_SHARE * torch.cuda.get_device_properties(context.device).total_memory)
    return max(2, min(LARGEST_STACK, limit // max(1, COPIES * work.weight_bytes + work.saved_bytes)))
