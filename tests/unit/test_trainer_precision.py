"""Mixed precision and gradient checkpointing in the training actor."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from grpo.config_sections import LoraConfig, OptimizerConfig, TrainModelConfig
from grpo.errors import TrainingError
from grpo.reference import ReferenceActor
from grpo.transports import SharedMemoryReceiver

from .conftest import CPU
from .trainers import LORA, largest_difference, weights

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
