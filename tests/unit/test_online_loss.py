"""The online loss with the clipped surrogate: hand-worked values, per-token gradients, and what must not change either."""

import math
from functools import partial

import pytest
import torch

from grpo.objectives.divergences import k3, token_penalty
from grpo.objectives.online import online_loss, summarise
from grpo.objectives.policy.clip import policy_loss

PLAIN = {"clip_low": 0.2, "clip_high": 0.2, "kl_to_ref_coeff": 0.0, "kl_to_inference_coeff": 0.0, "entropy_coeff": 0.0}


def grpo_loss(*, clip_low: float, clip_high: float, aggregation: str = "response", **inputs) -> tuple:
    """The grpo preset's loss, from what it is made of."""
    penalty = None
    if inputs["reference_log_probs"] is not None and inputs["kl_to_ref_coeff"] > 0:
        compared = (inputs[name] for name in ("log_probs", "reference_log_probs", "response_mask"))
        penalty = token_penalty(*compared, estimate=k3)
    clip = partial(policy_loss, clip_low=clip_low, clip_high=clip_high)
    return online_loss(**inputs, penalty=penalty, policy_loss=clip, aggregation=aggregation)


def log(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def batch() -> dict[str, torch.Tensor]:
    """Two rollouts in 5 columns, prompts of 1 and 2 tokens, responses of 3 and 2.

    Ratios: 1, 1.5 (beyond 1.2), 0.5 (below 0.8) with advantage 2; 1.1, 0.5 (below 0.8) with advantage -1.
    """
    inference = torch.full((2, 5), 0.4, dtype=torch.float64).log()
    ratio = log([[1, 1, 1.5, 0.5, 1], [1, 1, 1.1, 0.5, 1]])
    return {
        "log_probs": inference + ratio,
        "entropy": torch.tensor([[9, 0.1, 0.2, 0.3, 9], [9, 9, 0.4, 0.6, 9]], dtype=torch.float64),
        "inference_log_probs": inference,
        "reference_log_probs": inference + ratio + log([[1, 2, 1, 0.5, 1], [1, 1, 4, 1, 1]]),
        "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
        "response_mask": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]).bool(),
    }


def evaluate(inputs: dict[str, torch.Tensor], **settings: float) -> tuple[float, torch.Tensor, torch.Tensor, dict]:
    """The loss, its gradients on log_probs and entropy, and the sums."""
    log_probs = inputs["log_probs"].clone().requires_grad_()
    entropy = inputs["entropy"].clone().requires_grad_()
    loss, sums, _ = grpo_loss(**(inputs | {"log_probs": log_probs, "entropy": entropy}), **(PLAIN | settings))
    gradients = torch.autograd.grad(loss, (log_probs, entropy), allow_unused=True, materialize_grads=True)
    return loss.item(), *gradients, {name: float(value) for name, value in sums.items()}


