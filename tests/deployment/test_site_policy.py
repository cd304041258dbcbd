"""What a site answers whatever it is asked: its own queries, once a run, over enough samples, within its policy."""

from __future__ import annotations

import inspect
import json
import stat

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.data.samples import ClientSamples, Samples
from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.audit_log import AuditLog
from fedgan_lightning.deployment.site import Site
from fedgan_lightning.deployment.site_memory import SiteMemory, hashes_of
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.errors import ConfigurationError, ProtocolError
from fedgan_lightning.evaluation.kernel import KernelSums
from fedgan_lightning.protocol import ClientTask
from tests.conftest import ROOT

pytestmark = pytest.mark.flower

CONFIG = str(ROOT / "configs" / "digits.yaml")
#: One site with all digits: 1 617 of them, of 64 pixels.
SHORT = ["--config", CONFIG, "--data.num_clients", "1", "--data.partition", "IID", "--federation.local_steps", "2"]
METRICS = """[{class_path: FrechetDistance, init_args: {features: {class_path: PixelFeatures, init_args: {side: 8}}}},
 {class_path: KernelDistance, init_args: {features: PixelFeatures}}]"""
FID = {"query": "feature moments", "kind": "pixels", "side": 0, "limit": -1}
KID = {"query": "third powers", "kind": "pixels", "side": 0}


def site(tmp_path, *options, policy: SitePolicy | None = None, name: str = "state") -> Site:
    arguments = [*SHORT, "--evaluation.metrics", METRICS, *options]
    return Site(arguments, client_id=0, state_dir=tmp_path / name, part=0, policy=policy or SitePolicy())


# ---------------------------------------------------------------------- queries


def test_a_site_answers_its_own_queries_and_no_others(tmp_path):
    own = site(tmp_path)
    assert int(own.sums({**FID, "run": "a"}, {})["count"]) == len(own.data.view)
    assert int(own.sums({**KID, "run": "a"}, {})["count"]) == len(own.data.view)
    others = [
        {**FID, "limit": 20},
        {**FID, "side": 4},
        {**FID, "kind": "classifier", "num_classes": 10},
        {**FID, "kind": "own", "name": "net.pt", "hash": "0" * 64},
        {"query": "item counts", "items": 64},
        {"query": "samples"},
    ]
    for query in others:
        with pytest.raises(ConfigurationError, match="must be one that its own evaluation.metrics ask"):
            own.sums({**query, "run": "b"}, {})


def test_twenty_one_queries_give_no_single_picture(tmp_path):
    """Nested limits, as a server that subtracts would ask them: none is answered, so its best guess is the mean."""
    own, told = site(tmp_path), []
    for limit in range(10, 31):
        with pytest.raises(ConfigurationError):
            told.append(own.sums({**FID, "limit": limit, "run": str(limit)}, {}))
    assert told == []
    sums = own.sums({**FID, "run": "honest"}, {})
    pictures = own.data.view.take(torch.arange(200))[0].flatten(1).double()
    guess = sums["total"].double() / int(sums["count"])
    assert float((pictures - guess).pow(2).mean().sqrt()) > 0.5, "of pixels from -1 to 1"


def test_a_query_is_answered_once_in_a_run(tmp_path):
    own = site(tmp_path)
    own.sums({**FID, "run": "a"}, {})
    for again in (own, site(tmp_path)):  # another process remembers
        with pytest.raises(ConfigurationError, match="must answer a query once in a run"):
            again.sums({**FID, "run": "a"}, {})
    with pytest.raises(ConfigurationError, match="the tensors that the site's own has"):
        own.sums({**FID, "run": "c"}, {"junk": torch.zeros(3)})  # what comes along would make another query of it
    assert own.sums({**FID, "run": "b"}, {})


def test_sums_of_nearly_the_same_samples_are_not_told(tmp_path):
    """One picture more between two runs: the difference would be that picture's features."""
    own = site(tmp_path)
    own.sums({**FID, "run": "a"}, {})
    for fewer, is_refused in ((1, True), (9, True), (10, False), (0, False)):
        other = site(tmp_path)
        view = other.data.view
        other.data.view = ClientSamples(samples=view.samples, indices=view.indices[fewer:])
        if is_refused:
            with pytest.raises(ConfigurationError, match=f"by at least 10 samples, or by none; got {fewer} samples"):
                other.sums({**FID, "run": f"b{fewer}"}, {})
        else:
            assert other.sums({**FID, "run": f"b{fewer}"}, {})


