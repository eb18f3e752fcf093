"""Shared by the unit tests: a tiny Qwen2 with random weights, and ragged rollouts for it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from tensordict import TensorDict
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2ForCausalLM

from docs.generate import ARCHITECTURES
from grpo.builtin import Recipe, make_config, make_tokenizer
from grpo.config_sections import ObjectiveConfig, OptimizerConfig, TrainConfig, TrainModelConfig
from grpo.models import load_model, num_parameters, read_config
from grpo.rewards import Grade, RewardFunction
from grpo.rollout import Completions, pack
from grpo.tasks import Problem, Task
from grpo.trainer import TrainerActor, TrainerSpec

from .trainers import LARGE_STEPS, PENALTIES, OneRank, on_policy

TINY = Recipe(hidden_size=16, layers=2, heads=2, kv_heads=1, feed_forward=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower with more, most of all where other work shares the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are a CPU build's on every machine, or engines of vLLM would be refused on a CPU where PyTorch has CUDA."""
    monkeypatch.setattr("grpo.devices.cuda_build", lambda: None)


def tiny_model(seed: int = 0, recipe: Recipe = TINY) -> PreTrainedModel:
    """Random weights, large enough that distributions are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(make_config(recipe, make_tokenizer())).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory in transformers format."""
    path = tmp_path_factory.mktemp("tiny-model")
    tiny_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def model(model_path: str) -> PreTrainedModel:
    return load_model(model_path, CPU)


def completions(lengths: list[int], seed: int = 0, vocabulary: int = 52) -> Completions:
    """Random responses of these lengths; token 0, the pad token, is among them."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return Completions(
        request_id=np.arange(len(lengths)),
        length=np.array(lengths),
        stopped=rng.random(len(lengths)) < 0.5,
        tokens=rng.integers(0, vocabulary, total),
        log_probs=(-3 * rng.random(total)).astype(np.float32),
        versions=np.zeros(total, dtype=np.int32),
    )


def ragged_rollouts(seed: int = 0) -> TensorDict:
    """8 rollouts in groups of 2 with prompts and responses of many lengths, and everything a training step reads."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 52, size).tolist() for size in (3, 3, 9, 9, 4, 4, 2, 2)]
    batch = pack(prompts, completions([1, 6, 2, 3, 11, 5, 4, 9], seed))
    batch["advantage"] = torch.tensor([1.5, -0.5, 0.7, -0.7, 0.0, 2.0, -1.2, 0.3])
    noise = torch.from_numpy(rng.normal(0, 0.5, batch["tokens"].shape)).float()
    batch["reference_log_probs"] = torch.where(batch["response_mask"], batch["inference_log_probs"] + noise, 0.0)
    return batch


class DirectGrading:
    """A GradingPool without processes."""

    def __init__(self, task: Task, reward_function: RewardFunction | None = None) -> None:
        self.task, self.reward_function = task, reward_function

    def grade(self, problems: list[Problem], responses: list[str]) -> list[Grade]:
        return [self.task.grade(problem, response) for problem, response in zip(problems, responses, strict=True)]

    def reward(self, groups: list[tuple[list[str], list[str], list[str]]]) -> list:
        return [self.reward_function(*group) for group in groups]


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


COUNTED: dict[str, int] = {}


def count_once(config: PreTrainedConfig) -> int:
    """`num_parameters`, which takes a second for a large model, once a model."""
    key = config.to_json_string()
    if key not in COUNTED:
        COUNTED[key] = num_parameters(config)
    return COUNTED[key]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have plans be made for a machine with so many GPUs of `gib` GiB that reaches the hub, whose models are known."""

    def have(count: int, others: dict[str, PreTrainedConfig] | None = None, gib: float = 80) -> None:
        known = ARCHITECTURES | (others or {})

        def architecture(name: str) -> PreTrainedConfig:
            if os.path.isdir(name):
                return read_config(name)
            return next((config for key, config in known.items() if key in name), ARCHITECTURES["Qwen2.5-3B"])

        monkeypatch.setattr("grpo.sources.hub_reachable", lambda: True)
        monkeypatch.setattr("grpo.plan.read_config", architecture)
        monkeypatch.setattr("grpo.memory.num_parameters", count_once)
        monkeypatch.setattr("grpo.memory.gpu_bytes", lambda index: int(gib * 2**30))
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")

    return have


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
            shares_prompts=train.get("share_prompts", False),
            charges_divergence=uses_reference and train.get("kl_coef_in_loss", True) and train.get("kl_to_ref_coeff", 1) > 0,
        )
        trainer = OneRank(spec)
        assert trainer.start(0, 1, trainer.open_rendezvous(), 60.0) == os.getpid()
        started.append(trainer)
        return trainer

    yield make
    stop()


@pytest.fixture
def batch(model) -> TensorDict:
    return on_policy(ragged_rollouts(), model)
