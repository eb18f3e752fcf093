"""The sections of the configuration, `env` to `logging`: each one's keys, their defaults, meanings and ranges.

A key's meaning is the comment on its line, from which docs/configuration.md is made. Each section checks itself; what a
run has besides sections, and the rules across them, are in `grpo.config`. Nothing here imports torch.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from grpo.objectives import policy
from grpo.rules import at_least, check, one_of

ALL_LINEAR = "all-linear"


def check_hottest(key: str, temperature: float, backend: str) -> None:
    """vLLM's engine ends where it is given more."""
    check(temperature <= 2 or backend != "vllm", key, temperature, "must be at most 2 with backend=vllm")


@dataclass
class EnvConfig:
    """The task: where prompts come from and how responses are scored."""

    dataset: str = "gsm8k"  # the task, a file of grpo/tasks: arithmetic, countdown, gsm8k, ifeval, math
    data: str | None = None  # a local JSONL or Parquet file instead of the hub's data set
    max_samples: int | None = None  # training problems, at most: a sample drawn by a fixed seed
    style: str = "hash"  # what gsm8k's prompt asks for: hash (#### NUMBER), think (<think>...</think><answer>...</answer>)
    system_prompt: str | None = None  # instead of the task's own
    few_shot: int = 0  # solved examples before each question, taken out of the training problems
    reward_shape: str | None = None  # what a verdict earns: correctness, format, arithmetic, hybrid; null: the task's own
    reward_weights: dict[str, float] = field(default_factory=dict)  # instead of the shape's: {TERM: WEIGHT}
    reward_fn: str | None = None  # PATH.py:FUNCTION or MODULE:FUNCTION that replaces the task's reward
    grading_processes: int = 2  # processes that grade side by side
    grading_timeout_s: float = 10.0  # seconds a response
    reward_timeout_s: float = 60.0  # seconds a call of reward_fn, which gets a group
    grading_memory_gb: float = 4.0  # GB a grading process; one that needs more is replaced, its response a grader_error
    num_envs: int = 64  # prompts that an engine works on at a time, with env.repeats responses each
    repeats: int = 8  # group size K: responses sampled for a prompt
    max_prompt_length: int = 256  # tokens of a prompt; longer ones are dropped and counted
    validation_size: int = 500  # prompts held out for eval_frequency
    test_size: int = 1000  # held-out prompts of the before/after comparison, at most

    def __post_init__(self) -> None:
        at_least("env", self, 1, "num_envs", "max_prompt_length", "validation_size", "test_size", "grading_processes")
        at_least("env", self, 0.1, "grading_timeout_s", "reward_timeout_s")
        at_least("env", self, 0.5, "grading_memory_gb")
        at_least("env", self, 0, "few_shot")
        if self.max_samples is not None:
            at_least("env", self, 1, "max_samples")
        check(
            not self.reward_weights or self.reward_shape is not None,
            "env.reward_weights",
            self.reward_weights,
            "needs env.reward_shape, whose terms they weigh",
        )
        check(
            self.reward_shape is None or self.reward_fn is None,
            "env.reward_shape",
            self.reward_shape,
            "must be null with env.reward_fn, which gives the whole reward",
        )
        one_of("env.style", self.style, ("hash", "think"))
        check(
            self.style == "hash" or self.dataset == "gsm8k",
            "env.style",
            self.style,
            f"is for env.dataset=gsm8k, not for {self.dataset}: leave it out, or set env.system_prompt",
        )
        check(
            self.repeats >= 2,
            "env.repeats",
            self.repeats,
            "must be at least 2: advantages compare the responses of a group",
        )
        check(
            self.reward_fn is None or re.fullmatch(r"(.+\.py|[\w.]+):\w+", self.reward_fn) is not None,
            "env.reward_fn",
            self.reward_fn,
            "must be PATH.py:FUNCTION or MODULE:FUNCTION",
        )


