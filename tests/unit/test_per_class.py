"""Values by class and by client, the held-vs-absent gap, and the pictures of the full evaluation."""

from __future__ import annotations

import lightning
import pytest
import torch

from fedgan_lightning import GAN, FederatedDataModule, ServerModule
from fedgan_lightning.callbacks import HeldAbsentGap, Inspection
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.evaluation import per_class
from fedgan_lightning.gan.priors import Normal, Uniform
from fedgan_lightning.metrics import ClassBreakdown, ClientDistances
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.sources import Ring
from tests.conftest import digits_data, federate, quiet_trainer, ring_data, ring_gan

CPU = torch.device("cpu")


def digit_gan(**options) -> GAN:
    torch.manual_seed(0)
    generator = MLPGenerator(4, (1, 8, 8), hidden=(16,), num_classes=10)
    discriminator = MLPDiscriminator((1, 8, 8), hidden=(16,), num_classes=10, conditioning="projection")
    return GAN(generator, discriminator, **options)


# ---------------------------------------------------------------------- by class, by client


def test_real_samples_have_the_shares_of_the_union_and_are_recognised():
    data, metric = digits_data(), ClassBreakdown()
    facts = metric.prepare(data, device=CPU)
    x, y = data.train_samples.take(torch.cat([torch.from_numpy(own) for own in data.indices]))
    values = metric.compute(x, y)
    for name in data.class_names:
        assert values[f"class_share/{name}"] == pytest.approx(facts[f"class_share_of_union/{name}"], abs=0.02)
        assert values[f"class_recognised/{name}"] > 0.9
    only = metric.compute(x[y == 3], y[y == 3])
    assert only["class_share/3"] > 0.9
    assert "class_recognised/4" not in only, "nothing was asked of class 4"


def test_unconditional_samples_have_shares_only():
    data, metric = digits_data(), ClassBreakdown()
    metric.prepare(data, device=CPU)
    values = metric.compute(data.test_samples.take(torch.arange(100))[0], None)
    assert len(values) == 10
    assert sum(values.values()) == pytest.approx(1.0)


def test_a_client_s_own_samples_are_nearest_to_it():
    data, metric = digits_data(), ClientDistances()
    metric.prepare(data, device=CPU)
    view = data.client_samples(2)
    values = metric.compute(view.take(torch.arange(len(view)))[0], None)
    assert len(values) == 5
    assert values["client_fid/2"] == pytest.approx(0.0, abs=1e-6)
    assert min(values, key=values.__getitem__) == "client_fid/2"
    assert all(value > 10 for name, value in values.items() if name != "client_fid/2")


def test_many_clients_are_summed_up(monkeypatch):
    monkeypatch.setattr(per_class, "MOST_CLIENTS", 4)
    data, metric = digits_data(), ClientDistances()
    metric.prepare(data, device=CPU)
    values = metric.compute(data.test_samples.take(torch.arange(200))[0], None)
    assert set(values) == {"client_fid_median", "client_fid_largest"}
    assert values["client_fid_largest"] >= values["client_fid_median"]


# ---------------------------------------------------------------------- held and absent classes


