"""Where 2-D convolutions keep their channels: last, which CPUs and GPUs compute faster."""

from __future__ import annotations

from torch import channels_last, nn


def lay_out(network: nn.Module) -> None:
    """Keep the weights of a network's 2-D convolutions with channels last, if it says that it bears it.

    Convolutions then return their maps in this layout, whatever that of their input: 1.0 to 1.4 times as fast (two CPU
    cores, 28 and 32 pixels); what they compute differs by rounding alone. A network bears it if its code relies on
    shapes and not on strides: ``reshape`` and ``flatten``, but no ``view`` of a convolution's maps. It says so by a
    true attribute ``channels_last`` of its class.
    """
    if vars(type(network)).get(
        "channels_last", False
    ):  # declared by this very class: a subclass may have another forward
        network.to(memory_format=channels_last)
