"""What does the pipeline cost over its bare parts? A whole synchronous step against raw vLLM and plain PyTorch.

    python -m benchmarks.step --model builtin      # writes benchmarks/results/step_builtin.json
    python -m benchmarks.step --model random50m

One process tree, the same cores, in turns: a step of the pipeline (collect, grade, score, advantages, buffer, optimise,
push, log), then the bare parts on that step's prompts and tokens while the pipeline idles. The learning rate is so small
that the weights stay, so both sides sample from the same model; their numbers of tokens are reported. The ratio is the
pipeline's seconds over the sum of the bare parts'.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import ray
import torch

from benchmarks.bare import COMPUTING, Part, TrainSettings, serve_generation, serve_training
from benchmarks.report import save, spread, table
from benchmarks.subjects import NAMES, configuration, model_path
from grpo.config import RunConfig

REPEATS = {"builtin": (4, 15), "random50m": (1, 2)}  # warm-up steps, measured steps
SETTLE_S = 0.5  # idle OpenMP threads spin for up to 0.2 s
PHASES = ("generate", "reward", "reference", "train", "push", "wait")
KEPT = ("tokens", "prompt_length", "response_length", "response_mask", "inference_log_probs", "advantage")


def pipeline_step(run, collections: Iterator) -> tuple[dict[str, float], list]:
    """One turn of grpo_sync.py's loop: seconds, in all and a phase, and the batches that were trained on."""
    before, batches = dict(run.clock.total), []
    start = time.perf_counter()
    rollouts = next(collections)
    for batch in run.batches(rollouts):
        run.step(batch)
        batches.append(batch)
    run.push_weights()
    seconds = {"total": time.perf_counter() - start}
    seconds |= {phase: run.clock.total[phase] - before[phase] for phase in PHASES}
    seconds["remainder"] = seconds["total"] - sum(seconds[phase] for phase in PHASES)
    return seconds, batches


def actor_state(actor) -> dict:
    """How an actor's process computes."""

    def look(instance) -> dict:
        # As the process was started: libraries change os.environ later, to no effect on themselves.
        started_with = dict(item.split("=", 1) for item in Path("/proc/self/environ").read_text().split("\0") if "=" in item)
        return {
            "environment": {name: value for name, value in started_with.items() if name.startswith(COMPUTING)},
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "spec": getattr(instance, "spec", None),
        }

    return ray.get(actor.__ray_call__.remote(look))


def start_bare(run, closing: ExitStack) -> tuple[Part, Part, dict]:
    """The bare processes, set up like the pipeline's, and what was copied from where."""
    config: RunConfig = run.config
    engine, trainer = actor_state(run.engines.actors[0]), actor_state(run.trainer.actors[0])
    settings = TrainSettings(
        model=model_path(config),
        attn_implementation=config.model.attn_implementation,
        matmul_precision=trainer["matmul_precision"],
        uses_reference=config.uses_reference,
        num_micro_batches=config.train.gradient_accumulation_steps,
        temperature=config.inference_model.temperature,
        clip_low=config.objective.clip_low,
        clip_high=config.objective.clip_high,
        kl_to_ref_coeff=config.train.kl_to_ref_coeff,
        lr=config.optimizer.lr,
        betas=tuple(config.optimizer.betas),
        clip_grad_norm=config.optimizer.clip_grad_norm,
    )
    generation = Part(serve_generation, engine["environment"], engine["spec"])
    closing.callback(generation.close)
    training = Part(serve_training, trainer["environment"], settings)
    closing.callback(training.close)
    return generation, training, {"engine": engine, "trainer": trainer}


