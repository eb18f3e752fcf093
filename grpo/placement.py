"""Which node of a cluster each process of a run is on, and its threads there: plain numbers in, plain numbers out."""

from grpo.config_sections import RayConfig
from grpo.errors import ConfigError
from grpo.nodes import Node

KEYS = {
    "trainer": "train_model.num_devices",
    "inference": "inference_model.num_devices",
    "reference": "ref_model.num_devices",
}


def place(roles: dict[str, int], sizes: dict[str, int], room: list[int], pack: bool) -> dict[str, list[int]]:
    """The index of each process's node, by role.

    roles: processes a role. sizes: slots (GPUs, their shares, or CPUs) that one of them takes. room: slots a node. The next
    process of a role goes to the node that has fewest of that role, of those the emptiest, of those the first; with `pack`
    to the first that has room. Raises ConfigError where there is none.
    """
    free, places = list(room), {role: [] for role in roles}
    for role in sorted(roles, key=lambda role: -sizes[role]):  # what needs much room on one node first
        mine = places[role]
        for _ in range(roles[role]):
            open_nodes = [i for i in range(len(free)) if free[i] >= sizes[role]]
            if not open_nodes:
                raise ConfigError(
                    f"{KEYS[role]} ({roles[role]}): the cluster's nodes have {' + '.join(map(str, room))} places, and "
                    f"process {len(mine) + 1} of this role, which takes {sizes[role]}, finds none beside the others: lower "
                    "it, or use more nodes"
                )
            node = open_nodes[0] if pack else min(open_nodes, key=lambda i: (mine.count(i), -free[i]))
            free[node] -= sizes[role]
            mine.append(node)
    return places


def place_roles(
    config: RayConfig, nodes: list[Node], roles: dict[str, int], sizes: dict[str, int], device: str, sharing: int
) -> dict[str, list[int]]:
    """The node of each process: `sharing` of them share a GPU; on a cluster each has a CPU, on one machine they share them.

    Raises ConfigError where a node of the cluster has too few of either.
    """
    if config.address is None:
        return {role: [0] * count for role, count in roles.items()}
    room = [node.gpus * sharing if device == "cuda" else node.cores for node in nodes]
    places = place(roles, sizes, room, config.placement == "pack")
    for i, node in enumerate(nodes):
        there = sum(its.count(i) for its in places.values())
        if there > node.cores:
            raise ConfigError(
                f"ray.address ({config.address}): node {node.name} has {node.cores} CPUs and gets {there} of the run's "
                "processes, each of which needs one: give Ray more there (sbatch --cpus-per-task), or lower the num_devices"
            )
    return places


def num_threads(nodes: list[Node], places: dict[str, list[int]], sizes: dict[str, int], in_turns: bool) -> dict[str, int]:
    """Threads a process of each role, so that no node has more than cores; roles that work `in_turns` have all of them."""

    def share(role: str, i: int) -> int:
        busy = [role] if in_turns else places
        return nodes[i].cores // sum(places[one].count(i) * sizes[one] for one in busy)

    return {role: max(1, min(share(role, i) for i in its)) for role, its in places.items()}
