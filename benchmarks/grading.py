"""How many responses a second does one core grade, for each task?

    python -m benchmarks.grading      # writes benchmarks/results/grading.json

Responses of the length and form that a language model gives, no two alike: a paragraph of working, and an answer that is
right in one of two; for ifeval two paragraphs under one to three instructions. They go through a GradingPool of one process,
as a run's do.
"""

import json
import random
import time

from benchmarks.report import save, spread, table
from grpo import tasks
from grpo.grading import GradingPool
from grpo.launch import compose
from grpo.tasks import Problem

RESPONSES, REPEATS = 500, 3

WORKING = (
    "Let's go through this one step at a time. First, there are {a} boxes, and each of them holds {b} pencils, so there are "
    "{a} * {b} = {ab} pencils before anything is given away. Next, {c} of the pencils are handed out in the morning, which "
    "leaves {ab} - {c} = {rest}. In the afternoon nothing else changes: 25% of the boxes move to another room, at $1.50 a "
    "box, which has no effect on the number of pencils. Finally, a check: {rest} + {c} = {ab}, as it should be.\n"
)
LATEX = (
    "We write $f(x) = {a}x^2 + {b}x - {c}$ and complete the square. Since $\\frac{{{a}}}{{{b}}} > 0$, the discriminant is "
    "$\\Delta = {b}^2 + 4 \\cdot {a} \\cdot {c}$, so $x_{{1,2}} = \\frac{{-{b} \\pm \\sqrt{{\\Delta}}}}{{2 \\cdot {a}}}$. "
    "Both roots are real, and by Vieta's formulas their product is $-\\frac{{{c}}}{{{a}}}$. Substituting back confirms it.\n"
)
PROSE = (
    "Walking to work has changed how I see my city. The bakery nearby opens at {a} in the morning, and by the time I pass "
    "it the windows are clouded with steam. There are {b} trees along the canal; I counted them once, one day in spring. "
    "People nod at one another here, which nobody does on the underground.\n\n"
    "It costs nothing, and it takes {c} minutes. *I would not go back.* If you are thinking about it, try it: leave "
    "early, take the longer street, and look up. P.S. Bring an umbrella.\n"
)
ANSWERS = (
    r"\frac{{{a}}}{{{b}}}",
    r"{a}\sqrt{{{b}}}",
    "({a}, {b})",
    "x^2 + {a}x - {b}",
    "{a}{b}",
    "{a}{b}",
    "{a}{b}",
    "{a}{b}",
)
INSTRUCTIONS = (
    {"punctuation:no_comma": {}},
    {
        "length_constraints:number_words": {"num_words": 90, "relation": "at least"},
        "keywords:existence": {"keywords": ["city"]},
    },
    {
        "detectable_format:number_highlighted_sections": {"num_highlights": 1},
        "length_constraints:number_sentences": {"num_sentences": 9, "relation": "less than"},
        "detectable_content:postscript": {"postscript_marker": "P.S."},
    },
    {"language:response_language": {"language": "en"}},
    {"change_case:english_lowercase": {}},
    {"keywords:forbidden_words": {"forbidden_words": ["car", "bus"]}, "startend:end_checker": {"end_phrase": "umbrella."}},
)


def numbers(rng: random.Random) -> dict[str, int]:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 999)
    return {"a": a, "b": b, "c": c, "ab": a * b, "rest": a * b - c}


def example(dataset: str, i: int, rng: random.Random) -> tuple[Problem, str]:
    """A problem and a response to it, which for an even `i` is right."""
    n, wrong = numbers(rng), i % 2
    if dataset == "gsm8k":
        return Problem("How many pencils are left?", str(n["rest"])), WORKING.format(**n) + f"#### {n['rest'] + wrong:,}"
    if dataset == "math":
        answer = ANSWERS[i // 2 % len(ANSWERS)]
        stated = answer.format(**(n | {"a": n["a"] + wrong}))
        return Problem("What is x?", answer.format(**n)), f"{LATEX.format(**n)}The answer is $\\boxed{{{stated} }}$."
    if dataset == "countdown":
        answer = json.dumps({"numbers": [n["a"], n["b"], n["c"]], "target": n["ab"] + n["c"] + wrong})
        return Problem("?", answer), f"{WORKING.format(**n)}<answer>({n['a']} * {n['b']}) + {n['c']}</answer>"
    if dataset == "ifeval":
        asked = INSTRUCTIONS[i % len(INSTRUCTIONS)]
        answer = json.dumps({"instruction_id_list": list(asked), "kwargs": list(asked.values())})
        return Problem("?", answer), PROSE.format(**n)
    return Problem("?", str(n["ab"])), f"{n['a']}*{n['b']}={n['ab']}<answer>{n['ab'] + wrong}</answer>"


def measure(dataset: str) -> dict:
    """Responses a second of one grading process."""
    config = compose(f"grpo_{dataset}", [])
    rng, rates, shares = random.Random(0), [], []
    with GradingPool(tasks.grader(config.env), 1, config.env.grading_timeout_s) as pool:
        for repeat in range(1 + REPEATS):  # the first one warms up
            problems, responses = zip(*(example(dataset, i, rng) for i in range(RESPONSES)), strict=True)
            start = time.perf_counter()
            grades = pool.grade(list(problems), list(responses))
            if repeat > 0:
                rates.append(RESPONSES / (time.perf_counter() - start))
                shares.append(sum(grade.correct for grade in grades) / RESPONSES)
            assert all(grade.is_verdict for grade in grades)
    characters = round(sum(map(len, responses)) / RESPONSES)
    return {"characters": characters, "responses_per_s": spread(rates), "correct": spread(shares)}


def main() -> None:
    results = {dataset: measure(dataset) for dataset in tasks.names()}
    save("grading", compose("grpo_gsm8k", []), {"responses": RESPONSES, "tasks": results})
    rows = [
        [name, found["characters"], found["responses_per_s"]["median"], found["correct"]["median"]]
        for name, found in results.items()
    ]
    table(["task", "characters", "responses/s", "correct"], rows)


if __name__ == "__main__":
    main()
