"""The replay buffer: whole groups in, optimiser batches out.

In sync mode it holds one collection and yields each of its groups once an epoch, in the order of the prompts, which are
drawn at random. In async mode it is a Ray actor: collectors write to it, and the driver takes the groups that it chose.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from tensordict import TensorDict
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement

from grpo.rewards import Grade
from grpo.rollout import collate


def make_replay_buffer(num_groups: int, groups_per_batch: int) -> ReplayBuffer:
    """A buffer of `num_groups` groups. One pass of `for batch in buffer` yields each group once, in their order."""
    return ReplayBuffer(
        storage=ListStorage(num_groups),
        sampler=SamplerWithoutReplacement(shuffle=False),
        collate_fn=collate,
        batch_size=groups_per_batch,
    )


def refill(buffer: ReplayBuffer, groups: TensorDict) -> None:
    """Have the buffer hold `groups` [G] alone."""
    buffer.empty()
    buffer.extend(groups)


class Seen(NamedTuple):
    """What a look into the buffer tells, by the groups' ids."""

    sampled: list[int]  # since the last look: their engine is done with them
    finished: list[int]  # that are here
    dropped: dict[int, list[Grade]]  # since the last look: verdicts of those that are not trained on


class GroupBuffer(ReplayBuffer):
    """Groups under their ids, in any order of arrival.

    The driver keeps the account of what may be trained on (grpo/admission.py); here is only what there is.
    """

    def __init__(self) -> None:
        super().__init__(storage=partial(ListStorage), collate_fn=collate, batch_size=1)
        self.slots: dict[int, int] = {}  # where a group lies, by its id
        self.free: list[int] = []
        self.sampled: list[int] = []
        self.dropped: dict[int, list[Grade]] = {}

    def extend(self, groups: Iterable[TensorDict]) -> None:
        """Add groups of shape [K, ...], but those that are here: they were sampled again while they seemed to be lost."""
        for group in groups:
            if int(group["group_id"][0]) in self.slots:
                continue
            slot = self.free.pop() if self.free else len(self.slots)
            self.storage.set(slot, group)
            self.slots[int(group["group_id"][0])] = slot

    def drop(self, dropped: dict[int, list[Grade]]) -> None:
        """Take note of groups that are left out, by their ids."""
        self.dropped |= dropped

    def note_sampled(self, ids: list[int]) -> None:
        """Take note of groups that their engine is done with."""
        self.sampled += ids

    def look(self) -> Seen:
        sampled, self.sampled = self.sampled, []
        dropped, self.dropped = self.dropped, {}
        return Seen(sampled, list(self.slots), dropped)

    def take(self, ids: list[int], leaving: list[int]) -> TensorDict:
        """A batch [B] of the groups `ids`; then those that are `leaving` make room."""
        batch = collate([self.storage.get(self.slots[i]) for i in ids])
        for i in leaving:
            slot = self.slots.pop(i)
            self.storage.set(slot, None)  # which frees its memory
            self.free.append(slot)
        return batch
