"""Faults for runs in this process: an actor's process is killed or stopped some time into a phase of the run.

Nothing else is changed: the parts are the real ones. A phase is one call of the driver's, see PHASES.
"""

import functools
import importlib
import ipaddress
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

PHASES = {
    "generate": "grpo.collector:InferencePolicy.forward",  # sync
    "grade": "grpo.grading:GradingPool.grade",  # sync; in async mode collectors do
    "reference": "grpo.pools:ReferencePool.score",  # sync, likewise
    "wait": "grpo.run_async:AsyncRun._next_batch",  # async
    "train": "grpo.pools:TrainerPool.step",
    "push": "grpo.push:WeightPush.__call__",
    "evaluate": "grpo.run:Run.evaluate",
    "save": "grpo.pools:TrainerPool.save",
}
NAMES = {
    "inference": "ray::Inference",
    "reference": "ray::Reference",
    "training": "ray::Trainer",
    "collector": "ray::Collector",
    "replay buffer": "ray::GroupBuffer",
}
ROLES = {"sync": ["inference", "reference", "training", "grading"]}
ROLES["async"] = [*ROLES["sync"], "collector", "replay buffer"]
LONGEST_DELAY_S = 0.2
LOOK_S = 0.1


@dataclass
class Fault:
    """`role` gets the signal in the `occurrence`-th time of `phase`, counted over all attempts of the run."""

    phase: str
    occurrence: int
    role: str
    signal: signal.Signals
    struck_s: float | None = None  # when,
    restarts: int = 0  # how often its role had been started again by then,
    recovery_s: float | None = None  # and how long it was until the next step with that one more


@dataclass
class Faults:
    """To be installed before the run; what has not struck when the test ends does so no more."""

    faults: list[Fault]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    times: Counter = field(default_factory=Counter)
    restarts: dict[str, int] = field(default_factory=dict)

    def install(self, monkeypatch) -> None:
        for phase, where in PHASES.items():
            module, _, name = where.partition(":")
            cls, method = getattr(importlib.import_module(module), name.split(".")[0]), name.split(".")[1]
            monkeypatch.setattr(cls, method, self._wrapped(getattr(cls, method), phase))
        run = importlib.import_module("grpo.run").Run
        step = run.step

        @functools.wraps(step)
        def stepped(its, batch):
            self.restarts = its.supervisor.restarts
            step(its, batch)
            self._look(its.supervisor.restarts)

        monkeypatch.setattr(run, "step", stepped)
        self.is_over = lambda: run.step is not stepped

    def _wrapped(self, original, phase: str):
        @functools.wraps(original)
        def entered(*arguments, **keywords):
            self.times[phase] += 1
            for fault in self.faults:
                if (fault.phase, fault.occurrence) == (phase, self.times[phase]):
                    threading.Timer(self.rng.uniform(0, LONGEST_DELAY_S), self._strike, (fault,)).start()
            return original(*arguments, **keywords)

        return entered

    def _strike(self, fault: Fault) -> None:
        while not self.is_over():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ended as it was looked for
                if victims := processes(fault.role):
                    restarts = self.restarts.get(fault.role, 0)
                    os.kill(self.rng.choice(victims).pid, fault.signal)
                    fault.struck_s, fault.restarts = time.monotonic(), restarts
                    return
            time.sleep(LOOK_S)  # another fault's recovery has all of them started again

    def _look(self, restarts: dict[str, int]) -> None:
        self.restarts = restarts
        for fault in self.faults:
            if fault.role == "grading":  # which is counted when the run ends; it takes env.grading_timeout_s at most
                continue
            if fault.struck_s is not None and fault.recovery_s is None and restarts.get(fault.role, 0) > fault.restarts:
                fault.recovery_s = time.monotonic() - fault.struck_s


def processes(role: str) -> list[psutil.Process]:
    """This run's processes of a role."""
    found = psutil.Process().children(recursive=True)
    children = [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
    if role == "grading":
        servers = {child.pid for child in children if _is_forkserver(child)}
        return [child for child in children if child.ppid() in servers]
    return [child for child in children if child.name().startswith(NAMES[role])]


def _is_forkserver(process: psutil.Process) -> bool:
    return any("multiprocessing.forkserver" in part for part in process.cmdline())


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def listening(process: psutil.Process) -> set[str]:
    """The addresses that a process and those that it started listen to."""
    family = [process, *process.children(recursive=True)]
    return {c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
