"""What ``deploy server`` tries before it starts anything, and ``--check`` alone: settings, keys, and who may come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgan_lightning.deployment.expelled import expelled_from, numbers_in
from fedgan_lightning.deployment.keys import check_valid
from fedgan_lightning.deployment.programs import check_file
from fedgan_lightning.errors import ConfigurationError, message


def check_server(config: Path, run_dir: Path, others: Sequence[str], *, keys: Path, has_data: bool) -> list[str]:
    """Build what the settings describe, and look at the keys; return what is to be known of them, in lines.

    Args:
        config: The configuration.
        run_dir: Directory of the run.
        others: More options of ``fit``.
        keys: Folder of the keys.
        has_data: Whether the server has samples of its own.

    Raises:
        ConfigurationError: For the first thing that is not right.
    """
    from fedgan_lightning.cli import built

    for name in ("ca.crt", "server.crt", "server.key"):
        check_file(keys / name)
    for name in ("ca.crt", "server.crt"):
        check_valid(keys / name)
    cli = built(["--config", str(config), *others, "--run_dir", str(run_dir)])
    known = numbers_in(keys)
    wanted = cli.datamodule.num_clients
    if missing := sorted({*range(wanted)} - {*known} - {*expelled_from(keys)}):
        raise ConfigurationError(
            message(
                f"the server must have siteN.pub of its {wanted} sites",
                received=f"none of {missing} in {keys}",
                fix="bring them, or lower data.num_clients",
            )
        )
    _check_twice(keys, known)
    _check_minima(cli, wanted)
    samples = "samples of its own" if has_data else "no samples of its own: metrics are what sites can sum"
    return [f"server of {wanted} sites, with {samples}", f"run {run_dir}"]


def _check_twice(keys: Path, known: Sequence[int]) -> None:
    """Refuse two sites with one key.

    Raises:
        ConfigurationError: If there are any.
    """
    owners: dict[str, int] = {}
    for client_id in known:
        parts = (keys / f"site{client_id}.pub").read_text().split()
        key = parts[1] if len(parts) > 1 else ""
        if key in owners:
            raise ConfigurationError(
                message(
                    "every site must have a key of its own",
                    received=f"one of sites {owners[key]} and {client_id} in {keys}",
                    fix="ask one of them for another .pub",
                )
            )
        owners[key] = client_id


def _check_minima(cli: object, wanted: int) -> None:
    """Refuse secure aggregation of fewer sites than it ever needs.

    Raises:
        ConfigurationError: If it is so.
    """
    secure = cli.orchestrator.secure  # type: ignore[attr-defined]
    if secure is not None and wanted < secure.needed(wanted):
        raise ConfigurationError(
            message(
                f"secure aggregation must have at least {secure.needed(wanted)} sites",
                received=f"data.num_clients={wanted}",
                fix="add sites, or set federation.secure to null",
            )
        )
