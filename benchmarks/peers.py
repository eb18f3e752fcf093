"""How fast is the pipeline beside TRL's GRPOTrainer? Responses a second, collected and trained on, on the same cores.

    python -m benchmarks.peers --model builtin     # writes benchmarks/results/peers_builtin.json
    python -m benchmarks.peers --model random50m
    python -m benchmarks.peers --model builtin --name peers_builtin_medium model.matmul_precision=medium

Same model, prompts, rewards, group size, batch, token budget, temperature and learning rate; no reference on either side;
float32 on both. TRL generates with transformers, since its vLLM modes need a GPU, at the best of the settings tried here
for a CPU. The pipeline runs before TRL and after it, synchronously; and once asynchronously, with one engine and one trainer
that share the cores, from the first prompt to the last optimiser step.

TRL has an environment of its own, .venv-peers, from benchmarks/requirements_peers.txt (make bench sets it up).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.peer_trl import arithmetic_reward
from benchmarks.report import save, spread, table
from benchmarks.step import pipeline_step
from benchmarks.subjects import NAMES, ROOT, configuration, model_path
from grpo import tasks
from grpo.config import RunConfig

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
STEPS = {"builtin": {"ours": (4, 12), "trl": (3, 12)}, "random50m": {"ours": (1, 1), "trl": (0, 1)}}  # warm-up, measured
ASYNC_STEPS = {"builtin": 48, "random50m": 6}
TRIAL = (3, 5)  # of each variant, where there are several
VARIANTS = {
    "builtin": [
        {"attention": "eager", "cache": "static", "micro_batch": 128},
        {"attention": "eager", "cache": None, "micro_batch": 128},
        {"attention": "eager", "cache": "static", "micro_batch": 512},
    ],
    "random50m": [{"attention": "eager", "cache": "static", "micro_batch": 16}],
}


def ours(config: RunConfig, warm_up: int, task: tasks.Task) -> dict:
    """Seconds and tokens of every step after `warm_up`."""
    from grpo_utils import build

    seconds, tokens = [], []
    with tempfile.TemporaryDirectory() as folder, build(config, Path(folder)) as run:
        collections = run.collections()
        for _ in range(config.num_collections):
            step, batches = pipeline_step(run, collections)
            seconds.append(step["total"])
            tokens.append(int(sum(batch["response_length"].sum() for batch in batches)))
        if config.env.reward_fn is None:
            check_rewards(task, batches)
    return {"seconds": seconds[warm_up:], "tokens": tokens[warm_up:]}


def ours_async(config: RunConfig, task: tasks.Task) -> dict:
    """Seconds of a whole run, when each of its steps ended, and the tokens that it was trained on."""
    from grpo_utils import build

    ends, tokens = [], []
    with tempfile.TemporaryDirectory() as folder, build(config, Path(folder)) as run:
        start = time.perf_counter()
        for batch in run.batches():
            run.step(batch)
            if run.push_is_due:
                run.push_weights()
            ends.append(round(time.perf_counter() - start, 4))
            tokens.append(int(batch["response_length"].sum()))
    if config.env.reward_fn is None:
        check_rewards(task, [batch])
    return {"seconds": ends[-1], "step_ends_s": ends, "tokens": tokens}


def check_rewards(task: tasks.Task, batches: list) -> None:
    """TRL's side must give every response the reward that it has here."""
    for batch in batches:
        for record in batch["records"]:
            problem = tasks.Problem(record.prompt, record.answer)
            for response in record.responses:
                here, there = task.grade(problem, response).reward, arithmetic_reward(response, record.answer)
                assert abs(here - there) < 1e-9, f"{response!r} has the reward {here} here and {there} at TRL"


