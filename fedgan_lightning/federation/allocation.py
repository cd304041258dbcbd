"""Memory that is freed stays with the process: what a stack's step frees, its next step takes."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

#: Numbers of glibc's mallopt, and what they are set to: the largest that it takes, and more than a step frees.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD, MOST_KEPT = 32 * 1024**2, 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for later, for the rest of the process; return whether it does.

    By default glibc gives tensors of megabytes back to the system, which hands the next step new pages and clears
    them: 850 page faults a step of 64 stacked MLPs, a tenth of its time (measured). Up to 2 GiB that are free at the
    end of the heap are kept from now on. Other C libraries are left alone, and so is glibc where its own environment
    variables say how it is to be done (``MALLOC_TRIM_THRESHOLD_=131072``, which is its default, turns this off).
    """
    if sys.platform != "linux" or set_by_user():
        return False
    with suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        kept = mallopt(TRIM_THRESHOLD, MOST_KEPT)
        return bool(mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and kept)
    return False


def set_by_user() -> bool:
    """Whether the environment says when glibc gives freed memory back."""
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}
    return not own.isdisjoint(os.environ) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
