"""An asynchronous run: engines and collectors go on by themselves, and the driver trains on what has finished.

    driver   admit ─ take batch ─ step ─ admit ─ take batch ─ step ─ push ─ ...
    engines  ════ prompts in, groups out, weights change in between ════════════
    collectors      grade, score ──> replay buffer

What may be started and what is trained on next is decided in one place, grpo/admission.py.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle
from tensordict import TensorDict

from grpo.account import Stopwatches, describe, make_account
from grpo.admission import Admission
from grpo.background import BUFFER
from grpo.checkpoint import Checkpoint
from grpo.collect import PromptStream, sampling_seed
from grpo.errors import ActorError, UserError
from grpo.inference import Sampling
from grpo.preemption import REQUEST
from grpo.remote import get, get_all, get_done
from grpo.replay import Seen
from grpo.rewards import Grade
from grpo.run import Run
from grpo.session import is_due

POLL_S = 0.01  # between two looks into the buffer


@dataclass(kw_only=True)
class AsyncRun(Run):
    buffer: ActorHandle
    collectors: dict[str, ActorHandle]  # by the names that errors use
    start_collector: Callable[[str], ObjectRef]
    stream: PromptStream
    sampling: Sampling
    admission: Admission
    collecting: dict[str, ObjectRef] = field(default_factory=dict)  # the collectors' calls that end with the run
    finished: set[int] = field(default_factory=set)  # groups that were in the buffer at the last look
    stopwatches: Stopwatches = field(default_factory=Stopwatches)  # of engines and collectors
    dropped: dict[int, list[Grade]] = field(default_factory=dict)  # groups without advantage since the last batch,
    dropped_in_a_row: list[list[Grade]] = field(default_factory=list)  # and since the last group that has one
    graded: deque[dict[int, list[Grade]]] = field(default_factory=deque)  # a collection's worth of groups, a batch each

    def batches(self) -> Iterator[TensorDict]:
        """Optimiser batches [B] of finished groups, none of them older than train.max_staleness when it is trained on."""
        self.collecting = {name: actor.run.remote() for name, actor in self.collectors.items()}
        while not self.admission.is_over and not self._at_plateau:
            batch = self._next_batch()
            for epoch in range(self.config.train.epochs):
                self.first_use = epoch == 0
                yield batch
            if self.progress.steps_since_push == 0:  # a checkpoint is of weights that the engines have
                self._save_if_due(self.progress.num_steps - self.config.steps_per_push)
            REQUEST.check()

    def _feed(self) -> None:
        """Have the engines start what may be started now."""
        ids = self.admission.start()
        if ids:
            self._submit(ids)

    def _submit(self, ids: list[int]) -> None:
        prompts = [self.data["train"].prompts[self.stream.at(i)] for i in ids]
        self.engines.submit(ids, prompts, self.sampling, sampling_seed(self.config.seed, ids[0]))

    def _next_batch(self) -> TensorDict:
        with self.clock.phase("wait"):
            timeout_s = 2 * self.config.ray.timeout_s  # who waits for an actor itself names it first
            deadline = time.monotonic() + timeout_s
            while (chosen := self._choose()) is None:
                REQUEST.check()
                self._check_collectors()
                if self._mend():
                    deadline = time.monotonic() + timeout_s
                if time.monotonic() > deadline:
                    raise ActorError(
                        f"no batch could be made within {timeout_s:g} s (twice ray.timeout_s) behind step "
                        f"{self.progress.num_steps}: {len(self.finished)} groups are finished and {self._in_flight} are "
                        "being sampled or graded; if neither engine nor reward function hangs, raise ray.timeout_s"
                    )
                time.sleep(POLL_S)
            leaving = self.admission.leaving
            call = self.buffer.take.remote(chosen, leaving)
            batch = get(call, self.config.ray.timeout_s, BUFFER, "giving a batch")
        self.of_batch = {"buffer/size": len(self.finished) - len(leaving), "buffer/in_flight": self._in_flight}
        self.of_batch |= self.admission.of_batch(chosen)
        kept, dropped = [record.grades for record in batch["records"]], self.dropped
        self.dropped = {}
        self._note_graded(dropped | dict(zip(chosen, kept, strict=True)))
        self._tell_dropped(kept, list(dropped.values()))
        return batch

    def _note_graded(self, groups: dict[int, list[Grade]]) -> None:
        """Check the grading of a batch's groups, by their ids, and of those before them: a collection's worth or more.

        A batch alone is too little: one call of a reward function that fails is a whole group of it.
        """
        self.graded.append(groups)
        while sum(map(len, self.graded)) - len(self.graded[0]) >= self.config.groups_per_collection:
            self.graded.popleft()
        once = {i: grades for part in self.graded for i, grades in part.items()}  # replay may draw a group several times
        self._check_grading([grade for grades in once.values() for grade in grades])

    def _choose(self) -> list[int] | None:
        """The next batch, or None while it has to be waited for; the engines are fed meanwhile."""
        self._look()
        self._feed()
        return self.admission.choose(self.finished)

    def _look(self) -> None:
        """Take note of what the buffer has."""
        seen: Seen = get(self.buffer.look.remote(), self.config.ray.timeout_s, BUFFER, "telling what is finished")
        self.engines.sampled(seen.sampled)
        before, self.finished = self.finished, set(seen.finished)
        # A group that seemed to be lost is sampled again, and may come twice.
        dropped = {i: grades for i, grades in seen.dropped.items() if i in self.admission.deadlines}
        self.dropped |= dropped
        self.dropped_in_a_row = [] if self.finished - before else self.dropped_in_a_row + list(dropped.values())
        self._check_dropped(self.dropped_in_a_row)
        self.admission.drop(dropped)

    @property
    def _in_flight(self) -> int:
        return len(self.admission.deadlines.keys() - self.finished)

    def _check_collectors(self) -> None:
        """Raise what a collector ended with; one that has died collects again."""
        self.collecting = get_done(self.collecting, "collecting", self._collect_again)

    def _collect_again(self, name: str, error: ActorError) -> ObjectRef:
        """For `get_all`: start a collector again that has died."""
        actor = self.collectors[name]
        self.supervisor.bring_back(name, actor, error, partial(self.start_collector, name))
        self.supervisor.fallen.add(name)  # with what it had
        return actor.run.remote()

    def _mend(self) -> bool:
        """Have back what has died, and sample again what it had in hand; whether there was any."""
        if not self.supervisor.take_fallen():
            return False
        self.engines.ask("weights_dtype", "telling whether it is there")  # which one that was just started again cannot
        # In the order of the way from prompt to buffer, so that what moves on meanwhile is seen.
        doing = "telling what it has"
        holding = self.engines.ask("holding", doing)
        collectors = {name: actor.holding.remote() for name, actor in self.collectors.items()}
        holding += self._ask(collectors, doing).values()  # what one that has died had is lost
        self._look()
        lost = sorted(self.admission.deadlines.keys() - self.finished.union(*holding))
        self.engines.sampled(lost)
        if lost:
            self._submit(lost)
            print(f"{len(lost)} groups that were in flight are sampled again", file=sys.stderr)
        return True

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged."""
        super().step(batch)
        self.admission.trained()

    @property
    def push_is_due(self) -> bool:
        return self.progress.steps_since_push >= self.config.steps_per_push

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version, and evaluate where it is time to.

        What runs goes on under the new weights, or ends before with train.drain_before_push. Raises UserError where it is
        not time to, and something would be trained on later that was started before.
        """
        between_epochs = self.progress.num_steps % self.config.train.epochs > 0
        if not self.push_is_due and (self.admission.is_under_way or between_epochs):
            raise UserError(
                f"run.push_weights behind {self.progress.steps_since_push} of the {self.config.steps_per_push} steps "
                "between pushes: what was started before could become older than train.max_staleness "
                f"({self.config.train.max_staleness}); call it where run.push_is_due is true"
            )
        self._push_weights()

    def _push_weights(self) -> None:
        if self.config.train.drain_before_push:
            with self.clock.phase("wait"):
                self.engines.ask("drain", "ending what runs before a push", can_be_left=True)
        super().push_weights()

    def _pushed(self) -> None:
        self.admission.pushed()

    def evaluate(self, split: str) -> dict[str, float]:
        """As in sync mode, beside what the engines are at; their time meanwhile is no part of training's account."""
        self._count_work()
        found = super().evaluate(split)
        self._engine_seconds()
        return found

    def _count_work(self) -> None:
        """Have the clock's totals hold what engines (their mean) and collectors have done up to now."""
        total, sampling = self.clock.total, self._engine_seconds()
        total["generate"] += sum(sampling.values()) / max(1, len(sampling))
        calls = {name: actor.phases.remote() for name, actor in self.collectors.items()}
        for name, phases in self._ask(calls, "telling its time").items():
            its = self.stopwatches.since({f"{name}: {phase}": s for phase, s in phases.items()})
            for phase, s in zip(phases, its.values(), strict=True):
                total[phase] += s

    def _engine_seconds(self) -> dict[str, float]:
        """What each engine has worked since this was asked last."""
        return self.stopwatches.since(self._ask(self.engines.busy(), "telling its time"))

    def finish(self) -> None:
        if self.progress.steps_since_push:
            self._push_weights()  # whatever is under way is not trained on any more
        self.engines.ask("hold_nothing", "giving up what it has not begun")
        self._ask({name: actor.end.remote() for name, actor in self.collectors.items()}, "ending")
        super().finish()

    def _account(self, summary: dict, training_s: float) -> dict:
        self._count_work()
        summary["phases_s"] |= {name: round(self.clock.total[name], 3) for name in ("generate", "reward", "reference")}
        found, before = super()._account(summary, training_s), self.progress
        here = {name: s - before.phases_s.get(name, 0.0) for name, s in self.clock.total.items()}
        if here["train"] == 0:  # it went on with a run whose training was over
            return found
        ranks = self.config.train_model.num_devices
        engine_devices = len(self.engines.by_name) * self.config.inference_model.tensor_parallel_size
        account = make_account(here, training_s - before.training_s, engine_devices, ranks, self.config.steps_per_push)
        print(f"\n{describe(account)}")
        return found | {"account": account}

    @property
    def _grading_restarts(self) -> int:
        calls = {name: actor.grading_restarts.remote() for name, actor in self.collectors.items()}
        return super()._grading_restarts + sum(self._ask(calls, "telling how often it replaced its graders").values())

    def _ask(self, calls: dict[str, ObjectRef], doing: str) -> dict[str, Any]:
        """What actors answer, by their names; one that has died has nothing to tell."""
        answers = get_all(calls, self.config.ray.timeout_s, doing, again=lambda name, error: None)
        return dict(zip(calls, answers, strict=True))

    def _state(self) -> dict[str, TensorDict]:
        if self.progress.num_steps % self.config.train.epochs:
            raise UserError(
                f"run.save between two of the train.epochs ({self.config.train.epochs}) steps on one batch: in async mode a "
                "checkpoint does not hold the batch; call it behind the last of them"
            )
        self._count_work()
        self.progress.admission = self.admission.state
        return {}

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Groups that were in flight are sampled again. A run that ended between two pushes goes on with one."""
        now = self.progress
        self.admission.restore(**now.admission)
        if now.steps_since_push:
            before = now.num_steps - now.steps_since_push
            now.evaluated = not is_due(self.config.train.eval_frequency, before, now.num_steps)
            now.policy_version, now.steps_since_push = now.policy_version + 1, 0
            self._pushed()
        if self._differs:
            self.push(now.policy_version)
        print(f"{len(self.admission.again)} groups that were started and not trained on are sampled again")

    @property
    def _eval_seed(self) -> None:
        return None
