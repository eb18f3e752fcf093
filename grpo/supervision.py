"""What a run does about actors that die or hang: it starts what is missing again, and goes on.

    driver thread   alive? alive? alive? ...           no answer for ray.heartbeat_timeout_s: the process is killed
    driver          step ─ step ─ ✗ ActorError ─ end all actors ─ start them again ─ newest checkpoint ─ step ─ ...

An actor answers heartbeats from a thread of its own, so a long step is no silence. Who may be started again, and how often,
is counted here; that a run goes on exactly is the checkpoint's doing.
"""

import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.core.generated.common_pb2 import NODE_OUT_OF_MEMORY
from ray.core.generated.gcs_pb2 import WorkerTableData
from ray.exceptions import ActorUnavailableError, RaySystemError

from grpo.config_sections import RayConfig
from grpo.errors import ActorError, times
from grpo.leftovers import marked
from grpo.preemption import REQUEST, Preempted, listen
from grpo.remote import DEATHS, GONE, ask, get_all, of_memory, wait_until_back
from grpo.resume import Config

PROCESSES = Path("/proc")  # where there is one
BLIND = 4  # times ray.heartbeat_timeout_s: whether a process on another machine computes, or hangs, cannot be seen from here


@contextmanager
def attended(config: Config) -> Iterator[None]:
    """Take requests to end, and leave nothing behind that the next run does not remove."""
    with marked(), listen(config.train.grace_s, config.train.max_wall_time):
        yield


def supervised(
    config: Config,
    run_dir: Path,
    build: Callable[[Config, Path, "Supervisor"], AbstractContextManager],
    train: Callable[[Any], None],
) -> None:
    """Build the run, train and finish it; where an actor dies, again from the newest checkpoint, as resume= does."""
    supervisor = Supervisor(config.ray)
    with attended(config):
        while True:
            try:
                with build(config, run_dir, supervisor) as run:
                    run.begin()
                    train(run)
                    run.finish()
                return
            except ActorError as error:
                checkpoint = _latest(run_dir)
                if REQUEST.reason is not None:  # a checkpoint of what is lost would be the one that there is
                    stop = Preempted(REQUEST.reason)
                    stop.saved = checkpoint or "nothing"
                    raise stop from None
                again = supervisor.count(error, f"{checkpoint or 'no checkpoint'} is whole: go on with resume={run_dir}")
                print(f"Warning: {error}; the run goes on from {checkpoint or 'its start'} ({again})", file=sys.stderr)
            config = replace(config, resume=str(run_dir))


def _latest(run_dir: Path) -> str | None:
    latest = run_dir / "checkpoints" / "LATEST"
    return latest.read_text().strip() if latest.is_file() else None


def role(actor: str) -> str:
    """`inference actor 1` is of the role inference."""
    return re.sub(r"^the (first )?| actor( \d+)?$", "", actor)


