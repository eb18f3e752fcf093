"""How long a collection takes, before it is run: a linear model of the pipeline's phases, pure functions of plain numbers.

    seconds of a phase = sum over units of (how many the work has of it) x (what one costs)

`amounts` counts the units from the model's shape and the run's settings; what one costs is fitted on a CPU by
benchmarks/throughput.py, which keeps it in grpo/throughput.json, or taken from a GPU's data sheet (`data_sheet_costs`: an
estimate, since no GPU has been measured). A synchronous collection takes the sum of its phases, an asynchronous one as long
as its slowest side, and a fixed cost a step (`collection_s`). With train.sync_iter=false sampling goes on beside the steps.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig

from grpo.config import RunConfig

FITTED = Path(__file__).with_name("throughput.json")
PHASES = ("generate", "reward", "reference", "train", "push", "rest")
FLOAT32, BFLOAT16 = 4, 2  # bytes
# Numbers that a token reads or writes besides matrix products: a hidden dimension in a layer, and a word of the vocabulary.
PASSES_A_LAYER, PASSES_A_LOGIT = 20, 6

Amounts = dict[str, dict[str, float]]  # by phase, by unit
Costs = dict[str, dict[str, float]]  # the same: seconds a unit


@dataclass(frozen=True)
class Shape:
    """What of a model's architecture its time depends on."""

    parameters: int  # tied ones once
    layers: int
    hidden: int
    vocabulary: int
    kv_width: int  # numbers of the key-value cache a token
    tied: bool  # whether the embedding is the output layer too
    adapters: int = 0  # parameters of LoRA adapters, which alone are trained; 0: all are

    @property
    def trained(self) -> int:
        return self.adapters or self.parameters

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied by: all but an embedding that is only looked up."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)


def shape_of(model: PreTrainedConfig, parameters: int, adapters: int = 0) -> Shape:
    heads = getattr(model, "num_key_value_heads", model.num_attention_heads)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    width = 2 * model.num_hidden_layers * heads * head_dim
    tied = bool(model.tie_word_embeddings)
    return Shape(parameters, model.num_hidden_layers, model.hidden_size, model.vocab_size, width, tied, adapters)


@dataclass(frozen=True)
class Work:
    """One collection, and the processes that share it. Lengths are means."""

    responses: int
    group_size: int
    prompt_tokens: float
    response_tokens: float
    steps: int  # optimiser steps, all epochs together
    epochs: int
    micro_batches: int  # a step and rank
    pushes: float
    in_flight: int  # responses at an engine, at most
    uses_reference: bool
    recomputes: bool = False  # gradient checkpointing
    shares_prompts: bool = False
    engines: int = 1
    ranks: int = 1
    references: int = 1
    weight_bytes: int = FLOAT32  # of a number in an engine


def work_of(config: RunConfig, prompt_tokens: float, response_tokens: float, on_cpu: bool) -> Work:
    """A collection of `config`. The processes of a CPU share its cores: there they count as one."""
    train, env = config.train, config.env
    work = Work(
        responses=train.dialog_turns_per_batch,
        group_size=env.repeats,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        steps=config.steps_per_collection,
        epochs=train.epochs,
        micro_batches=train.gradient_accumulation_steps,
        pushes=config.steps_per_collection / config.steps_per_push,
        in_flight=env.num_envs * env.repeats * (config.inference_model.num_devices if on_cpu else 1),
        uses_reference=config.uses_reference,
        recomputes=config.train_model.gradient_checkpointing,
        shares_prompts=train.share_prompts,
    )
    if on_cpu:
        return work
    return replace(
        work,
        engines=config.inference_model.num_devices,
        ranks=config.train_model.num_devices,
        references=config.num_references or config.train_model.num_devices,
        weight_bytes=BFLOAT16,
    )


