"""The orchestrator: a Lightning callback that owns the round.

One outer epoch is one round; the number of completed rounds is the server Trainer's ``global_step``. Cohorts and seeds
are pure functions of (seed, round, client), so a resumed run repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L

from fedgan_lightning.checkpoints import FILES, AtomicCheckpointIO, folder_beside
from fedgan_lightning.errors import CheckpointError, RoundInterrupted, message
from fedgan_lightning.federation.aggregation import WeightedMean
from fedgan_lightning.federation.checks import (
    check_cohort,
    check_device,
    check_optimizers,
    checked_trainer,
    checked_work,
)
from fedgan_lightning.federation.conduct import Conductor, Outcome
from fedgan_lightning.federation.costs import EVENTS, Ledger
from fedgan_lightning.federation.executors import AutoExecutor, AutotunedExecutor
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.federation.policy import Buffers, OptimizerState, Sync, resolve
from fedgan_lightning.federation.ranks import Ranks, leave_at_exit
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.federation.run_fingerprint import check_same_data, check_unchanged, given_to, made_of
from fedgan_lightning.federation.sampling import AllClients
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.store import ClientStore, StateFiles
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import (
    Aggregator,
    ClientSampler,
    Executor,
    FederatedData,
    LocalWork,
    listeners,
)

#: Rounds whose cohorts are looked at before the first one.
LOOKED_AT = 8


class FederatedOrchestrator(L.Callback):
    """Runs federated rounds on the server's Trainer.

    Args:
        rounds: Rounds to complete.
        local_steps: Local steps K per round: minibatches, each one step of both networks. FedGAN's K.
        local_epochs: Passes over the client's data per round, instead of ``local_steps``.
        clients: Which clients take part in a round; default all.
        aggregator: How updates become one; default the mean weighted by N_k.
        rules: When a round counts; default when every client asked has answered.
        validator: Which updates are let in; by default one that cannot be right ends the run.
        secure: Secure aggregation between the sites of a deployment; default none, the server sees every update.
        executor: Who runs the clients. ``auto`` decides by a fixed rule whether one after the other or stacked, and on
            how many threads; ``autotune`` measures what is fastest, so that rounding depends on what else the machine
            does.
        sync: For every network ``average`` (shared), ``local`` (private to each client) or ``server`` (not on
            clients); default ``average``.
        optimizer_state: What becomes of optimizer moments at a sync: ``average`` like the weights, ``keep`` on each
            client, or ``reset``. One word for all averaged networks, or one per network. Local networks keep theirs.
        buffers: Buffers of averaged networks: ``merge`` (BatchNorm with pooled variance, integers by their rounded
            mean), ``local`` (FedBN), or
            ``estimate``: local, and the server's generator gets statistics from its own samples.
        client_state: Where private states of clients (local networks, kept moments) lie between rounds: ``memory``, or
            ``disk`` for large populations, in the folder ``clients`` of the run directory. Checkpoints hold all of it:
            what lies on disk, in the folder ``NAME.ckpt.files`` beside ``NAME.ckpt``.
        seed: Root seed of cohorts and of all randomness on clients.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    @checked("federation", rounds="[1, inf)", local_steps="[1, inf)", local_epochs="[1, inf)", seed="[0, inf)")
    def __init__(
        self,
        *,
        rounds: int = 50,
        local_steps: int | None = None,
        local_epochs: int | None = None,
        clients: ClientSampler | None = None,
        aggregator: Aggregator | None = None,
        rules: RoundRules | None = None,
        validator: UpdateValidator | None = None,
        secure: SecureAggregation | None = None,
        executor: Executor | Literal["auto", "autotune"] = "auto",
        sync: dict[str, Sync] | None = None,
        optimizer_state: OptimizerState | dict[str, OptimizerState] = "average",
        buffers: Buffers = "merge",
        client_state: Literal["memory", "disk"] = "memory",
        seed: int = 0,
    ) -> None:
        local_steps = checked_work(local_steps=local_steps, local_epochs=local_epochs)
        self.rounds, self.local_steps, self.local_epochs = rounds, local_steps, local_epochs
        self.clients = clients if clients is not None else AllClients()
        self.aggregator = aggregator if aggregator is not None else WeightedMean()
        self.rules, self.validator = rules if rules is not None else RoundRules(), validator
        self.rules.check(self.aggregator)
        self.secure = secure
        if secure is not None:
            secure.check(aggregator=self.aggregator, rules=self.rules, validator=validator)
        named = {"auto": AutoExecutor, "autotune": AutotunedExecutor}
        self.executor: Executor = named[executor]() if isinstance(executor, str) else executor
        self.sync, self.optimizer_state, self.buffers, self.seed = sync, optimizer_state, buffers, seed
        self.client_state = client_state
        self.ledger, self.store = Ledger(), ClientStore()
        #: Settings that a resumed run must share, as nested plain values; without them, what everything was made of.
        self.settings: dict[str, Any] = {}
        #: Signal that asked to stop, if any.
        self.stop_signal: int | None = None
        self._schedule_positions: tuple[int, ...] = ()
        self._restored: Mapping[str, Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._outcome: Outcome | None = None
        self._round_started = 0.0
        self._strikes: dict[int, int] = {}
        self._ranks = Ranks()

    # ------------------------------------------------------------------ before the first round

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        server, data = self._checked(trainer, pl_module)
        if trainer.world_size > 1:
            leave_at_exit()
        policy = resolve(server.model, sync=self.sync, optimizer_state=self.optimizer_state, buffers=self.buffers)
        server.attach(policy)
        for line in policy.blind_spots():
            warnings.warn(line, stacklevel=2)
        # Cohorts that cannot be sampled, or are always too small, fail here; one that is so by chance is filled up.
        rounds = range(min(LOOKED_AT, self.rounds))
        cohorts = [self.clients.sample(num_clients=data.num_clients, round=r, seed=self.seed) for r in rounds]
        size = max(map(len, cohorts))
        check_cohort(size, aggregator=self.aggregator)
        if self.secure is not None:
            self.secure.check_cohort(size, sums_only=self.executor.sums_only)
        model: Any = server.model
        if hasattr(model, "check_data") and hasattr(data, "sample_shape"):
            model.check_data(data.sample_shape, getattr(data, "num_classes", 0))
        self._restored = None  # a checkpoint that was looked at is none to continue from: that is read after this
        if stage == "fit":
            check_optimizers(server)
            if trainer.precision == "64-true":
                server.double()  # Lightning does so after it has read a checkpoint, whose doubles pass through float32
            trainer.limit_val_batches = 0  # rounds are evaluated where they end, by callbacks
            trainer.fit_loop.max_epochs = -1
            trainer.fit_loop.epoch_loop.max_steps = self.rounds

    def _checked(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[ServerModule, FederatedData]:
        return checked_trainer(trainer, module, aggregator=self.aggregator)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        server, data = self._checked(trainer, pl_module)
        self.stop_signal = None
        if self.client_state == "disk":
            folder = Path(trainer.default_root_dir) / "clients" / f"rank{trainer.global_rank}"
            self.store = ClientStore(StateFiles(folder))
        self.store.discard()
        self._restore(server, data)
        root = trainer.strategy.root_device
        check_device(root)
        local = getattr(trainer, "num_devices", 1)
        self._ranks = Ranks(
            rank=trainer.global_rank, world_size=trainer.world_size, local_world_size=local, device=root
        )
        options: dict[str, Any] = {"accelerator": root.type, "precision": trainer.precision}
        options["devices"] = 1 if root.index is None else [root.index]
        context = ClientContext(
            model=server.model,
            data=data,
            policy=server.policy,
            store=self.store,
            trainer_options=options,
            stop_requested=self._stop_requested,
            ranks=self._ranks,
        )
        self.executor.setup(context)
        self.conductor = Conductor(
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
        progress.ready = progress.started = progress.processed = progress.completed = trainer.global_step
        self._listen_for_signals()  # after the Trainer has set its own handlers, which end the process at once

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_listening()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.executor.teardown()

    # ------------------------------------------------------------------ a round

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        server, _ = self._checked(trainer, pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        starters, watchers = listeners(callbacks, "on_round_start"), listeners(callbacks, "on_client_end")
        keepers = listeners(callbacks, "on_try_end")
        self._outcome, self._round_started = None, time.perf_counter()
        try:
            outcome = self.conductor.conduct(
                round=trainer.global_step,
                state=server.shared_state(),
                work=LocalWork(
                    steps=self.local_steps, epochs=self.local_epochs, schedule_positions=self._schedule_positions
                ),
                on_start=lambda info: [hook(trainer, server, info) for hook in starters],
                on_update=lambda update: [hook(trainer, server, update) for hook in watchers],
                on_try=lambda roll_call: [hook(trainer, server, roll_call) for hook in keepers],
            )
        except RoundInterrupted:
            self.store.discard()
            trainer.should_stop = True
            return
        self._schedule_positions = outcome.summary.schedule_positions or self._schedule_positions
        server.receive(outcome.aggregate)
        self._outcome = outcome

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._outcome is None:
            return
        server, _ = self._checked(trainer, pl_module)
        info, summary = self._outcome.info, self._outcome.summary
        self.store.commit()
        self.ledger.add(self._outcome.ledger)
        server.end_round(num_images=summary.mean_images)
        seconds = time.perf_counter() - self._round_started
        self.ledger.round_seconds += seconds
        metrics = summary.metrics(self._outcome.aggregate)
        metrics |= {"round/seconds": seconds, "round/clients": float(len(summary.records))}
        metrics |= {f"round/{kind}": float(self._outcome.ledger.events.get(kind, 0)) for kind in EVENTS}
        metrics |= {"round/asked": float(self._outcome.ledger.client_asks), **self.executor.gauges()}
        metrics["round/client_steps_per_second"] = self.ledger.client_steps_per_second
        for direction, totals in (("down", self.ledger.bytes_down), ("up", self.ledger.bytes_up)):
            metrics |= {f"bytes/{direction}/{network}": float(total) for network, total in totals.items()}
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (info.round + 1) % every == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=info.round + 1)
        shown = {name: metrics[name] for name in metrics if name.startswith("train/loss")}
        server.log_dict(
            shown, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=trainer.world_size > 1
        )
        for hook in listeners(trainer.callbacks, "on_round_end"):  # type: ignore[attr-defined]
            hook(trainer, server, info, metrics)

    # ------------------------------------------------------------------ stopping

    def _stop_requested(self) -> bool:
        return self.stop_signal is not None

    def _listen_for_signals(self) -> None:
        """First Ctrl-C or SIGTERM: give the round up and end cleanly. Second Ctrl-C: end at once."""
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, handle)

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self._made_of,
            "identity": self._identity,
            "store": {} if self.store.files is not None else self.store.state_dict(),
            "ledger": self.ledger.state_dict(),
            "schedule_positions": list(self._schedule_positions),
            "moments": self._moments(),
            "executor": self.executor.state_dict(),
            "strikes": {str(client_id): count for client_id, count in self._strikes.items()},
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

    _identity: Mapping[str, Any] = {}
    _made_of: Mapping[str, Any] = {}
    _files_at = Path()
    _server: ServerModule | None = None

    def _moments(self) -> dict[str, Any]:
        return {} if self._server is None else dict(self._server.moments)

    def _restore(self, server: ServerModule, data: FederatedData) -> None:
        """Take over what a checkpoint holds, after checking that it belongs to this federation.

        Raises:
            CheckpointError: If it does not.
        """
        self._server = server
        self._identity = {
            "data": data.fingerprint(),
            "sync": dict(server.policy.sync),
            "optimizer_state": dict(server.policy.optimizer_state),
            "buffers": self.buffers,
            "local_steps": self.local_steps,
            "local_epochs": self.local_epochs,
            "seed": self.seed,
        }
        own = ("clients", "aggregator", "rules", "validator", "secure")
        held = ("num_clients", "partition", "batch_size", "max_samples")
        self._made_of = self.settings or {
            "model": {"type": type(server.model).__qualname__, **made_of(given_to(server.model))},
            "data": {name: made_of(getattr(data, name)) for name in held if hasattr(data, name)},
            "federation": {name: made_of(getattr(self, name)) for name in own},
            "server": {"optimizer": made_of(server.optimizer), "scheduler": made_of(server.scheduler)},
        }
        if self._restored is None:
            self.ledger, self._schedule_positions, self._strikes = Ledger(), (), {}
            self.store.load_state_dict({})
            self.executor.load_state_dict({})
            server.moments = {}
            return
        state, self._restored = self._restored, None
        try:
            self._take_over(state, server)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                message(
                    "a checkpoint has the state of an orchestrator of this version",
                    received=f"one that differs in {type(error).__name__}: {error}",
                    fix="continue it with the version that wrote it",
                )
            ) from error

    def _take_over(self, state: Mapping[str, Any], server: ServerModule) -> None:
        known = {group: values for group, values in state["settings"].items() if group in self._made_of}
        check_unchanged(known, {group: self._made_of[group] for group in known})  # these say what was changed
        check_same_data(state["identity"]["data"], self._identity["data"])
        check_unchanged(state["identity"], self._identity)
        if "store_files" in state:
            self.store.load_files(state["store_files"], self._files_at)
        else:
            self.store.load_state_dict(state["store"])
        self.ledger.load_state_dict(state["ledger"])
        self._schedule_positions = tuple(state["schedule_positions"])
        server.moments = dict(state["moments"])
        self.executor.load_state_dict(state["executor"])
        self._strikes = {int(client_id): count for client_id, count in state["strikes"].items()}
