"""Messages that are no answers, at every stage: no run ends, the site is named, the others' result is the same bits."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.sites import Sites
from tests.conftest import assert_states_equal
from tests.deployment import test_secure as secure
from tests.deployment.test_sites import SHORT, deploy, digest_at, grid_of, simulate, summary, weights

pytestmark = pytest.mark.flower

LIAR = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sites' folder: a site is built once for equal settings, and that takes its time."""
    return tmp_path_factory.mktemp("sites")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


# ---------------------------------------------------------------------- what may come


def npy(shape, dtype="<f4", *, data: bytes = b"", version=(1, 0)) -> bytes:
    """Return bytes that begin as an array of NumPy's does."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(file, header)
    return file.getvalue() + data


def with_array(data: bytes):
    """Return what puts these bytes in the place of the first array of an answer."""

    def edit(content):
        name = next(iter(content["arrays"]))
        array = content["arrays"][name]
        content["arrays"][name] = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)

    return edit


def with_fact(name, value):
    def edit(content):
        content["facts"][name] = value

    return edit


def replaced(content):
    """Return what answers with other records altogether."""
    return lambda reply: setattr(reply, "content", content)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


DEEP = "[" * 50_000 + "]" * 50_000
ARRAYS = {
    "an empty array": b"",
    "junk": b"\x00" * 100,
    "a pickle": pickled(),
    "an archive": zipped(),
    "an archive that is none": b"PK\x03\x04junk",
    "10^15 numbers": npy((10**15,)),
    "a negative length": npy((-1,)),
    "a matrix": npy((2, 3), data=bytes(24)),
    "objects": npy((3,), "|O", data=bytes(24)),
    "complex numbers": npy((3,), "<c8", data=bytes(24)),
    "big-endian numbers": npy((3,), ">f4", data=bytes(12)),
    "another version": npy((3,), version=(2, 0), data=bytes(12)),
    "too short": npy((3,), data=bytes(11)),
    "no numbers": npy((0,)),
}
LAYOUTS = {
    "no text": 7,
    "a number": "7",
    "nothing": "",
    "deep": DEEP,
    "infinite shapes": '{"names": ["a"], "shapes": [[Infinity]], "dtypes": ["float32"]}',
    "negative shapes": '{"names": ["a"], "shapes": [[-3]], "dtypes": ["float32"]}',
    "huge shapes": '{"names": ["a"], "shapes": [[1000000000000000]], "dtypes": ["float32"]}',
    "no dtype": '{"names": ["a"], "shapes": [[3]], "dtypes": ["nonsense"]}',
    "names that are none": '{"names": [7], "shapes": [[3]], "dtypes": ["float32"]}',
    "twice the same": '{"names": ["a", "a"], "shapes": [[3], [3]], "dtypes": ["float32", "float32"]}',
}
FACTS = {
    "infinite examples": ("num_examples", math.inf),
    "NaN examples": ("num_examples", math.nan),
    "no examples": ("num_examples", 0),
    "very many examples": ("num_examples", 2**62),
    "examples in words": ("num_examples", "many"),
    "a list of rounds": ("round", [1.0, 2.0]),
    "an infinite round": ("round", math.inf),
    "bytes for a round": ("round", b"1"),
    "a metric of words": ("metric|loss_d", "low"),
    "a metric without end": ("metric|seconds", -1e308),
    "steps without end": ("metric|steps", 1e30),
    "a metric of bytes": ("metric|loss_g", b"\xff"),
    "an error of a megabyte": ("error", "\x1b[2J\nforged line\r" * 60_000),
    "an error that is no text": ("error", [1, 2, 3]),
}


def lies() -> dict[str, object]:
    """Return edits of an answer to a task, by what they do."""
    found: dict[str, object] = {name: with_array(data) for name, data in ARRAYS.items()}
    found |= {f"a layout: {name}": with_fact("layout|delta", value) for name, value in LAYOUTS.items()}
    found |= {name: with_fact(*pair) for name, pair in FACTS.items()}
    return found


WHOLE = {
    "no records": replaced(RecordDict()),
    "no arrays": replaced(RecordDict({"facts": ConfigRecord({"num_examples": 3, "round": 0})})),
    "metrics for facts": replaced(RecordDict({"facts": MetricRecord({"a": 1.0}), "arrays": ArrayRecord()})),
    "arrays for facts": replaced(RecordDict({"facts": ArrayRecord(), "arrays": ArrayRecord()})),
}


def test_whatever_a_site_answers_to_a_task_the_run_goes_on(tmp_path):
    """One site tells another lie in every round; the others' weights are those of a run without it."""
    told = {**{name: (lambda reply, edit=edit: edit(reply.content)) for name, edit in lies().items()}, **WHOLE}
    assert len(told) >= 40
    left = iter(told.items())

    def lie(node, kind, reply):
        if (node, kind) == (LIAR, "train"):
            next(left)[1](reply)

    rules = ["--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]
    options = [*rules, "--federation.rounds", str(len(told)), "--federation.local_steps", "1"]
    options += ["--evaluation.metrics", "[]", "--federation.validator", "UpdateValidator"]
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.edit = lie
    deploy(tmp_path, *options, grid=grid)
    found = summary(tmp_path, "deployed")
    assert found["status"] == "finished"
    assert [(own["round"], own["client_id"]) for own in found["incidents"]] == [(k, 1) for k in range(len(told))]
    assert all(own["reason"].isprintable() and len(own["reason"]) < 1000 for own in found["incidents"])
    json.dumps(found, allow_nan=False)
    lines = (tmp_path / "deployed" / "rounds.jsonl").read_text().splitlines()
    assert max(map(len, lines)) < 5000
    select = ["--federation.clients", "SelectedClients", "--federation.clients.clients", "[0, 2]"]
    simulate(tmp_path, *options[4:], *select)
    assert_states_equal(weights(tmp_path, "deployed"), weights(tmp_path, "simulated"))


def test_a_liar_is_not_asked_for_ever(tmp_path):
    """Without a validator, too: after five such answers."""

    def lie(node, kind, reply):
        if (node, kind) == (LIAR, "train"):
            reply.content = RecordDict()

    options = ["--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]
    options += ["--federation.rounds", "8", "--federation.local_steps", "1", "--evaluation.metrics", "[]"]
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.edit = lie
    deploy(tmp_path, *options, grid=grid)
    assert [own["round"] for own in summary(tmp_path, "deployed")["incidents"]] == [0, 1, 2, 3, 4]
    assert grid.asked.count((LIAR, "train")) == 5


# ---------------------------------------------------------------------- at joining

JOINING = {
    "infinite size": {"num_examples": math.inf},
    "ragged counts": {"label_counts": ["a", "b"]},
    "negative counts": {"label_counts": [-1.0, 5.0]},
    "no client": {"client_id": "x"},
    "another's number": {"client_id": 99},
    "a digest without end": {"digest": "x" * 10**6},
    "a kind that is none": {"data": "y" * 10**6},
    "an error": {"error": "\x1b[2J" * 10**5},
}


@pytest.mark.parametrize("name", [*JOINING, *WHOLE])
def test_whatever_a_site_says_when_it_joins_the_others_are_let_in(folder, caplog, name):
    grid = grid_of(folder, SHORT)
    digest = digest_at(grid)

    def lie(node, kind, reply):
        if node == LIAR and name in WHOLE:
            WHOLE[name](reply)
        elif node == LIAR:
            for key, value in JOINING[name].items():
                reply.content["facts"][key] = value

    grid.edit = lie
    sites = Sites(grid, num_clients=3, digest=digest)
    with caplog.at_level("INFO", logger="fedgan_lightning"):
        for _ in range(2):
            sites.refresh()
    joined = {client_id for client_id in range(3) if sites.node_of(client_id) is not None}
    assert joined == ({0, 1, 2} if "data" in JOINING.get(name, {}) else {0, 2})
    assert all(len(record.message) < 1500 and record.message.isprintable() for record in caplog.records)


def test_a_site_takes_no_other_s_number(folder, caplog):
    """Its key says who it is, whoever comes first."""
    grid = grid_of(folder, SHORT)

    def lie(node, kind, reply):
        if node == 100 and "client_id" in wire.facts_of(reply.content):
            reply.content["facts"]["client_id"] = 1

    grid.edit = lie
    sites = Sites(grid, num_clients=3, digest=digest_at(grid), owners={100 + k: k for k in range(3)})
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        sites.refresh()
    assert "says that it is client 1, and has the key of client 0" in caplog.text
    assert [sites.node_of(k) for k in range(3)] == [None, 101, 102]


@pytest.mark.parametrize("changed", [{"label_counts": [700]}, {"is_image": False}], ids=["labels", "kind"])
def test_what_one_site_says_of_its_samples_ends_nobody_s_start(tmp_path, caplog, changed):
    grid = grid_of(tmp_path, SHORT)

    def lie(node, kind, reply):
        facts = wire.facts_of(reply.content)
        if node == LIAR and "num_examples" in facts:
            told = {**changed, "label_counts": [facts["num_examples"]]} if "label_counts" in changed else changed
            for key, value in told.items():
                reply.content["facts"][key] = value

    grid.edit = lie
    deploy(tmp_path, "--evaluation.metrics", "[]", "--federation.rounds", "1", grid=grid)
    assert summary(tmp_path, "deployed")["status"] == "finished"
    if "label_counts" in changed:
        assert "client 1 counts 1 labels, not 10: its counts are not used" in caplog.text


@pytest.mark.parametrize("how", ["to nobody's message", "to another's message", "nothing that can be read"])
def test_an_answer_that_is_to_no_message_costs_its_site_alone(tmp_path, how):
    """What a site says of its answer, and what nobody can take apart."""

    class Odd(type(grid_of(tmp_path, SHORT))):
        def pull_messages(self, keys):
            for key in keys:
                message = self._open.get(key)
                node = message and message.metadata.dst_node_id
                is_task = message and message.metadata.message_type == "train"
                for reply in super().pull_messages([key]):
                    if (node, is_task) == (LIAR, True):
                        if how == "nothing that can be read":
                            raise ValueError("no protobuf")
                        others = [k for k in self._open if k != key]
                        told = others[0] if others and "another" in how else "nobody"
                        reply.metadata.__dict__["_reply_to_message_id"] = told
                    yield reply

    options = ["--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]
    options += ["--evaluation.metrics", "[]", "--federation.rounds", "2"]
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.__class__ = Odd
    deploy(tmp_path, *options, grid=grid)
    incidents = summary(tmp_path, "deployed")["incidents"]
    assert {(own["client_id"], own["kind"]) for own in incidents} == {(1, "rejected")}


def test_an_expelled_site_is_missed_by_nobody_from_the_start(tmp_path):
    from fedgan_lightning.deployment.apps import serve_over
    from fedgan_lightning.deployment.expelled import EXPELLED
    from tests.deployment.test_sites import CONFIG

    (tmp_path / "keys" / EXPELLED).mkdir(parents=True)
    (tmp_path / "keys" / EXPELLED / "site1.pub").write_text("")
    options = [*SHORT, "--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]
    grid = grid_of(tmp_path, options)
    arguments = ["--config", CONFIG, *options, "--run_dir", str(tmp_path / "run")]
    serve_over(grid, arguments, has_data=False, keys=tmp_path / "keys")
    found = summary(tmp_path, "run")
    assert found["status"] == "finished"
    assert "fid" in found["final"]
    assert {own["reason"] for own in found["incidents"]} == {"connect: its site was expelled"}


def test_what_a_server_knows_of_its_sites_is_written_again_after_an_upgrade(tmp_path):
    """Otherwise every later start would be a first one."""
    grid = grid_of(tmp_path, SHORT)
    memory, digest = tmp_path / "sites.json", digest_at(grid)
    memory.write_text(json.dumps({"digest": "of another version", "run": "r", "sites": {}}))
    Sites(grid, num_clients=3, digest=digest, memory=memory, needed=2).facts()
    written = json.loads(memory.read_text())
    assert written["digest"] == digest
    again = Sites(grid, num_clients=3, digest=digest, memory=memory, needed=2)
    assert again.run == written["run"]


# ---------------------------------------------------------------------- in metrics


@pytest.mark.parametrize("name", ["NaN", "infinity", "negative", "other shapes", "no count", "huge", *ARRAYS, *WHOLE])
def test_whatever_a_site_answers_to_a_query_the_metric_goes_without_it(folder, name):
    grid = grid_of(folder, SHORT)
    site = digest_at(grid)
    honest = {"total": 3.0, "outer": 5.0, "count": 7}

    def sums():
        import torch

        value = {"NaN": math.nan, "infinity": math.inf, "negative": -1.0, "huge": 1e300}.get(name, 3.0)
        size = 5 if name == "other shapes" else 2
        found = {"total": torch.full((size,), value, dtype=torch.float64), "outer": torch.eye(size).double() * 9}
        return found | ({} if name == "no count" else {"count": torch.tensor(7)})

    def lie(node, kind, reply):
        if "num_examples" in wire.facts_of(reply.content):
            return
        import torch

        own = {"total": torch.full((2,), 3.0).double(), "outer": torch.eye(2).double() * 9, "count": torch.tensor(7)}
        reply.content = wire.content({}, sums=sums() if node == LIAR else own)
        if node == LIAR and name in ARRAYS:
            with_array(ARRAYS[name])(reply.content)
        elif node == LIAR and name in WHOLE:
            WHOLE[name](reply)

    grid.edit = lie
    sites = Sites(grid, num_clients=3, digest=site)

    def check(client_id, answer):
        if {*answer} != {*honest} or len(answer["total"]) != 2 or not bool((answer["total"] == 3).all()):
            raise ValueError("sums that cannot be right")

    found = sites.sums({"query": "feature moments", "kind": "pixels"}, {}, check=check)
    assert len(found) == 2
    assert sites.struck[1] == 1
    assert sites.left_out[next(iter(sites.left_out))].keys() == {1}


# ---------------------------------------------------------------------- under masks

MASKED = {
    "advertise": [
        *({"clients": [1, 2]}, {"mask_keys": [b""]}, {"mask_keys": [b"x" * 10**6]}),
        {"sizes": ["a"]},
    ],
    "share": [{"others": [7]}, {"texts": [b"x" * 10**6] * 3}, {"texts": []}, {"others": []}],
    "mask": [{"layouts": DEEP}, {"layouts": "7"}, {"layout|masked": "{}"}],
    "unmask": [{"others": [0]}, {"texts": [b"junk"] * 4}, {"others": "x"}],
}


@pytest.mark.parametrize("stage", MASKED)
def test_whatever_a_site_sends_under_masks_it_is_the_one_that_is_refused(tmp_path, stage):
    """The sum of the others is opened, or, where shares are missing, nothing is and the others are not blamed."""
    for number, changed in enumerate(MASKED[stage]):
        hand = secure.Hand(tmp_path / str(number), [10, 20, 30, 40])

        def lie(k, at, content, changed=changed):
            if (k, at) == (1, stage):
                for name, value in changed.items():
                    content["facts"][name] = value
            return content

        hand.edit_answer = lie
        found = hand.run()
        assert found.refused <= {1}, changed
        if stage != "unmask":
            assert found.refused == {1}, changed
            assert {"delta", "extras"} <= found.means.keys(), changed
            assert found.means["delta"].keys() == secure.states_of(0)["delta"].keys()


def test_sites_are_asked_nothing_that_is_not_a_message_of_ours(tmp_path):
    """The other way round: a site answers junk with an error, and goes on."""
    grid = grid_of(tmp_path, SHORT)
    known = {"run": "r", "joined": ""}
    contents = [RecordDict(), wire.content({"ask": "nonsense"}), wire.content({"ask": "sums", "query": 7}, state={})]
    contents += [wire.content({"ask": "share", "session": "x"}), wire.content({"round": "x"}, state={}, own={})]
    for content in contents:
        for kind in ("train", "query"):
            message = Message(content, dst_node_id=100, message_type=kind)
            (reply,) = grid.pull_messages(grid.push_messages([message]))
            assert "error" in wire.facts_of(reply.content)
    (reply,) = grid.pull_messages(
        grid.push_messages([Message(wire.content({"ask": "facts", **known}), dst_node_id=100, message_type="query")])
    )
    assert wire.facts_of(reply.content)["num_examples"]
    record = [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]
    assert [own["outcome"] == "answered" for own in record] == [False] * 10 + [True]
