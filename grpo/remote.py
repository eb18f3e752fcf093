"""Calls to Ray actors with a deadline and an error that names who did not answer.

Every wait of the driver goes through `get`. An error that a user can read (UserError) raised inside an actor comes out as
itself; a death or a missed deadline comes out as one line, with the last lines that the actor wrote.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from torch.distributed import DistError

from grpo.errors import ActorError, DeviceMemoryError, Restarted, UserError, one_line
from grpo.preemption import REQUEST

LOOK_S = 0.5  # between two looks at whether the run is asked to end
PEER_S = 5.0  # what one actor says of another's death may come before the death itself, by less than this
BACK_S = 0.2  # between two looks at whether an actor is back
LOG_LINES, LOG_BYTES = 3, 4096
HEARTBEATS = {"heartbeat": 1}  # the concurrency group, of one thread, in which an actor says that it is alive
# What a call ends with whose actor is gone. Only the first says so by its class: Ray names others after the cause.
DEATHS = RayActorError, OutOfMemoryError, NodeDiedError, ActorUnschedulableError
GONE = "its process is gone"  # all that a call says whose actor Ray starts again

# What to wait for instead of a call whose actor (its name) has died; None: nothing. Raises where the run cannot go on.
Again = Callable[[str, ActorError], ObjectRef | None]


def get(call: Any, timeout_s: float, actor: str, doing: str, key: str = "ray.timeout_s") -> Any:
    """The result of `call` (an ObjectRef or a list of them) of `actor`, which is `doing` something.

    Raises ActorError where the actor died, lost its connection to another one, or `timeout_s` seconds passed; `key` is the
    setting that holds them. Raises DeviceMemoryError where its GPU had too little memory.
    """
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError:
        raise _late(actor, timeout_s, doing, key) from None
    except RayTaskError as error:
        if isinstance(error.cause, Restarted):
            raise ActorError(f"{actor} died before {doing}", actor, died=True) from None
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, torch.OutOfMemoryError):
            raise DeviceMemoryError.of(actor, doing, error.cause) from None
        if _is_of_a_connection(error.cause):
            reason = one_line(error.cause)[:300]
            raise ActorError(f"{actor} lost its connection while {doing}: {reason}", actor) from None
        raise
    except DEATHS as error:
        raise ActorError(f"{actor} died while {doing}: {_reason(error)}", actor, last_lines(error), died=True) from None


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether it came between two processes of which neither need have died.

    gloo's have no class of their own; TimeoutError is vLLM's where one of an engine's processes does not answer.
    """
    return isinstance(error, DistError | TimeoutError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _late(actor: str, timeout_s: float, doing: str, key: str, others: Iterable[str] = ()) -> ActorError:
    who = ", ".join([actor, *others])  # ranks wait for each other: any of them may be the one
    return ActorError(f"{who} did not answer within {timeout_s:g} s while {doing}; if that is no hang, raise {key}", actor)


def get_done(calls: dict[str, ObjectRef], doing: str, again: Again | None = None) -> dict[str, ObjectRef]:
    """Raise what any of several actors' calls that are over ended with; returns those that go on. Waits for nothing.

    With `again` a call whose actor has died is replaced, or left out.
    """
    done, running = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0) if calls else ([], [])
    going = {actor: call for actor, call in calls.items() if call in running}
    for actor, call in calls.items():
        if call not in done:
            continue
        try:
            get(call, LOOK_S, actor, doing)
        except ActorError as error:
            if again is None or not error.died or error.actor != actor:
                raise
            if (replaced := again(actor, error)) is not None:
                going[actor] = replaced
    return going


