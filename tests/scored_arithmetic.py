"""Scored completions made from the built-in task: K = 4 to a prompt, one of them right, scored by the task's own grader.

python -m tests.scored_arithmetic FILE.jsonl [GROUPS]
"""

import json
import random
import sys
from pathlib import Path

from grpo.builtin import demonstration
from grpo.tasks import Problem
from grpo.tasks.arithmetic import OPERATIONS, Arithmetic, Expression, question, split_expressions, value


def completions(expression: Expression, rng: random.Random) -> list[str]:
    """The right scratchpad; the two operators swapped; a slip in the first operation; a slip in the second."""
    a, first, b, second, c = expression
    between, slip = OPERATIONS[first](a, b), rng.choice([-3, -2, 2, 3])
    slipped = OPERATIONS[second](between + slip, c)
    result = value(expression) + slip
    return [
        demonstration(expression, right=True),
        demonstration(expression, right=False),
        f"{a}{first}{b}={between + slip};{between + slip}{second}{c}={slipped}<answer>{slipped}</answer>",
        f"{a}{first}{b}={between};{between}{second}{c}={result}<answer>{result}</answer>",
    ]


def write_scored(path: Path, num_groups: int, seed: int = 0) -> Path:
    """A file of groups of which one completion alone has the right answer, in an order of its own."""
    rng, task, lines = random.Random(seed), Arithmetic(), []
    expressions = split_expressions()["train"]
    for expression in rng.sample(expressions, len(expressions)):
        problem, texts = Problem(question(expression), str(value(expression))), completions(expression, rng)
        grades = [task.grade(problem, text) for text in texts]
        if [grade.correct for grade in grades] != [True, False, False, False]:
            continue  # where another way comes to the same
        scored = [{"text": text, "score": grade.reward} for text, grade in zip(texts, grades, strict=True)]
        rng.shuffle(scored)
        lines.append(json.dumps({"prompt": problem.question, "completions": scored}))
        if len(lines) == num_groups:
            break
    assert len(lines) == num_groups
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    write_scored(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
