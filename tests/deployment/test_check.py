"""``deploy site --check``: what a site learns before it joins."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import keys
from fedgan_lightning.deployment.programs import free_port
from fedgan_lightning.deployment.site import Site
from tests.conftest import ROOT

pytestmark = pytest.mark.flower

CONFIG = str(ROOT / "configs" / "digits.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("keys")
    keys.prepare(made, sites=2, hosts=["localhost", "127.0.0.1"])
    return made


@contextlib.contextmanager
def superlink(folder, *, is_asked=True, status=401, body=b'{"detail":"Invalid SuperNode authentication"}'):
    """Answer as a SuperLink does whom no site signed for, or otherwise, until the body ends; give the port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers["content-type"], self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    asked = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
    assert asked == [("/v1/fleet/pull-messages", "application/protobuf", "0")] * is_asked


def checked(folder, tmp_path, port, *options, ca=None, config=CONFIG):
    options = options if "--port" in options else (*options, "--port", str(free_port()))
    return main(
        [
            *(
                "deploy",
                "site",
                "--check",
                "--superlink",
                f"localhost:{port}",
                "--ca",
                str(ca or folder / "ca.crt"),
            ),
            *("--key", str(folder / "site0"), "--client-id", "0", "--config", str(config)),
            *("--state", str(tmp_path / "state"), *options),
        ]
    )


def test_a_site_is_tried_and_nothing_is_kept_or_started(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedgan_lightning.deployment.launch.keep_running", None)  # would fail if it were called
    with superlink(folder) as port:
        assert checked(folder, tmp_path, port, "--tls", str(folder / "site0.tls")) == 0
    said = capsys.readouterr().out
    site = Site.of(CONFIG, own=None, client_id=0, state_dir=tmp_path / "other")
    assert site.digest in said
    assert f"{site.facts()['num_examples']:,} (" in said
    assert keys.fingerprint(folder / "site0") in said
    assert "ready" in said
    assert "one step" in said
    assert f"Flower answers behind localhost:{port}" in said
    assert list(tmp_path.rglob("*")) == []


def test_the_bytes_of_a_round_are_those_that_the_second_round_has(tmp_path):
    found = Site.of(CONFIG, own=None, client_id=0, state_dir=tmp_path / "state").rehearse()
    options = ["--federation.executor", "SequentialExecutor", "--evaluation.num_samples", "50"]
    run = ["--federation.rounds", "2", "--federation.local_steps", "1", "--run_dir", str(tmp_path / "run")]
    assert main(["fit", "--config", CONFIG, *run, *options]) == 0
    client = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1])["clients"][0]
    assert client["bytes_down"] == sum(found.bytes_down.values())
    assert client["bytes_up"] == sum(found.bytes_up.values())
    assert set(found.bytes_down) == {"generator", "discriminator", "optimizer"}


def test_a_site_is_tried_under_an_algorithm_that_sends_entries_of_its_own(tmp_path):
    """SCAFFOLD's controls come from the server, which a site that tries itself has not met."""
    options = ["--federation.algorithm", "Scaffold", "--model.generator_optimizer", "torch.optim.SGD"]
    options += ["--model.discriminator_optimizer", "torch.optim.SGD"]
    found = Site.of(CONFIG, own=None, client_id=0, state_dir=tmp_path / "state", options=options).rehearse()
    assert found.bytes_up.keys() == {"generator", "discriminator"}


def test_another_authority_is_named_after_the_data_were_tried(folder, tmp_path, capsys):
    keys.make_authority(tmp_path)
    with superlink(folder, is_asked=False) as port:
        assert checked(folder, tmp_path, port, ca=tmp_path / "ca.crt") == 2
    said = capsys.readouterr()
    assert "certificate of" in said.err
    assert f"localhost:{port}" in said.err
    assert "deploy keys --host" in said.err
    assert "samples" in said.out
    assert "ready" not in said.out


@pytest.mark.parametrize(("status", "why"), [(400, "takes no certificate"), (403, "ten paths"), (502, "nginx's log")])
def test_a_proxy_that_lets_nothing_through_is_named(folder, tmp_path, capsys, status, why):
    with superlink(folder, status=status) as port:
        assert checked(folder, tmp_path, port) == 2
    error = capsys.readouterr().err
    assert f"{status} from localhost:{port}" in error
    assert why in error


