"""Engines in their actors: weight pushes, the tied output layer, pushes in flight, errors."""

import json
import shutil
from dataclasses import replace

import pytest
import ray
import torch

from grpo import tasks
from grpo.config_sections import EnvConfig
from grpo.errors import PushError
from grpo.inference import EngineSpec, InferenceActor, Request, Sampling
from grpo.models import full_parameters, load_model, load_tokenizer
from grpo.rollout import Completions, pack
from grpo.scoring import score
from grpo.transports import SharedMemorySender
from grpo.weight_sync import Receipt, Sent, verify
from grpo_utils import engine_environment

from .conftest import need_engine

TIMEOUT_S = 120
MAX_TOKENS = 24
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class UncuredActor(InferenceActor):
    """vLLM as it would be without the cure for the tied output layer."""

    async def start(self) -> int:
        from grpo.vllm_worker import Transfer

        finish = Transfer.finish_weight_update

        def all_but_the_output_layer(self) -> None:
            kept = self.model.lm_head.cpu_linear
            finish(self)
            self.model.lm_head.cpu_linear = kept

        Transfer.finish_weight_update = all_but_the_output_layer
        return await super().start()


class PushingActor(InferenceActor):
    """Pushes after so many engine steps, so that the push falls among running requests."""

    async def exchange_with_push(self, requests: list[Request], steps: int, version: int) -> Completions:
        finished = []
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work():
            if steps == 0:
                self.engine.update_weights(version)
            steps -= 1
            finished.append(self.engine.step())
        return Completions.concatenate([part for part in finished if part is not None])


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prompts(model_path) -> list[list[int]]:
    task = tasks.load(EnvConfig(dataset="arithmetic"))
    return tasks.encode_split(task, "train", load_tokenizer(model_path), 64, limit=16).prompts


def start(model_path: str, backend: str, cls=InferenceActor, **changes):
    need_engine(backend, device="cpu")
    spec = EngineSpec(
        backend=backend,
        model=model_path,
        device="cpu",
        dtype="float32",
        seed=0,
        max_concurrent=64,
        max_length=128,
        top_p=1.0,
        gpu_memory_utilization=0.9,
        enforce_eager=True,
    )
    spec = replace(spec, **changes)
    actor = ray.remote(num_cpus=1, runtime_env={"env_vars": engine_environment(spec)})(cls).remote(spec)
    ray.get(actor.start.remote(), timeout=TIMEOUT_S)
    return actor


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def engine(request, cluster, model_path):
    actor = start(model_path, request.param)
    yield request.param, actor
    ray.kill(actor)


