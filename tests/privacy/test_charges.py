"""The ledger: written before a release, never shorter, and paid again after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgan_lightning import CheckpointError
from fedgan_lightning.dp.accounting import Release
from fedgan_lightning.dp.charges import Ledger
from tests.conftest import assert_states_equal, quiet_trainer, ring_data, ring_gan, sgd
from tests.privacy.parts import private_gan, settings

ONE = Release("client", "poisson", 1.0, 1, 0.1)


def test_like_releases_are_counted_together_and_written_before_they_are_made(tmp_path):
    ledger = Ledger(tmp_path / "privacy.json")
    for _ in range(3):
        ledger.charge([ONE])
    assert json.loads((tmp_path / "privacy.json").read_text())["releases"][0]["count"] == 3


def test_epsilon_in_between_is_bounded_from_above():
    ledger = Ledger()
    exact = []
    for _ in range(30):
        ledger.charge([ONE])
        exact.append(
            (
                ledger.epsilon("client", delta=1e-5, planned=100, accountant="rdp"),
                ledger.epsilon("client", delta=1e-5, accountant="rdp"),
            )
        )
    assert all(above >= own for above, own in exact)
    assert len({above for above, _ in exact}) == 6


def test_an_attempt_that_no_checkpoint_knows_is_paid_for(tmp_path):
    Ledger(tmp_path / "privacy.json").charge([ONE])
    again = Ledger(tmp_path / "privacy.json")
    again.begin()
    again.charge([ONE])
    assert again.of("client")[0].count == 2


def test_who_took_part_in_rounds_that_no_checkpoint_knows_is_counted(tmp_path):
    """A cap, and the steps of a client, must not begin anew for one that was asked in a round that is repeated."""
    ledger = Ledger(tmp_path / "privacy.json")
    ledger.counts = {"rounds": {"0": 2}}
    ledger.charge([ONE])
    state = ledger.state_dict()
    ledger.counts = {"rounds": {"0": 2, "1": 2}}
    ledger.charge([])
    again = Ledger(tmp_path / "privacy.json")
    again.restore(state)
    assert again.counts == {"rounds": {"0": 2, "1": 2}}


@pytest.mark.parametrize("change", ["shorter", "missing", "damaged"])
def test_a_ledger_that_lost_a_release_is_refused(tmp_path, change):
    ledger = Ledger(tmp_path / "privacy.json")
    ledger.charge([ONE])
    ledger.charge([ONE])
    state, path = ledger.state_dict(), tmp_path / "privacy.json"
    if change == "shorter":
        path.write_text(path.read_text().replace('"count": 2', '"count": 1'))
    elif change == "missing":
        path.unlink()
    else:
        path.write_text("{")
    with pytest.raises(CheckpointError, match="must hold every release that its checkpoint knows of"):
        Ledger(path).restore(state)


def test_a_run_that_goes_on_pays_again_for_rounds_that_no_checkpoint_knows(tmp_path):
    ledger = Ledger(tmp_path / "privacy.json")
    ledger.charge([ONE])
    state = ledger.state_dict()
    ledger.charge([ONE])
    again = Ledger(tmp_path / "privacy.json")
    again.restore(state)
    assert again.of("client")[0].count == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: (ring_gan(optimizer=sgd), settings()),
        lambda: (private_gan(), {"optimizer_state": "reset", "local_steps": 2}),
    ],
)
def test_a_continued_run_is_an_uninterrupted_one(tmp_path, make):
    from fedgan_lightning import FederatedOrchestrator, SequentialExecutor, ServerModule

    def run(rounds, folder, ckpt_path=None):
        gan, options = make()
        server = ServerModule(gan)
        orchestrator = FederatedOrchestrator(**{**options, "rounds": rounds, "executor": SequentialExecutor()})
        trainer = quiet_trainer(orchestrator, default_root_dir=str(folder))
        trainer.fit(server, datamodule=ring_data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        return server.model.state_dict(), orchestrator.keeper

    whole, spent = run(4, tmp_path / "whole")
    _, first = run(2, tmp_path / "parts")
    assert sum(own.count for own in first.ledger.releases) * 2 == sum(own.count for own in spent.ledger.releases)
    parts, continued = run(4, tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert_states_equal(parts, whole)
    assert continued.ledger.releases == spent.ledger.releases
    (tmp_path / "parts" / "privacy.json").unlink()
    with pytest.raises(CheckpointError, match="privacy.json"):
        run(6, tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")


def test_no_key_is_in_a_checkpoint(tmp_path):
    import torch

    from tests.conftest import federate

    _, orchestrator, trainer = federate(ring_gan(optimizer=sgd), ring_data(), **settings(testing_seed=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    keys = list(orchestrator.keeper._keys.values())
    content = (tmp_path / "last.ckpt").read_bytes()
    assert all(key not in content and key.hex().encode() not in content for key in keys)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(key.hex() not in Path("privacy.json").read_text() for key in keys)
