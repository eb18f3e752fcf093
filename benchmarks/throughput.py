"""Does the model of the pipeline's time (grpo/throughput.py) hold? Fitted on some configurations, checked on others.

    python -m benchmarks.throughput          # writes benchmarks/results/throughput.json and grpo/throughput.json
    python -m benchmarks.throughput --fit    # fits and checks again what is in benchmarks/results/throughput.json
    python -m benchmarks.throughput --plan   # prints the table of docs/scaling.md; measures nothing

Synchronous collections of four models at several sizes, and asynchronous runs, each role as a user's run has it. A phase's
costs are fitted by non-negative least squares on the relative errors of the configurations that are marked as fitted; one
model is in none of them. The answer is the relative error of whole collections on the others.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import exp, fsum, log
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import nnls

from benchmarks.machine import describe
from benchmarks.report import RESULTS, save, table
from benchmarks.step import PHASES as TIMED
from benchmarks.step import pipeline_step
from benchmarks.subjects import CACHE, ROOT, random_model
from grpo import tasks
from grpo.collect import PromptEnv, PromptStream
from grpo.config import RunConfig
from grpo.launch import compose
from grpo.models import num_parameters
from grpo.plan import find_architecture
from grpo.resume import write_whole
from grpo.throughput import (
    DATA_SHEETS,
    FITTED,
    PHASES,
    Amounts,
    Costs,
    Overlap,
    Shape,
    Work,
    amounts,
    collection_s,
    data_sheet_costs,
    predict,
    shape_of,
    work_of,
)

# Hidden size, layers, words. The built-in model ends its responses itself, the random ones at their budget.
MODELS = {
    "builtin": None,
    "random3m": (192, 6, 4096),
    "random8m": (256, 8, 8192),
    "random16m": (384, 8, 8192),
    "random50m": (512, 12, 16_384),
}
WARM_UP, FEWEST, MOST = 1, 2, 6  # collections; between the last two, as many as take
MEASURED_S = 4.0
ASYNC_STEPS = 8
LONGEST_PROMPT = 160  # tokens; that of two examples is 145


@dataclass(frozen=True)
class Case:
    """A configuration: prompts x 8 responses of at most `max_tokens`, with `few_shot` examples before each prompt."""

    model: str
    prompts: int
    max_tokens: int
    few_shot: int = 0
    micro_batches: int = 4
    mode: str = "sync"
    reference: bool = True
    is_fitted: bool = True

    @property
    def overrides(self) -> list[str]:
        responses = self.prompts * 8
        chosen = [
            f"env.num_envs={self.prompts}",
            f"env.few_shot={self.few_shot}",
            f"env.max_prompt_length={LONGEST_PROMPT}",
            f"inference_model.max_tokens={self.max_tokens}",
            f"train.dialog_turns_per_batch={responses}",
            f"train.optim_batch_size={responses}",
            f"train.gradient_accumulation_steps={self.micro_batches}",
            f"train.total_dialog_turns={responses * (ASYNC_STEPS if self.mode == 'async' else 64)}",
            f"model.cache_dir={CACHE}",
            f"mode={self.mode}",
            "train.eval_frequency=0",
            "train.checkpoint_frequency=0",
            "train.probe_frequency=0",
            "logging.progress=false",
            "env.test_size=8",
            "env.validation_size=8",
            "optimizer.lr=1e-12",
            f"train.kl_to_ref_coeff={0.001 if self.reference else 0}",
            "train.share_prompts=false",  # as all that is kept was measured
            f"env.reward_fn={ROOT}/benchmarks/hashed_rewards.py:hashed",
        ]
        if MODELS[self.model]:
            chosen.append(f"model.name={random_model(self.model, *MODELS[self.model])}")
        return chosen

    def compose(self) -> RunConfig:
        return compose("grpo_arithmetic", self.overrides)


CASES = (
    Case("builtin", 64, 24),
    Case("builtin", 16, 24),
    Case("builtin", 128, 24),
    Case("builtin", 32, 24, few_shot=2),
    Case("random3m", 32, 16),
    Case("random3m", 8, 96),
    Case("random3m", 32, 48),
    Case("random3m", 16, 32, few_shot=1),
    Case("random16m", 8, 48),
    Case("random16m", 16, 24),
    Case("random50m", 2, 48),
    Case("random50m", 2, 24, few_shot=2),
    Case("random50m", 4, 32),
    Case("builtin", 64, 24, mode="async", reference=False),
    Case("random3m", 8, 48, mode="async", reference=False),
    Case("random16m", 4, 32, mode="async"),
    Case("random50m", 2, 24, mode="async", reference=False),
    # Written down before any of them was measured.
    Case("builtin", 48, 24, is_fitted=False),
    Case("builtin", 24, 24, few_shot=1, is_fitted=False),
    Case("random3m", 24, 64, is_fitted=False),
    Case("random8m", 16, 32, is_fitted=False),
    Case("random8m", 8, 64, few_shot=1, is_fitted=False),
    Case("random16m", 12, 32, few_shot=1, is_fitted=False),
    Case("random50m", 3, 40, is_fitted=False),
    Case("random3m", 16, 32, mode="async", is_fitted=False),
    Case("random8m", 8, 32, mode="async", reference=False, is_fitted=False),
    Case("random50m", 2, 32, mode="async", is_fitted=False),
)


def measure_sync(cases: list[Case]) -> Iterator[dict]:
    """Seconds a phase of each of `cases`, which are of one model: the actors are started once, for the largest of them."""
    import grpo_utils

    longest, most = max(case.max_tokens for case in cases), max(case.prompts for case in cases)
    config = replace(cases[0], prompts=most, max_tokens=longest).compose()
    with tempfile.TemporaryDirectory() as folder, grpo_utils.build(config, Path(folder)) as run:
        for case in cases:
            config = case.compose()
            task, size = tasks.load(config.env), config.groups_per_collection
            data = grpo_utils.load_data(config, task, run.tokenizer)
            stream, shape = PromptStream(len(data["train"].problems), config.seed), (size, config.env.repeats)
            env = PromptEnv(shape, run.grading, data["train"], stream, run.tokenizer, run.clock)
            collector = grpo_utils.make_collector(config, env, run.engines, run.collector.postproc.reference)
            run.trainer.num_micro_batches = case.micro_batches
            its = replace(
                run,
                config=config,
                data=data,
                stream=stream,
                collector=collector,
                replay_buffer=grpo_utils.make_replay_buffer(size, config.groups_per_batch),
            )
            collections, turns = its.collections(), []
            while len(turns) < WARM_UP + FEWEST or (
                len(turns) < WARM_UP + MOST and fsum(turn["total"] for turn in turns[WARM_UP:]) < MEASURED_S
            ):
                seconds, batches = pipeline_step(its, collections)
                turns.append(seconds | {"prompt": _mean(batches, "prompt"), "response": _mean(batches, "response")})
            turns = turns[WARM_UP:]
            seconds = {phase: median(turn[phase] for turn in turns) for phase in TIMED if phase != "wait"}
            total = median(turn["total"] for turn in turns)
            seconds["rest"] = median(turn["total"] - fsum(turn[phase] for phase in seconds) for turn in turns)
            lengths = {name: fsum(turn[name] for turn in turns) / len(turns) for name in ("prompt", "response")}
            yield asdict(case) | {"seconds": seconds, "total": total, "lengths": lengths}


def _mean(batches: list, which: str) -> float:
    lengths = np.concatenate([batch[f"{which}_length"].numpy() for batch in batches])
    return float(lengths.mean())


def measure_async(case: Case) -> dict:
    """Seconds a step of an asynchronous run between its second step and its last, and its sides' seconds a step."""
    import grpo_async
    import grpo_utils

    config = case.compose()
    with tempfile.TemporaryDirectory() as folder:
        with grpo_utils.build(config, Path(folder)) as run:
            run.begin()
            grpo_async.train(run)
            run.finish()
        found = json.loads((Path(folder) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        prompts = [len(prompt) for prompt in run.data["train"].prompts]
    seconds = {phase: found["phases_s"].get(phase, 0.0) / found["steps"] for phase in TIMED if phase != "wait"}
    total = (lines[-1]["time_s"] - lines[1]["time_s"]) / (len(lines) - 2)
    response = fsum(line["rollout/response_length_mean"] for line in lines) / len(lines)
    lengths = {"prompt": fsum(prompts) / len(prompts), "response": response}
    return asdict(case) | {"seconds": seconds, "total": total, "lengths": lengths}


def needed(row: dict) -> tuple[Amounts, Work]:
    """What the collection of a measured configuration has of each unit."""
    config = case_of(row).compose()
    work = work_of(config, row["lengths"]["prompt"], row["lengths"]["response"], on_cpu=True)
    model = find_architecture(config.model.name, "cpu")
    return amounts(shape_of(model, num_parameters(model)), work), work


def case_of(row: dict) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def fit_costs(rows: list[tuple[Amounts, dict[str, float]]]) -> Costs:
    """Seconds a unit, none below 0, for which the phases' relative errors are least, from (amounts, seconds a phase)."""
    costs = {}
    for phase in PHASES:
        units = sorted({unit for its, _ in rows for unit in its[phase]})
        there = [(its[phase], seconds[phase]) for its, seconds in rows if its[phase] and seconds[phase] > 0]
        if not there:
            costs[phase] = {}
            continue
        # Columns of about one size, so that the solver's tolerance suits all of them.
        scale = [max(its.get(unit, 0.0) for its, _ in there) or 1.0 for unit in units]
        matrix = np.array([[its.get(unit, 0.0) / of / s for unit, of in zip(units, scale, strict=True)] for its, s in there])
        found, _ = nnls(matrix, np.ones(len(there)))
        costs[phase] = {unit: float(x) / of for unit, x, of in zip(units, found, scale, strict=True) if x > 0}
    return costs


def fit_overlap(rows: list[dict], costs: Costs) -> Overlap:
    """From asynchronous runs: how much longer each side takes beside the other, and what a step costs besides."""
    ratios: dict[str, list[float]] = {"generate": [], "train": []}
    for row in rows:
        expected = predict(needed(row)[0], costs)
        for phase, its in ratios.items():
            its.append(log(row["seconds"][phase] / expected[phase]))
    factors = {phase: exp(fsum(its) / len(its)) for phase, its in ratios.items()}
    overlap = Overlap(**factors, cores=describe()["cores"])
    left = []
    for row in rows:
        its, work = needed(row)
        left.append((row["total"] - collection_s(predict(its, costs), "async", work.steps, overlap)) / work.steps)
    return replace(overlap, step_s=max(0.0, median(left)))


def check(rows: list[dict], costs: Costs, overlap: Overlap) -> list[dict]:
    """Each configuration with what the model says of it, and the relative error of its whole collection."""
    checked = []
    for row in rows:
        its, work = needed(row)
        expected = predict(its, costs)
        total = collection_s(expected, row["mode"], work.steps, overlap)
        checked.append(row | {"predicted": expected, "predicted_total": total, "error": total / row["total"] - 1})
    return checked


def errors(checked: list[dict], is_fitted: bool) -> dict[str, float]:
    found = [abs(row["error"]) for row in checked if row["is_fitted"] == is_fitted]
    return {"median": median(found), "largest": max(found), "configurations": len(found)}


def fit_and_check(rows: list[dict]) -> tuple[dict, list[dict]]:
    """What grpo/throughput.json keeps, and every configuration checked."""
    fitted = [row for row in rows if row["is_fitted"]]
    costs = fit_costs([(needed(row)[0], row["seconds"]) for row in fitted if row["mode"] == "sync"])
    overlap = fit_overlap([row for row in fitted if row["mode"] == "async"], costs)
    checked = check(rows, costs, overlap)
    machine = describe()
    unseen = errors(checked, False)
    kept = {
        "costs": costs,
        "overlap": asdict(overlap),
        "machine": f"{machine['cores']} cores of an {machine['processor']}",
        "median_error": round(unseen["median"], 4),
        "largest_error": round(unseen["largest"], 4),
    }
    return kept, checked


# The plan: a 7B model (Qwen2.5-7B's published architecture) on H100s, 64 responses a GPU in each collection.
PLANNED = Shape(7_615_616_512, layers=28, hidden=3584, vocabulary=152_064, kv_width=28_672, tied=False)
GPUS, RESPONSES_A_GPU = (8, 64, 512), 64
MICRO_BATCH_TOKENS = 16_384
GRADED_A_SECOND = 8_700  # gsm8k, a process: benchmarks/results/grading.json
DRIVER_S = 41e-6  # a response, of everything but the models' work: benchmarks/results/scaling.json
TRAINER_BYTES = 64e9  # of a GPU's 80e9, activations not counted


def planned_work(engines: int, ranks: int, references: int) -> Work:
    responses, prompt, response, steps = RESPONSES_A_GPU * (engines + ranks + references), 256, 1024, 4
    micro_batches = -(-responses * (prompt + response) // (steps * ranks * MICRO_BATCH_TOKENS))
    counts = {"engines": engines, "ranks": ranks, "references": references}
    return Work(
        responses=responses,
        group_size=16,
        prompt_tokens=prompt,
        response_tokens=response,
        steps=steps,
        epochs=1,
        micro_batches=micro_batches,
        pushes=1,
        in_flight=512,
        uses_reference=True,
        recomputes=True,
        weight_bytes=2,
        **counts,
    )


def plan(costs: Costs) -> None:
    """Print the table of docs/scaling.md: for each number of GPUs the quickest split in eighths, in either mode."""
    per_gpu = None
    names = " | ".join(f"{phase} s" for phase in PHASES)
    print(
        f"| GPUs | mode | engines + references + ranks | {names} | a collection s | responses/s | per GPU, over the first |"
    )
    print("| --- " * (len(PHASES) + 6) + "|")
    for gpus in GPUS:
        for mode in ("sync", "async"):
            found = []
            for engines in range(1, 7):
                for references in range(1, 8 - engines):
                    split = [part * gpus // 8 for part in (engines, 8 - engines - references, references)]
                    if PLANNED.parameters * 4 * (1 + 4 / split[1]) > TRAINER_BYTES:
                        continue
                    work = planned_work(*split)
                    seconds = predict(amounts(PLANNED, work), costs)
                    found.append((collection_s(seconds, mode, work.steps, Overlap()), split, seconds, work))
            total, (engines, ranks, references), seconds, work = min(found, key=lambda it: it[0])
            rate = work.responses / total
            per_gpu = per_gpu or rate / gpus
            phases = " | ".join(f"{its:.1f}" for its in seconds.values())
            split = f"{engines} + {references} + {ranks}"
            print(f"| {gpus} | {mode} | {split} | {phases} | {total:.0f} | {rate:.0f} | {rate / gpus / per_gpu:.2f} |")


def report(rows: list[dict], took: dict) -> None:
    """Fit, check, keep and print."""
    kept, checked = fit_and_check(rows)
    seen, unseen = errors(checked, True), errors(checked, False)
    save("throughput", CASES[0].compose(), {"fit": kept, "fitted": seen, "unseen": unseen, "configurations": checked} | took)
    write_whole(FITTED, json.dumps(kept, indent=2) + "\n")
    names = [f"{row['model']} {row['mode']} {row['prompts']}x8x{row['max_tokens']}" for row in checked]
    table(
        ["collection", "fitted", "s", "predicted", "error", *PHASES],
        [
            [name, "yes" if row["is_fitted"] else "no", row["total"], row["predicted_total"], f"{row['error']:+.0%}"]
            + [
                f"{row['seconds'][phase]:.2f}/{row['predicted'][phase]:.2f}" if phase in row["seconds"] else "-"
                for phase in PHASES
            ]
            for name, row in zip(names, checked, strict=True)
        ],
    )
    for what, its in (("fitted", seen), ("unseen", unseen)):
        print(
            f"{its['configurations']} {what} collections: {its['median']:.0%} off (median), {its['largest']:.0%} (largest)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="use the measurements of the result file")
    parser.add_argument("--plan", action="store_true", help="print the plan for GPUs")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), help="measure these only, and keep the rest of the result file"
    )
    arguments = parser.parse_args()
    if arguments.plan:
        measured = json.loads(FITTED.read_text())["costs"]
        measured |= {"reward": {"responses": 1 / (2 * GRADED_A_SECOND)}, "rest": {"responses": DRIVER_S}}
        plan(data_sheet_costs(DATA_SHEETS["H100"], measured))
        return
    rows, started = {}, time.perf_counter()
    for model in [] if arguments.fit else arguments.models or MODELS:
        cases = [case for case in CASES if case.model == model]
        for row in measure_sync([case for case in cases if case.mode == "sync"]):
            rows[key(row)] = row
            print(f"{model} {row['prompts']}x8x{row['max_tokens']}: {row['total']:.2f} s", flush=True)
        for case in cases:
            if case.mode == "async":
                row = measure_async(case)
                rows[key(row)] = row
                print(f"{model} {case.prompts}x8x{case.max_tokens}, async: {row['total']:.2f} s", flush=True)
    if arguments.fit or arguments.models:
        rows = kept_rows() | rows
    there = [rows[key(asdict(case))] | asdict(case) for case in CASES if key(asdict(case)) in rows]
    took = {} if arguments.fit else {"took_s": round(time.perf_counter() - started, 1)}
    if len(there) < len(CASES):
        save("throughput", CASES[0].compose(), {"configurations": there} | took)
        print(f"{len(there)} of {len(CASES)} configurations are measured: nothing is fitted yet")
    else:
        report(there, took)


def key(row: dict) -> tuple:
    """Which configuration it is, fitted or not."""
    return tuple(row[name] for name in Case.__dataclass_fields__ if name != "is_fitted")


def kept_rows() -> dict[tuple, dict]:
    path = RESULTS / "throughput.json"
    return {key(row): row for row in json.loads(path.read_text())["configurations"]} if path.is_file() else {}


if __name__ == "__main__":
    main()
