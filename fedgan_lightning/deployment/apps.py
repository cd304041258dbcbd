"""The two halves of the Flower app: what Flower starts at the server, and at every site for each message.

Sites take their settings from their own SuperNode (``--node-config``) and not from the server:
``config`` (configuration file), ``site`` (a second file with what differs there: the source, the accelerator),
``policy`` (what it answers at most), ``client-id``, ``state`` (folder for private state), ``key`` and ``members`` (its
node key, and the public ones of all sites). Under Flower's simulation engine, where nobody sets these, the
server's run configuration counts, and a node holds the part of the partition that has its number.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.audit_log import AuditLog
from fedgan_lightning.deployment.expelled import expelled_from
from fedgan_lightning.deployment.flower import FlowerExecutor
from fedgan_lightning.deployment.opened_sums import OpenedSums
from fedgan_lightning.deployment.replies import only_plain
from fedgan_lightning.deployment.secure import SecureSessions
from fedgan_lightning.deployment.secure_users import SecureExecutor, SecureQueries, check_same_for_all
from fedgan_lightning.deployment.session import members_of_facts, members_to_facts, sealed_of_facts, sealed_to_facts
from fedgan_lightning.deployment.signatures import Signatures
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.deployment.sites import Sites
from fedgan_lightning.deployment.status import StatusFile
from fedgan_lightning.deployment.supernode_supervisor import end_with_parent
from fedgan_lightning.errors import FedGANError

logger = logging.getLogger("fedgan_lightning")

#: Answers that are none, after which a site is not asked any more, where no validator says otherwise.
STRIKES = 5


#: What a site's own record says of a message beside its kind.
RECORDED = ("round", "client_id", "steps", "epochs", "hands_on", "limit", "kind", "side", "session", "run", "survivors")


def client_app() -> Any:
    """Return Flower's ClientApp."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    app: Any = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(received: Message, context: Context) -> Message:
        return Message(_answered(_train, received, context), reply_to=received)

    @app.query()  # type: ignore[untyped-decorator]
    def query(received: Message, context: Context) -> Message:
        return Message(_answered(_query, received, context), reply_to=received)

    return app


def _answered(function: Any, received: Any, context: Any) -> Any:
    """Return the answer, or the error in one line: Flower itself would say no more than that there was one.

    The site's own record says what was asked and what became of it.
    """
    began, audit = time.monotonic(), AuditLog(_state_dir(context))
    told: dict[str, Any] = {"what": "a message that cannot be read"}
    try:
        told = _asked(received)
        answer = function(received, context)
    except Exception as error:
        outcome = "refused" if isinstance(error, FedGANError) else "failed"
        audit.write(**told, outcome=outcome, reason=only_plain(error))
        return wire.content({"error": only_plain(error)})
    seconds = round(time.monotonic() - began, 3)
    audit.write(**told, outcome="answered", seconds=seconds, bytes_up=wire.size_of(answer))
    return answer


def _asked(received: Any) -> dict[str, Any]:
    """Return what a message asks, for the site's record."""
    facts = wire.facts_of(received.content)
    kind = str(received.metadata.message_type)
    what = kind if kind == wire.TRAIN else str(facts.get("query", facts.get("ask")))
    known = {name: facts[name] for name in RECORDED if name in facts}
    told = {name: own if isinstance(own, (int, float)) else str(own)[:200] for name, own in known.items()}
    own = {"digest": wire.hash_of(wire.query_facts(facts), {})[:16]} if facts.get("ask") == "sums" else {}
    return {"what": what[:100], **told, **own, "bytes_down": wire.size_of(received.content)}


@lru_cache(maxsize=16)
def _built(
    config: str,
    options: tuple[str, ...],
    own: str | None,
    client_id: int,
    state: str,
    has_own: bool,
    policy: str | None = None,
    key: str | None = None,
    members: str | None = None,
) -> Any:
    """Return the site. SuperNodes start a process for every message; the workers of a simulation stay.

    One with a configuration of its own trusts nobody unless its policy says so, whatever its data are.
    """
    from fedgan_lightning.deployment.site import Site

    default = SitePolicy() if has_own else None
    more = {
        "policy": default if policy is None else SitePolicy.read(policy),
        "signatures": None if key is None or members is None else Signatures(Path(key), Path(members)),
    }
    return Site.of(config, own=own, client_id=client_id, state_dir=state, options=options, **more)


