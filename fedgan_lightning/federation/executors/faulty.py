"""Clients that fail, in simulation: every fault that a deployment meets, at a rate, from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.executors.auto import AutoExecutor
from fedgan_lightning.federation.optimizer_state import SCHEDULE
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientFailure, ClientTask, ClientUpdate, Executor, State, UpdateSum
from fedgan_lightning.seeding import make_generator

#: Length of an update that is as long as ``huge_norm`` makes it, over its own.
HUGE = 1e6
#: Faults that are meant.
ATTACKS = ("sign_flip", "noise")
SILENT = {"crash": "the client's process ended", "hang": "no answer in time"}


class FaultyExecutor(Executor):
    """Runs clients by another executor, and lets some of them fail.

    Rates are probabilities per client and round; their sum is at most 1. Which client fails how is a pure function of
    the run's seed, so that a resumed run meets the same faults. ``crash`` and ``hang`` do not answer; ``slow`` answers
    one round late; the others answer wrongly, and only a validator or a robust aggregator stands in their way.

    Args:
        executor: Who runs the clients; default as in a run without faults.
        crash: Rate of clients that end before they answer.
        hang: Rate of clients that never answer.
        slow: Rate of clients that answer in the next round.
        nan: Rate of updates of NaN.
        wrong_shape: Rate of updates whose first entry has one number too many.
        wrong_keys: Rate of updates whose first entry has another name.
        stale: Rate of updates that answer a round long past.
        huge_norm: Rate of updates a million times as long.
        sign_flip: Rate of updates that point the other way.
        noise: Rate of updates replaced by normal noise.
        wrong_size: Rate of updates that count 2^62 examples.
        wrong_counts: Rate of updates whose steps and schedules are at 1e12, with -1e12 images in -1e308 seconds.
        wrong_moments: Rate of updates whose moments and statistics are -1; without any, of one that nobody knows.
        twice: Rate of updates that come a second time.
        attack_scale: Length of updates of ``sign_flip`` and ``noise``, over that of the client's own; attackers who
            mean to break a mean send long ones.
        always: Faults of clients that always fail in the same way, by client id.

    Raises:
        ConfigurationError: If a rate is out of range or a fault unknown.
    """

    @checked(
        crash="[0, 1]",
        hang="[0, 1]",
        slow="[0, 1]",
        nan="[0, 1]",
        wrong_shape="[0, 1]",
        wrong_keys="[0, 1]",
        stale="[0, 1]",
        huge_norm="[0, 1]",
        sign_flip="[0, 1]",
        noise="[0, 1]",
        wrong_size="[0, 1]",
        wrong_counts="[0, 1]",
        wrong_moments="[0, 1]",
        twice="[0, 1]",
        attack_scale="(0, inf)",
        always="[0, inf)",
    )
    def __init__(
        self,
        executor: Executor | None = None,
        *,
        crash: float = 0.0,
        hang: float = 0.0,
        slow: float = 0.0,
        nan: float = 0.0,
        wrong_shape: float = 0.0,
        wrong_keys: float = 0.0,
        stale: float = 0.0,
        huge_norm: float = 0.0,
        sign_flip: float = 0.0,
        noise: float = 0.0,
        wrong_size: float = 0.0,
        wrong_counts: float = 0.0,
        wrong_moments: float = 0.0,
        twice: float = 0.0,
        attack_scale: float = 1.0,
        always: dict[int, str] | None = None,
    ) -> None:
        self.executor = executor if executor is not None else AutoExecutor()
        self.rates = {
            "crash": crash,
            "hang": hang,
            "slow": slow,
            "nan": nan,
            "wrong_shape": wrong_shape,
            "wrong_keys": wrong_keys,
            "stale": stale,
            "huge_norm": huge_norm,
            "sign_flip": sign_flip,
            "noise": noise,
            "wrong_size": wrong_size,
            "wrong_counts": wrong_counts,
            "wrong_moments": wrong_moments,
            "twice": twice,
        }
        self.always = dict(always or {})
        if min(self.rates.values()) < 0 or sum(self.rates.values()) > 1 + 1e-9:
            raise ConfigurationError(
                message(
                    "rates of faults must be at least 0 and sum to at most 1", received=self.rates, fix="lower them"
                )
            )
        unknown = sorted(set(self.always.values()) - set(self.rates))
        if unknown:
            raise ConfigurationError(
                message(
                    "faults must have known names",
                    received=", ".join(unknown),
                    fix=f"choose from {', '.join(sorted(self.rates))}",
                )
            )
        self.attack_scale = attack_scale
        self._late: list[ClientUpdate] = []

    def setup(self, context: ClientContext) -> None:
        context.ranks.refuse_several("faults must be simulated in one process")
        self.executor.setup(context)

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | UpdateSum | ClientFailure]:
        listed = list(tasks)
        faults = {task.client_id: self.fault(task) for task in listed}
        if not listed:
            return
        round, waiting = listed[0].round, self._late
        self._late = [update for update in waiting if update.round == round]  # of an earlier wave of this round
        yield from (update for update in waiting if update.round != round)
        for task in listed:
            if faults[task.client_id] in SILENT:
                fault = SILENT[faults[task.client_id]]  # type: ignore[index]
                yield ClientFailure(client_id=task.client_id, round=task.round, stage="train", cause=fault)
        seeds = {task.client_id: task.seed for task in listed}
        for answer in self.executor.run(task for task in listed if faults[task.client_id] not in SILENT):
            if not isinstance(answer, ClientUpdate):  # a single client's fault cannot be put into a sum
                yield answer
                continue
            fault_of = faults[answer.client_id]
            if fault_of == "slow":
                self._late.append(dataclasses.replace(answer, round=round))
                yield ClientFailure(client_id=answer.client_id, round=round, stage="reply", cause="no answer in time")
            elif fault_of is None:
                yield answer
            elif fault_of == "twice":
                yield from (answer, answer)
            else:
                changed = CORRUPTIONS[fault_of](answer, round, seeds[answer.client_id])
                yield _scaled(changed, self.attack_scale) if fault_of in ATTACKS else changed

    def fault(self, task: ClientTask) -> str | None:
        """Return how the client fails, or ``None``."""
        if task.client_id in self.always:
            return self.always[task.client_id]
        drawn = float(torch.rand((), generator=make_generator(task.seed, "fault"), dtype=torch.float64))
        for name, rate in self.rates.items():
            if drawn < rate:
                return name
            drawn -= rate
        return None

    def teardown(self) -> None:
        self.executor.teardown()

    def state_dict(self) -> dict[str, Any]:
        late = [
            {
                **vars(update),
                "delta": dict(update.delta),
                "extras": dict(update.extras),
                "metrics": dict(update.metrics),
            }
            for update in self._late
        ]
        return {"executor": self.executor.state_dict(), "late": late}

    def facts(self) -> dict[str, Any]:
        rates = {name: rate for name, rate in self.rates.items() if rate}
        return {
            "faults": rates,
            "always": dict(self.always),
            "attack_scale": self.attack_scale,
            "runs": type(self.executor).__name__,
            **self.executor.facts(),
        }

    def gauges(self) -> dict[str, float]:
        return self.executor.gauges()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.executor.load_state_dict(state.get("executor", {}))
        self._late = [ClientUpdate(**fields) for fields in state.get("late", [])]


def _changed(update: ClientUpdate, function: Callable[[Tensor], Tensor]) -> ClientUpdate:
    return dataclasses.replace(update, delta={name: function(value) for name, value in update.delta.items()})


def _scaled(update: ClientUpdate, scale: float) -> ClientUpdate:
    return _changed(update, lambda value: scale * value)


def _first_entry(update: ClientUpdate, function: Callable[[str, Tensor], tuple[str, Tensor]]) -> ClientUpdate:
    (name, value), *others = update.delta.items()
    return dataclasses.replace(update, delta=dict([function(name, value), *others]))


def _wrong_counts(update: ClientUpdate, round: int, seed: int) -> ClientUpdate:
    claims = {name: 1e12 for name in update.metrics if name.startswith(SCHEDULE)}
    claims |= {"steps": 1e12, "images": -1e12, "seconds": -1e308}
    return dataclasses.replace(update, metrics={**update.metrics, **claims})


def _wrong_moments(update: ClientUpdate, round: int, seed: int) -> ClientUpdate:
    extras = {name: torch.full_like(value, -1.0) for name, value in update.extras.items()}
    return dataclasses.replace(update, extras=extras or {"moment": torch.tensor(-1.0)})


def _noise(update: ClientUpdate, round: int, seed: int) -> ClientUpdate:
    generator = make_generator(seed, "noise")
    drawn = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in update.delta.items()}
    scale = _length(update.delta) / max(_length(drawn), 1e-12)
    return dataclasses.replace(update, delta={name: scale * value for name, value in drawn.items()})


def _length(state: State) -> float:
    return float(states.norm(state.values(), dtype=torch.float64))


def _undefined(value: Tensor) -> Tensor:
    """Return NaN in place of numbers; a code in whole numbers has none."""
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value


#: (update, round, seed) -> what is sent instead.
CORRUPTIONS: dict[str, Callable[[ClientUpdate, int, int], ClientUpdate]] = {
    "nan": lambda update, round, seed: _changed(update, _undefined),
    "wrong_shape": lambda update, round, seed: _first_entry(
        update, lambda name, value: (name, torch.cat([value.flatten(), value.new_zeros(1)]))
    ),
    "wrong_keys": lambda update, round, seed: _first_entry(update, lambda name, value: (f"{name}_", value)),
    "stale": lambda update, round, seed: dataclasses.replace(update, round=round - 2),
    "huge_norm": lambda update, round, seed: _scaled(update, HUGE),
    "sign_flip": lambda update, round, seed: _changed(update, torch.neg),
    "noise": _noise,
    "wrong_size": lambda update, round, seed: dataclasses.replace(update, num_examples=2**62),
    "wrong_counts": _wrong_counts,
    "wrong_moments": _wrong_moments,
}
