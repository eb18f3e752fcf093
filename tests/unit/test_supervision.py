"""Who is started again, how often, and what is said in the end; which silence is a death."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray
from ray.core.generated.common_pb2 import NODE_OUT_OF_MEMORY, SYSTEM_ERROR, Address
from ray.core.generated.gcs_pb2 import WorkerTableData
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RaySystemError

import grpo_utils
from grpo import supervision
from grpo.config_sections import RayConfig
from grpo.errors import ActorError
from grpo.launch import compose
from grpo.preemption import REQUEST, Preempted
from grpo.remote import GONE
from grpo.supervision import Supervisor, Watch, is_at_work, role, supervised


def died(actor: str = "inference actor 1", log: tuple[str, ...] = ()) -> ActorError:
    return ActorError(f"{actor} died while sampling", actor, log, died=True)


@pytest.fixture(autouse=True)
def workers(monkeypatch) -> list[WorkerTableData]:
    """Ray's table of the processes that it has started, to be filled."""
    rows: list[WorkerTableData] = []
    table = SimpleNamespace(get_worker_table=lambda: [row.SerializeToString() for row in rows])
    monkeypatch.setattr(ray._private.state.state, "_connect_and_get_accessor", lambda: table)
    return rows


@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        ("the inference actor", "inference"),
        ("inference actor 12", "inference"),
        ("training actor 0", "training"),
        ("the replay buffer actor", "replay buffer"),
    ],
)
def test_actors_have_roles(actor, expected):
    assert role(actor) == expected


def test_each_actor_is_started_again_as_often_as_allowed_and_roles_are_counted_together():
    supervisor = Supervisor(RayConfig(max_restarts=2))
    assert supervisor.count(died("inference actor 0"), "") == "restart 1 of at most 2"
    supervisor.at = lambda: 7
    assert supervisor.count(died(), "") == "restart 1 of at most 2, behind step 7"
    assert supervisor.count(died(), "") == "restart 2 of at most 2, behind step 7"
    assert supervisor.restarts == {"inference": 3}
    with pytest.raises(
        ActorError,
        match=r"^inference actor 1 died while sampling, behind step 7; it wrote last: one \| two; it was started again 2 "
        r"times, as often as ray.max_restarts allows; checkpoint_000003 is whole$",
    ):
        supervisor.count(died(log=("one", "two")), "checkpoint_000003 is whole")
    assert supervisor.restarts == {"inference": 3}


def test_an_engine_whose_restarts_are_used_up_is_left_out_while_enough_are_left():
    supervisor, planned = Supervisor(RayConfig(max_restarts=0, min_engines=1)), ["inference actor 0", "inference actor 1"]
    assert supervisor.engines_of(planned) == planned
    assert supervisor.count(died(), "") == "without inference actor 1 from now on, see ray.min_engines"
    assert supervisor.engines_of(planned) == ["inference actor 0"]
    assert supervisor.restarts == {}
    for actor in ("training actor 1", "inference actor 0"):  # which the run cannot do without
        with pytest.raises(ActorError, match=f"^{actor} died .* as often as ray.max_restarts allows; all is whole$"):
            supervisor.count(died(actor), "all is whole")


