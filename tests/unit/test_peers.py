"""The same ragged batches through TRL's and TorchRL's own losses: equal to 1e-5, or different by what is said here.

The peers' code runs as it is; only the language model is replaced, by log-probs or logits that are given.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensordict import TensorDict
from torchrl.modules.llm.policies.common import LLMMaskedCategorical
from torchrl.objectives.llm.grpo import DAPO, CISPOLoss, GRPOLoss
from trl import GRPOTrainer

from grpo.objectives import policy
from grpo.objectives.divergences import k3, token_penalty
from grpo.objectives.online import divisor, online_loss

ROWS, WIDTH, VOCABULARY, BUDGET, CLOSE = 7, 12, 9, 10, 1e-5


def draw(seed: int, spread: float = 0.4) -> TensorDict:
    """Ragged responses, padded on both sides with anything; ratios are exp(spread x a normal number)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = torch.randint(1, 3, (ROWS, 1), generator=generator)
    length = torch.randint(1, BUDGET, (ROWS, 1), generator=generator)
    logits = 2 * normal(ROWS, WIDTH, VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator)
    log_probs = chosen(logits, tokens)
    return TensorDict(
        logits=logits,
        tokens=tokens,
        inference_log_probs=log_probs + spread * normal(ROWS, WIDTH),
        reference_log_probs=log_probs + 0.5 * normal(ROWS, WIDTH),
        advantages=normal(ROWS),
        response_mask=(torch.arange(WIDTH) >= start) & (torch.arange(WIDTH) < start + length),
        batch_size=[ROWS],
    )


