"""Files of scored completions: what is refused, who is held out, how groups become batches."""

import json

import pytest
import torch

from grpo.builtin import make_tokenizer
from grpo.errors import ConfigError, DataError
from grpo.objectives.offline import group_kl_loss
from grpo.scored import (
    EncodedGroup,
    ScoredGroup,
    batches_of,
    collate,
    encode_groups,
    hold_out,
    read_groups,
)

GOOD = '{"prompt": "a", "completions": [{"text": "b", "score": 1}, {"text": "", "score": -0.5}], "id": 7}'


def two(first: str) -> str:
    return f'{{"prompt": "a", "completions": [{first}, {{"text": "c", "score": 0}}]}}'


def test_lines_become_groups_and_other_fields_are_left_alone(tmp_path):
    (tmp_path / "s.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    assert read_groups(str(tmp_path / "s.jsonl")) == [ScoredGroup("a", ["b", ""], [1.0, -0.5])] * 2


MALFORMED = [
    ("", "is not JSON: Expecting value"),
    ("{", "is not JSON: Expecting property name"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "is not a JSON object"),
    ('{"completions": []}', "prompt (missing) must be a text that is not empty"),
    ('{"prompt": ""}', "prompt ('') must be a text that is not empty"),
    ('{"prompt": 3}', "prompt (3) must be a text that is not empty"),
    (r'{"prompt": "\ud800"}', r"prompt ('\ud800') must be a text"),
    ('{"prompt": "a"}', 'completions (missing) must be a list of at least 2 {"text", "score"}'),
    ('{"prompt": "a", "completions": "b"}', "completions ('b') must be a list"),
    ('{"prompt": "a", "completions": [{"text": "b", "score": 1}]}', "completions (1 of them) must be a list of at least 2"),
    (two('"b"'), "completions[0] ('b') must be an object"),
    (two('{"score": 1}'), "completions[0].text (missing) must be a text"),
    (two('{"text": "b"}'), "completions[0].score (missing) must be a finite number"),
    (two('{"text": "b", "score": "1"}'), "completions[0].score ('1') must be a finite number"),
    (two('{"text": "b", "score": true}'), "completions[0].score (True) must be a finite number"),
    (two('{"text": "b", "score": NaN}'), "completions[0].score (nan) must be a finite number"),
    (two('{"text": "b", "score": -Infinity}'), "completions[0].score (-inf) must be a finite number"),
    (two('{"text": "b", "score": 1e300}'), "completions[0].score (1e+300) must be a finite number"),
    (two('{"text": "b", "score": 1' + "0" * 400 + "}"), "must be a finite number"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_line_is_named_with_its_number_and_reason(tmp_path, line, reason):
    path = tmp_path / "s.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError) as raised:
        read_groups(str(path))
    message = str(raised.value)
    assert message.startswith(f"data {path}:3") and reason in message and "\n" not in message


def test_a_file_that_is_not_there_empty_or_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl\): there is no such file"):
        read_groups(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="has no line"):
        read_groups(str(tmp_path / "empty.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes.jsonl:1 is not JSON"):
        read_groups(str(tmp_path / "bytes.jsonl"))


def named(*prompts: str) -> list[ScoredGroup]:
    return [ScoredGroup(prompt, [str(i), ""], [1.0, 0.0]) for i, prompt in enumerate(prompts)]


def test_a_share_of_the_prompts_is_held_out_and_no_prompt_is_on_both_sides():
    groups = named(*(f"prompt {i % 20}" for i in range(60)), *(f"PROMPT  {i}" for i in range(20)))
    train, held_out = hold_out(groups, 0.25, seed=0)
    assert len(held_out) == 5 * 4 and len(train) == 15 * 4
    sides = [{" ".join(group.prompt.lower().split()) for group in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert hold_out(groups, 0.25, seed=0) == (train, held_out)
    assert hold_out(groups, 0.25, seed=1) != (train, held_out)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_side_has_a_prompt(share):
    train, held_out = hold_out(named("a", "b", "c"), share, seed=0)
    assert len(train) >= 1 and len(held_out) >= 1 and len(train) + len(held_out) == 3
    with pytest.raises(DataError, match="data has 1 prompt"):
        hold_out(named("a", "A "), share, seed=0)


def test_a_prompt_is_a_users_turn_or_plain_text_and_a_completion_ends_with_eos():
    tokenizer = make_tokenizer()
    (group,) = encode_groups([ScoredGroup("1+1", ["2", "3<|end|>"], [1.0, 0.0])], tokenizer, 99).groups
    assert tokenizer.decode(group.prompt) == "<|user|>1+1<|end|><|assistant|>"
    assert [tokenizer.decode(completion) for completion in group.completions] == ["2<|end|>", "3<|end|>"]
    tokenizer.chat_template = tokenizer.pad_token = None
    (group,) = encode_groups([ScoredGroup("1+1", ["2", "3"], [1.0, 0.0])], tokenizer, 99).groups
    assert tokenizer.decode(group.prompt) == "1+1"
    assert [tokenizer.decode(completion) for completion in group.completions] == ["2<|end|>", "3<|end|>"]


def test_what_no_completion_can_be_made_of_is_said():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"the prompt '\\xc9' has no token"):
        encode_groups(named("É"), tokenizer, 99)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token"):
        encode_groups(named("1"), tokenizer, 99)


def test_what_is_too_long_is_left_out_whole_and_counted():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    groups = [
        ScoredGroup("12", ["3", "3456", "345"], [1.0, 2.0, 3.0]),  # 4, 7 and 6 tokens with their eos
        ScoredGroup("12", ["3", "3456"], [1.0, 2.0]),
        ScoredGroup("1234567", ["1", "2"], [1.0, 2.0]),
    ]
    encoded = encode_groups(groups, tokenizer, 6)
    assert (encoded.too_long, encoded.too_small) == (4, 2)
    assert [group.scores for group in encoded.groups] == [[1.0, 3.0]]
    assert [len(completion) for completion in encoded.groups[0].completions] == [2, 4]
    assert encode_groups(groups, tokenizer, 9).too_long == 0


def test_an_epoch_has_each_group_once_and_depends_on_the_seed_and_its_number_alone():
    steps = list(batches_of(10, 4, num_epochs=3, seed=5))
    assert [len(batch) for batch in steps] == [4, 4, 2] * 3
    epochs = [[*steps[i], *steps[i + 1], *steps[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(batches_of(10, 4, 5, seed=5))[:9] == steps
    assert list(batches_of(10, 4, 3, seed=6)) != steps


def test_a_resumed_run_gets_the_batches_that_it_had_left():
    steps = list(batches_of(10, 4, num_epochs=3, seed=5))
    for first in range(10):
        assert list(batches_of(10, 4, 3, 5, first)) == steps[first:]


def ragged() -> list[EncodedGroup]:
    """Token 0, which pads, is a token like any other."""
    return [
        EncodedGroup([5, 0], [[1, 2, 0], [3]], [1.0, 2.0]),
        EncodedGroup([6], [[0], [7, 0], [8, 9, 4, 1]], [0.5, 0.0, -1.0]),
        EncodedGroup([2, 2, 2], [[1], [1, 1]], [0.0, 0.0]),
    ]


def test_a_batch_has_every_token_and_masks_from_lengths():
    batch = collate(ragged()[:2])
    assert batch["tokens"].tolist() == [
        [[5, 0, 1, 2, 0], [5, 0, 3, 0, 0], [0, 0, 0, 0, 0]],
        [[6, 0, 0, 0, 0], [6, 7, 0, 0, 0], [6, 8, 9, 4, 1]],
    ]
    assert batch["response_mask"].int().tolist() == [
        [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1]],
    ]
    assert batch["prompt_length"].tolist() == [[2, 2, 1], [1, 1, 1]]
    assert batch["response_length"].tolist() == [[3, 1, 0], [1, 2, 4]]
    assert batch["score"].tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, -1.0]]


def test_a_batch_is_filled_up_with_groups_that_count_nothing():
    batch, filled = collate(ragged()), collate(ragged(), multiple=4)
    assert (batch.batch_size, filled.batch_size) == (torch.Size([3]), torch.Size([4]))
    assert not filled["response_mask"][3].any() and (filled["response_length"][3] == filled["response_length"][2]).all()
    assert (filled[:3] == batch).all()
    losses = []
    for part in (batch, filled):
        log_probs = part["tokens"] * -0.1
        loss, sums = group_kl_loss(
            log_probs, part["response_mask"], part["score"], log_prob="sum", temperature=1.0, target_temperature=1.0
        )
        losses.append((loss, sums))
    assert losses[0] == losses[1]


def test_the_fingerprint_is_that_of_tokens_scores_and_order():
    tokenizer, groups = make_tokenizer(), named("1", "2")
    first = encode_groups(groups, tokenizer, 99).fingerprint
    assert encode_groups(groups, tokenizer, 99).fingerprint == first
    assert encode_groups(groups[::-1], tokenizer, 99).fingerprint != first
    changed = [groups[0], ScoredGroup(groups[1].prompt, groups[1].texts, [1.0, 0.1])]
    assert encode_groups(changed, tokenizer, 99).fingerprint != first
    assert len(json.dumps(first)) == 66
