"""Held-out accuracy: greedy responses to problems that training never saw, graded by the task."""

from transformers import PreTrainedTokenizerBase

from grpo.grading import GradingPool
from grpo.inference import Sampling
from grpo.pools import EnginePool
from grpo.tasks import EncodedProblems


def accuracy(
    engines: EnginePool,
    grading: GradingPool,
    data: EncodedProblems,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int | None = 0,
) -> dict[str, float]:
    """{"accuracy": share of right answers in [0, 1], "n": problems} of the engines' current weights.

    Greedy, so nothing is drawn; training reseeds the engines for every collection, so its stream stays as it was.
    """
    sampling = Sampling(num_responses=1, max_tokens=max_tokens, temperature=0.0)
    completions = engines.generate(data.prompts, sampling, seed)
    texts = tokenizer.batch_decode(completions.responses(), skip_special_tokens=True)
    right = [grade.correct for grade in grading.grade(data.problems, texts)]
    return {"accuracy": sum(right) / len(right), "n": len(right)}
