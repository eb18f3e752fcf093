"""The training actor of scored groups as a plain object: one rank, no Ray cluster."""

from dataclasses import replace

import pytest
import ray
import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tensordict import TensorDict
from transformers import AutoModelForCausalLM

from grpo.adapters import check_adapter
from grpo.builtin import make_tokenizer
from grpo.config_sections import LoraConfig, OptimizerConfig, TrainModelConfig
from grpo.errors import ConfigError
from grpo.models import full_parameters, load_model, load_tokenizer
from grpo.offline_config import OfflineObjectiveConfig, OfflineTrainConfig
from grpo.offline_trainer import OfflineTrainerActor
from grpo.scored import EncodedGroup, collate
from grpo.trainer import TrainerSpec

from .conftest import CPU
from .test_lora import gpt2

SGD = OptimizerConfig(name="sgd", lr=0.5, warmup_steps=0, clip_grad_norm=1e9)
OBJECTIVE = OfflineObjectiveConfig(log_prob="sum", temperature=5.0, target_temperature=0.5)
GROUPS = [
    EncodedGroup([5, 0, 9], [[1, 2, 0], [3], [30, 31, 32, 33, 34]], [1.0, 0.0, 0.5]),
    EncodedGroup([6], [[0], [7, 0]], [0.0, 1.0]),
    EncodedGroup([2, 2], [[1], [1, 1], [40, 41], [8, 8, 8]], [0.2, 0.2, 1.0, 0.4]),
]


@pytest.fixture(scope="module")
def gpt2_path(tmp_path_factory) -> str:
    """A GPT-2, whose tokenizer has no pad token and no chat template."""
    path, tokenizer = tmp_path_factory.mktemp("gpt2"), make_tokenizer()
    tokenizer.pad_token = tokenizer.chat_template = None
    gpt2().save_pretrained(path)
    tokenizer.save_pretrained(path)
    assert load_tokenizer(str(path)).pad_token is None
    return str(path)


