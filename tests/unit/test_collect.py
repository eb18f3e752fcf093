"""Collecting with stub engines: which prompts come, and what a collection holds."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.advantages import group_advantages
from grpo.builtin import make_tokenizer
from grpo.collect import Finish, PromptEnv, PromptStream
from grpo.collector import GroupCollector, InferencePolicy
from grpo.grading import Failed
from grpo.inference import Sampling
from grpo.metrics import Clock
from grpo.objectives.divergences import k1
from grpo.preemption import Preempted
from grpo.rewards import Grade
from grpo.rollout import Completions
from grpo.run_sync import SyncRun
from grpo.tasks import EncodedProblems, Problem

from .conftest import DirectGrading


def draw(stream: PromptStream, count: int) -> list[int]:
    """Use the next `count` prompts up."""
    taken = stream.upcoming(count)
    stream.position += count
    return taken


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 25])
def test_each_problem_comes_exactly_once_a_data_pass_whatever_is_asked_for_at_a_time(chunk):
    stream, drawn = PromptStream(10, seed=0), []
    while len(drawn) < 30:
        drawn += draw(stream, chunk)
    assert stream.position == len(drawn)
    for data_pass in range(3):
        assert sorted(drawn[10 * data_pass : 10 * data_pass + 10]) == list(range(10))
    assert drawn[:30] == PromptStream(10, seed=0).upcoming(30)


def test_the_order_differs_between_data_passes_and_seeds_and_is_the_same_for_a_seed():
    first, second = (PromptStream(50, seed=3).upcoming(100) for _ in range(2))
    assert first == second
    assert first[:50] != first[50:]
    assert first[:50] != list(range(50))
    assert first != PromptStream(50, seed=4).upcoming(100)
    # A pass's seed is no sum of the two: seed 3's second pass is not seed 4's first.
    assert first[50:] != PromptStream(50, seed=4).upcoming(50)


def test_looking_ahead_uses_nothing_up():
    stream = PromptStream(5, seed=1)
    assert stream.upcoming(12) == stream.upcoming(12)
    assert stream.position == 0


@pytest.mark.parametrize("position", [0, 1, 4, 5, 12])
def test_a_stream_set_to_a_position_goes_on_exactly_there(position):
    whole = PromptStream(5, seed=1).upcoming(20)
    stream = PromptStream(5, seed=1)
    stream.upcoming(3)
    stream.position = position
    assert draw(stream, 8) == whole[position : position + 8]
    stream.position = 2  # and back
    assert draw(stream, 8) == whole[2:10]


class Echo:
    """A stub task: the answer is the response, and its grade the number of characters."""

    system_prompt = ""

    def grade(self, problem: Problem, response: str) -> Grade:
        right = response.startswith(problem.answer)
        return Grade({"length": float(len(response)), "right": 1.0 * right}, "correct" if right else "wrong", response)


class Engines:
    """Stub engines: response k to prompt p is k + 1 times the prompt's first token, and the end token."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> Completions:
        self.seeds.append(seed)
        end = make_tokenizer().eos_token_id
        rows = [[prompt[0]] * (k + 1) + [end] for prompt in prompts for k in range(sampling.num_responses)]
        flat = [token for row in rows for token in row]
        return Completions(
            request_id=np.repeat(np.arange(len(prompts)), sampling.num_responses),
            length=np.array([len(row) for row in rows]),
            stopped=np.full(len(rows), True),
            tokens=np.array(flat),
            log_probs=np.full(len(flat), -0.5, dtype=np.float32),
            versions=np.full(len(flat), 6, dtype=np.int32),
        )


LETTERS = "abcde"


