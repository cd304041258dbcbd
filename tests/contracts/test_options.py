"""Every option of every public class and function is checked where it is given, and named with value and fix."""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import pytorch_lightning

import fedgan_lightning
from fedgan_lightning import (
    GAN,
    AutoExecutor,
    Evaluation,
    FederatedDataModule,
    FederatedOrchestrator,
    Federation,
    SequentialExecutor,
)
from fedgan_lightning.aggregators import Krum, WeightedMean
from fedgan_lightning.errors import ConfigurationError, FedGANError
from fedgan_lightning.losses import R1
from fedgan_lightning.metrics import FrechetDistance
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator
from fedgan_lightning.options import Interval, check, checked
from fedgan_lightning.samplers import FractionOfClients, SelectedClients
from fedgan_lightning.sources import Digits

#: Numbers that may be anything finite.
UNBOUNDED = {
    "LinearRounds.start": "a hyper-parameter of any range",
    "LinearRounds.end": "a hyper-parameter of any range",
    "CosineRounds.start": "a hyper-parameter of any range",
    "CosineRounds.end": "a hyper-parameter of any range",
    "StepRounds.values": "hyper-parameters of any range",
    "Interactions.threshold": "ratings may be negative",
    "ScaleGenerator.theta": "a parameter",
    "QuadraticDiscriminator.psi": "a parameter",
    "ImageFolder.window": "values of measured pictures may be negative",
    "ImageFolder.slice_range": "numbers below 0 count from the end",
    "ClassMixes.sizes": "checked with the mixes",
    "ClassMixes.mixes": "checked with the sizes",
}


PUBLIC = (fedgan_lightning, *(getattr(fedgan_lightning, name) for name in fedgan_lightning.SUBMODULES))


def callables():
    """Return constructors and functions of the package by name: those that users call, and any with a fixed choice."""
    found = {}
    for module in pkgutil.walk_packages(fedgan_lightning.__path__, "fedgan_lightning."):
        if "app" in module.name.split("."):
            continue
        for name, own in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(own, "__module__", "") != module.name:
                continue
            is_public = any(getattr(home, name, None) is own for home in PUBLIC)
            if inspect.isclass(own) and "__init__" in vars(own):
                if not dataclasses.is_dataclass(own) and not issubclass(own, BaseException):
                    found[name] = (own, own.__init__, is_public)
            elif inspect.isfunction(own) and is_public:
                found[name] = (own, own, is_public)
    return found


CALLABLES = callables()


def options(wanted):
    """Return (name, parameter, annotation) of all parameters of checked callables whose annotation is wanted."""
    return [
        pytest.param(name, parameter, hint, id=f"{name}.{parameter}")
        for name, (_, function, _) in CALLABLES.items()
        if hasattr(function, "intervals") and not inspect.isabstract(CALLABLES[name][0])
        for parameter, hint in get_type_hints(function).items()
        if parameter != "return" and wanted(hint)
    ]


def kinds(hint):
    """Return the types that an annotation is made of; the words of a choice stand for themselves."""
    if get_origin(hint) is Literal:
        return {Literal}
    if get_origin(hint) is collections.abc.Callable:
        return {Callable}
    return {hint}.union(*map(kinds, get_args(hint))) if get_args(hint) else {hint}


def words(hint):
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return set().union(*map(words, get_args(hint)))


def nested(value, hint):
    """Return ``value`` where an annotation asks for its kind: in a list, or under a key."""
    origin = get_origin(hint)
    if origin is dict:
        key = "generator" if get_args(hint)[0] is str else 0
        return {key: value}
    if origin is not None and origin is not Literal and hasattr(origin, "__iter__"):
        inner = get_args(hint)
        size = len(inner) if origin is tuple and ... not in inner else 1
        return [nested(value, inner[0])] * size
    options = [own for own in get_args(hint) if own is not type(None)]
    return nested(value, options[0]) if len(options) == 1 and origin is not Literal else value


def refused(name, /, **given) -> str:
    """Return what is said: arguments are looked at before one that is missing is missed."""
    with pytest.raises(ConfigurationError) as caught:
        CALLABLES[name][0](**given)
    return str(caught.value)


#: What is handed to users, and made by nobody but trainers.
HANDED_OUT = {"Visit"}


def test_everything_that_users_make_is_checked():
    unchecked = [
        name
        for name, (_, function, is_public) in CALLABLES.items()
        if is_public and len(inspect.signature(function).parameters) > 1 and not hasattr(function, "intervals")
    ]
    assert set(unchecked) == HANDED_OUT
    assert len(CALLABLES) > 90


