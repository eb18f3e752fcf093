"""The watch over real actors: long work is no silence, a stopped process is found out, and Ray starts it again."""

import os
import signal
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
import ray

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
