"""Several training ranks, engines and references: the same run as with one of each, up to rounding."""

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from grpo.builtin import demonstration
from grpo.config import ObjectiveConfig, OptimizerConfig, TrainConfig, TrainModelConfig
from grpo.models import load_model, load_tokenizer, score
from grpo.pools import TrainerPool
from grpo.rollout import Completions, pack
from grpo.tasks.arithmetic import question, split_expressions
from grpo.trainer import TrainerActor, TrainerSpec

TRANSFORMERS = "inference_model.backend=transformers"


@pytest.fixture
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def ragged_batch(model_path: str) -> TensorDict:
    """Sixteen responses of the model's kind, cut to 1 to 16 tokens, off-policy by some tenths of a nat."""
    tokenizer, model = load_tokenizer(model_path), load_model(model_path, torch.device("cpu"))
    expressions = split_expressions()["train"][::150][:16]
    prompts = [tokenizer(f"<|user|>{question(e)}<|end|><|assistant|>")["input_ids"] for e in expressions]
    responses = [tokenizer(demonstration(e, right=i % 2 == 0))["input_ids"][: i + 1] for i, e in enumerate(expressions)]
    flat = np.array([token for response in responses for token in response])
    length = np.array([len(response) for response in responses])
    log_probs, versions = np.zeros(len(flat), np.float32), np.zeros(len(flat), np.int32)
    completions = Completions(np.arange(16), length, length > 0, flat, log_probs, versions)
    batch = pack(prompts, completions)
    own = score(model, batch["tokens"], batch["prompt_length"], batch["response_mask"], 1.0)
    generator = torch.Generator().manual_seed(0)
    for key in ("inference_log_probs", "reference_log_probs"):
        noise = 0.3 * torch.randn(own.shape, generator=generator)
        batch[key] = torch.where(batch["response_mask"], own + noise, 0.0)
    batch["advantage"] = torch.randn(16, generator=generator)
    return batch


def weights_after_a_step(model_path: str, path, ranks: int, micro_batches: int) -> tuple[dict, dict, torch.Tensor]:
    """One SGD step of rate 1, so that weights differ by the gradient; with its metrics and log-probs."""
    spec = TrainerSpec(
        model_path,
        "eager",
        "cpu",
        1.0,
        0,
        TrainModelConfig(),
        ObjectiveConfig(),
        TrainConfig(kl_to_ref_coeff=0.1, entropy_coeff=0.01),
        OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, clip_grad_norm=1e9),
        uses_reference=True,
    )
    actors = [ray.remote(num_cpus=1)(TrainerActor).remote(spec) for _ in range(ranks)]
    rendezvous = ray.get(actors[0].open_rendezvous.remote(), timeout=60)
    ray.get([actor.start.remote(rank, ranks, rendezvous, 60.0) for rank, actor in enumerate(actors)], timeout=60)
    pool = TrainerPool(actors, micro_batches, None, 60.0)
    metrics, log_probs = pool.step(ragged_batch(model_path), 1, with_log_probs=True)
    pool.export(path)
    for actor in actors:
        ray.kill(actor)
    return load_file(path / "model.safetensors"), metrics, log_probs


def test_gradients_agree_over_ranks_and_micro_batches(cluster, model_path, tmp_path):
    splits = {(1, 1): None, (1, 4): None, (2, 1): None, (2, 4): None}
    for i, (ranks, micro_batches) in enumerate(splits):
        splits[ranks, micro_batches] = weights_after_a_step(model_path, tmp_path / str(i), ranks, micro_batches)
    start = dict(load_model(model_path, torch.device("cpu")).named_parameters())
    whole, metrics, log_probs = splits[1, 1]
    largest = max((whole[name] - start[name]).abs().max() for name in start)  # entry of the gradient
    assert largest > 0.03
    for split, (weights, its_metrics, its_log_probs) in splits.items():
        assert max((whole[name] - weights[name]).abs().max() for name in whole) < 1e-6, (split, largest)
        assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert torch.allclose(its_log_probs, log_probs, atol=1e-5)


def test_two_of_each_role_train_as_one_of_each_does(run_sync):
    one = run_sync(TRANSFORMERS)
    two = run_sync(TRANSFORMERS, "train_model.num_devices=2", "inference_model.num_devices=2", "ref_model.num_devices=2")
    assert len(two.rollouts) == len(one.rollouts)
    largest = max(abs(a - b) for r in two.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert largest < 1e-5  # both engines got every push
    assert [row["policy_version"] for row in two.metrics] == [0, 1, 2]
    assert two.metrics[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert two.metrics[2]["train/kl_to_reference"] > 1e-4
    assert {line["group_id"] for line in two.rollouts} == {line["group_id"] for line in one.rollouts}
