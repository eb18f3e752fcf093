import re
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo.config import RENAMED, RunConfig, check_keys, known_keys
from grpo.config_sections import TrainConfig
from grpo.errors import ConfigError
from grpo.launch import CONFIG_DIR, compose
from grpo.objectives import policy

ARITHMETIC = "grpo_arithmetic"
ONLINE = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if "objective:" in path.read_text())
SIZES = ["env.repeats=8", "train.total_dialog_turns=1024", "train.dialog_turns_per_batch=512", "train.optim_batch_size=512"]
SIZES += ["train.gradient_accumulation_steps=4"]


def refused(*overrides: str) -> str:
    """The message that `overrides` on top of SIZES end in."""
    with pytest.raises(ConfigError) as raised:
        compose(ARITHMETIC, [*SIZES, *overrides])
    message = str(raised.value)
    assert "\n" not in message
    return message


OFFLINE = "grpo_offline"  # tests/unit/test_offline_config.py


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if path.stem != OFFLINE))
def test_every_shipped_configuration_composes(name):
    config = compose(name, [])
    assert isinstance(config, RunConfig)
    assert isinstance(config.train, TrainConfig)
    assert config.train.buffer_size == config.train.dialog_turns_per_batch
    assert config.num_steps > 0


@pytest.mark.parametrize("group", sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir()))
def test_every_option_of_every_group_composes(group):
    for option in (CONFIG_DIR / group).glob("*.yaml"):
        assert isinstance(compose(ARITHMETIC, [f"{group}={option.stem}"]), RunConfig)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIG_DIR / "objective").glob("*.yaml")))
def test_every_objective_goes_with_every_configuration(name, preset):
    config, plain = compose(name, [f"objective={preset}"]), compose(name, [])
    assert config.objective.policy_loss in policy.names()
    coefficient = {"dapo": 0.0, "dr_grpo": 0.0, "cispo": 0.0, "ot": 0.1}.get(preset, plain.train.kl_to_ref_coeff)
    assert config.train.kl_to_ref_coeff == coefficient
    assert config.train.kl_coef_in_loss is (preset not in ("rloo", "reinforce"))
    typed = compose(name, ["train.kl_to_ref_coeff=0.7", f"objective={preset}", "objective.clip_low=0.9"])
    assert (typed.train.kl_to_ref_coeff, typed.objective.clip_low) == (0.7, 0.9)
    assert (config.optimizer, config.env) == (plain.optimizer, plain.env)


