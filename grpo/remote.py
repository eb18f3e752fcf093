"""Calls to Ray actors with a deadline and an error that names who did not answer.

Every wait of the driver goes through `get`. An error that a user can read (UserError) raised inside an actor comes out as
itself; a death or a missed deadline comes out as one line.
"""

import threading
import time
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from grpo.errors import ActorError, UserError, one_line
from grpo.preemption import REQUEST

LOOK_S = 0.5  # between two looks at whether the run is asked to end


def get(call: Any, timeout_s: float, actor: str, doing: str, key: str = "ray.timeout_s") -> Any:
    """The result of `call` (an ObjectRef or a list of them) of `actor`, which is `doing` something.

    Raises ActorError where the actor died or `timeout_s` seconds passed; `key` is the setting that holds them.
    """
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError:
        raise ActorError(
            f"{actor} did not answer within {timeout_s:g} s while {doing}; if that is no hang, raise {key}"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayActorError as error:
        reason = one_line(error) if isinstance(error, ActorDiedError) else type(error).__name__
        raise ActorError(f"{actor} died while {doing}: {reason[:400]}") from None


def get_done(calls: dict[str, ObjectRef], doing: str) -> dict[str, ObjectRef]:
    """Raise what any of several actors' calls that are over ended with; returns those that go on. Waits for nothing."""
    done, running = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0) if calls else ([], [])
    get_all({actor: call for actor, call in calls.items() if call in done}, LOOK_S, doing)
    return {actor: call for actor, call in calls.items() if call in running}


def get_all(
    calls: dict[str, ObjectRef], timeout_s: float, doing: str, key: str = "ray.timeout_s", can_be_left: bool = False
) -> list[Any]:
    """The results of several actors' calls (by the actors' names) under one deadline; the first failure is raised.

    With `can_be_left` a run that is asked to end meanwhile does not wait for them (Preempted).
    """
    waiting = {call: actor for actor, call in calls.items()}
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
        if not done and time.monotonic() < deadline:
            continue
        for call in done or list(waiting)[:1]:
            get(call, timeout_s if done else 0.0, waiting.pop(call), doing, key)
    return ray.get(list(calls.values()))
