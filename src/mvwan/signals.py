"""What a process does when it is asked to stop. Knows nothing of what it was doing."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_sigterm(answer: Callable[[], None]) -> Iterator[None]:
    """In this block SIGTERM calls `answer`, which may raise; outside of the main thread, where Python gives no signals, nothing changes."""

    def call(number: int, frame: FrameType | None) -> None:
        answer()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, call)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
