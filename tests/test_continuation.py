"""A run and its own continuation: one directory, the same data and settings, and nothing of another run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from fedgan_lightning import FederatedOrchestrator, Federation, SequentialExecutor, ServerModule, StartFrom
from fedgan_lightning.checkpoints import AtomicCheckpointIO, BestCheckpoint, read_checkpoint
from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.deployment.shared_settings import SHARED, digest_of
from fedgan_lightning.errors import CheckpointError, ConfigurationError
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.checks import PRECISIONS, check_precision
from fedgan_lightning.recorder import best_values
from tests.conftest import assert_states_equal, federate, quiet_trainer, ring_data, ring_gan
from tests.test_cli import one_line, run, small

QUICK = ["--federation.executor", "SequentialExecutor", "--evaluation.metrics", "[FrechetDistance]"]


def files(folder: Path) -> dict[str, int]:
    """What lies there, but for the events that TensorBoard begins as soon as a Trainer is set up."""
    found = (path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("fit", *small("digits"), *QUICK, "--run_dir", folder)[0] == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestCommandLine:
    def test_a_run_in_the_home_folder_is_continued_there(self, tmp_path, capsys, monkeypatch):
        home = tmp_path / "home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        (tmp_path / "h.yaml").write_text("run_dir: ~/runs/x\n")
        told = [*small("digits"), *QUICK, "--config", tmp_path / "h.yaml"]
        assert run("fit", *told, capsys=capsys)[0] == 0
        code, out, err = run("fit", *told, "--federation.rounds=3", "--ckpt_path", "last", capsys=capsys)
        assert code == 0, err
        assert "begins anew" not in out
        assert [entry["rounds"] for entry in summary(home / "runs" / "x")["history"]] == [0, 1, 2, 3]
        assert not (tmp_path / "~").exists()
        for own in (f"--config={home}/runs/x/config.yaml", "--config=~/runs/x/config.yaml"):
            code, _, err = run("test", own, "--ckpt_path", "~/runs/x/checkpoints/last.ckpt", capsys=capsys)
            assert code == 0, err
        assert "fid" in summary(home / "runs" / "x")["test"]

    @pytest.mark.parametrize("lost", [["last"], ["last", "best"]])
    def test_a_run_that_lost_its_checkpoint_is_not_begun_anew(self, lost, copy, capsys):
        for name in lost:
            (copy / "checkpoints" / f"{name}.ckpt").unlink()
        before = files(copy)
        code, _, err = run("fit", *small("digits"), *QUICK, "--run_dir", copy, "--ckpt_path", "last", capsys=capsys)
        assert code == 2
        assert "last.ckpt, which is not there, in a directory with" in one_line(err)
        assert files(copy) == before

    def test_what_a_killed_start_left_is_begun_anew_with_its_own_settings_only(self, copy, capsys):
        for path in [*copy.glob("*.png"), *copy.glob("checkpoints/*"), copy / "rounds.jsonl", copy / "summary.json"]:
            path.unlink()
        (copy / "config.yaml").write_text((copy / "config.yaml").read_text() + "# by hand\n")
        told = ["fit", *small("digits"), *QUICK, "--run_dir", copy, "--ckpt_path", "last"]
        before = files(copy)
        code, _, err = run(*told, "--model.loss", "Hinge", capsys=capsys)
        assert code == 2
        assert "the settings of another run (model.init_args.loss.class_path was" in one_line(err)
        assert files(copy) == before
        code, out, err = run(*told, "--federation.rounds", "1", capsys=capsys)
        assert code == 0, err
        assert "begins anew" in out
        assert "by hand" not in (copy / "config.yaml").read_text(), "the settings are those of the run that is there"

    def test_a_checkpoint_of_elsewhere_does_not_overwrite_a_run(self, copy, finished, tmp_path, capsys):
        last, before = finished / "checkpoints" / "last.ckpt", files(copy)
        told = ["fit", *small("digits"), *QUICK, "--ckpt_path", last, "--federation.rounds", "3"]
        code, _, err = run(*told, "--run_dir", copy, capsys=capsys)
        assert code == 2
        assert "continued from its own checkpoint" in one_line(err)
        assert files(copy) == before
        code, _, err = run(*told, "--run_dir", tmp_path / "branch", capsys=capsys)
        assert code == 0, err
        assert summary(tmp_path / "branch")["rounds"] == 3

    def test_a_test_of_another_run_is_not_written_into_the_account_of_this_one(self, copy, finished, capsys):
        told = ["test", "--config", copy / "config.yaml", "--run_dir", copy, *QUICK]
        code, _, err = run(*told, "--ckpt_path", finished / "checkpoints" / "last.ckpt", capsys=capsys)
        assert code == 0, err
        assert "test" not in summary(copy)
        assert run(*told, capsys=capsys)[0] == 0
        assert "fid" in summary(copy)["test"]

    @pytest.mark.parametrize(
        "change", [["--best.monitor", "fid_test"], ["--best.mode", "max"], ["--best.monitor=null"]]
    )
    def test_the_best_checkpoint_is_ranked_by_one_metric(self, change, copy, capsys):
        before = files(copy)
        told = ["fit", *small("digits"), *QUICK, "--run_dir", copy, "--ckpt_path", "last", "--federation.rounds", "3"]
        code, _, err = run(*told, *change, capsys=capsys)
        assert code == 2
        assert "Set best.monitor to fid and best.mode to min" in one_line(err)
        assert files(copy) == before

    @pytest.mark.parametrize(
        "change, words",
        [
            (["--data.batch_size", "16"], "data.batch_size was 32, is 16"),
            (["--seed_everything", "3"], "data.seed was 0, is 3"),
        ],
    )
    def test_what_differs_is_named_as_it_is_typed(self, change, words, copy, capsys):
        told = ["fit", *small("digits"), *QUICK, "--run_dir", copy, "--ckpt_path", "last", "--federation.rounds", "3"]
        code, _, err = run(*told, *change, capsys=capsys)
        assert code == 2
        assert words in one_line(err)

    def test_the_summary_says_where_its_numbers_come_from(self, finished):
        found = summary(finished)
        assert {"commit", "dirty", "device", "threads", "versions"} <= set(found)
        assert found["threads"] == 1
        assert found["device"]


def federation(folder: Path, *, data=None, rounds: int = 2, **options) -> Federation:
    options.setdefault("evaluation", Evaluation(metrics=[], num_samples=20))
    return Federation(
        ring_gan(),
        ring_data() if data is None else data,
        rounds=rounds,
        local_steps=2,
        run_dir=folder,
        executor=SequentialExecutor(),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
        optimizer_state="keep",
        **options,
    )


class OtherNumbers(FederatedDataModule):
    """As many samples, held by the same clients, but others."""

    def _training_split(self) -> Samples:
        samples = super()._training_split()
        return Samples(x=samples.x.flip(0), y=samples.y, columns=samples.columns)


class TestPython:
    def test_a_new_run_after_a_look_at_a_checkpoint_is_new(self, tmp_path):
        first = federation(tmp_path / "a")
        first.fit()
        whole = summary(tmp_path / "a")
        second = federation(tmp_path / "b", best=BestCheckpoint(monitor="fid"))
        second.test(ckpt_path=tmp_path / "a" / "checkpoints" / "last.ckpt")
        second.fit()
        for counted in ("client_runs", "client_steps", "bytes_up", "bytes_down"):
            assert summary(tmp_path / "b")[counted] == whole[counted], counted
        again = federation(tmp_path / "c", rounds=1)
        again.test(ckpt_path=tmp_path / "a" / "checkpoints" / "last.ckpt")
        plain = federation(tmp_path / "d", rounds=1)
        plain.server.load_state_dict(first.server.state_dict())  # its weights are those that it has
        again.fit()
        plain.fit()
        assert_states_equal(again.server.state_dict(), plain.server.state_dict())
        assert again.orchestrator.store.state_dict().keys() == plain.orchestrator.store.state_dict().keys()

    def test_last_is_the_run_s_own(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        whole = federation("~/whole", rounds=3)
        whole.fit()
        parts = federation("~/parts")
        parts.fit()
        parts = federation("~/parts", rounds=3)
        parts.fit(ckpt_path="last")
        assert_states_equal(parts.server.state_dict(), whole.server.state_dict())
        assert summary(tmp_path / "parts")["client_runs"] == summary(tmp_path / "whole")["client_runs"]

    def test_other_samples_of_the_same_number_are_refused(self, tmp_path):
        federation(tmp_path / "run").fit()
        data = ring_data()
        held = {"num_clients": data.num_clients, "batch_size": data.batch_size, "partition": data.partition}
        other = OtherNumbers(data.source, seed=data.seed, **held)
        assert [own.tolist() for own in other.indices] == [own.tolist() for own in data.indices]
        with pytest.raises(CheckpointError, match="with the data it was started with; got other samples"):
            federation(tmp_path / "run", data=other, rounds=3).fit(ckpt_path="last")
        with pytest.raises(CheckpointError, match="data.batch_size was 16, is 8"):
            federation(tmp_path / "run", data=ring_data(batch_size=8), rounds=3).fit(ckpt_path="last")

    def test_one_directory_is_named_once(self, tmp_path):
        with pytest.raises(ConfigurationError, match="the directory of a run must be given as run_dir"):
            Federation(ring_gan(), ring_data(), trainer={"default_root_dir": str(tmp_path)})
        with pytest.raises(ConfigurationError, match="got trainer.precision=16-mixed"):
            Federation(ring_gan(), ring_data(), trainer={"precision": "16-mixed"})

    def test_a_start_from_another_run_is_not_repeated_by_a_continuation(self, tmp_path):
        _, _, trainer = federate(ring_gan(seed=1), ring_data(), rounds=1, local_steps=1)
        trainer.save_checkpoint(tmp_path / "start.ckpt")

        def go(rounds: int, ckpt_path: Path | None = None) -> L.Trainer:
            callbacks = (StartFrom(str(tmp_path / "start.ckpt")), FederatedOrchestrator(rounds=rounds, local_steps=1))
            trainer = quiet_trainer(*callbacks, max_steps=rounds, plugins=[AtomicCheckpointIO()])
            trainer.fit(ServerModule(ring_gan()), datamodule=ring_data(), ckpt_path=ckpt_path)
            return trainer

        go(1).save_checkpoint(tmp_path / "one.ckpt")
        whole = go(2).lightning_module.state_dict()
        (tmp_path / "start.ckpt").unlink()
        assert_states_equal(go(2, tmp_path / "one.ckpt").lightning_module.state_dict(), whole)
        with pytest.raises(CheckpointError, match=r"start.ckpt, which is not there"):
            go(1)

    def test_a_checkpoint_without_what_is_continued_is_refused(self, tmp_path):
        federation(tmp_path / "run").fit()
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        saved = read_checkpoint(last)
        del saved["callbacks"]["FederatedOrchestrator"]["strikes"]
        torch.save(saved, last)
        with pytest.raises(CheckpointError, match="of this version; got one that differs in KeyError: 'strikes'"):
            federation(tmp_path / "run", rounds=3).fit(ckpt_path="last")


class TestBest:
    def test_what_is_not_finite_is_never_the_best(self):
        history = [{"rounds": 0.0, "fid": math.nan}, {"rounds": 1.0, "fid": 3.0}, {"rounds": 2.0, "fid": math.inf}]
        assert best_values(history, larger_is_better=()) == {"fid": {"value": 3.0, "rounds": 1.0}}
        assert best_values(history, larger_is_better=("fid",)) == {"fid": {"value": 3.0, "rounds": 1.0}}
        assert best_values(history[:1], larger_is_better=()) == {}

    @pytest.mark.parametrize("mode, kept", [("min", 2), ("max", 3)])
    def test_no_checkpoint_is_kept_of_such_a_round(self, mode, kept, tmp_path):
        class Scores(Evaluation):
            def evaluate(self, trainer, pl_module, *, patient=False):
                return {"fid": [0.0, math.nan, 2.0, 5.0, math.inf][trainer.global_step]}

        scores = Scores(metrics=[], every_n_rounds=1)
        federation(tmp_path / "run", rounds=4, evaluation=scores, best=BestCheckpoint(mode=mode)).fit()
        assert read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["global_step"] == kept
        values = [entry["fid"] for entry in summary(tmp_path / "run")["history"]]
        assert values == [0.0, None, 2.0, 5.0, None], "JSON has no other word for it"

    def test_a_moved_run_goes_on_ranking(self, tmp_path):
        class Scores(Evaluation):
            def evaluate(self, trainer, pl_module, *, patient=False):
                return {"fid": [9.0, 2.0, 5.0, 4.0][trainer.global_step]}

        def go(folder: Path, **options):
            evaluation = Scores(metrics=[], every_n_rounds=1)
            federation(folder, evaluation=evaluation, best=BestCheckpoint(), rounds=options.pop("rounds")).fit(
                **options
            )

        go(tmp_path / "run", rounds=2)
        (tmp_path / "run").rename(tmp_path / "moved")
        go(tmp_path / "moved", rounds=3, ckpt_path="last")
        assert read_checkpoint(tmp_path / "moved" / "checkpoints" / "best.ckpt")["global_step"] == 1


class Drawing(L.LightningModule):
    """As tutorials do: it draws a picture in every epoch, by its logger."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch[0]).square().mean())
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_end(self):
        assert len(self.loggers) == 1
        self.logger.experiment.add_image("generated", torch.zeros(3, 8, 8), self.current_epoch)
        self.logger.log_metrics({"a": 1.0})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_client_that_draws_by_its_logger_is_trained():
    _, _, trainer = federate(Drawing(), ring_data(), rounds=1, local_steps=2)
    assert trainer.global_step == 1


class TestPrecision:
    @pytest.mark.parametrize("precision", [*PRECISIONS, 32, 64, None])
    def test_what_is_summed_in_double(self, precision):
        check_precision(precision)

    def test_sites_share_it(self):
        data = ring_data()
        shared = dict.fromkeys((*SHARED, "secure"))

        def digest(precision) -> str:
            settings = {"federation": shared, "model": {}, "data": {"batch_size": 4}, "seed_everything": 0}
            return digest_of({**settings, "trainer": {"precision": precision}}, data, ring_gan())

        assert digest(None) == digest("32") == digest(32) == digest("32-true")
        assert digest("bf16") == digest("bf16-mixed") != digest("32-true")
        assert digest("bf16-true") != digest("bf16-mixed")
