"""All configuration dataclasses and every check of them.

Hydra composes `config/*.yaml` onto these dataclasses, `from_dictconfig` turns the result into objects once, and no
DictConfig goes past it. Ranges of one key are checked in its dataclass, rules across keys in `RunConfig`; what needs the
machine (GPUs, model directories, memory) is checked in `grpo.plan`. Nothing here imports torch, so a wrong key is
answered at once.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.errors import ConfigError, one_line
from grpo.objectives import policy
from grpo.rules import at_least as _at_least
from grpo.rules import check as _check
from grpo.rules import one_of as _one_of

DEFAULT_STALENESS = 4  # of async mode: enough for engines that are as fast as the trainer to stay busy

# Keys of older documents, and what they are called here.
RENAMED = {
    "policy.kl_coef": "train.kl_to_ref_coeff",
    "env.batch_size": "env.num_envs",
    "env.group_size": "env.repeats",
    "train.num_generations": "env.repeats",
    "train.beta": "train.kl_to_ref_coeff",
    "train.learning_rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "model_path": "model.name",
    "dataset_path": "data",
}


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
    num_envs: int = 64  # groups in flight at an engine
    repeats: int = 8  # group size K: responses sampled for a prompt
    max_prompt_length: int = 256  # tokens of a prompt; longer ones are dropped and counted
    validation_size: int = 500  # prompts held out for eval_frequency
    test_size: int = 1000  # held-out prompts of the before/after comparison, at most

    def __post_init__(self) -> None:
        _at_least("env", self, 1, "num_envs", "max_prompt_length", "validation_size", "test_size", "grading_processes")
        _at_least("env", self, 0.1, "grading_timeout_s", "reward_timeout_s")
        _at_least("env", self, 0.5, "grading_memory_gb")
        _at_least("env", self, 0, "few_shot")
        if self.max_samples is not None:
            _at_least("env", self, 1, "max_samples")
        _check(
            not self.reward_weights or self.reward_shape is not None,
            "env.reward_weights",
            self.reward_weights,
            "needs env.reward_shape, whose terms they weigh",
        )
        _check(
            self.reward_shape is None or self.reward_fn is None,
            "env.reward_shape",
            self.reward_shape,
            "must be null with env.reward_fn, which gives the whole reward",
        )
        _one_of("env.style", self.style, ("hash", "think"))
        _check(
            self.style == "hash" or self.dataset == "gsm8k",
            "env.style",
            self.style,
            f"is for env.dataset=gsm8k, not for {self.dataset}: leave it out, or set env.system_prompt",
        )
        _check(
            self.repeats >= 2,
            "env.repeats",
            self.repeats,
            "must be at least 2: advantages compare the responses of a group",
        )
        _check(
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
        _one_of("model.matmul_precision", self.matmul_precision, ("highest", "high", "medium"))


ALL_LINEAR = "all-linear"


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
        _at_least(section, self, 1, "r")
        _check(0 < self.alpha < math.inf, f"{section}.alpha", self.alpha, "must be above 0")
        _check(0 <= self.dropout < 1, f"{section}.dropout", self.dropout, "must be in [0, 1)")
        targets = self.target_modules
        if isinstance(targets, str):
            targets = [name.strip() for name in targets.split(",")]
        names = isinstance(targets, list) and targets and all(re.fullmatch(r"[\w.]+", str(name)) for name in targets)
        _check(
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
        _at_least("train_model", self, 1, "num_devices")


@dataclass
class RefModelConfig:
    """The frozen reference."""

    # Processes that share the batch. 0: the training ranks score it with their adapters off. null: 0 with LoRA in sync mode,
    # else 1.
    num_devices: int | None = None
    quantization: RefQuantizationConfig = field(default_factory=RefQuantizationConfig)

    def __post_init__(self) -> None:
        if self.num_devices is not None:
            _at_least("ref_model", self, 0, "num_devices")


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
        _one_of(f"{section}.backend", self.backend, ("vllm", "transformers"))
        _one_of(f"{section}.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _at_least(section, self, 1, "num_devices", "max_tokens", "tensor_parallel_size")
        _check(
            self.tensor_parallel_size == 1 or self.backend == "vllm",
            f"{section}.tensor_parallel_size",
            self.tensor_parallel_size,
            f"must be 1 with backend={self.backend}: only vllm splits a model",
        )
        _check(0 < self.temperature < math.inf, f"{section}.temperature", self.temperature, "must be above 0 to explore")
        _check(
            self.temperature <= 2 or self.backend != "vllm",
            f"{section}.temperature",
            self.temperature,
            "must be at most 2 with backend=vllm",
        )
        _check(0 < self.top_p <= 1, f"{section}.top_p", self.top_p, "must be in (0, 1]")
        _check(
            self.top_p == 1 or self.temperature == 1,
            f"{section}.top_p",
            self.top_p,
            f"must be 1 where temperature ({self.temperature}) is not 1: the engine can then report the log-probs "
            "that the trainer needs",
        )
        _check(
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
    ot_anchor: str = "reference"  # whose states count; old: the policy's own before the collection's first step
    ot_window: int = 16  # token positions that a state may be matched across
    ot_target: float = 0.05  # transport cost, in [0, 2], below which a response costs nothing
    ot_epsilon: float = 0.1  # weight of the plan's entropy: smaller is closer to plain transport, and slower to settle
    ot_iterations: int = 5  # of Sinkhorn's two updates

    def __post_init__(self) -> None:
        section = "objective"
        _one_of(f"{section}.policy_loss", self.policy_loss, tuple(policy.names()))
        _check(0 < self.clip_low <= 1, f"{section}.clip_low", self.clip_low, "must be in (0, 1]")
        for name in ("clip_high", "ot_epsilon"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"{section}.{name}", value, "must be above 0")
        _one_of(f"{section}.aggregation", self.aggregation, ("response", "token", "constant"))
        _one_of(f"{section}.baseline", self.baseline, ("mean", "leave_one_out"))
        _one_of(f"{section}.advantage_scale", self.advantage_scale, ("group", "batch", "none"))
        _one_of(f"{section}.divergence", self.divergence, ("k1", "k2", "k3", "kl", "ot"))
        _one_of(f"{section}.ot_anchor", self.ot_anchor, ("reference", "old"))
        _at_least(section, self, 0, "kl_margin", "ot_window", "ot_target")
        _at_least(section, self, 1, "ot_iterations")


@dataclass
class TrainConfig:
    """How much is collected, how it is optimised, and how far the policy may go from its reference."""

    total_dialog_turns: int = 100_000  # responses in the run
    dialog_turns_per_batch: int = 512  # responses a collection
    # Responses in the replay buffer. sync: a collection; async: those started and not trained on, null: what fits the bound.
    buffer_size: int | None = None
    replay: str = "once"  # async: each group is in one batch; uniform: batches are drawn at random from the buffer
    epochs: int = 1  # times a response is trained on, at most
    optim_batch_size: int = 512  # responses an optimiser step
    gradient_accumulation_steps: int = 1  # micro-batches a step and rank, at least
    max_tokens_per_micro_batch: int | None = None  # rows x longest row; more micro-batches are made where it takes them
    mixed_precision: str = "none"  # of the passes: none (float32), bf16, fp16; weights and optimiser stay float32
    sync_iter: bool = True  # sync; false: collect the next batch while optimising (staleness at most 1)
    max_staleness: int | None = None  # policy versions between sampling and training, at most; async: null is 4
    weight_update_frequency: int | None = None  # async: steps a push; null: those of dialog_turns_per_batch responses
    drain_before_push: bool = False  # async: responses that run end under the weights that they began with
    skip_zero_advantage: bool = False  # groups whose rewards are all equal are sampled anew: other prompts take their place
    is_correction: str = "none"  # importance weights for what stale weights or the engine sampled: none, truncate, mask
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
    grace_s: float = 120.0  # seconds within which a run that is asked to end (SIGTERM, SIGUSR1) must be saved
    max_wall_time: float | None = None  # seconds after which the run is saved and ends, as if it had been asked to
    max_grader_error_rate: float = 0.1  # share of a collection's responses that could not be graded; above it the run stops
    max_skipped_steps: int = 10  # steps in a row whose loss or gradients are not finite, after which the run stops
    weight_transport: str = "auto"  # of pushes: shared_memory (one host), gloo, nccl (a GPU each); auto picks
    probe_frequency: int = 10  # pushes between comparisons of the trainer's and the engines' log-probs; 0: never
    logging_frequency: int = 1  # optimiser steps between points sent to Weights & Biases and TensorBoard

    def __post_init__(self) -> None:
        precision = str(self.mixed_precision).lower()  # older documents have true and false
        self.mixed_precision = {"true": "bf16", "false": "none"}.get(precision, precision)
        _one_of("train.mixed_precision", self.mixed_precision, ("none", "bf16", "fp16"))
        counts = ("total_dialog_turns", "dialog_turns_per_batch", "epochs", "optim_batch_size")
        _at_least("train", self, 1, *counts, "gradient_accumulation_steps", "logging_frequency")
        _at_least("train", self, 0, "kl_to_ref_coeff", "kl_to_inference_coeff", "entropy_coeff", "eval_frequency")
        _at_least("train", self, 0, "probe_frequency", "checkpoint_frequency")
        _at_least("train", self, 1, "keep_checkpoints", "grace_s", "max_skipped_steps")
        rate = self.max_grader_error_rate
        _check(0 <= rate <= 1, "train.max_grader_error_rate", rate, "must be in [0, 1]")
        for name in ("stop_when", "max_wall_time"):
            if getattr(self, name) is not None:
                _at_least("train", self, 1, name)
        _check(
            self.stop_when is None or self.eval_frequency > 0,
            "train.stop_when",
            self.stop_when,
            "needs train.eval_frequency above 0: it counts evaluations",
        )
        _one_of("train.replay", self.replay, ("once", "uniform"))
        _one_of("train.is_correction", self.is_correction, ("none", "truncate", "mask"))
        _one_of("train.is_level", self.is_level, ("token", "sequence"))
        _check(0 < self.is_cap < math.inf, "train.is_cap", self.is_cap, "must be above 0")
        _one_of("train.weight_transport", self.weight_transport, ("auto", "shared_memory", "gloo", "nccl"))
        if self.max_staleness is not None:
            _at_least("train", self, 0, "max_staleness")
        if self.weight_update_frequency is not None:
            _at_least("train", self, 1, "weight_update_frequency")


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
        _one_of("optimizer.name", self.name, ("adamw", "adamw_offload", "adamw_8bit", "adam", "sgd"))
        _check(self.lr > 0 and math.isfinite(self.lr), "optimizer.lr", self.lr, "must be above 0")
        _at_least("optimizer", self, 0, "weight_decay", "warmup_steps")
        _check(self.clip_grad_norm > 0, "optimizer.clip_grad_norm", self.clip_grad_norm, "must be above 0")
        _check(
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
        _at_least("ray", self, 1, "start_timeout_s", "timeout_s", "heartbeat_timeout_s")
        _at_least("ray", self, 0, "max_restarts")
        if self.min_engines is not None:
            _at_least("ray", self, 1, "min_engines")
        _check(
            self.heartbeat_timeout_s < self.timeout_s,
            "ray.heartbeat_timeout_s",
            self.heartbeat_timeout_s,
            f"must be below ray.timeout_s ({self.timeout_s:g}), or a stopped actor is not found out",
        )
        _at_least("ray", self, 80 << 20, "object_store_memory")
        _one_of("ray.placement", self.placement, ("spread", "pack"))
        _check(
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


@dataclass
class RunConfig:
    """One run: every key that a user can type."""

    mode: str = "sync"  # or async: each script has its own
    seed: int = 0  # of everything that is drawn
    device: str = "auto"  # of every actor: cuda where there is a GPU, else cpu; or cpu, cuda, mps
    dry_run: bool = False  # print devices, memory, steps, samples and the staleness bound, and start nothing
    resume: str | None = None  # the directory of a run to go on with, or auto: the newest that did not end
    resume_force: bool = False  # go on even where what is typed makes another run of it
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train_model: TrainModelConfig = field(default_factory=TrainModelConfig)
    ref_model: RefModelConfig = field(default_factory=RefModelConfig)
    inference_model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("sync", "async"))
        _one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        _check(0 <= self.seed < 2**31, "seed", self.seed, "must be at least 0 and below 2^31")
        train, repeats = self.train, self.env.repeats
        for name in ("dialog_turns_per_batch", "optim_batch_size"):
            value = getattr(train, name)
            _check(value % repeats == 0, f"train.{name}", value, f"must be a multiple of env.repeats ({repeats})")
        _check(
            train.dialog_turns_per_batch % train.optim_batch_size == 0,
            "train.dialog_turns_per_batch",
            train.dialog_turns_per_batch,
            f"must be a multiple of train.optim_batch_size ({train.optim_batch_size})",
        )
        _check(
            train.total_dialog_turns % train.dialog_turns_per_batch == 0,
            "train.total_dialog_turns",
            train.total_dialog_turns,
            f"must be a multiple of train.dialog_turns_per_batch ({train.dialog_turns_per_batch})",
        )
        _check(
            train.optim_batch_size % (train.gradient_accumulation_steps * self.train_model.num_devices) == 0,
            "train.optim_batch_size",
            train.optim_batch_size,
            f"must be a multiple of train.gradient_accumulation_steps ({train.gradient_accumulation_steps}) x "
            f"train_model.num_devices ({self.train_model.num_devices})",
        )
        on_policy = self.steps_per_push == 1 and self.staleness_bound == 0
        _check(
            self.objective.policy_loss != "reinforce" or on_policy or train.is_correction != "none",
            "objective.policy_loss",
            self.objective.policy_loss,
            "has no ratio to the policy that sampled: it needs train.is_correction=truncate, or one optimiser step a push "
            "and staleness 0",
        )
        self._check_sync() if self.mode == "sync" else self._check_async()
        budget, longest = train.max_tokens_per_micro_batch, self.env.max_prompt_length + self.inference_model.max_tokens
        _check(
            budget is None or budget >= longest,
            "train.max_tokens_per_micro_batch",
            budget,
            f"must be at least env.max_prompt_length ({self.env.max_prompt_length}) + inference_model.max_tokens "
            f"({self.inference_model.max_tokens}): one row must fit",
        )
        _check(
            self.ref_model.num_devices != 0 or self.train_model.lora.enabled or not self.uses_reference,
            "ref_model.num_devices",
            self.ref_model.num_devices,
            "must be at least 1 without train_model.lora.enabled=true, which alone keeps the reference in the policy",
        )
        of_policy, of_reference = self.train_model.quantization.enabled, self.ref_model.quantization.enabled
        _check(
            not of_policy or self.train_model.lora.enabled,
            "train_model.quantization.enabled",
            of_policy,
            "needs train_model.lora.enabled=true: weights of 4 bits do not train, adapters on them do",
        )
        _check(
            of_reference in (None, of_policy) or self.num_references > 0 or not self.uses_reference,
            "ref_model.quantization.enabled",
            of_reference,
            f"needs ref_model.num_devices of at least 1, or train_model.quantization.enabled={str(of_reference).lower()}: "
            "the reference is the policy without its adapters",
        )
        _check(
            train.kl_coef_in_loss or not self.diverges or self.objective.divergence in ("k1", "k2", "k3"),
            "objective.divergence",
            self.objective.divergence,
            "must be k1, k2 or k3 with train.kl_coef_in_loss=false: what is taken off a reward is an estimate a token",
        )
        _check(
            self.anchor != "old" or self.mode == "sync",
            "objective.ot_anchor",
            self.objective.ot_anchor,
            "must be reference in mode=async, where there is no first step of a collection",
        )
        engines, least = self.inference_model.num_devices, self.ray.min_engines
        _check(
            least is None or least <= engines,
            "ray.min_engines",
            least,
            f"must be at most inference_model.num_devices ({engines})",
        )
        _check(
            self.device != "mps" or self.inference_model.backend == "transformers",
            "device",
            self.device,
            "needs inference_model.backend=transformers: vLLM does not run there",
        )

    def _check_sync(self) -> None:
        train = self.train
        if train.buffer_size is None:
            train.buffer_size = train.dialog_turns_per_batch
        _check(
            train.buffer_size == train.dialog_turns_per_batch,
            "train.buffer_size",
            train.buffer_size,
            f"must equal train.dialog_turns_per_batch ({train.dialog_turns_per_batch}) in sync mode, "
            "where the buffer holds one collection",
        )
        _check(
            train.weight_update_frequency in (None, self.steps_per_collection),
            "train.weight_update_frequency",
            train.weight_update_frequency,
            f"must be {self.steps_per_collection} in sync mode, which pushes once a collection: use grpo_async.py, or "
            "another train.dialog_turns_per_batch",
        )
        _check(
            train.max_staleness is None or train.max_staleness >= self.staleness_bound,
            "train.max_staleness",
            train.max_staleness,
            f"must be at least {self.staleness_bound} in sync mode with train.sync_iter={str(train.sync_iter).lower()}",
        )
        _check(
            train.replay == "once",
            "train.replay",
            train.replay,
            "is of async mode: in sync mode each collection is trained on train.epochs times",
        )
        _check(
            not train.drain_before_push,
            "train.drain_before_push",
            train.drain_before_push,
            "must be false in sync mode, where nothing runs during a push",
        )
        _check(
            train.is_correction == "none" or train.epochs == 1,
            "train.is_correction",
            train.is_correction,
            f"needs train.epochs=1 in sync mode, has {train.epochs}",
        )

    def _check_async(self) -> None:
        train = self.train
        _check(
            self.steps_per_push % train.epochs == 0,
            "train.weight_update_frequency",
            train.weight_update_frequency,
            f"must be a multiple of train.epochs ({train.epochs}): a batch is trained on under one version",
        )
        _check(
            train.buffer_size is None or train.buffer_size >= train.optim_batch_size,
            "train.buffer_size",
            train.buffer_size,
            f"must be at least train.optim_batch_size ({train.optim_batch_size})",
        )
        _check(
            train.sync_iter, "train.sync_iter", train.sync_iter, "is of sync mode: collection always goes on beside async"
        )
        _check(
            train.replay == "once" or train.epochs == 1,
            "train.epochs",
            train.epochs,
            "must be 1 with train.replay=uniform, where chance says how often a response is trained on",
        )
        _check(
            train.replay == "once" or self.staleness_bound > 0,
            "train.max_staleness",
            train.max_staleness,
            "must be at least 1 with train.replay=uniform: at 0 there is nothing to draw from but the batch itself",
        )
        _check(
            self.objective.advantage_scale != "batch",
            "objective.advantage_scale",
            self.objective.advantage_scale,
            "must be group or none in async mode, where groups are finished one by one",
        )
        _check(
            self.ref_model.num_devices != 0 or not self.uses_reference,
            "ref_model.num_devices",
            self.ref_model.num_devices,
            "must be at least 1 in async mode: the training ranks are busy while collectors score",
        )

    @property
    def diverges(self) -> bool:
        """Whether a divergence is charged, in the loss or in the reward."""
        return self.train.use_kl_to_ref and self.train.kl_to_ref_coeff > 0

    @property
    def anchor(self) -> str | None:
        """Whose hidden states the policy's are compared with: reference, old, or None where they are not."""
        return self.objective.ot_anchor if self.diverges and self.objective.divergence == "ot" else None

    @property
    def uses_reference(self) -> bool:
        """Whether anything reads what the reference says of a rollout: only then is it computed."""
        return self.diverges and self.anchor != "old"

    @property
    def num_references(self) -> int:
        """Processes that hold a reference: 0 where none is used, and where the training ranks score it themselves."""
        if not self.uses_reference:
            return 0
        default = 0 if self.train_model.lora.enabled and self.mode == "sync" else 1
        return default if self.ref_model.num_devices is None else self.ref_model.num_devices

    @property
    def reference_in_four_bits(self) -> bool:
        own = self.ref_model.quantization.enabled
        return self.train_model.quantization.enabled if own is None else own

    @property
    def kl_in_reward(self) -> float:
        """Weight of the divergence from the reference that is taken off the reward."""
        return self.train.kl_to_ref_coeff if self.uses_reference and not self.train.kl_coef_in_loss else 0.0

    @property
    def penalised(self) -> bool:
        """Whether the loss has terms besides the advantages, so that rollouts without advantage carry gradient too."""
        train = self.train
        in_loss = self.diverges and train.kl_coef_in_loss
        return in_loss or train.kl_to_inference_coeff > 0 or train.entropy_coeff > 0

    @property
    def num_collections(self) -> int:
        return self.train.total_dialog_turns // self.train.dialog_turns_per_batch

    @property
    def groups_per_collection(self) -> int:
        return self.train.dialog_turns_per_batch // self.env.repeats

    @property
    def batches_per_collection(self) -> int:
        """Optimiser steps an epoch of one collection."""
        return self.train.dialog_turns_per_batch // self.train.optim_batch_size

    @property
    def steps_per_collection(self) -> int:
        """Optimiser steps on one collection."""
        return self.train.epochs * self.batches_per_collection

    @property
    def num_steps(self) -> int:
        """Optimiser steps in the run."""
        return self.num_collections * self.steps_per_collection

    @property
    def steps_per_push(self) -> int:
        """Optimiser steps between two pushes."""
        return self.train.weight_update_frequency or self.steps_per_collection

    @property
    def batches_per_push(self) -> int:
        """Batches between two pushes; each is trained on train.epochs times."""
        return self.steps_per_push // self.train.epochs

    @property
    def groups_per_batch(self) -> int:
        return self.train.optim_batch_size // self.env.repeats

    @property
    def buffered_groups(self) -> int:
        """async: groups that the buffer has room for; with train.replay=once those that are still sampled count too."""
        in_time = (self.staleness_bound + 1) * self.batches_per_push * self.groups_per_batch
        return in_time if self.train.buffer_size is None else min(in_time, self.train.buffer_size // self.env.repeats)

    @property
    def running_groups(self) -> int:
        """async, train.replay=uniform: groups that are sampled or wait for it: what the engines run, and a batch more."""
        return self.env.num_envs * self.inference_model.num_devices + self.groups_per_batch

    @property
    def num_groups(self) -> int:
        """Groups that the run trains on."""
        return self.train.total_dialog_turns // self.env.repeats

    @property
    def staleness_bound(self) -> int:
        """Policy versions between sampling a rollout and training on it, at most."""
        if self.mode == "sync":
            return 0 if self.train.sync_iter else 1
        return DEFAULT_STALENESS if self.train.max_staleness is None else self.train.max_staleness


ConfigStore.instance().store(name="run", node=RunConfig)


def known_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Every key that a user can type, `section.name`."""
    keys = []
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            keys += known_keys(item.type, f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def check_keys(keys: list[str], groups: list[str], cls: type = RunConfig) -> None:
    """Raise ConfigError for the first of `keys` that is neither a key of `cls` nor one of the config `groups`.

    The message names the nearest known key.
    """
    known = known_keys(cls)
    for key in keys:
        if key in known or key in groups or key.split(".")[0] == "hydra" or key.split("/")[0] == "hydra":
            continue
        if RENAMED.get(key) in known:
            raise ConfigError(f"{key} is not a key of this program: use {RENAMED[key]}")
        same_name = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        near = difflib.get_close_matches(key, same_name or known + groups, n=1, cutoff=0.0)
        raise ConfigError(f"unknown key {key}: the nearest known key is {near[0]}")


def from_dictconfig(config: DictConfig) -> Any:
    """The composed configuration as checked objects of its own class; raises ConfigError in one line."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(readable(error)) from None


def readable(error: BaseException) -> str:
    """Hydra's or OmegaConf's multi-line message as one line: what is wrong, and with which key."""
    text = str(error.__cause__ or error)
    key = re.search(r"full_key: (\S+)", text)
    message = one_line(Exception(text.split("\n    full_key")[0].replace("\n", ": ")))
    return f"{key.group(1)}: {message}" if key and not message.startswith(key.group(1)) else message
