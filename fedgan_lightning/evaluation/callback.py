"""The evaluation callback: draws samples from the global generator once, hands them to every metric, logs the values.

In training it works at the end of a round, and not in Lightning's validation loop: a Trainer that is resumed from a
checkpoint skips that loop in its first epoch (measured), and with it a value. ``validate`` and ``test`` work as usual.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import quantise
from fedgan_lightning.errors import (
    ConfigurationError,
    OutOfRangeError,
    QuorumError,
    RefusedError,
    SampleSizeError,
    message,
)
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.evaluation.watchers import check_watchers
from fedgan_lightning.federation.preparation import is_foreign
from fedgan_lightning.federation.sample_source import SampleWith, sampler_of, trial
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.hooks import SampleSource, completed_rounds, offers, planned_rounds
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

logger = logging.getLogger("fedgan_lightning")


class Evaluation(L.Callback):
    """Evaluates the global generator.

    Args:
        metrics: What to measure; default what suits the data. Those that take long are left to ``test``.
        every_n_rounds: Rounds between evaluations; the untrained generator and the last round are always scored.
        num_samples: Generated samples per evaluation.
        seed: Seed of the latents: the same in every evaluation, so that curves compare.
        raw: Also evaluate the raw weights where there is a moving average, as ``NAME_raw``.
        sample_with: How somebody else's module is sampled: a function of the module and the number of samples. Without
            one it is looked for: ``sample`` with whatever names its arguments have, or ``forward(z)`` with a
            ``latent_dim``.

    Attributes:
        facts: What is true of the whole run: floors, sample counts, hash of the feature network.
        history: Values of every evaluation, with the number of completed ``rounds``.
        latest: Values of the last evaluation, in whichever command.
        extra_metrics: Metrics that a command adds to those of the settings.
        left_out: Metrics that cannot be taken here, because clients' samples are elsewhere, or too few for a metric
            that nobody asked for by name.
    """

    @checked("evaluation", every_n_rounds="[1, inf)", num_samples="[2, inf)", seed="[0, inf)")
    def __init__(
        self,
        *,
        metrics: Sequence[Metric] | None = None,
        every_n_rounds: int = 10,
        num_samples: int = 2500,
        seed: int = 0,
        raw: bool = False,
        sample_with: SampleWith | None = None,
    ) -> None:
        self.metrics = None if metrics is None else list(metrics)
        self._asked = metrics is not None
        self.every_n_rounds, self.num_samples, self.seed, self.raw = every_n_rounds, num_samples, seed, raw
        self.sample_with = sample_with
        self.facts: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}
        self.extra_metrics: list[Metric] = []
        self.left_out: list[str] = []
        self._ready: list[Metric] = []
        self._data: FederatedDataModule | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "has_samples", False):
            self._go_without_samples(data)
            return
        if data is not self._data:
            self._data, self._ready, self.facts, self.left_out = data, [], {}, []
        if self.metrics is None:
            self.metrics = default_metrics(data, condition=_condition(pl_module))
        self.metrics += [own for own in self.extra_metrics if own not in self.metrics]
        if not data.has_client_samples:
            self._leave_out([own for own in self.metrics if own.needs_client_samples], "clients' samples are elsewhere")
        if not data.has_server_samples:
            blind = [own for own in self.metrics if own.needs_server_samples]
            self._leave_out(blind, "the server has no samples of its own")
        if isinstance(pl_module, ServerModule) and (self.metrics or not offers(pl_module.model, SampleSource)):
            self._find_samples(pl_module, data)
        _warn_of_silence(pl_module, self.metrics)
        self.facts["num_samples"] = self.num_samples
        self._prepare(trainer)

    def _leave_out(self, metrics: Sequence[Metric], why: str) -> None:
        """Go without these metrics, by name."""
        if metrics:
            assert self.metrics is not None
            names = [type(own).__name__ for own in metrics]
            self.metrics = [own for own in self.metrics if own not in metrics]
            self.left_out += names
            logger.info(f"not measured, because {why}: {', '.join(names)}")

    def _go_without_samples(self, data: Any) -> None:
        """Measure nothing, where nobody can say what real samples are.

        Raises:
            ConfigurationError: If metrics were asked for.
        """
        if self.metrics:
            raise ConfigurationError(
                message(
                    "metrics must have data whose samples are at hand, as a FederatedDataModule has them",
                    received=f"evaluation.metrics of {type(data).__name__}",
                    fix="set evaluation.metrics to []",
                )
            )
        logger.info(f"nothing is measured: {type(data).__name__} has no samples at hand to compare with")
        self.metrics, self._data, self._ready = [], None, []

    def _find_samples(self, server: ServerModule, data: FederatedDataModule) -> None:
        """Find out how the module is sampled, and go without samples where they are of no use."""
        server.sample_with, server.cannot_sample = self.sample_with, ""
        if isinstance(server.model, GAN) or not server.can_sample:
            return
        sampler = sampler_of(server.model, self.sample_with)
        assert sampler is not None
        server.cannot_sample = trial(sampler, data.sample_shape) or ""
        if server.cannot_sample:
            logger.warning(
                f"no samples of {type(server.model).__name__} are measured or drawn: {server.cannot_sample}. "
                "Set evaluation.sample_with to a function of the module and the number of samples"
            )

    def _prepare(self, trainer: L.Trainer) -> None:
        """Prepare the metrics that are not ready: leave out those that cannot be taken here, and leave those for later
        for which some site does not answer.
        """
        assert self.metrics is not None
        data: FederatedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        for metric in list(self.metrics):
            if metric in self._ready or (metric.test_only and trainer.state.fn != "test"):
                continue
            try:
                self.facts |= metric.prepare(data, device=trainer.strategy.root_device)
            except (
                OutOfRangeError,
                SampleSizeError,
                RefusedError,
            ) as error:  # of sums that sites cannot tell
                if isinstance(error, SampleSizeError) and self._asked and data.has_server_samples:
                    raise
                self.metrics.remove(metric)
                self.left_out.append(type(metric).__name__)
                logger.warning(f"{type(metric).__name__} is not measured: {error}")
            except QuorumError as error:  # of somebody whose samples are elsewhere, and who must not end the run
                logger.warning(f"{type(metric).__name__} has to wait: {error}")
            else:
                self._ready.append(metric)

    @property
    def waiting(self) -> list[str]:
        """Metrics that some site has not answered for yet."""
        return [type(own).__name__ for own in self.metrics or () if own not in self._ready and not own.test_only]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the untrained generator: what training must be compared with.

        Raises:
            ConfigurationError: If a callback watches a metric in rounds in which it is not measured.
        """
        if completed_rounds(trainer) == 0:
            self._prepare(trainer)
            self._log(trainer, pl_module, self.evaluate(trainer, pl_module), monitor=False)
        measured = {name for entry in self.history for name in entry} - {"rounds"}
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        is_known = isinstance(pl_module, ServerModule) and not is_foreign(pl_module.model)
        is_known = is_known and not self.waiting
        check_watchers(callbacks, measured=measured, every_n_rounds=self.every_n_rounds, is_known=is_known)

    def on_round_end(self, trainer: L.Trainer, server: ServerModule, info: Any, metrics: Any) -> None:
        """Score the generator every ``every_n_rounds``, and at the end."""
        rounds = completed_rounds(trainer)
        if rounds % self.every_n_rounds == 0 or rounds == planned_rounds(trainer):
            self._prepare(trainer)
            self._log(trainer, server, self.evaluate(trainer, server), monitor=True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, self.evaluate(trainer, pl_module), monitor=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, self.evaluate(trainer, pl_module), monitor=True)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Return the values of all metrics, the same on all ranks, without those for which some site does not answer.

        Args:
            trainer: The server's.
            pl_module: The server.
        """
        assert isinstance(pl_module, ServerModule)
        metrics = [metric for metric in self._ready if trainer.state.fn == "test" or not metric.test_only]
        values: dict[str, float] = {}
        for metric in metrics:
            if any(map(pl_module.policy.is_private, metric.networks)):
                continue
            try:
                values |= metric.inspect(pl_module.model)
            except QuorumError as error:
                name = type(metric).__name__
                logger.warning(f"{name} is not measured after round {completed_rounds(trainer)}: {error}")
        if pl_module.can_sample and metrics:
            data: FederatedDataModule = trainer.datamodule  # type: ignore[attr-defined]
            values |= self._score_samples(metrics, data, pl_module)
        same_everywhere: dict[str, float] = trainer.strategy.broadcast(values)  # hosts may round differently
        return same_everywhere

    def _score_samples(
        self, metrics: Sequence[Metric], data: FederatedDataModule, pl_module: ServerModule
    ) -> dict[str, float]:
        """Return what metrics say of generated samples: by the moving average, and by raw weights if asked."""
        labels = data.labels_like_union(self.num_samples, generator=make_generator(self.seed, "evaluation labels"))
        requested = labels if getattr(pl_module.model, "num_classes", 0) else None
        values: dict[str, float] = {}
        averaged = getattr(pl_module.model, "generator_ema", None) is not None
        for suffix, options in (("", {}), *([("_raw", {"raw": True})] if self.raw and averaged else [])):
            generator = make_generator(self.seed, "evaluation latents")
            samples = pl_module.sample(self.num_samples, labels=labels, generator=generator, **options)
            if data.train_samples.is_image:
                samples = quantise(samples)
            for metric in metrics:
                values |= {f"{name}{suffix}": value for name, value in metric.compute(samples, requested).items()}
        return values

    def _log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, values: dict[str, float], *, monitor: bool
    ) -> None:
        rounds = completed_rounds(trainer)
        if trainer.state.fn == "fit":
            self.history = [entry for entry in self.history if entry["rounds"] < rounds]
            self.history.append({"rounds": float(rounds), **values})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=rounds)
        if monitor:
            options: dict[str, Any] = {"on_epoch": True, "on_step": False, "logger": False, "batch_size": 1}
            pl_module.log_dict(values, prog_bar=True, sync_dist=trainer.world_size > 1, **options)
        self.latest = values
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            for name, value in values.items():
                print(f"{name:>24}  {value:.6g}")

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(entry) for entry in state_dict["history"]]


def _condition(pl_module: L.LightningModule) -> Any:
    """Return the condition that the server's generator gets beside noise; ``None`` of most."""
    return getattr(pl_module.model, "condition", None) if isinstance(pl_module, ServerModule) else None


def _warn_of_silence(pl_module: L.LightningModule, metrics: Sequence[Metric]) -> None:
    """Say so where nothing will be measured."""
    if metrics and isinstance(pl_module, ServerModule) and sampler_of(pl_module.model, pl_module.sample_with) is None:
        name = type(pl_module.model).__name__
        warnings.warn(
            f"{name} has no sample method that can be called with a number of samples: there are no sample metrics and "
            "no pictures of it. Set evaluation.sample_with to a function that draws them",
            stacklevel=3,
        )
    if metrics and _condition(pl_module) and all(type(own).inspect is Metric.inspect for own in metrics):
        warnings.warn(
            "a generator that needs conditions makes no samples from noise alone: "
            f"{', '.join(type(own).__name__ for own in metrics)} measure nothing. "
            "Set evaluation.metrics to what reads the model itself, such as Completion or RankingQuality",
            stacklevel=3,
        )
