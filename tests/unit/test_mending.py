"""What a dead engine or collector had in hand is sampled again, and nothing else is; how long a batch is waited for."""

import json
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorUnavailableError
from tensordict import TensorDict

from grpo import remote, run_async
from grpo.account import Stopwatches
from grpo.errors import ActorError
from grpo.metrics import Clock
from grpo.preemption import GraceOver
from grpo.replay import GroupBuffer
from grpo.run import Progress, Run
from grpo.run_async import AsyncRun
from grpo.run_sync import SyncRun
from grpo.session import Session


class Engines:
    """An EnginePool in which one engine has groups 1 and 2."""

    def __init__(self) -> None:
        self.asked, self.forgotten = [], []

    def ask(self, method: str, doing: str) -> list:
        self.asked.append(method)
        return [[1, 2]]

    def sampled(self, ids) -> None:
        self.forgotten += ids


@pytest.fixture
def run(monkeypatch):
    """An asynchronous run in which 6 groups were started: 2 are sampled, one is graded, and one is in the buffer."""
    monkeypatch.setattr(run_async, "get_all", lambda calls, *arguments, **options: list(calls.values()))
    run = AsyncRun.__new__(AsyncRun)
    holding = SimpleNamespace(holding=SimpleNamespace(remote=lambda: [3]))
    run.config = SimpleNamespace(ray=SimpleNamespace(timeout_s=1.0))
    run.engines, run.collectors, run.submitted = Engines(), {"the collector actor": holding}, []
    run.admission = SimpleNamespace(deadlines=dict.fromkeys(range(1, 7), 9))
    run.supervisor = SimpleNamespace(take_fallen=lambda: {"the inference actor"})
    run._look = lambda: setattr(run, "finished", {4})
    run._submit = run.submitted.extend
    return run


def test_what_nobody_has_is_sampled_again(run):
    run._mend()
    assert run.engines.asked == ["weights_dtype", "holding"]
    assert run.submitted == run.engines.forgotten == [5, 6]


def test_nothing_is_looked_at_while_nothing_died(run):
    run.supervisor = SimpleNamespace(take_fallen=set)
    run._mend()
    assert run.engines.asked == run.submitted == []


def test_a_collector_that_died_is_started_collects_again_and_what_it_had_is_looked_for(run):
    told = []
    run.supervisor = SimpleNamespace(bring_back=lambda *arguments: told.append(arguments), fallen=set())
    run.start_collector = lambda name: f"{name} started"
    collector = run.collectors["the collector actor"]
    collector.run = SimpleNamespace(remote=lambda: "collecting")
    error = ActorError("it died", "the collector actor", died=True)
    assert run._collect_again("the collector actor", error) == "collecting"
    ((name, actor, reason, start),) = told
    assert (name, actor, reason, start()) == ("the collector actor", collector, error, "the collector actor started")
    assert run.supervisor.fallen == {"the collector actor"}


def group(i: int) -> TensorDict:
    return TensorDict({"group_id": torch.full((2,), i), "x": torch.arange(2.0)}, batch_size=[2])


def test_a_group_that_comes_twice_is_in_the_buffer_once():
    buffer = GroupBuffer()
    buffer.extend([group(5), group(6)])
    buffer.extend([group(6), group(7)])
    assert sorted(buffer.look().finished) == [5, 6, 7]
    assert len(set(buffer.slots.values())) == 3


@pytest.fixture
def waiting(run, monkeypatch):
    """A run that waits for a batch that never comes, by a clock of its own; the time that it took is `waiting.now`."""
    run.now = 0.0

    def sleep(seconds: float) -> None:
        run.now += 0.25

    monkeypatch.setattr(run_async, "time", SimpleNamespace(monotonic=lambda: run.now, sleep=sleep))
    run.clock, run.progress = SimpleNamespace(phase=lambda name: nullcontext()), SimpleNamespace(num_steps=3)
    run.finished, run.collecting = set(), {}
    run._choose = lambda: None
    return run


@pytest.mark.parametrize(("died_at", "ended_at"), [(None, 2.25), (1.5, 3.75)])
def test_a_batch_is_waited_for_longer_than_an_engine_and_anew_after_a_recovery(waiting, died_at, ended_at):
    waiting.supervisor = SimpleNamespace(take_fallen=lambda: {"the inference actor"} if waiting.now == died_at else set())
    with pytest.raises(ActorError, match=r"^no batch could be made within 2 s \(twice ray.timeout_s\) behind step 3: "):
        waiting._next_batch()
    assert waiting.now == ended_at


