"""Text: the vocabulary that clients make together, the source, the networks, their schedule and start, the metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from unicodedata import normalize

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import (
    GAN,
    FederatedDataModule,
    FederatedOrchestrator,
    LanguageModel,
    SequentialExecutor,
    ServerModule,
    StartFrom,
    VectorizedExecutor,
)
from fedgan_lightning.data.vocabulary import END, UNKNOWN, contribution, summed, tokens
from fedgan_lightning.errors import CheckpointError, ConfigurationError, DataError
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.evaluation.text import References, drawn, mean_bleu
from fedgan_lightning.gan.networks.text import counts
from fedgan_lightning.gan.priors import Gumbel
from fedgan_lightning.losses import RelativisticPairing
from fedgan_lightning.metrics import BLEU, HeldOutLikelihood, SelfBLEU
from fedgan_lightning.networks import MLPGenerator, OneHot, TextDiscriminator, TextGenerator
from fedgan_lightning.partitions import IID, Natural
from fedgan_lightning.samplers import SelectedClients
from fedgan_lightning.schedules import ExponentialRounds
from fedgan_lightning.sources import TextFile, Vocabulary
from tests.conftest import ROOT, digits_data, federate, quiet_trainer, ring_data, ring_gan

SENTENCES = str(ROOT / "tests" / "data" / "sentences.txt")
TOPICS = {"bath": ["bathroom", "toilet", "bathtub", "sinks"], "air": ["airplane", "jet", "plane", "aircraft"]}
CPU = torch.device("cpu")
texts = st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6), min_size=1, max_size=8)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def source(**options) -> TextFile:
    return TextFile(SENTENCES, **{"max_length": 10, "max_words": 40, "topics": TOPICS, **options})


def module(**options) -> FederatedDataModule:
    options = {"partition": Natural("topic"), "num_clients": 3, "batch_size": 8, **options}
    return FederatedDataModule(options.pop("source", None) or source(), **options)


def generator(num_words: int = 40, length: int = 10, **options) -> TextGenerator:
    torch.manual_seed(0)
    return TextGenerator(num_words, length, embedding=6, hidden=8, **options)


def text_gan(*, length: int = 10, **options) -> GAN:
    made = generator(length=length)
    critic = TextDiscriminator(40, length, embedding=6, widths=(2, 3), filters=4)
    optimizers = {"generator_optimizer": sgd, "discriminator_optimizer": sgd}
    options = {"codec": OneHot(40), "prior": Gumbel(), "loss": RelativisticPairing(), **optimizers, **options}
    return GAN(made, critic, **options)


class TestVocabulary:
    @given(st.lists(texts, min_size=1, max_size=4), st.integers(3, 8))
    @settings(deadline=None, max_examples=25)
    def test_summed_counts_make_the_vocabulary_of_pooled_text(self, clients, size):
        pooled = [sentence for client in clients for sentence in client]
        together = Vocabulary.of(summed(map(contribution, clients)), max_words=size)
        assert together == Vocabulary.of(contribution(pooled), max_words=size)

    @given(texts, st.integers(1, 5))
    @settings(deadline=None, max_examples=25)
    def test_words_below_the_support_never_leave_a_client(self, client, support):
        told = contribution(client, min_support=support)
        every = Counter(word for sentence in client for word in sentence)
        assert told == {word: count for word, count in every.items() if count >= support}

    @given(texts, texts)
    @settings(deadline=None, max_examples=25)
    def test_counted_once_a_sentence_changes_any_count_by_at_most_one(self, client, more):
        before = contribution(client, once_per_sentence=True)
        after = contribution([*client, more[0]], once_per_sentence=True)
        assert {after[word] - before.get(word, 0) for word in after} <= {0, 1}

    @given(texts)
    @settings(deadline=None, max_examples=25)
    def test_known_sentences_survive_the_way_there_and_back(self, client):
        vocabulary = Vocabulary.of(contribution(client))
        assert vocabulary.decode(vocabulary.encode(client, length=6)) == client

    def test_the_most_common_come_first_and_ties_in_alphabetical_order(self):
        vocabulary = Vocabulary.of({"b": 2, "a": 2, "c": 5, UNKNOWN: 9}, max_words=4)
        assert vocabulary.words == (END, UNKNOWN, "c", "a")
        ids = vocabulary.encode([["c", "b", "a"], ["a"]], length=2)
        assert ids.tolist() == [[2, 1], [3, 0]]
        assert vocabulary.write(torch.tensor([[2, 0, 3], [2, 1, 3]])) == ["c", "c <unk> a"]
        assert vocabulary.decode(torch.tensor([[7, 2]])) == [[UNKNOWN, "c"]], "networks may know more words"

    def test_lines_become_words_and_marks_and_lines_again(self):
        words = tokens("A man's two-seat plane, parked.")
        assert words == ["a", "man's", "two-seat", "plane", ",", "parked", "."]
        vocabulary = Vocabulary.of(contribution([words]))
        assert vocabulary.write(vocabulary.encode([words], length=9)) == ["a man's two-seat plane, parked."]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("हिन्दी में लिखो।", ["हिन्दी", "में", "लिखो", "।"]),
            (normalize("NFD", "Le café à Zürich"), ["le", "caf\u00e9", "\u00e0", "z\u00fcrich"]),
            (
                "\u0645\u06cc\u200c\u062e\u064e\u0648\u0631\u0645\u060c",
                ["\u0645\u06cc\u200c\u062e\u064e\u0648\u0631\u0645", "\u060c"],
            ),  # Persian
            ("İstanbul'da", ["i\u0307stanbul'da"]),
            ("ok \u2764\ufe0f!", ["ok", "\u2764\ufe0f", "!"]),
            ("well-known: don't ...", ["well-known", ":", "don't", ".", ".", "."]),
        ],
    )
    def test_words_keep_their_marks_in_every_script(self, line, words):
        assert tokens(line) == words

    def test_bad_vocabularies_are_refused(self):
        with pytest.raises(DataError, match="must begin with <end> and <unk>"):
            Vocabulary(("a", "b"))
        with pytest.raises(DataError, match="hold every word once; got 4 words"):
            Vocabulary((END, UNKNOWN, "a", "a"))
        with pytest.raises(DataError, match="must be at least 3, since it counts two special words; got 2"):
            Vocabulary.of({"a": 1}, max_words=2)
        with pytest.raises(DataError, match="min_support must be at least 1; got 0"):
            contribution([["a"]], min_support=0)


class TestSource:
    def test_clients_are_topics_and_share_one_vocabulary(self):
        data = module()
        data.setup()
        train = data.train_samples
        assert train.x.dtype == torch.int64
        assert set(train.columns["topic"]) == {"bath", "air", "other"}
        assert len(data.source.vocabulary) == 40
        assert 0 <= train.x.min() <= train.x.max() < 40
        lines = data.source.vocabulary.decode(train.x[data.indices[0]])
        assert all(set(line) & {"airplane", "jet", "plane", "aircraft", UNKNOWN} for line in lines)
        assert len(train) + len(data.test_samples) == 200

    def test_with_support_one_the_partition_does_not_matter_and_with_more_it_does(self):
        words = {}
        for support in (1, 12):
            for partition in (Natural("topic"), IID()):
                data = module(source=source(min_support=support, max_words=400), partition=partition)
                words[support, type(partition)] = data.train_samples and set(data.source.vocabulary.words)
        assert words[1, Natural] == words[1, IID]
        assert words[12, IID] < words[1, IID]
        assert words[12, Natural] != words[12, IID]

    def test_held_out_sentences_are_the_same_whatever_is_read_first(self):
        first, second = module(), module()
        assert second.train_samples is not None
        assert (first.test_samples.x == second.test_samples.x).all()

    def test_a_subset_still_agrees(self):
        data = module(max_samples=60, partition=IID())
        assert len(data.train_samples) == 60
        assert data.state_dict()["vocabulary"][:2] == [END, UNKNOWN]

    def test_a_vocabulary_file_is_taken_as_it_is(self, tmp_path):
        (tmp_path / "v.json").write_text(json.dumps([END, UNKNOWN, "jet", "the"]))
        data = module(source=source(vocabulary=str(tmp_path / "v.json")))
        assert data.source.has_shared_metadata
        assert data.train_samples.x.max() == 3

    def test_a_site_of_a_deployment_needs_the_common_file(self, tmp_path):
        from fedgan_lightning.deployment.site import Site

        options = ["--config", str(ROOT / "configs" / "text_mle.yaml"), "--data.source.path", SENTENCES]
        options += ["--data.source.test_path", "null"]
        with pytest.raises(ConfigurationError, match="samples mean before they train; got a TextFile"):
            Site(options, client_id=0, state_dir=tmp_path)
        (tmp_path / "v.json").write_text(json.dumps([END, UNKNOWN, "jet", "the"]))
        site = Site([*options, "--data.source.vocabulary", str(tmp_path / "v.json")], client_id=0, state_dir=tmp_path)
        assert site.facts()["num_examples"] == 180

    def test_a_folder_gives_a_column_of_files(self, tmp_path):
        for name in ("north", "south"):
            (tmp_path / f"{name}.txt").write_text(f"the {name} wind\n\na wind from the {name}\n" * 4)
        data = module(source=TextFile(str(tmp_path), max_length=5), partition=Natural("file"), num_clients=2)
        lines = data.train_samples and data.source.vocabulary.write(data.train_samples.x[data.indices[1]])
        assert all("south" in line for line in lines)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"max_length": 1}, "two sentences of at most 1 words; got 0"),
            ({"max_length": 0}, "max_length .* at least 1; got 0"),
            ({"test_fraction": 1.0}, "test_fraction .* in .0, 1.; got 1.0"),
            ({"topics": {"a": ["jet"], "b": ["Jet"]}}, "must stand for one topic; got 'Jet' under a and b"),
            ({"min_support": 999}, "some client must use some word 999 times"),
            ({"vocabulary": "none.json"}, "a JSON list of words by id that can be read; got none.json"),
            ({"test_path": "none.txt"}, "must be a text file or a folder of .txt files that can be read; got none.txt"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, words):
        with pytest.raises((DataError, ConfigurationError), match=words):
            assert module(source=source(**options)).test_samples is None

    def test_what_is_too_long_is_counted_and_told_once(self, tmp_path, caplog):
        caplog.set_level("INFO", "fedgan_lightning")
        path = tmp_path / "hindi.txt"
        path.write_text("हिन्दी में लिखो\n" * 6 + "एक दो तीन चार पाँच\n" * 2, encoding="utf-8")
        data = module(source=TextFile(str(path), max_length=3), partition=IID(), num_clients=2, batch_size=1)
        assert len(data.train_samples) + len(data.test_samples) == 6
        told = [text for text in caplog.messages if "left out" in text]
        assert told == [f"2 of 8 sentences in {path} are left out: they have more than max_length=3 words, up to 5"]
        with pytest.raises(DataError, match=r"got 0 in .*; 8 of 8 sentences .* max_length=1 words, up to 5"):
            TextFile(str(path), max_length=1).load("train")

    @pytest.mark.parametrize(
        ("data", "options", "words"),
        [
            ("le café\n".encode("latin-1") * 9, {}, "byte 0xe9 at offset 6, line 1"),
            ("le café\n".encode("latin-1") * 9, {"encoding": "latin-1"}, ""),
            ("le café\n".encode("utf-8-sig") * 1 + "le café\n".encode() * 8, {}, ""),
            (("le café\n" * 9).encode("utf-16"), {}, "byte order mark of utf-16"),
            (("le café\n" * 9).encode("utf-16"), {"encoding": "utf-16"}, ""),
            (b"a b\n" * 9 + b"\0", {}, "NUL byte in line 10"),
            (b"", {}, "two sentences of at most 16 words; got 0"),
            (b"a b\nc d", {"test_fraction": 0.9}, "got 2 sentences in .*test_fraction 0.9"),
        ],
    )
    def test_files_in_other_encodings(self, data, options, words, tmp_path):
        (tmp_path / "a.txt").write_bytes(data)
        source = TextFile(str(tmp_path / "a.txt"), **options)
        if words:
            with pytest.raises(DataError, match=words):
                source.load("train")
        else:
            source = source.with_shared_metadata(source.load("train"), [np.arange(8)])
            assert set(source.vocabulary.words[2:]) == {"le", "caf\u00e9"}

    def test_folders_without_texts_and_topics_in_other_forms(self, tmp_path):
        with pytest.raises(DataError, match="a folder of .txt files; got .* with none"):
            TextFile(str(tmp_path)).load("train")
        (tmp_path / "a.TXT").write_text(normalize("NFD", "le café\n") * 9, encoding="utf-8")
        source = TextFile(str(tmp_path), topics={"drinks": [normalize("NFD", "Café")]})
        assert set(source.load("train").columns["topic"]) == {"drinks"}

    def test_the_real_file(self, shared):
        folder = shared / "text"
        own = TextFile(str(folder / "image_coco.txt"), test_path=str(folder / "image_coco_test.txt"), max_words=1500)
        data = FederatedDataModule(own, num_clients=5)
        assert (len(data.train_samples), len(data.test_samples)) == (9615, 9654)
        assert (data.train_samples.x == 1).sum() < 0.05 * (data.train_samples.x > 0).sum()


class TestNetworks:
    def test_a_sentence_is_rows_of_probabilities_and_after_the_end_nothing_but_the_end(self):
        own = generator(temperature=0.5)
        z = Gumbel().draw(64, own.latent_dim)
        x = own(z)
        assert x.shape == (64, *own.sample_shape)
        torch.testing.assert_close(x.sum(2), torch.ones(64, 10))
        ids = x.argmax(2)
        after = (ids == 0).cumsum(1) - (ids == 0).long() > 0
        assert after.any()
        assert (x[after][:, 0] == 1).all()

    def test_words_are_samples_of_the_language_model_at_any_temperature(self):
        own = generator(num_words=5, length=2)
        z = Gumbel().draw(20000, 10, generator=torch.Generator().manual_seed(0))
        ids = own(z).argmax(2)
        first = own.log_probabilities(torch.zeros(1, 2, dtype=torch.int64))[0, 0].exp()
        torch.testing.assert_close(torch.bincount(ids[:, 0], minlength=5) / 20000, first, atol=0.012, rtol=0)
        own.temperature.fill_(0.05)
        assert (own(z).argmax(2) == ids).all()
        given = ids[ids[:, 0] == 2]
        second = own.log_probabilities(torch.tensor([[2, 0]]))[0, 1].exp()
        share = torch.bincount(given[:, 1], minlength=5) / len(given)
        torch.testing.assert_close(share, second.detach(), atol=0.025, rtol=0)

    def test_probabilities_of_all_sentences_add_up_to_one(self):
        own = generator(num_words=4, length=3).double()
        every = torch.cartesian_prod(*[torch.arange(4)] * 3)
        ended = (every == 0).cumsum(1) > 0
        whole = every[~((every != 0) & ended).any(1)]  # nothing after an end
        total = own.log_likelihood(whole)[0].exp().sum()
        assert float(total.detach()) == pytest.approx(1.0, abs=1e-12)

    def test_the_unit_is_torch_s_gru(self):
        own = generator()
        cell = torch.nn.GRUCell(6, 8)
        cell.load_state_dict({
            "weight_ih": own.seen.weight, "bias_ih": own.seen.bias,
            "weight_hh": own.kept.weight, "bias_hh": own.kept.bias,
        })  # fmt: skip
        word, state = torch.randn(5, 6), torch.randn(5, 8)
        torch.testing.assert_close(own._step(word, state), cell(word, state))

    def test_terms_count_up_to_the_first_end(self):
        ids = torch.tensor([[3, 2, 0, 0], [3, 2, 4, 5], [0, 0, 0, 0]])
        assert counts(ids).sum(1).tolist() == [3, 4, 1]

    def test_every_parameter_gets_a_gradient_from_the_critic_and_from_the_likelihood(self):
        own, critic = generator(), TextDiscriminator(40, 10, embedding=6, widths=(1, 4), filters=4)
        critic(own(Gumbel().draw(8, own.latent_dim))).sum().backward()
        for name, parameter in [*own.named_parameters(), *critic.named_parameters()]:
            if parameter is not critic.head.bias:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
        own.zero_grad()
        own.log_likelihood(torch.randint(40, (8, 10)))[0].sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in own.parameters())

    def test_a_lower_temperature_is_nearer_to_one_hot(self):
        own, z = generator(), Gumbel().draw(16, 400)
        peaks = []
        for temperature in (2.0, 0.5, 0.05):
            own.temperature.fill_(temperature)
            peaks.append(float(own(z).detach().amax(2).mean()))
        assert peaks == sorted(peaks)
        assert peaks[-1] > 0.95

    def test_the_critic_s_response_does_not_depend_on_where_words_stand(self):
        critic = TextDiscriminator(20, 9, embedding=4, widths=(2, 3), filters=4).eval()
        codec = OneHot(20)
        first = torch.tensor([[0, 0, 0, 5, 6, 7, 0, 0, 0]])
        torch.testing.assert_close(critic(codec.encode(first)), critic(codec.encode(first.roll(1, 1))))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: TextGenerator(2), "num_words of TextGenerator .* at least 3; got 2"),
            (lambda: TextGenerator(hidden=0), "hidden .* at least 1; got 0"),
            (lambda: TextGenerator(temperature=0.0), "temperature .* above 0; got 0.0"),
            (lambda: TextDiscriminator(9, 4), "between 1 and max_length=4; got .2, 3, 4, 5"),
            (lambda: OneHot(1), "num_words of OneHot .* at least 3; got 1"),
            (lambda: text_gan(prior=None), "noise from Gumbel; got model.prior=Normal. Set prior: Gumbel"),
            (lambda: LanguageModel(MLPGenerator(2, (2,))), "with log_likelihood.*; got MLPGenerator"),
        ],
    )
    def test_bad_numbers_are_refused(self, make, words):
        with pytest.raises(ConfigurationError, match=words):
            make()

    def test_one_hot_and_back(self):
        ids = torch.randint(40, (3, 10))
        x = OneHot(40).encode(ids)
        assert x.is_floating_point()
        assert (OneHot(40).decode(x) == ids).all()

    def test_gumbel_noise_has_its_moments(self):
        z = Gumbel().draw(1000, 200, generator=torch.Generator().manual_seed(0))
        assert z.isfinite().all()
        assert float(z.mean()) == pytest.approx(0.5772, abs=0.01)
        assert float(z.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


class TestTraining:
    def test_stacked_clients_train_as_each_alone(self):
        weights = []
        for executor in (SequentialExecutor(), VectorizedExecutor()):
            data = module(source=source(max_length=7), partition=IID(), num_clients=2)
            server, _, _ = federate(text_gan(length=7), data, rounds=1, local_steps=2, executor=executor)
            weights.append(torch.cat([p.detach().flatten() for p in server.model.parameters()]))
        start = torch.cat([p.detach().flatten() for p in text_gan(length=7).parameters()])
        assert (weights[0] - start).norm() > 0
        assert (weights[0] - weights[1]).norm() <= 1e-5 * weights[0].norm()

    def test_a_federated_language_model_learns(self):
        data = module()
        model = LanguageModel(generator(), optimizer=lambda p: torch.optim.Adam(p, lr=0.03))
        metric = HeldOutLikelihood()
        metric.prepare(data, device=CPU)
        before = metric.inspect(model)["nll"]
        federate(model, data, rounds=2, local_steps=10)
        assert before == pytest.approx(math.log(40), abs=0.5)
        assert metric.inspect(model)["nll"] < 0.8 * before
        ids = model.sample(5, generator=torch.Generator().manual_seed(0), chunk_size=2)
        assert (ids == model.sample(5, generator=torch.Generator().manual_seed(0))).all()
        assert (
            ids == OneHot(40).decode(model.generator(Gumbel().draw(5, 400, generator=torch.Generator().manual_seed(0))))
        ).all()

    def test_the_model_and_the_data_are_equally_long(self):
        with pytest.raises(ConfigurationError, match=r"max_length=9, samples of shape \[10\]"):
            federate(LanguageModel(generator(length=9)), module(), rounds=1, local_steps=1)

    def test_samples_of_the_gan_are_word_ids(self):
        assert text_gan().sample(7).shape == (7, 10)


class Watch(SequentialExecutor):
    """Notes at which temperature clients train, and the server samples."""

    def setup(self, context):
        super().setup(context)
        self.server, self.seen = context.model, []

    def run(self, tasks):
        for update in super().run(tasks):
            found = self._local.module.generator.temperature
            self.seen += [float(found), float(self.server.generator.temperature)]
            yield update


class TestTemperature:
    @pytest.mark.parametrize("buffers", ["merge", "local"])
    def test_clients_and_server_have_it_in_every_round(self, buffers):
        watch, schedules = Watch(), {"generator.temperature": ExponentialRounds(start=1.0, end=0.25)}
        options = {"schedules": schedules, "buffers": buffers, "clients": SelectedClients([0])}
        federate(text_gan(), module(), rounds=3, local_steps=1, executor=watch, **options)
        assert watch.seen == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.25, 0.25])

    def test_stacked_clients_cool_like_each_alone(self):
        schedules = {"generator.temperature": ExponentialRounds(start=1.0, end=0.25)}
        options = {"schedules": schedules, "rounds": 2, "local_steps": 2}
        one, all_at_once = (
            federate(text_gan(), module(), executor=executor, **options)[0].model.state_dict()
            for executor in (SequentialExecutor(), VectorizedExecutor())
        )
        for name, value in one.items():
            torch.testing.assert_close(all_at_once[name], value, rtol=1e-4, atol=1e-5)

    def test_a_network_without_one_is_refused(self):
        with pytest.raises(ConfigurationError, match="a module's number; got generator.temperature"):
            schedules = {"generator.temperature": ExponentialRounds()}
            federate(ring_gan(), ring_data(), schedules=schedules, rounds=1, local_steps=1)


class TestStartFrom:
    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory):
        path = str(tmp_path_factory.mktemp("mle") / "last.ckpt")
        _, _, trainer = federate(LanguageModel(generator()), module(), rounds=1, local_steps=2)
        trainer.save_checkpoint(path)
        return path

    def start(self, path, *, model=None, data=None, **options):
        model = text_gan() if model is None else model
        callback = StartFrom(path, **options)
        trainer = quiet_trainer(FederatedOrchestrator(rounds=1, local_steps=1), max_steps=1)
        trainer.datamodule = module() if data is None else data
        callback.on_fit_start(trainer, ServerModule(model))
        return model

    def test_the_generator_and_its_average_begin_there(self, checkpoint):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        fresh = text_gan(ema_half_life_images=100)
        assert not torch.equal(fresh.generator.bias, state["generator.bias"])
        model = self.start(checkpoint, model=fresh)
        for name, value in model.generator.state_dict().items():
            assert torch.equal(value, state[f"generator.{name}"]), name
            assert torch.equal(model.generator_ema.state_dict()[name], value), name

    def test_a_missing_file_or_another_vocabulary_or_network_is_refused(self, checkpoint, tmp_path):
        with pytest.raises(CheckpointError, match="a checkpoint must be a file; got .*none.ckpt, which is not there"):
            self.start("none.ckpt")
        with pytest.raises(CheckpointError, match="the vocabulary that it was trained with; got .*another vocabulary"):
            self.start(checkpoint, data=module(source=source(max_words=30)))
        with pytest.raises(CheckpointError, match="vocabulary .40 entries, 0 here"):
            self.start(checkpoint, data=digits_data())
        with pytest.raises(CheckpointError, match="with no network discriminator in the file"):
            self.start(checkpoint, networks=["discriminator"])
        with pytest.raises(CheckpointError, match="no network encoder in this run"):
            self.start(checkpoint, networks=["encoder"])
        other = LanguageModel(TextGenerator(40, 10, embedding=6, hidden=9))
        with pytest.raises(CheckpointError, match="a generator that differs in kept.bias"):
            self.start(checkpoint, model=other)
        torch.save({"weights": torch.zeros(1)}, tmp_path / "plain.ckpt")
        with pytest.raises(CheckpointError, match="with no networks"):
            self.start(str(tmp_path / "plain.ckpt"))

    def test_what_was_agreed_between_sites_counts_in_a_simulation_and_the_other_way_round(self, checkpoint, tmp_path):
        state = torch.load(checkpoint, weights_only=True)
        state["RemoteDataModule"] = state.pop("FederatedDataModule")
        torch.save(state, tmp_path / "deployed.ckpt")
        self.start(str(tmp_path / "deployed.ckpt"))
        with pytest.raises(CheckpointError, match="another vocabulary"):
            self.start(str(tmp_path / "deployed.ckpt"), data=module(source=source(max_words=30)))

    def test_a_resumed_run_with_another_vocabulary_is_refused(self, checkpoint):
        state = torch.load(checkpoint, weights_only=True)["FederatedDataModule"]
        module().load_state_dict(state)
        with pytest.raises(CheckpointError, match="another vocabulary"):
            module(source=source(max_words=20)).load_state_dict(state)


class TestMetrics:
    def test_bleu_is_one_for_a_copy_and_nothing_without_a_known_word(self):
        references = References([["a", "b", "c", "d", "e"], ["f", "g"]])
        assert references.bleu(["a", "b", "c", "d", "e"]) == pytest.approx([1.0] * 5)
        assert references.bleu(["x", "y"]) == [0.0] * 5
        assert references.bleu([]) == [0.0] * 5
        assert references.bleu([UNKNOWN, "b"])[0] == pytest.approx(0.5)
        assert References([[UNKNOWN, "b"]]).bleu([UNKNOWN, "b"])[0] == pytest.approx(0.5), "unknown is not the same"

    def test_the_closed_form_with_a_brevity_penalty(self):
        references = References([["a", "b", "c", "a"]], largest=2)
        value = references.bleu(["a", "b", "b"])
        assert value == pytest.approx([math.exp(1 - 4 / 3) * 2 / 3, math.exp(1 - 4 / 3) * math.sqrt(2 / 3 / 2)])

    @given(texts, texts)
    @settings(deadline=None, max_examples=25)
    def test_self_bleu_leaves_exactly_the_sentence_out(self, first, second):
        sentences = [*first, *second]
        references = References(sentences)
        for place, sentence in enumerate(sentences):
            others = References([*sentences[:place], *sentences[place + 1 :]])
            assert references.bleu(sentence, place=place) == pytest.approx(others.bleu(sentence))

    @given(texts, texts)
    @settings(deadline=None, max_examples=10)
    def test_it_is_nltk_s(self, sentences, others):
        bleu = pytest.importorskip("nltk.translate.bleu_score", reason="compares with nltk, which is not installed")
        references, smooth = References(others), bleu.SmoothingFunction().method1
        for sentence in sentences:
            own = references.bleu(sentence)
            for n in (2, 3, 4, 5):
                theirs = bleu.sentence_bleu(others, sentence, weights=[1 / n] * n, smoothing_function=smooth)
                assert own[n - 1] == pytest.approx(theirs, abs=1e-12)

    def test_real_text_scores_far_above_shuffled_words_and_repetition_is_no_diversity(self):
        data = module()
        quality, diversity = BLEU(), SelfBLEU(max_sentences=20)
        facts = quality.prepare(data, device=CPU) | diversity.prepare(data, device=CPU)
        real = data.train_samples.x[:100]
        shuffled = real[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))]
        assert quality.compute(real, None)["bleu_3"] == pytest.approx(facts["bleu_3_of_reals"], abs=0.1)
        assert quality.compute(shuffled, None)["bleu_3"] < 0.5 * facts["bleu_3_of_reals"]
        known = real[(real != 1).all(1)][:1]
        same = diversity.compute(known.expand(20, -1), None)
        assert same["self_bleu_2"] == pytest.approx(1.0)
        assert same["self_bleu_2_of_reals"] < 0.95
        assert quality.compute(real[:1].expand(20, -1), None)["distinct"] == pytest.approx(0.05)

    def test_as_many_generated_sentences_are_compared_as_held_out_ones(self):
        """More sentences are more alike: 5 generated ones beside 20 real ones would look diverse."""
        data, metric = module(), SelfBLEU(max_sentences=500)
        assert metric.prepare(data, device=CPU) == {"self_bleu_num_sentences": 20}
        few, many = (metric.compute(drawn(data.test_samples.x, 20)[:count], None) for count in (5, 20))
        for found in (few, many):
            assert found["self_bleu_2"] == found["self_bleu_2_of_reals"], "the same sentences"
        assert few["self_bleu_2_of_reals"] < many["self_bleu_2_of_reals"]

    def test_likelihood_of_a_uniform_model_is_the_logarithm_of_the_vocabulary(self):
        data, own = module(), generator()
        metric = HeldOutLikelihood()
        assert metric.prepare(data, device=CPU)["num_words"] == 40
        torch.nn.init.zeros_(own.embedding.weight)
        assert metric.inspect(LanguageModel(own))["nll"] == pytest.approx(math.log(40), rel=1e-6)
        assert metric.inspect(text_gan(ema_half_life_images=10))["nll"] > 0
        assert metric.inspect(ring_gan()) == {}

    def test_text_has_its_metrics_by_default_and_other_data_does_not(self):
        data = module()
        data.setup()
        assert [type(metric) for metric in default_metrics(data)] == [HeldOutLikelihood, BLEU, SelfBLEU]
        with pytest.raises(ConfigurationError, match="BLEU must have text to read; got Ring without a vocabulary"):
            BLEU().prepare(ring_data(), device=CPU)
        with pytest.raises(ConfigurationError, match="max_sentences .* at least 2; got 1"):
            SelfBLEU(max_sentences=1)

    def test_networks_that_do_not_know_all_words_are_refused(self):
        metric = HeldOutLikelihood()
        metric.prepare(module(), device=CPU)
        with pytest.raises(ConfigurationError, match="got num_words=30, a vocabulary of 40"):
            metric.inspect(LanguageModel(generator(num_words=30)))

    def test_mean_over_sentences(self):
        references = References([["a", "b"]], largest=2)
        assert mean_bleu([["a", "b"], ["x"]], references) == pytest.approx({1: 0.5, 2: 0.5})
