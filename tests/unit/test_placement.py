import pytest

from grpo.errors import ConfigError
from grpo.launch import compose
from grpo.nodes import Node, find_address, missing
from grpo.placement import place
from grpo.plan import make_plan

ONE = {"trainer": 1, "inference": 1, "reference": 1}


def test_the_processes_of_a_role_are_spread_and_the_first_rank_is_on_the_first_node():
    roles = {"trainer": 2, "inference": 3, "reference": 1}
    assert place(roles, ONE, [4, 4], pack=False) == {"trainer": [0, 1], "inference": [0, 1, 0], "reference": [1]}
    assert place(ONE, ONE, [2, 2], pack=False) == {"trainer": [0], "inference": [1], "reference": [0]}
    # The larger node takes what the smaller has no room for.
    assert place({"trainer": 4}, ONE, [1, 8], pack=False) == {"trainer": [1, 0, 1, 1]}


def test_packed_processes_are_on_as_few_nodes_as_hold_them():
    roles = {"trainer": 4, "inference": 3, "reference": 1}
    assert place(roles, ONE, [4, 4], pack=True) == {"trainer": [0] * 4, "inference": [1] * 3, "reference": [1]}


def test_an_engine_of_several_gpus_is_on_one_node_and_placed_before_what_would_take_its_room():
    sizes = {"trainer": 1, "inference": 4, "reference": 1}
    roles = {"trainer": 4, "inference": 3, "reference": 1}
    places = place(roles, sizes, [8, 8, 1], pack=False)
    assert places["inference"] == [0, 1, 0]
    assert sorted(places["trainer"] + places["reference"]) == [1, 1, 1, 1, 2]


def test_what_finds_no_place_is_refused_with_its_key():
    with pytest.raises(ConfigError) as raised:
        place({"trainer": 2, "inference": 3}, ONE, [2, 2], pack=False)
    assert str(raised.value) == (
        "inference_model.num_devices (3): the cluster's nodes have 2 + 2 places, and process 3 of this role, which takes 1, "
        "finds none beside the others: lower it, or use more nodes"
    )
    with pytest.raises(ConfigError, match=r"which takes 4, finds none"):
        place({"inference": 1}, {"inference": 4}, [3, 3], pack=True)


GIB = 2**30


@pytest.fixture
def two_nodes(monkeypatch) -> list[Node]:
    """A cluster of two machines that is not there."""
    nodes = [Node("10.0.0.1", 4, 0, 16 * GIB), Node("10.0.0.2", 5, 0, 16 * GIB)]
    monkeypatch.setattr("grpo.plan.join_cluster", lambda address: None)
    monkeypatch.setattr("grpo.plan.cluster_nodes", lambda: nodes)
    return nodes


def config_of(*overrides: str):
    return compose("grpo_arithmetic", ["ray.address=10.0.0.1:6379", *overrides])


def test_a_cluster_is_planned_node_by_node(two_nodes):
    config = config_of("train_model.num_devices=2", "inference_model.num_devices=2")
    plan = make_plan(config)
    assert plan.device == "cpu"
    assert plan.nodes_of == {"trainer": two_nodes[::-1], "inference": two_nodes[::-1], "reference": [two_nodes[1]]}
    text = plan.describe(config)
    assert "node              10.0.0.1: 1 x trainer, 1 x inference\n" in text
    assert "node              10.0.0.2: 1 x trainer, 1 x inference, 1 x reference\n" in text
    assert "weight pushes     gloo" in text
    # In turns a process has its node's cores; the smaller node is what ranks and engines agree on.
    assert plan.threads == {"trainer": 4, "inference": 4, "reference": 5}


def test_weights_go_through_shared_memory_only_where_every_engine_is_beside_the_first_rank(two_nodes):
    together = "ray.placement=pack"
    assert make_plan(config_of(together)).transport == "shared_memory"
    assert make_plan(config_of()).transport == "gloo"
    make_plan(config_of(together, "train.weight_transport=shared_memory"))
    with pytest.raises(ConfigError, match=r"train.weight_transport \(shared_memory\) needs every engine on the first"):
        make_plan(config_of("train.weight_transport=shared_memory"))


def test_memory_is_checked_a_node(two_nodes):
    two_nodes[1] = Node("10.0.0.2", 5, 0, 1 << 20)
    with pytest.raises(ConfigError, match=r"needs about .* GiB of memory and 0.0 GiB are free on node 10.0.0.2: use"):
        make_plan(config_of())
    make_plan(config_of("ray.placement=pack"))


def test_the_gpus_of_a_cluster_are_counted_over_its_nodes(two_nodes):
    two_nodes[:] = [Node("10.0.0.1", 32, 2, 16 * GIB), Node("10.0.0.2", 32, 2, 16 * GIB)]
    plan = make_plan(config_of("train_model.num_devices=2"))
    assert (plan.device, plan.gpus_per_process, plan.transport) == ("cuda", 1.0, "nccl")
    assert plan.places == {"trainer": [0, 1], "inference": [0], "reference": [1]}
    with pytest.raises(ConfigError, match=r"training ranks cannot share one, and the cluster has 4: lower it"):
        make_plan(config_of("train_model.num_devices=4"))


def test_nodes_with_fewer_cpus_than_processes_are_refused(two_nodes):
    two_nodes[:] = [Node("10.0.0.1", 4, 8, 16 * GIB), Node("10.0.0.2", 3, 8, 16 * GIB)]
    eight = ["train_model.num_devices=4", "inference_model.num_devices=3"]
    with pytest.raises(ConfigError) as raised:
        make_plan(config_of(*eight))
    assert str(raised.value) == (
        "ray.address (10.0.0.1:6379): node 10.0.0.2 has 3 CPUs and gets 4 of the run's processes, each of which needs one: "
        "give Ray more there (sbatch --cpus-per-task), or lower the num_devices"
    )
    two_nodes[1] = Node("10.0.0.2", 4, 8, 16 * GIB)
    assert make_plan(config_of(*eight)).gpus_per_process == 1
    # An engine of several GPUs is one process.
    two_nodes[:] = [Node("10.0.0.1", 3, 8, 16 * GIB)]
    make_plan(config_of("inference_model.tensor_parallel_size=2"))


def test_an_address_is_found_in_the_environment_where_it_is_auto(monkeypatch):
    auto = compose("grpo_arithmetic", ["ray.address=auto"]).ray
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_address(auto) == "10.0.0.1:6379"
    assert find_address(compose("grpo_arithmetic", []).ray) is None
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"ray.address \(auto\) needs RAY_ADDRESS=HOST:PORT in the environment"):
        find_address(auto)


def test_an_address_that_is_none_is_refused():
    for address in ("ray://head:10001", "head", "head:port"):
        with pytest.raises(ConfigError, match=r"ray.address \(.*\) must be HOST:PORT, auto or null"):
            compose("grpo_arithmetic", [f"ray.address='{address}'"])


def test_a_cluster_that_is_not_there_is_said_in_a_line():
    with pytest.raises(ConfigError, match=r"ray.address \(127.0.0.1:1\): this run could not join a Ray cluster there"):
        make_plan(compose("grpo_arithmetic", ["ray.address=127.0.0.1:1"]))


def test_files_that_a_node_does_not_have_are_named(tmp_path):
    assert missing([str(tmp_path), str(tmp_path / "model")]) == [str(tmp_path / "model")]
