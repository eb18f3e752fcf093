"""Before and after: how often a model is right, with 95% intervals, and what it says beside what another one says.

    python -m grpo.evaluate run=outputs/DATE/TIME [KEY=VALUE ...]      the model that the run began with, and its model/
    python -m grpo.evaluate model=PATH [base=PATH] [KEY=VALUE ...]     one model, or one against another

    prompts=FILE.jsonl   instead of the task's test split: rows of the task, which are graded, or {"prompt": TEXT}
    k=8                  samples a problem, at the temperature of training; 0: greedy responses only
    max_samples=N        prompts, at most: a sample drawn by a fixed seed
    out=FILE.json        instead of comparison.json (evaluation.json of one model) in the run's directory, or here
    seed= device= env.KEY= inference_model.KEY= ray.KEY=    instead of the run's; without a run, of config/grpo_DATASET.yaml

A model in a run's directory (best/, model/) is asked as that run asks, and what it held out, unless env.dataset= names
another task.

pass@1 is the share of problems whose greedy response is right, mean@k the mean share of right ones among k samples. Mean
reward and mean length (in tokens) are those of the greedy responses. Responses are graded as in a run; one without a verdict
counts as not right, with the reward 0.
"""

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from grpo import tasks
from grpo.comparison import Answers, Question, improvements, table
from grpo.config import RunConfig
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.grading import grading_pool
from grpo.launch import CONFIG_DIR, compose
from grpo.offline_config import OfflineConfig
from grpo.resume import CONFIG, Config, key_value, read_config, write_whole
from grpo.rewards import load_reward_function
from grpo.sources import check_files, check_model
from grpo.tasks.data import check_text, text_fields
from grpo.tool import asking_config, check_out, read_lines, run_tool, split_arguments, whole_number

OWN = ("run", "model", "base", "prompts", "k", "max_samples", "out", "seed", "device")
SECTIONS = ("env", "inference_model", "ray")
SPLIT = ("env.dataset", "env.data", "env.validation_size", "env.test_size")  # what a run's test split is made with
K = 8
SAMPLE_SEED = 1234  # of max_samples


def configure(arguments: dict[str, str], overrides: dict[str, str]) -> tuple[RunConfig, dict[str, str], Path]:
    """The configuration, the models under the names that the output gives them, and the output's path.

    Raises ConfigError where the arguments do not go together, or the run has no model yet.
    """
    if ("run" in arguments) == ("model" in arguments):
        raise ConfigError("give either run=DIRECTORY or model=PATH")
    folder = Path()
    if "run" in arguments:
        folder = Path(arguments["run"])
        if "base" in arguments:
            raise ConfigError(f"base ({arguments['base']}) goes with model=PATH: a run has the model that it began with")
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"run ({folder}): there is no run there: give the directory of one")
        if not (folder / "model").is_dir():
            raise ConfigError(f"run ({folder}) has no model/ yet, which is written at its end: go on with resume={folder}")
        own = read_config(folder)
        if not isinstance(own, RunConfig):
            raise ConfigError(
                f"run ({folder}) is of mode=offline, which has no task: give model={folder}/model env.dataset=NAME"
            )
        models = {"before": own.model.name, "after": str(folder / "model")}
    else:
        models = {"model": arguments["model"]}
        if "base" in arguments:
            models = {"before": arguments["base"], "after": arguments["model"]}
        own = config_of_its_run(Path(arguments["model"]))
        if isinstance(own, OfflineConfig) and "env.dataset" not in overrides:
            where = f"model ({arguments['model']})"
            raise ConfigError(f"{where} is of a run of mode=offline, which has no task: give env.dataset=NAME too")
        if not isinstance(own, RunConfig) or overrides.get("env.dataset") not in (None, own.env.dataset):
            own = None  # another task has settings of its own
    if own is not None and "prompts" not in arguments:
        _check_split(own, overrides)
    run_keys = {key: arguments[key] for key in ("seed", "device") if key in arguments}
    config = asking_config(own or shipped_config(overrides), run_keys | overrides)
    out = Path(arguments.get("out", folder / ("comparison.json" if len(models) == 2 else "evaluation.json")))
    check_out(out, **{name: Path(arguments[name]) for name in ("prompts",) if name in arguments})
    return config, models, out


def config_of_its_run(model: Path) -> Config | None:
    """The configuration of the run whose directory `model` is in, as its model/ or an export; None where it is in none."""
    is_in_one = model.is_dir() and all((model.parent / name).exists() for name in (CONFIG, "checkpoints"))
    return read_config(model.parent) if is_in_one else None


def shipped_config(overrides: dict[str, str]) -> RunConfig:
    """config/grpo_DATASET.yaml for the env.dataset among `overrides`, or the default one."""
    dataset = overrides.get("env.dataset", EnvConfig.dataset)
    if not (CONFIG_DIR / f"grpo_{dataset}.yaml").is_file():
        raise ConfigError(f"env.dataset ({dataset}) has no config/grpo_{dataset}.yaml to take settings from: make one")
    return compose(f"grpo_{dataset}", [])