PLAIN = {"policy_loss": "clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "response", "advantage_scale": "group"}
PLAIN |= {"baseline": "mean", "divergence": "k3"}
SCORE = {"policy_loss": "reinforce", "aggregation": "constant", "advantage_scale": "none", "divergence": "k1"}
PRESETS = {
    "grpo": {},
    "approx_kl": {},
    "kl": {"divergence": "kl", "kl_margin": 0.05},
    "ot": {"divergence": "ot", "ot_window": 16, "ot_target": 0.05, "ot_epsilon": 0.1, "ot_iterations": 5},
    "dapo": {"clip_high": 0.28, "aggregation": "token"},
    "dr_grpo": {"aggregation": "constant", "advantage_scale": "none"},
    "gspo": {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token"},
    "rloo": SCORE | {"baseline": "leave_one_out"},
    "reinforce": SCORE,
}


def test_the_presets_are_what_their_papers_say():
    assert {path.stem for path in (CONFIG_DIR / "objective").glob("*.yaml")} == PRESETS.keys()
    for name, differs in PRESETS.items():
        objective = asdict(compose(ARITHMETIC, [f"objective={name}"]).objective)
        assert {key: objective[key] for key in PLAIN | differs} == PLAIN | differs, name


@pytest.mark.parametrize(
    ("overrides", "anchor", "reference", "penalised"),
    [
        (["objective=grpo"], None, True, True),
        (["objective=dapo"], None, False, False),
        (["objective=dapo", "train.kl_to_ref_coeff=0.1"], None, True, True),
        (["objective=rloo"], None, True, False),  # the divergence is in the reward
        (["objective=rloo", "train.entropy_coeff=0.1"], None, True, True),
        (["objective=kl"], None, True, True),
        (["objective=ot"], "reference", True, True),
        (["objective=ot", "objective.ot_anchor=old"], "old", False, True),
        (["objective=ot", "objective.ot_anchor=old", "train.use_kl_to_ref=false"], None, False, False),
        (["objective=ot", "train.kl_to_ref_coeff=0"], None, False, False),
        (["objective=ot", "train.kl_to_ref_coeff=0", "train.kl_coef_in_loss=false"], None, False, False),
    ],
)
def test_what_a_divergence_needs_is_there_and_nothing_else(overrides, anchor, reference, penalised):
    config = compose(ARITHMETIC, overrides)
    assert (config.anchor, config.uses_reference, config.penalised) == (anchor, reference, penalised)
    assert config.num_references == int(reference)


def test_the_defaults_of_the_class_itself_are_a_run():
    assert RunConfig().num_collections == 200


def test_the_weights_of_a_reward_can_be_typed():
    config = compose(ARITHMETIC, ["env.reward_shape=hybrid", "env.reward_weights={length: 0, steps: 0.5}"])
    assert config.env.reward_weights == {"length": 0.0, "steps": 0.5}


def test_yaml_values_and_overrides_arrive():
    config = compose(ARITHMETIC, ["train.epochs=3", "optimizer.betas=[0.8,0.95]", "env.data=x.jsonl"])
    assert (config.env.dataset, config.model.name) == ("arithmetic", "builtin/arithmetic")
    assert config.train.epochs == 3
    assert list(config.optimizer.betas) == [0.8, 0.95]
    assert config.env.data == "x.jsonl"


# What is typed, and the message: key, value and rule.
BAD_VALUES = [
    (["env.num_envs=0"], "env.num_envs (0) must be at least 1"),
    (["env.max_prompt_length=0"], "env.max_prompt_length (0) must be at least 1"),
    (["env.validation_size=0"], "env.validation_size (0) must be at least 1"),
    (["env.test_size=-3"], "env.test_size (-3) must be at least 1"),
    (["env.max_samples=0"], "env.max_samples (0) must be at least 1"),
    (["env.few_shot=-1"], "env.few_shot (-1) must be at least 0"),
    (["env.style=json"], "env.style (json) must be one of hash, think"),
    (["env.style=think", "env.dataset=math"], "env.style (think) is for env.dataset=gsm8k, not for math: leave it out"),
    (["env.repeats=1"], "env.repeats (1) must be at least 2: advantages compare the responses of a group"),
    (["env.reward_fn=mine"], "env.reward_fn (mine) must be PATH.py:FUNCTION"),
    (["env.reward_fn=mine.py"], "env.reward_fn (mine.py) must be PATH.py:FUNCTION"),
    (["env.reward_fn='mine.py:'"], "env.reward_fn (mine.py:) must be PATH.py:FUNCTION"),
    (["train_model.num_devices=0"], "train_model.num_devices (0) must be at least 1"),
    (["ref_model.num_devices=0"], "ref_model.num_devices (0) must be at least 1 without train_model.lora.enabled=true"),
    (["ref_model.num_devices=-1"], "ref_model.num_devices (-1) must be at least 0"),
    (["train_model.lora.r=0"], "train_model.lora.r (0) must be at least 1"),
    (["train_model.lora.alpha=0"], "train_model.lora.alpha (0.0) must be above 0"),
    (["train_model.lora.alpha=inf"], "train_model.lora.alpha (inf) must be above 0"),
    (["train_model.lora.dropout=1"], "train_model.lora.dropout (1.0) must be in [0, 1)"),
    (["train_model.lora.dropout=-0.1"], "train_model.lora.dropout (-0.1) must be in [0, 1)"),
    (
        ["train_model.lora.target_modules=''"],
        "train_model.lora.target_modules () must be all-linear or names of modules, such",
    ),
    (["train_model.lora.target_modules='q_proj,'"], "train_model.lora.target_modules (q_proj,) must be all-linear or names"),
    (["train_model.lora.target_modules=[]"], "train_model.lora.target_modules ([]) must be all-linear or names of modules"),
    (["train_model.lora.target_modules=null"], "train_model.lora.target_modules (None) must be all-linear or names"),
    (["train.mixed_precision=int8"], "train.mixed_precision (int8) must be one of none, bf16, fp16"),
    (
        ["train.max_tokens_per_micro_batch=9", "env.max_prompt_length=6", "inference_model.max_tokens=4"],
        "train.max_tokens_per_micro_batch (9) must be at least env.max_prompt_length (6) + inference_model.max_tokens (4)",
    ),
    (["inference_model.num_devices=0"], "inference_model.num_devices (0) must be at least 1"),
    (["inference_model.backend=tgi"], "inference_model.backend (tgi) must be one of vllm, transformers"),
    (["inference_model.max_tokens=0"], "inference_model.max_tokens (0) must be at least 1"),
    (["inference_model.temperature=0"], "inference_model.temperature (0.0) must be above 0"),
    (["inference_model.temperature=-1"], "inference_model.temperature (-1.0) must be above 0"),
    (["inference_model.temperature=nan"], "inference_model.temperature (nan) must be above 0"),
    (["inference_model.temperature=2.1"], "inference_model.temperature (2.1) must be at most 2 with backend=vllm"),
    (["inference_model.top_p=0"], "inference_model.top_p (0.0) must be in (0, 1]"),
    (["inference_model.top_p=1.1"], "inference_model.top_p (1.1) must be in (0, 1]"),
    (
        ["inference_model.top_p=0.9", "inference_model.temperature=0.7"],
        "inference_model.top_p (0.9) must be 1 where temperature (0.7) is not 1",
    ),
    (["inference_model.gpu_memory_utilization=0"], "inference_model.gpu_memory_utilization (0.0) must be in (0, 1]"),
    (["inference_model.gpu_memory_utilization=2"], "inference_model.gpu_memory_utilization (2.0) must be in (0, 1]"),
    (["objective.policy_loss=ppo"], "objective.policy_loss (ppo) must be one of cispo, clip, gspo, reinforce"),
    (["objective=rloo", "mode=async", "train.epochs=2"], "train.epochs (2) must be 1 with objective.policy_loss=reinforce"),
    (["objective.aggregation=mean"], "objective.aggregation (mean) must be one of response, token, constant"),
    (["objective.baseline=value"], "objective.baseline (value) must be one of mean, leave_one_out"),
    (["objective.advantage_scale=std"], "objective.advantage_scale (std) must be one of group, batch, none"),
    (["objective.divergence=k4"], "objective.divergence (k4) must be one of k1, k2, k3, kl, ot"),
    (["objective.kl_margin=-1"], "objective.kl_margin (-1.0) must be at least 0"),
    (["objective.ot_anchor=first"], "objective.ot_anchor (first) must be one of reference, old"),
    (["objective.ot_window=-1"], "objective.ot_window (-1) must be at least 0"),
    (["objective.ot_target=nan"], "objective.ot_target (nan) must be at least 0"),
    (["objective.ot_epsilon=0"], "objective.ot_epsilon (0.0) must be above 0"),
    (["objective.ot_iterations=0"], "objective.ot_iterations (0) must be at least 1"),
    (
        ["objective=ot", "train.share_prompts=true"],
        "train.share_prompts (True) must be false with objective.divergence=ot",
    ),
    (
        ["model.attn_implementation=flash_attention_2", "train.share_prompts=true"],
        "train.share_prompts (True) needs model.attn_implementation=sdpa or eager",
    ),
    (
        ["objective=ot", "train.kl_coef_in_loss=false"],
        "objective.divergence (ot) must be k1, k2 or k3 with train.kl_coef_in_loss=false",
    ),
    (
        ["objective=kl", "train.kl_coef_in_loss=false"],
        "objective.divergence (kl) must be k1, k2 or k3 with train.kl_coef_in_loss=false",
    ),
    (
        ["objective=ot", "objective.ot_anchor=old", "mode=async"],
        "objective.ot_anchor (old) must be reference in mode=async",
    ),
    (["objective.clip_low=0"], "objective.clip_low (0.0) must be in (0, 1]"),
    (["objective.clip_low=1.5"], "objective.clip_low (1.5) must be in (0, 1]"),
    (["objective.clip_high=0"], "objective.clip_high (0.0) must be above 0"),
    (["objective.clip_high=inf"], "objective.clip_high (inf) must be above 0"),
    (["train.total_dialog_turns=0"], "train.total_dialog_turns (0) must be at least 1"),
    (["train.dialog_turns_per_batch=0"], "train.dialog_turns_per_batch (0) must be at least 1"),
    (["train.epochs=0"], "train.epochs (0) must be at least 1"),
    (["train.optim_batch_size=0"], "train.optim_batch_size (0) must be at least 1"),
    (["train.gradient_accumulation_steps=0"], "train.gradient_accumulation_steps (0) must be at least 1"),
    (["train.kl_to_ref_coeff=-0.1"], "train.kl_to_ref_coeff (-0.1) must be at least 0"),
    (["train.kl_to_ref_coeff=nan"], "train.kl_to_ref_coeff (nan) must be at least 0"),
    (["train.kl_to_inference_coeff=-1"], "train.kl_to_inference_coeff (-1.0) must be at least 0"),
    (["train.kl_to_inference_coeff=inf"], "train.kl_to_inference_coeff (inf) must be at least 0"),
    (["train.entropy_coeff=-1"], "train.entropy_coeff (-1.0) must be at least 0"),
    (["train.eval_frequency=-1"], "train.eval_frequency (-1) must be at least 0"),
    (["optimizer.name=lion"], "optimizer.name (lion) must be one of adamw, adamw_offload, adamw_8bit, adam, sgd"),
    (["optimizer.lr=0"], "optimizer.lr (0.0) must be above 0"),
    (["optimizer.lr=inf"], "optimizer.lr (inf) must be above 0"),
    (["optimizer.lr=nan"], "optimizer.lr (nan) must be above 0"),
    (["optimizer.weight_decay=-1"], "optimizer.weight_decay (-1.0) must be at least 0"),
    (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps (-1) must be at least 0"),
    (["optimizer.clip_grad_norm=0"], "optimizer.clip_grad_norm (0.0) must be above 0"),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas ([0.9, 1.0]) must be two numbers in [0, 1)"),
    (["optimizer.betas=[-0.1,0.9]"], "optimizer.betas ([-0.1, 0.9]) must be two numbers in [0, 1)"),
    (["ray.start_timeout_s=0"], "ray.start_timeout_s (0.0) must be at least 1"),
    (["ray.timeout_s=0.5"], "ray.timeout_s (0.5) must be at least 1"),
    (["ray.timeout_s=inf"], "ray.timeout_s (inf) must be at least 1"),
    (["ray.max_restarts=-1"], "ray.max_restarts (-1) must be at least 0"),
    (["ray.min_engines=2"], "ray.min_engines (2) must be at most inference_model.num_devices (1)"),
    (
        ["ray.timeout_s=20"],
        "ray.heartbeat_timeout_s (30.0) must be below ray.timeout_s (20), or a stopped actor is not found out",
    ),
    (["ray.object_store_memory=1000"], "ray.object_store_memory (1000) must be at least 83886080"),
    (["train.logging_frequency=0"], "train.logging_frequency (0) must be at least 1"),
    (["mode=offline"], "mode (offline) must be one of sync, async"),
    (["device=tpu"], "device (tpu) must be one of auto, cpu, cuda, mps"),
    (["seed=-1"], "seed (-1) must be at least 0"),
    # across keys
    (
        ["train.dialog_turns_per_batch=500"],
        "train.dialog_turns_per_batch (500) must be a multiple of env.repeats (8)",
    ),
    (["train.optim_batch_size=12"], "train.optim_batch_size (12) must be a multiple of env.repeats (8)"),
    (
        ["train.optim_batch_size=384"],
        "train.dialog_turns_per_batch (512) must be a multiple of train.optim_batch_size (384)",
    ),
    (
        ["train.total_dialog_turns=1000"],
        "train.total_dialog_turns (1000) must be a multiple of train.dialog_turns_per_batch (512)",
    ),
    (
        ["train.gradient_accumulation_steps=5"],
        "train.optim_batch_size (512) must be a multiple of train.gradient_accumulation_steps (5) x train_model.num_devices",
    ),
    (
        ["train.buffer_size=1024"],
        "train.buffer_size (1024) must equal train.dialog_turns_per_batch (512) in sync mode",
    ),
    (
        ["train_model.quantization.enabled=true"],
        "train_model.quantization.enabled (True) needs train_model.lora.enabled=true: weights of 4 bits do not train",
    ),
    (
        ["train_model.lora.enabled=true", "ref_model.quantization.enabled=true"],
        "ref_model.quantization.enabled (True) needs ref_model.num_devices of at least 1, or "
        "train_model.quantization.enabled=true",
    ),
    (
        ["train_model.lora.enabled=true", "train_model.quantization.enabled=true", "ref_model.quantization.enabled=false"],
        "ref_model.quantization.enabled (False) needs ref_model.num_devices of at least 1",
    ),
    (["colocate=true", "mode=async"], "colocate (true) must be false in mode=async, where engines never rest"),
    (
        ["colocate=true", "train.sync_iter=false"],
        "colocate (true) must be false with train.sync_iter=false, which samples while it trains",
    ),
    (
        ["colocate=true", "ray.address=127.0.0.1:6379"],
        "colocate (true) must be false with ray.address, whose nodes have devices of their own",
    ),
    (
        ["colocate=true", "device=mps", "inference_model.backend=transformers"],
        "colocate (true) must be false with device=mps, where the trainer is on the CPU",
    ),
    (["device=mps"], "device (mps) needs inference_model.backend=transformers"),
    (["train.replay=twice"], "train.replay (twice) must be one of once, uniform"),
    (["train.replay=uniform"], "train.replay (uniform) is of async mode"),
    (["mode=async", "train.replay=uniform", "train.epochs=2"], "train.epochs (2) must be 1 with train.replay=uniform"),
    (
        ["mode=async", "train.replay=uniform", "train.max_staleness=0"],
        "train.max_staleness (0) must be at least 1 with train.replay=uniform",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_VALUES, ids=[" ".join(overrides) for overrides, _ in BAD_VALUES])
def test_a_bad_value_is_refused_with_its_key_value_and_rule(overrides, message):
    assert refused(*overrides).startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        "inference_model.top_p=0.9",
        "objective.clip_low=1",
        "train.kl_to_ref_coeff=0",
        "optimizer.betas=[0,0]",
        "optimizer.warmup_steps=0",
        "ray.heartbeat_timeout_s=1",
        "train.buffer_size=512",
        "env.reward_fn=some/where.py:score",
        "train.gradient_accumulation_steps=512",
        "env.repeats=2",
        "train.max_tokens_per_micro_batch=56",
        "train_model.lora.dropout=0",
        "train_model.lora.r=1",
        "train_model.lora.target_modules='q_proj,mlp.up_proj'",
    ],
)
def test_the_bounds_themselves_are_allowed(override):
    compose(ARITHMETIC, [*SIZES, override])


@pytest.mark.parametrize("value", ["[]", "[0.9]", "[0.9,0.9,0.9]"])
def test_another_number_of_betas_than_two_is_refused(value):
    assert refused(f"optimizer.betas={value}").startswith("optimizer.betas")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train.optim_batch_sz=8", "unknown key train.optim_batch_sz: the nearest known key is train.optim_batch_size"),
        ("optimizer.lrr=1", "unknown key optimizer.lrr: the nearest known key is optimizer.lr"),
        ("env.dataste=gsm8k", "unknown key env.dataste: the nearest known key is env.dataset"),
        ("model.temperature=1", "unknown key model.temperature: the nearest known key is inference_model.temperature"),
        ("lr=1", "unknown key lr: the nearest known key is optimizer.lr"),
        ("sed=1", "unknown key sed: the nearest known key is seed"),
        ("+train.epoch=1", "unknown key train.epoch: the nearest known key is train.epochs"),
        ("train_model.lora.rank=4", "unknown key train_model.lora.rank: the nearest known key is train_model.lora.r"),
        (
            "train_model.loraa.enabled=true",
            "unknown key train_model.loraa.enabled: the nearest known key is train_model.lora.enabled",
        ),
        ("objectiv=grpo", "unknown key objectiv: the nearest known key is objective"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(typed, message):
    assert refused(typed) == message


@pytest.mark.parametrize("old", [old for old, new in RENAMED.items() if new != "data"])
def test_keys_of_older_documents_are_refused_with_their_name_here(old):
    assert refused(f"{old}=1") == f"{old} is not a key of this program: use {RENAMED[old]}"
    assert RENAMED[old] in known_keys()
    assert old not in known_keys()


def test_the_kl_coefficient_of_older_documents():
    assert RENAMED["policy.kl_coef"] == "train.kl_to_ref_coeff"


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("train.epochs=two", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=null", "train.epochs"),
        ("train.epochs=[1]", "train.epochs"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.betas=0.9", "optimizer.betas"),
        ("optimizer.betas=[a,b]", "optimizer.betas"),
        ("logging.wandb=maybe", "logging.wandb"),
        ("model.name=null", "model.name"),
        ("seed=zero", "seed"),
        ("train.buffer_size=big", "train.buffer_size"),
        ("~train.epochs", "train.epochs"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line_that_starts_with_the_key(typed, key):
    assert refused(typed).startswith(key)


@pytest.mark.parametrize("typed", ["train.epochs", "objective=ppo", "train.epochs=${nothing}", "+train.epochs=1"])
def test_what_hydra_cannot_parse_or_find_is_one_line_that_names_the_key(typed):
    assert typed.split("=")[0].strip("+") in refused(typed)


def test_hydras_own_keys_pass():
    check_keys(["hydra.run.dir", "hydra/launcher", "objective", "train.epochs"], ["objective"])


def test_known_keys_are_all_leaves():
    keys = known_keys()
    assert {"mode", "train.epochs", "optimizer.betas", "env.data", "inference_model.top_p"} <= set(keys)
    assert {"train_model.lora.enabled", "train_model.lora.target_modules", "train_model.num_devices"} <= set(keys)
    assert not {"train", "train_model", "train_model.lora", "lora"} & set(keys)
    assert len(keys) == len(set(keys))


def test_every_documented_key_of_the_yaml_files_is_known():
    typed = {
        f"{section}.{key}" if section else key
        for path in CONFIG_DIR.rglob("*.yaml")
        if path.stem != OFFLINE
        for section, key in leaves(path, "" if path.parent == CONFIG_DIR else path.parent.name)
    }
    assert typed <= set(known_keys())


def leaves(path: Path, section: str) -> list[tuple[str, str]]:
    """(section, key) of every leaf in a file with two levels at most."""
    found = []
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+):(.*)", line)
        if not match or line.startswith("defaults"):
            continue
        indent, key, value = match.groups()
        if not indent and not value.strip():
            section = key
        else:
            found.append((section, key))
    return found


def sizes(**changes: int | bool) -> RunConfig:
    """960 responses in 10 collections of 96; 2 steps of 48 an epoch."""
    train = {"total_dialog_turns": 960, "dialog_turns_per_batch": 96, "optim_batch_size": 48, "epochs": 3}
    return RunConfig(train=TrainConfig(**(train | changes)))


def test_collections_and_steps_are_counted():
    config = sizes()
    assert config.num_collections == 10
    assert config.batches_per_collection == 2
    assert config.num_steps == 60
    assert config.train.buffer_size == 96
    assert sizes(epochs=1).num_steps == 20
    assert sizes(optim_batch_size=96).num_steps == 30


def test_staleness_is_one_only_where_collecting_runs_beside_training():
    assert sizes().staleness_bound == 0
    assert sizes(sync_iter=False).staleness_bound == 1


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"kl_to_ref_coeff": 0.0}, False),
        ({"use_kl_to_ref": False}, False),
        ({"kl_coef_in_loss": False}, True),
    ],
)
def test_a_reference_is_used_only_where_something_reads_it(changes, used):
    assert sizes(**changes).uses_reference is used


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("all-linear", ["all-linear"]),
        ("[q_proj,mlp.up_proj]", ["q_proj", "mlp.up_proj"]),
        ("'q_proj, v_proj'", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
    ],
)
def test_adapter_targets_are_typed_as_a_list_or_with_commas(typed, names):
    assert compose(ARITHMETIC, [*SIZES, f"train_model.lora.target_modules={typed}"]).train_model.lora.target_modules == names


