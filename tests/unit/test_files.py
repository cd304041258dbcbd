"""Paths, JSON, caches, claims, settings in YAML, and where a number comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedgan_lightning import files, provenance
from fedgan_lightning.checkpoints import AtomicCheckpointIO
from fedgan_lightning.claim import NAME, check_unclaimed, check_writable, claimed
from fedgan_lightning.documents import check_settings, check_settings_file
from fedgan_lightning.errors import CheckpointError, ConfigurationError
from fedgan_lightning.evaluation.features import ClassifierFeatures
from fedgan_lightning.files import NOWHERE, cache_folder, expanded, remembered, replacing, to_json, write_json
from fedgan_lightning.provenance import code_state, described
from tests.conftest import ROOT, digits_data


class TestPaths:
    def test_a_path_is_absolute_and_its_home_is_the_users(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert expanded("~/runs/x") == tmp_path / "runs" / "x"
        assert expanded("runs/x") == tmp_path / "runs" / "x"
        assert expanded(Path("/a/../b")) == Path("/a/../b"), "links may be meant"

    @pytest.mark.parametrize("path", ["", "a\0b", "~no_such_user_of_this_machine/x"])
    def test_what_is_no_path_is_refused(self, path):
        with pytest.raises(ConfigurationError, match="a path"):
            expanded(path)


class TestJson:
    def test_what_json_cannot_say_is_null(self, tmp_path):
        value = {"a": float("nan"), "b": [float("inf"), 1.5, (float("-inf"),)], "c": {"d": 1, "e": None}}
        write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
            "a": None,
            "b": [None, 1.5, [None]],
            "c": {"d": 1, "e": None},
        }
        assert to_json({"a": [1, 2]}, separators=(",", ":")) == '{"a":[1,2]}'

    def test_a_full_disk_is_said_of_the_file_that_was_to_be_written(self, tmp_path):
        with pytest.raises(OSError, match="No space left on device") as raised, replacing(tmp_path / "a"):
            raise OSError(28, "No space left on device")
        assert raised.value.filename == str(tmp_path / "a")
        with pytest.raises(CheckpointError, match="a checkpoint must be writable; got .*last.ckpt .*unexpected pos"):
            AtomicCheckpointIO().save_checkpoint({"a": _Unwritable()}, tmp_path / "last.ckpt")
        assert not list(tmp_path.iterdir())

    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path):
        (tmp_path / "a").write_text("old")
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise ZeroDivisionError
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


class _Unwritable:
    """What torch says where a disk is full."""

    def __reduce__(self):
        raise RuntimeError("unexpected pos 58816 vs 58768")


class TestCache:
    def remember(self, path: Path, made: list[int]) -> int:
        def make() -> int:
            made.append(1)
            return 7

        return remembered(
            path, read=lambda own: int(own.read_text()), make=make, write=lambda v, file: file.write(b"%d" % v)
        )

    def test_it_is_made_once(self, tmp_path):
        made = []
        assert [self.remember(tmp_path / "new" / "a", made) for _ in range(2)] == [7, 7]
        assert len(made) == 1

    @pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"seven"])
    def test_a_damaged_file_is_made_again(self, damage, tmp_path, caplog):
        made, path = [], tmp_path / "a"
        path.write_bytes(damage)
        assert self.remember(path, made) == 7
        assert path.read_text() == "7"
        assert "is damaged and made again" in caplog.text

    @pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", str(NOWHERE)])
    def test_a_folder_that_cannot_be_used_is_said_once(self, folder, caplog, monkeypatch):
        monkeypatch.setattr(files, "_unusable", set())
        made = []
        assert [self.remember(Path(folder) / name, made) for name in "ab"] == [7, 7]
        assert len(made) == 2
        assert caplog.text.count("no cache (") == 1

    def test_without_a_home_there_is_a_folder_that_is_never_there(self, monkeypatch):
        monkeypatch.delenv("FEDGAN_CACHE", raising=False)
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
        assert cache_folder(None) == NOWHERE
        assert not cache_folder(None).exists()

    def test_a_folder_is_what_a_shell_would_make_of_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("FEDGAN_CACHE", "~/here")
        assert cache_folder(None) == tmp_path / "here"
        assert cache_folder("~/there") == tmp_path / "there"

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04half", "another network"])
    def test_a_feature_network_is_trained_again_to_the_same_weights(self, damage, tmp_path):
        samples = digits_data().train_samples
        features = ClassifierFeatures(epochs=1, cache=str(tmp_path))
        first = features.build(samples, num_classes=10)
        (path,) = tmp_path.iterdir()
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            torch.save({"head.bias": torch.zeros(3)}, path)
        assert features.build(samples, num_classes=10).digest == first.digest
        assert ClassifierFeatures(epochs=1, cache="/proc/x").build(samples, num_classes=10).digest == first.digest


class TestClaim:
    def test_a_second_one_is_told_who_writes(self, tmp_path):
        with claimed(tmp_path / "run"):
            with pytest.raises(ConfigurationError, match=rf"run, which process {os.getpid()} on .* writes"):
                check_unclaimed(tmp_path / "run")
            assert (tmp_path / "run" / NAME).exists()
        assert not (tmp_path / "run").exists(), "nothing came into it"

    def test_what_a_killed_process_left_is_taken_over(self, tmp_path):
        code = "import os, signal, sys; from fedgan_lightning.claim import claimed\n"
        code += "with claimed(sys.argv[1]): open(sys.argv[1] + '/a', 'w'); os.kill(os.getpid(), signal.SIGKILL)"
        killed = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert killed.returncode == -9
        assert (tmp_path / "run" / NAME).exists()
        with claimed(tmp_path / "run"):
            pass
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]

    @pytest.mark.parametrize("name", ["LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
    def test_the_first_process_of_a_run_holds_it_for_all(self, name, tmp_path, monkeypatch):
        with claimed(tmp_path):
            monkeypatch.setenv(name, "1")
            with claimed(tmp_path):
                pass

    @pytest.mark.parametrize("check", [check_writable, check_unclaimed])
    def test_what_cannot_be_written_is_refused(self, check, tmp_path):
        (tmp_path / "file").write_text("kept")
        for folder in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x/y")):
            with pytest.raises(ConfigurationError, match="a run directory must be a folder that can be written"):
                check(folder)
        check(tmp_path / "a" / "b")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestSettings:
    @pytest.mark.parametrize(
        "text, words",
        [
            ("a: 1\nb: 2\na: 3\n", "f.yaml with a in line 1 and again in line 3"),
            ("a:\n  b: {c: 1,\n    c: 2}\n", "with c in line 2 and again in line 3"),
            ("- a: 1\n- b: {x: 1}\n- {c: 1, c: 2}\n", "with c in line 3 and again in line 3"),
            ("a: &x {y: 1}\nb: *x\n'a': 2\n", "with a in line 1 and again in line 3"),
            ("a:\n\tb: 1\n", r"f.yaml, line 2, column 1 \(found character"),
            ("a: [1\nb: 2\n", "f.yaml, line 2"),
            ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
            ("? {a: 1}\n: 2\n", "unhashable key"),
            ("[" * 3000, "f.yaml"),
        ],
    )
    def test_a_slip_is_named_with_its_place(self, text, words):
        with pytest.raises(ConfigurationError, match=words):
            check_settings(text, name="f.yaml")

    @pytest.mark.parametrize("text", ["", "a: 1", "a: {b: 1}\nc: {b: 1}", "x: &x {a: 1}\ny: {<<: *x, a: 2}"])
    def test_what_is_right_passes(self, text):
        check_settings(text, name="f.yaml")

    @pytest.mark.parametrize(
        "content, words",
        [
            (b"", "which is empty"),
            (b"# only a comment\n", "which is empty"),
            (b"- a\n", "which is a list"),
            (b"hello", "which is a text"),
            (b"model: [1]\n", "with a list below model:"),
            ("run_dir: café".encode("latin-1"), "can't decode byte 0xe9"),
        ],
    )
    def test_a_file_of_something_else_is_named(self, content, words, tmp_path):
        (tmp_path / "f.yaml").write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"{tmp_path}/f.yaml.*{words}"):
            check_settings_file(tmp_path / "f.yaml")


class TestProvenance:
    def commit(self, folder: Path, *names: str) -> None:
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for told in (["init", "-q"], ["add", *names], [*own, "commit", "-qm", "first"]):
            subprocess.run(["git", *told], cwd=folder, check=True)

    def test_a_checkout_has_a_commit_and_says_whether_it_was_changed(self, tmp_path):
        for name in ("__init__.py", "a.py"):
            (tmp_path / name).write_text("1")
        self.commit(tmp_path, "__init__.py", "a.py")
        code_state.cache_clear()
        commit, dirty = code_state(tmp_path)
        assert len(commit) == 40
        assert dirty is False
        for name in ("a.py", "new.py"):
            (tmp_path / name).write_text("2")
            code_state.cache_clear()
            assert code_state(tmp_path) == (commit, True), name
            subprocess.run(["git", "checkout", "-q", "a.py"], cwd=tmp_path, check=True)

    def test_an_installed_package_within_somebodys_checkout_has_none(self, tmp_path):
        (tmp_path / "README").write_text("1")
        self.commit(tmp_path, "README")
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "__init__.py").write_text("1")
        code_state.cache_clear()
        assert code_state(tmp_path / "site") == (None, None)

    def test_without_git_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        code_state.cache_clear()
        assert code_state(Path(provenance.__file__).parent) == (None, None)
        code_state.cache_clear()

    def test_a_table_is_headed_by_it(self):
        assert f"torch {torch.__version__.split('+')[0]}" in described()
        assert described().startswith(("commit ", "no commit"))
