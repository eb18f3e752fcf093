import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from grpo.replay import GroupBuffer, make_replay_buffer, refill
from grpo.rollout import GroupRecord, pack

from .conftest import completions

K = 3


def collection(first: int, num_groups: int) -> TensorDict:
    """Groups first, first + 1, ... of 3 rollouts, as the collector makes them; group g's rewards are 10 g, 10 g + 1, ..."""
    lengths = [1 + (first + 5 * i) % 7 for i in range(num_groups * K)]
    flat = pack([[1] * (1 + i % 4) for i in range(num_groups) for _ in range(K)], completions(lengths, seed=first))
    groups = torch.arange(first, first + num_groups)
    flat["group_id"] = groups.repeat_interleave(K)
    flat["reward"] = (10 * groups[:, None] + torch.arange(K)).flatten().float()
    rollouts = flat.reshape(num_groups, K)
    rollouts.batch_size = [num_groups]
    records = [GroupRecord(f"prompt {group}", "", [], []) for group in groups.tolist()]
    return rollouts.set("record", NonTensorStack(*[NonTensorData(record) for record in records]))


def order(buffer) -> list[int]:
    """The groups of one pass, after checking that each came whole with its own record."""
    passed = []
    for batch in buffer:
        groups = batch["group_id"].view(-1, K)
        assert (groups == groups[:, :1]).all()
        assert batch["reward"].view(-1, K).tolist() == [[10 * g, 10 * g + 1, 10 * g + 2] for g in groups[:, 0].tolist()]
        assert [record.prompt for record in batch["records"]] == [f"prompt {g}" for g in groups[:, 0].tolist()]
        passed += groups[:, 0].tolist()
    return passed


@pytest.mark.parametrize("groups_per_batch", [1, 2, 4, 8])
def test_a_pass_yields_every_group_once_and_whole_in_batches_of_the_size(groups_per_batch):
    buffer = make_replay_buffer(8, groups_per_batch)
    refill(buffer, collection(0, 8))
    assert [len(batch) for batch in buffer] == [groups_per_batch * K] * (8 // groups_per_batch)
    for _ in range(3):  # epochs
        assert sorted(order(buffer)) == list(range(8))


def test_a_batch_is_trimmed_to_its_own_longest_rollout_and_keeps_its_tokens():
    whole = collection(0, 8)
    buffer = make_replay_buffer(8, 2)
    refill(buffer, whole)
    for batch in buffer:
        longest = int((batch["prompt_length"] + batch["response_length"]).max())
        assert batch["tokens"].shape == (2 * K, longest)
        for i, group in enumerate(batch["group_id"][::K].tolist()):
            assert torch.equal(batch["tokens"][i * K : i * K + K], whole["tokens"][group][:, :longest])
            assert torch.equal(batch["response_mask"][i * K : i * K + K], whole["response_mask"][group][:, :longest])


def test_groups_come_in_the_order_of_the_prompts_in_every_epoch():
    buffer = make_replay_buffer(8, 2)
    for first in (0, 8):
        refill(buffer, collection(first, 8))
        for _ in range(2):
            assert order(buffer) == list(range(first, first + 8))


def test_a_new_collection_replaces_the_one_before():
    buffer = make_replay_buffer(4, 2)
    for first in (0, 4, 8):
        refill(buffer, collection(first, 4))
        assert len(buffer) == 4
        assert sorted(order(buffer)) == list(range(first, first + 4))


def test_the_async_buffer_gives_groups_in_any_order_and_their_room_to_others():
    buffer = GroupBuffer()
    buffer.extend(collection(0, 3).unbind(0))
    buffer.extend(collection(7, 2).unbind(0))
    assert sorted(buffer.look().finished) == [0, 1, 2, 7, 8]
    batch = buffer.take([1, 8], leaving=[1, 8])
    assert batch["group_id"].tolist() == [1] * K + [8] * K
    assert batch["reward"].tolist() == [10, 11, 12, 80, 81, 82]
    assert [record.prompt for record in batch["records"]] == ["prompt 1", "prompt 8"]
    assert sorted(buffer.look().finished) == [0, 2, 7]
    buffer.extend(collection(20, 3).unbind(0))
    assert len(buffer) == 6  # the room of two was used again
    whole = [0, 20, 22, 21]
    assert buffer.take(whole, leaving=whole)["group_id"][::K].tolist() == whole
    with pytest.raises(KeyError):
        buffer.take([0], leaving=[])


def test_the_async_buffer_keeps_what_is_not_leaving():
    buffer = GroupBuffer()
    buffer.extend(collection(0, 3).unbind(0))
    assert buffer.take([2], leaving=[0])["group_id"].tolist() == [2] * K
    assert sorted(buffer.look().finished) == [1, 2]
    assert buffer.take([1, 2], leaving=[])["reward"].tolist() == [10, 11, 12, 20, 21, 22]


def test_a_look_tells_once_what_was_sampled_and_what_was_dropped():
    buffer = GroupBuffer()
    buffer.note_sampled([4, 30])
    buffer.note_sampled([5])
    buffer.drop({30: []})
    assert buffer.look() == ([4, 30, 5], [], {30: []})
    assert buffer.look() == ([], [], {})
