"""Background collection: a Ray actor an engine that grades what it has finished and writes whole groups to the buffer.

    driver ──prompts──> engine ──sampled──> collector ──groups──> buffer ──batches──> driver
                          ^                 one thread takes, and says so                │
                          │                 others grade, score, make advantages         │
                          └──────────────────────── weight pushes ───────────────────────┘

Prompts come from the driver straight to the engine, so a collector that waits for a grader keeps no engine waiting, and what
is sampled is known to be before it is graded; each grading thread has a process of its own, so a group that is graded at
length keeps the other groups no longer than it must. What they do with a group is the synchronous mode's: grpo/collect.py.
"""

import os
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from threading import Condition, Event, Lock

import torch
from ray.actor import ActorHandle
from tensordict import TensorDict

from grpo.collect import Finish, PromptEnv, PromptStream, graded_turn, make_finish
from grpo.config import RunConfig
from grpo.errors import ActorError, Restarted
from grpo.grading import grading_pool
from grpo.metrics import Clock
from grpo.models import load_tokenizer
from grpo.pools import ReferencePool
from grpo.remote import get
from grpo.rollout import Completions, pack, teaching
from grpo.tasks import EncodedProblems

BUFFER = "the replay buffer actor"
LOOK_S = 1.0  # between two looks at whether the run has ended


class Waiting:
    """Sampled groups that wait for a grading thread."""

    def __init__(self) -> None:
        self.parts: deque[Completions] = deque()  # an engine step each
        self.changed = Condition()

    def put(self, parts: list[Completions]) -> None:
        with self.changed:
            self.parts += parts
            self.changed.notify_all()

    def take(self, wait_s: float, share: int) -> Completions | None:
        """One `share`-th of them, once there are any; None after `wait_s` seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.parts, wait_s)
            taken = [self.parts.popleft() for _ in range(-(-len(self.parts) // share))]
        return Completions.concatenate(taken) if taken else None


class BackgroundEnv(PromptEnv):
    """Grades any number of groups at a time."""

    batch_locked = False


class CollectorActor:
    """A Ray actor beside one engine, called `engine_name` in errors."""

    def __init__(self, config: RunConfig, model: str, engine_name: str) -> None:
        self.config, self.model, self.engine_name = config, model, engine_name
        self.sampled, self.ended = Waiting(), Event()
        self.lanes: list[tuple[BackgroundEnv, Finish]] = []
        self.in_hand: set[int] = set()  # groups that were taken and are not in the buffer

    def __getattr__(self, name: str) -> None:
        if name == "closing":  # which `start` makes: this process took the place of one that had died
            raise Restarted
        raise AttributeError(name)

    def start(self, data: EncodedProblems, engine: ActorHandle, references: list[ActorHandle], buffer: ActorHandle) -> int:
        """Start the grading processes; returns the process id. `data`: the training problems.

        What is held by reference is not for the constructor: Ray does not promise to have it where it starts one again.
        """
        torch.set_num_threads(1)
        config, env, self.data = self.config, self.config.env, data
        self.engine, self.buffer = engine, buffer
        self.stream = PromptStream(len(self.data.problems), config.seed)
        tokenizer = load_tokenizer(self.model)
        reference = None
        if references:
            reference = ReferencePool(references, config.ray.timeout_s, "reference", Lock())
        self.closing = ExitStack()
        for _ in range(env.grading_processes):
            grading = self.closing.enter_context(grading_pool(env, num_workers=1))
            lane = BackgroundEnv((), grading, self.data, self.stream, tokenizer, Clock())
            self.lanes.append((lane, make_finish(config, lane, reference)))
        return os.getpid()

    def run(self) -> None:
        """Collect until `end`; raises the first error of any thread."""
        with self.closing, ThreadPoolExecutor(1 + len(self.lanes)) as pool:
            threads = [pool.submit(self._take), *(pool.submit(self._collect, *lane) for lane in self.lanes)]
            done, _ = wait(threads, return_when=FIRST_EXCEPTION)
            self.ended.set()
            for thread in done:
                thread.result()

    def end(self) -> None:
        self.ended.set()

    def holding(self) -> list[int]:
        """The ids of the groups that were taken and are not in the buffer."""
        return list(self.in_hand)

    def grading_restarts(self) -> int:
        return sum(env.grading.restarts for env, _ in self.lanes)

    def phases(self) -> dict[str, float]:
        """Seconds spent grading and waiting for the reference so far, over all threads."""
        return {name: sum(env.clock.total[name] for env, _ in self.lanes) for name in ("reward", "reference")}

    def _take(self) -> None:
        timeout_s = self.config.ray.timeout_s
        while not self.ended.is_set():
            try:
                parts = get(self.engine.take.remote(LOOK_S), timeout_s, self.engine_name, "sampling")
            except ActorError as error:
                if not error.died:
                    raise
                self.ended.wait(LOOK_S)  # the driver starts it again, or goes on without it
                continue
            if parts:
                ids = [i for part in parts for i in set(part.request_id.tolist())]
                self.in_hand.update(ids)
                self.sampled.put(parts)
                get(self.buffer.note_sampled.remote(ids), timeout_s, BUFFER, f"hearing of {len(ids)} sampled groups")

    def _collect(self, env: PromptEnv, finish: Finish) -> None:
        while not self.ended.is_set():
            completions = self.sampled.take(LOOK_S, len(self.lanes))
            if completions is not None:
                self._write(finish(graded_turn(env, self._rollouts(completions.in_request_order()))))

    def _write(self, groups: TensorDict) -> None:
        kept, dropped = groups.unbind(0), []
        if self.config.train.skip_zero_advantage:
            kept, dropped = teaching(groups)
        notes = {int(group["group_id"][0]): group["record"].grades for group in dropped}
        calls = [self.buffer.extend.remote(list(kept)), self.buffer.drop.remote(notes)]
        get(calls, self.config.ray.timeout_s, BUFFER, f"taking {len(groups)} groups")
        self.in_hand.difference_update(groups["group_id"][:, 0].tolist())

    def _rollouts(self, completions: Completions) -> TensorDict:
        """Whole groups [G, K]; an engine's request ids are group ids."""
        shape = -1, self.config.env.repeats
        problems = [self.stream.at(i) for i in completions.request_id.tolist()]
        rollouts = pack([self.data.prompts[i] for i in problems], completions)
        rollouts["problem"], rollouts["group_id"] = torch.tensor(problems), torch.tensor(completions.request_id)
        return rollouts.reshape(*shape)
