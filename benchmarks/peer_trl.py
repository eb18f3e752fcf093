"""TRL's GRPOTrainer on the prompts, rewards and model of benchmarks/peers.py, which runs this in an environment of its own.

    .venv-peers/bin/python -m benchmarks.peer_trl REQUEST.json ANSWER.json

The request names the model's directory, the prompts with their answers, and the settings; the answer holds seconds a step.
Nothing of the project is imported but the hashed rewards, since none of its libraries are installed there.
"""

import itertools
import json
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ANSWER = re.compile(r"<answer>\s*([-−]?\d{1,18})\s*</answer>")


def arithmetic_reward(response: str, answer: str) -> float:
    """What grpo.tasks.arithmetic gives; benchmarks/peers.py checks that it is the same."""
    found = ANSWER.findall(response)
    if len(found) != 1 or response.count("<answer>") != 1:
        return 0.0
    parsed, expected = int(found[0].replace("−", "-")), int(answer)
    return 0.2 + 0.2 * (abs(parsed - expected) <= 1) + 0.6 * (parsed == expected)


def warm_up(model, tokenizer) -> None:
    """A first small generation and a first backward pass, where a whole warm-up step would take minutes."""
    tokens = tokenizer("What is (1 + 2) * 3?", return_tensors="pt")["input_ids"].repeat(4, 1)
    model.generate(input_ids=tokens, max_new_tokens=8, do_sample=True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()


def main(request: dict) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.hashed_rewards import hashed

    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(request["matmul_precision"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation=request["attention"]
    )
    tokens = []

    def reward(completions, answer, completion_ids, **kwargs) -> list[float]:
        tokens.append(sum(len(ids) for ids in completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        if request["reward"] == "hashed":
            return hashed(answer, texts, answer)
        return [arithmetic_reward(text, expected) for text, expected in zip(texts, answer, strict=True)]

    rows = zip(request["prompts"], request["answers"], strict=True)
    data = [{"prompt": [{"role": "user", "content": prompt}], "answer": answer} for prompt, answer in rows]
    num_micro_batches = request["responses"] // request["micro_batch"]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            num_generations=request["group_size"],
            per_device_train_batch_size=request["micro_batch"],
            gradient_accumulation_steps=num_micro_batches,
            steps_per_generation=num_micro_batches,
            max_completion_length=request["max_tokens"],
            temperature=1.0,
            cache_implementation=request["cache"],
            learning_rate=request["lr"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            loss_type="grpo",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            max_steps=request["warm_up"] + request["steps"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        ends = []

        class Times(TrainerCallback):
            def on_train_begin(self, *arguments, **kwargs) -> None:
                ends.append(time.perf_counter())

            def on_step_end(self, *arguments, **kwargs) -> None:
                ends.append(time.perf_counter())

        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[Times()],
        )
        if request["warm_up"] == 0:
            warm_up(model, tokenizer)
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "seconds": seconds[request["warm_up"] :],
        "tokens": tokens[request["warm_up"] :],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
