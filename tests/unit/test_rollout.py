import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from grpo.rewards import Grade
from grpo.rollout import Completions, GroupRecord, collate, length_mask, pack, regroup, teaching, trim

from .conftest import completions, ragged_rollouts


def two_responses() -> Completions:
    return Completions(
        request_id=np.array([0, 1]),
        length=np.array([2, 3]),
        stopped=np.array([True, False]),
        tokens=np.array([5, 0, 0, 8, 0]),
        log_probs=np.array([-0.1, -0.2, -0.3, -0.4, -0.5], dtype=np.float32),
        versions=np.array([4, 3, 7, 7, 8], dtype=np.int32),
    )


def test_groups_are_parted_by_whether_they_teach_and_put_together_again():
    rollouts = ragged_rollouts().reshape(4, 2)
    rollouts["advantage"] = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.5, -0.5], [0.0, 0.0]])
    rollouts["group_id"] = torch.arange(4)[:, None].expand(4, 2)
    rollouts.batch_size = [4]
    records = [GroupRecord(f"prompt {i}", "", [], []) for i in range(4)]
    rollouts = rollouts.set("record", NonTensorStack(*[NonTensorData(record) for record in records]))
    teach, others = teaching(rollouts)
    again = regroup(teach)
    assert again.batch_size == (2,)
    assert again["group_id"].tolist() == [[0, 0], [2, 2]]
    assert [again[i]["record"].prompt for i in range(2)] == ["prompt 0", "prompt 2"]
    width = again["tokens"].shape[-1]
    assert torch.equal(again["tokens"], rollouts["tokens"][[0, 2]][..., :width])
    assert [group["record"].prompt for group in others] == ["prompt 1", "prompt 3"]


def test_pack_puts_everything_where_the_contract_says_with_token_zero_as_a_real_token():
    batch = pack([[0, 3, 0], [9]], two_responses())
    assert batch.batch_size == torch.Size([2])
    assert batch["tokens"].tolist() == [[0, 3, 0, 5, 0], [9, 0, 8, 0, 0]]
    assert batch["prompt_length"].tolist() == [3, 1]
    assert batch["response_length"].tolist() == [2, 3]
    assert batch["response_mask"].int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    expected = torch.tensor([[0, 0, 0, -0.1, -0.2], [0, -0.3, -0.4, -0.5, 0]])
    assert torch.equal(batch["inference_log_probs"], expected)
    assert batch["token_versions"].tolist() == [[0, 0, 0, 4, 3], [0, 7, 7, 8, 0]]
    assert batch["stopped"].tolist() == [True, False]


def test_pack_gives_the_dtypes_of_the_contract():
    batch = pack([[0, 3, 0], [9]], two_responses())
    assert {key: str(value.dtype).removeprefix("torch.") for key, value in batch.items()} == {
        "tokens": "int64",
        "prompt_length": "int64",
        "response_length": "int64",
        "response_mask": "bool",
        "inference_log_probs": "float32",
        "token_versions": "int32",
        "policy_version": "int64",
        "stopped": "bool",
    }


def test_policy_version_is_the_oldest_of_a_rollouts_tokens():
    # Padding and prompt hold version 0, which sampled nothing here.
    assert pack([[0, 3, 0], [9]], two_responses())["policy_version"].tolist() == [3, 7]


def test_length_mask_is_true_from_start_for_length_positions():
    mask = length_mask(torch.tensor([0, 2, 1]), torch.tensor([2, 3, 0]), 5)
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_trim_cuts_to_the_longest_rollout_and_leaves_the_whole_batch_alone():
    whole = pack([[1, 2, 3], [4], [5, 6]], completions([6, 2, 3]))
    whole["advantage"] = torch.tensor([1.0, 2.0, 3.0])
    part = trim(whole[1:])
    assert part["tokens"].shape == (2, 5)
    for key in ("tokens", "response_mask", "inference_log_probs", "token_versions"):
        assert torch.equal(part[key], whole[key][1:, :5])
        assert whole[key].shape == (3, 9)
    assert part["advantage"].tolist() == [2.0, 3.0]
    assert part["response_mask"].sum() == 5
    assert trim(whole) is whole


def group(prompt: list[int], lengths: list[int], group_id: int, width: int = 0) -> tuple[TensorDict, Completions]:
    """One group as the collector makes it, padded to at least `width` columns."""
    done = completions(lengths, seed=group_id)
    rollouts = pack([prompt] * len(lengths), done)
    extra = max(0, width - rollouts["tokens"].shape[1])
    for key in ("tokens", "response_mask", "inference_log_probs", "token_versions"):
        rollouts[key] = torch.nn.functional.pad(rollouts[key], (0, extra))
    rollouts["group_id"] = torch.full((len(lengths),), group_id)
    rollouts["reward"] = torch.arange(len(lengths)).float()
    rollouts.batch_size = []
    return rollouts.set_non_tensor("record", GroupRecord(f"prompt {group_id}", "1", ["r"] * len(lengths), [])), done