class Ahead:
    """A collection to come, whose waits end as they are told."""

    def __init__(self, *ends) -> None:
        self.ends, self.waited = list(ends), []

    def result(self, timeout_s: float) -> str:
        self.waited.append(timeout_s)
        if end := self.ends.pop(0):
            return end
        raise TimeoutError

    def done(self) -> bool:
        return False


@pytest.fixture
def beside(run):
    """A synchronous run behind step 3 that samples a collection beside training."""
    its = SyncRun.__new__(SyncRun)
    its.config, its.supervisor, its.ahead = run.config, SimpleNamespace(restarts={}), Future()
    its.clock, its.progress = SimpleNamespace(phase=lambda name: nullcontext()), SimpleNamespace(num_steps=3)
    return its


@pytest.mark.parametrize(
    ("restarts", "ends", "waited"),
    [
        ([0, 0], [None], 1),
        ([0, 1, 1, 1], [None, None], 2),  # an engine was started again meanwhile
        ([0, 1, 1, 1], [None, "collection"], 2),
    ],
)
def test_a_collection_is_waited_for_longer_than_an_engine_and_anew_after_a_recovery(beside, restarts, ends, waited):
    class Counted:
        restarts = property(lambda self: {"inference": restarts.pop(0)})

    beside.supervisor, beside.ahead = Counted(), Ahead(*ends)
    if ends[-1]:
        assert beside._wait_for_collection() == "collection"
    else:
        with pytest.raises(ActorError, match=r"^the collection behind step 3 did not end within 2 s \(twice ray"):
            beside._wait_for_collection()
    assert beside.ahead.waited == [2.0] * waited


def test_a_collection_whose_own_error_is_that_it_took_too_long_says_so(beside):
    beside.ahead.set_exception(TimeoutError("RPC call to execute_model timed out."))
    with pytest.raises(TimeoutError, match=r"^RPC call to execute_model timed out\.$"):
        beside._wait_for_collection()


def test_a_collection_that_keeps_a_run_from_being_saved_in_time_is_named(beside):
    def late(timeout_s: float) -> None:
        raise GraceOver("the run could not be saved within train.grace_s (120)")

    beside.ahead = SimpleNamespace(result=late)
    with pytest.raises(GraceOver, match=r"train.grace_s \(120\); it waited for the .* training \(train.sync_iter=false\)$"):
        beside._wait_for_collection()


def test_a_collector_that_died_has_nothing_to_tell_and_the_others_have(run, monkeypatch):
    def answer(call, timeout=None):
        if call == "dead":
            raise ActorUnavailableError("gone", None)
        return call

    monkeypatch.setattr(run_async, "get_all", remote.get_all)
    monkeypatch.setattr(remote.ray, "get", answer)
    monkeypatch.setattr(remote.ray, "wait", lambda calls, timeout: (calls[:1], calls[1:]))
    assert run._ask({"collector actor 0": "dead", "collector actor 1": "seconds"}, "telling its time") == {
        "collector actor 1": "seconds"
    }


@pytest.mark.parametrize(("num_steps", "evaluated"), [(3, False), (5, True)])
def test_an_evaluation_that_was_due_before_the_push_that_a_resume_begins_with_is_made(num_steps, evaluated):
    """Every 3 steps, with a push every 2: step 3 was due and is behind the last push, step 5 is not."""
    run = AsyncRun.__new__(AsyncRun)
    run.config = SimpleNamespace(
        train=SimpleNamespace(eval_frequency=3), train_model=SimpleNamespace(quantization=SimpleNamespace(enabled=False))
    )
    run.progress = Progress(num_steps=num_steps, steps_since_push=1, policy_version=1, admission={})
    run.admission = SimpleNamespace(restore=lambda: None, again=[], pushed=lambda: None)
    pushed = []
    run.push = pushed.append
    run._restore(None)
    assert (run.progress.evaluated, pushed, run.progress.steps_since_push) == (evaluated, [2], 0)


