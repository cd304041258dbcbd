"""The log of a run for programs, and what a report makes of it: what came of every client in every round."""

from __future__ import annotations

import json
import re

import lightning as L
import pytest

from fedgan_lightning import RoundRules, SequentialExecutor, UpdateValidator
from fedgan_lightning.checkpoints import AtomicCheckpointIO, LastCheckpoint
from fedgan_lightning.errors import QuorumError
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.report import RoundReport
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.jsonl import RoundLog, entries
from fedgan_lightning.protocol import ClientReport
from fedgan_lightning.recorder import RunRecorder
from fedgan_lightning.samplers import FractionOfClients
from fedgan_lightning.visuals.participation import MOST_COLUMNS, MOST_ROWS, OUTCOMES, Participation
from fedgan_lightning.visuals.participation_charts import participation_panel
from fedgan_lightning.visuals.report import write_report
from fedgan_lightning.visuals.runs import read_run
from fedgan_lightning.visuals.tensorboard import LAYOUT
from tests.conftest import quiet_trainer, ring_data, ring_gan, sgd
from tests.test_report import Page

SLOW, BAD = (
    {1: "slow", 2: "nan", 3: "crash"},
    {"validator": UpdateValidator(), "rules": RoundRules(min_report_fraction=0.25)},
)