@pytest.fixture
def make_trainer(model_path, monkeypatch):
    """Start a trainer; the one before it ends."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    started: list[OfflineTrainerActor] = []

    def stop() -> None:
        if started:
            started.pop()
            dist.destroy_process_group()

    def make(model: str = model_path, objective=OBJECTIVE, lora_path=None, lora=None, optimizer=SGD) -> OfflineTrainerActor:
        stop()
        spec = TrainerSpec(
            model=model,
            attn_implementation="eager",
            device="cpu",
            temperature=1.0,
            seed=0,
            train_model=TrainModelConfig(lora=lora or LoraConfig()),
            objective=objective,
            train=OfflineTrainConfig(),
            optimizer=optimizer,
            uses_reference=False,
            lora_path=lora_path,
        )
        trainer = OfflineTrainerActor(spec)
        trainer.start(0, 1, trainer.open_rendezvous(), 60.0)
        started.append(trainer)
        return trainer

    yield make
    stop()


def step(trainer: OfflineTrainerActor, groups: list[EncodedGroup], sizes: list[int]) -> dict[str, float]:
    """As OfflineTrainerPool gives it to a single rank; as many rows as `sizes` has are filled up."""
    batch = collate(groups, sum(sizes))
    return trainer.step(batch, sizes, len(sizes), len(groups), False)[0]


def weights(trainer: OfflineTrainerActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_parameters(trainer.model)}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).detach().abs().max()) for name in first)


def plain_loss(model, groups: list[EncodedGroup], objective: OfflineObjectiveConfig) -> torch.Tensor:
    """The documented loss, completion by completion, without padding."""
    total = 0.0
    for group in groups:
        values = []
        for completion in group.completions:
            tokens = torch.tensor([group.prompt + completion])
            log_p = model(input_ids=tokens).logits[0].log_softmax(-1)
            own = torch.stack([log_p[len(group.prompt) - 1 + t, token] for t, token in enumerate(completion)])
            values.append(own.sum() if objective.log_prob == "sum" else own.mean())
        log_p = (torch.stack(values) / objective.temperature).log_softmax(-1)
        log_q = (torch.tensor(group.scores) / objective.target_temperature).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / len(groups)


@pytest.mark.parametrize("log_prob", ["sum", "mean"])
@pytest.mark.parametrize("of_gpt2", [False, True], ids=["qwen2", "gpt2"])
def test_a_step_is_gradient_descent_on_the_documented_loss(make_trainer, model_path, gpt2_path, log_prob, of_gpt2):
    path, objective = gpt2_path if of_gpt2 else model_path, replace(OBJECTIVE, log_prob=log_prob)
    model, trainer = load_model(path, CPU, "eager"), make_trainer(path, objective)
    start = weights(trainer)
    metrics = step(trainer, GROUPS, [3])
    loss = plain_loss(model, GROUPS, objective)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: start[name] - 0.5 * gradients[name] for name in start}
    assert largest_difference(weights(trainer), expected) < 1e-5
    assert largest_difference(weights(trainer), start) > 1e-3
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["train/grad_norm"] > 0 and metrics["train/skipped_updates"] == 0


def test_micro_batches_and_groups_that_fill_up_take_the_same_step(make_trainer):
    results = []
    for sizes in ([3], [1, 1, 1], [2, 2], [1, 1, 1, 1, 1, 1]):  # the last two are filled up
        trainer = make_trainer()
        results.append((step(trainer, GROUPS, sizes), weights(trainer)))
    for metrics, after in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        assert largest_difference(after, results[0][1]) < 1e-6


def test_offloaded_shards_take_the_same_steps_and_go_on_from_a_checkpoint(make_trainer, tmp_path):
    results = {}
    for name in ("adamw", "adamw_offload"):
        trainer = make_trainer(optimizer=OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1, clip_grad_norm=0.1))
        start = weights(trainer)
        step(trainer, GROUPS, [1, 2])
        numbers = trainer.save(tmp_path / name)
        trainer.saved(wait=True)
        for _ in range(2):
            step(trainer, GROUPS[::-1], [1, 2])
        results[name] = weights(trainer)
        trainer.load(tmp_path / name, numbers)
        for _ in range(2):
            step(trainer, GROUPS[::-1], [1, 2])
        assert largest_difference(weights(trainer), results[name]) == 0
    assert largest_difference(results["adamw"], results["adamw_offload"]) == 0
    assert largest_difference(results["adamw"], start) > 1e-3


def eight_bit(make_trainer, monkeypatch, lora: LoraConfig | None = None, **optimizer) -> OfflineTrainerActor:
    """A trainer whose parameters are large enough for states of 8 bits, small as they are."""
    monkeypatch.setattr("grpo.adamw_8bit.MIN_NUMBERS", 1)
    return make_trainer(lora=lora, optimizer=OptimizerConfig(name="adamw_8bit", lr=1e-2, warmup_steps=3, **optimizer))


def of_eight_bits(trainer: OfflineTrainerActor) -> list[torch.Tensor]:
    states = trainer.optimizer.state.values()
    return [value.to_local().clone() for state in states for key, value in state.items() if key.endswith("_codes")]


def test_with_states_of_8_bits_the_loss_falls_as_adamws_does(make_trainer, monkeypatch):
    losses, rates = {}, {}
    for name in ("adamw_8bit", "adamw"):
        trainer = (
            eight_bit(make_trainer, monkeypatch, clip_grad_norm=0.5)
            if name == "adamw_8bit"
            else make_trainer(optimizer=OptimizerConfig(name=name, lr=1e-2, warmup_steps=3, clip_grad_norm=0.5))
        )
        metrics = [step(trainer, GROUPS, [1, 2]) for _ in range(30)]
        losses[name], rates[name] = ([row[f"train/{key}"] for row in metrics] for key in ("loss", "lr"))
        assert len(of_eight_bits(trainer)) == (0 if name == "adamw" else 2 * 15)  # 7 weights in each of 2 layers, embeddings
    assert rates["adamw_8bit"] == pytest.approx(rates["adamw"], rel=1e-6)
    assert losses["adamw"][-1] < 0.2 * losses["adamw"][0]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], abs=0.03 * losses["adamw"][0])


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(enabled=True, r=16)], ids=["whole", "lora"])
def test_states_of_8_bits_go_on_from_a_checkpoint_bit_for_bit(make_trainer, monkeypatch, tmp_path, lora):
    trainer = eight_bit(make_trainer, monkeypatch, lora)
    for _ in range(4):
        step(trainer, GROUPS, [1, 2])
    numbers = trainer.save(tmp_path)
    step(trainer, GROUPS[::-1], [1, 2])  # while it is being written
    trainer.saved(wait=True)
    expected = [step(trainer, GROUPS, [1, 2]) for _ in range(2)], weights(trainer)
    codes = of_eight_bits(trainer)
    trainer = eight_bit(make_trainer, monkeypatch, lora)
    trainer.load(tmp_path, numbers)
    step(trainer, GROUPS[::-1], [1, 2])
    assert [step(trainer, GROUPS, [1, 2]) for _ in range(2)] == expected[0]
    assert largest_difference(weights(trainer), expected[1]) == 0
    assert codes and all(torch.equal(a, b) for a, b in zip(of_eight_bits(trainer), codes, strict=True))


def test_the_policys_scores_are_those_that_it_trains_on(make_trainer, model):
    batch = collate(GROUPS)
    there = batch["response_length"] > 0
    rows = {key: batch[key][there] for key in ("tokens", "prompt_length", "response_mask")}
    log_probs = make_trainer().score_policy(TensorDict(rows, batch_size=[9]))
    group = GROUPS[0]
    tokens = torch.tensor([group.prompt + group.completions[2]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[0, 2:7].log_softmax(-1).gather(-1, tokens[0, 3:8, None])[:, 0]
    assert torch.allclose(log_probs[2, 3:8], expected, atol=1e-5)
    assert log_probs.shape == (9, 8) and not log_probs[2, :3].any()


@pytest.mark.parametrize("of_gpt2", [False, True], ids=["qwen2", "gpt2"])
def test_adapters_are_trained_on_from_where_another_run_left_them(make_trainer, model_path, gpt2_path, tmp_path, of_gpt2):
    path = gpt2_path if of_gpt2 else model_path
    first = make_trainer(path, lora=LoraConfig(enabled=True, r=3))
    start = weights(first)
    step(first, GROUPS, [3])
    left = weights(first)
    assert largest_difference(left, start) > 1e-4
    first.export(tmp_path / "model")
    adapter = tmp_path / "adapter"
    config = load_model(path, CPU).config
    assert check_adapter(config, str(adapter)) == sum(parameter.numel() for parameter in first.trainable)
    second = make_trainer(path, lora_path=str(adapter))
    assert largest_difference(weights(second), left) < 1e-6
    assert second.trainable and all(parameter.requires_grad for parameter in second.trainable)
    metrics = step(second, GROUPS, [3])
    assert metrics["train/grad_norm"] > 0
    assert largest_difference(weights(second), left) > 1e-4
    second.export(tmp_path / "again" / "model")
    third = make_trainer(path, lora_path=str(tmp_path / "again" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    assert largest_difference(weights(third), dict(merged.named_parameters())) < 1e-6


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_embeddings_and_the_output_layer_are_refused(model_path, tmp_path, target):
    """They cannot be merged: the output layer's weight is the embedding's too."""
    model = load_model(model_path, CPU)
    get_peft_model(model, PeftLoraConfig(r=2, target_modules=["q_proj", target])).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^lora_path \(.*\) adapts embeddings or the output layer: only linear layers inside"
    ):
        check_adapter(load_model(model_path, CPU).config, str(tmp_path))


@pytest.mark.parametrize("more", [{"lora_bias": True}, {"trainable_token_indices": {"embed_tokens": [1, 2]}}], ids=str)
def test_what_is_more_than_adapters_is_refused(model_path, tmp_path, more):
    settings = PeftLoraConfig(r=2, target_modules=["q_proj"], **more)
    get_peft_model(load_model(model_path, CPU), settings).save_pretrained(tmp_path)
    rule = "must hold LoRA adapters alone: no DoRA, no biases, no modules_to_save, no trainable_token_indices$"
    with pytest.raises(ConfigError, match=rule):
        check_adapter(load_model(model_path, CPU).config, str(tmp_path))


def test_adapters_of_another_model_are_refused_by_name(make_trainer, model_path, gpt2_path, tmp_path):
    trainer = make_trainer(model_path, lora=LoraConfig(enabled=True, r=3))
    trainer.export(tmp_path / "model")
    adapter = str(tmp_path / "adapter")
    other, smaller = load_model(gpt2_path, CPU).config, load_model(model_path, CPU).config
    smaller.intermediate_size = 8
    for config in (other, smaller):
        with pytest.raises(ConfigError, match=r"lora_path \(.*adapter\) holds adapters of another model: ") as raised:
            check_adapter(config, adapter)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"must be a directory with adapter_config.json"):
        check_adapter(smaller, str(tmp_path / "model"))
    whole = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"its adapter_model.safetensors is damaged"):
        check_adapter(load_model(model_path, CPU).config, adapter)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its adapter_config.json cannot be read"):
        check_adapter(smaller, adapter)
