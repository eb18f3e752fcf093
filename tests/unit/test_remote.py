"""Which of several failures is the one, and what is said of it."""

import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from torch.distributed import DistNetworkError

from grpo import remote
from grpo.config_sections import RayConfig
from grpo.errors import ActorError, DeviceMemoryError, PushError, Restarted
from grpo.remote import get, get_all, get_done, last_lines, wait_until_back
from grpo.supervision import Supervisor

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: TrainerActor\n\tpid: 4711\n\tip: 127.0.0.1\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) anything"
)


class Call:
    """A call that is over: what it gave, or the error that it raised."""

    def __init__(self, result: object) -> None:
        self.result = result


def raised(cause: Exception) -> RayTaskError:
    error = RayTaskError.__new__(RayTaskError)
    Exception.__init__(error, str(cause))
    error.cause = cause
    return error


def died() -> remote.ActorDiedError:
    error = remote.ActorDiedError()
    error.error_msg = DIED
    return error


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    def ray_get(call, timeout=None):
        if isinstance(call, list):
            return [ray_get(one) for one in call]
        if isinstance(call.result, Exception):
            raise call.result
        return call.result

    monkeypatch.setattr(remote.ray, "get", ray_get)
    monkeypatch.setattr(remote.ray, "wait", lambda calls, timeout: (calls[:1], calls[1:]))


def test_a_death_is_said_without_rays_guesses_and_names_the_actor():
    with pytest.raises(ActorError) as error:
        get(Call(died()), 1.0, "training actor 1", "taking optimiser step 3")
    reason = "Worker unexpectedly exits with a connection error code 2. End of file"
    assert str(error.value) == f"training actor 1 died while taking optimiser step 3: {reason}"
    assert (error.value.actor, error.value.died) == ("training actor 1", True)


def test_a_missed_deadline_names_the_setting_and_is_no_death():
    with pytest.raises(ActorError, match=r"^the x did not answer within 2 s while y; .* raise ray.timeout_s$") as error:
        get(Call(GetTimeoutError()), 2.0, "the x", "y")
    assert (error.value.actor, error.value.died) == ("the x", False)


def test_of_several_the_first_that_is_late_is_named_with_the_whole_deadline(monkeypatch):
    late = Call(2)
    monkeypatch.setattr(
        remote.ray, "wait", lambda calls, timeout: ([], calls) if calls == [late] else (calls[:1], calls[1:])
    )
    with pytest.raises(ActorError, match=r"^b did not answer within 0.05 s while starting; .* raise ray.start_timeout_s$"):
        get_all({"a": Call(1), "b": late}, 0.05, "starting", "ray.start_timeout_s")
    monkeypatch.setattr(remote.ray, "wait", lambda calls, timeout: ([], calls))
    with pytest.raises(ActorError, match=r"^a, b did not answer within 0.05 s while starting") as error:
        get_all({"a": Call(1), "b": late}, 0.05, "starting")
    assert error.value.actor == "a"


OTHER_DEATHS = [
    (
        OutOfMemoryError(
            "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: cfd) "
            "was 5.91GB used / 23.54GB limit (0.251080)\nOOM kill reason: Memory usage 6329643008B exceeded threshold of "
            "6319125504B (25.0% of 25276502016B limit)\nObject store memory usage: [- objects spillable: 0\n"
        ),
        "Ray ended it, since its machine's memory was almost full (5.91 of 23.54 GiB; docs/memory.md says what to lower)",
    ),
    (
        OutOfMemoryError("Its node ran\nlow on memory."),
        "Ray ended it, since its machine's memory was almost full (docs/memory.md says what to lower)",
    ),
    (NodeDiedError("Its node is gone."), "Its node is gone"),
    (ActorUnschedulableError("No node has room."), "The actor is not schedulable: No node has room"),
]


@pytest.mark.parametrize(("error", "reason"), OTHER_DEATHS)
def test_an_actor_that_ray_itself_ended_has_died_and_is_not_waited_for(error, reason, monkeypatch):
    with pytest.raises(ActorError) as raised:
        get(Call(error), 1.0, "inference actor 1", "sampling")
    assert str(raised.value) == f"inference actor 1 died while sampling: {reason}"
    assert (raised.value.actor, raised.value.died, raised.value.log) == ("inference actor 1", True, ())
    monkeypatch.setattr(remote, "ask", lambda actor: Call(error))
    with pytest.raises(
        ActorError, match=f"^inference actor 1 died while being started again: {re.escape(reason)}$"
    ) as raised:
        wait_until_back(None, "inference actor 1", 60.0)
    assert raised.value.died


