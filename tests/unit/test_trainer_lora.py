"""Adapters in the training actor."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grpo.config_sections import OptimizerConfig, TrainModelConfig
from grpo.models import add_lora, load_model, lora_layers
from grpo.reference import ReferenceActor
from grpo.transports import SharedMemoryReceiver

from .conftest import CPU
from .trainers import LARGE_STEPS, LORA, base_weights, largest_difference, plain_loss, weights


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