def gradient_of_one_token(ratio: float, advantage: float, **settings: float) -> float:
    one = torch.zeros(1, 1, dtype=torch.float64)
    inputs = {
        "log_probs": log([[ratio]]),
        "entropy": one,
        "inference_log_probs": one,
        "reference_log_probs": None,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "response_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    return float(evaluate(inputs, **settings)[1])


def test_the_loss_of_two_ragged_responses_with_clipped_tokens_of_both_signs():
    # First, A = 2: min(1 A, 1 A) = 2, min(1.5 A, 1.2 A) = 2.4, min(0.5 A, 0.8 A) = 1; their mean is 5.4 / 3 = 1.8.
    # Second, A = -1: min(-1.1, -1.1) = -1.1, min(-0.5, -0.8) = -0.8; their mean is -0.95. The loss is -(1.8 - 0.95).
    loss, _, _, sums = evaluate(batch())
    assert loss == pytest.approx(-0.85, rel=1e-12)
    assert sums["loss"] == pytest.approx(-0.85)
    assert sums["objective"] == pytest.approx(5.4 - 1.9)
    assert sums["tokens"] == 5
    assert (sums["clipped_low"], sums["clipped_high"], sums["carries"]) == (1, 1, 3)


def test_the_loss_with_every_penalty_is_the_sum_of_its_terms():
    # k3 with reference/policy = r is r - 1 - ln r: first row r = 2, 1, 0.5; second row r = 4, 1.
    first_kl = (1 - math.log(2)) + 0 + (-0.5 + math.log(2))
    second_kl = (3 - math.log(4)) + 0
    # inference - current is -ln(ratio).
    first_k1, second_k1 = -math.log(1.5) - math.log(0.5), -math.log(1.1) - math.log(0.5)
    first = -5.4 + 0.3 * first_kl + 0.7 * first_k1 - 0.05 * 0.6
    second = 1.9 + 0.3 * second_kl + 0.7 * second_k1 - 0.05 * 1.0
    loss, _, _, sums = evaluate(batch(), kl_to_ref_coeff=0.3, kl_to_inference_coeff=0.7, entropy_coeff=0.05)
    assert loss == pytest.approx(first / 3 + second / 2, rel=1e-12)
    assert sums["kl_to_reference"] == pytest.approx(first_kl + second_kl)
    assert sums["kl_to_inference"] == pytest.approx(first_k1 + second_k1)
    assert sums["entropy"] == pytest.approx(1.6)


def test_at_ratio_one_the_gradient_is_minus_advantage_over_length_on_every_response_token():
    inputs = batch()
    inputs["log_probs"] = inputs["inference_log_probs"].clone()
    _, gradient, entropy_gradient, _ = evaluate(inputs)
    expected = [[0, -2 / 3, -2 / 3, -2 / 3, 0], [0, 0, 1 / 2, 1 / 2, 0]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert not entropy_gradient.any()


def test_clipped_tokens_have_no_gradient_and_the_others_that_of_their_ratio():
    # -A w / length where the clip does not bind; clipped are 1.5 with A > 0 and 0.5 with A < 0.
    _, gradient, _, _ = evaluate(batch())
    expected = [[0, -2 / 3, 0, -2 * 0.5 / 3, 0], [0, 0, 1.1 / 2, 0, 0]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, 0.0),  # already raised enough
        (0.5, 1.0, -0.5),  # fell although it was good: pulled back
        (0.5, -1.0, 0.0),  # already lowered enough
        (1.5, -1.0, 1.5),  # rose although it was bad: pushed down
        (1.1, 1.0, -1.1),
        (0.9, -1.0, 0.9),
    ],
)
def test_the_clip_binds_on_one_side_for_each_sign_of_the_advantage(ratio, advantage, expected):
    assert gradient_of_one_token(ratio, advantage) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.25, 1.0, False), (1.35, 1.0, True), (0.85, -1.0, True), (0.95, -1.0, False)],
)
def test_the_two_bounds_of_the_clip_are_separate(ratio, advantage, clipped):
    gradient = gradient_of_one_token(ratio, advantage, clip_low=0.1, clip_high=0.3)
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-12)


def test_the_clipped_value_is_that_of_its_own_bound():
    inputs = batch()
    inputs["advantages"] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # min(1, 1) + min(1.5, 1.3) + min(0.5, 0.9), over 3
    assert evaluate(inputs, clip_low=0.1, clip_high=0.3)[0] == pytest.approx(-(1 + 1.3 + 0.5) / 3)
    inputs["advantages"] = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    # min(-1, -1) + min(-1.5, -1.3) + min(-0.5, -0.9), over 3
    assert evaluate(inputs, clip_low=0.1, clip_high=0.3)[0] == pytest.approx((1 + 1.5 + 0.9) / 3)


ALL_TERMS = {"kl_to_ref_coeff": 0.3, "kl_to_inference_coeff": 0.7, "entropy_coeff": 0.05}