def test_every_fixed_choice_is_checked():
    with_choice = {
        name
        for name, (_, function, _) in CALLABLES.items()
        if any(words(hint) for own, hint in get_type_hints(function).items() if own != "return")
    }
    assert [name for name in with_choice if not hasattr(CALLABLES[name][1], "intervals")] == []
    assert with_choice >= {"GAN", "WeightedMean", "MLPDiscriminator", "FederatedOrchestrator", "BestCheckpoint"}


@pytest.mark.parametrize("name, parameter, hint", options(lambda hint: Literal in kinds(hint)))
@pytest.mark.parametrize("word", ["xyz", 7, True])
def test_a_word_that_is_no_choice_is_named_with_the_choices(name, parameter, hint, word):
    said = refused(name, **{parameter: nested(word, hint)})
    assert f"{parameter} of {name} must be " in said.split("; got ")[0]
    assert repr(word) in said.split("; got ")[1]
    rule, fix = said.split("; got ")[0], said.split("; got ")[1]
    for own in words(hint):
        assert str(own) in rule
        assert str(own) in fix


@pytest.mark.parametrize("name, parameter, hint", options(lambda hint: {int, float} & kinds(hint)))
def test_numbers_are_finite_of_their_kind_and_in_their_range(name, parameter, hint):
    wrong = [True, math.nan, math.inf, -math.inf, object()]
    wrong += ["1"] if str not in kinds(hint) and Literal not in kinds(hint) else []
    wrong += [1.5] if float not in kinds(hint) else []
    interval = CALLABLES[name][1].intervals.get(parameter)
    if get_origin(hint) is dict and float not in kinds(hint) and get_args(hint)[0] is int:
        return  # clients by number
    if interval is None:
        assert f"{name}.{parameter}" in UNBOUNDED, "say where it lies, or why anywhere"
    else:
        low, high = interval.bounds
        wrong += [low - 1] if float in kinds(hint) else [int(low) - 1]
        wrong += [low] * (interval.text[0] == "(") + [high] * (interval.text[-1] == ")") + [high + 1]
    for value in wrong:
        said = refused(name, **{parameter: nested(value, hint)})
        assert f"{parameter} of {name} must be " in said.split("; got ")[0], value
        assert interval is None or str(interval) in said, value


def is_object(hint):
    return any(
        inspect.isclass(own) and own.__module__.split(".")[0] in ("fedgan_lightning", "torch") for own in kinds(hint)
    )


@pytest.mark.parametrize("name, parameter, hint", options(is_object))
def test_objects_are_of_their_type(name, parameter, hint):
    for value in ("nonsense", 3, object, object()):
        said = refused(name, **{parameter: nested(value, hint)})
        assert f"{parameter} of {name} must be " in said.split("; got ")[0], value


def gan(**given):
    return GAN(MLPGenerator(4, (2,)), MLPDiscriminator((2,)), **given)


def data(**given):
    return FederatedDataModule(Digits(), **given)


