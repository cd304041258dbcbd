"""Keys, kits and the life of a consortium: who is let in, who is expelled, and what is tried before anything starts."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import stat
import zipfile

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from cryptography import x509

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import keys as authority
from fedgan_lightning.deployment import kits, launch, membership, programs, proxy, status
from fedgan_lightning.deployment.expelled import expelled
from fedgan_lightning.deployment.keys import prepare
from fedgan_lightning.errors import ConfigurationError
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "hospitals.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consortium") / "keys"
    prepare(folder, sites=3, hosts=["fedgan.example.org", "localhost"])
    return folder


@pytest.fixture
def keys(made, tmp_path):
    return shutil.copytree(made, tmp_path / "keys")


def revoked(folder) -> set[int]:
    found = x509.load_pem_x509_crl((folder / "ca.crl").read_bytes())
    authority_of = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    assert found.is_signature_valid(authority_of.public_key())
    assert found.next_update_utc == authority_of.not_valid_after_utc, "nginx refuses everybody where a list has ended"
    return {own.serial_number for own in found}


def number(path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


# ---------------------------------------------------------------------- kits


def test_a_kit_has_all_that_a_site_needs_but_its_data(keys, tmp_path, capsys):
    assert (
        main(
            [
                "deploy",
                "kit",
                str(keys),
                "--server",
                "fedgan.example.org:443",
                "--config",
                str(CONFIG),
                "--out",
                str(tmp_path / "kits"),
            ]
        )
        == 0
    )
    for k in range(3):
        path = tmp_path / "kits" / f"site{k}.zip"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        names = {*zipfile.ZipFile(path).namelist()}
        wanted = {
            "ca.crt",
            "ca.crl",
            "key",
            "tls.crt",
            "tls.key",
            "config.yaml",
            "site.yaml",
            "policy.yaml",
            "kit.json",
        }
        wanted |= {"README.txt", "nginx-site.conf", "fedgan-site.service", *(f"members/site{j}.pub" for j in range(3))}
        assert names == wanted
        assert zipfile.ZipFile(path).read("key") == (keys / f"site{k}").read_bytes()
    folder, facts = kits.opened(tmp_path / "kits" / "site1.zip")
    assert facts == {"client_id": 1, "server": "fedgan.example.org:443"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.rglob("*") if path.is_file())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "policy.yaml").write_text("fewest_samples: 50\n")
    assert kits.opened(tmp_path / "kits" / "site1.zip") == (folder, facts), "what a site has changed stays"
    assert "https://fedgan.example.org:443" in (folder / "nginx-site.conf").read_text()


def test_a_site_that_made_its_own_keys_gets_a_kit_without_them(keys, tmp_path):
    for name in ("site1", "site1.tls.key"):
        (keys / name).unlink()
    (path,) = kits.write_kits(keys, tmp_path / "kits", server="h:1", config=CONFIG, clients=[1])
    assert not {"key", "tls.key"} & {*zipfile.ZipFile(path).namelist()}
    with pytest.raises(ConfigurationError, match=r"got \[7\] in .*make them with deploy keys|got \[7\] in .*Make them"):
        kits.write_kits(keys, tmp_path / "kits", server="h:1", config=CONFIG, clients=[7])


@pytest.mark.parametrize(
    "files",
    [
        {"../evil": b"x"},
        {"/etc/evil": b"x"},
        {"members/../../evil.pub": b"x"},
        {"members/site0\\..\\x.pub": b"x"},
        {"sitecustomize.py": b"x"},
        {"key": bytes(5 << 20)},
        {"ca.crt": b"x"},
    ],
    ids=["above", "root", "above members", "backslash", "code", "a bomb", "no facts"],
)
def test_a_kit_that_is_none_is_refused_and_nothing_is_left(tmp_path, files):
    path = tmp_path / "site0.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ConfigurationError, match="--kit must name a startup kit"):
        kits.opened(path)
    assert not (tmp_path / "evil").exists()
    assert {own.name for own in tmp_path.iterdir()} <= {"site0.zip", "site0"}
    path.write_bytes(b"no zip")
    with pytest.raises(ConfigurationError, match="--kit must name a startup kit"):
        kits.opened(path)


def test_a_site_starts_from_its_kit(keys, tmp_path, monkeypatch):
    (path,) = kits.write_kits(keys, tmp_path, server="fedgan.example.org:443", config=CONFIG, clients=[2])
    seen, proxied = [], []
    monkeypatch.setattr(
        launch, "keep_running", lambda command, *, environment: seen.append((command, environment)) or 0
    )
    monkeypatch.setattr(
        proxy, "start", lambda template, folder, *, changed, port: proxied.append((template, changed, port))
    )
    monkeypatch.setattr(programs, "processes", lambda: __import__("contextlib").nullcontext([]))
    (tmp_path / "images").mkdir()
    arguments = ["site", "--kit", str(path), "--root", str(tmp_path / "images"), "--gpu", "1", "--threads", "3"]
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    assert launch.main(arguments) == 0
    (command, environment), ((template, changed, port),) = seen[0], proxied
    told = command[command.index("--node-config") + 1]
    for name in ("policy.yaml", "key", "members", "root.yaml", "config.yaml"):
        assert f'{name}"' in told
    assert "client-id=2" in told
    assert command[command.index("--superlink") + 1] == f"localhost:{port}"
    assert (template, changed[proxy.NAME]) == ("nginx-site.conf", "https://fedgan.example.org:443")
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("1", "3")
    assert str((tmp_path / "images").resolve()) in (tmp_path / "site2" / "state" / "root.yaml").read_text()


def test_a_site_that_names_neither_a_kit_nor_its_parts_is_told(tmp_path, capsys):
    assert main(["deploy", "site", "--client-id", "0"]) == 2
    said = capsys.readouterr().err
    assert "a site must name --kit, or all of a kit's parts" in said
    assert "--superlink" in said


# ---------------------------------------------------------------------- in and out


def test_an_expelled_site_loses_its_key_its_certificate_and_its_place(keys, tmp_path, capsys):
    gone, stays = number(keys / "site1.tls.crt"), number(keys / "site0.tls.crt")
    assert revoked(keys) == set()
    assert main(["deploy", "expel", str(keys), "--client-id", "1", "--home", str(tmp_path / "none")]) == 0
    assert revoked(keys) == {gone}
    assert not list(keys.glob("site1*"))
    moved = {path.name for path in (keys / "expelled").iterdir()}
    assert moved == {"site1", "site1.pub", "site1.tls.crt", "site1.tls.key"}
    assert main(["deploy", "expel", str(keys), "--client-id", "0", "--home", str(tmp_path / "none")]) == 0
    assert revoked(keys) == {gone, stays}
    assert main(["deploy", "expel", str(keys), "--client-id", "1"]) == 2
    assert "a site must be known to be expelled" in capsys.readouterr().err


def test_a_server_without_the_authority_expels_by_the_key_alone(keys):
    (keys / "ca.key").unlink()
    membership.expel(keys, 2)
    assert revoked(keys) == set(), "whoever has ca.key revokes the certificate"
    assert [path.name for path in expelled(keys)] == ["site2.pub"]


def test_the_node_of_an_expelled_site_is_taken_off_the_superlink(keys, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(programs, "flwr", lambda home, *arguments: told.append(arguments))
    home = tmp_path / "home"
    home.mkdir()
    nodes = {programs.blob(keys / f"site{k}.pub"): f"10{k}" for k in range(3)}
    (home / programs.NODES).write_text(json.dumps(nodes))
    membership.expel(keys, 1)
    assert membership.unregister(home, keys, 8000) == ["101"]
    assert told == [("supernode", "unregister", "101", "own")]


def test_nodes_are_noted_as_the_superlink_numbers_them(keys, tmp_path, monkeypatch):
    import subprocess

    said = iter(['{"success": true, "node-id": "77"}', "x", '{"node-id": 79}'])

    def flwr(home, *arguments):
        text = next(said)
        return subprocess.CompletedProcess(arguments, int(text == "x"), text, "already in use" if text == "x" else "")

    monkeypatch.setattr(programs, "flwr", flwr)
    (tmp_path / programs.NODES).write_text(json.dumps({programs.blob(keys / "site1.pub"): "78"}))
    programs.register(tmp_path, keys, 8000)
    assert [*programs.nodes(tmp_path).values()] == ["78", "77", "79"]


def test_a_renewal_keeps_the_list_of_revoked_certificates(keys):
    gone = number(keys / "site1.tls.crt")
    membership.expel(keys, 1)
    prepare(keys, sites=1)
    assert revoked(keys) == {gone}
    assert not (keys / "site1.pub").exists()


# ---------------------------------------------------------------------- before anything starts


def check(keys, tmp_path, *options) -> list[str]:
    told = ["--keys", str(keys), "--config", str(CONFIG), "--run_dir", str(tmp_path / "run")]
    return ["deploy", "server", "--check", *told, "--port", str(programs.free_port()), *options]


def test_a_server_is_checked_and_starts_nothing(keys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "start", None)
    assert main(check(keys, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "server of 3 sites, with no samples of its own: metrics are what sites can sum" in said
    assert "ready: the same command without --check starts the server" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--data.num_clients", "5"], r"siteN.pub of its 5 sites; got none of \[3, 4\]"),
        (["--federation.rounds", "0"], "federation.rounds"),
        (["--federation.round", "3"], "federation.round"),
        (["--federation.secure", "SecureAggregation", "--data.num_clients", "2"], "at least 3 sites"),
        (["--evaluation.metrics", "[Nonsense]"], "Nonsense"),
    ],
)
def test_what_a_server_cannot_start_with_is_one_line(keys, tmp_path, capsys, options, reason):

    assert (
        main(
            check(
                keys,
                tmp_path,
                *(["--federation.validator", "null"] if "SecureAggregation" in options else []),
                *options,
            )
        )
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert re.search(reason, said), said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1


def test_two_sites_with_one_key_are_refused(keys, tmp_path, capsys):
    shutil.copy(keys / "site0.pub", keys / "site2.pub")
    assert main(check(keys, tmp_path)) == 2
    assert "every site must have a key of its own; got one of sites 0 and 2" in capsys.readouterr().err


def test_a_certificate_that_has_not_begun_names_the_clock(keys, monkeypatch):
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    monkeypatch.setattr(authority, "_now", lambda: yesterday)
    with pytest.raises(ConfigurationError, match=r"valid by this machine's clock.*Set the clock"):
        authority.check_valid(keys / "server.crt")


# ---------------------------------------------------------------------- what a server is doing


def test_a_status_is_read_in_words(tmp_path, capsys):
    known = {"state": "training", "rounds": 3, "planned_rounds": 9, "connected": [0, 2], "missing": [1], "time": "now"}
    known |= {
        "last_round": {"round": 2, "asked": 3, "answered": 2, "seconds": 4.5, "counted": False},
        "last_error": "x",
    }
    known |= {"refused": {"77": "does not share"}}
    (tmp_path / status.NAME).write_text(json.dumps(known))
    assert main(["deploy", "status", "--run_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for line in ("rounds      3 of 9", "connected   client 0, client 2", "missing     client 1"):
        assert line in said
    assert "last round  2: 2 of 3 in 4.5 s, abandoned" in said
    assert "refused     77: does not share" in said
    (tmp_path / status.NAME).write_text("[")
    assert main(["deploy", "status", "--run_dir", str(tmp_path)]) == 2
    assert "must have its status" in capsys.readouterr().err


def test_shipped_files_hold_what_commands_change():
    """Units, image and compose file name commands that there are."""
    server = proxy.server_changes(keys=ROOT, superlink=1, port=2)
    assert "listen 2 ssl" in proxy.configured("nginx.conf", server)
    site = proxy.site_changes(ca=ROOT / "ca.crt", crl=ROOT / "ca.crl", tls=ROOT / "tls", server="h:1", port=3)
    text = proxy.configured("nginx-site.conf", site)
    assert "https://h:1;" in text
    assert "/etc/fedgan" not in text.split("events {}")[1]
    import yaml

    compose = yaml.safe_load((proxy.TEMPLATES / "compose.yaml").read_text())
    units = [(proxy.TEMPLATES / f"fedgan-{name}.service").read_text() for name in ("server", "site")]
    commands = [own["command"] for own in compose["services"].values()]
    starts = [line for unit in units for line in unit.splitlines() if line.startswith("ExecStart")]
    commands += [line.split("fedgan_lightning ")[1] for line in starts]
    from fedgan_lightning.deployment.options_of import add_roles

    parser = launch._Parser()
    add_roles(parser.add_subparsers(dest="role", parser_class=launch._Parser))
    for command in commands:
        parser.parse_args(command.split()[1:])


def test_long_logs_are_kept_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MOST_LOG_BYTES", 10)
    log = tmp_path / "x.log"
    for text in ("first text, long", "second text, long", "third"):
        log.write_text(text)
        programs.rotate(log)
    assert (tmp_path / "x.log.1").read_text() == "second text, long"
    assert (tmp_path / "x.log.2").read_text() == "first text, long"
    assert log.read_text() == "third"


def test_what_roles_write_is_private(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_status", lambda options, others: (tmp_path / "written").write_text("x") and None)
    monkeypatch.setitem(launch.ROLES, "status", launch._status)
    import os

    before = os.umask(0o022)
    try:
        launch.main(["status", "--run_dir", str(tmp_path)])
        (tmp_path / "after").write_text("x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("written", "after")] == [0o600, 0o644]
