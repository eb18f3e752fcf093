"""Ray, and the processes that a run starts on it."""

import os
from contextlib import ExitStack
from pathlib import Path

import ray
from ray.actor import ActorHandle

from grpo.config import RayConfig
from grpo.pools import named
from grpo.remote import get, get_all


def start_ray(config: RayConfig, num_processes: int, closing: ExitStack) -> None:
    """Start Ray for `num_processes` actors; `closing` ends it."""
    path = [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
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
    closing.callback(ray.shutdown)


def start_actors(
    cls: type, count: int, device: str, gpus: float, threads: int, environment: dict[str, str], *arguments
) -> list[ActorHandle]:
    """`count` actors of `cls`, each with its share of the machine; they are not waited for."""
    common = {"OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        # Large tensors come from the heap, which keeps its pages: faulting them in anew costs a push a third of its time.
        common |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_ARENA_MAX": "1"}
        # Idle OpenMP threads spin by default, on cores that other actors compute on: pushes took four times as long.
        common |= {"GOMP_SPINCOUNT": "30000"}
    options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": common | environment}}
    return [ray.remote(**options)(cls).remote(*arguments) for _ in range(count)]


def join_ranks(trainers: list[ActorHandle], config: RayConfig, starting: dict | None = None) -> None:
    """Have the training ranks meet and load the model, and wait until they and what else is `starting` are up."""
    timeout, key = config.start_timeout_s, "ray.start_timeout_s"
    rendezvous = get(trainers[0].open_rendezvous.remote(), timeout, "the first training actor", "starting", key)
    ranks = [actor.start.remote(rank, len(trainers), rendezvous, config.timeout_s) for rank, actor in enumerate(trainers)]
    get_all((starting or {}) | named("training", ranks), timeout, "starting", key)