class Supervisor:
    """Counts how often actors were started again, and has them watched."""

    def __init__(self, config: RayConfig) -> None:
        self.config, self.most = config, config.max_restarts
        self.watched: dict[str, ActorHandle] = {}
        self._watch: Watch | None = None
        self.fallen: set[str] = set()
        self.told: Counter[str] = Counter()  # restarts of an actor that were said,
        self.told_of: set[bytes] = set()  # and Ray's ids of processes that it was said to have ended for memory
        self.at: Callable[[], int] | None = None  # the optimiser step that the run is behind, once there is one
        self.counts: Counter[str] = Counter()  # by the actors' names
        self.mended: Counter[str] = Counter()  # of those, the ones after which the run went on
        self.before: Counter[str] = Counter()  # by role, of the processes that were at this run before this one
        self.engines: list[str] = []  # by their names, those that the run has,
        self.gone: set[str] = set()  # and those that it goes on without

    @property
    def restarts(self) -> dict[str, int]:
        """How often actors of each role were started again."""
        total = Counter(self.before)
        for actor in self.counts.keys() | self.watched.keys():
            total[role(actor)] += self._count(actor)
        return {its: count for its, count in total.items() if count}

    def left(self, actor: str) -> int:
        """How often it may be started again."""
        return max(0, self.most - self._count(actor))

    def _count(self, actor: str) -> int:
        """With how often Ray has started it again since it is watched."""
        watched = self.watched.get(actor)
        return self.counts[actor] + (0 if watched is None else life(watched)[0])

    def engines_of(self, planned: Iterable[str]) -> list[str]:
        """The engines to start: without those that are gone for good."""
        self.engines = [name for name in planned if name not in self.gone]
        return self.engines

    def lose(self, actor: str) -> bool:
        """Whether the run goes on for good without this actor: an engine, where others are left (ray.min_engines)."""
        least = self.config.min_engines
        if least is None or actor not in self.engines or len(self.engines) <= least:
            return False
        self.engines.remove(actor)
        self.gone.add(actor)
        return True

    def take_up(self, restarts: dict[str, int]) -> None:
        """Go on counting from a checkpoint's, unless its run is this process's own."""
        if not self.counts:
            self.before = Counter(restarts)

    def count(self, error: ActorError, kept: str) -> str:
        """The actor that `error` is of is to be started again with all others; returns the count in words.

        Where that was done ray.max_restarts times already, the others alone are, if the run can do without it; else raises
        ActorError, with what is `kept`. Raises `error` itself where no actor is to blame.
        """
        if not error.actor:
            raise error
        where = f", behind step {self.at()}" if self.at else ""
        # Ray has started it again already, if only to be ended with all others.
        counted = error.died and self.counts[error.actor] > self.mended[error.actor]
        if not counted and self.counts[error.actor] >= self.most:
            if self.lose(error.actor):
                return f"without {error.actor} from now on, see ray.min_engines{where}"
            wrote = f"; it wrote last: {' | '.join(error.log)}" if error.log else ""
            raise ActorError(
                f"{error}{where}{wrote}; it was started again {times(self.most)}, as often as ray.max_restarts allows; "
                f"{kept}"
            ) from None
        self.counts[error.actor] += not counted
        self.mended, self.told = self.counts.copy(), self.counts.copy()  # all are started again, and that is said
        return f"restart {self.counts[error.actor]} of at most {self.most}{where}"

    def bring_back(
        self,
        name: str,
        actor: ActorHandle,
        error: ActorError,
        start: Callable[[], ObjectRef],
        *steps: Callable[[], None],
    ) -> None:
        """Wait until Ray has started an actor again that has died, have it `start`, and take the further `steps` with it.

        Raises ActorError where Ray does so no more.
        """
        timeout_s, key = self.config.start_timeout_s, "ray.start_timeout_s"
        while True:
            try:
                wait_until_back(actor, name, timeout_s)
            except ActorError as gone:
                # An error that has no cause is of an earlier death: Ray was starting it again.
                told = gone if not gone.died or str(error).endswith(GONE) else error
                raise ActorError(str(told), name, gone.log) from None
            self.tell(name, str(error))
            try:
                get_all({name: start()}, timeout_s, "starting", key)
                for step in steps:
                    step()
                self.mended[name] = self._count(name)
                return
            except ActorError as another:
                if not another.died or another.actor != name:
                    raise
                error = another

    def tell(self, name: str, why: str) -> None:
        """Say that Ray has started the actor again, if that has not been said."""
        count = self._count(name)
        if count > self.told[name]:
            self.told[name] = count
            if cause := self._cause(name):
                why = f"{why.removesuffix(f': {GONE}')}: {cause}"
            where = f" behind step {self.at()}" if self.at else ""
            print(f"Warning: {why}; it is started again{where} (restart {count} of at most {self.most})", file=sys.stderr)

    def _cause(self, name: str) -> str | None:
        """Why Ray ended a process of this actor, where it did so for memory and that has not been said."""
        ended = ended_for_memory(self.watched[name])
        new = ended.keys() - self.told_of
        self.told_of |= new
        return of_memory(ended[new.pop()]) if new else None

    def take_fallen(self) -> set[str]:
        """The actors that have died since the last call, by their names; Ray may have started them again."""
        fallen, self.fallen = self.fallen, set()
        return fallen

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the actors that are given to `watch` asked for heartbeats meanwhile."""
        self.watched, self.fallen = {}, set()
        self._watch = Watch(self.config.heartbeat_timeout_s, self.config.start_timeout_s, self._heard_of_death)
        thread = threading.Thread(target=self._watch.run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        except ActorError as error:
            if error.actor in self.watched and str(error).endswith(GONE):
                with suppress(RaySystemError):  # Ray itself is gone, which is not to hide why
                    error.args = (str(error).replace(GONE, self._cause(error.actor) or GONE),)
            raise
        finally:
            self._watch.ended.set()
            thread.join()
            watched, self.watched = self.watched, {}
            for name, actor in watched.items():
                try:
                    restarts, is_gone = life(actor)
                except RaySystemError:  # Ray itself is gone, which is not to hide why
                    break
                self.counts += Counter({name: restarts})
                if is_gone:  # after the last of them it was there again
                    self.mended[name] = self.counts[name]

    def watch(self, actors: dict[str, ActorHandle]) -> None:
        """Have these actors, by their names, watched from now on; they may be starting yet, until `all_up`."""
        self.watched = self.watched | actors
        self._watch.add(actors)

    def all_up(self) -> None:
        """From now on silence is that of actors at work; each wait for one that hangs still ends by ray.timeout_s."""
        own_s = self._watch.timeout_s
        self._watch.blind_timeout_s = max(own_s, min(BLIND * own_s, self.config.timeout_s / 2))

    def _heard_of_death(self, name: str) -> None:
        self.fallen.add(name)
        self.tell(name, f"{name} died")


def life(actor: ActorHandle) -> tuple[int, bool]:
    """How often Ray has started it again, and whether it is gone for good."""
    told = ray._private.state.actors(actor._actor_id.hex())
    if not told:  # it was not even begun with
        return 0, False
    return told["NumRestarts"], told["State"] == "DEAD"


def ended_for_memory(actor: ActorHandle) -> dict[bytes, str]:
    """Of its processes those that Ray ended for their machine's memory: Ray's ids of them, and what it wrote."""
    found = {}
    for row in ray._private.state.state._connect_and_get_accessor().get_worker_table():
        worker = WorkerTableData.FromString(row)
        its = worker.worker_address.worker_id
        # The text has a line for each process that was looked at, also those that stay.
        line = rf"Actor\({actor._actor_id.hex()}\).*worker ID={its.hex()}\b"
        if worker.exit_type == NODE_OUT_OF_MEMORY and re.search(line, worker.exit_detail):
            found[its] = worker.exit_detail
    return found


@dataclass
class Watched:
    """One actor, as the watch sees it."""

    actor: ActorHandle
    call: ObjectRef
    pid: int | None = None
    pid_here: int | None = None  # the same where it runs on this machine
    silent_s: float = 0.0  # since the last answer, but for those in which it worked


class Watch:
    """Kills the process of an actor that does not answer for `timeout_s` seconds, so that every wait for it ends.

    One that is not there yet is waited for by whoever starts it. One whose process cannot be seen, on another machine, has
    `blind_timeout_s`: it may be importing or compiling, or hold Python's lock while it computes. `died` is called with the
    name of one that is gone, or answers from another process than before.
    """

    def __init__(self, timeout_s: float, blind_timeout_s: float, died: Callable[[str], None]) -> None:
        self.timeout_s, self.interval_s, self.died = timeout_s, min(2.0, timeout_s / 8), died
        self.blind_timeout_s = blind_timeout_s
        self.watched: dict[str, Watched] = {}
        self.ended = threading.Event()

    def add(self, actors: dict[str, ActorHandle]) -> None:
        self.watched |= {name: Watched(actor, ask(actor)) for name, actor in actors.items()}

    def run(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.interval_s):
            now = time.monotonic()
            # A driver that was stopped itself has heard nothing of its actors for reasons of its own.
            passed, before = min(now - before, 2 * self.interval_s), now
            self.look(passed)

    def look(self, passed_s: float) -> None:
        """Hear who has answered, `passed_s` seconds after the last look."""
        for name, watched in list(self.watched.items()):
            if ray.wait([watched.call], timeout=0)[0]:
                self._hear(name, watched)
                continue
            seen = watched.pid_here is not None and PROCESSES.is_dir()
            if watched.pid is not None and not (seen and is_at_work(watched.pid_here)):
                watched.silent_s += passed_s
            if watched.silent_s >= (self.timeout_s if seen else self.blind_timeout_s):
                self._kill(name, watched)

    def _hear(self, name: str, watched: Watched) -> None:
        watched.silent_s = 0.0
        try:
            pid, node = ray.get(watched.call)
        except ActorUnavailableError:  # Ray starts it again
            watched.pid = watched.pid or 0  # one that has not answered yet may come back as another process too
            watched.pid_here, watched.call = None, ask(watched.actor)
            return
        except DEATHS:
            del self.watched[name]  # whoever calls it is told so
            self.died(name)  # and what it had in hand is nobody's
            return
        if watched.pid not in (None, pid):
            self.died(name)
        watched.pid, watched.pid_here = pid, pid if node == ray.get_runtime_context().get_node_id() else None
        watched.call = ask(watched.actor)

    def _kill(self, name: str, watched: Watched) -> None:
        print(
            f"Warning: {name} did not answer for {watched.silent_s:.0f} s (ray.heartbeat_timeout_s) and is ended",
            file=sys.stderr,
        )
        watched.silent_s = -math.inf  # until Ray has heard of it too
        if watched.pid_here is None:
            ray.kill(watched.actor, no_restart=False)
            return
        with suppress(ProcessLookupError):
            os.kill(watched.pid_here, signal.SIGKILL)


def is_at_work(pid: int) -> bool:
    """Whether a thread of the process computes, or waits for a core or a disk to: calls have deadlines of their own.

    It may hold Python's lock for long, or share its cores with too many others. One that is stopped is not at work, and
    neither is one that waits for ever.
    """
    tasks: list[Path] = []
    with suppress(OSError):  # it ended meanwhile, or below one of its threads
        tasks = [*(PROCESSES / str(pid) / "task").glob("*/stat")]
    for task in tasks:
        with suppress(OSError):
            if task.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False
