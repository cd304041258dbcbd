"""The two halves of the Flower app: what Flower starts at the server, and at every site for each message.

Sites take their settings from their own SuperNode (``--node-config``) and not from the server:
``config`` (configuration file), ``site`` (a second file with what differs there: the source, the accelerator),
``client-id``, ``state`` (folder for private state). Under Flower's simulation engine, where nobody sets these, the
server's run configuration counts, and a node holds the part of the partition that has its number.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.flower import FlowerExecutor
from fedgan_lightning.deployment.secure import SecureSessions
from fedgan_lightning.deployment.secure_users import SecureExecutor, SecureQueries
from fedgan_lightning.deployment.session import members_of_facts, members_to_facts, sealed_of_facts, sealed_to_facts
from fedgan_lightning.deployment.sites import Sites, only_plain
from fedgan_lightning.deployment.supernode_supervisor import end_with_parent
from fedgan_lightning.errors import FedGANError


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
    """Return the answer, or the error in one line: Flower itself would say no more than that there was one."""
    try:
        return function(received, context)
    except Exception as error:
        return wire.content({"error": only_plain(error)})


@lru_cache(maxsize=16)
def _built(config: str, options: tuple[str, ...], own: str | None, client_id: int, state: str) -> Any:
    """Return the site. SuperNodes start a process for every message; the workers of a simulation stay."""
    from fedgan_lightning.deployment.site import Site

    return Site.of(config, own=own, client_id=client_id, state_dir=state, options=options)


def _site(context: Any) -> Any:
    node, run = context.node_config, context.run_config
    number = int(node.get("client-id", node.get("partition-id", -1)))
    config = str(node.get("config", run["config"]))
    options = () if "config" in node else tuple(shlex.split(str(run["options"])))
    state = node.get("state", str(Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "fedgan"))
    own = str(node["site"]) if "site" in node else None
    return _built(config, options, own, number, str(state))


def _train(received: Any, context: Any) -> Any:
    task, accepted = wire.to_task(received.content)
    facts, site = wire.facts_of(received.content), _site(context)
    _open(site, facts)
    update = site.train(task, accepted=accepted, digest=str(facts["digest"]))
    return wire.from_update(update) if "session" not in facts else site.masked_update(int(facts["session"]), update)


def _open(site: Any, facts: dict[str, Any]) -> None:
    """Begin an answer: under masks, or in the clear where the site's own configuration has no secure aggregation."""
    if "session" in facts:
        site.session().open(int(facts["session"]), sealed_of_facts(facts))
    else:
        site.check_plain()


def _query(received: Any, context: Any) -> Any:
    facts, site = wire.facts_of(received.content), _site(context)
    if facts["ask"] == "facts":
        return wire.content(site.facts())
    if facts["ask"] in STAGES:
        return wire.content(STAGES[facts["ask"]](site, int(facts["session"]), facts))
    _open(site, facts)
    is_masked = "session" in facts
    sums = site.sums(facts, wire.state_of(received.content, "state"), is_masked=is_masked)
    return site.masked_sums(int(facts["session"]), sums) if is_masked else wire.content({}, sums=sums)


def _advertise(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    own = site.session().advertise(session, num_examples=site.facts()["num_examples"])
    return members_to_facts({site.client_id: own})


def _share(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    return sealed_to_facts(site.session().share(session, members_of_facts(facts)))


def _unmask(site: Any, session: int, facts: dict[str, Any]) -> dict[str, Any]:
    return sealed_to_facts(site.session().unmask(session, [int(k) for k in facts["survivors"]]))


#: Messages of secure aggregation beside the one that asks for the work itself.
STAGES = {"advertise": _advertise, "share": _share, "unmask": _unmask}


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
        options = shlex.split(str(context.run_config["options"]))
        serve_over(grid, ["--config", str(context.run_config["config"]), *options])

    return app


def serve_over(grid: Any, arguments: list[str]) -> None:
    """Run ``fit`` with the sites behind ``grid`` as clients; continue the run where its directory holds one.

    Args:
        grid: Flower's grid.
        arguments: Options of ``fit``.
    """
    from fedgan_lightning.cli import run
    from fedgan_lightning.deployment.data import RemoteDataModule
    from fedgan_lightning.deployment.site import digest_of

    def prepare(cli: Any) -> None:
        orchestrator, num_clients = cli.orchestrator, cli.datamodule.num_clients
        timeout, memory = orchestrator.rules.timeout, Path(cli.trainer.default_root_dir) / "sites.json"
        cli.datamodule.prepare_data()
        digest, needed = digest_of(cli.plain_settings, cli.datamodule, cli.model.model), None
        print(f"settings {digest}: those of every site, too", flush=True)
        if cli.config[cli.subcommand].ckpt_path is not None:
            needed = max(orchestrator.rules.needed(num_clients), min(orchestrator.aggregator.needed, num_clients))
            if orchestrator.secure is not None:
                needed = max(needed, orchestrator.secure.needed(num_clients))
        sites = Sites(grid, num_clients=num_clients, digest=digest, memory=memory, needed=needed)
        if orchestrator.secure is None:
            orchestrator.executor = FlowerExecutor(sites, timeout=timeout)
            cli.datamodule = RemoteDataModule(cli.datamodule, sites)
            return
        weight = orchestrator.aggregator.weight
        sessions = SecureSessions(sites, secure=orchestrator.secure, weight=weight, timeout=timeout)
        orchestrator.executor = SecureExecutor(sessions)
        cli.datamodule = RemoteDataModule(cli.datamodule, SecureQueries(sessions))

    try:
        run(["fit", *arguments, "--ckpt_path", "last"], prepare=prepare)
    except FedGANError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
