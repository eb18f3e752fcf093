"""Policy losses: each module here is one, as the pure function `policy_loss`, chosen by `objective.policy_loss=FILE_NAME`.

    policy_loss(log_probs, inference_log_probs, advantages, response_mask, *, clip_low, clip_high) -> PolicyLoss

log_probs, inference_log_probs: float [B, T], nats, of the policy being trained and of the one that sampled, with anything
outside response_mask, bool [B, T]; advantages: float [B]; the clip is [1 - clip_low, 1 + clip_high]. Where an advantage is
0 there is no gradient. Nothing here imports torch, so that a wrong name is answered at once.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class PolicyLoss(NamedTuple):
    """What a policy loss says of each token, [B, T]; all of it is finite outside the response mask."""

    loss: "torch.Tensor"  # float, with its gradient
    clipped_low: "torch.Tensor"  # bool: the lower bound takes the ratio's place
    clipped_high: "torch.Tensor"  # bool: the upper one does
    carries: "torch.Tensor"  # bool: the token has a gradient


def names() -> list[str]:
    """The policy losses there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[..., PolicyLoss]:
    """The policy loss of that name."""
    return importlib.import_module(f"{__name__}.{name}").policy_loss
