"""Does GRPO learn, and from the rewards? Three seeds of grpo_arithmetic, a control, and the supervised ceiling.

    python -m benchmarks.learning              # writes benchmarks/results/learning.json

The runs are grpo_sync.py as users start it. The control is the same command with rewards shuffled between responses. The
ceiling is the built-in recipe trained on right demonstrations alone, on the same warm-up prompts.
"""

import argparse
import json
from dataclasses import replace
from datetime import date

import torch

from benchmarks.machine import describe
from benchmarks.training import RESULTS, mean_interval, train
from grpo import builtin
from grpo.config_sections import EnvConfig
from grpo.intervals import wilson
from grpo.tasks import load
from grpo.tasks.arithmetic import split_expressions


def interval(share: float, n: int) -> list[float]:
    return [round(end, 4) for end in wilson(share, n)]


def ceiling() -> dict:
    """Greedy test accuracy of the built-in recipe when every demonstration is right."""
    recipe = replace(builtin.Recipe(), right_share=1.0)
    tokenizer = builtin.make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = builtin.Qwen2ForCausalLM(builtin.make_config(recipe, tokenizer)).float()
    task = load(EnvConfig(dataset="arithmetic"))
    builtin.supervise(model, tokenizer, split_expressions()["warm_up"], recipe)
    problems, right = task.problems("test"), 0
    tokenizer.padding_side = "left"
    for first in range(0, len(problems), 250):
        part = problems[first : first + 250]
        messages = [[{"role": "user", "content": problem.question}] for problem in part]
        texts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(task.grade(problem, text).correct for problem, text in zip(part, answers, strict=True))
    share = right / len(problems)
    return {"accuracy": share, "n": len(problems), "interval_95": interval(share, len(problems))}


def summarise(results: dict) -> dict:
    """Mean test accuracy after training over the seeds with Student's 95% interval, and what the control gained."""
    mean, half = mean_interval([run["eval"]["after"]["accuracy"] for run in results["runs"]])
    control = results["control_shuffled_rewards"]["eval"]
    return {
        "accuracy_after_mean": round(mean, 4),
        "accuracy_after_interval_95": [round(mean - half, 4), round(mean + half, 4)],
        "training_s_max": max(run["wall_s"] for run in results["runs"]),
        "control_gain": round(control["after"]["accuracy"] - control["before"]["accuracy"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results = {"date": date.today().isoformat(), "machine": describe(), "runs": []}
    for seed in arguments.seeds:
        results["runs"].append({"seed": seed} | train("grpo_sync.py", f"seed={seed}"))
    shuffled = "env.reward_fn=benchmarks/shuffled_rewards.py:shuffled"
    results["control_shuffled_rewards"] = train("grpo_sync.py", "seed=0", shuffled)
    results["ceiling_supervised_right_demonstrations"] = ceiling()
    results["summary"] = summarise(results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "learning.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
