import torch

from grpo.reference import ReferenceActor
from grpo.scoring import token_log_probs

from .conftest import ragged_rollouts


def test_the_reference_scores_response_tokens_as_its_model_does_under_the_temperature(model, model_path):
    batch = ragged_rollouts()
    with torch.no_grad():
        log_probs, _ = token_log_probs(model, batch["tokens"], 1, 0.7)
    actor = ReferenceActor(model_path, "eager", "cpu", 0.7, "none")
    actor.start()
    scored = actor.score(batch.select("tokens", "prompt_length", "response_mask"))
    assert torch.allclose(scored, torch.where(batch["response_mask"], log_probs, 0.0), atol=1e-5)
    assert not scored[~batch["response_mask"]].any()
