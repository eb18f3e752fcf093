"""The training actor as a plain object: one rank, no Ray cluster."""

import math
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo.builtin import Recipe, make_tokenizer
from grpo.config_sections import (
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantizationConfig,
    TrainConfig,
    TrainModelConfig,
)
from grpo.errors import CheckpointError, TrainingError
from grpo.four_bit import four_bit_layers
from grpo.launch import CONFIG_DIR, compose
from grpo.models import add_lora, base_parameters, full_parameters, load_model, lora_layers
from grpo.objectives.online import divisor
from grpo.objectives.transport import transport_cost
from grpo.reference import ReferenceActor
from grpo.scoring import score, token_log_probs
from grpo.trainer import TrainerActor, TrainerSpec
from grpo.transports import SharedMemoryReceiver
from grpo.weight_sync import checksum, probe_vector

from .conftest import CPU, ragged_rollouts, tiny_model

PENALTIES = {"kl_to_ref_coeff": 0.3, "kl_to_inference_coeff": 0.1, "entropy_coeff": 0.02}
LARGE_STEPS = OptimizerConfig(name="sgd", lr=0.5, warmup_steps=0, clip_grad_norm=1e9)


class OneRank(TrainerActor):
    """Takes whole batches, as TrainerPool gives them to a single rank."""

    def step(self, batch: TensorDict, with_log_probs: bool = False):
        parts, update = self.spec.train.gradient_accumulation_steps, bool(batch["advantage"].any())
        return super().step(batch, [len(batch) // parts] * parts, parts * update, len(batch), with_log_probs)


@pytest.fixture
def make_trainer(model_path, monkeypatch):
    """Start a trainer; the one before it ends."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    started: list[TrainerActor] = []

    def stop() -> None:
        if started:
            started.pop()
            dist.destroy_process_group()

    def make(
        optimizer: OptimizerConfig = LARGE_STEPS,
        uses_reference: bool = True,
        train_model: TrainModelConfig | None = None,
        seed: int = 0,
        model: str = model_path,
        device: str = "cpu",
        objective: ObjectiveConfig | None = None,
        **train,
    ) -> TrainerActor:
        stop()
        spec = TrainerSpec(
            model=model,
            attn_implementation="eager",
            device=device,
            temperature=0.9,
            seed=seed,
            train_model=train_model or TrainModelConfig(),
            objective=objective or ObjectiveConfig(),
            train=TrainConfig(**(PENALTIES | train)),
            optimizer=optimizer,
            uses_reference=uses_reference,
            charges_divergence=uses_reference and train.get("kl_coef_in_loss", True) and train.get("kl_to_ref_coeff", 1) > 0,
        )
        trainer = OneRank(spec)
        assert trainer.start(0, 1, trainer.open_rendezvous(), 60.0) == os.getpid()
        started.append(trainer)
        return trainer

    yield make
    stop()


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


@pytest.fixture
def batch(model) -> TensorDict:
    return on_policy(ragged_rollouts(), model)


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


def test_a_step_is_gradient_descent_on_the_documented_loss(make_trainer, model, batch):
    trainer = make_trainer()
    start = weights(trainer)
    metrics, log_probs = trainer.step(batch)
    loss = plain_loss(model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    expected = {name: start[name] - 0.5 * gradients[name] for name in start}
    assert largest_difference(weights(trainer), expected) < 1e-5
    assert largest_difference(weights(trainer), start) > 1e-2
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["train/skipped_updates"] == 0
    assert log_probs is None


TRANSPORT = ObjectiveConfig(divergence="ot", ot_window=3, ot_target=0.01)


def with_anchor(batch: TensorDict) -> TensorDict:
    """And hidden states of another model to compare with."""
    states, _ = hidden_states(tiny_model(seed=1), batch)
    batch["anchor_states"] = (states * batch["response_mask"][..., None]).detach().half()
    return batch


def hidden_states(model, batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions [B, T, D] of the states that each token is predicted from, as transformers gives them; and the logits."""
    out = model(input_ids=batch["tokens"], output_hidden_states=True)
    states = torch.nn.functional.normalize(out.hidden_states[-1], dim=-1)
    return torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0)), out.logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_transport_penalty_reaches_the_weights_through_the_hidden_states(make_trainer, model, batch, checkpointing):
    batch, gradients, losses = with_anchor(batch), [], []
    mask = batch["response_mask"]
    cost = transport_cost(hidden_states(model, batch)[0], batch["anchor_states"], mask, window=3, epsilon=0.1, iterations=5)
    expected = 0.3 * (cost - 0.01).clamp_min(0).mean()
    expected.backward()
    assert (cost > 0.01).all()
    for coefficient in (0.0, 0.3):
        trainer = make_trainer(
            objective=TRANSPORT,
            train_model=TrainModelConfig(gradient_checkpointing=checkpointing),
            kl_to_ref_coeff=coefficient,
            gradient_accumulation_steps=4,
        )
        start = weights(trainer)
        metrics, _ = trainer.step(batch)
        after = weights(trainer)
        gradients.append({name: (start[name] - after[name]) / 0.5 for name in start})
        losses.append(metrics["train/loss"])
    assert losses[1] - losses[0] == pytest.approx(expected.item(), rel=1e-3)
    share = batch["response_length"] / batch["response_length"].sum()
    assert metrics["train/transport"] == pytest.approx((cost * share).sum().item(), rel=1e-3)
    assert metrics["train/over_margin"] == 1
    largest = 0.0
    for name, parameter in model.named_parameters():
        difference = gradients[1][name] - gradients[0][name]
        assert torch.allclose(difference, parameter.grad, atol=2e-5), name
        largest = max(largest, float(parameter.grad.abs().max()))
    assert largest > 1e-2


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(enabled=True, r=4)], ids=["whole", "lora"])
def test_anchors_are_the_policys_own_states_or_those_without_adapters(make_trainer, model_path, batch, lora):
    first = load_model(model_path, CPU)
    trainer = make_trainer(train_model=TrainModelConfig(lora=lora), kl_to_ref_coeff=0.0)
    trainer.step(batch)

    def largest(states: torch.Tensor, model) -> float:
        expected = hidden_states(model, batch)[0]
        assert states.dtype == torch.float16
        assert not states[~batch["response_mask"]].any()
        return float((states.float() - expected)[batch["response_mask"]].abs().max())

    log_probs, states = trainer.score_with_states(batch)
    assert torch.equal(log_probs, trainer.score(batch))
    own_log_probs, own_states = trainer.own_states(batch)
    if lora.enabled:
        assert largest(states, first) < 1e-3
        assert largest(own_states, first) > 1e-2
        assert (own_log_probs - log_probs).abs().max() > 1e-2
    first.load_state_dict({name: tensor.clone() for name, tensor in full_parameters(trainer.model)}, strict=False)
    assert largest(own_states, first) < 1e-3
    reference = ReferenceActor(model_path, "eager", "cpu", 0.9, "none")
    reference.start()
    its_log_probs, its_states = reference.score_with_states(batch)
    assert largest(its_states, load_model(model_path, CPU)) < 1e-3
    assert torch.equal(its_log_probs, reference.score(batch))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "objective").glob("*.yaml")))