def test_other_features_of_nearly_the_same_samples_are_not_told_either(tmp_path):
    site(tmp_path).sums({**FID, "run": "a"}, {})
    other = site(tmp_path)
    other.data.view = ClientSamples(samples=other.data.view.samples, indices=other.data.view.indices[1:])
    with pytest.raises(ConfigurationError, match="by at least 10 samples"):
        other.sums({**KID, "run": "b"}, {})


def test_a_picture_that_is_there_twice_counts_twice():
    x = torch.arange(12.0).reshape(6, 2)
    twice = Samples(x=torch.cat([x, x[:1]]))
    views = [ClientSamples(samples=twice, indices=torch.arange(n)) for n in (6, 7)]
    hashes = [hashes_of(view, torch.arange(len(view))) for view in views]
    assert len(np.setxor1d(*hashes)) == 1


def test_queries_of_a_day_are_counted(tmp_path, monkeypatch):
    own = site(tmp_path, policy=SitePolicy(most_queries_a_day=2))
    own.sums({**FID, "run": "a"}, {})
    own.sums({**FID, "run": "b"}, {})
    with pytest.raises(ConfigurationError, match="at most 2 queries a day"):
        own.sums({**FID, "run": "c"}, {})
    monkeypatch.setattr("fedgan_lightning.deployment.site_memory.DAY_SECONDS", 0.0)
    assert own.sums({**FID, "run": "c"}, {})


def test_networks_that_are_sent_count_where_the_policy_lets_them(tmp_path):
    metrics = "[FrechetDistance]"
    query = {"query": "feature moments", "kind": "classifier", "num_classes": 10, "limit": -1, "run": "a"}
    own = site(tmp_path, "--evaluation.metrics", metrics)
    from fedgan_lightning.metrics import ClassifierFeatures

    net = ClassifierFeatures().untrained(own.whole.train_samples, num_classes=10)
    with pytest.raises(ConfigurationError, match="its own evaluation.metrics ask"):
        own.sums(query, net.net.state_dict())
    lenient = site(tmp_path, "--evaluation.metrics", metrics, policy=SitePolicy(sent_networks=True), name="other")
    assert lenient.sums(query, net.net.state_dict())["outer"].shape == (64, 64)


def test_metrics_of_the_policy_bound_those_of_the_configuration(tmp_path):
    own = site(tmp_path, policy=SitePolicy(metrics=["FrechetDistance"]))
    assert own.sums({**FID, "run": "a"}, {})
    with pytest.raises(ConfigurationError, match="this site's ask .*feature moments"):
        own.sums({**KID, "run": "a"}, {})
    none = site(tmp_path, policy=SitePolicy(metrics=[]), name="none")
    with pytest.raises(ConfigurationError, match="this site's ask nothing"):
        none.sums({**FID, "run": "a"}, {})


def test_a_recommender_that_is_sent_is_asked_about_only_where_the_policy_lets_it(tmp_path):
    """Whose weights a server chooses can single out one user by her purchases."""
    from fedgan_lightning.evaluation.federated_queries import QueryContext
    from fedgan_lightning.evaluation.ranking import RankingQuality, Rankings
    from tests.test_cli import small

    _, config, *options = small("recommendation")
    options = ["--config", config, *options, "--data.num_clients", "1", "--data.partition", "IID"]
    strict, lenient = (
        Site(options, client_id=0, state_dir=tmp_path / name, part=0, policy=policy)
        for name, policy in (("a", SitePolicy()), ("b", SitePolicy(sent_networks=True)))
    )
    items = strict.whole.sample_shape[0]
    query = Rankings(items, model=strict.module)
    facts = {**query.facts(), "query": query.kind, "run": "r"}
    with pytest.raises(ConfigurationError, match="and no network"):
        strict.sums(facts, query.state())
    scores = {"scores": torch.rand(items)}
    assert strict.sums(facts, scores)["count"] == lenient.sums(facts, scores)["count"]
    assert lenient.sums(facts, query.state())["count"]
    assert RankingQuality().queries(QueryContext(strict.data.view, strict.whole).data)


