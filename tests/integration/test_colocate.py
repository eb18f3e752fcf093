"""colocate=true: engines sleep while the trainer computes, and what a run computes stays the same, bit for bit."""

import signal
from unittest.mock import create_autospec

import psutil
import pytest
import ray
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm.v1.engine.llm_engine import LLMEngine

import grpo_sync
from grpo.cluster import ANYWHERE, start_actors
from grpo.colocate import Turns
from grpo.engine_vllm import VLLMEngine
from grpo.inference import EngineSpec, InferenceActor, Request, Sampling
from grpo.launch import compose
from grpo.nodes import worker_environment
from grpo.pools import named
from grpo.push import PROBE_TOLERANCE
from grpo.transports import SharedMemorySender
from grpo.weight_sync import verify

from .conftest import SMALL, Finished
from .faults import Fault, Faults
from .test_push import pair
from .test_resume import STEPS, TRANSFORMERS, Process, check_same
from .test_sync import largest_difference

TIMEOUT_S = 120
COLOCATE = "colocate=true"
MB = 1 << 20


@pytest.mark.slow
def test_a_run_ends_in_the_same_weights_evaluated_and_saved_on_the_way(run_sync, monkeypatch):
    expected, slept = run_sync(*STEPS, TRANSFORMERS), []
    sleep = Turns.sleep
    monkeypatch.setattr(Turns, "sleep", lambda turns: slept.append(list(turns.others)) or sleep(turns))
    run = run_sync(*STEPS, TRANSFORMERS, COLOCATE)
    check_same(run, expected)
    assert ["eval/accuracy" in row for row in run.metrics] == 3 * [False, False, False, True]
    assert slept == 3 * [["the training actor", "the reference actor"]]  # once a collection
    assert run.summary["restarts"] == {}


@pytest.mark.slow
def test_a_run_that_is_killed_while_its_engine_sleeps_goes_on_exactly(run_sync, tmp_path):
    run_dir = tmp_path / "run"
    process = Process(run_dir, TRANSFORMERS, COLOCATE)
    assert process.wait_for("train", 8), (tmp_path / "stderr").read_text()  # the last step of a collection, saved amid it
    process.process.send_signal(signal.SIGKILL)
    process.end()
    for child in process.left():
        child.kill()
    assert Process(run_dir).end() == 0, (tmp_path / "stderr").read_text()
    check_same(Finished(run_dir), run_sync(*STEPS, TRANSFORMERS))


@pytest.mark.slow
def test_engines_that_die_asleep_and_awake_and_a_reference_come_back_beside_the_others(run_sync, tmp_path, monkeypatch):
    settings = [*STEPS, TRANSFORMERS, "inference_model.num_devices=2"]
    expected = run_sync(*settings)
    moments = ("train", 2, "inference"), ("generate", 2, "inference"), ("train", 6, "reference")  # the first of them asleep
    faults = [Fault(*moment, signal.SIGKILL) for moment in moments]
    Faults(faults).install(monkeypatch)
    grpo_sync.main(compose("grpo_arithmetic", [*SMALL, *settings, COLOCATE]), tmp_path)
    check_same(Finished(tmp_path), expected)
    assert Finished(tmp_path).summary["restarts"] == {"inference": 2, "reference": 1}
    assert all(fault.struck_s is not None for fault in faults)