def _state_dir(context: Any) -> str:
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "fedgan"
    return str(context.node_config.get("state", home))


def _site(context: Any) -> Any:
    """Return the site that a node's own configuration describes; the server's counts where it has none."""
    node, run = context.node_config, context.run_config
    number = int(node.get("client-id", node.get("partition-id", -1)))
    has_own = "config" in node
    options = () if has_own else tuple(shlex.split(str(run["options"])))
    named = {name: str(node[name]) if name in node else None for name in ("policy", "key", "members")}
    own = str(node["site"]) if "site" in node else None
    config = str(node["config"] if has_own else run["config"])
    return _built(config, options, own, number, _state_dir(context), has_own, **named)


def _opened(received: Any, context: Any) -> tuple[Any, dict[str, Any]]:
    """Return the site and what a message says beside its tensors, after a look at its length and its run."""
    site = _site(context)
    site.policy.check_size(wire.size_of(received.content))
    facts = wire.facts_of(received.content)
    site.check_message(facts)
    return site, facts


def _train(received: Any, context: Any) -> Any:
    site, facts = _opened(received, context)
    if "session" not in facts:
        site.check_plain()
    task, accepted, hands_on = wire.to_task(received.content)
    if "session" in facts:
        check_same_for_all(task, hands_on=hands_on)
        site.session().open(int(facts["session"]), sealed_of_facts(facts), subject=wire.hash_of_task(task))
    update = site.train(task, accepted=accepted, digest=str(facts["digest"]), hands_on=hands_on)
    return wire.from_update(update) if "session" not in facts else site.masked_update(int(facts["session"]), update)


def _query(received: Any, context: Any) -> Any:
    site, facts = _opened(received, context)
    if facts["ask"] == "facts":
        return wire.content(site.facts())
    if facts["ask"] in STAGES:
        return wire.content(STAGES[facts["ask"]](site, int(facts["session"]), facts))
    session = int(facts["session"]) if "session" in facts else None
    if session is None:
        site.check_plain()
    state = wire.state_of(received.content, "state")
    if session is not None:
        site.session().open(session, sealed_of_facts(facts), subject=wire.hash_of(wire.query_facts(facts), state))
    sums = site.sums(facts, state, session=session)
    return site.masked_sums(session, sums) if session is not None else wire.content({}, sums=sums)


