"""A training actor as a plain object, one rank without a Ray cluster, and a batch for it."""

import torch
from tensordict import TensorDict

from grpo.config_sections import LoraConfig, OptimizerConfig, TrainModelConfig
from grpo.models import base_parameters, full_parameters
from grpo.scoring import token_log_probs
from grpo.trainer import TrainerActor

PENALTIES = {"kl_to_ref_coeff": 0.3, "kl_to_inference_coeff": 0.1, "entropy_coeff": 0.02}
LARGE_STEPS = OptimizerConfig(name="sgd", lr=0.5, warmup_steps=0, clip_grad_norm=1e9)
LORA = LoraConfig(enabled=True, r=4, alpha=8.0)
ADAM = OptimizerConfig(name="adamw", lr=1e-2, warmup_steps=5)
ADAPTED = TrainModelConfig(lora=LoraConfig(enabled=True, r=4, dropout=0.3))


class OneRank(TrainerActor):
    """Takes whole batches, as TrainerPool gives them to a single rank."""

    def step(self, batch: TensorDict, with_log_probs: bool = False):
        parts, update = self.spec.train.gradient_accumulation_steps, bool(batch["advantage"].any())
        return super().step(batch, [len(batch) // parts] * parts, parts * update, len(batch), with_log_probs)


def weights(trainer: TrainerActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_parameters(trainer.model)}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).detach().abs().max()) for name in first)


def on_policy(batch: TensorDict, model) -> TensorDict:
    """The batch as if `model` had sampled it, give or take some noise that keeps most ratios inside the clip."""
    with torch.no_grad():
        log_probs, _ = token_log_probs(model, batch["tokens"], 1, 0.9)
    noise = 0.2 * torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0))
    batch["inference_log_probs"] = torch.where(batch["response_mask"], log_probs + noise, 0.0)
    batch["reference_log_probs"] = torch.where(batch["response_mask"], log_probs - noise, 0.0)
    return batch


def plain_loss(model, batch: TensorDict) -> torch.Tensor:
    """The documented loss, token by token, row by row, without padding."""
    total = 0.0
    for row in batch:
        start, length = int(row["prompt_length"]), int(row["response_length"])
        tokens = row["tokens"][: start + length]
        distribution = (model(input_ids=tokens[None]).logits[0] / 0.9).log_softmax(-1)
        for t in range(start, start + length):
            current = distribution[t - 1, tokens[t]]
            ratio = (current - row["inference_log_probs"][t]).exp()
            advantage = row["advantage"]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            delta = row["reference_log_probs"][t] - current
            entropy = -(distribution[t - 1].exp() * distribution[t - 1]).sum()
            term = -surrogate + 0.3 * (delta.exp() - 1 - delta)
            total = total + (term + 0.1 * (row["inference_log_probs"][t] - current) - 0.02 * entropy) / length
    return total / len(batch)


def base_weights(trainer: TrainerActor) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().clone() for name, parameter in base_parameters(trainer.model)}


def state_of(trainer: TrainerActor) -> dict[str, torch.Tensor]:
    """Everything that a next step depends on."""
    state = {name: p.detach().full_tensor().clone() for name, p in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[f"{name} {key}"] = whole.clone()
    return state | {"generator": torch.get_rng_state(), "lr": torch.tensor(trainer.schedule.get_last_lr())}
