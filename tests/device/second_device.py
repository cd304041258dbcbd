"""A second device without a second device: torch-xla on this machine's CPU, held to the rules of CUDA.

Its arithmetic is real and its tensors are elsewhere as far as torch is concerned. What it lacks of CUDA is made here:
generators of its own, the refusal to mix devices, and an accelerator for Lightning. Noise is drawn on the CPU and
moved, so that a run on the device sees the numbers of a run on the CPU, and weights can be compared.

:func:`start` comes before the first backward pass of the process, since autograd counts devices once; :func:`played`
around everything that uses the device.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fedgan_lightning import seeding

DEVICE = torch.device("xla", 0)
#: Operation by operation, each compiled once for every shape, and compiled quickly.
ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
}
_CPUGenerator = torch.Generator


def available() -> bool:
    """Whether torch-xla is installed."""
    return importlib.util.find_spec("torch_xla") is not None


def start() -> None:
    """Start the device, once in a process."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    import torch_xla

    torch_xla.experimental.eager_mode(True)
    assert torch_xla.device() == DEVICE
    torch.ones(1, device=DEVICE, requires_grad=True).sum().backward()
    AcceleratorRegistry.register("xla", SecondDevice, override=True)
    StrategyRegistry.register("second_device", SingleDeviceStrategy, override=True, device=DEVICE)


# ---------------------------------------------------------------- randomness


class Generator(_CPUGenerator):
    """A generator of the CPU that may say it is the device's, which has none."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.__dict__["place"] = DEVICE if torch.device(device).type == DEVICE.type else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        """Nothing: all is made above."""

    @property
    def device(self) -> torch.device:
        return self.__dict__["place"]


#: What the device's functions draw from where they are given no generator.
GLOBAL = Generator(DEVICE)


def _drawing(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return one of torch's drawing functions as CUDA has it: a generator draws on its own device only."""

    def draw(*size: Any, generator: Any = None, device: Any = None, **options: Any) -> Tensor:
        where = torch.device("cpu" if device is None else device)
        own = where if generator is None else generator.device
        if own.type != where.type:
            raise RuntimeError(f"Expected a '{where.type}' device type for generator but found '{own.type}'")
        if where.type != DEVICE.type:
            return original(*size, generator=generator, device=where, **options)
        with torch._C.DisableTorchFunction():
            return original(*size, generator=GLOBAL if generator is None else generator, **options).to(DEVICE)

    return draw


def _global_generator(device: torch.device) -> torch.Generator:
    return GLOBAL if device.type == DEVICE.type else torch.default_generator


# ---------------------------------------------------------------- CUDA's rules


class MixedDevicesError(RuntimeError):
    """What CUDA would have refused."""


#: Functions that move values, or ask nothing of them; ``__get__`` and ``__set__`` are attributes such as ``data``.
MOVES = {"to", "copy_", "_foreach_copy_", "type_as", "__get__", "__set__", "set_data", "backward"}
#: Functions that take the shape of another tensor, or its device.
SHAPES = {"expand_as", "view_as", "reshape_as", "is_same_size", "_has_compatible_shallow_copy_type"}
#: Functions that need all tensors on one device, numbers too.
JOINS = {"cat", "stack", "concat"}
#: Functions that wait for the device.
WAITS = {"__float__", "__int__", "__bool__", "__index__", "item", "tolist", "nonzero", "unique", "equal", "allclose"}


class Rules(TorchFunctionMode):
    """Refuses what CUDA refuses, and counts what makes a program wait for the device, by function and place.

    It watches torch's functions: beneath XLA's own layers writes in place would be lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_device = [value for value in tensors if value.device.type == DEVICE.type]
        if on_device:
            name = getattr(func, "__name__", "?")
            self._refuse(name, tensors)
            if name in WAITS or (name in {"cpu", "to"} and _target(name, args, kwargs) == "cpu"):
                self.waits[name, _place()] += 1
        return func(*args, **kwargs)

    @staticmethod
    def _refuse(name: str, tensors: list[Tensor]) -> None:
        on_cpu = [value for value in tensors if value.device.type == "cpu"]
        if name in MOVES | SHAPES:
            return
        if name in {"__getitem__", "__setitem__"}:  # a device may be indexed by the CPU, but not the other way
            mixes = tensors[0].device.type == "cpu" and name == "__getitem__"
        else:
            mixes = any(value.dim() for value in on_cpu) or bool(on_cpu and name in JOINS)
        if mixes:
            told = ", ".join(f"{list(value.shape)} on {value.device.type}" for value in tensors[:4])
            raise MixedDevicesError(f"tensors of one operation are on one device: {name} at {_place()} has {told}")


def _target(name: str, args: tuple, kwargs: dict) -> str | None:
    """Return the kind of device that a move goes to."""
    if name == "cpu":
        return "cpu"
    for wanted in (*args[1:2], kwargs.get("device")):
        if isinstance(wanted, (str, torch.device)):
            return torch.device(wanted).type
        if isinstance(wanted, Tensor):
            return wanted.device.type
    return None


def _place() -> str:
    """Return the innermost line of the project, else of Lightning, that is being run."""
    frame, others = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "fedgan_lightning/" in name:
            return f"{name.rpartition('fedgan_lightning/')[2]}:{frame.f_lineno}"
        if others == "?" and "/lightning/" in name:
            others = f"{name.rpartition('/lightning/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return others


# ---------------------------------------------------------------- Lightning


class SecondDevice(Accelerator):
    """What Lightning asks of an accelerator; counts what it is made ready."""

    setups = 0

    def setup_device(self, device: torch.device) -> None:
        pass

    def setup(self, trainer: Any) -> None:
        SecondDevice.setups += 1

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(devices) if isinstance(devices, list) else list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device(DEVICE.type, index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE.type


def trainer_options() -> dict[str, Any]:
    """Return what the server's Trainer needs to be on the device; inference mode would make tensors without views."""
    return {
        "accelerator": DEVICE.type,
        "devices": 1,
        "strategy": "second_device",
        "inference_mode": False,
    }


def _autocast(plugin: MixedPrecision) -> torch.autocast:
    dtype = torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.half
    return torch.autocast(DEVICE.type, dtype=dtype, cache_enabled=False)


@contextlib.contextmanager
def played() -> Iterator[Rules]:
    """Have the body play by CUDA's rules; gives what it has waited for."""
    with pytest.MonkeyPatch.context() as patch, Rules() as rules:
        for name in ("randn", "rand", "randint", "randperm"):
            patch.setattr(torch, name, _drawing(getattr(torch, name)))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(seeding, "global_generator", _global_generator)
        patch.setattr(MixedPrecision, "autocast_context_manager", _autocast)
        GLOBAL.manual_seed(0)
        SecondDevice.setups = 0
        yield rules