# ---------------------------------------------------------------------- sums that tell single samples


def unmixed(sums: KernelSums, *, rank: int) -> torch.Tensor:
    """Return the samples that a sum of their third powers is of, up to order, by simultaneous diagonalisation.

    Jennrich's algorithm (Harshman 1970): slices of the tensor have the samples as common eigenvectors.
    """
    tensor, size = sums.third, len(sums.third)
    mixes = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (torch.einsum("ijk,k->ij", tensor, mix) for mix in mixes)
    base = torch.linalg.svd(first).U[:, :rank]
    inner = (base.T @ second @ base) @ torch.linalg.inv(base.T @ first @ base)
    found = base @ torch.linalg.eig(inner).eigenvectors.real
    return (found / found[-1:]).T[:, :-1] * (size - 1) ** 0.5


def test_third_powers_of_few_samples_tell_every_one_of_them_and_are_refused(tmp_path):
    """What the policy keeps back, done: sums over twenty samples give all twenty."""
    data = ClientSamples(samples=site(tmp_path).data.view.samples, indices=torch.arange(20))
    few = site(tmp_path, policy=SitePolicy(unmixing="answer"), name="lenient")
    few.data.view = data
    sums = KernelSums.of_state(few.sums({**KID, "run": "a"}, {}))
    pictures = data.take(torch.arange(20))[0].flatten(1).double()
    found = unmixed(sums, rank=20)
    nearest = torch.cdist(pictures, found).min(1).values / pictures.shape[1] ** 0.5
    average = (pictures - pictures.mean(0)).pow(2).mean(1).sqrt()
    assert float(nearest.max()) < 1e-6, "root mean square over pixels from -1 to 1"
    assert float(average.min()) > 0.3, "the error of the average picture"
    strict = site(tmp_path, name="strict")
    strict.data.view = data
    with pytest.raises(ConfigurationError, match="at least 716 samples: from sums over fewer, single ones can be comp"):
        strict.sums({**KID, "run": "a"}, {})
    with pytest.raises(ConfigurationError, match="at least 65 samples"):
        strict.sums({**FID, "run": "a"}, {})


@pytest.mark.parametrize("count", [1, 9])
def test_the_fewest_samples_hold_under_masks_too(tmp_path, count):
    own = site(tmp_path, policy=SitePolicy(unmixing="answer"))
    own.data.view = ClientSamples(samples=own.data.view.samples, indices=torch.arange(count))
    for session in (None, 7):
        with pytest.raises(ConfigurationError, match=f"over at least 10 samples; got {count}"):
            own.sums({**FID, "run": "a"}, {}, session=session)


# ---------------------------------------------------------------------- tasks


def task(own: Site, **changes) -> ClientTask:
    shared = ("generator.", "discriminator.")
    state = {name: value for name, value in own.module.state_dict().items() if name.startswith(shared)}
    return ClientTask(**{"client_id": 0, "round": 0, "seed": 1, "state": state, "steps": 2, **changes})


def test_a_task_is_no_longer_than_the_site_s_own_configuration_has_it(tmp_path):
    own = site(tmp_path)
    assert own.train(task(own), accepted=-1, digest=own.digest).num_examples
    for changes in ({"steps": 500}, {"steps": None, "epochs": 1}, {"steps": 10**9}):
        with pytest.raises(ConfigurationError, match="of this site's own configuration; got"):
            own.train(task(own, **changes), accepted=-1, digest=own.digest)
    more = site(tmp_path, policy=SitePolicy(most_local_steps=3), name="more")
    assert more.train(task(more, steps=3), accepted=-1, digest=more.digest)
    with pytest.raises(ConfigurationError, match="at most the 3 local steps of this site's own policy; got 4"):
        more.train(task(more, steps=4), accepted=-1, digest=more.digest)