class Metrics(L.Callback):
    """Keeps what is logged of every round."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_round_end(self, trainer, server, info, metrics):
        self.rows.append(dict(metrics))


def run(root, *, rounds: int = 3, num_clients: int = 5, resume: bool = False, always=None, **options):
    """Run a federation with a run directory; return (orchestrator, metrics by round)."""
    options.setdefault("executor", FaultyExecutor(SequentialExecutor(), always=SLOW if always is None else always))
    orchestrator, metrics = FederatedOrchestrator(rounds=rounds, local_steps=1, **{**BAD, **options}), Metrics()
    trainer = quiet_trainer(
        orchestrator,
        RunRecorder(resuming=resume),
        LastCheckpoint(),
        metrics,
        default_root_dir=str(root),
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )
    last = str(root / "checkpoints" / "last.ckpt") if resume else None
    data = ring_data(num_clients=num_clients, num_samples=160 * num_clients)
    trainer.fit(ServerModule(ring_gan(optimizer=sgd)), datamodule=data, ckpt_path=last)
    return orchestrator, metrics.rows


def journal(root):
    return list(entries(root / "rounds.jsonl"))


def outcomes(entry):
    return [(own["client_id"], own["outcome"]) for own in entry["clients"]]


def timeless(found):
    """Return entries without what a clock says."""
    clocks = ("seconds", "round_trip")
    return [
        {
            **{name: value for name, value in entry.items() if name not in clocks},
            "clients": [{n: v for n, v in own.items() if n not in clocks} for own in entry["clients"]],
        }
        for entry in found
    ]


# ---------------------------------------------------------------------- what is written


def test_every_client_that_was_asked_is_accounted_for(tmp_path):
    orchestrator, metrics = run(tmp_path)
    first, second, _ = journal(tmp_path)
    honest = [(0, "answered"), (1, "failed"), (2, "rejected"), (3, "failed"), (4, "answered")]
    assert (outcomes(first), first["round"], first["attempt"], first["counted"]) == (honest, 0, 0, True)
    assert outcomes(second) == sorted([*honest, (1, "late")], key=lambda own: (own[0], own[1] != "late"))
    reasons = {own["client_id"]: own.get("reason", "") for own in first["clients"]}
    assert reasons[0] == ""
    assert reasons[1] == "reply: no answer in time"
    assert "is not finite" in reasons[2]
    assert all("seconds" in own for own in first["clients"] if own["outcome"] == "answered")

    everybody = [own for entry in journal(tmp_path) for own in entry["clients"]]
    assert sum(own["bytes_up"] for own in everybody) == sum(orchestrator.ledger.bytes_up.values())
    assert sum(own["bytes_down"] for own in everybody) == sum(orchestrator.ledger.bytes_down.values())
    assert orchestrator.ledger.client_asks == 15
    assert next(own["bytes_down"] for own in second["clients"] if own["outcome"] == "late") == 0

    wanted = {"asked": 5, "clients": 2, "failed": 2, "rejected": 1, "late": 1, "abandoned": 0}
    assert {name: metrics[1][f"round/{name}"] for name in wanted} == wanted
    assert [metrics[1][f"client/{k:03d}/answered"] for k in range(5)] == [1, 0, 0, 0, 1]
    assert metrics[1]["client/001/bytes_up"] == metrics[1]["client/000/bytes_up"] > 0, "late, but it came"
    assert metrics[1]["client/003/bytes_up"] == 0


def test_a_population_too_large_for_curves_has_quantiles(tmp_path):
    _, (few,) = run(tmp_path / "few", rounds=1, num_clients=32, clients=FractionOfClients(0.1), always={})
    _, (many,) = run(tmp_path / "many", rounds=1, num_clients=33, clients=FractionOfClients(0.1), always={})
    assert any(name.startswith("client/") for name in few), "by the population, not by the cohort"
    assert not any(name.startswith("client/") for name in many)
    assert {f"clients/seconds/{q}" for q in ("min", "median", "max")} <= many.keys()
    assert many["clients/bytes_up/median"] == many["clients/bytes_up/max"] > 0


def test_tries_that_do_not_count_are_written_when_they_end(tmp_path):
    """An operator looks for them while nothing goes on, and after the run has ended for it."""
    rules = RoundRules(min_report_fraction=1.0, max_attempts=2)
    with pytest.raises(QuorumError):
        run(tmp_path, always={0: "crash"}, rules=rules)
    assert [(own["round"], own["attempt"], own["counted"]) for own in journal(tmp_path)] == [
        (0, 0, False),
        (0, 1, False),
    ]
    assert Participation.read(tmp_path / "rounds.jsonl").abandoned == 2


# ---------------------------------------------------------------------- a process that is killed


def test_a_resumed_run_has_the_journal_of_one_that_was_not_interrupted(tmp_path):
    faults = {"crash": 0.2, "slow": 0.2, "nan": 0.2}

    def executor():
        return FaultyExecutor(SequentialExecutor(), **faults)

    run(tmp_path / "whole", rounds=5, executor=executor())
    run(tmp_path / "cut", rounds=3, executor=executor())
    path = tmp_path / "cut" / "rounds.jsonl"
    fourth = {**journal(tmp_path / "cut")[-1], "round": 3, "clients": []}
    # It went on for a round that no checkpoint knows, and was killed in the middle of a line.
    path.write_bytes(path.read_bytes() + json.dumps(fourth).encode() + b'\n{"round":4,"atte')
    run(tmp_path / "cut", rounds=5, executor=executor(), resume=True)
    assert timeless(journal(tmp_path / "cut")) == timeless(journal(tmp_path / "whole"))
    kinds = {outcome for entry in journal(tmp_path / "whole") for _, outcome in outcomes(entry)}
    assert kinds == {"answered", "failed", "late", "rejected"}, "or there was nothing to repeat"


def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(tmp_path):
    """Killed before its first checkpoint."""
    RoundLog(tmp_path / "rounds.jsonl").append(
        {"round": 0, "attempt": 0, "counted": False, "seconds": 1, "clients": []}
    )
    run(tmp_path, rounds=1, always={})
    assert [entry["counted"] for entry in journal(tmp_path)] == [True]


@pytest.mark.parametrize("damage", [b'{"round":1', b"null\n", b'{"no":"round"}\n', b"\xff\xfe\n"])
def test_a_journal_is_read_up_to_what_is_whole(tmp_path, damage):
    book = RoundLog(tmp_path / "rounds.jsonl")
    assert list(entries(book.path)) == []
    book.cut(3)
    book.sync()
    assert not book.path.exists()
    for number in range(3):
        book.append({"round": number, "clients": []})
    with book.path.open("ab") as file:
        file.write(damage)
    assert [entry["round"] for entry in entries(book.path)] == [0, 1, 2]
    book.cut(2)
    assert book.path.read_bytes() == b'{"round":0,"clients":[]}\n{"round":1,"clients":[]}\n'


# ---------------------------------------------------------------------- what a report makes of it


def written(path, tries):
    book = RoundLog(path)
    for round, counted, contacts in tries:
        clients = tuple(
            ClientReport(k, outcome, metrics={"seconds": float(k)}, bytes_down={"g": 100}, bytes_up={"g": 50})
            for k, outcome in contacts
        )
        book.append(RoundReport(round, 0, counted, len(clients), 2.0, clients).plain())
    return Participation.read(path)


def test_columns_show_the_worst_of_their_rounds_and_late_answers_stand_where_they_were_due(tmp_path):
    tries = [(0, True, [(0, "answered"), (1, "failed")]), (1, True, [(1, "late"), (0, "answered")])]
    seen = written(tmp_path / "short.jsonl", tries)
    known = {k: [OUTCOMES[code] for code in row] for k, row in seen.rows().items()}
    assert known == {0: ["answered", "answered"], 1: ["late", "not asked"]}
    assert (seen.clients[1].asked, seen.clients[1].troubles) == (1, 2)
    assert (seen.slowest[0], seen.seconds) == (0.0, [2.0, 2.0])

    long = [(r, True, [(0, "rejected" if r == 7 else "answered"), (1, "answered")]) for r in range(2 * MOST_COLUMNS)]
    seen = written(tmp_path / "long.jsonl", long)
    assert seen.rounds_per_column == 2
    assert [OUTCOMES[code] for code in seen.rows()[0][2:5]] == ["answered", "rejected", "answered"]
    assert len(seen.rows()[1]) == MOST_COLUMNS


def test_many_clients_are_counted_and_those_with_troubles_named(tmp_path):
    everybody = [(k, "failed" if k == MOST_ROWS - 3 else "answered") for k in range(MOST_ROWS + 1)]
    seen = written(tmp_path / "many.jsonl", [(0, True, everybody)])
    assert seen.rows() == {}
    assert (seen.counts["answered"], seen.counts["failed"]) == ([MOST_ROWS], [1])
    assert seen.median[0] == pytest.approx(32, abs=1)


def test_the_page_shows_who_took_part(tmp_path):
    run(tmp_path)
    page = Page(write_report([tmp_path]).read_text())
    assert f"Who answered in which round of {tmp_path.name}" in page.charts
    assert {"Seconds per round", "Megabytes by client, all rounds"} <= set(page.charts)
    assert "3 rounds, 5 clients asked 15 times: 6 answered, 2 late, 3 rejected, 6 failed." in page.texts
    assert page.texts.count("client 3") == 1
    (tmp_path / "rounds.jsonl").unlink()
    assert participation_panel(read_run(tmp_path), "x") == "", "of a run from before there was a journal"


def test_the_dashboard_s_groups_have_something_to_show(tmp_path):
    """Every pattern of the two groups fits a tag that is logged, in a small population or in a large one."""
    _, small = run(tmp_path / "small", rounds=1, num_clients=4, always={})
    _, large = run(tmp_path / "large", rounds=1, num_clients=33, clients=FractionOfClients(0.1), always={})
    patterns = {p for group in ("Clients", "Rounds") for _, own in LAYOUT[group].values() for p in own}
    for rows, absent in (
        (small, {"round_trip", "connected"}),
        (large, {"round_trip", "connected", "loss", "answered"}),
    ):
        unused = {pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in rows[-1])}
        assert {pattern for pattern in unused if not any(word in pattern for word in absent)} == set()
    assert any(re.match("bytes/.*", tag) for tag in small[-1])
    assert not re.match("bytes/.*", "client/000/bytes_up"), "totals, and not what one client sent"
