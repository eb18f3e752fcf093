"""Which node of a cluster each process of a run is on: plain numbers in, plain numbers out."""

from grpo.errors import ConfigError

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
