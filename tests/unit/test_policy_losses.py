"""Each policy loss: hand-worked values and gradients; and with every aggregation and penalty what must not change either."""

import math
from functools import partial

import pytest
import torch

from grpo.objectives import policy
from grpo.objectives.divergences import ESTIMATES, kl_penalty, token_penalty, transport_penalty
from grpo.objectives.online import divisor, online_loss, summarise
from grpo.objectives.policy import cispo, clip, gspo, reinforce

INFERENCE = math.log(0.4)
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]).bool()
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)


def of_ratios(ratios: list[list[float]]) -> dict[str, torch.Tensor]:
    """Two responses of 3 and 2 tokens, sampled with probability 0.4 each, whose ratios those are."""
    inference = torch.full((2, 5), INFERENCE, dtype=torch.float64)
    log_ratio = torch.full((2, 5), 3.0, dtype=torch.float64)  # around the responses
    log_ratio[MASK] = torch.tensor([ratio for row in ratios for ratio in row], dtype=torch.float64).log()
    return {
        "log_probs": (inference + log_ratio).requires_grad_(),
        "inference_log_probs": inference,
        "advantages": ADVANTAGES,
        "response_mask": MASK,
    }


def gradient(found: policy.PolicyLoss, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Of the sum over the responses' tokens, at each of them."""
    (whole,) = torch.autograd.grad(found.loss[MASK].sum(), inputs["log_probs"])
    assert not whole[~MASK].any()
    return whole[MASK].tolist()


def test_the_policy_losses_are_the_files_of_their_folder():
    assert policy.names() == ["cispo", "clip", "gspo", "reinforce"]
    assert [policy.load(name) for name in policy.names()] == [m.policy_loss for m in (cispo, clip, gspo, reinforce)]


def test_clip_has_a_ratio_a_token():
    inputs = of_ratios([[1.0, 1.5, 0.5], [1.1, 0.5]])
    found = clip.policy_loss(**inputs, clip_low=0.2, clip_high=0.2)
    assert found.loss[MASK].tolist() == pytest.approx([-2.0, -2.4, -1.0, 1.1, 0.8])
    assert found.clipped_high[MASK].tolist() == [False, True, False, False, False]
    assert found.clipped_low[MASK].tolist() == [False, False, False, False, True]
    assert found.carries[MASK].tolist() == [True, False, True, True, False]
    assert gradient(found, inputs) == pytest.approx([-2.0, 0.0, -1.0, 1.1, 0.0])


def test_gspo_has_one_ratio_a_response_the_geometric_mean_of_its_tokens():
    # (1.2 x 0.9 x 1)^(1/3) = 1.0260, (1.1 x 0.8)^(1/2) = 0.9381
    inputs = of_ratios([[1.2, 0.9, 1.0], [1.1, 0.8]])
    first, second = 1.08 ** (1 / 3), 0.88**0.5
    found = gspo.policy_loss(**inputs, clip_low=0.1, clip_high=0.1)
    assert found.loss[MASK].tolist() == pytest.approx([-2 * first] * 3 + [second] * 2)
    # Of a token's loss s A by any token's log-prob: s A / |o|; summed over the |o| tokens, s A.
    assert gradient(found, inputs) == pytest.approx([-2 * first] * 3 + [second] * 2)
    assert found.carries[MASK].all()
    assert not (found.clipped_low | found.clipped_high).any()


def test_gspo_clips_whole_responses():
    inputs = of_ratios([[1.2, 0.9, 1.0], [1.1, 0.8]])
    found = gspo.policy_loss(**inputs, clip_low=0.05, clip_high=0.02)
    assert found.loss[MASK].tolist() == pytest.approx([-2 * 1.02] * 3 + [0.95] * 2)
    assert found.clipped_high[MASK].tolist() == [True] * 3 + [False] * 2
    assert found.clipped_low[MASK].tolist() == [False] * 3 + [True] * 2
    assert gradient(found, inputs) == [0.0] * 5


def test_cispo_weighs_each_score_by_its_clipped_ratio_and_drops_none():
    inputs = of_ratios([[1.0, 9.0, 0.5], [6.0, 0.01]])
    found = cispo.policy_loss(**inputs, clip_low=1.0, clip_high=4.0)
    weights = [1.0, 5.0, 0.5, 5.0, 0.01]
    scores = [-2 * w for w in weights[:3]] + weights[3:]
    assert gradient(found, inputs) == pytest.approx(scores)
    log_probs = inputs["log_probs"].detach()[MASK].tolist()
    assert found.loss[MASK].tolist() == pytest.approx([s * log_p for s, log_p in zip(scores, log_probs, strict=True)])
    assert found.clipped_high[MASK].tolist() == [False, True, False, True, False]
    assert not found.clipped_low.any()  # clip_low = 1 is no bound
    assert found.carries[MASK].all()
    low = cispo.policy_loss(**inputs, clip_low=0.2, clip_high=4.0)
    assert low.clipped_low[MASK].tolist() == [False, False, True, False, True]


def test_reinforce_is_the_score_whatever_the_ratio():
    inputs = of_ratios([[1.0, 9.0, 0.5], [6.0, 0.01]])
    found = reinforce.policy_loss(**inputs, clip_low=0.2, clip_high=0.2)
    assert gradient(found, inputs) == pytest.approx([-2.0] * 3 + [1.0] * 2)
    assert found.loss[0, 1].item() == pytest.approx(-2 * INFERENCE)
    assert not (found.clipped_low | found.clipped_high).any()


@pytest.mark.parametrize("name", policy.names())
def test_a_response_without_an_advantage_carries_nothing(name):
    inputs = of_ratios([[1.0, 9.0, 0.5], [6.0, 0.01]]) | {"advantages": torch.tensor([0.0, -1.0], dtype=torch.float64)}
    found = policy.load(name)(**inputs, clip_low=0.2, clip_high=0.2)
    assert not found.carries[0].any()
    assert not torch.autograd.grad(found.loss[0].sum(), inputs["log_probs"])[0].any()


def draw(rows: int = 6, width: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Ragged responses with everything that a loss may read, ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.4 * torch.randn(*shape, dtype=torch.float64, generator=generator)

    position, start = torch.arange(width), torch.tensor([1, 2, 1, 3, 1, 2])[:rows, None]
    length = torch.tensor([1, 6, 3, 2, 5, 4])[:rows, None]
    return {
        "log_probs": normal(rows, width) - 1,
        "entropy": normal(rows, width),
        "inference_log_probs": normal(rows, width) - 1,
        "reference_log_probs": normal(rows, width) - 1,
        "advantages": torch.randn(rows, dtype=torch.float64, generator=generator),
        "response_mask": (position >= start) & (position < start + length),
        "states": normal(rows, width, 3),
        "anchor_states": normal(rows, width, 3),
    }


PENALTIES = {
    **{name: partial(token_penalty, estimate=estimate) for name, estimate in ESTIMATES.items()},
    "kl": partial(kl_penalty, margin=0.05),
    "ot": partial(transport_penalty, target=0.05, window=2, epsilon=0.1, iterations=5),
}


def loss_of(rows: dict[str, torch.Tensor], name: str, aggregation: str, divergence: str) -> tuple:
    """The sums of these rows."""
    rows = dict(rows)
    states, anchor_states, mask = rows.pop("states"), rows.pop("anchor_states"), rows["response_mask"]
    compared = (states, anchor_states) if divergence == "ot" else (rows["log_probs"], rows["reference_log_probs"])
    return online_loss(
        **rows,
        penalty=PENALTIES[divergence](*compared, mask),
        policy_loss=partial(policy.load(name), clip_low=0.2, clip_high=0.3),
        aggregation=aggregation,
        kl_to_ref_coeff=0.3,
        kl_to_inference_coeff=0.7,
        entropy_coeff=0.05,
    )


def gradients(rows: dict[str, torch.Tensor], *kind: str) -> tuple[float, list[torch.Tensor], dict, dict]:
    """Loss, its gradients by log_probs, entropy and states, the sums and the maxima."""
    leaves = [rows[key].clone().requires_grad_() for key in ("log_probs", "entropy", "states")]
    loss, sums, maxima = loss_of(rows | dict(zip(("log_probs", "entropy", "states"), leaves, strict=True)), *kind)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.item(), list(found), {k: float(v) for k, v in sums.items()}, {k: float(v) for k, v in maxima.items()}


# Every policy loss with every aggregation; every penalty with one of them.
KINDS = [(name, aggregation, "k3") for name in policy.names() for aggregation in ("response", "token", "constant")]
KINDS += [("clip", "response", divergence) for divergence in PENALTIES if divergence != "k3"]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[" ".join(kind) for kind in KINDS])


@every_kind
def test_the_gradient_agrees_with_finite_differences(kind):
    rows = draw()
    if kind[0] == "cispo":  # whose weights have no gradient on purpose: at these ratios both bounds hold them
        away = torch.tensor([2.0, -2.0], dtype=torch.float64).repeat(4)
        rows["inference_log_probs"] = rows["log_probs"] + away
    leaves = [rows[key].clone().requires_grad_() for key in ("log_probs", "entropy", "states")]

    def loss(log_probs: torch.Tensor, entropy: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return loss_of(rows | {"log_probs": log_probs, "entropy": entropy, "states": states}, *kind)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@every_kind
def test_padding_with_anything_in_it_changes_nothing(kind):
    rows = draw()
    loss, expected, sums, maxima = gradients(rows, *kind)
    padded = {}
    for name, value in rows.items():
        garbage = 50 * torch.randn(6, 3, *value.shape[2:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        if name == "response_mask":
            garbage = torch.zeros(6, 3, dtype=torch.bool)
        padded[name] = value if name == "advantages" else torch.cat([value, garbage], 1)
        if value.ndim == 2 and name != "response_mask":
            padded[name][:, 0] = 80.0  # a prompt
            padded[name][:, -1] = -700.0
    found_loss, found, found_sums, found_maxima = gradients(padded, *kind)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert found_sums == pytest.approx(sums)
    assert found_maxima == pytest.approx(maxima)
    for its, theirs in zip(found, expected, strict=True):
        assert torch.allclose(its[:, :8], theirs, atol=1e-12)
        assert not its[:, 8:].any()


@every_kind
def test_a_permutation_of_the_responses_changes_neither_loss_nor_sums(kind):
    rows, order = draw(), torch.tensor([3, 0, 5, 1, 4, 2])
    loss, expected, sums, maxima = gradients(rows, *kind)
    found_loss, found, found_sums, found_maxima = gradients({k: v[order] for k, v in rows.items()}, *kind)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert found_sums == pytest.approx(sums)
    assert found_maxima == maxima
    for its, theirs in zip(found, expected, strict=True):
        assert torch.allclose(its, theirs[order], atol=1e-14)


@every_kind
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [3, 3], [5, 1]])
def test_parts_of_a_batch_sum_to_the_whole(kind, sizes):
    """Micro-batches, and ranks: both are rows of which the sums are added up."""
    rows = draw()
    loss, expected, sums, maxima = gradients(rows, *kind)
    parts = [
        dict(zip(rows, part, strict=True)) for part in zip(*(value.split(sizes) for value in rows.values()), strict=True)
    ]
    found = [gradients(part, *kind) for part in parts]
    assert sum(part[0] for part in found) == pytest.approx(loss, rel=1e-12)
    for i, theirs in enumerate(expected):
        assert torch.allclose(torch.cat([part[1][i] for part in found]), theirs, atol=1e-14)
    for name, value in sums.items():
        assert sum(part[2][name] for part in found) == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert max(part[3]["ratio"] for part in found) == maxima["ratio"]


def test_the_aggregations_divide_by_responses_tokens_and_budgets():
    lengths = torch.tensor([3, 2, 5])
    assert divisor("response", 8)(lengths) == 3
    assert divisor("token", 8)(lengths) == 10
    assert divisor("constant", 8)(lengths) == 24


def test_the_aggregations_of_one_batch_by_hand():
    # Token losses 1, 2, 6 and -2, -4: means 3 and -3; sums 9 and -6.
    log_probs = torch.zeros(2, 3, dtype=torch.float64)
    token_losses = torch.tensor([[1.0, 2.0, 6.0], [-2.0, -4.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()

    def stub(*inputs) -> policy.PolicyLoss:
        return policy.PolicyLoss(token_losses, ~mask, ~mask, mask)

    found = {}
    for aggregation in ("response", "token", "constant"):
        loss, _, _ = online_loss(
            log_probs,
            log_probs,
            log_probs,
            None,
            torch.ones(2),
            mask,
            None,
            policy_loss=stub,
            aggregation=aggregation,
            kl_to_ref_coeff=0.0,
            kl_to_inference_coeff=0.0,
            entropy_coeff=0.0,
        )
        found[aggregation] = float(loss) / divisor(aggregation, 10)(mask.sum(1))
    assert found == pytest.approx({"response": (3 - 3) / 2, "token": (9 - 6) / 5, "constant": (9 - 6) / 20})


def test_a_penalty_of_a_response_is_charged_to_each_of_its_tokens():
    rows = draw()
    sums = gradients(rows, "clip", "response", "kl")[2]
    compared = rows["log_probs"], rows["reference_log_probs"], rows["response_mask"]
    penalty = kl_penalty(*compared, margin=0.05)["penalty"][:, 0]
    lengths = rows["response_mask"].sum(1)
    assert (penalty == 0).any() and (penalty > 0).any()
    assert sums["penalty"] == pytest.approx(float((penalty * lengths).sum()))
    assert sums["over_margin"] == float((lengths * (penalty > 0)).sum())
    metrics = summarise(sums, {"ratio": 2.0}, 6)
    assert metrics["train/over_margin"] == pytest.approx(sums["over_margin"] / int(lengths.sum()))
    assert "train/transport" not in metrics
    assert "train/transport" in summarise(gradients(rows, "clip", "response", "ot")[2], {"ratio": 2.0}, 6)
