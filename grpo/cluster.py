"""Ray, and the processes that a run starts on it: a Ray of its own on this machine, or a cluster that it joins.

On a cluster every process has its place on a planned node, all of them reserved at once by a placement group.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count

import psutil
import ray
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.config_sections import RayConfig
from grpo.errors import ActorError, ConfigError, one_line
from grpo.leftovers import clean
from grpo.nodes import Node, find_address, join_cluster, missing, node_resource, worker_environment
from grpo.pools import named
from grpo.preemption import REQUEST, deferred_interrupt, take_signals
from grpo.remote import HEARTBEATS, get, get_all

END_S = 1.0  # that Ray's processes have to end by themselves

Place = PlacementGroupSchedulingStrategy | str  # as Ray's options have it
ANYWHERE = "DEFAULT"


def start_ray(config: RayConfig, num_processes: int, closing: ExitStack) -> None:
    """Start Ray for `num_processes` actors, or join the cluster at ray.address; `closing` ends it, or leaves it.

    What killed runs have left on this machine is removed first: it would take the memory.
    """
    clean()
    address = find_address(config)
    if address is None:
        _start_own(config, num_processes, closing)
    else:
        join_cluster(address)
        closing.callback(ray.shutdown)
    take_signals()  # Ray takes SIGTERM for itself
    REQUEST.ended = False


def _start_own(config: RayConfig, num_processes: int, closing: ExitStack) -> None:
    others = set(psutil.Process().children())
    with deferred_interrupt(), _on_loopback(), _ray_errors():
        ray.init(
            address="local",
            num_cpus=num_processes,
            object_store_memory=config.object_store_memory,
            _temp_dir=config.temp_dir,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": worker_environment()},
            # Else Ray starts a worker a CPU in advance, without this environment, so that no actor could be one of them.
            _system_config={"prestart_worker_first_driver": False},
        )
        closing.callback(_end_ray, [child for child in psutil.Process().children() if child not in others])


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Say in one line what Ray raises as an Exception of no class of its own: that it did not come up."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ActorError(f"Ray did not start: {one_line(error)} Is this machine overloaded? Try again") from None


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


def check_shared(config: RayConfig, nodes: list[Node], paths: list[str]) -> None:
    """Raise ConfigError where one of the cluster's `nodes` does not see one of `paths`."""
    if config.address is None:
        return
    look = ray.remote(num_cpus=0)(missing)
    calls = {f"node {node.name}": look.options(resources=node_resource(node)).remote(paths) for node in nodes}
    found = get_all(calls, config.start_timeout_s, "looking for the run's files", "ray.start_timeout_s")
    for name, gone in zip(calls, found, strict=True):
        if gone:
            raise ConfigError(
                f"{name} does not see {gone[0]}: it must be on a file system that all nodes share, and Ray be started on "
                "each in the directory that the run is started in"
            )


def reserve(config: RayConfig, nodes: dict[str, list[Node]], gpus: dict[str, float]) -> dict[str, list[Place]]:
    """A place for each process on its node, by role, each with a CPU and a role's share of `gpus`: all of them or none.

    In a Ray of the run's own, which has room for them and nothing else, they may be anywhere.
    """
    if config.address is None:
        return {role: [ANYWHERE] * len(its) for role, its in nodes.items()}
    bundles = [
        {"CPU": 1} | node_resource(node) | ({"GPU": gpus[role]} if gpus[role] else {})
        for role, its in nodes.items()
        for node in its
    ]
    group = placement_group(bundles, strategy="SPREAD")
    if not group.wait(config.start_timeout_s):
        raise ActorError(
            f"the cluster had no room for the run's {len(bundles)} processes within {config.start_timeout_s:g} s: another "
            "run may have it; wait for that, or raise ray.start_timeout_s"
        )
    number = count()
    return {role: [PlacementGroupSchedulingStrategy(group, next(number)) for _ in its] for role, its in nodes.items()}


def on_node(config: RayConfig, node: Node) -> dict[str, float]:
    """What an actor asks Ray for to be on `node` without a place of its own; in a Ray of the run's own there is no other."""
    return {} if config.address is None else node_resource(node)


def start_actors(
    cls: type,
    places: list[Place],
    device: str,
    gpus: float,
    threads: int,
    environment: dict[str, str],
    *arguments,
    restarts: list[int] | None = None,
) -> list[ActorHandle]:
    """An actor of `cls` at each of `places`, with its share of the machine; they are not waited for.

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
    return [
        ray.remote(**options, scheduling_strategy=place, max_restarts=most)(cls).remote(*arguments)
        for place, most in zip(places, restarts or [0] * len(places), strict=True)
    ]


def join_ranks(trainers: list[ActorHandle], config: RayConfig, starting: dict | None = None) -> None:
    """Have the training ranks meet and load the model, and wait until they and what else is `starting` are up."""
    timeout, key = config.start_timeout_s, "ray.start_timeout_s"
    rendezvous = get(trainers[0].open_rendezvous.remote(), timeout, next(iter(named("training", trainers))), "starting", key)
    ranks = [actor.start.remote(rank, len(trainers), rendezvous, config.timeout_s) for rank, actor in enumerate(trainers)]
    get_all((starting or {}) | named("training", ranks), timeout, "starting", key)
