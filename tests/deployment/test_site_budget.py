"""A site's own ledger and budget: written before a step, over restarts and runs, whatever the server says."""

from __future__ import annotations

import json
import stat

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.site import Site
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.dp.accounting import Release, epsilon_of
from fedgan_lightning.errors import ConfigurationError
from tests.deployment.test_site_policy import SHORT, task
from tests.deployment.test_sites import SHORT as OF_THREE
from tests.deployment.test_sites import deploy, grid_of, summary

pytestmark = pytest.mark.flower

DELTA = 1e-4
#: Of the one site with all digits.
RECORDS = 1438
#: Example-level privacy, with noise that nobody can draw again.
PRIVATE = [
    *("--model.fake_labels", "all", "--model.privacy.noise_multiplier", "1", "--model.privacy.delta", "1e-4"),
    *("--model.privacy.batch_size", "16", "--model.d_steps", "2", "--evaluation.metrics", "[]"),
]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


def limit(tasks: float, *, steps: int = 4, count: int = RECORDS) -> dict[str, float]:
    """Return a budget for so many tasks of so many steps of the discriminator, and no more."""
    releases = [Release("example", "poisson", 1.0, int(tasks * steps), 16 / count)]
    return {"epsilon": epsilon_of(releases, delta=DELTA) * (1 + 1e-9), "delta": DELTA}


def site(tmp_path, *options, privacy=None, **policy) -> Site:
    arguments = [*SHORT, *PRIVATE, *options]
    return Site(arguments, client_id=0, state_dir=tmp_path, part=0, policy=SitePolicy(privacy=privacy, **policy))


def train(own: Site, **changes):
    return own.train(task(own, **changes), accepted=-1, digest=own.digest)


def ledger(own: Site) -> list[dict]:
    return json.loads((own.state_dir / "privacy.json").read_text())["releases"]


def spent(own: Site) -> list[int]:
    return [release["count"] for release in ledger(own)]


# ---------------------------------------------------------------------- the budget


def test_a_site_stops_before_the_task_that_would_cost_too_much(tmp_path):
    own = site(tmp_path, privacy=limit(2))
    for round in range(2):
        assert train(own, round=round, seed=round).num_examples == RECORDS
    assert spent(own) == [8], "two tasks of two local steps of two steps of the discriminator"
    before = own.memory.path.read_bytes()
    ran = []
    own._run = lambda *given: ran.append(given)
    with pytest.raises(ConfigurationError, match=r"at most the epsilon .* at delta 0.0001 of its policy; got .* with"):
        train(own, round=2, seed=2)
    assert ran == [], "it does not even begin to train"
    assert spent(own) == [8], "what is not done costs nothing"
    assert own.memory.path.read_bytes() == before


def test_a_smaller_task_may_still_fit(tmp_path):
    own = site(tmp_path, privacy=limit(1.5))
    train(own)
    with pytest.raises(ConfigurationError, match="of its policy"):
        train(own, seed=2)
    assert train(own, seed=3, steps=1)
    assert spent(own) == [6]


def test_a_round_that_is_asked_for_again_is_paid_for_again(tmp_path):
    own = site(tmp_path, privacy=limit(2))
    train(own)
    train(own)
    with pytest.raises(ConfigurationError, match="of its policy"):
        train(own)


def test_a_restart_goes_on_and_so_does_another_run(tmp_path):
    train(site(tmp_path, privacy=limit(2)))
    train(site(tmp_path, privacy=limit(2)), seed=5)
    later = site(tmp_path, privacy=limit(2))
    later.check_message({"run": "another", "joined": "", "ask": "facts"})
    with pytest.raises(ConfigurationError, match="of its policy"):
        train(later, seed=9)
    assert train(site(tmp_path, privacy=limit(3)), seed=9), "whoever runs the site may allow more"


def test_what_runs_of_other_settings_cost_counts_together(tmp_path):
    """A server that has everybody agree on another minibatch begins no new ledger."""
    train(site(tmp_path))
    train(site(tmp_path, "--model.privacy.batch_size", "32"))
    own = site(tmp_path)
    assert sorted(round(release["rate"], 4) for release in ledger(own)) == [
        round(16 / RECORDS, 4),
        round(32 / RECORDS, 4),
    ]
    both = [Release("example", "poisson", 1.0, 4, size / RECORDS) for size in (16, 32)]
    cost = epsilon_of(both, delta=DELTA)
    assert f"epsilon {cost:.4g} at delta 0.0001 spent, in 8 steps" == own.budget.told()
    more = epsilon_of([both[0], *both], delta=DELTA)
    with pytest.raises(ConfigurationError, match=f"got {more:.4g} with this task"):
        train(site(tmp_path, privacy={"epsilon": cost, "delta": DELTA}))


# ---------------------------------------------------------------------- the ledger


def test_a_task_is_written_down_before_it_is_done(tmp_path):
    own, seen = site(tmp_path), []
    run = own._run

    def watched(*given):
        seen.append(spent(own))
        return run(*given)

    own._run = watched
    train(own)
    assert seen == [[4]]
    assert stat.S_IMODE((own.state_dir / "privacy.json").stat().st_mode) == 0o600

    def failing(*given):
        raise RuntimeError("power cut")

    own._run = failing
    with pytest.raises(RuntimeError, match="power cut"):
        train(own)
    assert spent(own) == [8], "it may have been killed after its answer had left"


