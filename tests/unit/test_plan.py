import re
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, Qwen2Config

from docs.generate import ARCHITECTURES
from grpo.builtin import Recipe, make_config, make_tokenizer
from grpo.devices import resolve_device
from grpo.errors import ConfigError
from grpo.four_bit import check_four_bit
from grpo.generate import asker
from grpo.launch import CONFIG_DIR, compose
from grpo.measure import ask
from grpo.models import num_parameters
from grpo.plan import make_plan

from .conftest import file_names

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
CPU = "device=cpu"
TRANSFORMERS = "inference_model.backend=transformers"
COLOCATE = ["colocate=true", TRANSFORMERS]


def plan_of(*overrides: str, name: str = "grpo_arithmetic"):
    return make_plan(compose(name, [CPU, *overrides]))


def test_the_description_says_what_a_dry_run_promises():
    sizes = ["train.total_dialog_turns=5120", "train.dialog_turns_per_batch=512", "train.optim_batch_size=256"]
    sizes += ["train.gradient_accumulation_steps=4", "train.epochs=2", "env.repeats=8"]
    config = compose("grpo_arithmetic", [CPU, *sizes, "train.sync_iter=false"])
    text = make_plan(config).describe(config)
    for part in (
        "device            cpu",
        "1 x trainer",
        "1 x inference",
        "1 x reference",
        "10 of 512 responses (64 prompts x 8)",
        "40 of 256 responses in 4 micro-batches a rank\n",
        "all: 0.401 million parameters in float32, passes in float32",
        "reference         in processes of its own",
        "5120 responses, each trained on 2 times",
        "at most 1 policy versions",
        "0.4 million parameters",
    ):
        assert part in text
    config = compose("grpo_arithmetic", [CPU, "train.sync_iter=true"])
    text = make_plan(config).describe(config)
    assert "at most 0 policy versions" in text and "responses, each trained on once\n" in text


def test_memory_is_estimated_a_role():
    plan = plan_of(
        "env.num_envs=4",
        "env.repeats=8",
        "env.max_prompt_length=32",
        "inference_model.max_tokens=24",
        "optimizer.name=adamw",
    )
    config = make_config(Recipe(), make_tokenizer())
    weights = 4 * num_parameters(config)
    assert plan.parameters == num_parameters(config)
    # Keys and values of 2 layers with 2 heads of 32, for 32 responses of 32 + 24 tokens, 4 bytes each.
    cache = 32 * 56 * 2 * 2 * 2 * 32 * 4
    assert plan.memory_bytes == {"trainer": 5 * weights, "inference": weights + cache, "reference": weights}
    assert plan_of("optimizer.name=sgd").memory_bytes["trainer"] == 3 * weights


def test_in_turns_the_larger_of_the_two_phases_counts(monkeypatch):
    turns = [*COLOCATE, "optimizer.name=adamw"]
    plan = plan_of(*turns, "env.num_envs=4", "env.max_prompt_length=32", "inference_model.max_tokens=24")
    weights, engine = 4 * plan.parameters, plan.memory_bytes["inference"]
    assert plan.memory_bytes["trainer"] == 5 * weights
    at_rest = 3 * weights  # the weights and two states
    assert plan.phases == {
        "sampling": {"trainer": at_rest, "inference": engine, "reference": weights},
        "training": {"trainer": 5 * weights, "inference": 0, "reference": weights},
    }
    assert plan.total_memory_bytes == at_rest + engine + weights > 6 * weights
    short = ["env.num_envs=1", "env.repeats=2", "env.max_prompt_length=8", "inference_model.max_tokens=8"]
    plan = plan_of(*turns, *short)
    assert plan.total_memory_bytes == 6 * weights  # so small a cache is less than the trainer takes while it works
    config = compose("grpo_arithmetic", [CPU, *turns, *short])
    assert "in turns          0.01 GiB sampling, 0.01 GiB training" in plan.describe(config)
    assert "in turns" not in plan_of().describe(config)