def test_padding_columns_with_any_numbers_in_them_change_nothing():
    inputs = batch()
    loss, gradient, entropy_gradient, sums = evaluate(inputs, **ALL_TERMS)
    generator = torch.Generator().manual_seed(0)
    padded = {}
    for name, value in inputs.items():
        garbage = 50 * torch.randn(2, 4, dtype=torch.float64, generator=generator)
        pads = {"response_mask": torch.zeros(2, 4, dtype=torch.bool)}.get(name, garbage)
        padded[name] = value if name == "advantages" else torch.cat([value, pads], 1)
    padded["log_probs"][:, 5:] = torch.tensor([[-700.0, 0.0, 700.0, 80.0]])
    loss_padded, gradient_padded, entropy_gradient_padded, sums_padded = evaluate(padded, **ALL_TERMS)
    assert loss_padded == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(gradient_padded[:, :5], gradient, atol=1e-12)
    assert torch.allclose(entropy_gradient_padded[:, :5], entropy_gradient, atol=1e-12)
    assert not gradient_padded[:, 5:].any()
    assert not entropy_gradient_padded[:, 5:].any()
    assert sums_padded == pytest.approx(sums)


def test_prompt_positions_change_nothing():
    inputs = batch()
    expected = evaluate(inputs, **ALL_TERMS)
    for name in ("log_probs", "entropy", "inference_log_probs", "reference_log_probs"):
        inputs[name] = torch.where(inputs["response_mask"], inputs[name], torch.tensor(33.0 + len(name)).double())
    result = evaluate(inputs, **ALL_TERMS)
    assert result[0] == pytest.approx(expected[0], rel=1e-12)
    assert torch.equal(result[1], expected[1])
    assert result[3] == pytest.approx(expected[3])


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [3, 3], [5, 1]])
def test_micro_batches_sum_to_the_whole_batch(sizes):
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return 0.4 * torch.randn(6, 7, dtype=torch.float64, generator=generator)

    lengths = torch.tensor([1, 7, 3, 2, 5, 4])
    log_probs = draw().requires_grad_()
    rows = {
        "log_probs": log_probs,
        "entropy": draw(),
        "inference_log_probs": draw(),
        "reference_log_probs": draw(),
        "advantages": torch.randn(6, dtype=torch.float64, generator=generator),
        "response_mask": torch.arange(7) < lengths[:, None],
    }
    settings = PLAIN | ALL_TERMS
    whole, whole_sums, _ = grpo_loss(**rows, **settings)
    (whole_gradient,) = torch.autograd.grad(whole, log_probs, retain_graph=True)
    parts = {name: value.split(sizes) for name, value in rows.items()}
    results = [grpo_loss(**{name: parts[name][i] for name in rows}, **settings) for i in range(len(sizes))]
    total = sum(loss for loss, _, _ in results)
    (gradient,) = torch.autograd.grad(total, log_probs)
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, whole_gradient, atol=1e-14)
    for name in whole_sums:
        assert float(sum(sums[name] for _, sums, _ in results)) == pytest.approx(float(whole_sums[name]), rel=1e-9)


def test_a_permutation_of_the_responses_changes_neither_loss_nor_sums():
    inputs = batch()
    loss, gradient, _, sums = evaluate(inputs, **ALL_TERMS)
    turned = evaluate({name: value.flip(0) for name, value in inputs.items()}, **ALL_TERMS)
    assert turned[0] == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(turned[1].flip(0), gradient, atol=1e-14)
    assert turned[3] == pytest.approx(sums)


def test_the_gradient_of_the_reference_term_is_its_coefficient_times_one_minus_the_ratio_over_length():
    inputs = batch() | {"advantages": torch.zeros(2, dtype=torch.float64)}
    _, gradient, _, _ = evaluate(inputs, kl_to_ref_coeff=0.3)
    ratio = torch.tensor([[0, 2, 1, 0.5, 0], [0, 0, 4, 1, 0]], dtype=torch.float64)
    expected = 0.3 * (1 - ratio) / torch.tensor([[3.0], [2.0]]) * inputs["response_mask"]
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_the_gradients_of_the_inference_and_entropy_terms_are_their_coefficients_over_length():
    inputs = batch() | {"advantages": torch.zeros(2, dtype=torch.float64)}
    per_token = inputs["response_mask"] / torch.tensor([[3.0], [2.0]], dtype=torch.float64)
    _, gradient, entropy_gradient, _ = evaluate(inputs, kl_to_inference_coeff=0.7, entropy_coeff=0.05)
    assert torch.allclose(gradient, -0.7 * per_token, atol=1e-12)
    assert torch.allclose(entropy_gradient, -0.05 * per_token, atol=1e-12)