class Oracle(torch.nn.Module):
    """A discriminator whose logit is ``weight`` at labels below 5 and 0 above, whatever it sees."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, y):
        return (self.weight * (y < 5).to(x.dtype)).unsqueeze(1)


def looked_through(discriminator, *, held: torch.Tensor, value: float) -> float:
    gap, data = HeldAbsentGap(every_n_rounds=1), digits_data()
    model = digit_gan()
    model.discriminator = discriminator
    server, trainer = ServerModule(model), quiet_trainer()
    trainer.datamodule = data
    gap.setup(trainer, server, "fit")
    gap._held = [held]
    gap._look(server, 0, {"discriminator.weight": torch.tensor(value)})
    total, count = gap._sums.tolist()
    return total / count if count else float("nan")


def test_the_gap_is_the_difference_of_mean_logits():
    held = torch.arange(10) < 5
    assert looked_through(Oracle(), held=held, value=3.0) == pytest.approx(3.0)
    assert looked_through(Oracle(), held=~held, value=3.0) == pytest.approx(-3.0)
    assert torch.isnan(torch.tensor(looked_through(Oracle(), held=torch.ones(10) > 0, value=3.0)))


@pytest.mark.parametrize("sync", ["average", "local"])
def test_discriminators_of_clients_learn_the_gap(sync):
    gap = HeldAbsentGap(every_n_rounds=2)
    sync = {"discriminator": sync}
    federate(digit_gan(), digits_data(), gap, rounds=6, local_steps=20, sync=sync)
    assert gap.latest is not None
    assert gap.latest > 0.1, "clients with two classes each come to prefer them"
    assert gap._sums[1] == 5, "every client was looked through"


def test_looking_changes_nothing():
    def run(*callbacks):
        server, _, _ = federate(digit_gan(), digits_data(), *callbacks, rounds=2, local_steps=3)
        return server.model.state_dict()

    plain, watched = run(), run(HeldAbsentGap(every_n_rounds=1))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_the_gap_refuses_what_has_no_classes():
    class Unlabelled(Ring):
        num_classes = 0

    data = FederatedDataModule(Unlabelled(num_samples=640), num_clients=2, batch_size=16)
    data.num_classes = 0
    with pytest.raises(ConfigurationError, match=r"labelled data.*Take it out"):
        federate(ring_gan(), data, HeldAbsentGap(), rounds=1, local_steps=1)
    with pytest.raises(ConfigurationError, match="every_n_rounds .* at least 1; got 0"):
        HeldAbsentGap(every_n_rounds=0)


# ---------------------------------------------------------------------- ways between latents, nearest neighbours


def test_ways_between_latents():
    first, second = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    fractions = torch.tensor([0.0, 0.5, 1.0])
    for prior in (Normal(), Uniform()):
        way = prior.between(first, second, fractions)
        torch.testing.assert_close(way[0], first)
        torch.testing.assert_close(way[2], second)
    straight, arc = Uniform().between(first, second, fractions)[1], Normal().between(first, second, fractions)[1]
    torch.testing.assert_close(straight, (first + second) / 2)
    unit = torch.nn.functional.normalize
    halfway = Normal().between(unit(first), unit(second), fractions)[1]
    torch.testing.assert_close(halfway.norm(dim=1), torch.ones(5))
    assert (arc.norm(dim=1) > straight.norm(dim=1)).all()
    same = Normal().between(first, first, fractions)
    torch.testing.assert_close(same, first.expand(3, -1, -1))


def test_inspection_writes_ways_for_all_and_neighbours_for_each_client(tmp_path):
    data, server = digits_data(), ServerModule(digit_gan())
    inspection = Inspection(rows=3, columns=4, clients=2)
    trainer = quiet_trainer(default_root_dir=str(tmp_path))
    trainer.datamodule = data
    inspection.on_test_end(trainer, server)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    owners = [f"on_clients/client0000{k}/neighbours.png" for k in range(2)]
    assert found == ["interpolation.png", *owners]


def test_neighbours_are_the_client_s_own_and_nearest():
    data = digits_data()
    view = data.client_samples(1)
    own = view.take(torch.arange(len(view)))[0]

    class Copying(lightning.LightningModule):
        num_classes, latent_dim, generator_ema = 0, 4, None

        def sample(self, num_samples, *, labels=None, generator=None):
            return own[:num_samples]

    server = ServerModule(Copying())
    picture = Inspection(columns=4).neighbours(server, data, 1)
    side = (picture.shape[0] - 3 * 2) // 2  # two rows with a border of two pixels around each
    upper, lower = picture[2 : 2 + side], picture[4 + side : 4 + 2 * side]
    assert (upper == lower).all(), "the nearest neighbour of a copy is the original"
    assert upper[:, 2:-2].std() > 10, "something is seen"


def test_inspection_refuses_empty_pictures():
    with pytest.raises(ConfigurationError, match="inspection.rows .* at least 1; got 0"):
        Inspection(rows=0)


def test_other_data_has_no_such_pictures(tmp_path):
    trainer = quiet_trainer(default_root_dir=str(tmp_path))
    trainer.datamodule = ring_data()
    Inspection().on_test_end(trainer, ServerModule(ring_gan()))
    assert not list(tmp_path.rglob("*.png"))