@dataclass
class ModelConfig:
    """The language model that is trained; `model=NAME` picks a file of config/model."""

    name: str = "Qwen/Qwen2.5-3B-Instruct"  # a directory in transformers format, a hub name, or builtin/arithmetic
    cache_dir: str = ".cache"  # where builtin models are kept once made
    attn_implementation: str = "sdpa"  # attention of trainer and reference, as transformers names it
    matmul_precision: str = "highest"  # of float32 products: high and medium may round them to TF32 and bfloat16

    def __post_init__(self) -> None:
        one_of("model.matmul_precision", self.matmul_precision, ("highest", "high", "medium"))


@dataclass
class LoraConfig:
    """Low-rank adapters (peft): the model's weights W stay, and what trains are B and A of W + alpha / r * B A."""

    enabled: bool = False  # train adapters only
    r: int = 16  # rank
    alpha: float = 32.0  # weight of the adapters' product, over r
    # Of the adapters' input, while a step is taken; above 0 the ratio of a rollout to its own policy is not 1.
    dropout: float = 0.0
    target_modules: Any = ALL_LINEAR  # all but the output layer; or names of modules, [q_proj,v_proj] or "q_proj,v_proj"

    def __post_init__(self) -> None:
        section = "train_model.lora"
        at_least(section, self, 1, "r")
        check(0 < self.alpha < math.inf, f"{section}.alpha", self.alpha, "must be above 0")
        check(0 <= self.dropout < 1, f"{section}.dropout", self.dropout, "must be in [0, 1)")
        targets = self.target_modules
        if isinstance(targets, str):
            targets = [name.strip() for name in targets.split(",")]
        names = isinstance(targets, list) and targets and all(re.fullmatch(r"[\w.]+", str(name)) for name in targets)
        check(
            names or targets == [ALL_LINEAR],
            f"{section}.target_modules",
            self.target_modules,
            f"must be {ALL_LINEAR} or names of modules, such as [q_proj,v_proj]",
        )
        self.target_modules = [str(name) for name in targets]


@dataclass
class QuantizationConfig:
    """4 bits a weight, in the linear layers of a model that does not change (bitsandbytes' NF4)."""

    enabled: bool = False  # with LoRA; needs bitsandbytes. Engines and model/ get what the 4 bits stand for


@dataclass
class RefQuantizationConfig:
    """The same of the reference."""

    enabled: bool | None = None  # null: as the policy's base, so that a policy still at its reference has KL 0


@dataclass
class TrainModelConfig:
    """The policy being trained."""

    num_devices: int = 1  # FSDP2 ranks: GPUs, or processes on a CPU
    gradient_checkpointing: bool = False  # recompute each layer's activations in the backward pass: slower, far less memory
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)  # of the base that adapters train on

    def __post_init__(self) -> None:
        at_least("train_model", self, 1, "num_devices")


@dataclass
class RefModelConfig:
    """The frozen reference."""

    # Processes that share the batch. 0: the training ranks score it with their adapters off. null: 0 with LoRA in sync mode,
    # else 1.
    num_devices: int | None = None
    quantization: RefQuantizationConfig = field(default_factory=RefQuantizationConfig)

    def __post_init__(self) -> None:
        if self.num_devices is not None:
            at_least("ref_model", self, 0, "num_devices")


