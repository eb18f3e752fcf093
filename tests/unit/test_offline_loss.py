"""The loss of scored groups: hand-worked values, finite differences, and what must not change either."""

import math

import pytest
import torch
from torch.nn.functional import pad

from grpo.objectives.offline import group_kl_loss, ranks_best_first, sequence_log_probs, summarise

SUM = {"log_prob": "sum", "temperature": 1.0, "target_temperature": 1.0}


def group(probabilities: list[list[float]], scores: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One group from its completions' token probabilities, after a prompt of one token: log_probs, mask, scores."""
    width = 1 + max(len(row) for row in probabilities)
    log_probs = torch.full((1, len(probabilities), width), -9.0, dtype=torch.float64)  # where the mask is false: anything
    mask = torch.zeros(log_probs.shape, dtype=torch.bool)
    for k, row in enumerate(probabilities):
        log_probs[0, k, 1 : 1 + len(row)] = torch.tensor(row, dtype=torch.float64).log()
        mask[0, k, 1 : 1 + len(row)] = True
    return log_probs, mask, torch.tensor([scores], dtype=torch.float64)


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five groups of 2 to 4 completions of 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(5, 4, 7, generator=generator, dtype=torch.float64)
    length = torch.randint(1, 6, (5, 4), generator=generator)
    length[1, 2:] = length[3, 3:] = 0
    position = torch.arange(7)
    mask = (position >= 1) & (position < 1 + length[..., None])
    return log_probs, mask, torch.randn(5, 4, generator=generator, dtype=torch.float64)


def loss_and_gradient(log_probs, mask, scores, **settings) -> tuple[float, torch.Tensor]:
    log_probs = log_probs.clone().requires_grad_()
    loss, _ = group_kl_loss(log_probs, mask, scores, **(SUM | settings))
    return loss.item(), torch.autograd.grad(loss, log_probs)[0]


def test_two_completions_by_hand():
    # Sequence probabilities 0.5 x 0.4 = 0.2 and 0.6 give p = (1/4, 3/4); scores (log 3, 0) give q = (3/4, 1/4).
    # KL = 1/4 log(1/3) + 3/4 log 3 = 1/2 log 3.
    loss, gradient = loss_and_gradient(*group([[0.5, 0.4], [0.6]], [math.log(3), 0.0]))
    assert loss == pytest.approx(0.5 * math.log(3), rel=1e-12)
    # d KL / d log pi_k = p_k (log p_k / q_k - KL): 1/4 (-log 3 - 1/2 log 3) and its opposite, for each of its tokens.
    slope = -0.375 * math.log(3)
    expected = torch.tensor([[[0, slope, slope], [0, -slope, 0]]], dtype=torch.float64)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_the_mean_and_both_temperatures_by_hand():
    # Means: log sqrt(0.16 x 0.01) = log 0.04, and log 0.01; over temperature 2: log 0.2 and log 0.1, so p = (2/3, 1/3).
    # Scores (0.5 log 4, 0) over 0.5: q = (4/5, 1/5).
    settings = {"log_prob": "mean", "temperature": 2.0, "target_temperature": 0.5}
    loss, _ = loss_and_gradient(*group([[0.16, 0.01], [0.01, 0.01]], [0.5 * math.log(4), 0.0]), **settings)
    assert loss == pytest.approx(2 / 3 * math.log(5 / 6) + 1 / 3 * math.log(5 / 3), rel=1e-12)


def test_the_metric_sums_by_hand():
    log_probs, mask, scores = group([[0.5, 0.4], [0.6]], [math.log(3), 0.0])
    _, sums = group_kl_loss(log_probs, mask, scores, **SUM)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            "loss": 0.5 * math.log(3),
            "accuracy": 0.0,  # the second is likelier, the first scores more
            "ranked": 1,
            "entropy": entropy,
            "target_entropy": entropy,
            "log_prob": math.log(0.12),
            "tokens": 3,
        }
    )
    sums = {"loss": 6, "accuracy": 1.5, "ranked": 2, "entropy": 1, "target_entropy": 2, "log_prob": -8, "tokens": 16}
    assert summarise(sums, 4) == {
        "train/loss": 1.5,
        "train/ranking_accuracy": 0.75,
        "train/group_entropy": 0.25,
        "train/target_entropy": 0.5,
        "train/completion_log_prob": -0.5,
    }


def test_groups_whose_scores_are_equal_have_no_best_completion_to_rank_first():
    parts = group([[0.5], [0.6]], [1.0, 2.0]), group([[0.6], [0.5]], [1.0, 2.0]), group([[0.6], [0.5]], [1.0, 1.0])
    log_probs, mask, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    scores = pad(scores, (0, 1))  # the third completion, which is not there, has another score
    _, sums = group_kl_loss(pad(log_probs, (0, 0, 0, 1)), pad(mask, (0, 0, 0, 1)), scores, **SUM)
    assert (float(sums["accuracy"]), float(sums["ranked"])) == (1.0, 2.0)
    assert summarise(sums, 3)["train/ranking_accuracy"] == 0.5
    log_probs, mask, scores = parts[2]
    _, sums = group_kl_loss(log_probs, mask, scores, **SUM)
    assert math.isnan(summarise(sums, 1)["train/ranking_accuracy"])


