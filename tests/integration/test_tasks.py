"""Every task from its data to trained weights, on problems that the model at hand can sometimes solve.

tests/integration/data holds 16 problems a task, of which 12 train; arithmetic makes its own. The built-in model
answers gsm8k's and, in its own way, ifeval's as it is. For math its tokenizer spells the answer tags as a box; for countdown
it is first shown expressions of a problem's numbers, with an operator that is right in one of three.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.builtin import save
from grpo.models import load_tokenizer
from grpo.rewards import OUTCOMES
from grpo.tasks.countdown import row_problem

from .conftest import Finished

DATA = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("GRPO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL_RUN = (
    "inference_model.backend=transformers",
    "env.validation_size=2",
    "env.test_size=2",
    "logging.rollout_tokens=false",
)
TEACHING_STEPS = 80
SLOW = pytest.mark.slow


def in_a_box(model: str, path: Path) -> Path:
    """A copy of the model whose tokens for <answer> and </answer> are spelled \\boxed{ and }."""
    shutil.copytree(model, path)
    text = (path / "tokenizer.json").read_text()
    spelled = {"<answer>": "\\boxed{", "</answer>": "}"}
    for tag, spelling in spelled.items():
        assert json.dumps(tag) in text
        text = text.replace(json.dumps(tag), json.dumps(spelling))
    (path / "tokenizer.json").write_text(text)
    return path


def shown_expressions(model: str, path: Path) -> Path:
    """A copy of the model that answers a countdown problem of the file with a + b, a - b or a * b, each as likely."""
    rows = [json.loads(line) for line in (DATA / "countdown.jsonl").read_text().splitlines()]
    torch.set_num_threads(1)  # a model this small is slower with more, most of all where other work shares the cores
    tokenizer, policy = load_tokenizer(model), AutoModelForCausalLM.from_pretrained(model)
    rng, optimizer = random.Random(0), torch.optim.AdamW(policy.parameters(), lr=2e-3)
    for step in range(TEACHING_STEPS):
        encoded = []
        for row in rows:
            problem, sign = row_problem(row, "countdown.jsonl"), rng.choice("+-*")
            a, b = json.loads(problem.answer)["numbers"]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=False
            )
            response = tokenizer(f"<answer>{max(a, b)}{sign}{min(a, b)}</answer>")["input_ids"]
            encoded.append((prompt, [*response, tokenizer.eos_token_id]))
        width = max(len(prompt) + len(response) for prompt, response in encoded)
        tokens, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        for i, (prompt, response) in enumerate(encoded):
            end = len(prompt) + len(response)
            tokens[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = tokens[i, len(prompt) : end]
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / TEACHING_STEPS)
        optimizer.zero_grad()
        policy(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    save(policy, tokenizer, path)
    return path


def moved(run: Finished, model: str | Path) -> bool:
    """Whether the run's model is another than the one it started from, and finite."""
    before, after = load_file(Path(model) / "model.safetensors"), run.weights
    assert before.keys() == after.keys() and all(tensor.isfinite().all() for tensor in after.values())
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "dataset", ["gsm8k", "ifeval", *(pytest.param(name, marks=SLOW) for name in ("math", "countdown", "arithmetic"))]
)
def test_each_task_is_solved_now_and_then_and_trained_on(run_sync, model_path, tmp_path, dataset):
    model = Path(model_path)
    overrides = [f"env.dataset={dataset}", f"env.data={DATA / dataset}.jsonl", "env.max_prompt_length=192"]
    if dataset == "math":
        model = in_a_box(model_path, tmp_path / "model")
    if dataset == "countdown":
        model = shown_expressions(model_path, tmp_path / "model")
    if dataset == "arithmetic":
        overrides = ["env.max_samples=12"]
    run = run_sync(*SMALL_RUN, *overrides, f"model.name={model}")

    outcomes = [line["outcome"] for line in run.rollouts]
    assert len(outcomes) == 192 and {"correct", "wrong"} <= set(outcomes) <= {"correct", "wrong", "unparseable"}
    term = "all" if dataset == "ifeval" else "exact"
    assert all((line["terms"][term] > 0) == (line["outcome"] == "correct") for line in run.rollouts)
    assert len({line["prompt"] for line in run.rollouts}) == 12
    assert any(line["advantage"] > 0 for line in run.rollouts if line["outcome"] == "correct")
    assert all(row["train/grad_norm"] > 0 for row in run.metrics)
    assert moved(run, model)
    assert run.summary["eval"]["after"]["n"] == 2


@pytest.mark.parametrize(
    "name", ["gsm8k_test", *(pytest.param(name, marks=SLOW) for name in ("gsm8k_train", "ifeval_input_data"))]
)
def test_the_published_files_train_as_they_are(run_sync, model_path, capfd, name):
    """The built-in model reads few of their characters and solves next to nothing: what is to hold is the way there."""
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {SHARED}: set GRPO_SHARED_DATA")
    task = ["env.dataset=ifeval"] if "ifeval" in name else ["env.dataset=gsm8k", "env.reward_shape=hybrid"]
    run = run_sync(
        *SMALL_RUN, *task, f"env.data={path}", "env.max_prompt_length=224", "env.test_size=20", "env.validation_size=20"
    )

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    published = {row.get("question", row.get("prompt")) for row in rows}
    asked = {line["prompt"] for line in run.rollouts}
    assert len(asked) == 24 and asked <= published
    assert {line["outcome"] for line in run.rollouts} <= set(OUTCOMES) - {"timed_out", "grader_error"}
    assert run.metrics[0]["train/grad_norm"] > 0  # two steps on, every response may earn the same
    assert moved(run, model_path)
    assert "prompts of the train split are longer than env.max_prompt_length and left out" in capfd.readouterr().out
