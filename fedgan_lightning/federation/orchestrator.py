"""The orchestrator: a Lightning callback that owns the round.

One outer epoch is one round; the server module counts the rounds. Cohorts and seeds are pure functions of (seed, round,
client), so a resumed run repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L

from fedgan_lightning.checkpoints import FILES, AtomicCheckpointIO, folder_beside
from fedgan_lightning.errors import RoundInterrupted
from fedgan_lightning.federation.aggregation import WeightedMean
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.algorithms import FedGAN
from fedgan_lightning.federation.arrivals import Arrivals
from fedgan_lightning.federation.checks import (
    check_cohorts,
    check_data,
    check_device,
    check_optimizers,
    check_parts,
    checked_client_trainer,
    checked_trainer,
    checked_work,
)
from fedgan_lightning.federation.client_callbacks import check_callbacks
from fedgan_lightning.federation.client_privacy import ClientLevelPrivacy
from fedgan_lightning.federation.client_settings import Begun, begin, client_options, context_of
from fedgan_lightning.federation.continuation import take_over
from fedgan_lightning.federation.costs import CostLedger, cost_metrics
from fedgan_lightning.federation.distributed_noise import with_survivors
from fedgan_lightning.federation.exchange import hand_on
from fedgan_lightning.federation.executors import AutoExecutor, AutotunedExecutor
from fedgan_lightning.federation.kept_attributes import check_attributes
from fedgan_lightning.federation.known_data import known_of
from fedgan_lightning.federation.policy import Buffers, IntegerBuffers, OptimizerState, Policy, Sync, resolve
from fedgan_lightning.federation.preparation import finish
from fedgan_lightning.federation.privacy_checks import check_privacy
from fedgan_lightning.federation.privacy_keeper import PrivacyKeeper
from fedgan_lightning.federation.rank_watch import watch_ranks
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.real_arrivals import arrivals_of
from fedgan_lightning.federation.report import ClientClock, RoundReport, log_round
from fedgan_lightning.federation.round import RoundRunner
from fedgan_lightning.federation.round_schedules import LOCAL_STEPS, RoundSchedule, set_hyperparameters, steps_of
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.federation.run_fingerprint import RunFingerprint
from fedgan_lightning.federation.sampling import AllClients
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.stop_signals import StopSignals
from fedgan_lightning.federation.store import ClientStore, StateFiles
from fedgan_lightning.hooks import listeners
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import (
    Aggregator,
    ClientSampler,
    ClientTask,
    ClientUpdate,
    Executor,
    FederatedData,
    RoundInfo,
)
from fedgan_lightning.update_transform import UpdateTransform


class FederatedOrchestrator(L.Callback):
    """Runs federated rounds on the server's Trainer.

    Args:
        rounds: Rounds to complete.
        local_steps: Local steps K per round: minibatches, each one step of both networks. FedGAN's K.
        local_epochs: Passes over the client's data per round, instead of ``local_steps``.
        algorithm: What clients do beside training, and the server with their updates; default federated averaging.
        transforms: What becomes of an update on its way from a client to the aggregator, in this order.
        schedules: Hyper-parameters that are functions of the round, by name; see ``fedgan_lightning.schedules``.
        clients: Which clients take part in a round; default all.
        aggregator: How updates become one; default the mean weighted by N_k.
        rules: When a round counts; default when every client asked has answered.
        validator: Validates client updates; by default an invalid one ends the run.
        secure: Secure aggregation between the sites of a deployment; default none, the server sees every update.
        privacy: Client-level differential privacy; default none. What single examples need is ``model.privacy``.
        executor: Who runs the clients. ``auto`` decides by a fixed rule whether one after the other or stacked, and on
            how many threads; ``autotune`` measures what is fastest, so that rounding depends on what else the machine
            does.
        sync: For every network ``average`` (shared), ``local`` (private to each client), ``server`` (not on clients),
            or a placement that the algorithm knows; default ``average``. A pattern such as ``generator.style.*`` names
            entries inside a network.
        optimizer_state: What becomes of optimizer moments at a sync: ``average`` like the weights, ``keep`` on each
            client, or ``reset``. One word for all averaged networks, or one per network. Local networks keep theirs.
        buffers: Buffers of averaged networks: ``merge`` (BatchNorm with pooled variance), ``local`` (FedBN), or
            ``estimate``: local, and the server's generator gets statistics from its own samples.
        integer_buffers: What integer buffers (counters, such as those of moving averages) are merged into: their
            rounded ``mean``, weighted as updates are, or the ``max`` over clients.
        client_attributes: Plain attributes of somebody else's module that every client keeps from round to round, by
            dotted name: pools, counters. All others are put back before every client.
        client_callbacks: Lightning callbacks on clients' Trainers; each client keeps their state. Those on the server's
            Trainer are ``trainer.callbacks``.
        client_trainer: Options of clients' Trainers for modules with automatic optimization: ``gradient_clip_val``,
            ``gradient_clip_algorithm``, ``accumulate_grad_batches``; and ``detect_anomaly``.
        client_logs: Clients that log, in the folder ``client_logs`` of the run directory: those with numbers below
            this. What a module writes by ``self.log`` and ``self.logger`` is dropped for the others.
        client_state: Where private states of clients (local networks, kept moments) lie between rounds: ``memory``, or
            ``disk``, in the folder ``clients`` of the run directory. Checkpoints hold all of it, in that case in
            ``NAME.ckpt.files`` beside ``NAME.ckpt``.
        seed: Root seed of cohorts and of all randomness on clients.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    @checked(
        "federation",
        rounds="[1, inf)",
        local_steps="[1, inf)",
        local_epochs="[1, inf)",
        client_logs="[0, inf)",
        seed="[0, inf)",
    )
    def __init__(
        self,
        *,
        rounds: int = 50,
        local_steps: int | None = None,
        local_epochs: int | None = None,
        algorithm: FederatedAlgorithm | None = None,
        transforms: list[UpdateTransform] | None = None,
        schedules: dict[str, RoundSchedule] | None = None,
        clients: ClientSampler | None = None,
        aggregator: Aggregator | None = None,
        rules: RoundRules | None = None,
        validator: UpdateValidator | None = None,
        secure: SecureAggregation | None = None,
        privacy: ClientLevelPrivacy | None = None,
        executor: Executor | Literal["auto", "autotune"] = "auto",
        sync: dict[str, Sync] | None = None,
        optimizer_state: OptimizerState | dict[str, OptimizerState] = "average",
        buffers: Buffers = "merge",
        integer_buffers: IntegerBuffers = "mean",
        client_attributes: list[str] | None = None,
        client_callbacks: list[L.Callback] | None = None,
        client_trainer: dict[str, Any] | None = None,
        client_logs: int = 8,
        client_state: Literal["memory", "disk"] = "memory",
        seed: int = 0,
    ) -> None:
        local_steps = checked_work(local_steps=local_steps, local_epochs=local_epochs)
        self.rounds, self.local_steps, self.local_epochs = rounds, local_steps, local_epochs
        self.algorithm = algorithm if algorithm is not None else FedGAN()
        self.transforms, self.schedules = list(transforms or []), dict(schedules or {})
        self.clients = clients if clients is not None else AllClients()
        self.aggregator = aggregator if aggregator is not None else WeightedMean()
        self.rules, self.validator = rules if rules is not None else RoundRules(), validator
        self.rules.check(self.aggregator)
        self.secure, self.privacy = with_survivors(secure, privacy), privacy
        self.keeper: PrivacyKeeper | None = None  # of a run with privacy, once it has begun
        self.arrivals = Arrivals()
        if secure is not None:
            secure.check(aggregator=self.aggregator, rules=self.rules, validator=validator)
        named = {"auto": AutoExecutor, "autotune": AutotunedExecutor}
        self.executor: Executor = named[executor]() if isinstance(executor, str) else executor
        self.sync, self.optimizer_state, self.buffers, self.seed = sync, optimizer_state, buffers, seed
        self.integer_buffers, self.client_state, self.client_logs = integer_buffers, client_state, client_logs
        self.client_attributes, self.client_callbacks = list(client_attributes or ()), list(client_callbacks or ())
        check_callbacks(self.client_callbacks)
        self.client_trainer = checked_client_trainer(client_trainer or {})
        self.ledger, self.store = CostLedger(), ClientStore()
        #: Settings that a resumed run must share, as nested plain values; without them, what everything was made of.
        self.settings: dict[str, Any] = {}
        self.accept_changes, self.signals, self._clock = False, StopSignals(), ClientClock()
        self._restored: Mapping[str, Any] | None = None
        self._fingerprint, self._files_at = RunFingerprint(), Path()
        self._reports: list[RoundReport] = []
        self._round_started, self._cohort = 0.0, tuple[int, ...]()
        self._strikes: dict[int, int] = {}
        self._begun: Begun = (None, frozenset())
        self.ranks = Ranks()

    # ------------------------------------------------------------------ before the first round

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        server, data = self._checked(trainer, pl_module)
        watch_ranks(trainer)
        self._begun = begin(self, trainer, server.model, data, stage)
        policy = self.policy_of(server.model)
        server.attach(policy, self.algorithm, seed=self.seed, data=known_of(data, federation=self, model=server.model))
        check_parts(self, server.model, policy)
        check_privacy(self, server.model, policy, data, trainer if stage == "fit" else None)
        for line in policy.blind_spots(trained=self.algorithm.trains):
            warnings.warn(line, stacklevel=2)
        check_cohorts(self, data)
        check_data(server.model, data, trains=stage == "fit")
        self._restored = None  # a checkpoint that was looked at is none to continue from: that is read after this
        if stage == "fit":
            check_optimizers(server, self._begun[0])
            check_attributes(server.model, self.client_attributes)
            if trainer.precision == "64-true":
                server.double()  # Lightning does so after it has read a checkpoint, whose doubles pass through float32
            trainer.limit_val_batches = 0  # rounds are evaluated where they end, by callbacks
            trainer.fit_loop.max_epochs = -1
            trainer.fit_loop.epoch_loop.max_steps = -1  # rounds are counted, and not steps of optimizers
            server.rounds_planned = self.rounds

    def policy_of(self, module: L.LightningModule) -> Policy:
        """Return what travels of a module and what stays, as the settings say."""
        return resolve(
            module,
            sync=self.sync,
            optimizer_state=self.optimizer_state,
            buffers=self.buffers,
            integer_buffers=self.integer_buffers,
        )

    def _checked(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[ServerModule, FederatedData]:
        return checked_trainer(trainer, module, aggregator=self.aggregator)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        server, data = self._checked(trainer, pl_module)
        self.signals.number = None
        if self.client_state == "disk":
            folder = Path(trainer.default_root_dir) / "clients" / f"rank{trainer.global_rank}"
            self.store = ClientStore(StateFiles(folder))
        self.store.discard()
        self.ranks = Ranks.of(trainer)
        self.keeper = PrivacyKeeper.of(self, server.model, data, Path(trainer.default_root_dir))
        self.arrivals = arrivals_of(self, num_clients=data.num_clients)
        self._restore(server, data)
        if server.rounds_completed >= self.rounds:
            trainer.should_stop = True
        check_device(root := trainer.strategy.root_device)
        context = context_of(
            self,
            server.model,
            data,
            policy=server.policy,
            store=self.store,
            options=client_options(self, root, precision=trainer.precision),
            begun=self._begun,
            logs=Path(trainer.default_root_dir) / "client_logs",
        )
        context = replace(context, stop_requested=self.signals.is_set, ranks=self.ranks, arrivals=self.arrivals)
        if not server.algorithm_state:
            server.algorithm_state = dict(self.algorithm.server_state(context))
        self.executor.setup(context)
        self.runner = RoundRunner(
            context,
            executor=self.executor,
            aggregator=self.aggregator,
            sampler=self.clients,
            rules=self.rules,
            validator=self.validator,
            seed=self.seed,
            strikes=self._strikes,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch is a round. A resumed Trainer that counts in steps leaves its epochs one behind, and with them
        validation.
        """
        progress: Any = trainer.fit_loop.epoch_progress.current
        done = self._checked(trainer, pl_module)[0].rounds_completed
        progress.ready = progress.started = progress.processed = progress.completed = done
        self.signals.listen()  # after the Trainer has set its own handlers, which end the process at once

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.ignore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.ignore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.executor.teardown()
        preview, prepared = self._begun
        if preview is not None and isinstance(pl_module, ServerModule):
            finish(pl_module.model, prepared, stage=stage, trainer=preview)

    # ------------------------------------------------------------------ a round

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Run a round, and hand what came of it to the server."""
        server, _ = self._checked(trainer, pl_module)
        self._reports, self._round_started = [], time.perf_counter()
        if self.keeper is not None and self.keeper.is_exhausted(server.rounds_completed):
            trainer.should_stop, server.rounds_planned = True, server.rounds_completed
            return
        events = self.runner.run(server, self._task(server))
        try:
            for event in events:
                try:
                    self._fire(trainer, server, event)
                except Exception as error:
                    events.throw(error)  # type: ignore[attr-defined]  # what fails on one rank ends the round on all
        except RoundInterrupted:
            self._reports = []
            trainer.should_stop = True
            return
        report = self._reports[-1]
        assert report.total is not None
        self._clock.move(report)
        server.receive(report.total)

    def _task(self, server: ServerModule) -> ClientTask:
        """Return what all clients of the coming round get."""
        round = server.rounds_completed
        values = {name: schedule.value(round, self.rounds) for name, schedule in self.schedules.items()}
        secret = {} if self.keeper is None else self.keeper.hyperparameters
        set_hyperparameters(server.model, values)  # the server's samples are made by the same
        common = ClientTask(
            client_id=-1,
            round=round,
            seed=0,
            state=server.shared_state(),
            steps=self.local_steps,
            epochs=self.local_epochs,
            schedule_positions=self._clock.schedules,
            hyperparameters={name: value for name, value in {**values, **secret}.items() if name != LOCAL_STEPS},
            rounds=self.rounds,
            stepping=self._clock.stepping,
        )
        of_schedule: dict[str, Any] = steps_of(self.schedules, round, self.rounds)
        return replace(common, **of_schedule)

    def _fire(self, trainer: L.Trainer, server: ServerModule, event: RoundInfo | ClientUpdate | RoundReport) -> None:
        """Call the hooks of all callbacks for what happens in a round."""
        if self.privacy is not None:  # of single clients, and of who is asked, nobody hears
            if isinstance(event, ClientUpdate):
                return
            event = replace(event, cohort=()) if isinstance(event, RoundInfo) else event
        hooks = {RoundInfo: "on_round_start", ClientUpdate: "on_client_end", RoundReport: "on_attempt_end"}
        self._cohort = event.cohort if isinstance(event, RoundInfo) else self._cohort
        self._reports += [event] if isinstance(event, RoundReport) else []
        for hook in listeners(trainer.callbacks, hooks[type(event)]):  # type: ignore[attr-defined]
            hook(trainer, server, event)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make permanent what the round has changed, and call the hooks."""
        if not self._reports:
            return
        server, _ = self._checked(trainer, pl_module)
        report = self._reports[-1]
        self.store.commit()
        for attempt in self._reports:
            self.ledger.record(attempt)
        server.end_round(num_images=report.mean_images)
        seconds = time.perf_counter() - self._round_started
        self.ledger.round_seconds += seconds
        metrics = {**report.metrics(), **cost_metrics(self._reports, self.ledger), "round/seconds": seconds}
        metrics |= self.keeper.metrics() if self.keeper is not None else {}
        log_round(trainer, server, metrics, own_names=self._begun[0] is not None)
        if server.rounds_completed >= self.rounds:
            trainer.should_stop = True
        info = RoundInfo(report.round, cohort=self._cohort)
        for hook in listeners(trainer.callbacks, "on_round_end"):  # type: ignore[attr-defined]
            hook(trainer, server, info, metrics)
        if "exchange" in server.policy.placements.values():  # after the hooks, which look at what clients have trained
            clients = sorted(own.client_id for own in report.answered)
            moves = self.algorithm.hand_on(round=report.round, clients=clients, seed=self.seed)
            self.ledger.record_exchange(hand_on(self.store, moves, names=server.policy.is_exchanged))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self._fingerprint.settings,
            "identity": self._fingerprint.identity,
            "store": {} if self.store.files is not None else self.store.state_dict(),
            "ledger": self.ledger.state_dict(),
            "clock": self._clock.state_dict(),
            "executor": self.executor.state_dict(),
            "strikes": {str(client_id): count for client_id, count in self._strikes.items()},
            "arrivals": self.arrivals.state_dict(),
            "privacy": None if self.keeper is None else self.keeper.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have files of clients kept beside the checkpoint; within it, where somebody else's plugin writes it."""
        own, files = checkpoint["callbacks"][self.state_key], self.store.files
        if files is None:
            return
        if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            own["store_files"] = {str(client_id): name for client_id, name in files.names.items()}
            checkpoint[FILES] = {"folder": str(files.folder), "names": list(files.names.values())}
        else:
            own["store"] = self.store.state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._files_at = folder_beside(trainer.ckpt_path or "")

    def _restore(self, server: ServerModule, data: FederatedData) -> None:
        """Take over what a checkpoint holds, after checking that it belongs to this federation.

        Raises:
            CheckpointError: If it does not.
        """
        self._fingerprint = RunFingerprint.of(self, server, data)
        if self._restored is None:
            self.ledger, self._clock, self._strikes = CostLedger(), ClientClock(), {}
            self.store.load_state_dict({})
            self.executor.load_state_dict({})
            server.begin()
            if self.keeper is not None:
                self.keeper.restore(None)
            return
        state, self._restored = self._restored, None
        take_over(self, state, server.rounds_completed)
