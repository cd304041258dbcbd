"""What happens at a site: build the client's module and its own data from its own settings, and do a task.

Flower starts a process for every message, so what must last lies on the site's disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.held_out import HeldOutBatches, divided
from fedgan_lightning.data.order import steps_per_epoch
from fedgan_lightning.data.samples import BatchStream, ClientSamples
from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.secure_users import CLEAR
from fedgan_lightning.deployment.session import Session, summand_to_content
from fedgan_lightning.errors import ConfigurationError, UpdateError, message
from fedgan_lightning.evaluation.federated_queries import COUNT, FeatureMoments, QueryContext
from fedgan_lightning.evaluation.fidelity import ThirdPowers
from fedgan_lightning.evaluation.ranking import ItemCounts, Rankings
from fedgan_lightning.federation.aggregation import checked_states
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.checks import CLIENT_TRAINER, same_precision
from fedgan_lightning.federation.client_settings import begin, client_options, context_of
from fedgan_lightning.federation.client_update import ClientContext
from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.optimizer_state import only_moments
from fedgan_lightning.federation.report import is_position, lengths
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.hooks import DataHook, offers
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State
from fedgan_lightning.states import frozen, network_of
from fedgan_lightning.version import __version__

#: Private states that a site keeps, for a server that goes back to an older checkpoint.
STATES_KEPT = 20
#: What a site answers about its samples, and nothing else; see :mod:`fedgan_lightning.evaluation.federated_queries`.
QUERIES = {query.kind: query for query in (FeatureMoments, ThirdPowers, ItemCounts, Rankings)}
#: Sums over fewer samples say nearly what the samples are.
FEWEST_SAMPLES = 10
#: Settings of ``federation`` that both sides must share.
SHARED: tuple[str, ...] = ("local_steps", "local_epochs", "algorithm", "transforms", "sync", "optimizer_state")
SHARED += ("buffers", "integer_buffers", "client_attributes", "client_callbacks", "client_trainer")


class SiteData:
    """The data of one site, as an executor asks for it; the site is client ``client_id`` of the federation."""

    def __init__(
        self, view: ClientSamples, held_out: ClientSamples, *, client_id: int, data: FederatedDataModule
    ) -> None:
        self.view, self.held_out, self.client_id = view, held_out, client_id
        self.batch_size, self.seed, self.drop_last = data.batch_size, data.seed, data.drop_last
        self.validation_share = data.validation_share
        self.sample_shape, self.num_classes, self.class_names = data.sample_shape, data.num_classes, data.class_names

    @property
    def num_clients(self) -> int:
        return 1

    def num_examples(self, client_id: int) -> int:
        return len(self.view)

    def steps_per_epoch(self, client_id: int) -> int:
        return steps_per_epoch(len(self.view), batch_size=self.batch_size, drop_last=self.drop_last)

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> BatchStream:
        return BatchStream(
            self.view,
            batch_size=self.batch_size,
            seed=self.seed,
            stream=self.client_id,
            first_step=first_step,
            num_steps=num_steps,
            drop_last=self.drop_last,
        )

    def client_validation_batches(self, client_id: int) -> HeldOutBatches | None:
        return HeldOutBatches(self.held_out, batch_size=self.batch_size) if len(self.held_out) else None

    def fingerprint(self) -> str:
        return f"site {self.client_id}"


@dataclass(frozen=True)
class Rehearsal:
    """What a step of training costs at a site.

    Attributes:
        seconds: The step's, with the start of its Trainer.
        device: Where it was done.
        bytes_down: Of a task, with the moments that later ones bring, by network.
        bytes_up: Of an update, by network.
    """

    seconds: float
    device: str
    bytes_down: Mapping[str, int]
    bytes_up: Mapping[str, int]


class Site:
    """A site, ready for one message.

    Args:
        arguments: Options of the command line: the configuration, and what is different at this site.
        client_id: Its number in the federation.
        state_dir: Folder for its private state.
        part: Which part of the configured partition is its data; ``None`` takes all that the source holds.
    """

    def __init__(
        self, arguments: Sequence[str], *, client_id: int, state_dir: str | Path, part: int | None = None
    ) -> None:
        from fedgan_lightning.cli import built

        cli = built(arguments)
        self.client_id, self.state_dir = client_id, Path(state_dir) / f"client{client_id:05d}"
        self.module, self.orchestrator = cli.model.model, cli.orchestrator
        self.trainer = cli.trainer
        data: FederatedDataModule = cli.datamodule
        data.prepare_data()
        if part is None and not data.source.has_shared_metadata:
            raise ConfigurationError(
                message(
                    "sites must agree on what samples mean before they train",
                    received=f"a {type(data.source).__name__} without its list of words or items",
                    fix="name the same data.source.vocabulary (text) or items (interactions) everywhere",
                )
            )
        if part is None:
            everything, stream = np.arange(len(data.train_samples)), {"seed": data.seed, "stream": client_id}
            divisions = map(torch.from_numpy, divided(everything, data.validation_share, **stream))
            view, held_out = (ClientSamples(samples=data.train_samples, indices=own) for own in divisions)
        else:
            view, held_out = data.client_samples(part), data.held_out_samples(part)
        self.whole, self.digest = data, digest_of(cli.plain_settings, data, self.module)
        self.data = SiteData(view, held_out, client_id=client_id, data=data)
        self.begun = begin(self.orchestrator, self.trainer, self.module, self.data, "fit")
        if offers(self.module, DataHook):
            self.module.check_data(data.sample_shape, data.num_classes)  # type: ignore[operator]

    @classmethod
    def of(
        cls, config: str, *, own: str | None, client_id: int, state_dir: str | Path, options: Sequence[str] = ()
    ) -> Site:
        """Return the site that these settings describe.

        Args:
            config: The federation's configuration file.
            own: A second one with what differs at this site, which counts; without it the site holds the part of the
                configured partition that has its number.
            client_id: Its number in the federation.
            state_dir: Folder for its private state.
            options: Of the command line, beside the first file.
        """
        arguments = ["--config", config, *options, *(("--config", own) if own is not None else ())]
        return cls(arguments, client_id=client_id, state_dir=state_dir, part=client_id if own is None else None)

    def facts(self) -> dict[str, Any]:
        """Return what the server may know: sizes, counts of labels, and the hash of what all share."""
        labels = self.data.view.samples.y
        counts = [len(self.data.view)]
        if labels is not None and self.whole.num_classes:
            counts = torch.bincount(labels[self.data.view.indices], minlength=self.whole.num_classes).tolist()
        size = len(self.data.view)
        return {"client_id": self.client_id, "num_examples": size, "label_counts": counts, "digest": self.digest}

    def train(self, task: ClientTask, *, accepted: int, digest: str) -> ClientUpdate:
        """Do a task.

        Args:
            task: The task.
            accepted: Seed of the last task whose update counted: the private state goes on from there.
            digest: The server's hash of what all share.

        Raises:
            ConfigurationError: If something of it differs from the server's.
            UpdateError: If the update is not finite.
        """
        if digest != self.digest:
            raise ConfigurationError(
                message(
                    f"server and sites must share {wire.SHARED}",
                    received=f"{self.digest} here, {digest} at the server",
                    fix="give all of them the same configuration file, class_names and list of words or items",
                )
            )
        store = ClientStore()
        store.load_state_dict({str(task.client_id): self._private(accepted)} if accepted >= 0 else {})
        update = self._run(task, self._context(store))
        store.commit()
        self._keep(task.seed, store.read(task.client_id), accepted)
        return update

    def rehearse(self) -> Rehearsal:
        """Train one step from the module as it is built, without moments; keep nothing and send nothing.

        Raises:
            ClientError: If training fails.
            UpdateError: If the update is not finite.
        """
        # What the algorithm sends beside the networks is the server's to know.
        context = replace(self._context(ClientStore()), algorithm=FederatedAlgorithm(), logs=None)
        state, sent = self.module.state_dict(), context.policy.downlink_entries
        task = ClientTask(
            client_id=self.client_id,
            round=0,
            seed=self.data.seed,
            state={name: state[name].detach().clone() for name in sent},
            steps=1,
        )
        update = self._run(task, context)
        return Rehearsal(
            seconds=update.metrics["seconds"],
            device=str(context.device),
            bytes_down=bytes_by_network({**task.state, **only_moments(update.extras)}),
            bytes_up=bytes_by_network({**update.delta, **update.extras}),
        )

    def _context(self, store: ClientStore) -> ClientContext:
        federation, root = self.orchestrator, self.trainer.strategy.root_device
        context = context_of(
            federation,
            self.module,
            self.data,
            policy=federation.policy_of(self.module),
            store=store,
            options=client_options(federation, root, precision=self.trainer.precision),
            begun=self.begun,
            logs=self.state_dir / "client_logs",
        )
        return replace(context, num_logged=self.client_id + 1 if federation.client_logs else 0)

    @staticmethod
    def _run(task: ClientTask, context: ClientContext) -> ClientUpdate:
        trainer = LocalTrainer(context)
        try:
            update = trainer.run(task)
        finally:
            trainer.close()
        checked_states(update)
        return update

    def sums(self, facts: Mapping[str, Any], state: State, *, is_masked: bool = False) -> dict[str, Tensor]:
        """Return sums over this site's samples.

        Args:
            facts: The query, and what it is about.
            state: Tensors that come with it.
            is_masked: Whether nobody will see them without those of others.

        Raises:
            ConfigurationError: If the query is not known, or the sums are over fewer than ten samples.
        """
        asked = str(facts["query"])
        if asked not in QUERIES:
            known = ", ".join(QUERIES)
            raise ConfigurationError(
                message(
                    f"a query to a site must be one of {known}",
                    received=asked,
                    fix="install the same version everywhere",
                )
            )
        context = QueryContext(self.data.view, self.whole, self.module)
        found = QUERIES[asked].read(facts, state, context).answer(context)
        if not is_masked and int(found[COUNT]) < FEWEST_SAMPLES:
            raise ConfigurationError(
                message(
                    f"a site must tell sums over at least {FEWEST_SAMPLES} samples",
                    received=f"{int(found[COUNT])} for {asked}",
                    fix="take the metric out of evaluation.metrics, or raise its number of samples",
                )
            )
        return found

    # ------------------------------------------------------------------ secure aggregation

    def session(self) -> Session:
        """Return this site's side of a session of secure aggregation.

        Raises:
            ConfigurationError: If its own configuration asks for none.
        """
        options = self.orchestrator
        if options.secure is None:
            raise ConfigurationError(
                message(
                    "a site's own configuration must say so before it takes part in secure aggregation",
                    received="federation.secure=null",
                    fix="give server and sites the same configuration file",
                )
            )
        return Session(
            self.state_dir, client_id=self.client_id, secure=options.secure, weight=options.aggregator.weight
        )

    def check_plain(self) -> None:
        """Refuse to answer in the clear what this site's configuration wants masked.

        Raises:
            ConfigurationError: If it does.
        """
        if self.orchestrator.secure is not None:
            raise ConfigurationError(
                message(
                    "a site whose configuration has federation.secure must answer under masks",
                    received="a query outside of a session",
                    fix="give server and sites the same configuration file",
                )
            )

    def masked_update(self, session: int, update: ClientUpdate) -> Any:
        """Return an update under masks as records, and beside it what follows from sizes and clocks.

        Raises:
            UpdateError: If it is not finite or out of range; names the client.
        """
        states = checked_states(update)
        metrics = {**update.metrics, **lengths(update.delta, sorted({network_of(name) for name in update.delta}))}
        clear = {n: v for n, v in metrics.items() if n in CLEAR or is_position(n)}
        others = {n: torch.tensor(v, dtype=torch.float64) for n, v in sorted(metrics.items()) if n not in clear}
        return self._masked(session, {"delta": states[0], "extras": states[1], "metrics": others}, clear)

    def masked_sums(self, session: int, sums: State) -> Any:
        """Return sums over samples under masks as records."""
        return self._masked(session, {"sums": sums}, {})

    def _masked(self, session: int, groups: Mapping[str, State], clear: Mapping[str, float]) -> Any:
        try:
            summand = self.session().masked(session, groups)
        except UpdateError as error:
            raise type(error)(f"client {self.client_id}: {error}") from error
        return summand_to_content(summand, facts=wire.from_metrics(clear))

    # ------------------------------------------------------------------ private state

    def _path(self, seed: int) -> Path:
        return self.state_dir / f"{seed}.safetensors"

    def _private(self, accepted: int) -> dict[str, Tensor]:
        path = self._path(accepted)
        return load_file(path) if path.exists() else {}

    def _keep(self, seed: int, state: State, accepted: int) -> None:
        """Keep the state after this task; forget old ones, but never the last that counted."""
        if not state:
            return
        self.state_dir.mkdir(parents=True, exist_ok=True)
        fresh = self._path(seed).with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in state.items()}, fresh)
        fresh.replace(self._path(seed))
        known = sorted(self.state_dir.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in known[:-STATES_KEPT]:
            if path != self._path(accepted):
                path.unlink(missing_ok=True)


def digest_of(settings: Mapping[str, Any], data: FederatedDataModule, module: nn.Module) -> str:
    """Return a hash of what server and sites share.

    That is the version, the model, local work, policies, batch size, seed and precision, what samples mean (their
    shape, the names of the classes, the words or items), and the weights of frozen networks, which do not travel.

    Args:
        settings: Those of the command line.
        data: Built from them.
        module: The global module as it is built.
    """
    federation = {name: settings["federation"][name] for name in SHARED}
    if (secure := settings["federation"]["secure"]) is not None:  # then a client weights its own update
        federation |= {"secure": secure, "aggregator": settings["federation"]["aggregator"]}
    source = data.build_shared_metadata()
    meaning = [list(source.sample_shape), list(source.class_names), source.shared_metadata()]
    stream = [settings["data"].get(name) for name in ("batch_size", "drop_last", "validation_share")]
    stream.append({name: settings["trainer"].get(name) for name in CLIENT_TRAINER})
    stream.append(hash_of_constants(module))
    work = [settings["model"], federation, *stream, settings["seed_everything"]]
    work.append(same_precision(settings["trainer"]["precision"]))
    shared = [__version__, *work, meaning]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def hash_of_constants(module: nn.Module) -> str:
    """Return a hash of the entries that nobody trains; nothing where there are none."""
    constants, state = frozen(module), module.state_dict()
    if not constants:
        return ""
    found = hashlib.sha256()
    for name in sorted(constants):
        found.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        value = state[name].detach().cpu()
        value = value if value.layout is torch.strided else value.to_dense()
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