def test_micro_batches_take_the_same_step_under_every_preset(make_trainer, batch, name):
    config, batch = compose("grpo_arithmetic", [f"objective={name}"]), with_anchor(batch)
    # Off-policy by a tenth of a nat, so that ratios lie on both sides of most bounds.
    count, train = divisor(config.objective.aggregation, 24)(batch["response_length"]), config.train
    results = []
    for sizes in ([8], [3, 1, 4]):
        trainer = make_trainer(
            objective=config.objective,
            uses_reference=config.uses_reference,
            kl_to_ref_coeff=0.3 if config.diverges else 0.0,
            kl_coef_in_loss=train.kl_coef_in_loss,
            is_correction=train.is_correction,
        )
        start = weights(trainer)
        metrics, _ = TrainerActor.step(trainer, batch, sizes, len(sizes), count, False)
        results.append((weights(trainer), metrics))
        assert largest_difference(results[-1][0], start) > 1e-4
    (whole, metrics), (split, its_metrics) = results
    assert largest_difference(whole, split) < 1e-6
    assert its_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())
    assert ("train/penalty" in metrics) is (config.diverges and train.kl_coef_in_loss)
    assert ("train/transport" in metrics) is (name == "ot")
    corrected = train.is_correction != "none"
    assert ("train/is_raw_max" in metrics) is corrected
    of_sampler = "is_raw" if corrected else "ratio"  # what compares with the policy that sampled
    assert metrics[f"train/{of_sampler}_max"] > metrics[f"train/{of_sampler}_mean"] > 0
    assert 0 < metrics["train/ess"] < 0.999


def test_micro_batches_take_the_step_of_the_whole_batch(make_trainer, batch):
    results = {}
    for accumulation in (1, 2, 4, 8):
        trainer = make_trainer(gradient_accumulation_steps=accumulation)
        start = weights(trainer)
        metrics, log_probs = trainer.step(batch, with_log_probs=True)
        results[accumulation] = weights(trainer), metrics, log_probs
        assert largest_difference(results[accumulation][0], start) > 1e-2
    whole = results.pop(1)
    for after, metrics, log_probs in results.values():
        assert largest_difference(after, whole[0]) < 1e-6
        assert metrics == pytest.approx(whole[1], rel=1e-4, abs=1e-6)
        assert torch.allclose(log_probs, whole[2], atol=1e-5)


def test_gradients_do_not_leak_from_one_step_into_the_next(make_trainer, batch):
    trainer = make_trainer(replace(LARGE_STEPS, lr=1e-9))
    first, _ = trainer.step(batch)
    second, _ = trainer.step(batch)
    assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=1e-4)


def test_padding_and_permutation_do_not_change_the_step(make_trainer, batch):
    trainer = make_trainer(gradient_accumulation_steps=2)
    trainer.step(batch)
    expected = weights(trainer)
    changed = batch[torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])]
    for key in ("tokens", "response_mask", "inference_log_probs", "reference_log_probs", "token_versions"):
        changed[key] = torch.nn.functional.pad(changed[key], (0, 6))
    trainer = make_trainer(gradient_accumulation_steps=2)
    trainer.step(changed)
    assert largest_difference(weights(trainer), expected) < 1e-6


