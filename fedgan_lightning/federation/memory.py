"""What becomes of a computation that the memory does not suffice for."""

from __future__ import annotations

import gc

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a device or the host has no memory left."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(cause):
            return True
        cause = cause.__cause__
    return False


def release(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