def test_a_gpu_that_runs_out_of_memory_is_said_in_a_line_and_no_death():
    """Ray brings the error as its own and torch's at once."""
    error = pickle.loads(pickle.dumps(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")))
    call = Call(RayTaskError("step", "traceback", error).as_instanceof_cause())
    with pytest.raises(DeviceMemoryError) as raised:
        get(call, 1.0, "training actor 1", "taking optimiser step 3")
    assert str(raised.value) == (
        "training actor 1 ran out of its GPU's memory while taking optimiser step 3 (CUDA out of memory. Tried to allocate "
        "9 GiB): docs/memory.md says what to lower"
    )


def test_an_actor_that_was_started_again_has_died():
    with pytest.raises(ActorError, match=r"^the inference actor died before pushing weights version 3$") as error:
        get(Call(raised(Restarted())), 1.0, "the inference actor", "pushing weights version 3")
    assert error.value.died


BROKEN = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:41606: Connection reset"),
    DistNetworkError("The client socket has timed out after 1000ms"),
    TimeoutError("RPC call to execute_model timed out."),
]


@pytest.mark.parametrize("error", BROKEN)
def test_a_connection_that_breaks_without_a_death_is_said_of_an_actor_so_that_all_are_started_again(error):
    ranks = {f"training actor {i}": Call(RayTaskError("step", "traceback", error).as_instanceof_cause()) for i in range(2)}
    with pytest.raises(ActorError) as raised:
        get_all(ranks, 1.0, "taking optimiser step 3")
    assert str(raised.value) == f"training actor 0 lost its connection while taking optimiser step 3: {error}"
    assert (raised.value.actor, raised.value.died) == ("training actor 0", False)
    assert Supervisor(RayConfig()).count(raised.value, "") == "restart 1 of at most 3"


def test_another_runtime_error_stays_what_it_is():
    error = raised(RuntimeError("shapes do not match"))
    with pytest.raises(RayTaskError) as found:
        get_all({"the training actor": Call(error)}, 1.0, "taking optimiser step 3")
    assert found.value is error


def test_what_an_actor_says_of_anothers_death_is_not_the_failure():
    calls = {"training actor 0": Call(raised(BROKEN[0])), "training actor 1": Call(died())}
    with pytest.raises(ActorError, match=r"^training actor 1 died"):
        get_all(calls, 1.0, "taking optimiser step 3")
    calls = {"the inference actor": Call(raised(PushError("it did not come"))), "the training actor": Call(died())}
    with pytest.raises(ActorError, match=r"^the training actor died"):
        get_all(calls, 1.0, "pushing")


def test_without_a_death_the_first_failure_is_raised():
    calls = {"a": Call(1), "b": Call(raised(PushError("b is wrong"))), "c": Call(raised(PushError("c is wrong")))}
    with pytest.raises(PushError, match=r"^b is wrong$"):
        get_all(calls, 1.0, "pushing")


def test_a_call_whose_actor_died_is_replaced_in_its_place_or_left_out():
    def again(actor: str, error: ActorError):
        return Call("second") if actor == "a" else None

    def calls() -> dict:
        gone = ActorUnavailableError("gone", None)
        return {"a": Call(gone), "b": Call("first"), "c": Call(gone)}

    asked = calls()
    assert get_all(asked, 1.0, "answering", again=again) == ["second", "first"]
    assert list(asked) == ["a", "b"]
    with pytest.raises(ActorError, match=r"^a died while answering: its process is gone$"):
        get_all(calls(), 1.0, "answering")


def test_an_answer_is_fetched_once_and_never_without_a_deadline(monkeypatch):
    fetched, ray_get = [], remote.ray.get
    monkeypatch.setattr(remote.ray, "get", lambda call, timeout=None: (fetched.append(timeout), ray_get(call))[1])
    assert get_all({"a": Call(1), "b": Call(2)}, 3.0, "answering") == [1, 2]
    assert fetched == [3.0, 3.0]


def test_calls_that_are_over_are_heard_and_a_replaced_one_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(remote.ray, "wait", lambda calls, num_returns, timeout: (calls[:2], calls[2:]))
    going, forever = Call("goes on"), Call(GetTimeoutError())
    calls = {"a": Call("over"), "b": Call(ActorUnavailableError("gone", None)), "c": going}
    assert get_done(calls, "collecting", lambda actor, error: forever) == {"b": forever, "c": going}
    assert get_done(calls, "collecting", lambda actor, error: None) == {"c": going}
    with pytest.raises(ActorError, match=r"^b died while collecting"):
        get_done(calls, "collecting")
    assert get_done({}, "collecting") == {}


def test_a_late_actor_is_not_asked_again():
    with pytest.raises(ActorError, match="did not answer"):
        get_all({"a": Call(GetTimeoutError())}, 1.0, "answering", again=lambda actor, error: Call(1))


def test_the_last_lines_are_the_processs_own(tmp_path, monkeypatch):
    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(remote.ray._private.worker, "_global_node", node)
    (tmp_path / "worker-aa-01000000-4711.err").write_text(":actor_name:TrainerActor\none\ntwo\n\nthree\nfour\n")
    (tmp_path / "worker-aa-01000000-4711.out").write_text(":task_name:step\n")
    (tmp_path / "worker-bb-01000000-47110.err").write_text("another's\n")
    assert last_lines(died()) == ("two", "three", "four")
    assert last_lines(RayActorError()) == ()
