"""The training actor: one FSDP2 rank that turns a batch of rollouts into an optimiser step and publishes the weights.

It loads, moves, calls the objective, and steps; the mathematics is in grpo/objectives.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tensordict import TensorDict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from grpo import trainer_state
from grpo.adamw_8bit import AdamW8bit
from grpo.adapters import load_lora
from grpo.config_sections import ObjectiveConfig, OptimizerConfig, TrainConfig, TrainModelConfig
from grpo.errors import CheckpointError, TrainingError, one_line
from grpo.models import (
    DTYPES,
    adapters_off,
    add_lora,
    base_parameters,
    checkpoint_gradients,
    export,
    full_parameters,
    load_model,
    load_tokenizer,
    reshard,
    set_lora_dropout,
    shard,
    tied_names,
)
from grpo.nodes import use_node_interface
from grpo.objectives import policy
from grpo.objectives.correction import correction_weights
from grpo.objectives.divergences import ESTIMATES, kl_penalty, token_penalty, transport_penalty
from grpo.objectives.online import online_loss, summarise
from grpo.offline_config import OfflineObjectiveConfig, OfflineTrainConfig
from grpo.rollout import trim
from grpo.scoring import (
    check_shares_prompts,
    last_states,
    score,
    score_text,
    score_with_states,
    shared_log_probs,
    token_log_probs,
)
from grpo.transports import make_sender, open_store
from grpo.weight_sync import Sent, one_thread


def _adamw(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)


START_TIMEOUT = timedelta(minutes=5)  # of the ranks that come to the store where they meet

OPTIMIZERS = {
    "adamw": _adamw,
    "adamw_offload": _adamw,  # `shard` puts what it works on in the CPU's memory
    "adamw_8bit": lambda p, c: AdamW8bit(p, lr=c.lr, weight_decay=c.weight_decay, betas=c.betas),
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, weight_decay=c.weight_decay, betas=c.betas),
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, weight_decay=c.weight_decay),
}


@dataclass(frozen=True)
class TrainerSpec:
    """What a trainer needs to start."""

    model: str
    attn_implementation: str
    device: str
    temperature: float
    seed: int
    train_model: TrainModelConfig
    objective: ObjectiveConfig | OfflineObjectiveConfig
    train: TrainConfig | OfflineTrainConfig
    optimizer: OptimizerConfig
    uses_reference: bool
    charges_divergence: bool = False  # in the loss
    shares_prompts: bool = False
    matmul_precision: str = "highest"
    lora_path: str | None = None  # of adapters that are trained on


def make_penalty(objective: ObjectiveConfig) -> Callable[..., dict[str, torch.Tensor]]:
    """The penalty of `objective.divergence`: of hidden states with ot, else of log-probs."""
    if objective.divergence == "ot":
        return partial(
            transport_penalty,
            target=objective.ot_target,
            window=objective.ot_window,
            epsilon=objective.ot_epsilon,
            iterations=objective.ot_iterations,
        )
    if objective.divergence == "kl":
        return partial(kl_penalty, margin=objective.kl_margin)
    return partial(token_penalty, estimate=ESTIMATES[objective.divergence])


def make_correction(train: TrainConfig) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    if train.is_correction in (None, "none"):
        return None
    return partial(correction_weights, how=train.is_correction, level=train.is_level, cap=train.is_cap)


def _over_ranks(values: dict[str, torch.Tensor], how: dist.ReduceOp.RedOpType) -> dict[str, float]:
    """Sums or maxima over all ranks, which have the same names in the same order."""
    if not values:
        return {}
    stacked = torch.stack(list(values.values()))
    dist.all_reduce(stacked, how)
    return dict(zip(values, stacked.tolist(), strict=True))


class TrainerActor:
    """A Ray actor; with several ranks, every rank gets the same calls in the same order."""

    def __init__(self, spec: TrainerSpec) -> None:
        self.spec = spec

    def open_rendezvous(self) -> tuple[str, int]:
        """On rank 0: open the store where the ranks meet; returns its host and port."""
        host = ray.util.get_node_ip_address()
        self.store = open_store(host, START_TIMEOUT)
        return host, self.store.port

    def start(self, rank: int, world_size: int, rendezvous: tuple[str, int], timeout_s: float) -> int:
        """Join the process group at `rendezvous` and load the model; returns the process id."""
        use_node_interface()
        spec = self.spec
        device = torch.device(spec.device)
        timeout = timedelta(seconds=timeout_s)
        store = self.store if rank == 0 else dist.TCPStore(*rendezvous, is_master=False, timeout=timeout)
        self.offloads = offload = spec.optimizer.name == "adamw_offload"
        on_gpu = "cpu:gloo,cuda:nccl" if offload else "nccl"  # gradients' norms meet where the gradients are
        backend = on_gpu if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        self.writers = dist.new_group(backend="gloo")  # of checkpoints, whose collectives run beside training's
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("fsdp",))
        self.device = device
        torch.set_float32_matmul_precision(spec.matmul_precision)
        torch.manual_seed(spec.seed + rank)  # for LoRA's dropout; nothing else is random here
        precision = DTYPES[spec.train.mixed_precision]
        if spec.train_model.quantization.enabled:
            model = load_model(spec.model, device, spec.attn_implementation, precision, in_four_bits=True)
        else:  # on the CPU, and moved a layer at a time as it is sharded: a GPU never holds the whole model in float32
            model = load_model(spec.model, torch.device("cpu"), spec.attn_implementation)
        if spec.lora_path is not None:
            model = load_lora(model, spec.lora_path)
        elif spec.train_model.lora.enabled:
            model = add_lora(model, spec.train_model.lora, spec.seed)
        if spec.shares_prompts:
            check_shares_prompts(model, self._rounding())
        if spec.train_model.gradient_checkpointing:
            checkpoint_gradients(model)
        self.model = shard(model, mesh, precision, offload)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[spec.optimizer.name](self.trainable, spec.optimizer)
        fp16 = spec.train.mixed_precision == "fp16"  # whose small range gradients have to be scaled into
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None
        ramp = max(1, spec.optimizer.warmup_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / ramp))
        self._prepare_loss()
        return os.getpid()

    def _prepare_loss(self) -> None:
        spec = self.spec
        objective = spec.objective
        self.loss = partial(
            online_loss,
            policy_loss=partial(
                policy.load(objective.policy_loss), clip_low=objective.clip_low, clip_high=objective.clip_high
            ),
            aggregation=objective.aggregation,
            correction=make_correction(spec.train),
            kl_to_ref_coeff=spec.train.kl_to_ref_coeff,
            kl_to_inference_coeff=spec.train.kl_to_inference_coeff,
            entropy_coeff=spec.train.entropy_coeff,
        )
        self.penalty = make_penalty(objective)
        self.compares_states = spec.charges_divergence and objective.divergence == "ot"

    def open_pushes(
        self, transport: str, dtype: str, num_receivers: int, timeout_s: float
    ) -> tuple[dict, dict[str, str], str]:
        """On rank 0: prepare pushes to `num_receivers` engine processes.

        Returns what they need to take part, the further names of tied weights by the name that they are sent under, and
        the dtype whose rounding this rank's products have.
        """
        parameters = list(base_parameters(self.model))
        host = ray.util.get_node_ip_address()
        self.sender = make_sender(transport, host, parameters, dtype, num_receivers, timeout_s)
        return self.sender.description(), tied_names(self.model), self._rounding()

    def _rounding(self) -> str:
        """The dtype whose rounding this rank's products have."""
        dtype = str(DTYPES[self.spec.train.mixed_precision]).removeprefix("torch.")
        if dtype != "float32":
            return dtype
        return {"highest": "float32", "high": "float16", "medium": "bfloat16"}[self.spec.matmul_precision]

    def join_pushes(self) -> None:
        """Wait until every engine takes part."""
        self.sender.join()

    def project(self, names: list[str]) -> None:
        """Send projections of these tensors along: some engine holds them in a form that cannot be read."""
        self.sender.projected = set(names)

    def probe(self, tokens: list[int]) -> np.ndarray:
        """Log-probs [T - 1] of all tokens but the first, in nats at temperature 1. A collective."""
        return score_text(self.model, tokens, self.device)

    def step(
        self, batch: TensorDict, sizes: list[int], num_training: int, count: int, with_log_probs: bool
    ) -> tuple[dict[str, float], torch.Tensor | None]:
        """One optimiser step; this rank's part of it is `batch` [B] in micro-batches of `sizes` rows, as many on each rank.

        The first `num_training` of them carry gradient; the weights stay where there is none. The loss is divided by
        `count`, which is that of all ranks' rollouts. Returns the step's metrics over all ranks and, if asked for, this
        rank's log_probs [B, T] before the step.
        """
        update = num_training > 0
        micro_batches = batch.to(self.device).split(sizes)
        set_lora_dropout(self.model, update)
        sums: dict[str, torch.Tensor] = {}
        maxima: dict[str, torch.Tensor] = {}
        log_probs = torch.zeros(batch["tokens"].shape) if with_log_probs else None
        first_row = 0
        for i, micro_batch in enumerate(micro_batches):
            # Offloaded gradients leave after each micro-batch: kept until the last, they are whole and on the device.
            self.model.set_requires_gradient_sync(self.offloads or i == num_training - 1)
            micro_batch = trim(micro_batch)
            with torch.set_grad_enabled(i < num_training):
                current, loss, totals, largest = self._loss(micro_batch)
            if i < num_training:
                loss = loss / count
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for name, value in totals.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in largest.items():
                maxima[name] = torch.maximum(maxima.get(name, value), value)
            if log_probs is not None:
                rows, width = current.shape
                masked = torch.where(micro_batch["response_mask"], current.detach(), 0.0)
                log_probs[first_row : first_row + rows, :width] = masked.cpu()
                first_row += rows
        if update:
            reshard(self.model)  # else a last pass without gradients leaves the root gathered for the next step as it is now
        over_ranks = _over_ranks(sums, dist.ReduceOp.SUM), _over_ranks(maxima, dist.ReduceOp.MAX)
        metrics = self._summarise(*over_ranks, count)
        metrics["train/lr"] = self.schedule.get_last_lr()[0]
        norm = self._optimise(math.isfinite(metrics["train/loss"])) if update else 0.0
        metrics["train/skipped_updates"] = float(not update)
        metrics["train/grad_norm"] = norm if math.isfinite(norm) else 0.0
        # The same on every rank, since both are sums over all of them. A scaler's overflows are part of its work.
        metrics["train/not_finite"] = float(not math.isfinite(metrics["train/loss"]))
        if self.scaler is not None:
            metrics["train/overflows"] = float(not math.isfinite(norm))
            metrics["train/grad_scale"] = self.scaler.get_scale()
        elif not math.isfinite(norm):
            metrics["train/not_finite"] = 1.0
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        set_lora_dropout(self.model, False)
        return metrics, log_probs

    def _loss(
        self, batch: TensorDict
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        first, mask = int(batch["prompt_length"].min()), batch["response_mask"]
        with last_states(self.model) as its_states:
            if self.spec.shares_prompts:
                rows = batch["tokens"], batch["prompt_length"], batch["response_length"]
                log_probs, entropy = shared_log_probs(self.model, *rows, self.spec.temperature)
            else:
                log_probs, entropy = token_log_probs(self.model, batch["tokens"], first, self.spec.temperature)
            states = its_states() if self.compares_states else None
        if self.spec.train.entropy_coeff == 0:
            entropy = entropy.detach()  # a metric only
        reference_log_probs = batch["reference_log_probs"] if self.spec.uses_reference else None
        penalty = None
        if self.compares_states:
            penalty = self.penalty(states, batch["anchor_states"][:, first:], mask[:, first:])
        elif self.spec.charges_divergence:
            penalty = self.penalty(log_probs, reference_log_probs, mask)
        compared = batch["inference_log_probs"], reference_log_probs
        proximal = batch.get("proximal_log_probs", None)
        loss, totals, largest = self.loss(log_probs, entropy, *compared, batch["advantage"], mask, penalty, proximal)
        return log_probs, loss, totals, largest

    def _summarise(self, sums: dict[str, float], maxima: dict[str, float], count: int) -> dict[str, float]:
        return summarise(sums, maxima, count)

    def _optimise(self, loss_is_finite: bool) -> float:
        """Take the step, or leave the weights where loss or gradients are not finite; returns the gradient norm."""
        if not loss_is_finite:
            self.optimizer.zero_grad()
            return 0.0
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.spec.optimizer.clip_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # which any rank's overflow prevents on all of them
            self.scaler.update()
            if self.scaler.get_scale() < 1:
                raise TrainingError(
                    f"train.mixed_precision (fp16): gradients overflow even when scaled by {self.scaler.get_scale():g}; the "
                    "weights were left as they were: use bf16, or try a lower optimizer.lr"
                )
        elif finite:
            self.optimizer.step()
        if finite:
            self.schedule.step()
        self.optimizer.zero_grad()
        return norm

    def score(self, batch: TensorDict) -> torch.Tensor:
        """The reference's log-probs, float32 [B, T], as `ReferenceActor.score` gives them: the model without its adapters.

        Every rank must get as many rows of the same width, since they gather the weights together.
        """
        batch = batch.to(self.device)
        with adapters_off(self.model):
            rows = batch["tokens"], batch["prompt_length"], batch["response_mask"]
            return score(self.model, *rows, self.spec.temperature).cpu()

    def score_with_states(self, batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """The same and its anchor_states, float16 [B, T, D], as `ReferenceActor.score_with_states` gives them."""
        with adapters_off(self.model):
            return self.own_states(batch)

    def own_states(self, batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and anchor_states of the policy as it is."""
        batch = batch.to(self.device)
        rows = batch["tokens"], batch["prompt_length"], batch["response_mask"]
        return tuple(part.cpu() for part in score_with_states(self.model, *rows, self.spec.temperature))

    @one_thread()
    def push(self, version: int) -> Sent | None:
        """Gather the current weights on every rank; rank 0 sends them to the engines and says what it sent."""
        if dist.get_rank() == 0:
            return self.sender.send(version, full_parameters(self.model))
        for _ in full_parameters(self.model):
            pass
        return None

    def save(self, path: Path) -> dict:
        """Copy the state, write it to the directory `path` in the background, and return what of it is numbers."""
        self.saving = trainer_state.save(self.model, self.optimizer, path, self.writers)
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"scheduled": self.schedule.last_epoch, "scaler": scaler}

    def saved(self, wait: bool) -> bool:
        """Whether what `save` began is written; CheckpointError where it could not be."""
        if not wait and not self.saving.done():
            return False
        error = self.saving.exception()
        if error is not None:
            if isinstance(error, CheckpointException):  # what went wrong on each rank
                error = next(iter(error.failures.values()))[0]
            raise CheckpointError(one_line(error)[:400])
        return True

    def load(self, path: Path, numbers: dict) -> None:
        """Restore what `save` wrote to `path` and returned."""
        trainer_state.load(self.model, self.optimizer, path, self.writers)
        count, schedule = numbers["scheduled"], self.schedule
        rates = [rate * ramp(count) for rate, ramp in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": count, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.scaler is not None and numbers["scaler"] is not None:
            self.scaler.load_state_dict(numbers["scaler"])

    def export(self, path: Path) -> None:
        """Write the model and its tokenizer in transformers format."""
        try:
            export(self.model, load_tokenizer(self.spec.model), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(one_line(error)[:400]) from None
