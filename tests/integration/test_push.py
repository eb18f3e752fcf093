"""Weight pushes are proven: good ones pass, each way to break one ends with the name of what is wrong."""

import os
import time
from dataclasses import dataclass
from itertools import count

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_sync
import grpo_utils
from grpo.config_sections import LoraConfig, ObjectiveConfig, OptimizerConfig, TrainConfig, TrainModelConfig
from grpo.errors import ActorError, PushError
from grpo.inference import EngineSpec, InferenceActor
from grpo.pools import EnginePool, TrainerPool, named
from grpo.push import PROBE_TOLERANCE, WeightPush
from grpo.remote import get
from grpo.trainer import TrainerActor, TrainerSpec
from grpo_utils import connect, engine_environment

from .conftest import Finished, compose_small, need_engine
from .test_ranks import ragged_batch

TIMEOUT_S = 120.0
MIDDLE = "model.layers.1.mlp.up_proj.weight"  # one of a fused pair in vLLM


class BreakableTrainer(TrainerActor):
    """Can corrupt one tensor on its way, or leave it out."""

    def break_push(self, fault: str | None) -> None:
        put = type(self.sender)._put

        def faulty(version: int, index: int, tensor: torch.Tensor) -> None:
            if self.sender.slots[index].name == MIDDLE:
                if fault == "never sent":
                    return
                tensor = tensor.clone()
                bits = torch.int32 if tensor.dtype == torch.float32 else torch.int16
                tensor.view(bits)[3, 5] ^= 1  # the last bit of one mantissa
            put(self.sender, version, index, tensor)

        self.sender._put = faulty if fault else put.__get__(self.sender)


class BreakableEngine(InferenceActor):
    """Can acknowledge a push without applying it, or keep its old output layer."""

    async def break_push(self, fault: str) -> None:
        getattr(self, f"_break_{self.spec.backend}")(fault)

    def _break_vllm(self, fault: str) -> None:
        from grpo import vllm_worker

        if fault == "not applied":
            vllm_worker.Transfer.receive_weights = lambda self, info: [None for _ in self.receiver.receive(info.version)]
            return
        finish = vllm_worker.Transfer.finish_weight_update

        def without_output_layer(self) -> None:
            kept = self.model.lm_head.cpu_linear
            finish(self)
            self.model.lm_head.cpu_linear = kept

        vllm_worker.Transfer.finish_weight_update = without_output_layer

    def _break_transformers(self, fault: str) -> None:
        engine = self.engine
        if fault == "not applied":
            engine.parameters = {name: tensor.clone() for name, tensor in engine.parameters.items()}
        else:
            old = torch.nn.Parameter(engine.model.lm_head.weight.detach().clone(), requires_grad=False)
            if "lm_head.weight" in engine.parameters:
                engine.parameters["lm_head.weight"] = old.clone()
            engine.model.lm_head.weight = old


@dataclass
class Pair:
    """A trainer and an engine."""

    trainer: TrainerPool
    engines: EnginePool
    push: WeightPush
    batch: object
    versions: object

    def train_and_push(self) -> int:
        version = next(self.versions)
        self.trainer.step(self.batch, version, with_log_probs=False)
        self.push(version)
        return version

    def probe(self, version: int) -> float:
        return self.push.probe(version, self.batch["tokens"][15, :40].tolist())

    def close(self) -> None:
        for actor in [*self.trainer.actors, *self.engines.actors]:
            ray.kill(actor)


class ForgetfulEngine(BreakableEngine):
    """Stops applying pushes after its first."""

    async def update_weights(self, version: int):
        if version == 2:
            await self.break_push("not applied")
        return await super().update_weights(version)


