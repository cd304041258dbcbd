"""What a server is doing, for whoever looks: a file in its run directory, a line a round, figures for Prometheus."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from fedgan_lightning.deployment.sites import Sites
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.schema import printable
from fedgan_lightning.files import write_json, write_text
from fedgan_lightning.hooks import completed_rounds, is_finished, planned_rounds

logger = logging.getLogger("fedgan_lightning")

#: Name of the file in a run directory.
NAME = "status.json"
#: Scalars that the line of a round says, where they are measured.
SHOWN = ("train/loss_d", "train/loss_g", "fid")


class StatusFile(L.Callback):
    """Keeps ``status.json`` of a run: who is connected, the last round, the last error.

    Args:
        run_dir: The run directory.
        sites: Of the deployment.
        prometheus: File for the node exporter's textfile collector; ``None`` writes none.
    """

    def __init__(self, run_dir: str | Path, sites: Sites, *, prometheus: str | Path | None = None) -> None:
        self.path, self.sites = Path(run_dir) / NAME, sites
        self.prometheus = None if prometheus is None else Path(prometheus)
        self.known: dict[str, Any] = {"state": "waiting for sites", "rounds": 0, "last_error": ""}

    def write(self, **known: Any) -> None:
        """Write what is known now."""
        self.known |= {**known, "time": _now(), **self.sites.status()}
        write_json(self.path, self.known)
        if self.prometheus is not None:
            write_text(self.prometheus, figures(self.known))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        planned = planned_rounds(trainer)
        self.write(state="training", rounds=completed_rounds(trainer), planned_rounds=planned)

    def on_attempt_end(self, trainer: L.Trainer, server: Any, report: Any) -> None:
        """Note what went wrong in an attempt of a round."""
        troubles = [own for own in report.clients if own.outcome not in ("answered", "unneeded")]
        if troubles:
            last = troubles[-1]
            self.known["last_error"] = printable(f"round {report.round}: client {last.client_id} {last.reason}")
        asked = {"asked": report.num_asked, "answered": len(report.answered), "seconds": round(report.seconds, 3)}
        self.write(last_round={"round": report.round, "counted": report.counted, **asked})

    def on_round_end(self, trainer: L.Trainer, server: Any, info: Any, metrics: Any) -> None:
        """Say in one line what a round was."""
        last, scored = self.known.get("last_round", {}), {**metrics, **_scores(trainer)}
        values = ", ".join(f"{name} {float(scored[name]):.4g}" for name in SHOWN if name in scored)
        done, planned = completed_rounds(trainer), planned_rounds(trainer)
        answered = f"{last.get('answered')} of {last.get('asked')} sites answered"
        if "staleness/mean" in metrics:  # of those that had their networks in earlier rounds nobody was asked now
            age = float(metrics["staleness/mean"])
            answered = f"{last.get('answered')} sites answered, {age:.1f} rounds after they were asked,"
        took = f"in {last.get('seconds', 0):.1f} s"
        logger.info(f"round {done} of {planned}: {answered} {took}{', ' if values else ''}{values}")
        self.write(rounds=done)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(state="finished" if is_finished(trainer) else "stopped", rounds=completed_rounds(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.write(state="failed", last_error=printable(f"{type(exception).__name__}: {exception}"))


def _scores(trainer: L.Trainer) -> dict[str, float]:
    """Return the newest values of the evaluation, where they are of this round."""
    done = completed_rounds(trainer)
    latest = [own.history[-1] for own in trainer.callbacks if getattr(own, "history", None)]  # type: ignore[attr-defined]
    return {name: value for entry in latest if entry.get("rounds") == done for name, value in entry.items()}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def figures(known: dict[str, Any]) -> str:
    """Return the status in Prometheus' text format."""
    last = known.get("last_round", {})
    values = {
        "rounds_completed": ("Rounds that counted", known.get("rounds", 0)),
        "rounds_planned": ("Rounds of the whole run", known.get("planned_rounds", 0)),
        "sites_connected": ("Sites connected when last looked at", len(known.get("connected", []))),
        "sites_expected": ("Sites of the federation", len(known.get("connected", [])) + len(known.get("missing", []))),
        "round_seconds": ("Wall time of the last attempt of a round", last.get("seconds", 0)),
        "round_answered": ("Sites whose update counted in it", last.get("answered", 0)),
        "running": ("Whether rounds are being run", int(known.get("state") == "training")),
    }
    lines = [
        f"# HELP fedgan_{name} {text}\n# TYPE fedgan_{name} gauge\nfedgan_{name} {value}"
        for name, (text, value) in values.items()
    ]
    return "\n".join(lines) + "\n"


def read(run_dir: str | Path) -> dict[str, Any]:
    """Return the status of a run.

    Raises:
        ConfigurationError: If there is none.
    """
    path = Path(run_dir) / NAME
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("no mapping")
        return known
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            message(
                "a deployment's run directory must have its status",
                received=f"{path} ({error})",
                fix="name the --run_dir of a server that has started",
            )
        ) from error


def lines(known: dict[str, Any]) -> list[str]:
    """Return a status in words."""
    last, planned = known.get("last_round"), known.get("planned_rounds", "?")
    found = [
        f"state       {known.get('state')} ({known.get('time')})",
        f"rounds      {known.get('rounds', 0)} of {planned}",
        f"connected   {_clients(known.get('connected', []))}",
        f"missing     {_clients(known.get('missing', []))}",
    ]
    if last:
        counted = "" if last["counted"] else ", abandoned"
        found.append(
            f"last round  {last['round']}: {last['answered']} of {last['asked']} in {last['seconds']} s{counted}"
        )
    refused = [f"{name}: {why}" for name, why in known.get("refused", {}).items()]
    return [*found, *(f"refused     {line}" for line in refused), f"last error  {known.get('last_error') or 'none'}"]


def _clients(listed: Sequence[int]) -> str:
    return ", ".join(f"client {k}" for k in listed) or "none"