@pytest.mark.parametrize("change", ["shorter", "missing", "damaged"])
def test_a_site_that_forgot_what_it_spent_trains_no_more(tmp_path, change):
    own = site(tmp_path, privacy=limit(9))
    train(own)
    train(own)
    path = own.state_dir / "privacy.json"
    if change == "shorter":
        path.write_text(path.read_text().replace('"count": 8', '"count": 4'))
    elif change == "missing":
        path.unlink()
    else:
        path.write_text("{")
    with pytest.raises(ConfigurationError, match="a site must remember what its training has cost"):
        train(site(tmp_path, privacy=limit(9)))


def test_a_rehearsal_costs_nothing(tmp_path):
    own = site(tmp_path, privacy=limit(1))
    own.rehearse()
    assert not (own.state_dir / "privacy.json").exists()


# ---------------------------------------------------------------------- what a budget cannot hold to


@pytest.mark.parametrize(
    "options, privacy, reason",
    [
        (["--model.privacy", "null"], limit(9), "must train with model.privacy; got a configuration without"),
        (["--model.privacy.testing_seed", "1"], limit(9), "noise that nobody can draw again"),
        ([], {"epsilon": 8.0, "delta": 0.1}, "below one over the number of its records; got 0.1 with 1438 records"),
        (["--federation.local_epochs", "1", "--federation.local_steps", "null"], limit(9), "local steps must be pub"),
        (["--data.validation_share", "0.1"], {"epsilon": 8.0, "delta": 1e-5}, "without noise must not leave a client"),
    ],
)
def test_a_site_with_a_budget_does_not_join_what_keeps_none(tmp_path, options, privacy, reason):
    with pytest.raises(ConfigurationError, match=reason):
        site(tmp_path, *options, privacy=privacy)


def test_training_without_noise_is_beyond_every_budget(tmp_path):
    own = site(tmp_path, "--model.privacy.noise_multiplier", "0", privacy={"epsilon": 1e9, "delta": DELTA})
    with pytest.raises(ConfigurationError, match="got inf with this task"):
        train(own)
    assert not (own.state_dir / "privacy.json").exists()


def test_a_task_of_epochs_has_no_price(tmp_path):
    own = site(tmp_path, privacy=limit(9), most_local_epochs=3)
    with pytest.raises(ConfigurationError, match="a private task must be counted in steps; got one of epochs"):
        train(own, steps=None, epochs=1)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("privacy: {epsilon: 8.0}", "an epsilon, and a delta below 1; got epsilon: 8"),
        ("privacy: {epsilon: 8.0, delta: 1.5}", "a delta below 1; got epsilon: 8, delta: 1.5"),
        ("privacy: {}", "got neither"),
        ("privacy: {epsilon: -1.0, delta: 1.0e-5}", "policy.privacy"),
        ("privacy: {epsilon: 8.0, delta: 1e-5}", "policy.privacy"),
        ("privacy: 8.0", "policy.privacy"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(tmp_path, text, reason):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=reason):
        SitePolicy.read(path)


# ---------------------------------------------------------------------- over the wire


def test_a_server_that_goes_on_gets_an_error_and_no_number(tmp_path):
    """One of three sites has spent its budget after two rounds; the third round goes on without it."""
    policy, size = tmp_path / "policy.yaml", 479
    one = limit(2, count=size)
    policy.write_text(f"privacy: {{epsilon: {one['epsilon']!r}, delta: 1.0e-4}}\n")
    lenient = ["--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"]
    options = [*PRIVATE, *lenient, "--data.partition", "IID"]
    grid, answers = grid_of(tmp_path, [*OF_THREE, *options], told={1: {"policy": str(policy)}}), []

    def look(node, kind, reply):
        if (node, kind) == (101, "train"):
            answers.append(reply.content)

    grid.edit = look
    deploy(tmp_path, *options, grid=grid)
    found = summary(tmp_path, "deployed")
    assert found["events"] == {"failed": 1}
    (incident,) = found["incidents"]
    assert (incident["client_id"], incident["round"]) == (1, 2)
    assert "a site's training must cost at most the epsilon" in incident["reason"]
    assert len(answers) == 3
    assert wire.facts_of(answers[2]).keys() == {"error"}
    assert len(answers[1]["arrays"]) > 0
    assert len(answers[2]["arrays"]) == 0, "no tensor"
    state = tmp_path / "state"
    counts = [json.loads((state / f"client{k:05d}" / "privacy.json").read_text()) for k in range(3)]
    assert [own["releases"][0]["count"] for own in counts] == [12, 8, 12]
    assert found["privacy"]["example"]["releases"] == 12, "the server charges whom it asks"


def test_a_private_task_that_takes_too_long_is_given_up(tmp_path):
    """Records are drawn by a stream of their own, which has to look at the clock, too."""
    with pytest.raises(Exception, match="must be done within most_seconds of the site's policy"):
        train(site(tmp_path, most_seconds=1e-6))
