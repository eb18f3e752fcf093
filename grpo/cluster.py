"""Ray, and the processes that a run starts on it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants
from ray.actor import ActorHandle

from grpo.config import RayConfig
from grpo.pools import named
from grpo.preemption import REQUEST, take_signals
from grpo.remote import HEARTBEATS, get, get_all

END_S = 1.0  # that Ray's processes have to end by themselves


def start_ray(config: RayConfig, num_processes: int, closing: ExitStack) -> None:
    """Start Ray for `num_processes` actors; `closing` ends it."""
    path = [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    others = set(psutil.Process().children())
    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=num_processes,
            object_store_memory=config.object_store_memory,
            _temp_dir=config.temp_dir,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
        )
    closing.callback(_end_ray, [child for child in psutil.Process().children() if child not in others])
    take_signals()  # Ray takes SIGTERM for itself
    REQUEST.ended = False


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray listen to this machine alone.

    It does where it takes 127.0.0.1 for its address, which it refuses to be told, and finds by itself where it believes that
    this system is none for clusters.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _end_ray(daemons: list[psutil.Process]) -> None:
    """End Ray and whatever `daemons` started, with those that are stopped and would not hear of it."""
    family = list(daemons)
    for daemon in daemons:
        with suppress(psutil.NoSuchProcess):
            family += daemon.children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                process.kill()
    ray.shutdown()
    _, left = psutil.wait_procs(family, timeout=END_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def start_actors(
    cls: type,
    count: int,
    device: str,
    gpus: float,
    threads: int,
    environment: dict[str, str],
    *arguments,
    restarts: list[int] | None = None,
) -> list[ActorHandle]:
    """`count` actors of `cls`, each with its share of the machine; they are not waited for.

    Ray starts each of them again as often as `restarts` has it, without what it was told before.
    """
    common = {"OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        # Large tensors come from the heap, which keeps its pages: faulting them in anew costs a push a third of its time.
        common |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_ARENA_MAX": "1"}
        # Idle OpenMP threads spin by default, on cores that other actors compute on: pushes took four times as long.
        common |= {"GOMP_SPINCOUNT": "30000"}
    options = {
        "num_cpus": 1,
        "num_gpus": gpus,
        "runtime_env": {"env_vars": common | environment},
        "concurrency_groups": HEARTBEATS,
    }
    return [ray.remote(**options, max_restarts=most)(cls).remote(*arguments) for most in restarts or [0] * count]


def join_ranks(trainers: list[ActorHandle], config: RayConfig, starting: dict | None = None) -> None:
    """Have the training ranks meet and load the model, and wait until they and what else is `starting` are up."""
    timeout, key = config.start_timeout_s, "ray.start_timeout_s"
    rendezvous = get(trainers[0].open_rendezvous.remote(), timeout, next(iter(named("training", trainers))), "starting", key)
    ranks = [actor.start.remote(rank, len(trainers), rendezvous, config.timeout_s) for rank, actor in enumerate(trainers)]
    get_all((starting or {}) | named("training", ranks), timeout, "starting", key)