SLIPS = [
    (
        lambda: WeightedMean("example"),
        "weighting of WeightedMean must be one of examples, uniform",
        "'example'",
        "write examples",
    ),
    (
        lambda: gan(updates="simultanous"),
        "updates of GAN must be one of alternating, simultaneous",
        "'simultanous'",
        "write simultaneous",
    ),
    (
        lambda: gan(fake_labels="balance"),
        "fake_labels of GAN must be one of held, balanced, all",
        "'balance'",
        "write balanced",
    ),
    (
        lambda: MLPDiscriminator((2,), conditioning="projektion"),
        "one of none, projection, auxiliary",
        "'projektion'",
        "write projection",
    ),
    (
        lambda: DCGANGenerator(norm="batchnorm"),
        "norm of DCGANGenerator must be one of batch, group, none",
        "'batchnorm'",
        "write batch",
    ),
    (
        lambda: DCGANDiscriminator(norm="layer"),
        "norm of DCGANDiscriminator must be one of",
        "'layer'",
        "write batch or group or spectral or none",
    ),
    (
        lambda: orchestrator(executor="sequential"),
        "an Executor or one of auto, autotune",
        "'sequential'",
        "give an object, SequentialExecutor(...)",
    ),
    (
        lambda: orchestrator(executor="vectorised"),
        "an Executor or one of auto, autotune",
        "'vectorised'",
        "give an object, VectorizedExecutor(...)",
    ),
    (
        lambda: orchestrator(executor=AutoExecutor),
        "an Executor or one of auto, autotune",
        "AutoExecutor",
        "AutoExecutor(...), in place of the class",
    ),
    (
        lambda: orchestrator(buffers="merged"),
        "buffers of FederatedOrchestrator must be one of merge, local, estimate",
        "'merged'",
        "write merge",
    ),
    (lambda: orchestrator(optimizer_state="averaged"), "one of reset, keep, average", "'averaged'", "write average"),
    (
        lambda: orchestrator(sync={"generator": "locale"}),
        "to one of average, local, server",
        "'locale'",
        "write average or local",
    ),
    (
        lambda: orchestrator(rounds=5.0),
        "rounds of FederatedOrchestrator must be an integer of at least 1",
        "5.0",
        "choose such a number",
    ),
    (lambda: orchestrator(aggregator="median"), "an Aggregator or None", "'median'", ""),
    (lambda: data(partition="dirichlet"), "a Partition or None", "'dirichlet'", "give an object, Dirichlet(...)"),
    (lambda: data(batch_size="64"), "an integer of at least 1", "'64'", "write 64 without quotes"),
    (lambda: gan(loss="hinge"), "an AdversarialLoss or None", "'hinge'", "give an object, Hinge(...)"),
    (lambda: gan(penalties=R1(0.1)), "a list, each a Penalty", "R1", ""),
    (lambda: gan(penalties=[R1]), "a list, each a Penalty", "R1", ""),
    (lambda: gan(clip_gradient_norm=math.nan), "a finite number above 0 or None", "nan", ""),
    (lambda: gan(generator_optimizer="Adam"), "generator_optimizer of GAN must be a function", "'Adam'", ""),
    (lambda: R1(-1.0), "gamma of R1 must be a finite number of at least 0", "-1.0", ""),
    (lambda: R1(interval=0), "interval of R1 must be an integer of at least 1", "0", ""),
    (lambda: FractionOfClients(1.5), "a finite number in (0, 1]", "1.5", ""),
    (lambda: Evaluation(metrics=[FrechetDistance]), "a list, each a Metric or None", "FrechetDistance", ""),
    (
        lambda: Federation(gan(), "digits"),
        "data of Federation must be a LightningDataModule",
        "'digits'",
        "",
    ),
    (
        lambda: Federation(SomebodysOld(), data()),
        "model of Federation must be a LightningModule",
        "SomebodysOld",
        "take LightningModule from lightning, not",
    ),
]


def orchestrator(**given):
    return FederatedOrchestrator(**given)


class SomebodysOld(pytorch_lightning.LightningModule):
    """Of the package under whose name Lightning was known before."""


@pytest.mark.parametrize("make, rule, received, fix", SLIPS, ids=range(len(SLIPS)))
def test_what_is_said_of_common_slips(make, rule, received, fix):
    with pytest.raises(ConfigurationError) as caught:
        make()
    said = str(caught.value)
    assert rule in said.split("; got ")[0]
    assert received in said.split("; got ")[1]
    assert fix.lower() in said.split("; got ")[1].lower()
    assert "\n" not in said


def test_what_is_right_in_another_dress_is_taken(tmp_path):
    """Numbers of NumPy, arrays, paths and tuples."""
    assert data(num_clients=np.int64(3)).num_clients == 3
    assert SelectedClients(np.array([0, 2])).clients == (0, 2)
    assert FractionOfClients(1).fraction == 1
    assert R1(np.float32(0.5)).gamma == 0.5
    FederatedOrchestrator(executor=SequentialExecutor(), aggregator=Krum(), local_steps=2)
    check("path of Source", tmp_path, str)


def test_a_function_is_named_by_its_own_name_and_other_errors_pass():
    @checked(size="(0, 1]")
    def grow(size: float, *others: int, by: int = 1, **rest: int) -> float:
        return size + by

    assert grow(0.5, 2, by=3, x=4) == 3.5
    assert grow.__name__ == "grow"
    with pytest.raises(ConfigurationError, match=r"size of grow must be a finite number in \(0, 1\]; got 0"):
        grow(0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        grow()
    with pytest.raises(TypeError, match=r"has no parameters \['sise'\]"):
        checked(sise="[0, 1]")(lambda size: size)
    assert issubclass(ConfigurationError, FedGANError)


@pytest.mark.parametrize(
    "text, inside, outside",
    [
        ("[0, 1)", (0, 0.5), (-1e-9, 1)),
        ("(0, 1]", (1e-9, 1), (0, 2)),
        ("[2, inf)", (2, 1e300), (1,)),
        ("(-1, 1)", (0,), (-1, 1)),
    ],
)
def test_intervals(text, inside, outside):
    assert all(number in Interval(text) for number in inside)
    assert not any(number in Interval(text) for number in outside)