def test_what_fits_in_turns_alone_is_not_refused(monkeypatch):
    together, in_turns = plan_of(TRANSFORMERS), plan_of(*COLOCATE)
    free = in_turns.total_memory_bytes
    assert together.total_memory_bytes > free
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert plan_of(*COLOCATE).total_memory_bytes == free
    with pytest.raises(ConfigError, match=r"needs about .* GiB of memory"):
        plan_of(TRANSFORMERS)


@without_gpu
def test_vllm_does_not_sleep_on_a_cpu():
    with pytest.raises(ConfigError) as raised:
        plan_of("colocate=true")
    assert str(raised.value) == (
        "colocate (true) needs inference_model.backend=transformers on a CPU: vLLM sleeps on GPUs only"
    )


@pytest.mark.parametrize("number", [1, 3])
def test_colocated_processes_share_one_gpu_however_many_there_are(gpus, number):
    gpus(number)
    plan = make_plan(compose("grpo_arithmetic", ["device=cuda", "colocate=true"]))
    assert (plan.gpus_per_process, plan.transport) == (pytest.approx(1 / 3), "shared_memory")
    plan = make_plan(compose("grpo_arithmetic", ["device=cuda", "colocate=true", "train_model.lora.enabled=true"]))
    assert plan.gpus_per_process == 1 / 2
    for typed in ("train_model.num_devices=2", "inference_model.tensor_parallel_size=2"):
        with pytest.raises(
            ConfigError, match=r"colocate \(true\) keeps a run on one GPU, which training ranks, or an engine's"
        ):
            make_plan(compose("grpo_arithmetic", ["device=cuda", "colocate=true", typed]))


def test_with_lora_only_the_adapters_have_gradients_and_optimiser_states_and_the_reference_is_inside():
    plan = plan_of(
        "train_model.lora.enabled=true", "train_model.lora.r=4", "optimizer.name=adamw", "train_model.num_devices=2"
    )
    recipe, head = Recipe(), Recipe().hidden_size // Recipe().heads
    keys, hidden, wide = recipe.kv_heads * head, recipe.hidden_size, recipe.feed_forward
    # A is [r, in] and B [out, r]: q and o, k and v, gate and up and down.
    adapters = recipe.layers * 4 * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + wide))
    assert plan.trained == adapters
    weights = 4 * plan.parameters
    assert plan.memory_bytes["trainer"] == (weights + 4 * 4 * adapters) // 2 + weights
    assert plan.roles == {"trainer": 2, "inference": 1}
    both = plan_of("train_model.lora.enabled=true", "ref_model.num_devices=1")
    assert both.roles == {"trainer": 1, "inference": 1, "reference": 1}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if path.stem != "grpo_offline"))
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_shipped_configuration_is_planned_in_both_modes(name, mode, gpus):
    gpus(3)
    config = compose(name, [f"mode={mode}"])
    plan = make_plan(config)
    assert (plan.device, plan.gpus_per_process) == ("cuda", 1)
    assert f"staleness         at most {0 if mode == 'sync' else 4} policy versions" in plan.describe(config)


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
@pytest.mark.parametrize("objective", ["grpo", "ot"])
def test_every_shipped_model_is_planned(model, objective, gpus):
    gpus(8)
    config = compose(
        "grpo_gsm8k" if model != "builtin_arithmetic" else "grpo_arithmetic", [f"{model=!s}", f"{objective=!s}"]
    )
    plan = make_plan(config)
    assert plan.memory_bytes.keys() == {"trainer", "inference", "reference"}
    assert plan.describe(config).startswith("device            cuda, 1 GPU a process\n")


def test_states_of_8_bits_take_a_quarter():
    exact, rounded = (plan_of(f"optimizer.name={name}") for name in ("adamw", "adamw_8bit"))
    assert exact.memory_bytes["trainer"] - rounded.memory_bytes["trainer"] == 2 * 3 * exact.parameters


