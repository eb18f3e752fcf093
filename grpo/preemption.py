"""Preemption: a signal, or the clock, asks the run to save what it has and to end.

The request only raises a flag. The main thread answers it with `Preempted` where the run's state is whole: between two
steps, or while it waits for work that a resumed run will do again (sampling, scoring, evaluating).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpo.errors import EXIT_PREEMPTED, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was asked to end, and its state is whole. `saved` says under which name, once it is.

    It is no error: a program that does not catch it ends with EXIT_PREEMPTED and without a traceback.
    """

    saved = ""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = EXIT_PREEMPTED

    def told(self, again: str) -> str:
        """One line for the user; `again` is how a run that was saved goes on."""
        if not self.saved:
            return f"Ended by {self} before there was anything to save: start it again as it was started"
        return f"Ended by {self} after saving {self.saved}; it goes on with {again}"


class GraceOver(UserError):
    """The run was asked to end, and could not be saved in time."""


class _Request:
    """What this process was asked; signals go to a process, so there is one."""

    reason: str | None = None
    too_late: GraceOver | None = None  # once the grace period is over
    ended: bool = False  # what still waits beside the main thread is to stop before Ray does
    at_once: bool = False  # there is nothing to save
    in_ray: bool = False  # whose waits print what a signal handler raises, and go on
    handlers: dict[int, Callable] = {}  # of the signals, while `listen` lasts

    def raise_if_too_late(self) -> None:
        if self.too_late is not None:
            raise self.too_late

    def check(self) -> None:
        """Raise Preempted if the run was asked to end. Work beside the main thread goes on: the main thread saves it."""
        if self.reason is not None and threading.current_thread() is threading.main_thread():
            raise Preempted(self.reason)


REQUEST = _Request()


@contextmanager
def listen(grace_s: float, max_wall_time: float | None) -> Iterator[None]:
    """Take SIGTERM, SIGUSR1 and the end of `max_wall_time` seconds as the request to end.

    A second signal raises KeyboardInterrupt, and `grace_s` seconds after the request GraceOver is raised, wherever the main
    thread is; waits for Ray look at `REQUEST.raise_if_too_late`.
    """

    def ask(reason: str) -> None:
        REQUEST.reason = reason
        signal.setitimer(signal.ITIMER_REAL, grace_s)

    def on_signal(number: int, frame: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # a forked child of ours ends as it would have
        elif REQUEST.reason is None:
            ask(signal.Signals(number).name)
            if REQUEST.at_once:
                REQUEST.check()
        else:
            raise KeyboardInterrupt

    def on_clock(number: int, frame: object) -> None:
        if REQUEST.reason is None:
            ask("train.max_wall_time")
            if REQUEST.at_once:
                REQUEST.check()
            return
        REQUEST.too_late = GraceOver(
            f"the run was to end ({REQUEST.reason}), and could not be saved within train.grace_s ({grace_s:g}): the "
            "last whole checkpoint is named in checkpoints/LATEST; give it more time"
        )
        if not REQUEST.in_ray:
            raise REQUEST.too_late

    owner = os.getpid()
    REQUEST.handlers = dict.fromkeys(SIGNALS, on_signal) | {signal.SIGALRM: on_clock}
    before = take_signals()
    signal.setitimer(signal.ITIMER_REAL, max_wall_time or 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        REQUEST.reason, REQUEST.too_late, REQUEST.ended, REQUEST.handlers = None, None, False, {}
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_once() -> Iterator[None]:
    """While there is nothing to save: a request to end raises Preempted wherever the main thread is."""
    REQUEST.check()
    REQUEST.at_once = True
    try:
        yield
    finally:
        REQUEST.at_once = False


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back for the seconds in which libraries are imported, Hydra composes, or Ray starts.

    There it would be lost in somebody's bare except, crash an extension module, or leave a Ray behind that nobody knows of.
    """
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


def take_signals() -> dict[int, object]:
    """Take the signals that `listen` listens to, again where Ray took them for itself; returns what had them."""
    return {number: signal.signal(number, handler) for number, handler in REQUEST.handlers.items()}


def saved_in_time() -> None:
    """What could be lost is on the disk: the grace period no longer matters."""
    signal.setitimer(signal.ITIMER_REAL, 0.0)