@pytest.mark.parametrize("widths", [(0, 0, 0), (20, 0, 13), (30, 30, 30)])
def test_collating_groups_of_different_widths_equals_packing_them_at_once(widths):
    prompts, lengths = [[1, 2], [0] * 5, [7]], [[3, 1], [2, 6], [4, 4]]
    made = [group(*arguments, width) for *arguments, width in zip(prompts, lengths, (4, 2, 9), widths, strict=True)]
    batch = collate([rollouts for rollouts, _ in made])
    at_once = pack([p for p in prompts for _ in range(2)], Completions.concatenate([done for _, done in made]))
    for key in at_once.keys():
        assert torch.equal(batch[key], at_once[key]), key
    assert batch.batch_size == torch.Size([6])
    assert batch["group_id"].tolist() == [4, 4, 2, 2, 9, 9]
    assert batch["reward"].tolist() == [0, 1, 0, 1, 0, 1]
    assert [record.prompt for record in batch["records"]] == ["prompt 4", "prompt 2", "prompt 9"]
    assert "record" not in batch


def test_collate_takes_the_rows_of_a_stored_collection_apart_and_together_again():
    flat = pack([[1, 2]] * 2 + [[3]] * 2, completions([1, 5, 2, 3]))
    flat["reference_log_probs"] = flat["inference_log_probs"] * 2
    flat["anchor_states"] = torch.randn(*flat["tokens"].shape, 3, generator=torch.Generator().manual_seed(0)).half()
    collection = flat.reshape(2, 2)
    collection.batch_size = [2]
    grades = [Grade({"exact": 1.0}, "correct", "1")] * 2
    records = [GroupRecord("a", "1", ["x", "y"], grades), GroupRecord("b", "2", ["z", "w"], grades)]
    collection.set("record", NonTensorStack(*[NonTensorData(record) for record in records]))
    batch = collate([collection[1], collection[0]])
    for key in flat.keys():
        expected = flat[key][[2, 3, 0, 1]]
        assert torch.equal(batch[key], expected), key
    assert [record.prompt for record in batch["records"]] == ["b", "a"]
    narrow = collate([collection[1]])
    assert torch.equal(narrow["tokens"], flat["tokens"][2:, :4])
    assert torch.equal(narrow["reference_log_probs"], flat["reference_log_probs"][2:, :4])
    assert torch.equal(narrow["anchor_states"], flat["anchor_states"][2:, :4])
    widened = collate([narrow.exclude("records").auto_batch_size_(1).set_non_tensor("record", records[1]), collection[0]])
    assert torch.equal(widened["anchor_states"][:2, :4], flat["anchor_states"][2:, :4])
    assert not widened["anchor_states"][:2, 4:].any()


def test_in_request_order_moves_ragged_responses_with_their_tokens():
    mixed = Completions(
        request_id=np.array([2, 2, 0, 1]),
        length=np.array([1, 3, 2, 1]),
        stopped=np.array([True, False, False, True]),
        tokens=np.array([20, 21, 22, 23, 1, 2, 10]),
        log_probs=np.array([-2.0, -2.1, -2.2, -2.3, -0.1, -0.2, -1.0], dtype=np.float32),
        versions=np.array([0, 1, 1, 1, 2, 3, 4], dtype=np.int32),
    )
    ordered = mixed.in_request_order()
    assert ordered.request_id.tolist() == [0, 1, 2, 2]
    assert ordered.length.tolist() == [2, 1, 1, 3]
    assert ordered.stopped.tolist() == [False, True, True, False]
    assert ordered.responses() == [[1, 2], [10], [20], [21, 22, 23]]
    assert ordered.log_probs.tolist() == np.float32([-0.1, -0.2, -1.0, -2.0, -2.1, -2.2, -2.3]).tolist()
    assert ordered.versions.tolist() == [2, 3, 4, 0, 1, 1, 1]
    assert ordered.in_request_order() is ordered


def test_whatever_order_responses_finish_in_the_batch_is_the_same():
    prompts = [[1], [2, 2], [3, 3, 3]]
    done = completions([4, 1, 6])
    expected = pack(prompts, done)
    one_each = [
        Completions(
            np.array([i]),
            done.length[i : i + 1],
            done.stopped[i : i + 1],
            *(np.split(getattr(done, name), [4, 5])[i] for name in ("tokens", "log_probs", "versions")),
        )
        for i in range(3)
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        batch = pack(prompts, Completions.concatenate([one_each[i] for i in order]).in_request_order())
        for key in expected.keys():
            assert torch.equal(batch[key], expected[key]), key


def test_concatenate_appends_responses():
    both = Completions.concatenate([two_responses(), completions([1, 2], seed=3)])
    assert len(both) == 4
    assert both.length.tolist() == [2, 3, 1, 2]
    assert both.responses() == two_responses().responses() + completions([1, 2], seed=3).responses()
    assert both.versions.dtype == np.int32
    assert both.log_probs.dtype == np.float32


def test_no_responses_are_an_empty_list():
    assert completions([]).responses() == []