def test_a_batch_without_advantages_leaves_the_weights_bit_equal_and_is_counted(make_trainer, batch):
    trainer = make_trainer(OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.1, warmup_steps=4))
    start = weights(trainer)
    signal = batch["advantage"]
    batch["advantage"] = torch.zeros(8)
    metrics, log_probs = trainer.step(batch, with_log_probs=True)
    after = weights(trainer)
    assert all(torch.equal(after[name], start[name]) for name in start)
    assert metrics["train/skipped_updates"] == 1
    assert metrics["train/grad_norm"] == 0
    assert metrics["train/kl_to_reference"] > 0  # what would have moved them
    assert log_probs[batch["response_mask"]].any()
    # The schedule did not move on either.
    batch["advantage"] = signal
    metrics, _ = trainer.step(batch)
    assert metrics["train/lr"] == pytest.approx(0.1 / 4)
    assert metrics["train/skipped_updates"] == 0
    assert largest_difference(weights(trainer), start) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_returned_log_probs_are_those_of_the_model_before_the_step(make_trainer, model_path, batch, accumulation):
    optimizer = OptimizerConfig(name="sgd", lr=0.05, warmup_steps=0, clip_grad_norm=1e9)
    trainer = make_trainer(optimizer, gradient_accumulation_steps=accumulation)
    before = load_model(model_path, CPU)
    trainer.step(batch)
    middle = {name: tensor.clone() for name, tensor in full_parameters(trainer.model)}
    _, log_probs = trainer.step(batch, with_log_probs=True)
    before.load_state_dict(middle, strict=False)
    with torch.no_grad():
        expected, _ = token_log_probs(before, batch["tokens"], 1, 0.9)
    assert torch.allclose(log_probs, torch.where(batch["response_mask"], expected, 0.0), atol=1e-5)
    _, later = trainer.step(batch, with_log_probs=True)
    assert (later - log_probs).abs().max() > 1e-3


