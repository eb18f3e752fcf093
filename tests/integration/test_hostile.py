"""Every task's grading against texts made to break it: each gets a verdict in time, and memory stays flat."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice

import psutil
import pytest

from grpo import tasks
from grpo.config_sections import EnvConfig
from grpo.grading import GradingPool
from grpo.rewards import OUTCOMES
from grpo.tasks import Problem
from tests.unit.hostile import pathological, random_texts
from tests.unit.test_ifeval import CASES

TIMEOUT_S = 2.0
GROWTH = 64 * 2**20  # bytes, from a tenth of the texts to all of them

ANSWERS = {
    "gsm8k": ["18", "50%", "3/4", "-1,000"],
    "math": ["18", r"\frac{1}{2}", r"x^2 + 1", r"\{1, 2\}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    "countdown": [json.dumps({"numbers": [3, 5, 7], "target": 22}), json.dumps({"numbers": [1, 1], "target": 1})],
    "ifeval": [json.dumps({"instruction_id_list": [name], "kwargs": [cases[0][0]]}) for name, cases in CASES.items()],
    "arithmetic": ["18", "-3"],
}


def resident(pool: GradingPool) -> dict[str, int]:
    """Bytes in memory, of this process and of the worker."""
    return {
        "driver": psutil.Process().memory_info().rss,
        "worker": psutil.Process(pool.workers[0].process.pid).memory_info().rss,
    }


def texts(num_random: int, num_pathological: int) -> Iterator[str]:
    """Pathological ones first: what they leave behind in a process would show in what follows."""
    yield from islice(pathological(), 0, None, 1000 // num_pathological)
    yield from random_texts(num_random, seed=5)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_random", "num_pathological"), [(3_000, 100), pytest.param(100_000, 1_000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dataset", sorted(ANSWERS))
def test_every_hostile_text_gets_a_verdict_in_time_and_leaves_nothing_behind(dataset, num_random, num_pathological):
    total, outcomes, longest, late = num_random + num_pathological, Counter(), 0.0, []
    before = None
    with GradingPool(tasks.grader(EnvConfig(dataset=dataset)), 1, TIMEOUT_S, memory_gb=1.0) as pool:
        began = time.monotonic()
        for i, (text, answer) in enumerate(zip(texts(num_random, num_pathological), cycle(ANSWERS[dataset]), strict=False)):
            start = time.monotonic()
            (grade,) = pool.grade([Problem("How many percent?", answer)], [text])
            seconds = time.monotonic() - start
            assert grade.outcome in OUTCOMES and (grade.note == "") == grade.is_verdict
            outcomes[grade.outcome] += 1
            longest = max(longest, seconds)
            if seconds > TIMEOUT_S + 1:
                late.append((seconds, text[:80]))
            if i == total // 10:
                before = resident(pool)
        after = resident(pool)
        seconds = time.monotonic() - began
    growth = {name: (after[name] - before[name]) / 2**20 for name in after}
    print(f"{dataset}: {total} texts in {seconds:.0f} s, longest {longest:.2f} s, {dict(outcomes)}, growth in MiB {growth}")
    assert not late
    assert outcomes.total() == total and outcomes["grader_error"] == 0
    assert max(growth.values()) < GROWTH / 2**20
