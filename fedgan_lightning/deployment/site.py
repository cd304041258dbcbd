"""What happens at a site: build the client's module and its own data from its own settings, and do a task.

Flower starts a process for every message, so what must last lies on the site's disk.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.held_out import divided
from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.coded_tasks import decoded
from fedgan_lightning.deployment.handed_on import check_hands_on, exchanged, going_on, handing_on, opened
from fedgan_lightning.deployment.secure_users import CLEAR
from fedgan_lightning.deployment.session import Session, summand_to_content
from fedgan_lightning.deployment.shared_settings import digest_of
from fedgan_lightning.deployment.signatures import Signatures
from fedgan_lightning.deployment.site_budget import SiteBudget
from fedgan_lightning.deployment.site_data import SiteData
from fedgan_lightning.deployment.site_memory import SiteMemory
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.deployment.site_queries import SiteQueries
from fedgan_lightning.errors import ConfigurationError, UpdateError, message
from fedgan_lightning.evaluation.federated_queries import QueryContext
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.federation.aggregation import checked_states
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_settings import begin, client_options, context_of
from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.distributed_noise import NoiseShares
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.optimizer_state import only_moments
from fedgan_lightning.federation.report import is_position, lengths
from fedgan_lightning.federation.round_schedules import most_steps
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.hooks import DataHook, offers
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State
from fedgan_lightning.states import network_of

#: Letters of the name of a run.
MOST_LETTERS = 64
#: Private states that a site keeps, for a server that goes back to an older checkpoint.
STATES_KEPT = 20


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
        policy: What it answers at most; default that of a site which trusts nobody, or, where it has a part, a trial's.
        signatures: Signs for it and checks what others sign; ``None`` believes the server who the others are.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        client_id: int,
        state_dir: str | Path,
        part: int | None = None,
        policy: SitePolicy | None = None,
        signatures: Signatures | None = None,
    ) -> None:
        from fedgan_lightning.cli import built

        cli = built(arguments)
        self.policy = policy or (SitePolicy() if part is None else SitePolicy.of_trial())
        self.signatures, self.evaluation = signatures, cli.evaluation
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
        self.memory = SiteMemory(self.state_dir)
        self.tag = hashlib.sha256(f"{data.train_samples.digest} {view.indices.tolist()}".encode()).hexdigest()[:16]
        self.policy.check_networks(self.orchestrator.policy_of(self.module).leaving_networks)
        self.budget = SiteBudget(self.memory, self.module, self.data, self.orchestrator, limit=self.policy.privacy)
        self.begun = begin(self.orchestrator, self.trainer, self.module, self.data, "fit")
        if offers(self.module, DataHook):
            self.module.check_data(data.sample_shape, data.num_classes)  # type: ignore[operator]

    @classmethod
    def of(
        cls,
        config: str,
        *,
        own: str | None,
        client_id: int,
        state_dir: str | Path,
        options: Sequence[str] = (),
        **more: Any,
    ) -> Site:
        """Return the site that these settings describe.

        Args:
            config: The federation's configuration file.
            own: A second one with what differs at this site, which counts; without it the site holds the part of the
                configured partition that has its number.
            client_id: Its number in the federation.
            state_dir: Folder for its private state.
            options: Of the command line, beside the first file.
            **more: ``policy`` and ``signatures``.
        """
        arguments = ["--config", config, *options, *(("--config", own) if own is not None else ())]
        part = client_id if own is None else None
        return cls(arguments, client_id=client_id, state_dir=state_dir, part=part, **more)

    def check_message(self, facts: Mapping[str, Any]) -> None:
        """Refuse a message of a run that this site began with another number, or with other samples.

        Raises:
            ConfigurationError: If it did, or the server knows it with others.
        """
        run, joined = facts.get("run"), facts.get("joined")
        if not isinstance(run, str) or not 0 < len(run) <= MOST_LETTERS:
            raise ConfigurationError(
                message(
                    "a message to a site must say of which run it is",
                    received=f"{type(run).__name__} of another length" if run else "none",
                    fix="install the same version everywhere",
                )
            )
        self.memory.check_run(run, client_id=self.client_id, data=self.tag)
        if joined != self.tag and (joined or facts.get("ask") != "facts"):  # who is asked for facts has told none yet
            raise ConfigurationError(
                message(
                    "a site must go on with the samples that it joined with",
                    received=f"samples of hash {self.tag}, and {joined} when it joined",
                    fix="put them back, or agree with the server on a new run",
                )
            )

    def facts(self) -> dict[str, Any]:
        """Return what the server may know: sizes, counts of labels, and hashes of what all share and of the samples."""
        counts, view = [len(self.data.view)], self.data.view
        if view.samples.y is not None and self.whole.num_classes:
            counts = view.label_counts(self.whole.num_classes).tolist()
        told = {"client_id": self.client_id, "num_examples": len(self.data.view), "label_counts": counts}
        return {**told, "is_image": self.whole.train_samples.is_image, "data": self.tag, "digest": self.digest}

    @property
    def num_test(self) -> int:
        """Number of samples that the source holds out."""
        return len(self.whole.test_samples)

    def told(self) -> str:
        """Return, in words, what this site tells of its samples."""
        return self._queries().described()

    def _metrics(self) -> list[Metric]:
        found = self.evaluation.metrics
        if found is None:
            found = default_metrics(self.whole, condition=getattr(self.module, "condition", None))
        return list(found)

    def _queries(self) -> SiteQueries:
        context = QueryContext(self.data.view, self.whole, self.module)
        return SiteQueries(self._metrics(), context, policy=self.policy, memory=self.memory)

    def train(self, task: ClientTask, *, accepted: int, digest: str, hands_on: bool = False) -> ClientUpdate:
        """Do a task.

        Args:
            task: The task.
            accepted: Seed of the last task whose update counted: the private state goes on from there.
            digest: The server's hash of what all share.
            hands_on: Whether the update takes along the networks that clients hand on to each other.

        Raises:
            ConfigurationError: If something of it differs from the server's, it is another client's, or the site's
                policy, or its privacy budget, forbids it.
            UpdateError: If the update is not finite, or what another client has handed on is none of its networks.
        """
        if task.client_id != self.client_id:
            raise ConfigurationError(
                message(
                    "a site must be asked under its own number",
                    received=f"a task of client {task.client_id} at the site of client {self.client_id}",
                    fix="start the site with the --client-id that it joined with",
                )
            )
        own = self.orchestrator
        self.policy.check_task(task, own_steps=most_steps(own), own_epochs=own.local_epochs)
        self.data.deadline = time.monotonic() + (self.policy.most_seconds or math.inf)
        if digest != self.digest:
            raise ConfigurationError(
                message(
                    f"server and sites must share {wire.SHARED}",
                    received=f"{self.digest} here, {digest} at the server",
                    fix="give all of them the same configuration file, class_names and list of words or items",
                )
            )
        store = ClientStore()
        task, handed = opened(decoded(task, context := self._context(store)), context)
        check_hands_on(task, context, hands_on=hands_on)
        before = going_on(self._private(accepted) if accepted >= 0 else {}, handed, context.policy)
        store.load_state_dict({str(task.client_id): before} if before else {})
        self.budget.charge(task)
        update = self._run(task, context)
        store.commit()
        self._keep(task.seed, after := store.read(task.client_id), accepted)
        return handing_on(update, exchanged(after, context.policy)) if hands_on else update

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

    def sums(self, facts: Mapping[str, Any], state: State, *, session: int | None = None) -> dict[str, Tensor]:
        """Return sums over this site's samples; see :class:`SiteQueries`.

        Args:
            facts: The query, and what it is about.
            state: Tensors that come with it.
            session: That of secure aggregation, under whose masks nobody sees them without those of others.

        Raises:
            ConfigurationError: If the site's own settings ask no such query, or its policy or memory forbids an answer.
        """
        return self._queries().answer(facts, state, run=str(facts.get("run", "")), session=session)

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
            self.state_dir,
            client_id=self.client_id,
            secure=options.secure,
            weight=options.aggregator.weight,
            signatures=self.signatures,
        )

    def allow_opening(self, session: int, subject: str, survivors: list[int]) -> None:
        """Remember that a sum is opened, or refuse it: see :class:`SiteMemory`.

        Raises:
            ProtocolError: If another group's sum of the same was opened before.
        """
        if self.policy.new_members == "refuse":
            state, is_task, _ = subject.partition(".")  # whatever else a task says of its state
            self.memory.check_cohort(state, survivors, is_task=bool(is_task))
        self.memory.note_opened(session)

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
        metrics = dict(update.metrics)
        if self.orchestrator.privacy is None:
            metrics |= lengths(update.delta, sorted({network_of(name) for name in update.delta}))
        clear = {n: v for n, v in metrics.items() if n in CLEAR or is_position(n)}
        others = {n: torch.tensor(v, dtype=torch.float64) for n, v in sorted(metrics.items()) if n not in clear}
        privacy, secure = self.orchestrator.privacy, self.orchestrator.secure
        is_noised = privacy is not None and privacy.noise == "distributed" and secure is not None
        noise = NoiseShares(privacy, secure) if is_noised else None  # type: ignore[arg-type]
        return self._masked(session, {"delta": states[0], "extras": states[1], "metrics": others}, clear, noise)

    def masked_sums(self, session: int, sums: State) -> Any:
        """Return sums over samples under masks as records."""
        return self._masked(session, {"sums": sums}, {})

    def _masked(
        self, session: int, groups: Mapping[str, State], clear: Mapping[str, float], noise: NoiseShares | None = None
    ) -> Any:
        try:
            summand = self.session().masked(session, groups, noise=noise)
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