def bare_step(generation: Part, training: Part, config: RunConfig, batches: list) -> dict:
    """The bare parts' work for one step of the pipeline; every batch is a whole optimiser step."""
    size = config.env.repeats
    prompts = []
    for batch in batches:
        rows = zip(batch["tokens"][::size].tolist(), batch["prompt_length"][::size].tolist(), strict=True)
        prompts += [tokens[:length] for tokens, length in rows]
    time.sleep(SETTLE_S)
    inference = config.inference_model
    question = {"group_size": size, "max_tokens": inference.max_tokens, "temperature": inference.temperature}
    answer = generation.ask(question | {"prompts": prompts})
    seconds = {"generate": answer["seconds"], "reference": 0.0, "train": 0.0, "push": 0.0}
    differences = []
    for batch in batches:
        time.sleep(SETTLE_S)
        kept = (*KEPT, "reference_log_probs") if config.uses_reference else KEPT
        arrays = {name: batch[name].numpy() for name in kept}
        trained = training.ask(arrays)
        for part, value in trained["seconds"].items():
            seconds[part] += value
        if config.uses_reference:
            differences.append(float(abs(trained["reference_log_probs"] - arrays["reference_log_probs"]).max()))
    seconds["total"] = sum(seconds.values())
    return {
        "seconds": seconds,
        "tokens": answer["tokens"],
        "grad_norm": trained["grad_norm"],
        "reference_log_probs_difference": max(differences, default=0.0),
    }


def measure(subject: str, warm_up: int, repeats: int, overrides: list[str]) -> tuple[RunConfig, dict]:
    config = configuration(subject, warm_up + repeats, "optimizer.lr=1e-12", *overrides)
    from grpo_utils import build

    ours, bare, tokens = [], [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        with build(config, Path(folder)) as run:
            generation, training, settings = start_bare(run, closing)
            collections = run.collections()
            for i in range(warm_up + repeats):
                time.sleep(SETTLE_S)
                seconds, batches = pipeline_step(run, collections)
                if i == 0:
                    print(f"first step {seconds['total']:.2f} s", flush=True)
                other = bare_step(generation, training, config, batches)
                ours.append(seconds)
                bare.append(other)
                tokens.append(int(sum(batch["response_length"].sum() for batch in batches)))
        metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    norms = [line["train/grad_norm"] for line in metrics][:: config.steps_per_collection]
    agreement = {
        "reference_log_probs_max_difference": max(step["reference_log_probs_difference"] for step in bare),
        "grad_norm_max_relative_difference": max(
            abs(step["grad_norm"] / norm - 1) for step, norm in zip(bare, norms, strict=True) if norm > 0
        )
        if config.steps_per_collection == 1
        else None,
    }
    ours, bare, tokens = ours[warm_up:], bare[warm_up:], tokens[warm_up:]
    for state in settings.values():
        state["spec"] = repr(state["spec"])
    return config, {
        "ratio": spread([a["total"] / b["seconds"]["total"] for a, b in zip(ours, bare, strict=True)]),
        "samples_per_s": spread([config.train.dialog_turns_per_batch / step["total"] for step in ours]),
        "pipeline_s": {name: spread([step[name] for step in ours]) for name in ours[0]},
        "bare_s": {name: spread([step["seconds"][name] for step in bare]) for name in bare[0]["seconds"]},
        "tokens": {"pipeline": tokens, "bare": [step["tokens"] for step in bare]},
        "agreement": agreement,
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="builtin")
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--name", help="of the result file, instead of step_MODEL")
    parser.add_argument("overrides", nargs="*", help="configuration keys, key=value")
    arguments = parser.parse_args()
    warm_up, repeats = REPEATS[arguments.model]
    warm_up = warm_up if arguments.warm_up is None else arguments.warm_up
    repeats = arguments.repeats or repeats
    config, results = measure(arguments.model, warm_up, repeats, arguments.overrides)
    save(arguments.name or f"step_{arguments.model}", config, results)
    ours, bare = results["pipeline_s"], results["bare_s"]
    rows = []
    for name in (*PHASES, "remainder", "total"):
        other = bare[name]["median"] if name in bare else 0.0
        rows.append([name, ours[name]["median"], other, ours[name]["median"] / other if other else "-"])
    table(["seconds a step", "pipeline", "bare parts", "ratio"], rows)
    samples_per_s = results["samples_per_s"]["median"]
    print(
        f"ratio {results['ratio']['median']:.3f} (median of {repeats}), {samples_per_s:.3g} responses/s; "
        f"tokens {median(results['tokens']['pipeline']):.0f} and {median(results['tokens']['bare']):.0f}; "
        f"gradients agree to {results['agreement']['grad_norm_max_relative_difference']}"
    )


if __name__ == "__main__":
    main()