def test_a_schedule_of_steps_bounds_tasks_by_its_largest_value(tmp_path):
    schedule = "{local_steps: {class_path: StepRounds, init_args: {values: {0: 1, 2: 4}}}}"
    own = site(tmp_path, "--federation.schedules", schedule)
    assert own.train(task(own, steps=4), accepted=-1, digest=own.digest)
    with pytest.raises(ConfigurationError, match="at most the 4 local steps"):
        own.train(task(own, steps=5), accepted=-1, digest=own.digest)


def test_a_task_that_takes_too_long_is_given_up(tmp_path):
    own = site(tmp_path, policy=SitePolicy(most_seconds=1e-6))
    with pytest.raises(Exception, match="must be done within most_seconds of the site's policy"):
        own.train(task(own), accepted=-1, digest=own.digest)


def test_a_task_of_another_client_is_refused(tmp_path):
    own = site(tmp_path)
    with pytest.raises(ConfigurationError, match="a task of client 3 at the site of client 0"):
        own.train(task(own, client_id=3), accepted=-1, digest=own.digest)


def test_a_configuration_that_shares_a_network_which_the_policy_keeps_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="got discriminator, with networks"):
        site(tmp_path, policy=SitePolicy(networks=["generator"]))
    kept = ["--federation.sync", "{discriminator: local}"]
    assert site(tmp_path, *kept, policy=SitePolicy(networks=["generator"]))


def test_a_message_that_is_too_long_is_not_read():
    policy = SitePolicy(largest_message_megabytes=0.001)
    content = wire.content({"ask": "sums"}, state={"x": torch.zeros(1000)})
    with pytest.raises(ConfigurationError, match=r"at most the 0\.001 MB of its policy"):
        policy.check_size(wire.size_of(content))


# ---------------------------------------------------------------------- runs


def test_a_site_goes_on_in_a_run_with_the_samples_and_the_number_that_it_began_with(tmp_path):
    own = site(tmp_path)
    own.check_message({"run": "a", "joined": "", "ask": "facts"})
    own.check_message({"run": "a", "joined": own.tag})
    for run in ({}, {"run": ""}, {"run": "x" * 65}, {"run": 7}):
        with pytest.raises(ConfigurationError, match="must say of which run it is"):
            own.check_message({**run, "joined": own.tag})
    with pytest.raises(ConfigurationError, match="must go on with the samples that it joined with"):
        own.check_message({"run": "a", "joined": ""})
    with pytest.raises(ConfigurationError, match="must go on with the samples that it joined with"):
        own.check_message({"run": "a", "joined": "0" * 16})
    other = site(tmp_path, "--data.max_samples", "1000")
    assert other.tag != own.tag
    with pytest.raises(ConfigurationError, match="a run that this site began with other samples"):
        other.check_message({"run": "a", "joined": "", "ask": "facts"})
    other.check_message({"run": "b", "joined": "", "ask": "facts"})
    with pytest.raises(ConfigurationError, match="a run that this site began with client 0's number"):
        SiteMemory(own.state_dir).check_run("a", client_id=1, data=own.tag)


def test_a_memory_that_cannot_be_read_answers_nothing(tmp_path):
    own = site(tmp_path)
    own.sums({**FID, "run": "a"}, {})
    assert stat.S_IMODE(own.memory.path.stat().st_mode) == 0o600
    own.memory.path.write_text("{")
    with pytest.raises(ConfigurationError, match="must remember what it has told"):
        own.sums({**FID, "run": "b"}, {})


def test_a_sum_is_opened_for_one_group_of_sites(tmp_path):
    """The mean with a site and the mean without it differ by that site's own."""
    memory = SiteMemory(tmp_path)
    memory.check_cohort("state", [0, 1, 2, 3])
    memory.check_cohort("state", [3, 2, 1, 0])
    memory.check_cohort("another state", [0, 1, 2])
    for group in ([0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 4]):
        with pytest.raises(ProtocolError, match="a site must open a sum with one group of sites alone"):
            memory.check_cohort("state", group)