def test_by_default_no_engine_is_left_out():
    supervisor = Supervisor(RayConfig(max_restarts=0))
    supervisor.engines_of(["inference actor 0", "inference actor 1"])
    assert not supervisor.lose("inference actor 1")
    assert supervisor.engines_of(["inference actor 0", "inference actor 1"]) == ["inference actor 0", "inference actor 1"]


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_an_engine_that_is_gone_for_good_is_not_started_with_the_others(monkeypatch, transport):
    """And the others keep their names, and what is left of their restarts."""
    settings = ["ray.min_engines=1", "inference_model.num_devices=3", "ray.max_restarts=2"]
    config, started, waited_for, watched = compose("grpo_arithmetic", settings), {}, {}, {}
    supervisor = Supervisor(config.ray)
    supervisor.gone.add("inference actor 1")
    supervisor.counts["inference actor 2"] = 1

    def start_actors(cls, places, *arguments, restarts=None):
        started[cls.__name__] = list(places), restarts
        return [SimpleNamespace(start=SimpleNamespace(remote=lambda place=place: f"{place} starts")) for place in places]

    monkeypatch.setattr(grpo_utils, "start_actors", start_actors)
    monkeypatch.setattr(grpo_utils, "join_ranks", lambda ranks, config, starting: waited_for.update(starting))
    monkeypatch.setattr(
        grpo_utils, "reserve", lambda config, nodes, gpus: {role: [*range(count)] for role, count in nodes.items()}
    )
    roles = {"trainer": 1, "inference": 3}
    plan = SimpleNamespace(
        roles=roles, nodes_of=roles, threads=dict.fromkeys(roles, 1), device="cpu", gpus_per_process=0.0, transport=transport
    )
    monkeypatch.setattr(supervisor, "watch", watched.update)
    *_, engines = grpo_utils.start_models(config, plan, "model", supervisor)
    assert list(engines) == ["inference actor 0", "inference actor 2"]
    assert watched.keys() == engines.keys() | {"the training actor"}
    assert started["InferenceActor"] == ([0, 2], [2, 1] if transport == "shared_memory" else None)
    assert waited_for == {"inference actor 0": "0 starts", "inference actor 2": "2 starts"}


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1 / 3, ["ranks and {}", "inference actor 0", "inference actor 1"]),
        (1.0, ["ranks and {'inference actor 0': 'starts', 'inference actor 1': 'starts'}"]),
    ],
)
def test_engines_that_share_a_gpu_start_when_the_ranks_are_there_and_one_after_the_other(monkeypatch, share, expected):
    config, happened = compose("grpo_arithmetic", ["inference_model.num_devices=2"]), []
    supervisor = Supervisor(config.ray)

    def start_actors(cls, places, *arguments, restarts=None):
        return [SimpleNamespace(start=SimpleNamespace(remote=lambda: "starts")) for _ in places]

    monkeypatch.setattr(grpo_utils, "start_actors", start_actors)
    monkeypatch.setattr(grpo_utils, "join_ranks", lambda ranks, config, starting: happened.append(f"ranks and {starting}"))
    monkeypatch.setattr(grpo_utils, "get_all", lambda calls, *arguments: happened.extend(calls))
    monkeypatch.setattr(
        grpo_utils, "reserve", lambda config, nodes, gpus: {role: [*range(count)] for role, count in nodes.items()}
    )
    roles = {"trainer": 1, "inference": 2}
    plan = SimpleNamespace(
        roles=roles, nodes_of=roles, threads=dict.fromkeys(roles, 1), device="cuda", gpus_per_process=share, transport="gloo"
    )
    monkeypatch.setattr(supervisor, "watch", lambda actors: None)
    grpo_utils.start_models(config, plan, "model", supervisor)
    assert happened == expected


def test_collectors_have_the_numbers_of_their_engines_and_are_on_their_nodes(monkeypatch):
    class Actors:
        """In the place of a remote class: an actor is what it was started with."""

        def options(self, **options):
            return SimpleNamespace(remote=lambda config, model, engine: Collector(options["resources"], engine))

    class Collector(SimpleNamespace):
        def __init__(self, node, engine):
            start = SimpleNamespace(remote=lambda data, handle, references, buffer: (node, engine, handle))
            super().__init__(start=start)

    buffer = SimpleNamespace(look=SimpleNamespace(remote=lambda: "is there"))
    remote_buffer = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda: buffer))
    waited_for = {}
    monkeypatch.setattr(grpo_utils.GroupBuffer, "as_remote", lambda resources: remote_buffer)
    monkeypatch.setattr(grpo_utils.ray, "remote", lambda **options: lambda cls: Actors())
    monkeypatch.setattr(grpo_utils.ray, "put", lambda data: data)
    monkeypatch.setattr(grpo_utils, "on_node", lambda config, node: node)
    monkeypatch.setattr(grpo_utils, "get_all", lambda calls, *arguments: waited_for.update(calls))
    config, nodes = compose("grpo_arithmetic", []), ["a", "b", "c"]
    engines = {"inference actor 0": "first", "inference actor 2": "third"}
    plan = SimpleNamespace(nodes=nodes, nodes_of={"inference": nodes})
    supervisor, watched = Supervisor(config.ray), {}
    monkeypatch.setattr(supervisor, "watch", watched.update)
    grpo_utils.start_collectors(config, plan, "model", {}, engines, [], supervisor)
    assert watched.keys() == waited_for.keys()
    assert waited_for == {
        "collector actor 0": ("a", "inference actor 0", "first"),
        "collector actor 2": ("c", "inference actor 2", "third"),
        "the replay buffer actor": "is there",
    }


