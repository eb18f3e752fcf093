"""The reference actor: the frozen model that the policy is kept close to. It scores; it never trains."""

import os

import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

from grpo.models import DTYPES, load_model
from grpo.scoring import score, score_with_states


class ReferenceActor:
    """A Ray actor. `mixed_precision` is the trainer's: both round alike, and a policy still at its reference has KL 0."""

    def __init__(
        self,
        model: str,
        attn_implementation: str,
        device: str,
        temperature: float,
        mixed_precision: str,
        matmul_precision: str = "highest",
        in_four_bits: bool = False,
    ) -> None:
        self.name, self.attn_implementation, self.device = model, attn_implementation, torch.device(device)
        self.temperature, self.dtype, self.matmul_precision = temperature, DTYPES[mixed_precision], matmul_precision
        self.model: PreTrainedModel | None = None
        self.in_four_bits = in_four_bits

    def start(self) -> int:
        """Load the model; returns the process id."""
        torch.set_float32_matmul_precision(self.matmul_precision)
        self.model = load_model(self.name, self.device, self.attn_implementation, self.dtype, self.in_four_bits)
        if self.in_four_bits:  # what is not, such as embeddings and norms; the codes are no floating point numbers
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtype)
        return os.getpid()

    def score(self, batch: TensorDict) -> torch.Tensor:
        """reference_log_probs, float32 [B, T], for rollouts [B] with tokens, prompt_length and response_mask."""
        rows = self._rows(batch)
        return score(self.model, *rows, self.temperature).cpu()

    def score_with_states(self, batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """The same and its anchor_states, float16 [B, T, D]."""
        rows = self._rows(batch)
        return tuple(part.cpu() for part in score_with_states(self.model, *rows, self.temperature))

    def _rows(self, batch: TensorDict) -> tuple[torch.Tensor, ...]:
        if self.model is None:  # this process took the place of one that had died
            self.start()
        batch = batch.to(self.device)
        return batch["tokens"], batch["prompt_length"], batch["response_mask"]
