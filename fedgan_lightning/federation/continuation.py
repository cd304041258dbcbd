"""Going on from a checkpoint: what an orchestrator takes over from the one that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgan_lightning.errors import CheckpointError, FedGANError, message
from fedgan_lightning.federation.report import ClientClock
from fedgan_lightning.federation.run_fingerprint import RunFingerprint


def take_over(federation: Any, state: Mapping[str, Any], rounds: int) -> None:
    """Have an orchestrator go on from a state, after checking that it belongs to this federation.

    Args:
        federation: The orchestrator, which knows what its own run is made of.
        state: What its ``state_dict`` returned.
        rounds: Rounds that are complete.

    Raises:
        CheckpointError: If it is that of another federation, or of another version.
    """
    try:
        _take_over(federation, state, rounds)
    except FedGANError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            message(
                "a checkpoint must have the state of an orchestrator of this version",
                received=f"one that differs in {type(error).__name__}: {error}",
                fix="continue it with the version that wrote it",
            )
        ) from error


def _take_over(federation: Any, state: Mapping[str, Any], rounds: int) -> None:
    federation.arrivals.check_continued(state["arrivals"], rounds=rounds)  # first: no change of settings mends it
    before = RunFingerprint(state["settings"], state["identity"])
    changed = federation._fingerprint.check(before, federation.accept_changes)
    if "store_files" in state:
        federation.store.load_files(state["store_files"], federation._files_at)
    else:
        federation.store.load_state_dict(state["store"])
    federation.ledger.load_state_dict(state["ledger"])
    federation.ledger.changes += [{"round": rounds, "changed": line} for line in changed]
    federation._clock = ClientClock.of(state["clock"])
    federation.executor.load_state_dict(state["executor"])
    federation._strikes = {int(client_id): count for client_id, count in state["strikes"].items()}
    federation.arrivals.load_state_dict(state["arrivals"])
    if federation.keeper is not None:
        federation.keeper.restore(state["privacy"])
