"""Functions mapped over clients, recorded once as plain tensor operations.

``torch.vmap`` interprets a function anew at every call, which costs small networks as much time as their arithmetic. A
function that has been called often enough with tensors of the same shapes is therefore recorded: the record holds the
batched operations alone, runs without interpretation, and is differentiable like any code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

aten: Any = torch.ops.aten

#: Calls with the same shapes before a function is recorded: recording takes as long as dozens of calls.
CALLS_BEFORE_RECORDING = 8
#: Records kept; cohorts of many different sizes would otherwise fill the memory.
MOST_RECORDS = 64

Key = tuple[Any, ...]


class MappedFunctions:
    """Maps functions over the first dimension of their arguments, recording those that are called often."""

    def __init__(self) -> None:
        self._calls: dict[Key, int] = {}
        self._records: dict[Key, Callable[..., Any]] = {}

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], *, name: Any) -> Any:
        """Return ``torch.vmap(function)(*arguments)``.

        Args:
            function: From tensors, or nested structures of them, to the same.
            arguments: Its arguments, every tensor with a leading dimension of clients.
            name: Tells functions apart; equal names mean equal functions.
        """
        flat, structure = pytree.tree_flatten(arguments)
        # Casts are recorded, too: a penalty in full precision must not meet the record of a step in half.
        casts = {own: torch.is_autocast_enabled(own) and torch.get_autocast_dtype(own) for own in _devices(flat)}
        key = (name, tuple((value.shape, value.dtype, value.device.type) for value in flat), *casts.items())
        if key in self._records:
            return self._records[key](*flat)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] >= CALLS_BEFORE_RECORDING:
            if len(self._records) >= MOST_RECORDS:
                self._calls.clear()
                self._records.clear()
            self._records[key] = _record(function, flat, structure)
        return torch.vmap(function)(*arguments)


def _devices(values: list[Tensor]) -> list[str]:
    """Return the types of the devices on which these lie, in alphabetical order."""
    return sorted({value.device.type for value in values})


def _record(function: Callable[..., Any], flat: list[Tensor], structure: Any) -> Callable[..., Any]:
    """Return ``torch.vmap(function)`` for flat arguments of these shapes, as recorded operations.

    A function that cannot be recorded (it looks at values) is interpreted as before.
    """
    mapped = torch.vmap(function)
    shapes: list[Any] = []

    def flattened(*values: Tensor) -> list[Tensor]:
        outputs, spec = pytree.tree_flatten(mapped(*pytree.tree_unflatten(list(values), structure)))
        shapes.append(spec)
        return outputs

    try:
        with torch.no_grad():
            graph = make_fx(flattened, tracing_mode="fake")(*[value.detach() for value in flat])
    except Exception:  # whatever a network does that cannot be recorded, interpreting it is right
        graph = None
    if graph is None or any(map(_hides_gradients, graph.graph.nodes)):
        return lambda *values: mapped(*pytree.tree_unflatten(list(values), structure))
    _simplify(graph)
    spec = shapes[-1]
    if spec == pytree.tree_structure(torch.zeros(())):
        return lambda *values: graph.forward(*values)[0]
    return lambda *values: pytree.tree_unflatten(graph.forward(*values), spec)


def _hides_gradients(node: fx.Node) -> bool:
    """Whether a recorded operation may have stood under ``no_grad`` or ``detach``, which records do not keep.

    Spectral norm does so to update its vectors. BatchNorm's own update of its statistics is not concerned.
    """
    if node.op != "call_function":
        return False
    if node.target in (aten.alias.default, aten.detach.default):
        return True
    schema = getattr(node.target, "_schema", None)
    writes = schema is not None and schema.is_mutable and "batch_norm" not in schema.name
    return bool(writes and node.meta["val"].is_floating_point())


def _simplify(graph: fx.GraphModule) -> None:
    """Drop operations that change nothing, and join products with the sums after them."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is aten.add.Tensor and not node.kwargs:
            for product, term in (node.args, node.args[::-1]):
                if _is_product_for(product, term, node):
                    with graph.graph.inserting_before(node):
                        joined = graph.graph.call_function(aten.baddbmm.default, (term, *product.args))
                        joined.meta = dict(node.meta)
                    node.replace_all_uses_with(joined)
                    graph.graph.erase_node(node)
                    break
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _changes_nothing(node: fx.Node) -> bool:
    if node.target is aten.mul.Scalar:
        return bool(node.args[1] == 1)
    if node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        source: Any = node.args[0]
        return bool(source.meta["val"].shape == node.meta["val"].shape)
    return False


def _is_product_for(product: Any, term: Any, node: fx.Node) -> bool:
    return bool(
        isinstance(product, fx.Node)
        and isinstance(term, fx.Node)
        and product.target is aten.bmm.default
        and len(product.users) == 1
        and term.meta["val"].dim() == 3
        and product.meta["val"].shape == node.meta["val"].shape
        and term.meta["val"].dtype == node.meta["val"].dtype == product.meta["val"].dtype
    )
