"""Signals that ask a rank to stop: remembered, and seen at once by the watch even while the main thread is blocked."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP ask to stop; none of them, however often it comes, ends the process.

    A signal that this process was started to ignore (Ctrl-C in the background, a hang-up under nohup) stays ignored.

    Args:
        alone: called with the number in the main thread, as soon as that can; may raise.
        by_person: a second Ctrl-C raises KeyboardInterrupt. Under torchrun it does not: the launcher may repeat it.

    Attributes:
        requested: set when the first signal has come.
        number: of that signal.
        wake: a file descriptor that can be read when a signal has come, whatever the main thread is doing.
    """

    def __init__(self, alone: Callable[[int], None], *, by_person: bool):
        self.requested, self.number = threading.Event(), 0
        self._alone, self._by_person, self._interrupts = alone, by_person, 0
        self._old_handlers, self._old_wake = {}, None
        self.wake, self._written = os.pipe()
        for end in (self.wake, self._written):
            os.set_blocking(end, False)

    def install(self) -> None:
        """Take the signals over; does nothing outside the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._old_wake = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        if self._old_wake is not None:
            signal.set_wakeup_fd(self._old_wake)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()

    def close(self) -> None:
        """After restore, when nobody waits for `wake` any more."""
        os.close(self.wake)
        os.close(self._written)

    def poke(self) -> None:
        """Make `wake` readable without a signal."""
        with contextlib.suppress(BlockingIOError):  # full of signals: readable
            os.write(self._written, b"\0")

    def collect(self) -> None:
        """Note the signals whose numbers `wake` has; the main thread may not have got to them."""
        try:
            numbers = os.read(self.wake, 4096)
        except BlockingIOError:
            return
        for number in numbers:
            if number in self._old_handlers:
                self._note(number)

    def _note(self, number: int) -> None:
        if not self.requested.is_set():
            self.number = number
            self.requested.set()

    def _receive(self, number: int, _) -> None:
        self._note(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 and self._by_person:
                raise KeyboardInterrupt
        self._alone(number)


def name_of(number: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name