@pytest.mark.parametrize(
    ("state", "mended", "error", "expected"),
    [
        ("RESTARTING", False, died(), 1),  # Ray has started it again after this very death
        ("ALIVE", True, died(), 2),  # the run has recovered from the one before; of this one Ray does not know yet
        ("DEAD", False, died(), 2),  # after the one before; after this one it does not
        ("ALIVE", False, ActorError("it hangs", "inference actor 1"), 2),
    ],
)
def test_a_death_is_counted_once_whether_ray_has_started_the_actor_again_or_not(monkeypatch, state, mended, error, expected):
    told = {"NumRestarts": 1, "State": state}
    monkeypatch.setattr(ray._private.state, "actors", lambda actor_id: told)
    quiet = SimpleNamespace(run=lambda: None, add=lambda actors: None, ended=SimpleNamespace(set=lambda: None))
    monkeypatch.setattr(supervision, "Watch", lambda *arguments: quiet)
    monkeypatch.setattr(supervision, "wait_until_back", lambda *arguments: None)
    monkeypatch.setattr(supervision, "get_all", lambda *arguments: None)
    actor, supervisor = SimpleNamespace(_actor_id=b""), Supervisor(RayConfig(max_restarts=expected))
    with supervisor.watching():
        supervisor.watch({"inference actor 1": actor})
        if mended:
            supervisor.bring_back("inference actor 1", actor, died(), lambda: None)
    assert supervisor.count(error, "") == f"restart {expected} of at most {expected}"
    assert supervisor.restarts == {"inference": expected}
    with pytest.raises(ActorError, match=r"as often as ray\.max_restarts allows"):
        supervisor.count(error, "")


def test_only_what_ray_starts_again_is_said_to_be(monkeypatch, capsys):
    """A training rank has been started again with all others; of its next death the watch says nothing like it."""
    monkeypatch.setattr(ray._private.state, "actors", lambda actor_id: {"NumRestarts": 0, "State": "DEAD"})
    supervisor, actor = Supervisor(RayConfig()), SimpleNamespace(_actor_id=b"")
    supervisor.count(died("the training actor"), "")
    supervisor.watched = {"the training actor": actor}
    supervisor._heard_of_death("the training actor")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ray._private.state, "actors", lambda actor_id: {"NumRestarts": 1, "State": "ALIVE"})
    supervisor._heard_of_death("the training actor")
    assert "(restart 2 of at most 3)" in capsys.readouterr().err