@pytest.mark.parametrize(
    "typed",
    [["train_model.lora.enabled=true", "train_model.quantization.enabled=true"], ["ref_model.quantization.enabled=true"]],
)
def test_four_bits_without_bitsandbytes_are_refused_before_anything_starts(monkeypatch, typed):
    monkeypatch.setattr("grpo.four_bit.find_spec", lambda name: None)
    key = typed[-1].split("=")[0]
    with pytest.raises(ConfigError) as raised:
        plan_of(*typed)
    assert str(raised.value) == f"{key} (true) needs bitsandbytes: pip install bitsandbytes==0.50.2, or leave it false"


def test_models_that_bitsandbytes_would_get_wrong_are_refused(monkeypatch):
    monkeypatch.setattr("grpo.four_bit.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"KEY \(true\): GPT2LMHeadModel keeps its weights transposed; leave it false"):
        check_four_bit(GPT2Config(), "KEY")
    narrow = Qwen2Config(hidden_size=96, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
    expected = (
        r"KEY \(true\) needs layers whose inputs are a multiple of 64, and model.layers.0.self_attn.q_proj has 96: leave"
    )
    with pytest.raises(ConfigError, match=expected):
        check_four_bit(narrow, "KEY")


def test_a_base_in_four_bits_takes_an_eighth_and_is_whole_on_every_rank(monkeypatch):
    monkeypatch.setattr("grpo.four_bit.find_spec", lambda name: name)  # counting needs no bitsandbytes
    overrides = ("train_model.lora.enabled=true", "train_model.lora.r=4", "train_model.num_devices=2")
    plain, rounded = plan_of(*overrides), plan_of(*overrides, "train_model.quantization.enabled=true")
    recipe, head = Recipe(), Recipe().hidden_size // Recipe().heads
    keys, hidden, wide = recipe.kv_heads * head, recipe.hidden_size, recipe.feed_forward
    linear = recipe.layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide)
    assert (plain.in_four_bits, rounded.in_four_bits) == (0, linear)
    saved = plain.memory_bytes["trainer"] - rounded.memory_bytes["trainer"]
    assert saved == pytest.approx(4 * linear / 2 - linear * (0.5 + 1 / 64), abs=1)
    config = compose("grpo_arithmetic", [CPU, *overrides, "train_model.quantization.enabled=true"])
    assert "million parameters in float32, passes in float32, on a base with 0.393 million in 4 bits" in make_plan(
        config
    ).describe(config)
    both = plan_of(*overrides, "train_model.quantization.enabled=true", "ref_model.num_devices=1")
    kept = plan_of(
        *overrides,
        "train_model.quantization.enabled=true",
        "ref_model.num_devices=1",
        "ref_model.quantization.enabled=false",
    )
    difference = kept.memory_bytes["reference"] - both.memory_bytes["reference"]
    assert difference == pytest.approx(linear * (4 - 0.5 - 1 / 64), abs=1)


def test_the_reference_is_held_in_the_precision_of_the_passes():
    bytes_of = {name: plan_of(f"train.mixed_precision={name}").memory_bytes for name in ("none", "bf16", "fp16")}
    assert bytes_of["none"]["reference"] == 2 * bytes_of["bf16"]["reference"] == 2 * bytes_of["fp16"]["reference"]
    assert bytes_of["none"]["trainer"] == bytes_of["bf16"]["trainer"]


def test_anchor_states_are_counted_and_said():
    sizes = ["objective=ot", "train.total_dialog_turns=5120", "train.dialog_turns_per_batch=512"]
    sizes += ["train.optim_batch_size=512", "env.max_prompt_length=32", "inference_model.max_tokens=24"]
    config = compose("grpo_arithmetic", [CPU, *sizes])
    plan = make_plan(config)
    # Three copies of 512 x 56 tokens x 128 directions of 2 bytes.
    assert plan.states_bytes == 3 * 512 * 56 * 128 * 2
    assert plan.total_memory_bytes == sum(plan.memory_bytes.values()) + plan.states_bytes
    assert "anchor states     about 0.02 GiB" in plan.describe(config)
    assert plan_of(*sizes, "train.sync_iter=false").states_bytes == 5 * 512 * 56 * 128 * 2
    assert plan_of("objective=kl").states_bytes == 0
    bound = ["mode=async", "train.max_staleness=2"]
    # Three versions' 512 responses in the buffer or on the way to it, and two copies of a batch.
    assert plan_of(*sizes, *bound).states_bytes == (3 + 2) * 512 * 56 * 128 * 2
    assert plan_of(*sizes, *bound, "train.buffer_size=640").states_bytes == (640 + 2 * 512) * 56 * 128 * 2
    # Drawn from them at random, with 4 groups at the engine and a batch's 64 before it besides.
    uniform = plan_of(*sizes, *bound, "train.replay=uniform", "env.num_envs=4")
    assert uniform.states_bytes == (3 * 512 + 68 * 8 + 2 * 512) * 56 * 128 * 2
    with pytest.raises(ConfigError, match=r"or inference_model.max_tokens, or train.dialog_turns_per_batch"):
        plan_of("objective=ot", "env.num_envs=1000000000")
    with pytest.raises(ConfigError, match=r"or inference_model.max_tokens, or train.buffer_size"):
        plan_of("objective=ot", "env.num_envs=1000000000", "mode=async")


def test_the_description_says_what_batches_are_drawn_from():
    config = compose("grpo_arithmetic", [CPU, "mode=async", "train.replay=uniform", "train.max_staleness=3"])
    assert "samples           51200 responses, drawn at random from the last 2048" in make_plan(config).describe(config)


def test_the_description_names_adapters_precision_and_budget():
    overrides = [CPU, "train_model.lora.enabled=true", "train.mixed_precision=bf16", "train.max_tokens_per_micro_batch=4096"]
    config = compose("grpo_arithmetic", overrides)
    text = make_plan(config).describe(config)
    assert "trained           LoRA adapters: 0." in text
    assert "million parameters in float32, passes in bfloat16" in text
    assert "reference         the trainer without its adapters" in text
    assert "micro-batches a rank, or more of at most 4096 tokens" in text
    config = compose("grpo_arithmetic", [CPU, "train.use_kl_to_ref=false"])
    assert "reference         none" in make_plan(config).describe(config)


def test_a_lora_target_that_the_model_does_not_have_is_refused_before_anything_starts():
    with pytest.raises(
        ConfigError, match=r"train_model.lora.target_modules \(query\) is no linear layer of the model, which has q_"
    ):
        plan_of("train_model.lora.enabled=true", "train_model.lora.target_modules=query")


def test_a_role_is_planned_only_where_it_is_used():
    assert plan_of().roles == {"trainer": 1, "inference": 1, "reference": 1}
    without = plan_of("train.use_kl_to_ref=false")
    assert without.roles == {"trainer": 1, "inference": 1}
    assert without.memory_bytes.keys() == without.roles.keys()


def test_roles_that_take_turns_have_every_core_and_others_share_them(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    two_engines = "inference_model.num_devices=2"
    assert plan_of(two_engines).threads == {"trainer": 12, "inference": 6, "reference": 12}
    assert plan_of(two_engines, "train.sync_iter=false").threads == {"trainer": 3, "inference": 3, "reference": 3}


def test_planning_starts_and_writes_nothing(tmp_path):
    plan_of(f"model.cache_dir={tmp_path}")
    assert file_names(tmp_path) == []


@without_gpu
def test_a_machine_without_a_gpu_refuses_the_large_default_and_names_what_runs_there():
    with pytest.raises(ConfigError) as raised:
        make_plan(compose("grpo_gsm8k", []))
    message = str(raised.value)
    assert "\n" not in message
    assert "model.name (Qwen/Qwen2.5-3B-Instruct) has about 3 billion parameters" in message
    assert "--config-name grpo_arithmetic" in message


@without_gpu
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device \(cuda\) is not on this machine; use device=auto"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


@pytest.fixture
def cuda_build(monkeypatch) -> None:
    """PyTorch has CUDA, and sees no GPU; nvidia-smi is there."""
    monkeypatch.setattr("grpo.devices.cuda_build", lambda: "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_that_is_too_old_is_said_in_the_place_of_a_machine_without_a_gpu(cuda_build, monkeypatch, device):
    expected = (
        f"device ({device}): PyTorch's CUDA 12.9 sees no GPU: a newer driver is needed, or device=cpu, with "
        "inference_model.backend=transformers where responses are sampled"
    )
    for call in (lambda: resolve_device(device), lambda: make_plan(compose("grpo_gsm8k", [f"{device=!s}"]))):
        with pytest.raises(ConfigError) as raised:
            call()
        assert str(raised.value) == expected
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert resolve_device("auto") == "cpu"


def test_vllm_built_for_cuda_is_refused_on_a_cpu(cuda_build):
    with pytest.raises(ConfigError) as raised:
        plan_of()
    expected = "device (cpu) needs inference_model.backend=transformers: the vLLM here is the CUDA build"
    assert str(raised.value) == expected
    assert plan_of(TRANSFORMERS).device == "cpu"
    asked = {"model": "nowhere"}
    config = compose("grpo_arithmetic", [CPU])
    with pytest.raises(ConfigError, match=re.escape(expected)):
        ask(config, asked, [], None, None, 0)
    with pytest.raises(ConfigError, match=re.escape(expected)), asker(config, "nowhere", 0.0):
        pass


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(("number", "share"), [(1, 1 / 3), (2, 1 / 2), (3, 1.0), (8, 1.0)])
def test_processes_share_gpus_where_there_are_fewer(gpus, number, share):
    gpus(number)
    assert plan_of("device=cuda").gpus_per_process == pytest.approx(share)
    assert f"{share:.2g} GPU a process" in plan_of("device=cuda").describe(compose("grpo_arithmetic", []))


def gpu_plan_of(*overrides: str):
    return make_plan(compose("grpo_gsm8k", ["device=cuda", *overrides]))


def test_an_engine_that_wants_more_of_a_gpu_than_those_beside_it_leave_is_refused(gpus):
    gpus(1)
    with pytest.raises(ConfigError) as raised:
        gpu_plan_of("model=qwen2_5_0_5b")
    weights = 4 * num_parameters(ARCHITECTURES["Qwen2.5-0.5B"])
    # Weights, gradients, two states; a reference of half the bytes; half a GiB of CUDA's own a process.
    held = (4 + 0.5) * weights / 2**30 + 1.5
    assert str(raised.value) == (
        f"inference_model.gpu_memory_utilization (0.9) must be at most {(80 - held) // 0.8 / 100:g}, less what activations "
        f"take: 1 x inference on a GPU of 80.0 GiB, of which 1 x trainer and 1 x reference beside it take at least "
        f"{held:.1f}: lower it, or set colocate=true, see docs/memory.md"
    )
    fits = f"inference_model.gpu_memory_utilization={(80 - held) // 0.8 / 100:g}"
    assert gpu_plan_of("model=qwen2_5_0_5b", fits).gpus_per_process == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"lower it, see docs/memory.md"):  # in async mode nothing is taken in turns
        gpu_plan_of("model=qwen2_5_0_5b", "mode=async")
    assert gpu_plan_of("model=qwen2_5_0_5b", TRANSFORMERS)  # which takes what it needs
    assert gpu_plan_of("model=qwen2_5_0_5b", "optimizer.name=adamw_offload")  # states are the CPU's


def test_on_gpus_a_dry_run_says_what_each_process_has_of_its_card(gpus):
    gpus(1)
    weights = 4 * num_parameters(ARCHITECTURES["Qwen2.5-3B"]) / 2**30

    def lines(*overrides: str) -> str:
        config = compose("grpo_gsm8k", ["device=cuda", *overrides])
        return make_plan(config).describe(config)

    text = lines("colocate=true", "inference_model.gpu_memory_utilization=0.4")
    # Weights, gradients, two states, in float32: the whole copy is the CPU's. The reference is in bfloat16.
    assert f"process           1 x trainer, about {4 * weights:.2f} GiB and" in text
    assert "process           1 x inference, 0.4 of its GPU and" in text
    assert f"process           1 x reference, about {weights / 2:.2f} GiB and" in text
    assert "memory            of GPUs, for 3085.9 million parameters, activations not counted\n" in text
    assert (
        f"in turns          {3.5 * weights:.2f} GiB beside the engine sampling, {4.5 * weights:.2f} GiB training\n" in text
    )
    gpus(8)
    text = lines("inference_model.tensor_parallel_size=2", "optimizer.name=adamw_offload", "objective=ot")
    assert "1 x trainer, about 0.00 GiB and" in text  # all of it is the CPU's
    assert "1 x inference, 0.9 of each of its 2 GPUs and" in text
    assert "in turns" not in text
    assert "GiB of the CPU's memory\n" in text  # the states that divergence=ot compares with
    # An engine of transformers has what it needs, in float32.
    assert f"1 x inference, about {weights:.0f}" in lines(TRANSFORMERS, "env.num_envs=1", "env.repeats=2")


def test_each_gpu_has_the_processes_that_ray_gives_it(gpus):
    gpus(2)
    assert gpu_plan_of().gpus_per_process == 1 / 2  # an engine and a reference of 6 GiB on one, the trainer on the other
    with pytest.raises(
        ConfigError, match=r"\(0.9\) must be at most 0.49, .* 2 x inference on a GPU of 80.0 GiB, of which CUDA"
    ):
        gpu_plan_of("inference_model.num_devices=2")
    assert gpu_plan_of("inference_model.num_devices=2", "inference_model.gpu_memory_utilization=0.49")


def test_in_turns_each_phase_has_to_fit_by_itself(gpus):
    gpus(1)
    turns = ["colocate=true", "inference_model.gpu_memory_utilization=0.4"]
    assert gpu_plan_of(*turns)
    weights = 4 * num_parameters(ARCHITECTURES["Qwen2.5-3B"]) / 2**30
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization \(0.5\) must be at most 0.4\d, .*: lower it, see docs"):
        gpu_plan_of("colocate=true", "inference_model.gpu_memory_utilization=0.5")  # beside 3.5 times the weights
    gpus(1, gib=4.5 * weights + 1)  # CUDA has half a GiB more than that
    with pytest.raises(
        ConfigError, match=r"^model.name \(.*\): 1 x trainer and 1 x reference take at least .* GiB of a GPU"
    ):
        gpu_plan_of("colocate=true", "inference_model.gpu_memory_utilization=0.1")


def test_a_prompt_and_response_beyond_the_models_positions_are_refused():
    assert plan_of("env.max_prompt_length=200", "inference_model.max_tokens=56")
    with pytest.raises(ConfigError) as raised:
        plan_of("env.max_prompt_length=200", "inference_model.max_tokens=57")
    expected = "env.max_prompt_length (200) + inference_model.max_tokens (57) must be at most the model's 256 positions"
    assert str(raised.value) == expected


def test_a_model_that_does_not_fit_in_memory_is_refused_before_anything_is_loaded(tmp_path):
    Qwen2Config(
        hidden_size=16384, num_hidden_layers=200, num_attention_heads=128, intermediate_size=65536, num_key_value_heads=8
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as raised:
        plan_of(f"model.name={tmp_path}")
    message = str(raised.value)
    assert message.startswith(f"model.name ({tmp_path}) needs about ")
    assert "GiB are free: use a smaller model" in message
    assert "\n" not in message


def test_too_many_responses_at_once_do_not_fit_in_memory_either():
    with pytest.raises(ConfigError, match=r"GiB are free: .* lower env.num_envs"):
        plan_of("env.num_envs=1000000000")


def test_an_unknown_builtin_model_is_refused():
    with pytest.raises(ConfigError, match=r"model.name \(builtin/algebra\): the only built-in model is"):
        plan_of("model.name=builtin/algebra")


def test_a_model_directory_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"model.name \(./nowhere\): there is no such directory"):
        plan_of("model.name=./nowhere")


def test_a_local_directory_is_planned_from_its_configuration_alone(tmp_path):
    config = make_config(Recipe(hidden_size=16, layers=1, heads=2, kv_heads=1, feed_forward=32), make_tokenizer())
    path = tmp_path / "mine-70B"  # what its name says is not looked at where the directory is there
    config.save_pretrained(path)
    assert plan_of(f"model.name={path}").parameters == num_parameters(config)
