"""What a run does when somebody asks it to stop: it gives the round up and ends with a whole checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Notes SIGINT and SIGTERM. The first one asks to stop; a second Ctrl-C ends the process at once.

    Attributes:
        number: The signal that asked to stop, if any.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._handlers: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether somebody has asked to stop."""
        return self.number is not None

    def listen(self) -> None:
        """Replace the handlers of this process, in its main thread."""
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.number is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.number = number

        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, handle)

    def ignore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
