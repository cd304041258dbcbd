"""Rounds that do not wait for all, between sites: the simulation by the sites' own clock, and what goes wrong."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.errors import FedGANError
from fedgan_lightning.visuals.runs import read_run
from tests.conftest import ROOT, assert_states_equal, slow
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower


class TimedGrid(LoopbackGrid):
    """Sites that take a while: time goes on when the server looks and nothing has come.

    Args:
        seconds: By node how long an answer to ``train`` takes.
    """

    def __init__(self, nodes, *, seconds, run_config) -> None:
        super().__init__(nodes, run_config=run_config)
        self.seconds, self.now, self.due = seconds, 0.0, {}
        self.begun: list[tuple[float, int, int]] = []  # when, which node, from which version

    def push_messages(self, messages):
        listed = list(messages)
        keys = super().push_messages(listed)
        for key, message in zip(keys, listed):
            node = message.metadata.dst_node_id
            is_work = message.metadata.message_type == "train"
            self.due[key] = self.now + (self.seconds[node] if is_work else 0.0)
            if is_work:
                self.begun.append((self.now, node, int(message.metadata.group_id)))
        return keys

    def pull_messages(self, keys):
        return super().pull_messages([key for key in keys if self.due[key] <= self.now])

    def wait(self) -> None:
        """Let time pass until the next answer is there."""
        later = [self.due[key] for key in self._open if self.due[key] > self.now]
        self.now = min(later, default=self.now + 1.0)


def options_of(*more: str, buffer_size: int = 2, seconds=(1.0, 2.4, 5.1), rounds: int = 6) -> tuple[str, list[str]]:
    _, config, *options = small("digits")
    rule = "--federation.rules.asynchronous"
    durations = f"{{class_path: FixedDurations, init_args: {{by_client: {list(seconds)}}}}}"
    options += [f"{rule}.buffer_size", str(buffer_size), f"{rule}.durations", durations]
    options += ["--data.num_clients", str(len(seconds)), "--federation.rounds", str(rounds)]
    options += ["--evaluation.every_n_rounds", "100", "--pictures.every_n_rounds", "100"]
    return config, [*options, "--federation.executor", "SequentialExecutor", *more]


def grid_of(folder, config, options, *, seconds=(1.0, 2.4, 5.1)) -> TimedGrid:
    told = {"config": config, "options": " ".join(quoted(options))}
    nodes = {100 + k: {"client-id": k, "state": str(folder / "state")} for k in range(len(seconds))}
    return TimedGrid(nodes, seconds={100 + k: own for k, own in enumerate(seconds)}, run_config=told)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Return what runs a server over a grid whose time passes while it waits."""
    monkeypatch.syspath_prepend(str(ROOT))

    def run(grid, config, options, *, name: str = "run"):
        monkeypatch.setattr("fedgan_lightning.deployment.sites.Sites.pause", lambda sites: grid.wait())
        serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / name)])
        return ending(tmp_path / name)

    return run


def ending(run_dir):
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "more",
    [
        ["--federation.sync", "{discriminator: local}"],
        slow(["--federation.transforms", "[{class_path: TopK, init_args: {share: 0.1}}]"]),
        slow(["--federation.rules.asynchronous.most_stale", "1"]),
        slow(["--federation.rules.asynchronous.toward", "model"]),
    ],
    ids=["private discriminators", "error feedback", "most stale", "towards the model"],
)
def test_sites_that_take_their_time_are_the_simulation_by_that_clock(more, tmp_path, serve):
    """A site that is done gets the newest networks at once; what one keeps goes on from its last answer."""
    config, options = options_of(*more)
    grid = grid_of(tmp_path, config, options)
    mine = serve(grid, config, options)["state_dict"]
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    assert_states_equal(mine, ending(tmp_path / "simulated")["state_dict"], atol=1e-6, rtol=1e-5)
    deployed, simulated = (read_run(tmp_path / folder) for folder in ("run", "simulated"))
    for tag in ("staleness/mean", "staleness/max", "staleness/dropped"):
        assert deployed.scalars[tag] == simulated.scalars[tag], tag
    assert max(deployed.scalars["staleness/max"][1]) > 0 or "most_stale" in str(more)
    up = [sum(own.summary["bytes_up"].values()) for own in (deployed, simulated)]
    assert up[0] > up[1] if "most_stale" in str(more) else up[0] == up[1], "what is too old has travelled"


def test_a_site_that_is_done_in_mid_round_starts_at_once(tmp_path, serve):
    """The slow one answers an old round while a buffer fills, and does not wait for the next."""
    seconds = (2.0, 3.1, 5.0)
    config, options = options_of(seconds=seconds)
    grid = grid_of(tmp_path, config, options, seconds=seconds)
    serve(grid, config, options)
    of_slow = [(when, version) for when, node, version in grid.begun if node == 102]
    assert of_slow[:2] == [(0.0, 0), (5.0, 1)]
    assert not any(node != 102 and when == 5.0 for when, node, _ in grid.begun), "no round has begun then"
    assert len(grid.begun) == len({(node, version) for _, node, version in grid.begun}), "twice the same work"


