"""The configuration of grpo_offline.py: training on completions that have scores already.

It shares the sections that mean the same as in `RunConfig`; there is no engine, no reference and no task here.
"""

import math
from dataclasses import dataclass, field, replace

from hydra.core.config_store import ConfigStore

from grpo.config_sections import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RayConfig,
    SinksConfig,
    TrainModelConfig,
    precision,
)
from grpo.rules import at_least, check, one_of

AUTO = "auto"  # resume=auto


@dataclass
class OfflineObjectiveConfig:
    """KL(policy || target) over a group: which softmax the policy's is, and which one the scores'."""

    # Of a completion: the sum or the mean of its tokens' log-probs. Sums of long completions are so far apart that the
    # softmax is 1 for one of them, where there is no gradient: a higher temperature mends that.
    log_prob: str = "mean"
    temperature: float = 1.0  # of the policy's softmax over the group
    target_temperature: float = 1.0  # of the scores' softmax; the lower, the more the best-scored completion is the target

    def __post_init__(self) -> None:
        one_of("objective.log_prob", self.log_prob, ("sum", "mean"))
        for name in ("temperature", "target_temperature"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"objective.{name}", value, "must be above 0")


@dataclass
class OfflineTrainConfig:
    """How a step is computed, and what is done how often."""

    gradient_accumulation_steps: int = 1  # micro-batches a step and rank
    mixed_precision: str = "none"  # of the passes: none (float32), bf16, fp16; weights and optimiser stay float32
    eval_frequency: int = 0  # optimiser steps between evaluations on the held-out groups; 0: before and after only
    checkpoint_frequency: int = 500  # optimiser steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # the newest ones
    logging_frequency: int = 20  # optimiser steps between points sent to Weights & Biases and TensorBoard
    grace_s: float = 120.0  # seconds within which a run that is asked to end (SIGTERM, SIGUSR1) must be saved
    max_wall_time: float | None = None  # seconds after which the run is saved and ends, as if it had been asked to
    max_skipped_steps: int = 10  # steps in a row whose loss or gradients are not finite, after which the run stops

    def __post_init__(self) -> None:
        self.mixed_precision = precision(self.mixed_precision)
        at_least("train", self, 1, "gradient_accumulation_steps", "logging_frequency")
        at_least("train", self, 0, "eval_frequency", "checkpoint_frequency")
        at_least("train", self, 1, "keep_checkpoints", "grace_s", "max_skipped_steps")
        if self.max_wall_time is not None:
            at_least("train", self, 1, "max_wall_time")


@dataclass
class OfflineConfig:
    """One offline run: every key that a user can type."""

    mode: str = "offline"  # the script's own
    data: str | None = None  # a JSONL file of groups, see grpo/scored.py
    max_seq_length: int = 512  # tokens of prompt and completion; longer completions are left out and counted
    batch_size: int = 8  # groups an optimiser step
    num_epochs: int = 1  # how often each group is trained on
    eval_share: float = 0.1  # of the prompts, whose groups are held out for the evaluation
    lora_path: str | None = None  # a directory in peft's format: its adapters are trained on
    seed: int = 0  # of everything that is drawn
    device: str = "auto"  # of every actor: cuda where there is a GPU, else cpu; or cpu, cuda, mps
    dry_run: bool = False  # print devices, memory, steps and samples, and start nothing
    resume: str | None = None  # the directory of a run to go on with, or auto: the newest that did not end
    resume_force: bool = False  # go on even where what is typed makes another run of it
    model: ModelConfig = field(default_factory=ModelConfig)
    train_model: TrainModelConfig = field(default_factory=TrainModelConfig)
    objective: OfflineObjectiveConfig = field(default_factory=OfflineObjectiveConfig)
    train: OfflineTrainConfig = field(default_factory=OfflineTrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    logging: SinksConfig = field(default_factory=SinksConfig)

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("offline",))
        one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        own = self.data is not None or self.resume not in (None, AUTO)  # a resumed run has its own
        check(own, "data", self.data, "must be a file of scored completions: data=FILE.jsonl")
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be at least 0 and below 2^31")
        at_least("", self, 1, "batch_size", "num_epochs")
        at_least("", self, 2, "max_seq_length")
        engines = self.ray.min_engines
        check(engines is None, "ray.min_engines", engines, "must be null in an offline run, which has no engine")
        check(0 < self.eval_share < 1, "eval_share", self.eval_share, "must be above 0 and below 1")
        check(
            self.batch_size % self.parts == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of train.gradient_accumulation_steps ({self.train.gradient_accumulation_steps}) x "
            f"train_model.num_devices ({self.train_model.num_devices}): a group is never split",
        )
        in_four_bits = self.train_model.quantization.enabled
        check(
            not in_four_bits or self.has_adapters,
            "train_model.quantization.enabled",
            in_four_bits,
            "needs train_model.lora.enabled=true or lora_path: weights of 4 bits do not train, adapters on them do",
        )
        check(
            self.lora_path is None or replace(self.train_model.lora, enabled=False) == LoraConfig(),
            "lora_path",
            self.lora_path,
            "has its adapters' own settings: leave train_model.lora as it is",
        )

    @property
    def parts(self) -> int:
        """Micro-batches of a step on all ranks."""
        return self.train.gradient_accumulation_steps * self.train_model.num_devices

    @property
    def has_adapters(self) -> bool:
        return self.train_model.lora.enabled or self.lora_path is not None


ConfigStore.instance().store(name="offline", node=OfflineConfig)
