"""Acts as ``flwr-clientapp`` for a site's SuperNode: hands its arguments to the process of ``forkserver.py``, waits.

Run by path, with the standard library alone: it is there to start in no time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def main() -> None:
    """Pass on arguments, environment, folder and standard streams; end as the process that did the work ended.

    Where no forkserver listens, become the command that needs none.
    """
    path, *rest = sys.argv[1:]
    end = rest.index("--")
    cold, arguments = rest[:end], rest[end + 1 :]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect(path)
            socket.send_fds(link, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
            answers = link.makefile()
            is_taken = bool(answers.readline())
        except OSError:
            is_taken = False
        if is_taken:  # from here on a second process would do the task twice
            sys.exit(int(answers.readline() or 1))
    print("the process that has imported everything is gone; starting anew takes longer", file=sys.stderr, flush=True)
    os.execv(cold[0], [*cold, *arguments])


if __name__ == "__main__":
    main()
