"""One run's configuration: its sections together, the rules across them, and how it is read.

Hydra composes `config/*.yaml` onto these dataclasses, `from_dictconfig` turns the result into objects once, and no
DictConfig goes past it. Ranges of one key are checked in its section (`grpo.config_sections`), rules across sections in
`RunConfig`; what needs the machine (GPUs, model directories, memory) is checked in `grpo.plan`. Nothing here imports
torch, so a wrong key is answered at once.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config_sections import (
    EnvConfig,
    InferenceModelConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RayConfig,
    RefModelConfig,
    TrainConfig,
    TrainModelConfig,
)
from grpo.errors import ConfigError, one_line
from grpo.rules import check, one_of

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
class RunConfig:
    """One run: every key that a user can type."""

    mode: str = "sync"  # or async: each script has its own
    seed: int = 0  # of everything that is drawn
    device: str = "auto"  # of every actor: cuda where there is a GPU, else cpu; or cpu, cuda, mps
    colocate: bool = False  # sync: all of it on one device; the engines give their memory back while the trainer computes
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
        one_of("mode", self.mode, ("sync", "async"))
        one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be at least 0 and below 2^31")
        train, repeats = self.train, self.env.repeats
        for name in ("dialog_turns_per_batch", "optim_batch_size"):
            value = getattr(train, name)
            check(value % repeats == 0, f"train.{name}", value, f"must be a multiple of env.repeats ({repeats})")
        check(
            train.dialog_turns_per_batch % train.optim_batch_size == 0,
            "train.dialog_turns_per_batch",
            train.dialog_turns_per_batch,
            f"must be a multiple of train.optim_batch_size ({train.optim_batch_size})",
        )
        check(
            train.total_dialog_turns % train.dialog_turns_per_batch == 0,
            "train.total_dialog_turns",
            train.total_dialog_turns,
            f"must be a multiple of train.dialog_turns_per_batch ({train.dialog_turns_per_batch})",
        )
        check(
            train.optim_batch_size % (train.gradient_accumulation_steps * self.train_model.num_devices) == 0,
            "train.optim_batch_size",
            train.optim_batch_size,
            f"must be a multiple of train.gradient_accumulation_steps ({train.gradient_accumulation_steps}) x "
            f"train_model.num_devices ({self.train_model.num_devices})",
        )
        if train.is_correction is None:
            train.is_correction = "truncate" if self.mode == "async" and self.staleness_bound > 0 else "none"
        on_policy = self.steps_per_push == 1 and self.staleness_bound == 0
        check(
            self.objective.policy_loss != "reinforce" or on_policy or train.is_correction != "none",
            "objective.policy_loss",
            self.objective.policy_loss,
            "has no ratio to the policy that sampled: it needs train.is_correction=truncate, or one optimiser step a push "
            "and staleness 0",
        )
        check(
            self.objective.policy_loss != "reinforce" or train.epochs == 1,
            "train.epochs",
            train.epochs,
            "must be 1 with objective.policy_loss=reinforce, which has no ratio to the policy that first trained on a batch",
        )
        self._check_sync() if self.mode == "sync" else self._check_async()
        budget, longest = train.max_tokens_per_micro_batch, self.env.max_prompt_length + self.inference_model.max_tokens
        check(
            budget is None or budget >= longest,
            "train.max_tokens_per_micro_batch",
            budget,
            f"must be at least env.max_prompt_length ({self.env.max_prompt_length}) + inference_model.max_tokens "
            f"({self.inference_model.max_tokens}): one row must fit",
        )
        for holds, rule in (
            (self.model.attn_implementation in ("eager", "sdpa"), "needs model.attn_implementation=sdpa or eager"),
            (self.anchor is None, "must be false with objective.divergence=ot, which compares the states of separate rows"),
        ):
            check(holds or not train.share_prompts, "train.share_prompts", train.share_prompts, rule)
        check(
            self.ref_model.num_devices != 0 or self.train_model.lora.enabled or not self.uses_reference,
            "ref_model.num_devices",
            self.ref_model.num_devices,
            "must be at least 1 without train_model.lora.enabled=true, which alone keeps the reference in the policy",
        )
        of_policy, of_reference = self.train_model.quantization.enabled, self.ref_model.quantization.enabled
        check(
            not of_policy or self.train_model.lora.enabled,
            "train_model.quantization.enabled",
            of_policy,
            "needs train_model.lora.enabled=true: weights of 4 bits do not train, adapters on them do",
        )
        check(
            of_reference in (None, of_policy) or self.num_references > 0 or not self.uses_reference,
            "ref_model.quantization.enabled",
            of_reference,
            f"needs ref_model.num_devices of at least 1, or train_model.quantization.enabled={str(of_reference).lower()}: "
            "the reference is the policy without its adapters",
        )
        check(
            train.kl_coef_in_loss or not self.diverges or self.objective.divergence in ("k1", "k2", "k3"),
            "objective.divergence",
            self.objective.divergence,
            "must be k1, k2 or k3 with train.kl_coef_in_loss=false: what is taken off a reward is an estimate a token",
        )
        check(
            self.anchor != "old" or self.mode == "sync",
            "objective.ot_anchor",
            self.objective.ot_anchor,
            "must be reference in mode=async, where there is no first step of a collection",
        )
        engines, least = self.inference_model.num_devices, self.ray.min_engines
        check(
            least is None or least <= engines,
            "ray.min_engines",
            least,
            f"must be at most inference_model.num_devices ({engines})",
        )
        check(
            self.device != "mps" or self.inference_model.backend == "transformers",
            "device",
            self.device,
            "needs inference_model.backend=transformers: vLLM does not run there",
        )
        if self.colocate:
            self._check_colocate()

    def _check_colocate(self) -> None:
        for rest, why in (
            (self.mode == "sync", "in mode=async, where engines never rest"),
            (self.train.sync_iter, "with train.sync_iter=false, which samples while it trains"),
            (self.ray.address is None, "with ray.address, whose nodes have devices of their own"),
            (self.device != "mps", "with device=mps, where the trainer is on the CPU"),
        ):
            check(rest, "colocate", "true", f"must be false {why}")

    def _check_sync(self) -> None:
        train = self.train
        if train.buffer_size is None:
            train.buffer_size = train.dialog_turns_per_batch
        check(
            train.buffer_size == train.dialog_turns_per_batch,
            "train.buffer_size",
            train.buffer_size,
            f"must equal train.dialog_turns_per_batch ({train.dialog_turns_per_batch}) in sync mode, "
            "where the buffer holds one collection",
        )
        check(
            train.weight_update_frequency in (None, self.steps_per_collection),
            "train.weight_update_frequency",
            train.weight_update_frequency,
            f"must be {self.steps_per_collection} in sync mode, which pushes once a collection: use grpo_async.py, or "
            "another train.dialog_turns_per_batch",
        )
        check(
            train.max_staleness is None or train.max_staleness >= self.staleness_bound,
            "train.max_staleness",
            train.max_staleness,
            f"must be at least {self.staleness_bound} in sync mode with train.sync_iter={str(train.sync_iter).lower()}",
        )
        check(
            train.replay == "once",
            "train.replay",
            train.replay,
            "is of async mode: in sync mode each collection is trained on train.epochs times",
        )
        check(
            not train.drain_before_push,
            "train.drain_before_push",
            train.drain_before_push,
            "must be false in sync mode, where nothing runs during a push",
        )
        check(
            train.is_correction == "none" or train.epochs == 1,
            "train.is_correction",
            train.is_correction,
            f"needs train.epochs=1 in sync mode, has {train.epochs}",
        )

    def _check_async(self) -> None:
        train = self.train
        check(
            self.steps_per_push % train.epochs == 0,
            "train.weight_update_frequency",
            train.weight_update_frequency,
            f"must be a multiple of train.epochs ({train.epochs}): a batch is trained on under one version",
        )
        check(
            train.buffer_size is None or train.buffer_size >= train.optim_batch_size,
            "train.buffer_size",
            train.buffer_size,
            f"must be at least train.optim_batch_size ({train.optim_batch_size})",
        )
        check(train.sync_iter, "train.sync_iter", train.sync_iter, "is of sync mode: collection always goes on beside async")
        check(
            train.replay == "once" or train.epochs == 1,
            "train.epochs",
            train.epochs,
            "must be 1 with train.replay=uniform, where chance says how often a response is trained on",
        )
        check(
            train.replay == "once" or self.staleness_bound > 0,
            "train.max_staleness",
            train.max_staleness,
            "must be at least 1 with train.replay=uniform: at 0 there is nothing to draw from but the batch itself",
        )
        check(
            self.objective.advantage_scale != "batch",
            "objective.advantage_scale",
            self.objective.advantage_scale,
            "must be group or none in async mode, where groups are finished one by one",
        )
        check(
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


_NODE = OmegaConf.structured(RunConfig)
OmegaConf.set_struct(_NODE.env.reward_weights, False)  # its keys are a shape's: Hydra would let none be added
ConfigStore.instance().store(name="run", node=_NODE)


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