def get_all(
    calls: dict[str, ObjectRef],
    timeout_s: float,
    doing: str,
    key: str = "ray.timeout_s",
    can_be_left: bool = False,
    again: Again | None = None,
) -> list[Any]:
    """The results of several actors' calls (by the actors' names) under one deadline; the first failure is raised.

    What an actor says because another one died is not the failure: the death is. With `again` a call whose actor has died is
    replaced in `calls`, or taken out, and the deadline begins anew. With `can_be_left` a run that is asked to end meanwhile
    does not wait for them (Preempted).
    """
    waiting = {call: actor for actor, call in calls.items()}
    answers: dict[str, Any] = {}
    deadline, in_main_thread = time.monotonic() + timeout_s, threading.current_thread() is threading.main_thread()
    while waiting:
        if in_main_thread:
            REQUEST.in_ray = True
        elif REQUEST.ended:  # a call now would start Ray again
            raise ActorError(f"the run ended while {doing}")
        done, _ = ray.wait(list(waiting), timeout=min(LOOK_S, max(0.0, deadline - time.monotonic())))
        if in_main_thread:
            REQUEST.in_ray = False
            REQUEST.raise_if_too_late()
        if can_be_left:
            REQUEST.check()
        if not done:
            if time.monotonic() < deadline:
                continue
            first, *others = waiting.values()
            raise _late(first, timeout_s, doing, key, others)
        for call in done:
            actor = waiting.pop(call)
            try:
                answers[actor] = get(call, timeout_s, actor, doing, key)
            except (UserError, RayTaskError) as error:
                if not _is_death(error):
                    _raise_a_death(waiting, doing)
                if again is None or not _is_death(error) or error.actor != actor:
                    raise
                replaced = again(actor, error)
                if replaced is None:
                    del calls[actor]
                else:
                    calls[actor], waiting[replaced] = replaced, actor
                deadline = time.monotonic() + timeout_s
    return [answers[actor] for actor in calls]


def _is_death(error: Exception) -> bool:
    return isinstance(error, ActorError) and error.died


def _raise_a_death(waiting: dict[ObjectRef, str], doing: str) -> None:
    """Raise ActorError if one of the actors that are waited for has died, or does so within PEER_S."""
    deadline = time.monotonic() + PEER_S
    while waiting and (left := deadline - time.monotonic()) > 0:
        done, _ = ray.wait(list(waiting), timeout=left)
        for call in done:
            actor = waiting.pop(call)
            try:
                get(call, 0.0, actor, doing)
            except (UserError, RayTaskError) as error:
                if _is_death(error):  # else it is another one that says so
                    raise


def ask(actor: ActorHandle) -> ObjectRef:
    """A heartbeat: the actor's process id and node, to come."""
    return actor.__ray_call__.options(concurrency_group="heartbeat").remote(_alive)


def _alive(actor: object) -> tuple[int, str]:
    return os.getpid(), ray.get_runtime_context().get_node_id()


def wait_until_back(actor: ActorHandle, name: str, timeout_s: float) -> None:
    """Wait until an actor that has died is there again; ActorError where Ray does not start it any more."""
    deadline, doing = time.monotonic() + timeout_s, "being started again"
    while True:
        try:
            ray.get(ask(actor), timeout=max(0.0, deadline - time.monotonic()))
            return
        except ActorUnavailableError:
            time.sleep(BACK_S)
        except DEATHS as error:
            raise ActorError(f"{name} died while {doing}: {_reason(error)}", name, last_lines(error), died=True) from None
        except GetTimeoutError:
            pass
        if time.monotonic() > deadline:
            raise _late(name, timeout_s, doing, "ray.start_timeout_s")


def _reason(error: RayError) -> str:
    """Why the actor died, without Ray's list of what may be the cause of any death."""
    if isinstance(error, OutOfMemoryError):
        return of_memory(str(error))
    if isinstance(error, RayActorError) and not isinstance(error, ActorDiedError):
        return GONE
    text = one_line(error)
    found = re.search(r"Worker exit detail: (.*)", text) or re.search(r"The actor is dead because (.*)", text)
    text = found.group(1) if found else text
    return re.split(r" (?:Some common causes include|There are some potential root causes)", text)[0].rstrip(".")[:400]


def of_memory(text: str) -> str:
    """The same of a process that Ray ended for its machine's memory, from the `text` that Ray has of it."""
    found = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", text)  # it counts 2^30 bytes
    figures = f"{found[1]} of {found[2]} GiB; " if found else ""
    return f"Ray ended it, since its machine's memory was almost full ({figures}docs/memory.md says what to lower)"


def last_lines(error: RayError) -> tuple[str, ...]:
    """The last lines that the actor's process wrote, where its log is on this machine."""
    process = re.search(r"\bpid: (\d+)", str(error))
    node = ray._private.worker._global_node
    if process is None or node is None:
        return ()
    lines: list[str] = []
    for path in sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{process.group(1)}.*")):  # .err, then .out
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            lines += [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    # Ray's own marks, which tell where an actor's or a task's lines begin.
    return tuple(line for line in lines if not line.startswith(":"))[-LOG_LINES:]
