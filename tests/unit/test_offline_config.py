"""The configuration of grpo_offline.py: the rules of its own keys, and which run goes on."""

import pytest

from grpo.config import RunConfig, known_keys
from grpo.errors import ConfigError
from grpo.launch import CONFIG_DIR, compose, compose_unchecked
from grpo.offline_config import OfflineConfig
from grpo.resume import differences, find_run, read_config, resumed_config, write_config

from .test_config import leaves

DATA = "data=scored.jsonl"


def unchecked(*overrides: str):
    return compose_unchecked("grpo_offline", overrides, OfflineConfig)


def config_of(*overrides: str) -> OfflineConfig:
    return compose("grpo_offline", [DATA, *overrides], OfflineConfig)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        compose("grpo_offline", list(overrides), OfflineConfig)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_the_shipped_configuration_composes_with_every_model():
    config = config_of()
    assert isinstance(config, OfflineConfig)
    assert (config.mode, config.data, config.max_seq_length, config.batch_size) == ("offline", "scored.jsonl", 512, 8)
    assert (config.train.logging_frequency, config.train.checkpoint_frequency, config.train.keep_checkpoints) == (20, 500, 2)
    for option in (CONFIG_DIR / "model").glob("*.yaml"):
        assert config_of(f"model={option.stem}").model.name


@pytest.mark.parametrize(
    ("typed", "precision"), [("true", "bf16"), ("false", "none"), ("BF16", "bf16"), ("fp16", "fp16"), ("none", "none")]
)
def test_the_precision_is_written_as_in_online_runs(typed, precision):
    assert config_of(f"train.mixed_precision={typed}").train.mixed_precision == precision


BAD_VALUES = [
    ([], "data (None) must be a file of scored completions: data=FILE.jsonl"),
    (["resume=auto"], "data (None) must be a file of scored completions"),
    ([DATA, "batch_size=0"], "batch_size (0) must be at least 1"),
    ([DATA, "num_epochs=0"], "num_epochs (0) must be at least 1"),
    ([DATA, "max_seq_length=1"], "max_seq_length (1) must be at least 2"),
    ([DATA, "ray.min_engines=1"], "ray.min_engines (1) must be null in an offline run, which has no engine"),
    ([DATA, "eval_share=0"], "eval_share (0.0) must be above 0 and below 1"),
    ([DATA, "eval_share=1"], "eval_share (1.0) must be above 0 and below 1"),
    ([DATA, "objective.log_prob=median"], "objective.log_prob (median) must be one of sum, mean"),
    ([DATA, "objective.temperature=0"], "objective.temperature (0.0) must be above 0"),
    ([DATA, "objective.target_temperature=nan"], "objective.target_temperature (nan) must be above 0"),
    ([DATA, "train.mixed_precision=int8"], "train.mixed_precision (int8) must be one of none, bf16, fp16"),
    ([DATA, "train.eval_frequency=-1"], "train.eval_frequency (-1) must be at least 0"),
    ([DATA, "train.keep_checkpoints=0"], "train.keep_checkpoints (0) must be at least 1"),
    ([DATA, "train.max_wall_time=0"], "train.max_wall_time (0.0) must be at least 1"),
    ([DATA, "mode=sync"], "mode (sync) must be one of offline"),
    ([DATA, "seed=-1"], "seed (-1) must be at least 0"),
    ([DATA, "device=tpu"], "device (tpu) must be one of"),
    (
        [DATA, "batch_size=8", "train.gradient_accumulation_steps=3"],
        "batch_size (8) must be a multiple of train.gradient_accumulation_steps (3) x train_model.num_devices (1)",
    ),
    ([DATA, "lora_path=adapter", "train_model.lora.r=4"], "lora_path (adapter) has its adapters' own settings"),
    (
        [DATA, "train_model.quantization.enabled=true"],
        "train_model.quantization.enabled (True) needs train_model.lora.enabled=true or lora_path",
    ),
    *(
        (
            [DATA, f"{sign}objective={name}"],
            f"objective ({name}) must be left out of an offline run, which has objective.log_prob, "
            "objective.temperature and objective.target_temperature only",
        )
        for sign, name in (("", "dapo"), ("+", "grpo"))
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_VALUES, ids=[" ".join(overrides) for overrides, _ in BAD_VALUES])
def test_a_bad_value_is_refused_with_its_key_value_and_rule(overrides, message):
    assert refused(*overrides).startswith(message)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("batch_sz=8", "unknown key batch_sz: the nearest known key is batch_size"),
        ("max_length=9", "unknown key max_length: the nearest known key is max_seq_length"),
        ("inference_model.max_tokens=9", "unknown key inference_model.max_tokens: the nearest known key is"),
        ("logging.rollout_tokens=true", "unknown key logging.rollout_tokens: the nearest known key is"),
        ("model_path=gpt2", "model_path is not a key of this program: use model.name"),
        ("dataset_path=x", "dataset_path is not a key of this program: use data"),
    ],
)
def test_keys_of_other_scripts_and_documents_are_answered_with_the_nearest_one(typed, message):
    assert refused(DATA, typed).startswith(message)


def test_every_key_of_the_yaml_file_is_known():
    found = {f"{section}.{key}" if section else key for section, key in leaves(CONFIG_DIR / "grpo_offline.yaml", "")}
    assert found <= set(known_keys(OfflineConfig))


def make_run(tmp_path, name: str, config) -> None:
    run_dir = tmp_path / "outputs" / "2026-01-01" / name
    run_dir.mkdir(parents=True)
    write_config(config, run_dir)
    return run_dir


def test_a_run_goes_on_with_its_own_configuration_and_what_is_typed(tmp_path):
    run_dir = make_run(tmp_path, "a", config_of("seed=5", "num_epochs=2"))
    assert read_config(run_dir) == config_of("seed=5", "num_epochs=2")
    assert resumed_config(run_dir, ["num_epochs"], unchecked("num_epochs=4")) == config_of("seed=5", "num_epochs=4")
    with pytest.raises(ConfigError, match=r"batch_size \(8 -> 16\) would make another run of it"):
        resumed_config(run_dir, ["batch_size"], unchecked("batch_size=16"))


def test_runs_of_other_scripts_are_not_gone_on_with(tmp_path):
    online = compose("grpo_arithmetic", [])
    offline, other = make_run(tmp_path, "a", config_of()), make_run(tmp_path, "b", online)
    assert find_run("auto", None, tmp_path / "outputs", config_of()) == offline
    assert find_run("auto", None, tmp_path / "outputs", online) == other
    with pytest.raises(ConfigError, match=r"that is a run of mode=sync: go on with it by its own script"):
        resumed_config(other, [], unchecked())
    with pytest.raises(ConfigError, match=r"that is a run of mode=offline"):
        resumed_config(offline, [], compose_unchecked("grpo_arithmetic", [], RunConfig))


def test_how_often_a_run_is_saved_is_no_difference():
    assert differences(config_of(), config_of("train.checkpoint_frequency=3", "num_epochs=9")) == []
    assert differences(config_of(), config_of("objective.log_prob=sum", "eval_share=0.5"))
