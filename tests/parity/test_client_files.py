"""Private states of clients on disk: what checkpoints hold of them, and what they read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedgan_lightning import Federation, SequentialExecutor
from fedgan_lightning.checkpoints import folder_beside, read_checkpoint
from fedgan_lightning.errors import CheckpointError
from fedgan_lightning.federation import store
from fedgan_lightning.samplers import FractionOfClients
from tests.conftest import assert_states_equal, quiet_trainer, ring_data, ring_gan

ONE = FractionOfClients(1 / 6)
ROUNDS = 8


def start(folder: Path, *, client_state: str = "disk", rounds: int = ROUNDS) -> Federation:
    return Federation(
        ring_gan(),
        ring_data(num_clients=6),
        rounds=rounds,
        local_steps=1,
        clients=ONE,
        client_state=client_state,
        optimizer_state="keep",
        executor=SequentialExecutor(),
        run_dir=str(folder),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )


def test_a_checkpoint_reads_no_client_on_disk_and_holds_all_of_them(tmp_path, monkeypatch):
    reads: list[Path] = []
    read = store.read_state
    monkeypatch.setattr(store, "read_state", lambda path: reads.append(path) or read(path))
    run = start(tmp_path / "run")
    run.fit()
    asked = [ONE.sample(num_clients=6, round=index, seed=0)[0] for index in range(ROUNDS)]
    assert len(reads) == len(asked) - len(set(asked)), "only clients that train again are read"

    last, live = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "clients" / "rank0"
    beside = {path.name: path.stat().st_ino for path in folder_beside(last).iterdir()}
    assert beside == {path.name: path.stat().st_ino for path in live.iterdir()}, "the same files, under two names"
    assert len(beside) == len(set(asked)), "of every client its last state only"

    states = {k: dict(run.orchestrator.store.read(k)) for k in range(6)}
    moved = tmp_path / "elsewhere.ckpt"
    shutil.copy(last, moved)
    shutil.copytree(folder_beside(last), folder_beside(moved))
    shutil.rmtree(tmp_path / "run")
    for where in ("disk", "memory"):
        again = start(tmp_path / where, client_state=where)
        again.fit(ckpt_path=str(moved))
        for k in range(6):
            assert_states_equal(dict(again.orchestrator.store.read(k)), states[k])
    next(folder_beside(moved).iterdir()).unlink()
    with pytest.raises(CheckpointError, match="in the folder beside it; got 1 files missing"):
        start(tmp_path / "without").fit(ckpt_path=str(moved))


def test_a_run_that_ends_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    """Between the new files and the new checkpoint, and between that and the removal of old files."""
    whole = start(tmp_path / "whole")
    whole.fit()

    class Killed(BaseException):
        """No handler of the run's sees to it."""

    for moment in ("before", "after"):
        run, last = start(tmp_path / moment), tmp_path / moment / "checkpoints" / "last.ckpt"
        save, saves = torch.save, []

        def dying(content, file, *, moment=moment, save=save, saves=saves):
            saves.append(content)
            if moment == "after" or len(saves) < 4:
                save(content, file)
            if len(saves) == 4:
                if moment == "after":
                    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
                else:
                    raise Killed

        monkeypatch.setattr(torch, "save", dying)
        with pytest.raises(Killed):
            run.fit()
        monkeypatch.undo()
        names = set(read_checkpoint(last)["callbacks"]["FederatedOrchestrator"]["store_files"].values())
        assert names <= {path.name for path in folder_beside(last).iterdir()}
        again = start(tmp_path / moment)
        again.fit(ckpt_path=str(last))
        assert_states_equal(whole.server.model.state_dict(), again.server.model.state_dict())
        for k in range(6):
            assert_states_equal(dict(whole.orchestrator.store.read(k)), dict(again.orchestrator.store.read(k)))


def test_a_trainer_with_another_plugin_puts_the_states_into_the_checkpoint(tmp_path):
    run = start(tmp_path / "run", rounds=2)
    run.fit()
    trainer = quiet_trainer(run.orchestrator, default_root_dir=tmp_path / "plain")
    trainer.fit(run.server, datamodule=run.data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert not folder_beside(tmp_path / "plain.ckpt").exists()
    kept = read_checkpoint(tmp_path / "plain.ckpt")["callbacks"]["FederatedOrchestrator"]["store"]
    assert len(kept) == len(run.orchestrator.store) > 0
    again = start(tmp_path / "again", rounds=2)
    again.fit(ckpt_path=str(tmp_path / "plain.ckpt"))
    for k in range(6):
        assert_states_equal(dict(again.orchestrator.store.read(k)), dict(run.orchestrator.store.read(k)))
