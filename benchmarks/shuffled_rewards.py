"""The control: a reward function that shuffles the right rewards between the responses of a collection.

The rewards have the same distribution as in a real run and say nothing about the responses; a run that gains from them
has learned from something else than the reward.
"""

import random

from grpo.config_sections import EnvConfig
from grpo.tasks import Problem
from grpo.tasks.arithmetic import load

TASK = load(EnvConfig(dataset="arithmetic"))
RNG = random.Random(0)


def shuffled(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    problems = [Problem(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    rewards = [TASK.grade(problem, response).reward for problem, response in zip(problems, responses, strict=True)]
    RNG.shuffle(rewards)
    return rewards
