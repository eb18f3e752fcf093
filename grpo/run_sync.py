"""A synchronous run: collections in, one after the other, and the batches that they hold.

With train.sync_iter=false one background thread waits for the next collection while the driver waits for the trainer:

    driver       step ... step │ wait │ push │ step ... step │ wait │ push
    background   collection n + 1 ────┘      collection n + 2 ────┘
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from grpo.checkpoint import Checkpoint
from grpo.collect import PromptStream
from grpo.collector import GroupCollector
from grpo.colocate import Turns
from grpo.errors import ActorError, UserError
from grpo.pools import ReferencePool
from grpo.preemption import REQUEST, GraceOver
from grpo.replay import refill
from grpo.rewards import Grade
from grpo.rollout import regroup, teaching
from grpo.run import Run


class Collected(NamedTuple):
    """A collection [G], and verdicts on the groups that were left out of it."""

    rollouts: TensorDict
    dropped: list[list[Grade]]  # those without advantage
    surplus: list[list[Grade]]  # those that have one, beyond its size


@dataclass(kw_only=True)
class SyncRun(Run):
    collector: GroupCollector
    stream: PromptStream
    replay_buffer: ReplayBuffer
    background: ThreadPoolExecutor
    old: ReferencePool | None  # the training ranks, where the policy is compared with what it was
    turns: Turns | None = None  # where engines and trainer have one device
    rollouts: TensorDict | None = None  # the collection that is being trained on
    ahead: Future | None = None  # the next one

    def collections(self) -> Iterator[TensorDict]:
        """The run's collections. With train.sync_iter=false the next one is sampled while one is trained on."""
        if self.rollouts is not None:  # a resumed run's, of which some steps are done
            yield self.rollouts
        while self._wants_more:
            REQUEST.check()
            self.rollouts, dropped, surplus = self._next_collection()
            self.of_batch = {}
            kept = [self.rollouts[i]["record"].grades for i in range(len(self.rollouts))] + surplus
            self._check_grading([grade for group in kept + dropped for grade in group])
            self._tell_dropped(kept, dropped)
            self.progress.collections += 1
            if self._wants_more and not self.config.train.sync_iter:
                self.ahead = self.background.submit(self._collect)
            yield self.rollouts

    @property
    def _wants_more(self) -> bool:
        return not self._at_plateau and self.progress.collections < self.config.num_collections

    def _collect(self) -> Collected:
        """The next collection. With train.skip_zero_advantage as many are sampled as have enough groups that teach."""
        if not self.config.train.skip_zero_advantage:
            return Collected(next(self._collections), [], [])
        kept, dropped, in_a_row = [], [], []
        while len(kept) < self.config.groups_per_collection:
            teach, others = teaching(next(self._collections))
            kept += teach
            left_out = [group["record"].grades for group in others]
            dropped += left_out
            in_a_row = [] if teach else in_a_row + left_out
            self._check_dropped(in_a_row)
        size = self.config.groups_per_collection
        return Collected(regroup(kept[:size]), dropped, [group["record"].grades for group in kept[size:]])

    @cached_property
    def _collections(self) -> Iterator[TensorDict]:
        return iter(self.collector)

    def _next_collection(self) -> Collected:
        if self.ahead is None:
            with self.stream.taken_back():
                return self._collect()
        collected, self.ahead = self._wait_for_collection(), None
        return collected

    def _wait_for_collection(self) -> Collected:
        timeout_s = 2 * self.config.ray.timeout_s  # who waits for an actor itself names it first
        with self.clock.phase("wait"):
            while True:
                restarts = self.supervisor.restarts
                try:
                    return self.ahead.result(timeout_s)
                except GraceOver as error:
                    what = "the collection beside training (train.sync_iter=false)"
                    raise GraceOver(f"{error}; it waited for {what}") from None
                except TimeoutError:
                    if self.ahead.done():  # it may be the collection's own
                        return self.ahead.result()
                    if self.supervisor.restarts != restarts:  # it was begun again meanwhile, and so is the wait for it
                        continue
                raise ActorError(
                    f"the collection behind step {self.progress.num_steps} did not end within {timeout_s:g} s (twice "
                    "ray.timeout_s): if neither engine nor reward function hangs, raise it"
                )

    def batches(self, rollouts: TensorDict) -> Iterator[TensorDict]:
        """train.epochs passes over `rollouts` [G] in optimiser batches [B]; a resumed run leaves out what it has done."""
        if self.turns is not None:
            with self.clock.phase("push"):
                self.turns.sleep()
        if self.old is not None and self.progress.steps_since_push == 0:
            with self.clock.phase("train"):
                self._anchor(rollouts)
        refill(self.replay_buffer, rollouts)
        batches = chain.from_iterable(self.replay_buffer for _ in range(self.config.train.epochs))
        for batch in islice(batches, self.progress.steps_since_push, None):
            self.first_use = self.progress.steps_since_push < self.config.batches_per_collection
            yield batch

    def _anchor(self, rollouts: TensorDict) -> None:
        """Have `rollouts` [G] hold the hidden states that the policy has before the collection's first step."""
        rows = rollouts.select("tokens", "prompt_length", "response_mask")
        rows.batch_size = rollouts["prompt_length"].shape
        _, states = self.old.own_states(rows.flatten())
        rollouts["anchor_states"] = states.unflatten(0, rows.batch_size)

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged; and a checkpoint where it is due."""
        if self.rollouts is None:
            raise UserError(
                "run.step behind run.push_weights: the push ended the batch's collection, which a checkpoint would not "
                "have; push behind its last step, or leave the rest of run.batches(rollouts)"
            )
        super().step(batch)
        if self.progress.steps_since_push < self.config.steps_per_collection:  # after the last one comes the push
            if self.config.train.sync_iter:  # else the collection beside it would have to be waited for
                self._save_if_due(self.progress.num_steps - 1)
            REQUEST.check()

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version; evaluate and save where it is time to."""
        now = self.progress
        if self.ahead is not None:
            self._wait_for_collection()  # a collection is sampled under one version
        if self.turns is not None:
            with self.clock.phase("push"):
                self.turns.make_room()
        before, self.rollouts = now.num_steps - now.steps_since_push, None
        super().push_weights()
        # What was due at an earlier step of the collection was saved there, but for a collection beside training.
        self._save_if_due(now.num_steps - 1 if self.config.train.sync_iter else before)
        REQUEST.check()

    def evaluate(self, split: str) -> dict[str, float]:
        """As in any mode, once the collection beside training is there: engines and graders do one thing at a time."""
        if self.turns is not None and self.turns.are_asleep:
            raise UserError(
                "run.evaluate between two steps: with colocate=true the engines sleep until the next push and have no "
                "weights; call it behind run.push_weights()"
            )
        if self.ahead is not None:
            self._wait_for_collection()
        return super().evaluate(split)

    def _pushed(self) -> None:
        if self.turns is not None:
            self.turns.are_asleep = False

    def _state(self) -> dict[str, TensorDict]:
        collections, now = {}, self.progress
        now.of_collection, now.dropped_ahead, now.surplus_ahead = self.of_batch, [], []
        if self.rollouts is not None:
            collections["collection"] = self.rollouts
        if self.ahead is not None:  # it was sampled under weights that are gone by then
            collections["ahead"], now.dropped_ahead, now.surplus_ahead = self._wait_for_collection()
        now.position = self.stream.position
        return collections

    def _restore(self, checkpoint: Checkpoint) -> None:
        now = self.progress
        self.stream.position, self.of_batch = now.position, now.of_collection
        self.rollouts = checkpoint.collection("collection")
        ahead = checkpoint.collection("ahead")
        if ahead is not None:
            left_out = (
                [[Grade(**grade) for grade in group] for group in part] for part in (now.dropped_ahead, now.surplus_ahead)
            )
            self.ahead = Future()
            self.ahead.set_result(Collected(ahead, *left_out))
        if self._differs:  # within a collection nothing is sampled under these weights: they are for `evaluate`
            self.push(now.policy_version)

    @property
    def _eval_seed(self) -> int:
        return 0