@dataclass
class InferenceModelConfig:
    """The engines that sample responses."""

    num_devices: int = 1  # replicas that share the prompts
    tensor_parallel_size: int = 1  # GPUs a replica of vLLM, or processes on a CPU
    backend: str = "vllm"  # or transformers, which is slower and runs where vLLM does not
    dtype: str = "auto"  # of vLLM on a GPU: auto is the model's own, bfloat16 for a float32 one; a CPU computes in float32
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that vLLM may take; a CPU gets what num_envs needs
    max_tokens: int = 512  # response budget in tokens
    temperature: float = 1.0  # at which responses are sampled, and scored by the trainer
    top_p: float = 1.0  # sample from the likeliest tokens that have this much probability; below 1 only at temperature 1
    enforce_eager: bool = False  # no compilation: starts faster; always on without a GPU

    def __post_init__(self) -> None:
        section = "inference_model"
        one_of(f"{section}.backend", self.backend, ("vllm", "transformers"))
        one_of(f"{section}.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        at_least(section, self, 1, "num_devices", "max_tokens", "tensor_parallel_size")
        check(
            self.tensor_parallel_size == 1 or self.backend == "vllm",
            f"{section}.tensor_parallel_size",
            self.tensor_parallel_size,
            f"must be 1 with backend={self.backend}: only vllm splits a model",
        )
        check(0 < self.temperature < math.inf, f"{section}.temperature", self.temperature, "must be above 0 to explore")
        check_hottest(f"{section}.temperature", self.temperature, self.backend)
        check(0 < self.top_p <= 1, f"{section}.top_p", self.top_p, "must be in (0, 1]")
        check(
            self.top_p == 1 or self.temperature == 1,
            f"{section}.top_p",
            self.top_p,
            f"must be 1 where temperature ({self.temperature}) is not 1: the engine can then report the log-probs "
            "that the trainer needs",
        )
        check(
            0 < self.gpu_memory_utilization <= 1,
            f"{section}.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "must be in (0, 1]",
        )


@dataclass
class ObjectiveConfig:
    """The policy loss, how it is averaged, what an advantage is, and which divergence from the reference is charged.

    `objective=NAME` picks a file of config/objective, which sets them.
    """

    policy_loss: str = "clip"  # a file of grpo/objectives/policy
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # the upper end of that
    aggregation: str = "response"  # mean over tokens, then responses; token: over all tokens; constant: over their budget
    baseline: str = "mean"  # what a reward is compared with: the group's mean; leave_one_out: the others' mean
    advantage_scale: str = (
        "group"  # the difference is divided by the group's standard deviation; batch: the collection's; none
    )
    divergence: str = "k3"  # weighed by train.kl_to_ref_coeff: k1, k2, k3, kl (a hinge on a response), ot (on hidden states)
    kl_margin: float = 0.05  # nats a token below which a response costs nothing
    ot_anchor: str = "reference"  # whose states count; old (sync): the policy's own before the collection's first step
    ot_window: int = 16  # token positions that a state may be matched across
    ot_target: float = 0.05  # transport cost, in [0, 2], below which a response costs nothing
    ot_epsilon: float = 0.1  # weight of the plan's entropy: smaller is closer to plain transport, and slower to settle
    ot_iterations: int = 5  # of Sinkhorn's two updates

    def __post_init__(self) -> None:
        section = "objective"
        one_of(f"{section}.policy_loss", self.policy_loss, tuple(policy.names()))
        check(0 < self.clip_low <= 1, f"{section}.clip_low", self.clip_low, "must be in (0, 1]")
        for name in ("clip_high", "ot_epsilon"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"{section}.{name}", value, "must be above 0")
        one_of(f"{section}.aggregation", self.aggregation, ("response", "token", "constant"))
        one_of(f"{section}.baseline", self.baseline, ("mean", "leave_one_out"))
        one_of(f"{section}.advantage_scale", self.advantage_scale, ("group", "batch", "none"))
        one_of(f"{section}.divergence", self.divergence, ("k1", "k2", "k3", "kl", "ot"))
        one_of(f"{section}.ot_anchor", self.ot_anchor, ("reference", "old"))
        at_least(section, self, 0, "kl_margin", "ot_window", "ot_target")
        at_least(section, self, 1, "ot_iterations")


def precision(typed: str) -> str:
    """What train.mixed_precision means: older documents have true and false."""
    word = {"true": "bf16", "false": "none"}.get(str(typed).lower(), str(typed).lower())
    one_of("train.mixed_precision", word, ("none", "bf16", "fp16"))
    return word


@dataclass
class TrainConfig:
    """How much is collected, how it is optimised, and how far the policy may go from its reference."""

    total_dialog_turns: int = 102_400  # responses in the run
    dialog_turns_per_batch: int = 512  # responses a collection
    # Responses in the replay buffer. sync: a collection; async: those started and not trained on, null: what fits the bound.
    buffer_size: int | None = None
    replay: str = "once"  # async: each group is in one batch; uniform: batches are drawn at random from the buffer
    epochs: int = 1  # times a response is trained on, at most
    optim_batch_size: int = 512  # responses an optimiser step
    gradient_accumulation_steps: int = 1  # micro-batches a step and rank, at least
    max_tokens_per_micro_batch: int | None = None  # rows x longest row of a pass; more are made where it takes them
    # A prompt is computed once for all its group's responses, which then are one row of a micro-batch: less to compute where
    # prompts are long beside responses. The gradient is the same, LoRA's dropout aside
    share_prompts: bool = False
    mixed_precision: str = "none"  # of the passes: none (float32), bf16, fp16; weights and optimiser stay float32
    sync_iter: bool = True  # sync; false: collect the next batch while optimising (staleness at most 1)
    max_staleness: int | None = None  # policy versions between sampling and training, at most; async: null is 4
    weight_update_frequency: int | None = None  # async: steps a push; null: those of dialog_turns_per_batch responses
    drain_before_push: bool = False  # async: responses that run end under the weights that they began with
    skip_zero_advantage: bool = False  # groups whose rewards are all equal are sampled anew: other prompts take their place
    # Importance weights for what stale weights or the engine sampled: none, truncate, mask; null: truncate in async mode
    # where staleness may be above 0, else none
    is_correction: str | None = None
    is_cap: float = 2.0  # the largest weight; beyond it is truncated to it, or masked
    is_level: str = "token"  # or sequence: a response's tokens share their product
    use_kl_to_ref: bool = True  # false: no reference model at all
    kl_to_ref_coeff: float = 0.01  # weight of objective.divergence
    kl_to_inference_coeff: float = 0.0  # weight of KL to the policy that sampled (k1)
    kl_coef_in_loss: bool = True  # false: the reference term is taken off the reward
    entropy_coeff: float = 0.0  # weight of the entropy bonus
    eval_frequency: int = 0  # optimiser steps between evaluations on the validation split; 0: never
    stop_when: int | None = None  # evaluations in a row without a better accuracy after which the run ends
    checkpoint_frequency: int = 100  # optimiser steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # the newest ones, besides the best by validation accuracy
    # Seconds within which a run that is asked to end (SIGTERM, SIGUSR1) must be saved; with sync_iter=false, which waits for
    # the collection beside training first, more than a collection takes.
    grace_s: float = 120.0
    max_wall_time: float | None = None  # seconds after which the run is saved and ends, as if it had been asked to
    max_grader_error_rate: float = 0.1  # share of a collection's responses that could not be graded; above it the run stops
    max_skipped_steps: int = 10  # steps in a row whose loss or gradients are not finite, after which the run stops
    weight_transport: str = "auto"  # of pushes: shared_memory (one host), gloo, nccl (a GPU each); auto picks
    probe_frequency: int = 10  # pushes between comparisons of the trainer's and the engines' log-probs; 0: never
    logging_frequency: int = 1  # optimiser steps between points sent to Weights & Biases and TensorBoard

    def __post_init__(self) -> None:
        self.mixed_precision = precision(self.mixed_precision)
        counts = ("total_dialog_turns", "dialog_turns_per_batch", "epochs", "optim_batch_size")
        at_least("train", self, 1, *counts, "gradient_accumulation_steps", "logging_frequency")
        at_least("train", self, 0, "kl_to_ref_coeff", "kl_to_inference_coeff", "entropy_coeff", "eval_frequency")
        at_least("train", self, 0, "probe_frequency", "checkpoint_frequency")
        at_least("train", self, 1, "keep_checkpoints", "grace_s", "max_skipped_steps")
        rate = self.max_grader_error_rate
        check(0 <= rate <= 1, "train.max_grader_error_rate", rate, "must be in [0, 1]")
        for name in ("stop_when", "max_wall_time"):
            if getattr(self, name) is not None:
                at_least("train", self, 1, name)
        check(
            self.stop_when is None or self.eval_frequency > 0,
            "train.stop_when",
            self.stop_when,
            "needs train.eval_frequency above 0: it counts evaluations",
        )
        one_of("train.replay", self.replay, ("once", "uniform"))
        one_of("train.is_correction", self.is_correction or "none", ("none", "truncate", "mask"))
        one_of("train.is_level", self.is_level, ("token", "sequence"))
        check(0 < self.is_cap < math.inf, "train.is_cap", self.is_cap, "must be above 0")
        one_of("train.weight_transport", self.weight_transport, ("auto", "shared_memory", "gloo", "nccl"))
        if self.max_staleness is not None:
            at_least("train", self, 0, "max_staleness")
        if self.weight_update_frequency is not None:
            at_least("train", self, 1, "weight_update_frequency")


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule: a linear ramp, then constant."""

    # adamw, adam, sgd; adamw_offload: AdamW with weights, gradients and states in shards in the CPU's memory, stepped there;
    # adamw_8bit: AdamW with states of 8 bits.
    name: str = "adamw"
    lr: float = 1e-6  # learning rate after the ramp
    weight_decay: float = 0.0  # decoupled in AdamW
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two averages
    warmup_steps: int = 10  # optimiser steps of the linear ramp
    clip_grad_norm: float = 1.0  # largest norm of the whole gradient

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, ("adamw", "adamw_offload", "adamw_8bit", "adam", "sgd"))
        check(self.lr > 0 and math.isfinite(self.lr), "optimizer.lr", self.lr, "must be above 0")
        at_least("optimizer", self, 0, "weight_decay", "warmup_steps")
        check(self.clip_grad_norm > 0, "optimizer.clip_grad_norm", self.clip_grad_norm, "must be above 0")
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "must be two numbers in [0, 1)",
        )


@dataclass
class RayConfig:
    """The cluster that hosts the actors: one is started for the run, on this machine, unless it joins another."""

    address: str | None = None  # HOST:PORT of a cluster to join, or auto: what RAY_ADDRESS says
    placement: str = "spread"  # of each role's processes over a cluster's nodes; pack: on as few nodes as hold them
    temp_dir: str | None = None  # keep it short: socket paths under it have 107 characters
    object_store_memory: int = 256 << 20  # bytes
    start_timeout_s: float = 300.0  # seconds until an actor has loaded its model
    timeout_s: float = 600.0  # seconds for any other call to an actor
    heartbeat_timeout_s: float = 30.0  # an actor that neither answers nor computes for so long is ended, and started again
    max_restarts: int = 3  # times that an actor is started again after it died; 0: the run ends
    min_engines: int | None = None  # with which the run goes on where others are gone for good; null: all

    def __post_init__(self) -> None:
        at_least("ray", self, 1, "start_timeout_s", "timeout_s", "heartbeat_timeout_s")
        at_least("ray", self, 0, "max_restarts")
        if self.min_engines is not None:
            at_least("ray", self, 1, "min_engines")
        check(
            self.heartbeat_timeout_s < self.timeout_s,
            "ray.heartbeat_timeout_s",
            self.heartbeat_timeout_s,
            f"must be below ray.timeout_s ({self.timeout_s:g}), or a stopped actor is not found out",
        )
        at_least("ray", self, 80 << 20, "object_store_memory")
        one_of("ray.placement", self.placement, ("spread", "pack"))
        check(
            self.address is None or re.fullmatch(r"auto|[\w.-]+:\d+", self.address) is not None,
            "ray.address",
            self.address,
            "must be HOST:PORT, auto or null",
        )


@dataclass
class SinksConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    progress: bool = True  # a progress bar on stderr
    wandb: bool = False  # Weights & Biases, offline where it has no key
    project: str = "grpo"  # in Weights & Biases
    run_name: str | None = None  # in Weights & Biases; the run directory's name by default
    tensorboard: bool = False  # TensorBoard, in the run directory's tensorboard/


@dataclass
class LoggingConfig(SinksConfig):
    """What is written besides metrics.jsonl and rollouts.jsonl, which always are."""

    rollout_tokens: bool = False  # token ids, log-probs and versions in rollouts.jsonl too
