"""Functions mapped over clients, recorded once as plain tensor operations.

``torch.vmap`` interprets a function anew at every call, which costs small networks as much time as their arithmetic. A
function is therefore recorded at its first call: the record holds the batched operations alone, runs without
interpretation, and is differentiable like any code.

A record is a pure function of what is baked into it: the function, its plain attributes, and shapes, strides, dtypes,
devices and casts of its arguments. The first call already computes with it. What a process has done before (calls,
other cohorts, interruptions) therefore changes no rounding.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

aten: Any = torch.ops.aten

#: Records kept, the least recently used goes first: stacks of unequal clients have one for every number of clients.
MOST_RECORDS = 1024
#: Levels of objects within objects in which plain attributes are looked for.
DEPTH = 4
#: Attributes that a record may bake in, and whose change ends it.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: What is not looked into.
CLOSED = (Tensor, type, types.ModuleType, types.BuiltinFunctionType)

#: What every module keeps of its parameters, buffers, children and hooks.
BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}

Key = tuple[Any, ...]


class MappedFunctions:
    """Maps functions over the first dimension of their arguments by records of their operations.

    What a record bakes in: Python numbers and texts that the function reads from its own object or module (and from
    objects within it, :data:`DEPTH` levels deep), from its closure and defaults; the mode of every layer; the control
    flow that follows from them. :meth:`renew` looks whether any has changed. A function is interpreted at every call
    where a record would be wrong: if it changes such an attribute itself, has hooks, draws random numbers, looks at
    values, or writes in place what gradients pass through. Global variables that a function reads must not change.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[Key, Callable[..., Any]] = OrderedDict()
        self._facts: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def renew(self) -> None:
        """Forget the records of functions whose plain attributes have changed since they were recorded."""
        changed = [name for name, (owner, known) in self._facts.items() if attributes(owner) != known]
        for name in changed:
            del self._facts[name]
            for key in [key for key in self._records if key[0] == name]:
                del self._records[key]

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], *, name: Any) -> Any:
        """Return ``torch.vmap(function)(*arguments)``.

        Args:
            function: From tensors, or nested structures of them, to the same.
            arguments: Its arguments, every tensor with a leading dimension of clients.
            name: Tells functions apart; equal names mean equal functions. A module stands for itself.
        """
        flat, structure = pytree.tree_flatten(arguments)
        # Casts are recorded, too: a penalty in full precision must not meet the record of a step in half.
        casts = {
            device: torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in _devices(flat)
        }
        key = (name, tuple((value.shape, value.stride(), value.dtype, value.device) for value in flat), *casts.items())
        record = self._records.get(key)
        if record is None:
            owner = name if isinstance(name, nn.Module) else function
            record = self._records[key] = _record(function, flat, structure, owner=owner)
            self._facts.setdefault(name, (owner, attributes(owner)))
            if len(self._records) > MOST_RECORDS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(key)
        return record(*flat)


def attributes(owner: Any, *, depth: int = DEPTH) -> Any:
    """Return the plain attributes that a function or module may read, as a value that can be compared."""
    if isinstance(owner, PLAIN):
        return owner if owner == owner else "nan"
    if isinstance(owner, CLOSED) or depth == 0:
        return type(owner)
    if isinstance(owner, (list, tuple, set, frozenset)):
        return type(owner), tuple(attributes(item, depth=depth - 1) for item in owner)
    if isinstance(owner, dict):
        return tuple((str(name), attributes(item, depth=depth - 1)) for name, item in owner.items())
    if isinstance(owner, nn.Module):
        return tuple((name, _own_attributes(child, depth)) for name, child in owner.named_modules())
    return tuple(attributes(item, depth=depth - 1) for item in _within(owner))


def _own_attributes(module: nn.Module, depth: int) -> Any:
    """Return those of one module, without what modules keep of parameters, buffers, children and hooks."""
    found = {name: value for name, value in vars(module).items() if name not in BOOKKEEPING}
    return attributes(found, depth=depth - 1)


def _within(owner: Any) -> Iterator[Any]:
    """Yield what the code of an object can read: its attributes; of a function its object, closure and defaults."""
    yield from (getattr(owner, name, None) for name in ("__self__", "__defaults__", "__kwdefaults__", "func", "args"))
    for cell in getattr(owner, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    yield getattr(owner, "keywords", None)
    yield dict(getattr(owner, "__dict__", {}))


def _devices(values: list[Tensor]) -> list[str]:
    """Return the types of the devices on which these lie, in alphabetical order."""
    return sorted({value.device.type for value in values})


def _record(function: Callable[..., Any], flat: list[Tensor], structure: Any, *, owner: Any) -> Callable[..., Any]:
    """Return ``torch.vmap(function)`` for flat arguments like these, as recorded operations.

    A function that cannot be recorded (it looks at values) is interpreted.
    """
    mapped = torch.vmap(function)
    shapes: list[Any] = []

    def flattened(*values: Tensor) -> list[Tensor]:
        outputs, spec = pytree.tree_flatten(mapped(*pytree.tree_unflatten(list(values), structure)))
        shapes.append(spec)
        return outputs

    def interpreted(*values: Tensor) -> Any:
        return mapped(*pytree.tree_unflatten(list(values), structure))

    before = attributes(owner)
    if _has_hooks(owner):
        return interpreted
    try:
        with torch.no_grad():
            graph = make_fx(flattened, tracing_mode="fake")(*[value.detach() for value in flat])
    except Exception:  # whatever a network does that cannot be recorded, interpreting it is right
        return interpreted
    if attributes(owner) != before or any(map(_bakes_too_much, graph.graph.nodes)):
        return interpreted
    _simplify(graph)
    spec = shapes[-1]
    if spec == pytree.tree_structure(torch.zeros(())):
        return lambda *values: graph.forward(*values)[0]
    return lambda *values: pytree.tree_unflatten(graph.forward(*values), spec)


def _has_hooks(owner: Any) -> bool:
    """Whether a network has hooks, which a record would call once and never again."""
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def _bakes_too_much(node: fx.Node) -> bool:
    """Whether an operation is right for these very arguments only, or hides gradients."""
    return node.target in (aten.as_strided.default, aten.as_strided_.default) or _hides_gradients(node)


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
    """Drop operations that change nothing, join products with the sums after them, and leave strides open.

    A view is recorded where the layout that recording predicts allows one. What a convolution returns, or the gradient
    of one, can have another layout, by the number of its channels; a reshape is right for all.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
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
