"""Membership attacks as a metric, the command that runs them, and what the report shows of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from torch import nn

from fedgan_lightning.__main__ import main
from fedgan_lightning.errors import ConfigurationError, SampleSizeError
from fedgan_lightning.metrics import MembershipAttacks
from fedgan_lightning.partitions import FeatureShift
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.report import write_report
from tests.conftest import ROOT, digits_data

CPU = torch.device("cpu")
ATTACKS = {"nearest", "calibrated", "monte_carlo", "monte_carlo_log", "domias"}


def copies(data, client_id=0):
    view = data.client_samples(client_id)
    return view.take(torch.arange(len(view)))[0]


def noise(count=300):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def measured(data=None, *, samples=None, **options):
    """Return facts and values of a metric; of copies of client 0 unless samples are given."""
    data, metric = data if data is not None else digits_data(num_clients=3), MembershipAttacks(**options)
    facts = metric.prepare(data, device=CPU)
    return facts, metric.compute(copies(data) if samples is None else samples, None)


class TestMetric:
    def test_copies_are_found_out_and_unseen_samples_are_not(self):
        facts, values = measured()
        assert values["attack_tpr/nearest@0.01/0"] == 1.0
        assert values["attack_advantage/nearest/0"] == 1.0
        assert values["attack_tpr_lower/nearest@0.01/0"] > 0.95
        for attack in ATTACKS:
            assert values[f"attack_advantage/{attack}/0"] > values[f"attack_advantage/{attack}/1"], attack
        assert facts["attack_tpr_lower/split@0.01/pooled"] < 0.05
        _, of_noise = measured(samples=noise())
        for attack in ATTACKS:
            assert of_noise[f"attack_tpr_lower/{attack}@0.01/pooled"] < 0.02, attack

    def test_every_value_lies_in_its_interval(self):
        _, values = measured(digits_data(num_clients=2), samples=noise())
        rates = [name.partition("/")[2] for name in values if name.startswith("attack_tpr/")]
        assert {name.split("@")[0] for name in rates} == ATTACKS
        assert {name.split("/")[1] for name in rates} == {"0", "1", "pooled"}
        for name in rates:
            low, value, high = (values[f"attack_tpr{end}/{name}"] for end in ("_lower", "", "_upper"))
            assert 0 <= low <= value <= high <= 1

    def test_members_and_others_have_the_same_classes_and_no_sample_counts_twice(self):
        data, metric = digits_data(num_clients=3), MembershipAttacks()
        facts = metric.prepare(data, device=CPU)
        for name, group in metric.candidates.items():
            sides = (group.members, group.others)
            shares = []
            for side in sides:
                labels = torch.cat([view.take(torch.arange(len(view)))[1] for view in side])
                shares.append(torch.bincount(labels, minlength=10) / len(labels))
            torch.testing.assert_close(*shares, atol=1e-6, rtol=0)
            others, reference = (torch.cat([v.indices for v in side]) for side in (group.others, group.reference))
            assert len(torch.cat([others, reference]).unique()) == len(others) + len(reference)
            assert facts[f"attack_others/{name}"] == len(others)

    def test_the_class_alone_gives_nobody_away(self):
        """A discriminator that knows classes and no sample has the same rates on both sides."""
        metric = MembershipAttacks(tpr_at=[0.3])
        metric.prepare(digits_data(num_clients=3), device=CPU)

        class Classes(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x, y):
                return self.scale * y.float()

        model = nn.Module()
        model.discriminator = model.discriminate = Classes()
        values = metric.inspect(model)
        assert values["attack_advantage/discriminator/0"] == pytest.approx(0, abs=1e-6)
        assert values["attack_tpr/discriminator@0.3/0"] <= 0.5
        assert metric.inspect(nn.Module()) == {}

    def test_a_discriminator_that_remembers_gives_members_away(self):
        data, metric = digits_data(num_clients=2), MembershipAttacks()
        metric.prepare(data, device=CPU)
        known = copies(data, 1).flatten(1)

        class Memory(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x, y):
                return -self.scale * torch.cdist(x.flatten(1), known).min(1).values

        model = nn.Module()
        model.discriminator = model.discriminate = Memory()
        values = metric.inspect(model)
        assert values["attack_tpr/discriminator@0.01/1"] == 1.0
        assert values["attack_tpr/discriminator@0.01/0"] < 0.5

    def test_others_are_seen_as_the_client_sees_the_world(self):
        """Without that, a client's brightness would be what tells its samples apart."""
        data = digits_data(num_clients=3, partition=FeatureShift(contrast=0.3, brightness=0.3))
        metric = MembershipAttacks(tpr_at=[0.1])
        facts = metric.prepare(data, device=CPU)
        for client_id in range(3):
            group = metric.candidates[str(client_id)]
            assert {view.shift for view in group.others} == {data.client_samples(client_id).shift}
            assert facts[f"attack_advantage/split/{client_id}"] < 0.3
        assert len({view.shift for view in metric.candidates["pooled"].others}) == 3

    def test_samples_are_kept_as_positions(self):
        data, metric = digits_data(num_clients=4), MembershipAttacks()
        metric.prepare(data, device=CPU)
        own = [v for group in metric.candidates.values() for v in (*group.members, *group.others, *group.reference)]
        assert {view.samples.x.data_ptr() for view in own} == {
            data.train_samples.x.data_ptr(),
            data.test_samples.x.data_ptr(),
        }


