"""Grade texts that exist already: no model, no GPU, nothing but the task's grader.

    python -m grpo.grade env.dataset=gsm8k responses=FILE.jsonl [out=FILE.jsonl] [env.KEY=VALUE ...]

Each line of `responses` has `response` and the fields of the task's own rows (for most tasks `answer`; for countdown
`numbers` and `target`; for ifeval `prompt`, `instruction_id_list` and `kwargs`), or is one of a run's rollouts.jsonl.
It comes back in `out` with `reward`, `terms`, `outcome` and `parsed` (for ifeval also `follow_strict` and
`follow_loose`, a verdict an instruction), and with a `note` where there is no verdict. Lines that cannot be read are
reported by number and stop nothing.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from grpo import tasks
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.grading import Failed, GradingPool, grading_pool
from grpo.rewards import OUTCOMES, Grade, load_reward_function
from grpo.tool import check_out, parse_arguments, read_lines, run_tool

LINES = 4096  # that are graded at a time

Row = tuple[dict, tasks.Problem]


def _row(dataset: str, row: dict, where: str) -> Row:
    if not isinstance(row.get("response"), str):
        raise DataError(f"{where}: needs the text response")
    return row, tasks.row_problem(dataset, row, where)


def grade_file(config: EnvConfig, source: Path, out: Path | None) -> tuple[list[Grade], list[str]]:
    """Grade every line of `source` into `out`, which is there once it is whole.

    Returns the verdicts, and what was wrong with the lines left out. Raises ConfigError where `out` cannot be written, or is
    `source`.
    """
    if out is None:
        with open(os.devnull, "w") as nowhere:
            return _grade_lines(config, source, nowhere)
    check_out(out, responses=source)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with open(aside, "w") as sink:
            found = _grade_lines(config, source, sink)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return found


def _grade_lines(config: EnvConfig, source: Path, sink: IO[str]) -> tuple[list[Grade], list[str]]:
    grades, problems = [], []
    with grading_pool(config) as pool, open(source, "rb") as lines:
        part: list[Row] = []

        def finish() -> None:
            found = grade_rows(pool, part)
            grades.extend(found)
            sink.writelines(json.dumps(row | verdict(grade)) + "\n" for (row, _), grade in zip(part, found, strict=True))
            part.clear()

        for row in read_lines(lines, partial(_row, config.dataset), problems):
            part.append(row)
            if len(part) == LINES:
                finish()
        finish()
    return grades, problems


def grade_rows(pool: GradingPool, rows: list[Row]) -> list[Grade]:
    """The verdicts; with a user's function its rewards, a call a row."""
    problems, responses = [problem for _, problem in rows], [row["response"] for row, _ in rows]
    grades = pool.grade(problems, responses)
    if pool.reward_function is None:
        return grades
    rewards = pool.reward([([p.question], [r], [p.answer]) for p, r in zip(problems, responses, strict=True)])
    return [
        found.grade if isinstance(found, Failed) else replace(grade, terms={"reward_fn": found[0]})
        for grade, found in zip(grades, rewards, strict=True)
    ]


def verdict(grade: Grade) -> dict:
    """What is added to a row."""
    note = {"note": grade.note} if grade.note else {}
    found = {"reward": grade.reward, "terms": grade.terms, "outcome": grade.outcome, "parsed": grade.parsed}
    return found | grade.details | note


def summary(grades: list[Grade], problems: list[str]) -> str:
    counts = Counter(grade.outcome for grade in grades)
    shares = ", ".join(f"{outcome} {counts[outcome]} ({counts[outcome] / max(1, len(grades)):.1%})" for outcome in OUTCOMES)
    mean = sum(grade.reward for grade in grades) / max(1, len(grades))
    return f"{len(grades)} responses: {shares}; mean reward {mean:.4f}; {len(problems)} lines could not be read"


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    arguments, config = parse_arguments(sys.argv[1:], {"responses": True, "out": False}, EnvConfig, "env")
    source = Path(arguments["responses"])
    if not source.is_file():
        raise ConfigError(f"responses ({source}): there is no such file")
    if config.reward_fn:
        load_reward_function(config.reward_fn)  # so that what is missing is said before anything starts
    grades, problems = grade_file(config, source, Path(arguments["out"]) if "out" in arguments else None)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(summary(grades, problems))


if __name__ == "__main__":
    run_tool(main)