def test_nobody_who_answers_is_an_error_in_one_line(folder, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens there
        assert checked(folder, tmp_path, taken.getsockname()[1]) == 2
    error = capsys.readouterr().err
    assert "must reach the SuperLink" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["localhost", ":8000", "localhost:grpc", "localhost:8²", "localhost:99999"])
def test_an_address_without_host_or_port_is_refused(folder, tmp_path, capsys, address):
    arguments = ["--ca", str(folder / "ca.crt"), "--key", str(folder / "site0"), "--client-id", "0"]
    assert main(["deploy", "site", "--superlink", address, "--config", CONFIG, *arguments]) == 2
    assert f"HOST:PORT; got {address}." in capsys.readouterr().err


def test_settings_of_data_that_cannot_be_are_found_before_the_federation_is_asked(folder, tmp_path, capsys):
    own = tmp_path / "site.yaml"
    own.write_text("data: {batch_size: -512}\n")
    assert checked(folder, tmp_path, free_port(), "--site", str(own)) != 0
    said = capsys.readouterr()
    assert "512" in said.err
    assert "SuperLink" not in said.err


def test_a_certificate_with_another_s_key_is_refused(folder, tmp_path, capsys):
    shutil.copy(folder / "site0.tls.crt", tmp_path / "mixed.crt")
    shutil.copy(folder / "site1.tls.key", tmp_path / "mixed.key")
    assert checked(folder, tmp_path, free_port(), "--tls", str(tmp_path / "mixed")) == 2
    assert "belong together" in capsys.readouterr().err


def test_another_server_behind_the_certificate_is_not_taken_for_flower(folder, tmp_path, capsys):
    with superlink(folder, body=b"who are you?") as port:
        assert checked(folder, tmp_path, port) == 2
    assert f"401 from localhost:{port}" in capsys.readouterr().err


def test_a_certificate_of_another_authority_is_refused(folder, tmp_path, capsys):
    keys.prepare(tmp_path, sites=1, hosts=["localhost"])
    assert checked(folder, tmp_path, free_port(), "--tls", str(tmp_path / "site0.tls")) == 2
    assert "did not sign" in capsys.readouterr().err


def test_a_key_that_flower_does_not_take_is_refused(folder, tmp_path, capsys):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    none, form = serialization.NoEncryption(), serialization.PrivateFormat.OpenSSH
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.PEM, form, none)
    (tmp_path / "site0").write_bytes(key)
    assert checked(tmp_path, tmp_path, free_port(), ca=folder / "ca.crt") == 2
    assert "elliptic curves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"trainer: {accelerator: cuda}\n", "must build it"),
        (b"trainer: {strategy: foo}\n", "the settings below trainer: must make a Trainer"),
        (b"data: {max_samples: \xff}\n", "site.yaml ('utf-8' codec"),
    ],
)
def test_what_other_libraries_refuse_is_one_line(folder, tmp_path, capsys, text, said):
    if b"cuda" in text and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "site.yaml").write_bytes(text)
    assert checked(folder, tmp_path, free_port(), "--site", str(tmp_path / "site.yaml")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("number", ["-1", "99"])
def test_a_number_that_no_client_has_is_refused(folder, tmp_path, capsys, number):
    assert checked(folder, tmp_path, free_port(), "--client-id", number) == 2
    assert "client" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_folder_that_cannot_be_written_are_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert checked(folder, tmp_path / "file", free_port()) == 2
    assert "--state" in capsys.readouterr().err
    with superlink(folder, is_asked=False) as port:
        assert checked(folder, tmp_path, free_port(), "--port", str(port)) == 2
    assert "--port" in capsys.readouterr().err


def test_a_key_that_is_none_is_refused(folder, tmp_path, capsys):
    (tmp_path / "site0").write_text("not a key")
    with superlink(folder, is_asked=False) as port:
        assert checked(tmp_path, tmp_path, port, ca=folder / "ca.crt") == 2
    assert "PEM" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_the_fingerprint_is_that_of_ssh_keygen(folder):
    listed = subprocess.run(
        ["ssh-keygen", "-lf", str(folder / "site0.pub")], capture_output=True, text=True, check=True
    )
    assert keys.fingerprint(folder / "site0") in listed.stdout
