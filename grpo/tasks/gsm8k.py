"""GSM8K: grade-school word problems whose answer is one number.

The data is the hub's `openai/gsm8k`, or a local file of {"question", "answer"} rows as OpenAI published them, the answer
ending in `#### NUMBER`, or being the number alone. grpo/tasks/data.py reads and splits them. `env.style` says which form
the prompt asks for.

A response is graded by its last stated final answer, as grpo/stated_numbers.py reads it: an exact number, and the
word that scales it. Two of them are compared exactly, after this rule for such words:

50% is 1/2, and also 50 where the question asks for percent: where the last of its sentences that ends in a
question mark, or else its last sentence, has `percent` or `%` in it. There only a share below 1 is still taken as a share,
so that 5000% is not 50. In the same way `3 million` is 3000000, and also 3 where that sentence has the word; likewise
dozen, hundred, thousand, billion and trillion. Two numbers with the same word are compared as they stand.

Some questions ask for percent without the word (`What is the overall pass rate?`, or, of scores in percent, `average`).
There 50% is also 50: where the reference has no word, the question one of SHARE, and its asking sentence none of AMOUNT.
"""

import re
from fractions import Fraction
from functools import lru_cache

from grpo.config_sections import EnvConfig
from grpo.errors import DataError
from grpo.rewards import Grade
from grpo.stated_numbers import MAX_STATEMENT, NUMBER, SCALES, Ambiguous, Value, final_answer, read_clause
from grpo.tasks import Problem, after_thought
from grpo.tasks.data import HubSplit, read_problems, take_examples, text_fields, with_text

STYLES = {
    "hash": "Solve the problem step by step. End with the final answer on a line of its own as: #### NUMBER",
    "think": "Think the problem through step by step, then give the final answer as a number. Write your reasoning between "
    "<think> and </think> and the answer between <answer> and </answer>: <think>REASONING</think><answer>NUMBER</answer>",
}
BOUNDARY = re.compile(r"(?<=[.?!])(?<!\b(?:mr|ms|dr|st)\.)(?<!\bmrs\.)\s+")
SHARE = re.compile(r"%|percent|\b(?:rate|chances?|odds|likely)\b", re.IGNORECASE)
AMOUNT = re.compile(
    r"\bhow (?!likely)|\$|\b(?:prices?|costs?|total|number|amount|age|time|money|pay|value|worth|earn|profit)\b"
)


@lru_cache(maxsize=1 << 16)
def gold(answer: str) -> Value:
    """The reference answer: stated as in a response, or the bare number; raises DataError where it is neither."""
    try:
        value = final_answer(answer) or read_clause(answer[:MAX_STATEMENT], prose=False)
    except Ambiguous:
        value = None
    if value is None:
        raise DataError(f"answer ({answer[-60:]!r}) must be a number, or end in '#### NUMBER'")
    return value


def asking_sentence(question: str) -> str:
    """The last sentence of `question` that ends in a question mark, or else its last sentence; in lower case."""
    sentences = [s for s in BOUNDARY.split(question.strip().lower()) if s]
    asking = [sentence for sentence in sentences if sentence.endswith("?")]
    return (asking or sentences or [""])[-1]


def same(stated: Value, expected: Value, question: str) -> bool:
    """Whether two answers to `question` are equal, by the rule for percent and number words above."""
    if stated.scale == expected.scale:
        return stated.number == expected.number
    sentence = asking_sentence(question)
    readings = [_readings(value, sentence) for value in (stated, expected)]
    if (stated.scale, expected.scale) == ("percent", None) and SHARE.search(question) and not AMOUNT.search(sentence):
        readings[0].append(stated.number)
    return any(number in readings[1] for number in readings[0])


def _readings(value: Value, sentence: str) -> list[Fraction]:
    """The plain numbers that `value` may mean where `sentence` asks for it."""
    if value.scale is None:
        return [value.number]
    exact = value.number * SCALES[value.scale]
    if value.scale not in sentence and not (value.scale == "percent" and "%" in sentence):
        return [exact]
    return [value.number, exact] if value.scale != "percent" or abs(exact) < 1 else [value.number]


class GSM8K:
    def __init__(
        self, splits: dict[str, list[Problem]], style: str = "hash", examples: list[tuple[str, str]] | None = None
    ) -> None:
        self.splits, self.system_prompt, self.examples = splits, STYLES[style], examples or []

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.1 for a stated final answer, 0.9 for its being right, compared as exact numbers. Thoughts are none."""
        stated = final_answer(after_thought(response))
        if stated is None:
            return Grade({"format": 0.0, "exact": 0.0}, "unparseable", None)
        exact = same(stated, gold(problem.answer), problem.question)
        return Grade({"format": 0.1, "exact": 0.9 * exact}, "correct" if exact else "wrong", str(stated))

    def parse(self, response: str) -> str | None:
        stated = final_answer(after_thought(response))
        return None if stated is None else str(stated)


def _problem(row: dict, where: str) -> Problem:
    question, solution = text_fields(with_text(row, "answer"), ("question", "answer"), where)
    if NUMBER.fullmatch(solution.strip()):
        solution = f"#### {solution.strip()}"
    stated = final_answer(solution)
    if stated is None:
        raise DataError(f"{where}: its answer has no '#### NUMBER': {solution[-60:]!r}")
    return Problem(question, str(stated), solution)


def row_problem(row: dict, where: str) -> Problem:
    """{answer, question}: the answer a number, or a text that states it; the question, which may be missing, for percent."""
    answer, question = str(row.get("answer", "")), row.get("question", row.get("prompt", ""))
    try:
        gold(answer)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Problem(str(question), answer)


def grader(config: EnvConfig) -> GSM8K:
    return GSM8K({}, config.style)


def _solved(problem: Problem, style: str) -> str:
    """A response to `problem` as `style` asks for it, from its reference solution."""
    working = re.sub(r"<<[^<>]{0,100}>>", "", problem.solution)
    if style == "hash":
        return working
    return f"<think>{working.rpartition('####')[0].strip()}</think><answer>{problem.answer}</answer>"


def load(config: EnvConfig) -> GSM8K:
    hub = [HubSplit("openai/gsm8k", split, "main") for split in ("train", "test")]
    splits = read_problems(config, *hub, _problem)
    examples = take_examples(splits, config)
    return GSM8K(splits, config.style, [(problem.question, _solved(problem, config.style)) for problem in examples])