@pytest.mark.parametrize(
    ("typed", "value"),
    [("true", "bf16"), ("false", "none"), ("none", "none"), ("bf16", "bf16"), ("fp16", "fp16"), ("BF16", "bf16")],
)
def test_mixed_precision_takes_its_names_and_the_switch_of_older_documents(typed, value):
    assert compose(ARITHMETIC, [*SIZES, f"train.mixed_precision={typed}"]).train.mixed_precision == value


@pytest.mark.parametrize(("value", "name"), [(True, "bf16"), (False, "none")])
def test_mixed_precision_takes_a_bool_in_python_too(value, name):
    assert TrainConfig(mixed_precision=value).mixed_precision == name


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 1),
        (["ref_model.num_devices=2"], 2),
        (["train_model.lora.enabled=true"], 0),
        (["train_model.lora.enabled=true", "ref_model.num_devices=0"], 0),
        (["train_model.lora.enabled=true", "ref_model.num_devices=2"], 2),
        (["train_model.lora.enabled=true", "train.kl_to_ref_coeff=0", "ref_model.num_devices=2"], 0),
        (["train.use_kl_to_ref=false", "ref_model.num_devices=0"], 0),
    ],
)
def test_reference_processes_are_one_or_none_with_lora_where_nothing_is_said(overrides, number):
    assert compose(ARITHMETIC, [*SIZES, *overrides]).num_references == number


def test_the_shipped_3b_configuration_saves_memory():
    config = compose("grpo_gsm8k", [])
    assert config.train.mixed_precision == "bf16"
    assert config.train_model.gradient_checkpointing
    assert compose(ARITHMETIC, []).train.mixed_precision == "none"