ENGINE, REFERENCE, TRAINER = "48cf2c4639462b116721ec1301000000", "137b6bb9e9a17dea4d5cec5701000000", "da460abc71584a54"
FIRST, SECOND = "a04c8471733aef79a8990a97501528ab", "5692fd9ae2eaa73f425d1df449905687"
# As Ray 2.60 wrote it, but for lines that are left out.
ENDED = f"""2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: b67a) was \
22.68GB used / 23.54GB limit (0.963516)
OOM kill reason: Memory usage 24043479040B exceeded threshold of 24012677120B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 1
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor({ENGINE}): job ID=01000000, task name=InferenceActor.__init__, required resources={{CPU: 1}}, \
pid=1336, actual memory used=1.45GB, worker ID={FIRST})
Selected to kill: (Actor({REFERENCE}): job ID=01000000, task name=ReferenceActor.__init__, required resources={{CPU: 1}}, \
pid=556, actual memory used=2.62GB, worker ID={SECOND})
(Actor({TRAINER}): job ID=01000000, task name=TrainerActor.__init__, required resources={{CPU: 1}}, pid=600, \
actual memory used=7.77GB, worker ID=6926)
]
"""
FULL = "Ray ended it, since its machine's memory was almost full (22.68 of 23.54 GiB; docs/memory.md says what to lower)"


@pytest.fixture
def actors(monkeypatch, workers) -> dict[str, SimpleNamespace]:
    """An engine and a reference that Ray ended for memory, and a trainer that just died; each is there again."""
    for worker in (FIRST, SECOND):
        address = Address(worker_id=bytes.fromhex(worker))
        workers.append(WorkerTableData(worker_address=address, exit_type=NODE_OUT_OF_MEMORY, exit_detail=ENDED))
    address = Address(worker_id=bytes.fromhex("6926"))
    workers.append(WorkerTableData(worker_address=address, exit_type=SYSTEM_ERROR, exit_detail=ENDED))
    monkeypatch.setattr(ray._private.state, "actors", lambda actor: {"NumRestarts": 1, "State": "ALIVE"})
    monkeypatch.setattr(Watch, "run", lambda watch: None)
    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    ids = {"the inference actor": ENGINE, "the reference actor": REFERENCE, "the training actor": TRAINER}
    return {name: SimpleNamespace(_actor_id=bytes.fromhex(its)) for name, its in ids.items()}


def test_one_that_ray_ended_for_memory_is_said_to_be_once_and_of_no_other(actors, capsys, monkeypatch):
    supervisor = Supervisor(RayConfig())
    supervisor.watched = actors
    for name in actors:
        supervisor.tell(name, f"{name} died while starting: {GONE}" if name == "the reference actor" else f"{name} died")
    monkeypatch.setattr(ray._private.state, "actors", lambda actor: {"NumRestarts": 2, "State": "ALIVE"})
    supervisor.tell("the inference actor", "the inference actor died while starting")  # of something else
    engine, reference, trainer, again = capsys.readouterr().err.splitlines()
    assert engine == f"Warning: the inference actor died: {FULL}; it is started again (restart 1 of at most 3)"
    assert (
        reference
        == f"Warning: the reference actor died while starting: {FULL}; it is started again (restart 1 of at most 3)"
    )
    assert trainer == "Warning: the training actor died; it is started again (restart 1 of at most 3)"
    assert again == "Warning: the inference actor died while starting; it is started again (restart 2 of at most 3)"


@pytest.mark.parametrize(
    ("name", "reason"), [("the inference actor", FULL), ("the training actor", GONE), ("the driver", GONE)]
)
def test_an_error_without_a_cause_has_it_where_ray_ended_the_actor_for_memory(actors, name, reason):
    supervisor = Supervisor(RayConfig())
    with pytest.raises(ActorError) as raised, supervisor.watching():
        supervisor.watch(actors)
        raise ActorError(f"{name} died while starting: {GONE}", name, died=True)
    assert str(raised.value) == f"{name} died while starting: {reason}"
    assert (raised.value.actor, raised.value.died) == (name, True)


@pytest.mark.parametrize(
    ("error", "expected"), [(GONE, f"being started again: {FULL}"), ("Connection error", "sampling: Connection error")]
)
def test_of_one_that_does_not_come_back_the_death_that_has_a_cause_is_said(monkeypatch, error, expected):
    def wait(actor, name, timeout_s):
        raise ActorError(f"{name} died while being started again: {FULL}", name, ("its words",), died=True)

    monkeypatch.setattr(supervision, "wait_until_back", wait)
    error = ActorError(f"inference actor 1 died while sampling: {error}", "inference actor 1", died=True)
    with pytest.raises(ActorError) as raised:
        Supervisor(RayConfig()).bring_back("inference actor 1", None, error, lambda: None)
    assert str(raised.value) == f"inference actor 1 died while {expected}"
    assert raised.value.log == ("its words",)