def test_a_policy_that_is_its_target_has_no_loss_and_no_gradient():
    log_probs, mask, _ = ragged()
    scores = sequence_log_probs(log_probs, mask, "sum") + 7.0  # a softmax does not see the constant
    loss, gradient = loss_and_gradient(log_probs, mask, scores)
    assert loss == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_finite_differences_agree(reduction):
    log_probs, mask, scores = ragged()
    settings = {"log_prob": reduction, "temperature": 0.7, "target_temperature": 1.3}
    assert torch.autograd.gradcheck(lambda x: group_kl_loss(x, mask, scores, **settings)[0], log_probs.requires_grad_())


def test_scores_are_constants():
    log_probs, mask, scores = ragged()
    scores.requires_grad_()
    loss, _ = group_kl_loss(log_probs.requires_grad_(), mask, scores, **SUM)
    assert torch.autograd.grad(loss, scores, allow_unused=True)[0] is None


def test_padding_of_tokens_and_of_groups_changes_nothing():
    log_probs, mask, scores = ragged()
    loss, gradient = loss_and_gradient(log_probs, mask, scores)
    junk = torch.tensor(float("nan"), dtype=torch.float64)
    wider = pad(log_probs, (0, 3, 0, 2), value=junk.item())  # three tokens more, and completions that are not there
    its_loss, its_gradient = loss_and_gradient(wider, pad(mask, (0, 3, 0, 2)), pad(scores, (0, 2), value=99.0))
    assert its_loss == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(its_gradient[:, :4, :7], gradient, atol=1e-14)
    assert not its_gradient[:, 4:].any() and not its_gradient[:, :, 7:].any()


def test_a_group_that_fills_the_batch_up_counts_nothing():
    log_probs, mask, scores = ragged()
    expected, sums = group_kl_loss(log_probs, mask, scores, **SUM)
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    log_probs, scores = torch.cat([log_probs, log_probs[:1]]).requires_grad_(), torch.cat([scores, scores[:1]])
    loss, its_sums = group_kl_loss(log_probs, mask, scores, **SUM)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert {name: float(v) for name, v in its_sums.items()} == pytest.approx({name: float(v) for name, v in sums.items()})
    assert not torch.autograd.grad(loss, log_probs)[0][5].any()


def test_the_order_of_completions_and_of_groups_changes_nothing():
    log_probs, mask, scores = ragged()
    loss, gradient = loss_and_gradient(log_probs, mask, scores)
    completions, groups = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 3])
    changed = (tensor[:, completions][groups] for tensor in (log_probs, mask, scores))
    its_loss, its_gradient = loss_and_gradient(*changed)
    assert its_loss == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(its_gradient, gradient[:, completions][groups], atol=1e-14)


@pytest.mark.parametrize("sizes", [[1, 4], [2, 3], [1, 1, 1, 1, 1]])
def test_micro_batches_sum_to_the_batch(sizes):
    log_probs, mask, scores = ragged()
    loss, gradient = loss_and_gradient(log_probs, mask, scores)
    parts = [loss_and_gradient(*part) for part in zip(*(t.split(sizes) for t in (log_probs, mask, scores)), strict=True)]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(torch.cat([part for _, part in parts]), gradient, atol=1e-14)


def test_extreme_log_probs_and_scores_stay_finite():
    log_probs, mask, scores = group([[1e-300] * 3, [0.9], [1e-300]], [1e30, -1e30, 0.0])
    for settings in ({}, {"temperature": 1e-3, "target_temperature": 1e-3}):
        loss, gradient = loss_and_gradient(log_probs, mask, scores, **settings)
        assert math.isfinite(loss) and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("values", "scores", "share"),
    [
        ([-1.0, -2.0, -3.0], [1.0, 0.0, 0.0], 1.0),
        ([-1.0, -2.0, -3.0], [0.0, 1.0, 0.0], 0.0),
        ([-1.0, -2.0, -3.0], [1.0, 1.0, 0.0], 1.0),  # either best will do
        ([-1.0, -1.0, -3.0], [1.0, 0.0, 0.0], 0.5),  # a pick among two
        ([-1.0, -1.0, -1.0], [1.0, 0.0, 1.0], 2 / 3),
        ([-1.0, -2.0, 5.0], [1.0, 0.0, 9.0], 1.0),  # the third is not there
    ],
)
def test_ranking_counts_ties_as_a_share(values, scores, share):
    present = torch.tensor([[True, True, values[2] < 0]])
    assert ranks_best_first(torch.tensor([values]), torch.tensor([scores]), present).tolist() == pytest.approx([share])