def test_without_a_reference_there_is_no_reference_term_and_no_such_metric():
    with_reference = evaluate(batch())
    inputs = batch() | {"reference_log_probs": None}
    without = evaluate(inputs, kl_to_ref_coeff=0.3)
    assert without[0] == pytest.approx(with_reference[0], rel=1e-12)
    assert torch.equal(without[1], with_reference[1])
    assert with_reference[3].keys() - without[3].keys() == {"kl_to_reference", "kl_to_reference_squared"}
    metrics = summarise(without[3], {"ratio": 1.5}, 2)
    assert "train/kl_to_reference" not in metrics
    assert "train/kl_to_reference_std" not in metrics


def test_the_metric_sums_carry_no_gradient():
    inputs = batch()
    inputs["log_probs"].requires_grad_()
    _, sums, maxima = grpo_loss(**inputs, **PLAIN)
    assert not any(value.requires_grad for value in (*sums.values(), *maxima.values()))


def test_summarise_gives_hand_worked_means():
    # Ratios 1, 1.5, 0.5, 1.1, 0.5: sum 4.6, sum of squares 1 + 2.25 + 0.25 + 1.21 + 0.25 = 4.96.
    metrics = summarise(evaluate(batch(), **ALL_TERMS)[3], {"ratio": 1.5}, 2)
    kls = [1 - math.log(2), 0, -0.5 + math.log(2), 3 - math.log(4), 0]
    mean_kl = sum(kls) / 5
    loss = evaluate(batch(), **ALL_TERMS)[0]
    assert metrics == pytest.approx(
        {
            "train/loss": loss / 2,
            "train/objective": 3.5 / 5,
            "train/kl_to_inference": -math.log(1.5 * 0.5 * 1.1 * 0.5) / 5,
            "train/entropy": 1.6 / 5,
            "train/clip_fraction": 0.4,
            "train/clip_fraction_low": 0.2,
            "train/clip_fraction_high": 0.2,
            "train/gradient_tokens": 0.6,
            "train/ratio_max": 1.5,
            "train/penalty": mean_kl,
            "train/ratio_mean": 0.92,
            "train/ratio_std": math.sqrt(4.96 / 5 - 0.92**2),
            "train/ess": 4.6**2 / (5 * 4.96),
            "train/mismatch": (math.log(1.5) + 2 * math.log(2) + math.log(1.1)) / 5,
            "train/kl_to_reference": mean_kl,
            "train/kl_to_reference_std": math.sqrt(sum(kl**2 for kl in kls) / 5 - mean_kl**2),
        }
    )


def test_on_policy_data_has_an_effective_sample_size_of_one_and_no_spread():
    inputs = batch()
    inputs["log_probs"] = inputs["inference_log_probs"]
    metrics = summarise(evaluate(inputs)[3], {"ratio": 1.0}, 2)
    assert metrics["train/ess"] == pytest.approx(1)
    assert metrics["train/ratio_mean"] == pytest.approx(1)
    assert metrics["train/ratio_std"] == 0
    assert metrics["train/clip_fraction"] == 0


def test_one_dominant_ratio_leaves_the_effective_size_of_one_token():
    # Weights 100 and nine of 0.01: ess is about 1 of 10 tokens.
    sums = {"ratio": 100.09, "ratio_squared": 10000.0009, "tokens": 10.0}
    others = ("loss", "objective", "kl_to_inference", "entropy", "clipped_low", "clipped_high", "carries", "mismatch")
    assert summarise(sums | dict.fromkeys(others, 0.0), {"ratio": 100.0}, 1)["train/ess"] == pytest.approx(0.1, rel=1e-2)