def test_an_error_that_no_actor_is_to_blame_for_ends_the_run():
    with pytest.raises(ActorError, match=r"^no batch could be made$"):
        Supervisor(RayConfig()).count(ActorError("no batch could be made"), "")


def test_a_run_that_goes_on_in_another_process_goes_on_counting():
    supervisor = Supervisor(RayConfig())
    supervisor.take_up({"training": 2})
    supervisor.count(died("training actor 0"), "")
    assert supervisor.restarts == {"training": 3}
    supervisor.take_up({"training": 2})  # the checkpoint that it went on from, of this process's own run
    assert supervisor.restarts == {"training": 3}


def test_the_error_keeps_its_actor_on_the_way_out_of_another_actor():
    error = pickle.loads(pickle.dumps(died(log=("a",))))
    assert (str(error), error.actor, error.log) == ("inference actor 1 died while sampling", "inference actor 1", ("a",))


class Part:
    """A run whose every attempt ends as it is told."""

    def __init__(self, *ends) -> None:
        self.ends, self.resumed = list(ends), []

    @contextmanager
    def build(self, config, run_dir, supervisor):
        self.resumed.append(config.resume)
        yield SimpleNamespace(begin=lambda: None, finish=lambda: None)

    def train(self, run) -> None:
        if end := self.ends.pop(0):
            raise end


@pytest.fixture
def config():
    return compose("grpo_arithmetic", ["ray.max_restarts=1"])


def test_a_run_goes_on_from_its_newest_checkpoint_and_a_second_death_of_another_actor_counts_apart(config, tmp_path, capsys):
    part = Part(died(), died("the reference actor"), None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("checkpoint_000003\n")
    supervised(config, tmp_path, part.build, part.train)
    assert part.resumed == [None, str(tmp_path), str(tmp_path)]
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "Warning: inference actor 1 died while sampling; the run goes on from checkpoint_000003 (restart 1 of at most 1)"
    )
    assert second.startswith("Warning: the reference actor died while sampling; the run goes on from checkpoint_000003")


def test_a_run_begins_without_an_engine_that_dies_at_every_start(tmp_path, capsys):
    config, started = (
        compose("grpo_arithmetic", ["ray.max_restarts=1", "ray.min_engines=1", "inference_model.num_devices=2"]),
        [],
    )

    @contextmanager
    def build(config, run_dir, supervisor):
        started.append(list(supervisor.engines_of(["inference actor 0", "inference actor 1"])))
        if "inference actor 1" in started[-1]:
            raise died()
        yield SimpleNamespace(begin=lambda: None, finish=lambda: None)

    supervised(config, tmp_path, build, lambda run: None)
    both = ["inference actor 0", "inference actor 1"]
    assert started == [both, both, ["inference actor 0"]]
    assert capsys.readouterr().err.splitlines()[1] == (
        "Warning: inference actor 1 died while sampling; the run goes on from its start "
        "(without inference actor 1 from now on, see ray.min_engines)"
    )


def test_an_actor_that_dies_while_the_run_is_asked_to_end_is_not_started_again(config, tmp_path):
    part = Part(died())

    def train(run) -> None:
        REQUEST.reason = "SIGTERM"
        part.train(run)

    with pytest.raises(Preempted, match="SIGTERM") as ended:
        supervised(config, tmp_path, part.build, train)
    assert ended.value.saved == "nothing"
    assert REQUEST.reason is None


