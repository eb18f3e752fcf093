"""The machines that a run's processes are on: this one, or the nodes of a Ray cluster that it joins.

    python -m grpo.nodes 4 FILE   # make FILE once the cluster at RAY_ADDRESS has 4 nodes, and end when one of them is lost

which slurm/run_in_ray_cluster.sh does.

Nothing here imports torch: it runs on every node of a cluster before anything else does.
"""

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError

from grpo.config_sections import RayConfig
from grpo.errors import ActorError, ConfigError, UserError, one_line

AUTO, ADDRESS = "auto", "RAY_ADDRESS"
ANSWER_S = 10.0  # within which a cluster's head takes a connection
JOIN_S = 180.0  # within which nodes that are being started have joined
LOOK_S, WATCH_S = 0.2, 1.0


@dataclass(frozen=True)
class Node:
    """One machine, by its address in the cluster."""

    name: str
    cores: int  # that the run may use, as may be
    gpus: int
    memory_bytes: int


def find_address(config: RayConfig) -> str | None:
    """HOST:PORT of the cluster to join; None where the run starts a Ray of its own."""
    if config.address != AUTO:
        return config.address
    address = os.environ.get(ADDRESS)
    if not address:
        raise ConfigError(
            f"ray.address ({AUTO}) needs {ADDRESS}=HOST:PORT in the environment: run inside slurm/run_in_ray_cluster.sh, or "
            "give ray.address=HOST:PORT"
        )
    return address


def worker_environment() -> dict[str, str]:
    """What every process of the run has in its environment: where this code is."""
    path = [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(path)}


def join_cluster(address: str) -> None:
    """Become a driver of the cluster at `address`, if this process is none yet; ConfigError where that cannot be."""
    if ray.is_initialized():
        return
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), ANSWER_S).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": worker_environment()},
        )
    except (OSError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"ray.address ({address}): this run could not join a Ray cluster there ({one_line(error)[:300]}): start one, or "
            "give RAY_AUTH_MODE and RAY_AUTH_TOKEN as its nodes have them"
        ) from None


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that are alive, this one first."""
    own = ray.util.get_node_ip_address()
    nodes = [
        Node(
            name=node["NodeManagerAddress"],
            cores=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.name != own, node.name))


def node_resource(node: Node) -> dict[str, float]:
    """What a process asks Ray for to be on `node`."""
    return {f"node:{node.name}": 0.001}


def missing(paths: list[str]) -> list[str]:
    """Those of `paths` that this machine does not have."""
    return [path for path in paths if not os.path.exists(path)]


def use_node_interface() -> None:
    """Have gloo and NCCL of this process talk over the interface that has the node's address in the cluster.

    Gloo would take the address that the machine's own name stands for, which on many is a loopback one.
    """
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def wait_for_nodes(count: int, timeout_s: float) -> list[Node]:
    """The cluster's nodes once there are `count`; ActorError where they have not joined in time."""
    deadline = time.monotonic() + timeout_s
    while len(nodes := cluster_nodes()) < count:
        if time.monotonic() > deadline:
            names = ", ".join(node.name for node in nodes)
            raise ActorError(f"{len(nodes)} of {count} nodes joined the Ray cluster within {timeout_s:g} s: {names}")
        time.sleep(LOOK_S)
    return nodes


def watch(nodes: list[Node]) -> None:
    """Stay until one of `nodes` has left the cluster, which Ray knows some 15 s after it was lost; raises ActorError."""
    while not (lost := {node.name for node in nodes} - {node.name for node in cluster_nodes()}):
        time.sleep(WATCH_S)
    raise ActorError(f"node {', '.join(sorted(lost))} was lost: it is no part of the Ray cluster any more")


def main() -> None:
    try:
        join_cluster(find_address(RayConfig(address=AUTO)))
        nodes = wait_for_nodes(int(sys.argv[1]), JOIN_S)
        for node in nodes:
            memory = node.memory_bytes / 2**30
            print(f"Node {node.name}: {node.cores} CPUs, {node.gpus} GPUs, {memory:.0f} GiB of memory", flush=True)
        Path(sys.argv[2]).touch()
        watch(nodes)
    except UserError as error:
        sys.exit(f"Error: {one_line(error)}")


if __name__ == "__main__":
    main()