@pytest.fixture
def working(monkeypatch):
    """A resumed asynchronous run of 2 engines and a collector, whose processes have worked since it was resumed."""
    monkeypatch.setattr(run_async, "get_all", lambda calls, *arguments, **options: list(calls.values()))
    run = AsyncRun.__new__(AsyncRun)
    run.clock, run.stopwatches, run.busy = Clock(), Stopwatches(), {"engine 0": 40.0, "engine 1": 60.0}
    before = {"generate": 400.0, "reward": 4.0, "reference": 0.0, "train": 900.0, "wait": 90.0, "push": 9.0}
    run.progress = Progress(num_steps=8, samples_trained=64, training_s=1000.0, phases_s=before)
    run.clock.total |= before | {"train": 960.0, "wait": 130.0, "push": 10.0}
    run.config = SimpleNamespace(
        ray=SimpleNamespace(timeout_s=1.0),
        train_model=SimpleNamespace(num_devices=1),
        inference_model=SimpleNamespace(tensor_parallel_size=1),
        steps_per_push=1,
    )
    run.engines = SimpleNamespace(busy=lambda: dict(run.busy), by_name=run.busy)
    phases = SimpleNamespace(remote=lambda: {"reward": 2.0, "reference": 1.0})
    restarts = SimpleNamespace(remote=lambda: 0)
    run.grading = SimpleNamespace(restarts=0)
    run.collectors = {"the collector actor": SimpleNamespace(phases=phases, grading_restarts=restarts)}
    return run


def test_the_account_is_of_this_processs_time_alone_and_the_summary_of_the_whole_run(working):
    summary = {"phases_s": {"train": 960.0, "wait": 130.0, "push": 10.0}, "restarts": {}}
    told = working._account(summary, 1100.0)["account"]
    assert (told["trainer_busy"], told["waiting_for_data"], told["pushing"]) == (0.6, 0.4, 0.01)
    assert (told["engines_busy"], told["inference_devices"]) == (0.5, 100 / 160)  # 2 engines for 50 s, a rank for 60 s
    assert summary["phases_s"] == {
        "train": 960.0, "wait": 130.0, "push": 10.0, "generate": 450.0, "reward": 6.0, "reference": 1.0
    }  # fmt: skip


def test_an_engine_of_several_gpus_counts_for_each_of_them(working):
    working.config.inference_model.tensor_parallel_size = 3
    told = working._account({"phases_s": {}, "restarts": {}}, 1100.0)["account"]
    assert told["inference_devices"] == 300 / 360


def test_a_process_that_trained_nothing_more_has_no_account(working, capsys):
    working.clock.total |= working.progress.phases_s | {"train": 900.1234567, "push": 9.7654321}
    working.progress.phases_s = dict(working.clock.total)
    summary = {"phases_s": {"train": 900.123, "push": 9.765}, "restarts": {}}
    assert working._account(summary, 1000.5) == {"policy_version": 0}
    assert summary["phases_s"]["generate"] == 450.0
    assert capsys.readouterr().out == ""


def test_the_accounts_time_ends_with_training_and_not_with_the_last_checkpoint_and_the_export(
    working, tmp_path, monkeypatch
):
    now = [100.0]

    def takes_long(*arguments: object) -> None:
        now[0] += 400.0

    monkeypatch.setattr("grpo.session.plot_run", lambda run_dir: None)
    working.started_s, working._training_clock = 0.0, lambda: now[0]
    working.run_dir, working.progress.before = tmp_path, {"accuracy": 0.25, "n": 4}
    working.save = takes_long
    working.writer, working.trainer = SimpleNamespace(finish=takes_long), SimpleNamespace(export=takes_long)
    working._test = lambda: {"accuracy": 0.5, "n": 4}
    working.log, working.supervisor = SimpleNamespace(close=lambda: None), SimpleNamespace(restarts={})
    Session.finish(working)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (now[0], summary["wall_s"], summary["account"]["trainer_busy"]) == (1300.0, 1100.0, 0.6)


def test_a_checkpoint_has_what_engines_and_collectors_have_worked_counted_once(working):
    working.config = SimpleNamespace(ray=working.config.ray, train=SimpleNamespace(epochs=1))
    working.admission = SimpleNamespace(state={})
    for _ in range(2):
        working._state()
        assert [working.clock.total[name] for name in ("generate", "reward", "reference")] == [450.0, 6.0, 1.0]


def test_what_engines_do_in_an_evaluation_is_no_sampling_though_one_of_them_is_started_again(working, monkeypatch):
    def evaluate(self, split: str) -> None:
        working.busy |= {"engine 0": 41.0, "engine 1": 3.0}

    monkeypatch.setattr(Run, "evaluate", evaluate)
    working.evaluate("test")
    working.busy |= {"engine 0": 43.0, "engine 1": 7.0}
    working._count_work()
    assert working.clock.total["generate"] == 400 + (40 + 60) / 2 + (2 + 4) / 2