def test_a_site_that_is_away_holds_nobody_up_and_comes_back(tmp_path, serve, monkeypatch):
    config, options = options_of("--federation.rules.max_attempts", "3", rounds=8)
    grid = grid_of(tmp_path, config, options)
    push = grid.push_messages

    def leave_and_return(messages):
        grid.away = {101} if 2.0 < grid.now < 6.0 else set()
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", leave_and_return)
    serve(grid, config, options)
    when = [began for began, node, _ in grid.begun if node == 101]
    assert max(when) > 6.0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_an_answer_that_takes_too_long_is_given_up(tmp_path, serve, monkeypatch, caplog):
    """A site that never answers costs its place in a buffer of others nothing; its late answers do not count."""
    config, options = options_of("--federation.rules.timeout", "30", rounds=4)
    grid = grid_of(tmp_path, config, options, seconds=(1.0, 2.4, 1e9))
    clock = {"now": 0.0}
    monkeypatch.setattr("fedgan_lightning.deployment.flower.time.monotonic", lambda: clock["now"])
    grid_wait = grid.wait

    def wait():
        grid_wait()
        clock["now"] += 11.0

    monkeypatch.setattr(grid, "wait", wait)
    serve(grid, config, options)
    assert "client 2 failed: reply: no answer within 30 s" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 4


def test_a_buffer_that_cannot_be_filled_ends_the_run_by_name(tmp_path, serve):
    config, options = options_of("--federation.rules.max_attempts", "2", buffer_size=3)
    grid = grid_of(tmp_path, config, options)
    push = grid.push_messages

    def leave(messages):
        listed = list(messages)
        grid.away = {101} if any(own.metadata.message_type == "train" for own in listed) or grid.away else set()
        return push(listed)

    grid.push_messages = leave
    with pytest.raises(FedGANError, match="fewer in each of 2 attempts"):
        serve(grid, config, options)


def test_a_liar_s_answers_are_left_out_and_what_it_keeps_does_not_count(tmp_path, serve):
    config, options = options_of("--federation.sync", "{discriminator: local}", rounds=5)
    grid = grid_of(tmp_path, config, options)

    def lie(node, kind, reply):
        if node == 100 and kind == "train" and grid.now < 3.0:
            for record in reply.content.array_records.values():
                for name, array in record.items():
                    numbers = array.numpy()
                    if numbers.dtype.kind == "f":
                        record[name] = type(array)(numbers * float("nan"))

    grid.edit = lie
    serve(grid, config, options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary["events"]["rejected"] >= 1


def test_a_server_that_starts_again_goes_on(tmp_path, serve):
    """Nobody is at work then: whoever was has its answer forgotten, and starts from the newest networks."""
    config, options = options_of("--federation.sync", "{discriminator: local}", "--checkpoint.every_n_rounds", "1")
    grid = grid_of(tmp_path, config, options)
    serve(grid, config, [*options, "--federation.rounds", "3"])
    again = grid_of(tmp_path, config, options)
    found = serve(again, config, options)
    assert {version for _, _, version in again.begun if _ is not None} == {3, 4, 5}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 6
    assert all(bool(value.isfinite().all()) for value in found["state_dict"].values() if value.is_floating_point())


def test_a_round_that_nobody_can_fill_ends_and_is_tried_again(tmp_path, serve, caplog):
    """All that is still at work is held, for it is in the buffer already: waiting for it would never end."""
    seconds = (2.0, 3.1, 5.0)
    more = ["--federation.rules.max_attempts", "6", "--federation.validator", "UpdateValidator"]
    config, options = options_of(*more, seconds=seconds, rounds=4)
    grid = grid_of(tmp_path, config, options, seconds=seconds)

    def lie(node, kind, reply):
        if node in (100, 101) and kind == "train" and 4.5 < grid.now < 20.0:
            for record in reply.content.array_records.values():
                for name, array in record.items():
                    numbers = array.numpy()
                    if numbers.dtype.kind == "f":
                        record[name] = type(array)(numbers * float("nan"))

    grid.edit = lie
    serve(grid, config, options)
    assert "abandoned: 1 of at least 2 clients answered" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 4


def test_those_who_are_there_are_sent_their_tasks_whoever_is_away(tmp_path, serve):
    """One of two at work is away at the beginning: somebody else starts, and nobody is forgotten."""
    seconds = (1.0, 1.3, 1.7, 2.1)
    more = ["--federation.rules.asynchronous.concurrency", "2"]
    config, options = options_of(*more, seconds=seconds, buffer_size=1, rounds=10)
    grid = grid_of(tmp_path, config, options, seconds=seconds)
    push, first = grid.push_messages, []

    def leave(messages):
        listed = list(messages)
        train = [own for own in listed if own.metadata.message_type == "train"]
        if not train and not first:
            grid.away = {100, 102}
        first.extend(train)
        grid.away = set() if len(first) > 3 else grid.away
        return push(listed)

    grid.push_messages = leave
    serve(grid, config, options)
    assert {node for _, node, _ in grid.begun} == {100, 101, 102, 103}
    ends = [when + grid.seconds[node] for when, node, _ in grid.begun]
    for moment in (own for own, _, _ in grid.begun[2:]):
        at_work = sum(begun <= moment < end for (begun, _, _), end in zip(grid.begun, ends))
        assert at_work <= 2


def test_clients_times_are_told(tmp_path, serve, monkeypatch):
    """Seconds that cannot be right are left out, and what a version took counts from when it was sent."""
    monkeypatch.setattr("fedgan_lightning.federation.update_checks.CLOCKS", 0.0)
    config, options = options_of()
    serve(grid_of(tmp_path, config, options), config, options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    answered = [own for row in rows for own in row["clients"] if own["outcome"] == "answered"]
    assert len(answered) == 12
    assert all(own["seconds"] > 0 for own in answered)