def amounts(shape: Shape, work: Work) -> Amounts:
    """How many units each phase of a collection has, on the busiest process of its role.

    flops count two a multiplication and addition: a forward pass has 2 a parameter and token, and 4 a layer, dimension and
    token of context for attention; a backward pass has twice as many, of which the weights' gradients are half: frozen ones
    have none. An engine computes a group's prompt once, a reference once a response, a trainer either. The work of LoRA
    adapters themselves is not counted.
    """
    sampled = work.responses * work.response_tokens
    context = work.prompt_tokens + work.response_tokens / 2  # mean, while a response is sampled
    attention = 4 * shape.layers * shape.hidden

    def passes_over(responses: int) -> tuple[float, float, float]:
        """Tokens, numbers moved and flops forward, with so many responses behind a prompt.

        A causal pass computes half of a row's pairs, one with a mask of its own all of them.
        """
        row = work.prompt_tokens + responses * work.response_tokens
        tokens = work.responses / responses * row
        moved = tokens * shape.layers * shape.hidden * PASSES_A_LAYER + sampled * shape.vocabulary * PASSES_A_LOGIT
        return tokens, moved, tokens * (2 * shape.multiplied + attention * row / (2 if responses == 1 else 1))

    own = work.responses / work.engines
    iterations = max(1.0, own / work.in_flight) * work.response_tokens
    prompts = own / work.group_size * work.prompt_tokens
    generating = {
        "iterations": iterations,
        "layer_calls": iterations * shape.layers,
        "tokens": own * work.response_tokens,
        "flops": (own * work.response_tokens + prompts) * 2 * shape.multiplied
        + own * work.response_tokens * attention * context,
        "bytes": iterations * shape.parameters * work.weight_bytes
        + own * work.response_tokens * context * shape.kv_width * work.weight_bytes,
    }
    passes = work.steps * work.micro_batches
    tokens, moved, forward = passes_over(work.group_size if work.shares_prompts else 1)
    frozen = tokens * 2 * shape.multiplied * (shape.adapters > 0)  # gradients of weights that are not made
    training = {
        "steps": work.steps,
        "layer_calls": passes * shape.layers,
        "moved": work.epochs * moved / work.ranks,
        "flops": work.epochs * (forward * (4 if work.recomputes else 3) - frozen) / work.ranks,
        "updated": work.steps * shape.trained / work.ranks,
        # FSDP gathers the weights for each pass forward and backward, and adds up the gradients (in float32) once a step.
        "gathered_bytes": (2 * passes * BFLOAT16 * shape.parameters + work.steps * FLOAT32 * shape.trained)
        * (work.ranks > 1),
    }
    _, moved, forward = passes_over(1)
    scoring = {
        "calls": 1,
        "moved": moved / work.references,
        "flops": forward / work.references,
    }
    return {
        "generate": generating,
        "reward": {"responses": work.responses},
        "reference": scoring if work.uses_reference else {},
        "train": training,
        "push": {"pushes": work.pushes, "bytes": work.pushes * shape.parameters * FLOAT32},
        "rest": {"collections": 1, "steps": work.steps, "responses": work.responses},
    }


def predict(needed: Amounts, costs: Costs) -> dict[str, float]:
    """Seconds of each phase of a collection. Weights are gathered beside the arithmetic of training."""
    seconds = {}
    for phase in PHASES:
        parts = {unit: amount * costs[phase].get(unit, 0.0) for unit, amount in needed[phase].items()}
        gathering = parts.pop("gathered_bytes", 0.0)
        seconds[phase] = max(sum(parts.values()), gathering)
    return seconds


@dataclass(frozen=True)
class Overlap:
    """What sampling beside training costs. The defaults are those of devices that nobody shares."""

    generate: float = 1.0  # times as long as alone on the machine
    train: float = 1.0
    cores: float = math.inf  # that the sides share: they are busy together no longer than this many times the wall clock
    step_s: float = 0.0  # besides


def collection_s(seconds: dict[str, float], mode: str, steps: int, overlap: Overlap, sync_iter: bool = True) -> float:
    """Seconds of a collection from those of its phases: their sum in sync mode, else those of the slowest side.

    Engines sample, collectors grade and score, and the driver trains, pushes and logs. In sync mode without `sync_iter` the
    next collection is sampled and scored as a whole while the steps are taken, and the push waits for it.
    """
    if mode == "sync" and sync_iter:
        return sum(seconds.values())
    engines = seconds["generate"] * overlap.generate
    collectors = seconds["reward"] + seconds["reference"] * overlap.train
    if mode == "sync":
        sides = engines + collectors, seconds["train"] * overlap.train
        return max(*sides, sum(sides) / overlap.cores) + seconds["push"] + seconds["rest"]
    driver = seconds["train"] * overlap.train + seconds["push"] + seconds["rest"]
    return max(engines, collectors, driver, (engines + collectors + driver) / overlap.cores) + steps * overlap.step_s