@pytest.mark.parametrize("backend", ["vllm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_a_run_whose_engine_stops_applying_pushes_ends_with_its_name(model_path, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(grpo_utils, "InferenceActor", ForgetfulEngine)
    config = compose_small(f"inference_model.backend={backend}")
    with pytest.raises(PushError, match=r"^the inference actor, version 2: tensor model.embed_tokens.weight arrived but"):
        grpo_sync.main(config, tmp_path)
    assert [line["step"] for line in Finished(tmp_path).metrics] == [1, 2]
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def untied_path(model_path, tmp_path_factory) -> str:
    """The built-in model with an output layer of its own."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.01)
    path = tmp_path_factory.mktemp("untied")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return str(path)


def pair(
    model: str,
    backend: str,
    transport: str = "shared_memory",
    tensor_parallel: int = 1,
    engines: int = 1,
    lora: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    sleeps: bool = False,
) -> Pair:
    need_engine(backend, device)
    trainer_spec = TrainerSpec(
        model,
        "eager",
        device,
        1.0,
        0,
        TrainModelConfig(lora=LoraConfig(enabled=lora, r=4)),
        ObjectiveConfig(),
        TrainConfig(kl_to_ref_coeff=0.1),
        OptimizerConfig(name="sgd", lr=0.1, warmup_steps=0, clip_grad_norm=0.5),
        uses_reference=True,
    )
    spec = EngineSpec(
        backend=backend,
        model=model,
        device=device,
        dtype=dtype,
        seed=0,
        max_concurrent=8,
        max_length=64,
        top_p=1.0,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        tensor_parallel_size=tensor_parallel,
        sleeps=sleeps,
    )
    environment = {"env_vars": engine_environment(spec)}
    share = 1 if transport == "nccl" else 0.5  # of a GPU; NCCL joins no two processes on one
    options = {"num_cpus": 1, "num_gpus": share if device == "cuda" else 0}
    actors = [ray.remote(**options, runtime_env=environment)(BreakableEngine).remote(spec) for _ in range(engines)]
    trainer = ray.remote(**options)(BreakableTrainer).remote(trainer_spec)
    starting = [actor.start.remote() for actor in actors]
    rendezvous = ray.get(trainer.open_rendezvous.remote(), timeout=TIMEOUT_S)
    ray.get([trainer.start.remote(0, 1, rendezvous, TIMEOUT_S), *starting], timeout=TIMEOUT_S)
    pools = TrainerPool([trainer], 1, None, TIMEOUT_S), EnginePool(named("inference", actors), TIMEOUT_S)
    push = connect(*pools, transport, tensor_parallel, TIMEOUT_S)
    return Pair(*pools, push, ragged_batch(model), count(1))


# Any two of them together; the other four are slow.
COMBINATIONS = [("vllm", True, False), ("vllm", False, True), ("transformers", True, True), ("transformers", False, False)]
COMBINATIONS += [
    pytest.param(backend, tied, not lora, marks=pytest.mark.slow) for backend, tied, lora in tuple(COMBINATIONS)
]


@pytest.mark.parametrize(("backend", "tied", "lora"), COMBINATIONS)
def test_good_pushes_pass_and_each_broken_one_is_named(cluster, model_path, untied_path, backend, tied, lora):
    parts = pair(model_path if tied else untied_path, backend, lora=lora)
    trainer = parts.trainer.actors[0]
    before = parts.probe(0)
    assert before < 1e-5
    parts.trainer.step(parts.batch, 0, with_log_probs=False)
    with pytest.raises(PushError, match=r"the inference actor, version 0: its log-probs of a probe text differ"):
        parts.probe(0)  # the trainer has moved and nothing was pushed
    for _ in range(2):
        assert parts.probe(parts.train_and_push()) < 1e-5

    ray.get(trainer.break_push.remote("corrupted"))
    with pytest.raises(PushError, match=rf"^the inference actor, version 3: tensor {MIDDLE} was changed on its way"):
        parts.train_and_push()
    ray.get(trainer.break_push.remote("never sent"))
    with pytest.raises(PushError, match=rf"^the inference actor: tensor {MIDDLE} of version 4 was never sent$"):
        parts.train_and_push()
    ray.get(trainer.break_push.remote(None))
    assert parts.probe(parts.train_and_push()) < 1e-5  # a good push mends what a broken one left

    if not lora:  # adapters leave the output layer as it was, so an engine cannot lag behind with it
        ray.get(parts.engines.actors[0].break_push.remote("old lm_head"))
        with pytest.raises(
            PushError,
            match=r"^the inference actor, version 6: tensor lm_head.weight arrived but is not what the engine computes",
        ):
            parts.train_and_push()
    ray.get(parts.engines.actors[0].break_push.remote("not applied"))
    first = "model.layers.0.self_attn.q_proj.weight" if lora else "model.embed_tokens.weight"
    with pytest.raises(PushError, match=rf"^the inference actor, version \d: tensor {first} arrived but is not what the"):
        parts.train_and_push()
    parts.close()


@pytest.mark.parametrize("backend", ["vllm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_two_engines_are_pushed_to_over_gloo_and_the_broken_one_is_named(cluster, model_path, monkeypatch, backend):
    parts = pair(model_path, backend, "gloo", engines=2)
    for _ in range(2):
        assert parts.probe(parts.train_and_push()) < 1e-5
    ray.get(parts.engines.actors[1].break_push.remote("not applied"))
    with pytest.raises(PushError, match=r"^inference actor 1, version 3: tensor model.embed_tokens.weight arrived but is"):
        parts.train_and_push()
    ray.get(parts.trainer.actors[0].break_push.remote("corrupted"))
    with pytest.raises(PushError, match=rf"^inference actor 0, version 4: tensor {MIDDLE} was changed on its way"):
        parts.train_and_push()
    parts.close()


@pytest.mark.parametrize("transport", ["shared_memory", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_vllm_engine_split_over_two_processes_holds_what_was_sent(cluster, untied_path, transport):
    parts = pair(untied_path, "vllm", transport, tensor_parallel=2)
    for _ in range(2):
        assert parts.probe(parts.train_and_push()) < 1e-5
    ray.get(parts.trainer.actors[0].break_push.remote("corrupted"))
    with pytest.raises(PushError, match=rf"version 3: tensor {MIDDLE} was changed on its way"):
        parts.train_and_push()
    if transport == "shared_memory":
        ray.get(parts.trainer.actors[0].break_push.remote("never sent"))
        with pytest.raises(PushError, match=rf"the inference actor: tensor {MIDDLE} of version 4 was never sent"):
            parts.train_and_push()
    check_ends_with_its_processes(parts.engines.actors[0])
    parts.close()


def check_ends_with_its_processes(engine) -> None:
    pid = ray.get(engine.__ray_call__.remote(lambda actor: os.getpid()))
    children = psutil.Process(pid).children(recursive=True)
    first, second = [child for child in children if child.name().startswith("VLLM::Worker")]
    second.kill()
    with pytest.raises(ActorError, match=r"^the engine died while being asked"):
        for _ in range(100):
            time.sleep(0.1)
            get(engine.busy.remote(), TIMEOUT_S, "the engine", "being asked")
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_bfloat16_engine_on_a_gpu_holds_what_was_sent(cluster, model_path, untied_path, tied, lora):
    parts = pair(model_path if tied else untied_path, "vllm", lora=lora, device="cuda", dtype="bfloat16")
    for _ in range(2):
        assert parts.probe(parts.train_and_push()) < PROBE_TOLERANCE["bfloat16"]
    ray.get(parts.trainer.actors[0].break_push.remote("corrupted"))
    with pytest.raises(PushError, match=rf"version 3: tensor {MIDDLE} was changed on its way"):
        parts.train_and_push()
    ray.get(parts.trainer.actors[0].break_push.remote(None))
    ray.get(parts.engines.actors[0].break_push.remote("not applied"))
    with pytest.raises(PushError, match=r"version 4: tensor .* arrived but is not what the engine computes with"):
        parts.train_and_push()
    parts.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs: NCCL joins no two processes on one")
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_pushes_between_gpus_go_over_nccl(cluster, model_path, backend):
    parts = pair(model_path, backend, "nccl", device="cuda")
    for _ in range(2):
        assert parts.probe(parts.train_and_push()) < 1e-3
    ray.get(parts.trainer.actors[0].break_push.remote("corrupted"))
    with pytest.raises(PushError, match=rf"version 3: tensor {MIDDLE} was changed on its way"):
        parts.train_and_push()
    parts.close()