def make_collector(
    reference=None, kl_in_reward: float = 0.0, reward_function=None, collections: int = 3, task=None, thought="", **finish
):
    """Collections of 2 groups of 3 over five one-letter problems."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(letter)["input_ids"] for letter in LETTERS]
    problems, prompts = [Problem(letter, letter * 2) for letter in LETTERS], [i * (n + 1) for n, i in enumerate(ids)]
    data = EncodedProblems(problems, prompts, 0, thought)
    stream, clock, engines = PromptStream(5, seed=2), Clock(), Engines()
    grading = DirectGrading(task or Echo(), reward_function)
    env = PromptEnv((2, 3), grading, data, stream, tokenizer, clock)
    collector = GroupCollector(
        env,
        policy=InferencePolicy(engines, data, Sampling(3, 8, 1.0), 11, clock),
        dialog_turns_per_batch=6,
        total_dialog_turns=6 * collections,
        postproc=Finish(env, reference, kl_in_reward, **finish),
    )
    return collector, engines, stream


def records(rollouts) -> list:
    return [rollouts[i]["record"] for i in range(len(rollouts))]


def test_a_run_uses_the_stream_in_order_and_numbers_its_groups():
    collector, engines, stream = make_collector()
    collected = list(collector)
    assert len(collected) == 3
    problems = [int(i) for rollouts in collected for i in rollouts["problem"][:, 0]]
    assert problems == PromptStream(5, seed=2).upcoming(6)
    assert stream.position == 6
    groups = torch.cat([rollouts["group_id"] for rollouts in collected])
    assert groups.tolist() == [[i] * 3 for i in range(6)]
    assert len(set(engines.seeds)) == 3  # every collection samples from its own seed
    again, engines_again, _ = make_collector()
    list(again)
    assert engines_again.seeds == engines.seeds


def test_a_collection_that_is_left_while_it_is_scored_is_the_next_one_again():
    """A run that is asked to end meanwhile is saved without it."""

    class Leaving:
        def score(self, rollouts):
            raise Preempted("SIGTERM")

    collector, _, stream = make_collector(reference=Leaving())
    stream.position = 3
    run = SyncRun.__new__(SyncRun)
    run.config = SimpleNamespace(train=SimpleNamespace(skip_zero_advantage=False))
    run.collector, run.stream, run.ahead = collector, stream, None
    with pytest.raises(Preempted):
        run._next_collection()
    assert stream.position == 3


def test_a_collection_holds_each_groups_rollouts_grades_and_advantages():
    collector, _, _ = make_collector()
    rollouts = next(iter(collector))
    assert rollouts.batch_size == torch.Size([2])
    for group, record in zip(rollouts, records(rollouts), strict=True):
        problem = int(group["problem"][0])
        letter = LETTERS[problem]
        assert (record.prompt, record.answer) == (letter, letter * 2)
        assert record.responses == [letter, letter * 2, letter * 3]  # the end token is not part of a text
        assert [grade.correct for grade in record.grades] == [False, True, True]
        assert group["reward"].tolist() == [1.0, 3.0, 4.0]
        assert group["response_length"].tolist() == [2, 3, 4]
        assert group["prompt_length"].tolist() == [problem + 1] * 3
        assert group["policy_version"].tolist() == [6] * 3
        expected = group_advantages(torch.tensor([1.0, 3.0, 4.0]), torch.zeros(3, dtype=torch.int64))
        assert torch.allclose(group["advantage"], expected)
    assert "next" not in rollouts
    assert "kl_penalty" not in rollouts


def test_a_grader_gets_what_the_prompt_has_opened_in_front_of_a_response():
    rollouts = next(iter(make_collector(thought="<think>")[0]))
    for record in records(rollouts):
        assert record.responses == [record.prompt * n for n in (1, 2, 3)]
        assert [grade.parsed for grade in record.grades] == [f"<think>{response}" for response in record.responses]


def test_a_users_reward_replaces_the_tasks_and_the_verdicts_stay():
    def shortest(prompts, responses, answers):
        assert answers == [prompt * 2 for prompt in prompts]
        return [-len(response) for response in responses]

    collector, _, _ = make_collector(reward_function=shortest)
    rollouts = next(iter(collector))
    assert rollouts["reward"].tolist() == [[-1.0, -2.0, -3.0]] * 2
    grades = records(rollouts)[0].grades
    assert [grade.terms for grade in grades] == [{"reward_fn": -1.0}, {"reward_fn": -2.0}, {"reward_fn": -3.0}]
    assert [grade.correct for grade in grades] == [False, True, True]


def test_a_reward_function_that_fails_for_a_group_leaves_it_without_verdicts():
    def half(prompts, responses, answers):
        return Failed("grader_error", "mine.py:half: no") if prompts[0] == "c" else [float(len(r)) for r in responses]

    collector, _, _ = make_collector(reward_function=half)
    for rollouts in collector:
        for group, record in zip(rollouts, records(rollouts), strict=True):
            failed = record.prompt == "c"
            assert group["graded"].tolist() == [not failed] * 3
            assert {grade.outcome for grade in record.grades} == ({"grader_error"} if failed else {"correct", "wrong"})
            assert bool(group["advantage"].any()) is not failed


class Slow(Echo):
    """Does not come to an end with two letters."""

    def grade(self, problem: Problem, response: str) -> Grade:
        return Failed("timed_out", "no answer in time").grade if len(response) == 2 else super().grade(problem, response)


def test_a_response_without_a_verdict_teaches_nothing_and_its_group_is_the_others():
    rollouts = next(iter(make_collector(task=Slow())[0]))
    assert rollouts["graded"].tolist() == [[True, False, True]] * 2
    expected = group_advantages(torch.tensor([1.0, 4.0]), torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(rollouts["advantage"][:, [0, 2]], expected.expand(2, 2))
    assert not rollouts["advantage"][:, 1].any()


def test_a_response_that_the_task_cannot_grade_keeps_the_reward_of_a_users_function():
    rollouts = next(
        iter(make_collector(task=Slow(), reward_function=lambda _, responses, __: [len(r) for r in responses])[0])
    )
    assert rollouts["graded"].all()
    assert rollouts["reward"].tolist() == [[1.0, 2.0, 3.0]] * 2
    grades = records(rollouts)[0].grades
    assert [grade.outcome for grade in grades][1] == "unparseable"
    assert [grade.note for grade in grades] == ["", "no answer in time", ""]


class Reference:
    """Stub reference: every response token has the log-prob -0.5 - ln 2, half of what the engine gave it."""

    def score(self, batch):
        return torch.where(batch["response_mask"], -0.5 - torch.tensor(2.0).log(), 0.0)


# k3 of a token with reference/policy = 1/2 is -1/2 + ln 2, and responses have 2, 3 and 4 tokens.
K3 = -0.5 + torch.tensor(2.0, dtype=torch.float64).log().item()


@pytest.mark.parametrize("kl_in_reward", [0.0, 0.5, 30.0])
def test_the_reference_penalty_is_taken_off_before_advantages_and_the_reward_stays(kl_in_reward):
    collector, _, _ = make_collector(Reference(), kl_in_reward)
    rollouts = next(iter(collector))
    mask = rollouts["response_mask"]
    assert rollouts["reference_log_probs"][mask].tolist() == pytest.approx([-1.19314718] * int(mask.sum()))
    assert rollouts["reward"].tolist() == [[1.0, 3.0, 4.0]] * 2
    penalty = kl_in_reward * K3 * torch.tensor([2.0, 3.0, 4.0])
    if kl_in_reward:
        assert torch.allclose(rollouts["kl_penalty"], penalty.expand(2, 3), rtol=1e-4)
    else:
        assert "kl_penalty" not in rollouts
    expected = group_advantages(torch.tensor([1.0, 3.0, 4.0]) - penalty, torch.zeros(3, dtype=torch.int64))
    assert torch.allclose(rollouts["advantage"], expected.expand(2, 3), atol=1e-4)


def test_the_estimate_and_the_advantage_are_the_objectives():
    advantages = partial(group_advantages, scale="none", baseline="leave_one_out")
    collector, _, _ = make_collector(Reference(), 0.5, estimate=k1, advantages=advantages)
    rollouts = next(iter(collector))
    of_a_token = -0.5 + 1.19314718  # log policy - log reference
    penalty = 0.5 * of_a_token * torch.tensor([2.0, 3.0, 4.0])
    assert torch.allclose(rollouts["kl_penalty"], penalty.expand(2, 3), rtol=1e-4)
    rewards = torch.tensor([1.0, 3.0, 4.0]) - penalty
    expected = rewards - (rewards.sum() - rewards) / 2
    assert torch.allclose(rollouts["advantage"], expected.expand(2, 3), atol=1e-5)


class Stating(Reference):
    """With the hidden states that its log-probs come from: at each token its id, three times."""

    def score_with_states(self, rollouts):
        states = rollouts["tokens"][..., None].expand(-1, -1, 3).half()
        return self.score(rollouts), torch.where(rollouts["response_mask"][..., None], states, 0)


def test_the_references_states_come_with_its_log_probs_where_they_are_compared():
    rollouts = next(iter(make_collector(Stating(), with_states=True)[0]))
    mask = rollouts["response_mask"]
    assert rollouts["anchor_states"].shape == (*mask.shape, 3)
    assert torch.equal(rollouts["anchor_states"][mask][:, 2], rollouts["tokens"][mask].half())
    assert not rollouts["anchor_states"][~mask].any()
    assert "anchor_states" not in next(iter(make_collector(Stating())[0]))