@dataclass(frozen=True)
class Fit:
    """Costs that were measured, and on what."""

    costs: Costs
    overlap: Overlap
    machine: str
    median_error: float | None  # of whole collections that the fit did not see; None: it was not checked on any
    largest_error: float | None


@cache
def fitted() -> Fit:
    kept = json.loads(FITTED.read_text())
    return Fit(**{**kept, "overlap": Overlap(**kept["overlap"])})


@dataclass(frozen=True)
class DataSheet:
    """What a vendor promises of a GPU: https://www.nvidia.com/en-us/data-center/ a100, h100, h200 (SXM)."""

    flops: float  # a second, bfloat16, dense
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second and GPU between nodes: a network port of 200 or 400 Gbit/s each, as in DGX systems


DATA_SHEETS = {
    "A100": DataSheet(312e12, 2.0e12, 25e9),
    "H100": DataSheet(989e12, 3.35e12, 50e9),
    "H200": DataSheet(989e12, 4.8e12, 50e9),
}
# What of a data sheet's figures is assumed to be reached, and what no data sheet has.
TRAINING_SHARE = 0.40  # of the arithmetic, in training and scoring
SAMPLING_SHARE = 0.50  # of the arithmetic, in an engine
BANDWIDTH_SHARE = 0.60  # of the memory's bandwidth, in an engine and in updates
LINK_SHARE = 0.70  # of the network's
ITERATION_S = 5e-3  # of an engine's scheduler, besides arithmetic and memory
UPDATE_BYTES = 28  # a parameter and step: weights, gradients and two moments in float32, read and written but for one
PUSH_PASSES = 5  # over an engine's weights in its memory, and two over the network: gathered, and sent to the engines


def data_sheet_costs(sheet: DataSheet, measured: Costs) -> Costs:
    """Costs on GPUs, estimated. What runs on the CPU, grading and the driver's own work, is as `measured` there."""
    training, sampling = TRAINING_SHARE * sheet.flops, SAMPLING_SHARE * sheet.flops
    bandwidth, link = BANDWIDTH_SHARE * sheet.bandwidth, LINK_SHARE * sheet.link
    return {
        "generate": {"iterations": ITERATION_S, "flops": 1 / sampling, "bytes": 1 / bandwidth},
        "reward": measured["reward"],
        "reference": {"flops": 1 / training},
        "train": {"flops": 1 / training, "updated": UPDATE_BYTES / bandwidth, "gathered_bytes": 1 / link},
        "push": {"pushes": measured["push"].get("pushes", 0.0), "bytes": PUSH_PASSES / bandwidth + 2 / link},
        "rest": measured["rest"],
    }


def forecast(config: RunConfig, shape: Shape, device: str, gpu: str | None) -> str:
    """The line of dry_run=true: seconds of a collection whose prompts and responses are as long as they may be.

    gpu: what the GPU calls itself, where this machine has one.
    """
    fit = fitted()
    if device == "cuda":
        known = [name for name in DATA_SHEETS if name in (gpu or "")]
        if not known:
            return f"not estimated: no data sheet of {gpu or 'the GPUs'} here"
        costs, overlap = data_sheet_costs(DATA_SHEETS[known[0]], fit.costs), Overlap()
        source = f"an estimate from the data sheet of the {known[0]}, unmeasured"
    else:
        costs, overlap = fit.costs, fit.overlap
        checked = "not checked on other runs yet"
        if fit.median_error is not None:
            checked = f"where it was {fit.median_error:.0%} off (median; at most {fit.largest_error:.0%})"
        source = f"as on {fit.machine}, {checked}"
    longest = config.env.max_prompt_length, config.inference_model.max_tokens
    work = work_of(config, *longest, on_cpu=device != "cuda")
    seconds = predict(amounts(shape, work), costs)
    whole = collection_s(seconds, config.mode, work.steps, overlap, config.train.sync_iter)
    parts = ", ".join(f"{phase} {its:.2g}" for phase, its in seconds.items())
    return f"about {whole:.2g} s a collection at full length ({parts}), {source}"