def chosen(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def ours(
    batch: TensorDict, name: str, aggregation: str, bounds: tuple[float, float], kl: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our loss of the batch and its gradient by the logits."""
    logits = batch["logits"].clone().requires_grad_()
    log_probs, mask = chosen(logits, batch["tokens"]), batch["response_mask"]
    loss, _, _ = online_loss(
        log_probs,
        torch.zeros_like(log_probs),
        batch["inference_log_probs"],
        batch["reference_log_probs"],
        batch["advantages"],
        mask,
        token_penalty(log_probs, batch["reference_log_probs"], mask, estimate=k3),
        policy_loss=partial(policy.load(name), clip_low=bounds[0], clip_high=bounds[1]),
        aggregation=aggregation,
        kl_to_ref_coeff=kl,
        kl_to_inference_coeff=0.0,
        entropy_coeff=0.0,
    )
    loss = loss / divisor(aggregation, BUDGET)(mask.sum(1))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


class Trl(GRPOTrainer):
    """TRL's trainer with what its loss reads, and log-probs in the place of a model's."""

    def __init__(self, loss_type: str, level: str, bounds: tuple[float, float], kl: float) -> None:
        self.loss_type, self.importance_sampling_level, self.beta = loss_type, level, kl
        self.epsilon_low, self.epsilon_high = bounds
        self.max_completion_length = BUDGET
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
        self.model = SimpleNamespace(training=True)
        self.accelerator = Accelerator(cpu=True)
        self.current_gradient_accumulation_steps = 1
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, *arguments, **options):
        return model, torch.zeros_like(model), None


def trl(batch: TensorDict, trainer: Trl) -> tuple[torch.Tensor, torch.Tensor]:
    logits = batch["logits"].clone().requires_grad_()
    mask = batch["response_mask"].int()
    inputs = {
        "prompt_ids": batch["tokens"][:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": batch["tokens"],
        "completion_mask": mask,
        "old_per_token_logps": batch["inference_log_probs"],
        "ref_per_token_logps": batch["reference_log_probs"],
        "advantages": batch["advantages"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(chosen(logits, batch["tokens"]), inputs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# preset: our policy loss, aggregation and bounds; TRL's loss_type, level and bounds
IN_TRL = {
    "grpo": ("clip", "response", (0.2, 0.2), "grpo", "token", (0.2, 0.2)),
    "dapo": ("clip", "token", (0.2, 0.28), "dapo", "token", (0.2, 0.28)),
    "dr_grpo": ("clip", "constant", (0.2, 0.2), "dr_grpo", "token", (0.2, 0.2)),
    "gspo": ("gspo", "response", (0.05, 0.07), "grpo", "sequence", (0.05, 0.07)),
    "cispo": ("cispo", "token", (1.0, 0.5), "cispo", "token", (0.0, 1.5)),  # TRL's bound is of the weight itself
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("preset", IN_TRL)
def test_loss_and_gradient_are_trls(preset, kl, seed):
    name, aggregation, bounds, loss_type, level, its_bounds = IN_TRL[preset]
    batch = draw(seed)
    loss, gradient = ours(batch, name, aggregation, bounds, kl)
    its_loss, its_gradient = trl(batch, Trl(loss_type, level, its_bounds, kl))
    assert float(loss) == pytest.approx(float(its_loss), abs=CLOSE)
    assert (gradient - its_gradient).abs().max() < CLOSE
    assert gradient.abs().max() > 0.01
    if kl == 0 and name != "cispo":  # some tokens are clipped, and some are not
        carries = gradient.abs().sum(-1)[batch["response_mask"]] > 0
        assert carries.any() and not carries.all()


class Actor(torch.nn.Module):
    """What TorchRL's losses ask of a policy."""

    in_keys = ("logits",)

    def get_dist(self, batch: TensorDict, logits_key: str = "logits") -> LLMMaskedCategorical:
        return LLMMaskedCategorical(logits=batch[logits_key], mask=batch["response_mask"])


def torchrl(batch: TensorDict, loss_class: type, **options) -> tuple[TensorDict, torch.Tensor]:
    logits = batch["logits"].clone().requires_grad_()
    module = loss_class(Actor(), masking_strategy="generic", entropy_bonus=False, **options)
    module.set_keys(
        action="tokens",
        sample_log_prob="inference_log_probs",
        ref_log_probs="reference_log_probs",
        advantage="its_advantage",
    )
    inputs = batch.exclude("logits").set("logits", logits)
    inputs["its_advantage"] = batch["advantages"][:, None, None].expand(ROWS, WIDTH, 1)
    return module(inputs), logits


IN_TORCHRL = {
    "grpo": (GRPOLoss, "prompt_mean", "response", (0.2, 0.2)),
    "dapo": (DAPO, "token_mean", "token", (0.2, 0.28)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", IN_TORCHRL)
def test_loss_and_gradient_are_torchrls(preset, seed):
    loss_class, its_aggregation, aggregation, bounds = IN_TORCHRL[preset]
    batch = draw(seed)
    loss, gradient = ours(batch, "clip", aggregation, bounds)
    its, logits = torchrl(batch, loss_class, clip_epsilon=bounds, aggregation=its_aggregation)
    (its_gradient,) = torch.autograd.grad(its.loss_objective.sum(), logits)
    assert float(loss) == pytest.approx(its.loss_objective.item(), abs=CLOSE)
    assert (gradient - its_gradient).abs().max() < CLOSE
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_torchrls_divergence_is_ours_but_averaged_over_padding_too(seed):
    batch = draw(seed)
    without, with_kl = (ours(batch, "clip", "token", (0.2, 0.2), kl) for kl in (0.0, 0.3))
    its, logits = torchrl(batch, GRPOLoss, clip_epsilon=0.2, kl_to_ref_coeff=0.3)
    (its_gradient,) = torch.autograd.grad(its.loss_kl_to_ref, logits)
    tokens = batch["response_mask"].sum() / (ROWS * WIDTH)  # as a share of all columns
    assert its.loss_kl_to_ref.item() == pytest.approx(float((with_kl[0] - without[0]) * tokens), abs=CLOSE)
    assert (its_gradient - (with_kl[1] - without[1]) * tokens).abs().max() < CLOSE
    assert tokens < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_torchrls_clip_fraction_counts_padding_and_both_bounds_whatever_the_advantage(seed):
    batch = draw(seed)
    its, _ = torchrl(batch, GRPOLoss, clip_epsilon=0.2)
    mask = batch["response_mask"]
    ratio = (chosen(batch["logits"], batch["tokens"]) - batch["inference_log_probs"]).exp()
    outside = mask & ((ratio < 0.8) | (ratio > 1.2))
    assert float(its.clip_fraction) == pytest.approx(float(outside.sum() / mask.numel()), abs=CLOSE)
    found = policy.load("clip")(ratio.log(), torch.zeros_like(ratio), batch["advantages"], mask, clip_low=0.2, clip_high=0.2)
    binds = outside & ((ratio > 1) == (batch["advantages"][:, None] > 0))
    assert torch.equal(found.clipped_low | found.clipped_high, binds)
    assert binds.sum() < outside.sum()


@pytest.mark.parametrize("seed", range(3))
def test_torchrls_cispo_has_the_gradient_of_the_paper_only_where_it_does_not_clip(seed):
    """It is -clip(w) A with w's own gradient: w A times the score within the bounds; beyond them 0, and ours a bound's."""
    batch, bounds = draw(seed), (0.2, 0.3)
    _, gradient = ours(batch, "cispo", "token", bounds)
    its, logits = torchrl(batch, CISPOLoss, clip_epsilon=bounds)
    (its_gradient,) = torch.autograd.grad(its.loss_objective.sum(), logits)
    log_probs, mask = chosen(batch["logits"], batch["tokens"]), batch["response_mask"]
    ratio = (log_probs - batch["inference_log_probs"]).exp()
    clipped = (ratio < 0.8) | (ratio > 1.3)
    assert (mask & clipped).any() and (mask & ~clipped).any()
    assert (gradient - its_gradient)[mask & ~clipped].abs().max() < CLOSE
    assert not its_gradient[clipped].any()
    score = torch.nn.functional.one_hot(batch["tokens"], VOCABULARY) - batch["logits"].softmax(-1)
    weight = ratio.clamp(0.8, 1.3) * batch["advantages"][:, None] / mask.sum()
    assert (gradient + weight[..., None] * score)[mask & clipped].abs().max() < CLOSE
    # And its value has no log-prob in it.
    assert its.loss_objective.item() == pytest.approx(float(-weight[mask].sum()), abs=CLOSE)
