"""The training actor as a plain object: one rank, no Ray cluster."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config_sections import LoraConfig, ObjectiveConfig, OptimizerConfig, TrainModelConfig
from grpo.errors import CheckpointError
from grpo.launch import CONFIG_DIR, compose
from grpo.models import full_parameters, load_model
from grpo.objectives.online import divisor
from grpo.objectives.transport import transport_cost
from grpo.reference import ReferenceActor
from grpo.scoring import token_log_probs
from grpo.trainer import TrainerActor
from grpo.transports import SharedMemoryReceiver
from grpo.weight_sync import checksum, probe_vector

from .conftest import CPU, tiny_model
from .trainers import LARGE_STEPS, LORA, largest_difference, plain_loss, weights


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