class TestOptions:
    def test_each_attack_can_be_left_out(self):
        for option, names in (
            ("calibrated", {"calibrated"}),
            ("monte_carlo", {"monte_carlo", "monte_carlo_log"}),
            ("domias", {"domias"}),
        ):
            _, values = measured(samples=noise(50), clients=[], **{option: False})
            assert {name.split("/")[1] for name in values if "advantage" in name} == ATTACKS - names

    def test_rates_clients_and_sets_are_those_asked_for(self):
        _, values = measured(tpr_at=[0.05], clients=[1])
        assert {name.split("@")[1] for name in values if "@" in name} == {"0.05/1", "0.05/pooled"}
        assert not any(name.startswith("attack_set") for name in values)
        _, values = measured(set_size=20, clients=[0])
        assert values["attack_set_accuracy/nearest/0"] > 0.99
        facts, _ = measured(set_size=20, clients=[])
        assert not any("set_accuracy" in name for name in facts), "the control is of single samples"

    def test_confidence_components_samples_and_seed_change_what_is_found(self):
        name = "attack_tpr_upper/nearest@0.01/pooled"
        _, plain = measured(samples=noise(), clients=[])
        _, sure = measured(samples=noise(), clients=[], confidence=0.999)
        assert sure[name] > plain[name]
        _, few = measured(samples=noise(), clients=[], components=2)
        assert few["attack_advantage/domias/pooled"] != plain["attack_advantage/domias/pooled"]
        assert few["attack_advantage/monte_carlo/pooled"] != plain["attack_advantage/monte_carlo/pooled"]
        assert few["attack_advantage/nearest/pooled"] == plain["attack_advantage/nearest/pooled"]
        facts, _ = measured(samples=noise(), clients=[], max_samples=100)
        assert 80 <= facts["attack_members/pooled"] <= 100
        assert 80 <= facts["attack_others/pooled"] <= 100
        _, other = measured(samples=noise(), clients=[], seed=1)
        assert other != plain

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(ConfigurationError, match="clients 0 to 2.*got 7"):
            measured(clients=[7])
        with pytest.raises(ConfigurationError, match=r"tpr_at of MembershipAttacks must be.*\(0, 1\)"):
            MembershipAttacks(tpr_at=[1.0])
        data = digits_data(num_clients=2)
        data.prepare_data()
        data.setup("fit")
        data.test_samples = data.test_samples.subset(torch.arange(3))
        with pytest.raises(SampleSizeError, match="at least 4 samples in the test split"):
            MembershipAttacks().prepare(data, device=CPU)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A short run of the digits, and its audit."""
    folder = tmp_path_factory.mktemp("audited")
    common = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    settings = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    settings["federation"] |= {"rounds": 1, "local_steps": 1}
    settings["evaluation"] = {"num_samples": 60, "metrics": [{"class_path": "FrechetDistance"}]}
    settings["data"]["num_clients"] = 3
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    run = folder / "run"
    assert main(["fit", "--config", str(folder / "small.yaml"), "--run_dir", str(run), *common]) == 0
    code = main(["audit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--client", "1", *common])
    assert code == 0
    return run


class TestCommand:
    def test_it_writes_what_it_found(self, audited):
        found = json.loads((audited / "audit.json").read_text())
        assert found["rounds"] == 1
        assert found["checkpoint"].endswith("last.ckpt")
        assert "proves nothing" in found["meaning"]
        assert {"attack_tpr/nearest@0.01/pooled", "attack_tpr/discriminator@0.001/2"} <= found["membership"].keys()
        assert "fid" in json.loads((audited / "test.json").read_text())
        inverted = found["inversion"]
        assert inverted["client"] == 1
        assert inverted["relative_error"]["raw"] < 1e-6
        assert abs(inverted["cosine"]["noised"]) < 0.2
        assert abs(inverted["cosine"]["masked"]) < 0.2
        assert inverted["label_accuracy"]["raw"] == 1.0
        assert inverted["best_row_error_by_batch"]["1"] < 1e-6 < inverted["best_row_error_by_batch"]["32"]
        assert (audited / "inversion.png").read_bytes().startswith(b"\x89PNG")

    def test_the_report_shows_it(self, audited):
        html = write_report([audited]).read_text()
        assert "Attacks on run" in html
        assert "what these attacks find" in html
        assert "split (control, without a generator)" in html
        assert "samples and reconstructions" in html
        assert "Members found by client, nearest, at 0.01 false positives" in html

    def test_a_damaged_audit_is_named_and_none_is_no_panel(self, audited, tmp_path):
        text = (audited / "audit.json").read_text()
        try:
            (audited / "audit.json").write_text("[1]")
            with pytest.raises(ConfigurationError, match="audit.json"):
                write_report([audited])
            (audited / "audit.json").write_text(json.dumps({**json.loads(text), "inversion": {"left_out": "a reason"}}))
            assert "left out: a reason" in write_report([audited]).read_text()
            (audited / "audit.json").unlink()
            assert "Attacks on" not in write_report([audited]).read_text()
        finally:
            (audited / "audit.json").write_text(text)

    @pytest.mark.parametrize(
        ("told", "said"),
        [
            (["--client", "3"], "--client must be one of 0 to 2; got 3"),
            (["--clip", "0"], "clip of Protection must be a finite number above 0; got 0"),
            (["--noise_multiplier", "-1"], "noise_multiplier of Protection must be a finite number of at least 0"),
        ],
    )
    def test_bad_input_is_one_line(self, audited, capsys, told, said):
        arguments = ["audit", "--config", str(audited / "config.yaml"), "--ckpt_path", "last", *told]
        assert main(arguments) == 2
        assert said in capsys.readouterr().err

    def test_options_change_what_is_compared(self, audited, tmp_path):
        common = ["--config", str(audited / "config.yaml"), "--trainer.enable_progress_bar", "false"]
        common += ["--ckpt_path", str(audited / "checkpoints" / "last.ckpt"), "--run_dir", str(tmp_path / "out")]
        common += ["--evaluation.metrics", "[]"]
        code = main(["audit", *common, "--clip", "0.5", "--noise_multiplier", "0.001"])
        assert code == 0
        found = json.loads((tmp_path / "out" / "audit.json").read_text())
        assert found["inversion"]["cosine"]["noised"] > 0.9
        assert found["inversion"]["protection"]["clip"] == 0.5
        assert found["membership"], "attacks are added to whatever is measured"

    def test_what_cannot_be_inverted_is_said(self, audited, tmp_path, capsys):
        config = yaml.safe_load((audited / "config.yaml").read_text())
        config["federation"]["sync"] = {"discriminator": "local"}
        (tmp_path / "local.yaml").write_text(yaml.safe_dump(config))
        common = ["--config", str(tmp_path / "local.yaml"), "--trainer.enable_progress_bar", "false"]
        common += ["--ckpt_path", str(audited / "checkpoints" / "last.ckpt"), "--run_dir", str(tmp_path / "out")]
        assert main(["audit", *common]) == 0
        assert "gradient inversion left out: discriminators stay with the clients" in capsys.readouterr().out
        assert not (tmp_path / "out" / "inversion.png").exists()


def test_a_comparison_has_a_row_for_each_version():
    rows = {"truth": noise(3), "far": 50 * noise(3)}
    both, one = pictures.comparison(rows), pictures.comparison({"truth": noise(3)})
    assert both.shape[2] == 3
    assert both.shape[0] == pytest.approx(2 * one.shape[0], abs=4)
    assert pictures.comparison({"points": torch.randn(4, 2), "flat": torch.zeros(4, 2)}).shape[2] == 3
    assert not math.isnan(float(both.mean()))