def _advertise(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    own = site.session().advertise(session, num_examples=site.facts()["num_examples"])
    return members_to_facts({site.client_id: own})


def _share(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    own = site.session()
    sealed = sealed_to_facts(own.share(session, members_of_facts(facts), subject=str(facts["subject"])))
    return {**sealed, "commitment": own.commitment(session)}


def _consent(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {"consent": site.session().consent(session, [int(k) for k in facts["survivors"]])}


def _unmask(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    consents = {int(k): bytes(own) for k, own in zip(facts.get("consenting", []), facts.get("consents", []))}
    allow = partial(site.allow_opening, session)
    survivors = [int(k) for k in facts["survivors"]]
    shares = sealed_to_facts(site.session().unmask(session, survivors, consents=consents, allow=allow))
    return shares | (_advertise(site, int(facts["next"]), facts) if "next" in facts else {})


#: Messages of secure aggregation beside the one that asks for the work itself.
STAGES = {"advertise": _advertise, "share": _share, "consent": _consent, "unmask": _unmask}


def server_app() -> Any:
    """Return Flower's ServerApp: the same ``fit`` as in simulation, with sites instead of local clients."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    app: Any = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def serve(grid: Grid, context: Context) -> None:
        # Without its SuperLink this process would wait for ever, and write at last.
        if Path(sys.argv[0]).name == "flwr-serverapp":
            end_with_parent(signal.SIGKILL)()
        run = context.run_config
        options, keys = shlex.split(str(run["options"])), str(run.get("keys", ""))
        has_data = bool(run.get("server-data", True))
        arguments, prometheus = ["--config", str(run["config"]), *options], str(run.get("prometheus", ""))
        folder, file = Path(keys) if keys else None, Path(prometheus) if prometheus else None
        path = str(run.get("owners", ""))
        owners = {int(node): int(k) for node, k in json.loads(Path(path).read_text()).items()} if path else None
        serve_over(grid, arguments, has_data=has_data, keys=folder, prometheus=file, owners=owners)

    return app


def serve_over(
    grid: Any,
    arguments: list[str],
    *,
    has_data: bool = True,
    keys: Path | None = None,
    prometheus: Path | None = None,
    owners: Mapping[int, int] | None = None,
) -> None:
    """Run ``fit`` with the sites behind ``grid`` as clients; continue the run where its directory holds one.

    Args:
        grid: Flower's grid.
        arguments: Options of ``fit``.
        has_data: Whether the server has samples of its own, from the source of its configuration.
        keys: Folder with the public key of every site, where keys of secure aggregation are to be checked.
        prometheus: File for figures of the run.
        owners: Client by node, as the SuperLink has their keys; a node that is not listed is believed.
    """
    from fedgan_lightning.cli import run
    from fedgan_lightning.deployment.data import RemoteDataModule
    from fedgan_lightning.deployment.shared_settings import digest_of
    from fedgan_lightning.federation.rules import UpdateValidator

    def prepare(cli: Any) -> None:
        orchestrator, num_clients = cli.orchestrator, cli.datamodule.num_clients
        timeout, memory = orchestrator.rules.timeout, Path(cli.trainer.default_root_dir) / "sites.json"
        if has_data:
            cli.datamodule.prepare_data()
        digest, needed = digest_of(cli.plain_settings, cli.datamodule, cli.model.model), None
        print(f"settings {digest}: those of every site, too", flush=True)
        if cli.config[cli.subcommand].ckpt_path is not None:
            needed = max(orchestrator.rules.needed(num_clients), min(orchestrator.aggregator.needed, num_clients))
            if orchestrator.secure is not None:
                needed = max(needed, orchestrator.secure.needed(num_clients))
        default = UpdateValidator(strikes=STRIKES)  # no answer of a site ends a run; under privacy it counts as zero
        if orchestrator.secure is None and orchestrator.validator is None and orchestrator.privacy is None:
            orchestrator.validator = default
        strikes = (orchestrator.secure or orchestrator.validator or default).strikes
        told = {"memory": memory, "needed": needed, "strikes": strikes, "accept_changes": orchestrator.accept_changes}
        told |= {"expelled": () if keys is None else expelled_from(keys), "owners": owners}
        sites = Sites(grid, num_clients=num_clients, digest=digest, **told)
        status = StatusFile(cli.trainer.default_root_dir, sites, prometheus=prometheus)
        sites.on_change = status.write
        cli.trainer.callbacks.append(status)
        status.write()
        if orchestrator.secure is None:
            orchestrator.executor = FlowerExecutor(sites, timeout=timeout)
            cli.datamodule = RemoteDataModule(cli.datamodule, sites, has_samples=has_data)
            return
        least = orchestrator.secure.needed(num_clients)
        if num_clients < least or orchestrator.rules.needed(num_clients) < least:
            logger.warning(f"secure aggregation of {num_clients} sites needs {least} of them in every round")
        options = {"weight": orchestrator.aggregator.weight, "timeout": timeout, "keys": keys}
        sessions = SecureSessions(sites, secure=orchestrator.secure, **options)
        opened = OpenedSums(Path(cli.trainer.default_root_dir) / "opened")
        orchestrator.executor = SecureExecutor(sessions, opened=opened)
        cli.datamodule = RemoteDataModule(cli.datamodule, SecureQueries(sessions), has_samples=has_data)

    try:
        run(["fit", *arguments, "--ckpt_path", "last"], prepare=prepare)
    except FedGANError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
