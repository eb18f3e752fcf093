"""What the training actor saves and restores, and what it refuses to save."""

import math

import pytest
import torch
from safetensors.torch import load_file

from grpo.errors import CheckpointError

from .conftest import ragged_rollouts
from .trainers import ADAM, ADAPTED, state_of


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