@pytest.fixture(scope="module")
def cluster():
    with_code = {"env_vars": worker_environment()}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env=with_code,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def large() -> Qwen2ForCausalLM:
    """Random weights of 80 MiB, tied: enough to tell them from what else a process holds."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=1664,
            vocab_size=16384,
            tie_word_embeddings=True,
        )
    )
    model.generation_config.eos_token_id = 1
    return model


def own_memory(pid: int) -> int:
    """Bytes that no other process holds too, such as the segment that pushes come in."""
    return psutil.Process(pid).memory_full_info().uss


def test_an_engine_that_sleeps_gives_its_memory_back_and_a_push_wakes_it(cluster, large, tmp_path):
    large.save_pretrained(tmp_path)
    spec = EngineSpec("transformers", str(tmp_path), "cpu", "float32", 0, 8, 64, 1.0, 0.9, True, sleeps=True)
    (engine,) = start_actors(InferenceActor, [ANYWHERE], "cpu", 0, 1, {}, spec)
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}

    def ask(method: str, *arguments):
        return ray.get(getattr(engine, method).remote(*arguments), timeout=TIMEOUT_S)

    pid = ask("start")
    sender = SharedMemorySender(list(large.named_parameters()), "float32", 1, TIMEOUT_S)
    ask("connect", sender.description(), "the engine", 0, list(aliases))
    requests = [Request(0, [5, 6, 7], Sampling(8, 32, 1.0))]

    def push(version: int) -> int:
        """The engine's memory, once it holds `version` and has sampled with it."""
        sent = sender.send(version, large.named_parameters())
        verify(sent, ask("update_weights", version), "the engine", aliases)
        ask("generate", requests, 0)
        return own_memory(pid)

    weights = sum(parameter.numel() * 4 for parameter in large.parameters())
    assert weights > 80 * MB
    push(1)
    before, awake = ask("log_probs", [5, 6, 7, 8]), own_memory(pid)
    for version in (2, 3):  # its weights lie where it loaded them, and then where a push put them
        for _ in range(2):  # asleep it stays so
            ask("sleep")
            assert awake - own_memory(pid) > 0.95 * weights
        for refused in (("generate", requests, 0), ("log_probs", [5, 6, 7, 8])):
            with pytest.raises(AssertionError, match="an engine that sleeps has no weights"):
                ask(*refused)
        assert abs(push(version) - awake) < 0.5 * weights  # they are there again, and once
    assert abs(push(4) - awake) < 0.5 * weights  # which finds it awake
    assert ask("log_probs", [5, 6, 7, 8]).tolist() == before.tolist()
    ray.kill(engine)


def test_vllm_is_asleep_but_for_what_a_push_needs():
    """By the signatures of the vLLM that is installed; on a CPU there is no sleep mode to run."""
    engine, calls = VLLMEngine.__new__(VLLMEngine), []
    engine.engine = create_autospec(LLMEngine, instance=True)
    engine.engine.engine_core = create_autospec(object, engine_core=None)
    engine.engine.is_sleeping.side_effect = lambda: calls[-1:] == ["sleep 2"]
    engine.engine.sleep.side_effect = lambda level: calls.append(f"sleep {level}")
    engine.engine.wake_up.side_effect = lambda tags: calls.append(f"wake {tags}")
    engine._workers = lambda method, args=(), kwargs=None: calls.append(method) or [({}, [])]
    engine._adopt = lambda version: calls.append(f"adopt {version}")
    engine.aliases, engine.policy_version = [], 1
    engine.sleep()
    engine.sleep()
    receive = ["start_weight_update", "update_weights", "finish_weight_update", "adopt 1", "held"]
    engine.update_weights(1)
    assert calls == ["sleep 2", "wake ['weights']", *receive, "wake ['kv_cache']"]
    calls.clear()
    engine.update_weights(1)
    assert calls == receive


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_an_engine_on_a_gpu_sleeps_and_holds_the_next_push(cluster, large, tmp_path, backend):
    large.save_pretrained(tmp_path)
    parts = pair(str(tmp_path), backend, device="cuda", dtype="bfloat16", sleeps=True)
    turns = Turns(parts.engines, named("training", parts.trainer.actors))
    for _ in range(2):
        free = torch.cuda.mem_get_info()[0]
        turns.sleep()
        assert torch.cuda.mem_get_info()[0] - free > 40 * MB  # the weights, in vLLM of 2 bytes, and its cache
        assert parts.probe(parts.train_and_push()) < PROBE_TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_run_on_one_gpu_agrees_with_the_engine_that_it_wakes(run_sync, backend):
    engine = [f"inference_model.backend={backend}", "inference_model.gpu_memory_utilization=0.3"]
    run = run_sync("device=cuda", *engine, "inference_model.dtype=float32", COLOCATE)
    assert max(largest_difference(run.rollouts).values()) < 1e-3
    assert run.metrics[2]["train/kl_to_reference"] > 1e-4
