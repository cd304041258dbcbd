"""Membership inference, and what synthetic samples do for a client's own classifier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedgan_lightning import GAN, Evaluation, FederatedDataModule, Federation, SequentialExecutor
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.evaluation.audit import membership_auc
from fedgan_lightning.evaluation.downstream_tasks import auroc
from fedgan_lightning.metrics import ClientAugmentation, MembershipInference, SyntheticTraining
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import FeatureShift
from fedgan_lightning.sources import SwissRoll
from tests.conftest import digits_data

CPU = torch.device("cpu")


def test_copies_are_found_out_and_unseen_samples_are_not():
    data, metric = digits_data(num_clients=2), MembershipInference()
    facts = metric.prepare(data, device=CPU)
    view = data.client_samples(0)
    copies, labels = view.take(torch.arange(len(view)))
    values = metric.compute(copies, labels)
    assert values["membership_auc/0"] == pytest.approx(1.0, abs=1e-6)
    assert facts["membership_auc_of_split/0"] == pytest.approx(0.5, abs=0.1)
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metric.compute(noise, None)["membership_auc/0"] == pytest.approx(0.5, abs=0.1)


def test_members_are_compared_within_their_class():
    """A score of the label alone says nothing, whatever the shares of the classes."""
    x = torch.zeros(40, 2)
    members, others = (x, (torch.arange(40) < 30).long()), (x, (torch.arange(40) < 5).long())
    assert membership_auc(members, others, lambda x, y: y.float()) == 0.5
    assert membership_auc(members, (x, torch.full((40,), 7)), lambda x, y: y.float()) == 0.5, "no class in common"


def test_a_discriminator_that_remembers_gives_members_away():
    data, metric = digits_data(num_clients=2), MembershipInference()
    metric.prepare(data, device=CPU)
    known = metric.members[1].take(torch.arange(len(metric.members[1])))[0]

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, y):
            return -self.scale * torch.cdist(x.flatten(1), known.flatten(1)).min(1).values

    model = nn.Module()
    model.discriminator = Memory()
    assert metric.inspect(model) == {}, "of somebody else's discriminator nobody knows what it takes"
    model.discriminate = model.discriminator
    values = metric.inspect(model)
    assert values["membership_auc_discriminator/1"] == pytest.approx(1.0, abs=1e-6)
    assert values["membership_auc_discriminator/0"] < 0.7
    assert metric.inspect(nn.Module()) == {}
    model.condition = nn.Identity()
    assert metric.inspect(model) == {}


@pytest.mark.parametrize(("sync", "known"), [({}, True), ({"discriminator": "local"}, False)])
def test_discriminators_that_stay_with_clients_are_not_judged_by_the_server_s(tmp_path, sync, known):
    gan = GAN(MLPGenerator(8, (1, 8, 8), hidden=(16,)), MLPDiscriminator((1, 8, 8), hidden=(16,)))
    evaluation = Evaluation(metrics=[MembershipInference()], num_samples=50)
    options = {"rounds": 1, "local_steps": 1, "sync": sync, "executor": SequentialExecutor(), "evaluation": evaluation}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    federation = Federation(gan, digits_data(num_clients=2), run_dir=str(tmp_path), trainer=trainer, **options)
    federation.fit()
    values = federation.test()
    assert "membership_auc/0" in values
    assert ("membership_auc_discriminator/0" in values) == known


def test_members_are_kept_as_positions():
    data, metric = digits_data(num_clients=40), MembershipInference()
    metric.prepare(data, device=CPU)
    own = [view for views in (metric.members, metric.others) for view in views.values()]
    assert {view.samples.x.data_ptr() for view in own} == {
        data.train_samples.x.data_ptr(),
        data.test_samples.x.data_ptr(),
    }


def test_real_samples_of_others_help_a_small_client():
    """What stands in for a perfect generator: the union's own samples."""
    data = digits_data(num_clients=20, partition=FeatureShift(contrast=0.1, brightness=0.1), batch_size=4)
    metric = ClientAugmentation(steps=80, repeats=1, ratio=10.0)
    facts = metric.prepare(data, device=CPU)
    (client_id,) = metric.own
    values = metric.compute(*data.train_samples.take(torch.arange(1000)))
    assert values[f"auc_with_synthetic/{client_id}"] > facts[f"auc_own_data/{client_id}"]
    assert metric.compute(torch.zeros(5, 1, 8, 8), None) == {}, "unlabelled samples are of no use here"


def test_only_clients_that_exist_and_labelled_data_are_accepted():
    with pytest.raises(ConfigurationError, match="clients 0 to 4.*got 7"):
        ClientAugmentation(clients=[7]).prepare(digits_data(), device=CPU)
    with pytest.raises(ConfigurationError, match="labelled"):
        ClientAugmentation().prepare(FederatedDataModule(SwissRoll(), num_clients=2), device=CPU)


def test_areas_under_the_curve_stand_beside_accuracies():
    data, metric = digits_data(), SyntheticTraining(epochs=8)
    metric.prepare(data, device=CPU)
    values = metric.compute(*data.train_samples.take(torch.arange(1000)))
    assert 0.8 < values["tstr_accuracy"] < values["tstr_auc"] <= 1
    assert values["trtr_auc"] == pytest.approx(values["tstr_auc"], abs=0.03)


def test_a_class_without_test_samples_does_not_count_in_the_area_under_the_curve():
    """A perfect classifier of the two classes that there are has an area of 1, however many others it knows."""
    labels = torch.tensor([0, 0, 2, 2])
    beliefs = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2 + [[0.1, 0.1, 0.7, 0.1]] * 2)
    assert auroc(beliefs, labels) == 1.0
    assert auroc(beliefs.flip(0), labels) == 0.0
    assert math.isnan(auroc(beliefs, torch.zeros(4, dtype=torch.int64)))