def trl(request: dict) -> dict:
    """One run of TRL in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(request))
        command = [str(PYTHON), "-m", "benchmarks.peer_trl", str(question), str(answer)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"TRL ended with code {ended.returncode}:\n{ended.stderr[-4000:]}")
        return json.loads(answer.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="builtin")
    parser.add_argument("--name", help="of the result; peers_MODEL by default")
    parser.add_argument("--no-trials", action="store_true", help="only the first variant of TRL's settings")
    parser.add_argument("overrides", nargs="*", help="configuration keys of the pipeline, key=value")
    arguments = parser.parse_args()
    if not PYTHON.is_file():
        sys.exit(f"{PYTHON.relative_to(ROOT)} is missing: make bench, or make .venv-peers/installed, sets it up")
    warm_up, steps = STEPS[arguments.model]["ours"]
    engines = {"builtin": 2, "random50m": 1}[arguments.model]  # the faster of one and two on two cores
    chosen = ["train.kl_to_ref_coeff=0", f"inference_model.num_devices={engines}", *arguments.overrides]
    config = configuration(arguments.model, warm_up + steps, *chosen)
    task = tasks.load(config.env)
    problems = task.problems("train")
    request = {
        "model": model_path(config),
        "prompts": [problem.question for problem in problems],
        "answers": [problem.answer for problem in problems],
        "reward": "arithmetic" if config.env.reward_fn is None else "hashed",
        "matmul_precision": config.model.matmul_precision,
        "group_size": config.env.repeats,
        "responses": config.train.dialog_turns_per_batch,
        "max_tokens": config.inference_model.max_tokens,
        "lr": config.optimizer.lr,
    }
    variants = VARIANTS[arguments.model][: 1 if arguments.no_trials else None]
    trials = []
    if len(variants) > 1:
        for variant in variants:
            answer = trl(request | variant | {"warm_up": TRIAL[0], "steps": TRIAL[1]})
            trials.append(variant | {"seconds": spread(answer["seconds"])})
            print(f"TRL with {variant}: {trials[-1]['seconds']['median']:.3f} s a step", flush=True)
        variants = [min(zip(trials, variants, strict=True), key=lambda pair: pair[0]["seconds"]["median"])[1]]
    before = ours(config, warm_up, task)
    time.sleep(2)
    trl_warm_up, trl_steps = STEPS[arguments.model]["trl"]
    theirs = trl(request | variants[0] | {"warm_up": trl_warm_up, "steps": trl_steps})
    after = ours(config, warm_up, task)
    async_steps = ASYNC_STEPS[arguments.model]
    keys = ["train.kl_to_ref_coeff=0", "mode=async", *arguments.overrides]
    beside = ours_async(configuration(arguments.model, async_steps, *keys), task)

    responses = config.train.dialog_turns_per_batch
    here, there = median(before["seconds"] + after["seconds"]), median(theirs["seconds"])
    results = {
        "ratio": round(there / here, 4),
        "ratio_before_and_after": [round(there / median(side["seconds"]), 4) for side in (before, after)],
        "ratio_asynchronous": round(there / (beside["seconds"] / async_steps), 4),
        "samples_per_s": {
            "pipeline": round(responses / here, 2),
            "pipeline, asynchronous": round(responses * async_steps / beside["seconds"], 2),
            "trl": round(responses / there, 2),
        },
        "pipeline_s": {"before": spread(before["seconds"]), "after": spread(after["seconds"])},
        "asynchronous": beside | {"steps": async_steps},
        "trl_s": spread(theirs["seconds"]),
        "tokens_a_step": {"pipeline": before["tokens"] + after["tokens"], "trl": theirs["tokens"]},
        "trl": {
            "versions": theirs["versions"],
            "threads": theirs["threads"],
            "settings": variants[0] | {k: v for k, v in request.items() if k not in ("prompts", "answers")},
            "trials": trials,
        },
    }
    save(arguments.name or f"peers_{arguments.model}", config, results)
    table(
        ["", "s a step", "responses/s", "tokens a step"],
        [
            ["pipeline", here, responses / here, median(results["tokens_a_step"]["pipeline"])],
            [
                "pipeline, asynchronous",
                beside["seconds"] / async_steps,
                results["samples_per_s"]["pipeline, asynchronous"],
                median(beside["tokens"]),
            ],
            [f"TRL {theirs['versions']['trl']}", there, responses / there, median(theirs["tokens"])],
        ],
    )
    print(f"ratio {results['ratio']:.2f}, asynchronous {results['ratio_asynchronous']:.2f}")


if __name__ == "__main__":
    main()