def test_sums_of_samples_are_remembered_for_ever(tmp_path, monkeypatch):
    """However many rounds have been summed up since."""
    monkeypatch.setattr("fedgan_lightning.deployment.site_memory.MOST_SUMS", 5)
    memory = SiteMemory(tmp_path)
    memory.check_cohort("FID", [0, 1, 2, 3])
    for number in range(20):
        memory.check_cohort(f"state {number}", [0, 1, 2], is_task=True)
    with pytest.raises(ProtocolError, match="one group of sites alone"):
        memory.check_cohort("FID", [0, 1, 2])
    with pytest.raises(ProtocolError, match="one group of sites alone"):
        memory.check_cohort("state 19", [0, 1, 2, 3], is_task=True)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x * 1.0, lambda x: torch.where(x == 0, -0.0, x)])
def test_the_same_numbers_in_another_dress_are_the_same_state(change):
    state = {"g.w": torch.tensor([0.0, 1.5, -2.0]), "g.n": torch.tensor(3)}
    other = {name: change(own) if own.is_floating_point() else own for name, own in state.items()}
    assert wire.hash_of({}, state) == wire.hash_of({}, other)
    assert wire.hash_of({}, state) != wire.hash_of({}, {**state, "g.w": torch.tensor([0.0, 1.5, -2.5])})


# ---------------------------------------------------------------------- files


def test_a_policy_is_read_from_a_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("metrics: [FrechetDistance]\nfewest_samples: 50\nmost_seconds: null\n")
    found = SitePolicy.read(path)
    assert (found.metrics, found.fewest_samples, found.most_seconds) == (("FrechetDistance",), 50, None)
    path.write_text("")
    assert SitePolicy.read(path).fewest_samples == 10


@pytest.mark.parametrize(
    "text, reason",
    [
        ("fewest_sample: 3", "got fewest_sample in .* Write fewest_samples"),
        ("fewest_samples: 0", "fewest_samples"),
        ("unmixing: maybe", "unmixing"),
        ("- metrics", "groups of settings"),
        ("most_seconds: .nan", "most_seconds"),
        ("a: [", "settings must be YAML"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(tmp_path, text, reason):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=reason):
        SitePolicy.read(path)


def test_the_shipped_policy_says_the_defaults():
    from fedgan_lightning.deployment.proxy import TEMPLATES

    text = (TEMPLATES / "policy.yaml").read_text()
    found, default = (vars(own) for own in (SitePolicy.read(TEMPLATES / "policy.yaml"), SitePolicy()))
    assert found == default
    assert {*inspect.signature(SitePolicy).parameters} <= {line.split(":")[0].strip("# ") for line in text.splitlines()}


def test_the_record_of_a_site_is_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("fedgan_lightning.deployment.audit_log.MOST_BYTES", 300)
    log = AuditLog(tmp_path)
    for number in range(20):
        log.write("train", "answered", round=number, loss=float("nan"))
    log.write("feature moments", "refused", reason="x\n" * 5000)
    assert "refused: feature moments (x x x" in capfd.readouterr().err
    files = sorted(tmp_path.glob("audit.jsonl*"))
    assert 2 < len(files) <= 6
    entries = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert {entry["what"] for entry in entries} == {"train", "feature moments"}
    assert all(len(entry.get("reason", "")) <= 1000 for entry in entries)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


@pytest.mark.parametrize("has_own", [True, False])
def test_a_site_with_a_configuration_of_its_own_trusts_nobody_by_default(tmp_path, has_own):
    """A trial's, which has the server's, trusts it with what it has anyway; a policy file counts in any case."""
    import shlex

    from flwr.app import Context, RecordDict

    from fedgan_lightning.deployment.apps import _site

    node = {"client-id": 0, "state": str(tmp_path / "state"), **({"config": CONFIG} if has_own else {})}
    run = {"config": CONFIG, "options": shlex.join(SHORT[2:])}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    assert _site(context).policy.sent_networks == (not has_own)
    assert _site(context).policy.new_members == ("refuse" if has_own else "answer")


def test_what_is_not_shared_is_not_in_the_hash(tmp_path):
    """A site's policy, and its metrics, are its own."""
    own = site(tmp_path)
    assert own.digest == site(tmp_path, "--evaluation.metrics", "[FrechetDistance]", name="b").digest
