"""One client's own module, and its samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgan_lightning import GAN, ConfigurationError, Evaluation, Federation, SamplePictures, SequentialExecutor
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from tests.conftest import adam, ring_data

LAST = "generator.layers.2."
SYNC = {f"{LAST}*": "local"}


def small_gan(**options) -> GAN:
    torch.manual_seed(0)
    networks = MLPGenerator(4, (2,), hidden=(16,), output="linear"), MLPDiscriminator((2,), hidden=(16,))
    return GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam, **options)


def federation(folder="run", *, gan=None, **options):
    return Federation(
        small_gan(ema_half_life_images=100) if gan is None else gan,
        ring_data(),
        run_dir=folder,
        evaluation=Evaluation(every_n_rounds=10, metrics=[]),
        pictures=options.pop("pictures", SamplePictures(every_n_rounds=None)),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
        **{"rounds": 3, "local_steps": 2, "executor": SequentialExecutor(), "sync": SYNC, **options},
    )


@pytest.fixture
def done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = federation()
    own.fit()
    return own


def test_two_clients_differ_where_they_keep_something_and_nowhere_else(done):
    first, second = (done.client_module(k).state_dict() for k in (0, 1))
    shared = done.server.model.state_dict()
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    own = {f"{LAST}weight", f"{LAST}bias"}
    assert differ == own | {name.replace("generator.", "generator_ema.") for name in own}
    assert all(torch.equal(first[name], shared[name]) for name in first if name not in differ)
    assert not any(torch.equal(first[name], shared[name]) for name in differ)
    stored = done.orchestrator.store.read(1)
    assert all(torch.equal(second[name], stored[name]) for name in own)
    for name in own:
        assert torch.equal(second[name.replace("generator.", "generator_ema.")], second[name])


def test_the_global_module_stays_what_it_is(done):
    before = {name: value.clone() for name, value in done.server.model.state_dict().items()}
    own = done.client_module(2)
    with torch.no_grad():
        own.generator.layers[0].weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in done.server.model.state_dict().items())


@pytest.mark.parametrize("client_state", ["memory", "disk"])
def test_predict_draws_by_a_client_of_a_checkpoint(client_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = federation(client_state=client_state)
    trained.fit()
    expected = trained.client_module(1).state_dict()
    later = federation("later", client_state=client_state, pictures=SamplePictures(predict_client=1))
    trainer = later._make_trainer(is_fit=False)
    trainer.predict(later.server, datamodule=later.data, ckpt_path="run/checkpoints/last.ckpt")
    found = later.client_module(1).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    drawn = np.load("later/predictions/client1/samples.npz")["x"]
    z = SamplePictures()._generator()
    np.testing.assert_allclose(drawn, trained.client_module(1).sample(100, generator=z).numpy(), rtol=1e-6)
    common = trained.server.model.sample(100, generator=SamplePictures()._generator()).numpy()
    assert np.abs(drawn - common).max() > 1e-3


@pytest.mark.parametrize(("options", "client"), [({"sync": {}, "optimizer_state": "reset"}, 0), ({}, 99)])
def test_a_client_that_keeps_nothing_has_no_module_of_its_own(options, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = federation(**options)
    own.fit()
    with pytest.raises(ConfigurationError, match=f"must keep a part of the module.*got client {client}, of which"):
        own.client_module(client)


def test_a_local_network_is_the_client_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = federation(sync={"discriminator": "local"})
    own.fit()
    first, second = (own.client_module(k).discriminator.state_dict() for k in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)
