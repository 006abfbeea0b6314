"""Signals that arrive while files are switched or removed are handled afterwards."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def delayed_signals() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of a `with` block.

    Outside the main thread Python runs no signal handlers, so nothing needs to be delayed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {}
    for number in filter(None, (getattr(signal, name, None) for name in _NAMES)):
        handler = signal.getsignal(number)
        # Ignored signals stay ignored. A handler of C code (None) cannot be put back.
        if handler not in (signal.SIG_IGN, None):
            before[number] = handler
            signal.signal(number, lambda got, frame: arrived.append((got, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handler = before[number]
            if callable(handler):
                handler(number, frame)
            else:
                signal.raise_signal(number)
