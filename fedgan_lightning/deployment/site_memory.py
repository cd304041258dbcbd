"""What a site remembers of what it has told, over restarts and runs: what sums together would tell is not told twice.

Two sums over nearly the same samples differ by the samples that are in one of them alone; two sums over nearly the same
sites by what is those sites' own. So a site remembers which samples, by their hashes, and which sites were in what it
told. The file can be read by its owner alone, and no message has a field for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.errors import ConfigurationError, ProtocolError, message
from fedgan_lightning.files import replacing

DAY_SECONDS = 86_400.0
#: Sums of updates that are remembered, each of one state of the global networks; and runs.
MOST_SUMS, MOST_RUNS = 5000, 1000
#: Samples whose hashes are made at a time.
CHUNK = 1024


class SiteMemory:
    """The memory of one client of one site.

    Args:
        folder: Its private folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "memory.json"

    # ------------------------------------------------------------------ runs

    def check_run(self, run: str, *, client_id: int, data: str) -> None:
        """Refuse to go on in a run as another client, or with other samples, than this site began it with.

        Raises:
            ConfigurationError: If it is so.
        """
        if not run:
            return
        with self.opened() as known:
            runs = known.setdefault("runs", {})
            begun = runs.setdefault(run, {"client_id": client_id, "data": data})
            for name in list(runs)[:-MOST_RUNS]:
                del runs[name]
        if (begun["client_id"], begun["data"]) != (client_id, data):
            what = "other samples" if begun["client_id"] == client_id else f"client {begun['client_id']}'s number"
            raise ConfigurationError(
                message(
                    "a site must go on in a run with the number and the samples that it began it with",
                    received=f"a run that this site began with {what}",
                    fix="put them back, or agree with the server on a new run",
                )
            )

    # ------------------------------------------------------------------ queries about samples

    def check_query(
        self,
        query: str,
        hashes: np.ndarray,
        *,
        run: str,
        fewest: int,
        most_a_day: int,
        session: int | None = None,
        remember: bool = True,
    ) -> None:
        """Refuse what was answered in this run, what is nearly what was answered before, and too many queries.

        Args:
            query: Hash of the query with all its tensors.
            hashes: Of the samples, sorted.
            run: The run.
            fewest: By so many samples it must differ from what was answered before, unless it is over the same.
            most_a_day: Queries of 24 hours.
            session: That of secure aggregation; what is told of it is remembered when its sum is opened.
            remember: Whether it is answered now; otherwise it is looked at alone.

        Raises:
            ConfigurationError: If it is so.
        """
        with self.opened() as known:
            asked = [at for at in known.get("asked", []) if at > time.time() - DAY_SECONDS]
            if len(asked) >= most_a_day:
                raise _refused(
                    f"a site must answer at most {most_a_day} queries a day",
                    f"{len(asked)} in the last 24 hours",
                    "wait, or raise most_queries_a_day in the site's policy",
                )
            if run and query in known.get("queries", {}).get(run, []):
                raise _refused(
                    "a site must answer a query once in a run",
                    "one that it has answered",
                    "continue the run in its own directory, where the answer lies, or begin a new run",
                )
            for name in known.get("sets", []):  # whatever was asked: one network's features can give another's
                self._check_near(hashes, name, fewest)
            if not remember:
                return
            told = {"run": run, "query": query, "set": self._written(hashes)}
            known["asked"] = [*asked, time.time()]
            if session is None:
                _remember(known, told)
            else:
                known["pending"] = {str(session): told}

    def _check_near(self, hashes: np.ndarray, name: str, fewest: int) -> None:
        before = np.load(self.folder / "told" / f"{name}.npy", allow_pickle=False)
        differing = len(np.setxor1d(hashes, before))
        if 0 < differing < fewest:
            raise _refused(
                f"sums must differ from those that a site told before by at least {fewest} samples, or by none",
                f"{differing} samples that are in one of them alone",
                "wait until more samples have come, or take the metric out of evaluation.metrics",
            )

    def _written(self, hashes: np.ndarray) -> str:
        """Return the name under which the hashes of these samples lie in the folder."""
        name = hashlib.sha256(hashes.tobytes()).hexdigest()[:32]
        with replacing(self.folder / "told" / f"{name}.npy", mode=0o600) as file:
            np.save(file, hashes, allow_pickle=False)
        return name

    # ------------------------------------------------------------------ sums over sites

    def note_opened(self, session: int) -> None:
        """Remember what was told under the masks of a session, now that they are taken off."""
        with self.opened() as known:
            if (told := known.pop("pending", {}).get(str(session))) is not None:
                _remember(known, told)

    def check_cohort(self, about: str, survivors: Iterable[int], *, is_task: bool = False) -> None:
        """Refuse to open a sum of which another group's was opened before: what sites that are in one group alone have
        told could be computed from the two.

        Args:
            about: What is summed up: a state of the global networks, or a query.
            survivors: Who is in the sum.
            is_task: Whether it is a state: of these the last ones are remembered, of queries all.

        Raises:
            ProtocolError: If it was.
        """
        group = sorted(survivors)
        with self.opened() as known:
            sums = known.setdefault("states" if is_task else "sums", {})
            for before in sums.get(about, []):
                if before != group:
                    alone = sorted({*before} ^ {*group})
                    raise ProtocolError(
                        message(
                            "a site must open a sum with one group of sites alone",
                            received=f"clients {group} after {before}, so that clients {alone} would be told apart",
                            fix="bring the same sites back, or set new_members: answer in the sites' policies",
                        )
                    )
            if group not in sums.setdefault(about, []):
                sums[about].append(group)
            for name in list(sums)[:-MOST_SUMS] if is_task else ():
                del sums[name]

    # ------------------------------------------------------------------ on disk

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """Give what is remembered to be changed; it is written where the body ends, and nobody else writes meanwhile.

        Raises:
            ConfigurationError: If the file cannot be read: a site that has forgotten what it told could tell too much.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".memory"):
            try:
                known = json.loads(self.path.read_text()) if self.path.exists() else {}
                if not isinstance(known, dict):
                    raise ValueError("no mapping")
            except (ValueError, OSError) as error:
                raise ConfigurationError(
                    message(
                        "a site must remember what it has told",
                        received=f"{self.path}, which cannot be read ({error})",
                        fix="restore the file; without it, take another --state folder and a new run",
                    )
                ) from error
            yield known
            with replacing(self.path, mode=0o600) as file:
                file.write(json.dumps(known).encode())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hashes_of(view: ClientSamples, positions: torch.Tensor) -> np.ndarray:
    """Return 64 bits of a hash of each of these samples, sorted; a sample that is there twice has two."""
    seen: Counter[bytes] = Counter()
    found: list[int] = []
    for some in positions.split(CHUNK):
        for row in view.take(some)[0].contiguous().flatten(1).numpy():
            content = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            seen[content] += 1
            numbered = hashlib.blake2b(content + b"%d" % seen[content], digest_size=8)
            found.append(int.from_bytes(numbered.digest(), "little"))
    return np.sort(np.array(found, dtype=np.uint64))


def _remember(known: dict[str, Any], told: dict[str, str]) -> None:
    known.setdefault("queries", {}).setdefault(told["run"], []).append(told["query"])
    if told["set"] not in known.setdefault("sets", []):
        known["sets"].append(told["set"])


def _refused(rule: str, received: str, fix: str) -> ConfigurationError:
    return ConfigurationError(message(rule, received=received, fix=fix))