def test_the_learning_rate_ramps_up_linearly_and_then_stays(make_trainer, batch):
    trainer = make_trainer(OptimizerConfig(name="sgd", lr=0.4, warmup_steps=4, clip_grad_norm=1e9))
    rates, moved = [], []
    for _ in range(6):
        start = weights(trainer)
        metrics, _ = trainer.step(batch)
        rates.append(metrics["train/lr"])
        squares = sum(float((tensor - start[name]).double().square().sum()) for name, tensor in weights(trainer).items())
        moved.append(math.sqrt(squares) / metrics["train/grad_norm"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert moved == pytest.approx(rates, rel=1e-3)  # the rate that is reported is the one used


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(make_trainer, batch):
    trainer = make_trainer(OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, clip_grad_norm=0.01))
    start = weights(trainer)
    metrics, _ = trainer.step(batch)
    squares = sum(float((tensor - start[name]).double().square().sum()) for name, tensor in weights(trainer).items())
    assert metrics["train/grad_norm"] > 0.1
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_adaptive_optimisers_move_each_weight_by_the_learning_rate_at_first(make_trainer, batch, name):
    trainer = make_trainer(OptimizerConfig(name=name, lr=0.01, warmup_steps=0))
    start = weights(trainer)
    trainer.step(batch)
    after = weights(trainer)
    moved = (after["model.norm.weight"] - start["model.norm.weight"]).abs()
    assert moved.tolist() == pytest.approx([0.01] * 16, rel=1e-2)


def test_adamws_weight_decay_is_decoupled_and_scaled_by_the_rate(make_trainer, batch):
    after = {}
    for decay in (0.0, 0.5):
        trainer = make_trainer(OptimizerConfig(name="adamw", lr=0.01, warmup_steps=2, weight_decay=decay))
        start = weights(trainer)
        trainer.step(batch)
        after[decay] = weights(trainer)
    # The first of two ramp steps has half the rate: each weight shrinks by 0.005 x 0.5 of itself.
    expected = {name: after[0.0][name] - 0.0025 * start[name] for name in start}
    assert largest_difference(after[0.5], expected) < 1e-6


def test_without_a_reference_its_term_and_metric_are_gone(make_trainer, batch):
    with_reference = make_trainer()
    with_reference.step(batch)
    expected = weights(with_reference)
    trainer = make_trainer(uses_reference=False)
    metrics, _ = trainer.step(batch.exclude("reference_log_probs"))
    assert "train/kl_to_reference" not in metrics
    assert largest_difference(weights(trainer), expected) > 1e-4


def test_a_reference_term_in_the_reward_is_not_in_the_loss_too_but_is_measured(make_trainer, batch):
    trainer = make_trainer(kl_coef_in_loss=False)
    metrics, _ = trainer.step(batch)
    in_reward = weights(trainer)
    assert metrics["train/kl_to_reference"] > 0
    trainer = make_trainer(kl_to_ref_coeff=0.0)
    trainer.step(batch)
    assert largest_difference(weights(trainer), in_reward) == 0


def test_a_push_sends_the_stepped_weights_and_says_what_it_sent(make_trainer, batch):
    trainer = make_trainer()
    description, tied, _ = trainer.open_pushes("shared_memory", "float32", 1, 5.0)
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    receiver = SharedMemoryReceiver(description, "the engine", 0, CPU)
    trainer.join_pushes()
    start = weights(trainer)
    sent = trainer.push(1)
    assert largest_difference(dict(receiver.receive(1)), start) == 0
    assert receiver.arrived == sent.checksums == {name: checksum(tensor) for name, tensor in start.items()}
    trainer.step(batch)
    assert largest_difference(dict(receiver.receive(1)), start) == 0  # engines see a step only once it is pushed
    trainer.project(["model.layers.0.mlp.up_proj.weight"])
    sent = trainer.push(2)
    assert largest_difference(dict(receiver.receive(2)), weights(trainer)) == 0
    assert largest_difference(weights(trainer), start) > 1e-2
    assert sent.version == 2
    stepped = weights(trainer)["model.layers.0.mlp.up_proj.weight"]
    expected = stepped @ probe_vector(stepped.shape[1])
    assert np.allclose(sent.projections["model.layers.0.mlp.up_proj.weight"], expected, atol=1e-5)


def test_the_exported_model_reloads_with_the_stepped_weights(make_trainer, batch, tmp_path):
    trainer = make_trainer()
    start = weights(trainer)
    trainer.step(batch)
    trainer.export(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert largest_difference(dict(reloaded.named_parameters()), weights(trainer)) == 0
    assert largest_difference(dict(reloaded.named_parameters()), start) > 1e-2
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("1+2=3")["input_ids"] == AutoTokenizer.from_pretrained(trainer.spec.model)("1+2=3")["input_ids"]
    trainer.step(batch)  # exporting leaves the trainer able to go on


# For 8 and 11 bits, and for weights this wild: of a gradient relative to its norm, and of a log-prob in nats.
TOLERANCE = {"bf16": (0.12, 0.3), "fp16": (0.015, 0.04)}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_rounds_the_passes_and_keeps_weights_and_optimiser_in_float32(make_trainer, batch, precision):
    # Ratios of 1, far from where the clip cuts gradients off.
    _, batch["inference_log_probs"] = make_trainer().step(batch, with_log_probs=True)
    relative, nats = TOLERANCE[precision]
    trainer = make_trainer()
    start = weights(trainer)
    exact, exact_log_probs = trainer.step(batch, with_log_probs=True)
    gradient = {name: start[name] - tensor for name, tensor in weights(trainer).items()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    trainer = make_trainer(mixed_precision=precision)
    metrics = {"train/overflows": 1}
    while metrics.get("train/overflows"):  # until fp16 has found its scale
        metrics, log_probs = trainer.step(batch, with_log_probs=True)
    after = weights(trainer)
    error = math.sqrt(sum(float((start[name] - after[name] - g).square().sum()) for name, g in gradient.items()))
    assert 1e-5 < error / norm < relative  # it is rounded, and it is the gradient
    assert 1e-5 < (log_probs - exact_log_probs).abs().max() < nats
    assert log_probs.dtype == torch.float32
    assert metrics["train/grad_norm"] == pytest.approx(exact["train/grad_norm"], rel=relative)
    assert metrics["train/loss"] == pytest.approx(exact["train/loss"], rel=relative)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    trainer = make_trainer(OptimizerConfig(name="adamw", lr=1e-3), mixed_precision=precision)
    while trainer.step(batch)[0].get("train/overflows"):
        pass
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert len(states) > 0
    assert {tensor.dtype for tensor in states} == {torch.float32}


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_the_reference_rounds_as_the_trainer_does(make_trainer, batch, model_path, precision):
    trainer = make_trainer(mixed_precision=precision)
    reference = ReferenceActor(model_path, "eager", "cpu", 0.9, precision)
    reference.start()
    batch["reference_log_probs"] = reference.score(batch)
    assert batch["reference_log_probs"].dtype == torch.float32
    metrics, log_probs = trainer.step(batch, with_log_probs=True)
    assert torch.allclose(log_probs, batch["reference_log_probs"], atol=1e-5)
    assert abs(metrics["train/kl_to_reference"]) < 1e-6


def test_weights_are_whole_and_unrounded_after_a_step_that_left_them(make_trainer, batch):
    trainer = make_trainer(mixed_precision="bf16")
    description, _, dtype = trainer.open_pushes("shared_memory", "float32", 1, 5.0)
    assert dtype == "bfloat16"
    receiver = SharedMemoryReceiver(description, "the engine", 0, CPU)
    trainer.join_pushes()
    start = weights(trainer)
    batch["advantage"] = torch.zeros(8)
    trainer.step(batch)
    trainer.push(1)
    assert largest_difference(dict(receiver.receive(1)), start) == 0
    assert any(bool((tensor != tensor.bfloat16()).any()) for tensor in start.values())


def test_the_scale_is_a_metric_of_fp16_alone(make_trainer, batch):
    batch["advantage"] *= 0.01
    for precision, present in (("none", False), ("bf16", False), ("fp16", True)):
        metrics, _ = make_trainer(kl_to_ref_coeff=0.0, mixed_precision=precision).step(batch)
        assert ("train/grad_scale" in metrics) is ("train/overflows" in metrics) is present
    assert (metrics["train/grad_scale"], metrics["train/overflows"]) == (2**16, 0)


def test_an_overflow_skips_the_step_lowers_the_scale_and_is_counted(make_trainer, batch):
    trainer = make_trainer(OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.1, warmup_steps=4), mixed_precision="fp16")
    start = weights(trainer)
    large = batch.clone().update({"advantage": 1e6 * batch["advantage"]})
    for overflows in (1, 2):
        metrics, _ = trainer.step(large)
        assert (metrics["train/overflows"], metrics["train/grad_norm"]) == (1, 0)
        assert metrics["train/grad_scale"] == 2.0 ** (16 - overflows)
        assert all(torch.equal(tensor, start[name]) for name, tensor in weights(trainer).items())
    assert not trainer.optimizer.state
    metrics, _ = trainer.step(batch)  # the scale stays lowered, and the schedule begins only now
    assert (metrics["train/overflows"], metrics["train/grad_scale"], metrics["train/lr"]) == (0, 2**14, 0.1 / 4)
    assert metrics["train/grad_norm"] > 0
    assert largest_difference(weights(trainer), start) > 1e-3


def test_gradients_that_overflow_at_any_scale_end_in_an_error(make_trainer, batch):
    trainer = make_trainer(mixed_precision="fp16")
    start = weights(trainer)
    broken = batch.clone().update({"advantage": batch["advantage"] * 1e30})
    for _ in range(16):
        trainer.step(broken)
    with pytest.raises(TrainingError, match=r"train.mixed_precision \(fp16\): gradients overflow even when scaled by 0.5"):
        trainer.step(broken)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(trainer).items())


LORA = LoraConfig(enabled=True, r=4, alpha=8.0)


@pytest.mark.parametrize("lora", [LoraConfig(), LORA, replace(LORA, dropout=0.3)], ids=["whole", "lora", "dropout"])
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_checkpointing_runs_layers_again_saves_less_and_changes_nothing(make_trainer, batch, lora, precision):
    results = {}
    for on in (False, True):
        trainer = make_trainer(
            train_model=TrainModelConfig(gradient_checkpointing=on, lora=lora),
            mixed_precision=precision,
            gradient_accumulation_steps=2,
        )
        runs, saved = [], {}
        for module in trainer.model.modules():
            if type(module).__name__ == "Qwen2MLP":
                module.register_forward_pre_hook(lambda *_: runs.append(1))  # noqa: B023

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
            return tensor

        first, _ = trainer.step(batch)
        after = weights(trainer)
        assert len(runs) == 2 * 2 * (2 if on else 1)  # micro-batches, layers, passes
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer._loss(batch)
        results[on] = after, first, sum(saved.values())
    assert largest_difference(results[True][0], results[False][0]) == 0
    assert results[True][1] == results[False][1]
    assert results[True][2] < 0.6 * results[False][2]


def test_checkpointing_leaves_dropout_off(tmp_path, make_trainer, batch, model_path):
    config = AutoConfig.from_pretrained(model_path)
    config.attention_dropout = 0.5
    shutil.copytree(model_path, tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    results = []
    for path in (model_path, str(tmp_path / "model")):
        trainer = make_trainer(train_model=TrainModelConfig(gradient_checkpointing=True), model=path)
        trainer.step(batch)
        results.append(weights(trainer))
    assert largest_difference(*results) == 0


def base_weights(trainer: TrainerActor) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().clone() for name, parameter in base_parameters(trainer.model)}


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_lora_trains_the_adapters_and_pushes_and_exports_them_merged(make_trainer, batch, tmp_path, model_path, precision):
    optimizer = OptimizerConfig(name="adamw", lr=0.05, warmup_steps=0)
    trainer = make_trainer(optimizer, train_model=TrainModelConfig(lora=LORA), mixed_precision=precision)
    description, _, _ = trainer.open_pushes("shared_memory", "float32", 1, 5.0)
    receiver = SharedMemoryReceiver(description, "the engine", 0, CPU)
    trainer.join_pushes()
    plain = dict(load_model(model_path, CPU).named_parameters())
    assert largest_difference(weights(trainer), plain) == 0
    for _ in range(3):
        trainer.step(batch)
    assert largest_difference(base_weights(trainer), plain) == 0
    merged = weights(trainer)
    assert largest_difference(merged, plain) > 1e-2
    # The optimiser knows the adapters alone: an A and a B for each of 7 linear layers in 2 layers.
    assert len(trainer.optimizer.state) == len(trainer.trainable) == 2 * 7 * 2
    trainer.push(1)
    assert largest_difference(dict(receiver.receive(1)), merged) == 0
    trainer.export(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(reloaded).__name__ == "Qwen2ForCausalLM"
    assert reloaded.config.architectures == ["Qwen2ForCausalLM"]
    assert largest_difference(dict(reloaded.named_parameters()), merged) == 0
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    adapter = PeftModel.from_pretrained(load_model(model_path, CPU), tmp_path / "adapter").eval()
    inputs = {"input_ids": batch["tokens"], "use_cache": False}
    with torch.no_grad():
        expected, ours = reloaded.eval()(**inputs).logits, adapter(**inputs).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    assert (load_model(model_path, CPU)(**inputs).logits - expected).abs().max() > 0.1
    trainer.step(batch)  # exporting leaves the trainer able to go on


def test_the_first_lora_step_is_gradient_descent_on_the_adapters(make_trainer, batch, model_path):
    trainer = make_trainer(replace(LARGE_STEPS, lr=0.1), train_model=TrainModelConfig(lora=LORA), seed=7)
    start = weights(trainer)
    trainer.step(batch)
    model = add_lora(load_model(model_path, CPU, "eager"), LORA, 7)
    plain_loss(model, batch).backward()
    # B is 0 at first: A has no gradient, and W + 2 B A moves by -0.1 x 2 (dL/dB) A.
    for name, layer in lora_layers(model.get_base_model()):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        moved = weights(trainer)[f"{name}.weight"] - start[f"{name}.weight"]
        assert not a.grad.any()
        assert b.grad.abs().max() > 1e-4
        assert torch.allclose(moved, -0.2 * b.grad @ a, atol=1e-6)


def test_the_trainer_scores_the_reference_without_its_adapters(make_trainer, batch, model_path):
    reference = ReferenceActor(model_path, "eager", "cpu", 0.9, "none")
    reference.start()
    expected = reference.score(batch)
    dropout = TrainModelConfig(lora=replace(LORA, dropout=0.2), gradient_checkpointing=True)
    trainer = make_trainer(OptimizerConfig(name="adamw", lr=0.05, warmup_steps=0), train_model=dropout)
    assert torch.equal(trainer.score(batch), expected)
    for _ in range(2):
        trainer.step(batch)
    assert torch.equal(trainer.score(batch), expected)
    scored = trainer.score(batch)
    assert not scored.requires_grad
    _, log_probs = trainer.step(batch, with_log_probs=True)
    assert (log_probs - expected).abs().max() > 0.1


def test_scoring_between_steps_leaves_the_training_as_it_was(make_trainer, batch):
    results = []
    for scores in (False, True):
        trainer = make_trainer(train_model=TrainModelConfig(lora=LORA), mixed_precision="bf16")
        for _ in range(2):
            if scores:
                trainer.score(batch)
            trainer.step(batch)
        if scores:
            trainer.score(batch)
        results.append(weights(trainer))
    assert largest_difference(*results) == 0


def test_lora_dropout_is_drawn_from_the_seed_and_only_while_updating(make_trainer, batch):
    def run(dropout: float, seed: int) -> tuple[dict, torch.Tensor]:
        trainer = make_trainer(
            OptimizerConfig(name="adamw", lr=0.05, warmup_steps=0),
            train_model=TrainModelConfig(lora=replace(LORA, dropout=dropout)),
            seed=seed,
        )
        torch.manual_seed(seed)  # start did it too; making the trainers of this test must not matter
        for _ in range(2):
            trainer.step(batch)
        still = batch.clone().update({"advantage": torch.zeros(8)})
        scores = [trainer.step(still, with_log_probs=True)[1] for _ in range(2)]
        assert torch.equal(*scores)
        return weights(trainer), scores[0]

    with_dropout = run(0.5, 0)
    assert largest_difference(run(0.5, 0)[0], with_dropout[0]) == 0
    assert largest_difference(run(0.0, 0)[0], with_dropout[0]) > 1e-3


def test_a_model_that_cannot_be_written_is_said_in_one_line(make_trainer, tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("grpo.trainer.export", full)
    with pytest.raises(CheckpointError, match=r"^Error while serializing: I/O error: No space left on device$"):
        make_trainer().export(tmp_path / "model")


def test_buffers_that_a_model_saves_are_exported_too(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.model.model.register_buffer("extra", torch.tensor([1.0, 2.0]))
    trainer.export(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert state["model.extra"].tolist() == [1.0, 2.0]
    assert state.keys() - {"model.extra"} == weights(trainer).keys()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_gets_every_weight_and_buffer_a_layer_at_a_time(make_trainer, batch, precision):
    train_model = TrainModelConfig(lora=LORA, gradient_checkpointing=True)
    trainer = make_trainer(train_model=train_model, mixed_precision=precision, device="cuda")
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    own = make_trainer(train_model=train_model, mixed_precision=precision)
    expected = own.score(batch)
    trainer = make_trainer(train_model=train_model, mixed_precision=precision, device="cuda")
    assert (trainer.score(batch) - expected).abs().max() < 1.0  # positions are rotated alike
    metrics, _ = trainer.step(batch)
    assert metrics["train/skipped_updates"] == 0


def test_rollouts_without_advantage_or_penalty_need_no_backward_pass(make_trainer, batch):
    """Same weights, same metrics and log-probs as with one; only their own pass is without gradient."""
    batch["advantage"][[0, 2, 5]] = 0.0
    plain = {"kl_to_ref_coeff": 0.0, "kl_to_inference_coeff": 0.0, "entropy_coeff": 0.0}
    trainer = make_trainer(**plain)
    metrics, log_probs = trainer.step(batch, with_log_probs=True)
    expected = weights(trainer)
    rows = torch.tensor([1, 3, 4, 6, 7, 0, 2, 5])
    trainer = make_trainer(**plain)
    its_metrics, its_log_probs = TrainerActor.step(trainer, batch[rows], [3, 2, 3], 2, 8, True)
    assert largest_difference(weights(trainer), expected) < 1e-6
    assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert torch.allclose(its_log_probs, log_probs[rows], atol=1e-5)
    trainer = make_trainer(**plain)
    TrainerActor.step(trainer, batch[rows], [3, 2, 3], 1, 8, False)  # a rollout with advantage left out does differ
    assert largest_difference(weights(trainer), expected) > 1e-4


def test_a_step_behind_a_pass_without_gradient_computes_with_the_weights_of_the_step_before(make_trainer, batch):
    """FSDP leaves the root gathered behind such a pass: with stale weights the two differ by more than 1."""
    batch["advantage"][[0, 2, 5]] = 0.0
    plain, rows = {"kl_to_ref_coeff": 0.0, "kl_to_inference_coeff": 0.0, "entropy_coeff": 0.0}, [1, 3, 4, 6, 7, 0, 2, 5]
    trainer = make_trainer(**plain)
    for _ in range(2):
        trainer.step(batch)
    expected = weights(trainer)
    trainer = make_trainer(**plain)
    for _ in range(2):
        TrainerActor.step(trainer, batch[torch.tensor(rows)], [3, 2, 3], 2, 8, False)
    assert largest_difference(weights(trainer), expected) < 1e-5  # two steps' rounding; 4e-6 was seen


ADAM = OptimizerConfig(name="adamw", lr=1e-2, warmup_steps=5)
ADAPTED = TrainModelConfig(lora=LoraConfig(enabled=True, r=4, dropout=0.3))


def state_of(trainer: TrainerActor) -> dict[str, torch.Tensor]:
    """Everything that a next step depends on."""
    state = {name: p.detach().full_tensor().clone() for name, p in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[f"{name} {key}"] = whole.clone()
    return state | {"generator": torch.get_rng_state(), "lr": torch.tensor(trainer.schedule.get_last_lr())}


@pytest.mark.parametrize("train_model", [None, ADAPTED], ids=["whole", "lora"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_restored_trainer_goes_on_bit_for_bit(make_trainer, tmp_path, train_model, steps):
    trainer = make_trainer(ADAM, train_model=train_model)
    for seed in range(steps):
        trainer.step(ragged_rollouts(seed))
    numbers = trainer.save(tmp_path)
    trainer.step(ragged_rollouts(7))  # while it is being written
    assert trainer.saved(wait=True)
    expected = state_of(trainer)
    other = make_trainer(ADAM, train_model=train_model)
    torch.manual_seed(99)
    other.load(tmp_path, numbers)
    assert other.schedule.last_epoch == steps
    other.step(ragged_rollouts(7))
    found = state_of(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_checkpoint_of_adapters_holds_no_weights_of_the_base(make_trainer, tmp_path):
    trainer = make_trainer(ADAM, train_model=ADAPTED)
    trainer.step(ragged_rollouts())
    trainer.save(tmp_path)
    trainer.saved(wait=True)
    (file,) = tmp_path.iterdir()
    names = load_file(file).keys()
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or name.startswith("generator.") for name in names)


def test_the_scaler_is_part_of_the_state(make_trainer, tmp_path):
    trainer = make_trainer(ADAM, mixed_precision="fp16")
    trainer.step(ragged_rollouts())
    trainer.scaler.update(512.0)
    numbers = trainer.save(tmp_path)
    trainer.saved(wait=True)
    other = make_trainer(ADAM, mixed_precision="fp16")
    other.load(tmp_path, numbers)
    assert other.scaler.state_dict() == trainer.scaler.state_dict()
    assert other.scaler.get_scale() == 512.0


def test_a_full_disk_is_said_in_one_line(make_trainer, tmp_path):
    trainer = make_trainer(ADAM)
    (tmp_path / "file").write_text("")
    trainer.save(tmp_path / "file" / "trainer")  # no directory can be made there
    with pytest.raises(CheckpointError) as raised:
        trainer.saved(wait=True)
    assert "Not a directory" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("column", ["advantage", "reference_log_probs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mixed_precision", ["none", "fp16"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(make_trainer, column, value, mixed_precision):
    trainer = make_trainer(ADAM, mixed_precision=mixed_precision)
    while trainer.step(ragged_rollouts(0))[0].get("train/overflows"):  # until fp16 has found its scale
        pass
    before = state_of(trainer)
    batch = ragged_rollouts(1)
    batch[column][0] = value
    metrics, _ = trainer.step(batch)
    after = state_of(trainer)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert metrics["train/not_finite"] == 1.0
    assert all(math.isfinite(number) for number in metrics.values())
    while trainer.step(ragged_rollouts(1))[0].get("train/overflows"):
        pass
    assert not torch.equal(state_of(trainer)["lr"], before["lr"])


IN_FOUR_BITS = TrainModelConfig(lora=LORA, quantization=QuantizationConfig(enabled=True))
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def wide_path(tmp_path) -> str:
    """A model whose rows are blocks of 64."""
    model = tiny_model(recipe=Recipe(hidden_size=64, layers=2, heads=2, kv_heads=1, feed_forward=128))
    model.save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.fixture
def wide_batch(wide_path) -> TensorDict:
    return on_policy(ragged_rollouts(), load_model(wide_path, CPU))


@pytest.fixture
def rounded_path(make_trainer, wide_path, tmp_path) -> str:
    """A plain model whose weights are those that the codes of 4 bits stand for."""
    make_trainer(model=wide_path, train_model=IN_FOUR_BITS).export(tmp_path / "rounded" / "model")
    return str(tmp_path / "rounded" / "model")


@needs_bitsandbytes
def test_a_base_in_four_bits_is_another_model_and_exported_as_a_plain_one(make_trainer, rounded_path, wide_path, wide_batch):
    trainer = make_trainer(model=wide_path, train_model=IN_FOUR_BITS)
    layers = dict(four_bit_layers(trainer.model))
    assert len(layers) == 7 * 2
    assert all(layer.weight.numel() == layer.in_features * layer.out_features / 2 for layer in layers.values())
    assert all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    # Only they are rounded: to 16 values between the largest and its negative, of each 64 weights.
    given, found = dict(load_model(wide_path, CPU).named_parameters()), weights(trainer)
    assert given.keys() == found.keys()
    for name, weight in given.items():
        error = float((weight - found[name]).detach().abs().max() / weight.detach().abs().max())
        assert (0.02 < error < 0.17) if "proj.weight" in name else error == 0, name
    config = AutoConfig.from_pretrained(rounded_path)
    assert not hasattr(config, "quantization_config") and config.architectures == ["Qwen2ForCausalLM"]
    rounded = load_model(rounded_path, CPU)
    assert largest_difference(dict(rounded.named_parameters()), found) == 0
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    rows = wide_batch["tokens"], wide_batch["prompt_length"], wide_batch["response_mask"], 0.9
    for _ in range(2):  # the first pass without gradients leaves the codes as they are
        assert (trainer.score(wide_batch) - score(rounded, *rows)).abs().max() < 1e-4
    assert (trainer.score(wide_batch) - score(load_model(wide_path, CPU), *rows)).abs().max() > 0.05


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_adapters_on_four_bits_train_as_on_the_weights_that_they_stand_for(
    make_trainer, wide_path, rounded_path, wide_batch, precision
):
    results = []
    for train_model, path in ((IN_FOUR_BITS, wide_path), (TrainModelConfig(lora=LORA), rounded_path)):
        trainer = make_trainer(replace(LARGE_STEPS, lr=1e-2), train_model=train_model, mixed_precision=precision, model=path)
        start = weights(trainer)
        reference = trainer.score(wide_batch)
        metrics = [trainer.step(wide_batch)[0] for _ in range(3)]
        assert torch.equal(trainer.score(wide_batch), reference)
        results.append((weights(trainer), metrics, reference))
        moved = largest_difference(weights(trainer), start)
        assert moved > 1e-2
    (ours, metrics, reference), (theirs, its_metrics, its_reference) = results
    # With bf16 the layers of bitsandbytes round their biases apart from the product.
    assert largest_difference(ours, theirs) < (1e-4 if precision == "none" else 0.05) * moved
    assert (reference - its_reference).abs().max() < (1e-4 if precision == "none" else 0.3)
    for row, other in zip(metrics, its_metrics, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5 if precision == "none" else 0.02)


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_a_reference_in_four_bits_is_the_policy_at_its_start(make_trainer, wide_batch, wide_path, precision):
    trainer = make_trainer(model=wide_path, train_model=IN_FOUR_BITS, mixed_precision=precision)
    reference = ReferenceActor(wide_path, "eager", "cpu", 0.9, precision, in_four_bits=True)
    reference.start()
    wide_batch["reference_log_probs"] = reference.score(wide_batch)
    metrics, _ = trainer.step(wide_batch)
    assert abs(metrics["train/kl_to_reference"]) < 1e-6


@needs_bitsandbytes
def test_a_push_from_four_bits_has_the_shapes_and_values_of_the_merged_weights(make_trainer, wide_path, wide_batch):
    trainer = make_trainer(model=wide_path, train_model=IN_FOUR_BITS)
    description, _, _ = trainer.open_pushes("shared_memory", "float32", 1, 5.0)
    receiver = SharedMemoryReceiver(description, "the engine", 0, CPU)
    trainer.join_pushes()
    trainer.step(wide_batch)
    trainer.push(1)
    received = dict(receiver.receive(1))
    assert largest_difference(received, weights(trainer)) == 0
    assert received["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)


@needs_bitsandbytes
@pytest.mark.parametrize("steps", [0, 3])
def test_a_restored_trainer_on_four_bits_goes_on_bit_for_bit(make_trainer, wide_path, tmp_path, steps):
    train_model = replace(ADAPTED, quantization=QuantizationConfig(enabled=True), gradient_checkpointing=True)
    trainer = make_trainer(ADAM, model=wide_path, train_model=train_model)
    for seed in range(steps):
        trainer.step(ragged_rollouts(seed))
    numbers = trainer.save(tmp_path / "saved")
    trainer.step(ragged_rollouts(7))
    assert trainer.saved(wait=True)
    expected = weights(trainer)
    (file,) = (tmp_path / "saved").iterdir()
    assert all("lora_" in name or name.startswith("generator.") for name in load_file(file))
    other = make_trainer(ADAM, model=wide_path, train_model=train_model)
    other.load(tmp_path / "saved", numbers)
    other.step(ragged_rollouts(7))
    assert largest_difference(weights(other), expected) == 0


@pytest.mark.gpu
@needs_bitsandbytes
def test_a_gpu_trains_on_four_bits_and_with_states_of_8_bits(make_trainer, wide_path, wide_batch, monkeypatch):
    monkeypatch.setattr("grpo.adamw_8bit.MIN_NUMBERS", 1)
    optimizer = OptimizerConfig(name="adamw_8bit", lr=1e-2, warmup_steps=0)
    expected = make_trainer(model=wide_path, train_model=IN_FOUR_BITS, mixed_precision="bf16").score(wide_batch)
    trainer = make_trainer(optimizer, model=wide_path, train_model=IN_FOUR_BITS, mixed_precision="bf16", device="cuda")
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
    assert (trainer.score(wide_batch) - expected).abs().max() < 1.0
    start = weights(trainer)
    for _ in range(2):
        metrics, _ = trainer.step(wide_batch)
        assert metrics["train/skipped_updates"] == metrics["train/not_finite"] == 0
    assert largest_difference(weights(trainer), start) > 1e-3