def _check_split(config: RunConfig, overrides: dict[str, str]) -> None:
    """Raise ConfigError where the test split would be another than the run's, and might hold what it was trained on."""
    for key in SPLIT:
        trained = key_value(config, key)
        if key in overrides and overrides[key] != ("null" if trained is None else str(trained)):
            raise ConfigError(
                f"{key} ({overrides[key]}) must be the run's own ({trained}), or its training problems might be asked: "
                "max_samples=N asks fewer, prompts=FILE others"
            )


def read_prompts(path: Path, dataset: str) -> tuple[list[Question], list[str]]:
    """The questions of a user's file, and what is wrong with its other lines; raises DataError where there is none."""
    if not path.is_file():
        raise ConfigError(f"prompts ({path}): there is no such file")
    faults: list[str] = []
    with open(path, "rb") as lines:
        questions = list(read_lines(lines, partial(_question, dataset), faults))
    if not questions:
        raise DataError(f"prompts ({path}) has no line that can be used" + (f": {faults[0]}" if faults else ""))
    return questions, faults


def _question(dataset: str, row: dict, where: str) -> Question:
    if row.keys() == {"prompt"}:
        (prompt,) = text_fields(row, ("prompt",), where)
        question = Question(tasks.Problem(prompt, ""), graded=False)
    else:
        problem = tasks.row_problem(dataset, row, where)  # of some tasks, also without a question
        question = Question(replace(problem, question=problem.question or str(row.get("prompt", ""))))
    check_text(question.problem.question, f"{where}: its prompt")
    if not question.problem.question.strip():
        raise DataError(f"{where}: asks nothing: give it the text prompt")
    return question


def fair_sample(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, the same ones each time; the first ones may be easier, where a split is in order."""
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i] for i in sorted(random.Random(SAMPLE_SEED).sample(range(len(questions)), limit))]


def report(
    config: RunConfig, models: dict[str, str], questions: list[Question], answers: dict[str, Answers], k: int
) -> dict:
    """What is written to `out`, but for how many prompts were left out."""
    inference = config.inference_model
    result = {name: {"model": models[name]} | its.metrics() for name, its in answers.items()}
    result |= improvements(*answers.values()) if len(answers) == 2 else {}
    result |= {"k": k, "temperature": inference.temperature, "max_tokens": inference.max_tokens, "seed": config.seed}
    result["problems"] = [
        {"prompt": question.problem.question, "answer": question.problem.answer if question.graded else None}
        | {name: its.row(i) for name, its in answers.items()}
        for i, question in enumerate(questions)
    ]
    return result


def evaluate(typed: list[str]) -> dict:
    """Do what the arguments KEY=VALUE ask for: write the report, print the table, and return the report."""
    arguments, overrides = split_arguments(typed, dict.fromkeys(OWN, False), SECTIONS)
    k, limit = whole_number(arguments, "k", K, 0), whole_number(arguments, "max_samples", None, 1)
    config, models, out = configure(arguments, overrides)
    env, faults = config.env, []
    if "prompts" in arguments:
        asked, faults = read_prompts(Path(arguments["prompts"]), env.dataset)
    for fault in faults:
        print(fault, file=sys.stderr)
    for model in models.values():
        check_model(model)
        check_files(model)
    if env.reward_fn:
        load_reward_function(env.reward_fn)  # so that what is missing is said before anything starts
    task = tasks.without_data(env) if "prompts" in arguments else tasks.load(env)
    if "prompts" not in arguments:
        asked = [Question(problem) for problem in task.problems("test")[: env.test_size]]
    asked = fair_sample(asked, limit)
    from grpo.measure import ask  # here: it imports torch, and what is wrong so far is answered before

    with grading_pool(env) as pool:
        questions, answers = ask(config, models, asked, task, pool, k)
    result = report(config, models, questions, answers, k)
    result |= {"too_long": len(asked) - len(questions), "unreadable_lines": len(faults)}
    write_whole(out, json.dumps(result, indent=2) + "\n")
    print(f"\n{table({name: result[name] for name in models}, result, k)}\n")
    num_graded = sum(question.graded for question in questions)
    print(f"{len(questions)} prompts, {num_graded} of them graded, in {out}; intervals are of 95%, over problems")
    if result["too_long"]:
        print(f"{result['too_long']} prompts are longer than env.max_prompt_length ({env.max_prompt_length}) and left out")
    if faults:
        print(f"{len(faults)} lines could not be used")
    for name, its in answers.items():
        if its.without_verdict:
            lost, note = len(its.without_verdict), its.without_verdict[0].note
            print(f"{name}: {lost} responses have no verdict and count as not right, the first for this: {note}")
    return result


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        evaluate(sys.argv[1:])


if __name__ == "__main__":
    run_tool(main)