def moved(model_path: str, seed: int = 0) -> torch.nn.Module:
    """The built-in model after a step in a random direction."""
    model = load_model(model_path, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def connect(actor, model: torch.nn.Module) -> SharedMemorySender:
    sender = SharedMemorySender(list(full_parameters(model)), "float32", 1, TIMEOUT_S)
    packed = ray.get(actor.connect.remote(sender.description(), "the engine", 0, list(TIED)), timeout=TIMEOUT_S)
    sender.projected = {TIED.get(name, name) for name in packed}
    sender.join()
    return sender


def push(actor, model: torch.nn.Module, version: int) -> tuple[Sent, Receipt]:
    sent = connect(actor, model).send(version, full_parameters(model))
    return sent, ray.get(actor.update_weights.remote(version), timeout=TIMEOUT_S)


def sample(actor, prompts: list[list[int]], num_responses: int = 4, seed: int = 5, temperature: float = 1.0) -> Completions:
    sampling = Sampling(num_responses, MAX_TOKENS, temperature)
    requests = [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]
    call = actor.generate.remote(requests, seed)
    return ray.get(call, timeout=TIMEOUT_S).in_request_order()


def worst_difference(model: torch.nn.Module, prompts: list[list[int]], completions: Completions) -> float:
    rollouts = pack([prompts[i] for i in completions.request_id], completions)
    keys = ("tokens", "prompt_length", "response_mask")
    scored = score(model, *(rollouts[key] for key in keys), temperature=1.0)
    return (scored - rollouts["inference_log_probs"]).abs().max().item()


def test_a_push_changes_what_the_engine_computes_to_the_pushed_weights(engine, model_path, prompts):
    _, actor = engine
    for version in (1, 2):
        model = moved(model_path, seed=version)
        sent, receipt = push(actor, model, version)
        assert receipt.version == version
        verify(sent, receipt, "the engine", TIED)
        completions = sample(actor, prompts)
        assert worst_difference(model, prompts, completions) < 1e-4
        assert worst_difference(moved(model_path, seed=99), prompts, completions) > 0.1
        assert set(completions.versions) == {version}


def test_the_tied_output_layer_goes_stale_without_the_cure(cluster, model_path, prompts):
    actor = start(model_path, "vllm", UncuredActor)
    model = moved(model_path)
    sent, receipt = push(actor, model, 1)
    assert receipt.version == 1  # vLLM says all is well
    with pytest.raises(PushError, match=r"^the engine, version 1: tensor lm_head.weight arrived but is not what"):
        verify(sent, receipt, "the engine", TIED)
    assert worst_difference(model, prompts, sample(actor, prompts)) > 0.1
    ray.kill(actor)


def test_the_same_seed_samples_the_same_whatever_was_sampled_before(engine, prompts):
    _, actor = engine
    first = sample(actor, prompts, seed=5)
    sample(actor, prompts[:3], seed=6)
    sample(actor, prompts, num_responses=1, seed=7, temperature=0.0)
    again = sample(actor, prompts, seed=5)
    assert (first.tokens == again.tokens).all()
    assert (first.log_probs == again.log_probs).all()
    assert sample(actor, prompts, seed=8).tokens.tolist() != first.tokens.tolist()


def test_responses_end_at_their_token_budget_or_by_themselves(engine, prompts, model_path):
    _, actor = engine
    eos = load_tokenizer(model_path).eos_token_id
    requests = [Request(i, prompt, Sampling(2, 6, 1.0)) for i, prompt in enumerate(prompts)]
    short = ray.get(actor.generate.remote(requests, 0), timeout=TIMEOUT_S)
    assert short.length.max() == 6
    for tokens, stopped in zip(short.responses(), short.stopped, strict=True):
        assert (tokens[-1] == eos) == stopped
        assert eos not in tokens[:-1]


def test_the_transformers_engine_samples_the_policy_itself_whatever_settings_the_model_ships(
    cluster, model_path, prompts, tmp_path
):
    """Instruct models ship a generation_config; a penalty in it would make what is sampled another distribution."""
    shutil.copytree(model_path, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 3.0, "top_k": 2, "temperature": 0.3, "do_sample": True}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    plain, penalised = start(model_path, "transformers"), start(str(tmp_path / "model"), "transformers")
    assert sample(plain, prompts).tokens.tolist() == sample(penalised, prompts).tokens.tolist()
    ray.kill(plain)
    ray.kill(penalised)


def test_weights_change_between_two_steps_and_each_token_knows_its_version(cluster, model_path, prompts):
    """A push while requests run: all go on to their end, and tokens after it are the new weights'."""
    actor = start(model_path, "vllm", PushingActor, max_concurrent=16)  # a quarter at a time: some start after the push
    start_model = load_model(model_path, torch.device("cpu"))
    model = moved(model_path)
    connect(actor, start_model).send(1, full_parameters(model))
    sampling = Sampling(4, MAX_TOKENS, 1.0)
    requests = [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]
    call = actor.exchange_with_push.remote(requests, steps=30, version=1)
    completions = ray.get(call, timeout=TIMEOUT_S).in_request_order()
    rollouts = pack([prompts[i] for i in completions.request_id], completions)
    mask, versions = rollouts["response_mask"], rollouts["token_versions"]
    assert len(completions) == 4 * len(prompts)
    straddling = [len(set(row[m].tolist())) == 2 for row, m in zip(versions, mask, strict=True)]
    assert 4 <= sum(straddling) <= 16
    assert (versions[:, 1:] >= versions[:, :-1])[mask[:, 1:] & mask[:, :-1]].all()
    keys = ("tokens", "prompt_length", "response_mask")
    for version, of_version in ((0, start_model), (1, model)):
        scored = score(of_version, *(rollouts[key] for key in keys), temperature=1.0)
        chosen = mask & (versions == version)
        assert (scored - rollouts["inference_log_probs"])[chosen].abs().max() < 1e-4
        assert (scored - rollouts["inference_log_probs"])[mask & ~chosen].abs().max() > 0.01
    ray.kill(actor)
