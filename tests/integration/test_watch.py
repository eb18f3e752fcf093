"""The watch over real actors: long work is no silence, a stopped process is found out, and Ray starts it again."""

import os
import re
import signal
import sys
import time
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
import ray
from ray.actor import ActorHandle

from grpo.cluster import ANYWHERE, start_actors, start_ray
from grpo.config_sections import RayConfig
from grpo.doctor import examine
from grpo.errors import ActorError
from grpo.remote import get
from grpo.supervision import Supervisor

from .faults import is_loopback, listening

TIMEOUT_S = 2.0
CONFIG = RayConfig(heartbeat_timeout_s=TIMEOUT_S)


class Sleeping:
    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def die(self) -> None:
        print("my last words", file=sys.stderr, flush=True)
        os._exit(3)


class Eating(Sleeping):
    def eat(self) -> None:
        """Takes 4 GiB, and waits to be ended for it."""
        self.eaten = []
        for _ in range(32):
            self.eaten.append(np.ones(1 << 24))  # 128 MiB
            time.sleep(0.05)
        time.sleep(300)


class SleepingLoop(Sleeping):
    """Like an engine in the midst of a step: the event loop of its calls stands still."""

    async def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()


class Computing(Sleeping):
    def work(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return os.getpid()


class Locking(Computing):
    """Holds Python's lock, so that no thread of its own can answer."""

    def work(self, seconds: float) -> int:
        end, digits = time.monotonic() + seconds, 1_000_000
        while time.monotonic() < end:
            start = time.monotonic()
            pow(3, digits)
            digits *= 2 if time.monotonic() - start < TIMEOUT_S else 1
        return os.getpid()


@pytest.fixture
def started():
    """An actor of each kind by name, as a run starts them; Ray may start each again once."""
    with ExitStack() as closing:
        start_ray(CONFIG, 8, closing)
        actors = {
            cls.__name__: start_actors(cls, [ANYWHERE], "cpu", 0, 1, {}, restarts=[1])[0]
            for cls in (Sleeping, SleepingLoop, Computing, Locking)
        }
        pids = dict(zip(actors, ray.get([actor.pid.remote() for actor in actors.values()]), strict=True))
        yield actors, pids


def test_long_work_is_no_silence_and_a_stopped_process_is_killed_and_started_again(started, capsys):
    actors, pids = started
    supervisor = Supervisor(CONFIG)
    with supervisor.watching():
        supervisor.watch(actors)
        calls = [actor.work.remote(3 * TIMEOUT_S) for actor in actors.values()]
        assert ray.get(calls) == list(pids.values())
        assert supervisor.restarts == {} and capsys.readouterr().err == ""
        call, stopped = actors["SleepingLoop"].work.remote(60), time.monotonic()
        time.sleep(0.5)
        os.kill(pids["SleepingLoop"], signal.SIGSTOP)
        with pytest.raises(ActorError, match=r"^the sleeping actor died while working: its process is gone$") as error:
            get(call, 60, "the sleeping actor", "working")
        assert time.monotonic() - stopped < TIMEOUT_S + 10
        supervisor.bring_back("SleepingLoop", actors["SleepingLoop"], error.value, actors["SleepingLoop"].pid.remote)
        assert supervisor.restarts == {"SleepingLoop": 1}
        said = capsys.readouterr().err
        assert "SleepingLoop did not answer for 2 s (ray.heartbeat_timeout_s) and is ended" in said
        # Told once, whether the watch or whoever waited for the call was the first to hear of the death.
        assert said.count("died") == said.count("it is started again (restart 1 of at most 3)") == 1
        for _ in range(2):
            with pytest.raises(ActorError) as error:
                get(actors["Sleeping"].die.remote(), 60, "Sleeping", "dying")
            if not error.value.log:
                supervisor.bring_back("Sleeping", actors["Sleeping"], error.value, actors["Sleeping"].pid.remote)
        assert "my last words" in error.value.log
        with pytest.raises(ActorError, match=r"^Sleeping died while dying: "):
            supervisor.bring_back("Sleeping", actors["Sleeping"], error.value, actors["Sleeping"].pid.remote)
    assert supervisor.counts == {"SleepingLoop": 1, "Sleeping": 1}


@pytest.mark.slow  # what else runs on the machine must keep its memory meanwhile
@pytest.mark.skipif(psutil.virtual_memory().available < 6 << 30, reason="less than 6 GiB of memory are free")
def test_an_actor_that_ray_ends_for_memory_is_said_to_be_and_no_other(monkeypatch, capsys):
    """Ray takes the machine's memory for full at 3 GiB more than there are in use."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", str(threshold))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "200")
    full = r"Ray ended it, since its machine's memory was almost full \([\d.]+ of [\d.]+ GiB; docs/memory.md says .*\)"
    supervisor, timeout_s = Supervisor(RayConfig()), CONFIG.start_timeout_s
    with ExitStack() as closing:
        start_ray(CONFIG, 2, closing)
        closing.enter_context(supervisor.watching())

        def started(name: str, most: int) -> ActorHandle:
            (actor,) = start_actors(Eating, [ANYWHERE], "cpu", 0, 1, {}, restarts=[most])
            get(actor.pid.remote(), timeout_s, name, "starting")
            supervisor.watch({name: actor})
            return actor

        def warning_of_death(name: str, actor: ActorHandle, kill: bool) -> str:
            pid = get(actor.pid.remote(), timeout_s, name, "telling its process")
            call = actor.eat.remote()
            if kill:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(ActorError, match=f"^{name} died while eating: its process is gone$") as error:
                get(call, timeout_s, name, "eating")
            supervisor.bring_back(name, actor, error.value, actor.pid.remote)
            lines = capsys.readouterr().err.splitlines()
            (said,) = [line for line in lines if line.startswith("Warning: ")]  # Ray has words of its own
            return said

        eater = started("the eater", 2)
        said = warning_of_death("the eater", eater, kill=False)
        died = rf"the eater died( while eating)?: {full}"  # whether the watch hears of it first is chance
        assert re.fullmatch(rf"Warning: {died}; it is started again \(restart 1 of at most 3\)", said)
        other = started("the other", 1)
        assert "memory" not in warning_of_death("the other", other, kill=True)
        ray.kill(other)  # else Ray might choose it
        assert "memory" not in warning_of_death("the eater", eater, kill=True)
        with pytest.raises(ActorError, match=r"^the eater died while eating: ") as error:
            get(eater.eat.remote(), timeout_s, "the eater", "eating")
        # Where Ray takes over a second to tell of the death, the call has no cause, and coming back has it.
        with pytest.raises(ActorError, match=f"^the eater died while (eating|being started again): {full}$"):
            supervisor.bring_back("the eater", eater, error.value, eater.pid.remote)
    assert supervisor.counts == {"the eater": 2, "the other": 1}


def test_ray_listens_to_this_machine_alone_has_no_worker_in_advance_and_ends_with_its_stopped_processes():
    with ExitStack() as closing:
        start_ray(CONFIG, 4, closing)
        (actor,) = start_actors(Sleeping, [ANYWHERE], "cpu", 0, 1, {})
        process = psutil.Process(ray.get(actor.pid.remote()))
        family = psutil.Process().children(recursive=True)
        assert not [child for child in family if child.name() == "ray::IDLE"]
        addresses = listening(psutil.Process())
        assert addresses and all(map(is_loopback, addresses))
        process.send_signal(signal.SIGSTOP)
    assert not process.is_running()
    assert not any(child.name().startswith(("ray", "gcs")) for child in psutil.Process().children(recursive=True))


def test_the_doctor_starts_the_parts_of_a_run_and_proves_a_push(capsys):
    assert examine(["inference_model.backend=transformers", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [
        "installation",
        "devices",
        "disk",
        "shared memory",
        "Ray",
        "engine and trainer",
        "weight push",
    ]
    assert not ray.is_initialized()
