import numpy as np

from grpo.builtin import make_tokenizer
from grpo.evaluate import accuracy
from grpo.inference import Sampling
from grpo.rewards import Grade
from grpo.rollout import Completions
from grpo.tasks import EncodedProblems, Problem

from .conftest import DirectGrading


class Same:
    system_prompt = ""

    def grade(self, problem: Problem, response: str) -> Grade:
        return Grade({}, "correct" if response == problem.answer else "wrong", None)


def test_accuracy_is_the_share_of_right_greedy_responses():
    tokenizer, asked = make_tokenizer(), []

    class Engines:
        """Stub engines that answer 12 to everything."""

        def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> Completions:
            asked.append((prompts, sampling))
            tokens = np.array([*tokenizer("12")["input_ids"], tokenizer.eos_token_id] * len(prompts))
            length = np.full(len(prompts), 3)
            return Completions(np.arange(len(prompts)), length, length > 0, tokens, tokens * 0.0, tokens * 0)

    data = EncodedProblems([Problem("", answer) for answer in ("12", "1", "12", "2", "12")], [[i] for i in range(5)], 0)
    assert accuracy(Engines(), DirectGrading(Same()), data, tokenizer, 9) == {"accuracy": 0.6, "n": 5}
    assert asked == [(data.prompts, Sampling(num_responses=1, max_tokens=9, temperature=0.0))]