@pytest.mark.parametrize(("at_work", "killed"), [(False, True), (True, False)])
def test_silence_is_a_death_where_nothing_works(monkeypatch, at_work, killed, capsys):
    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([], calls))
    monkeypatch.setattr(supervision, "is_at_work", lambda pid: at_work)
    struck = []
    monkeypatch.setattr(supervision.os, "kill", lambda *arguments: struck.append(arguments))
    watch = Watch(10.0, 300.0, print)
    watch.add({"the training actor": "call"})
    for _ in range(40):
        watch.look(1.25)
    assert not struck  # it has not answered yet, and whoever starts it waits for that
    watch.watched["the training actor"].pid = watch.watched["the training actor"].pid_here = 4711
    assert watch.interval_s == 1.25
    for _ in range(8):
        assert not struck
        watch.look(1.25)
    for _ in range(20):  # it is not killed twice
        watch.look(1.25)
    assert struck == ([(4711, signal.SIGKILL)] if killed else [])
    assert ("did not answer for 10 s" in capsys.readouterr().err) == killed


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(600.0, 40.0), (60.0, 30.0), (12.0, 10.0)])
def test_one_on_another_machine_has_the_time_of_a_start_until_all_are_up_and_then_longer_than_here(
    monkeypatch, timeout_s, limit_s
):
    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([], calls))
    ended = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append(actor))
    supervisor = Supervisor(RayConfig(heartbeat_timeout_s=10.0, start_timeout_s=60.0, timeout_s=timeout_s))
    monkeypatch.setattr(Watch, "run", lambda watch: None)
    with supervisor.watching():
        watch = supervisor._watch
        watch.add({"the training actor": "call"})
        watch.watched["the training actor"].pid = 4711
        watch.look(59.0)
        assert not ended
        watch.watched["the training actor"].silent_s = 0.0
        supervisor.all_up()
        watch.look(limit_s - 1.0)
        assert not ended
        watch.look(1.0)
        assert ended == ["call"]


def test_that_ray_is_gone_does_not_hide_why_a_run_ends(monkeypatch):
    def gone(actor_id):
        raise RaySystemError("no GCS")

    monkeypatch.setattr(ray._private.state, "actors", gone)
    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    monkeypatch.setattr(Watch, "run", lambda watch: None)
    supervisor = Supervisor(RayConfig())
    with pytest.raises(ActorError, match=r"^inference actor 1 died while sampling$"), supervisor.watching():
        supervisor.watch({"inference actor 1": SimpleNamespace(_actor_id=b"")})
        raise died()


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError("its node ran low on memory")])
def test_one_that_is_gone_for_good_is_told_of_and_watched_no_more(monkeypatch, error):
    def get(call):
        raise error

    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: (calls, []))
    monkeypatch.setattr(ray, "get", get)
    died = []
    watch = Watch(10.0, 300.0, died.append)
    watch.add({"inference actor 1": "call"})
    for _ in range(3):
        watch.look(1.25)
    assert died == ["inference actor 1"] and not watch.watched


def test_a_death_before_the_first_answer_is_told_of(monkeypatch):
    answers = [ActorUnavailableError("gone", None), (4711, "here"), (4711, "here")]

    def get(call):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(supervision, "ask", lambda actor: actor)
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: (calls, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    died = []
    watch = Watch(10.0, 300.0, died.append)
    watch.add({"inference actor 1": "call"})
    watch.look(1.25)
    assert died == []  # it may be on its way back
    watch.look(1.25)
    watch.look(1.25)
    assert died == ["inference actor 1"] and watch.watched["inference actor 1"].pid == 4711


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="threads are looked for in /proc")
@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [("pow(3, 10**9)", None, True), ("time.sleep(60)", None, False), ("pow(3, 10**9)", signal.SIGSTOP, False)],
)
def test_a_process_is_at_work_while_it_computes(code, number, expected):
    process = subprocess.Popen([sys.executable, "-c", f"import time; print(1, flush=True); {code}"], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        if number:
            process.send_signal(number)
        deadline = time.monotonic() + 5
        while is_at_work(process.pid) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_at_work(process.pid) == expected
    finally:
        process.kill()
        process.wait()
    assert not is_at_work(process.pid) and not is_at_work(None)
