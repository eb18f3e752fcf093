"""What an offline run will use, and what it refuses before anything starts."""

import pytest

from grpo.builtin import make_tokenizer
from grpo.errors import ConfigError, DataError
from grpo.launch import compose
from grpo.offline import load_data
from grpo.offline_config import OfflineConfig
from grpo.offline_plan import make_plan
from tests.scored_arithmetic import write_scored


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> str:
    return str(write_scored(tmp_path_factory.mktemp("scored") / "scored.jsonl", 20))


def config_of(data: str, *overrides: str) -> OfflineConfig:
    fixed = [f"data={data}", "model=builtin_arithmetic", "device=cpu", "max_seq_length=64"]
    return compose("grpo_offline", [*fixed, *overrides], OfflineConfig)


def test_the_plan_counts_groups_ranks_steps_and_trained_parameters(scored):
    config = config_of(scored, "eval_share=0.25", "num_epochs=3", "train_model.num_devices=2")
    plan = make_plan(config)
    assert (plan.num_groups, plan.num_held_out, plan.num_completions) == (15, 5, 4)
    assert plan.trained == plan.parameters
    assert "optimiser steps   6 of 8 groups in 4 micro-batches a rank, 3 epochs" in plan.describe(config)
    lora = config_of(scored, "train_model.lora.enabled=true")
    assert 0 < make_plan(lora).trained < plan.parameters / 2
    assert "LoRA adapters" in make_plan(lora).describe(lora)


def test_a_rank_has_its_whole_copy_of_the_weights_in_the_cpus_memory_where_it_trains_on_a_gpu(scored, gpus):
    gpus(1)
    on_cpu, on_gpu, offloaded = (
        make_plan(config_of(scored, *typed))
        for typed in ([], ["device=cuda"], ["device=cuda", "optimizer.name=adamw_offload"])
    )
    weights = 4 * on_cpu.parameters
    assert (on_cpu.memory_bytes, on_gpu.memory_bytes, offloaded.memory_bytes) == (5 * weights, 4 * weights, 0)


def test_a_malformed_line_is_found_by_the_plan(scored, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: prompt \(missing\)"):
        make_plan(config_of(str(tmp_path / "bad.jsonl")))


def test_the_limit_is_the_models(scored):
    with pytest.raises(ConfigError, match=r"max_seq_length \(257\) must be at most the model's 256 positions"):
        make_plan(config_of(scored, "max_seq_length=257"))
    make_plan(config_of(scored, "max_seq_length=256"))


def test_what_is_left_out_is_said_and_nothing_left_is_an_error(scored, capsys):
    tokenizer = make_tokenizer()
    train, held_out = load_data(config_of(scored, "eval_share=0.25"), tokenizer)
    assert (len(train.groups), len(held_out.groups)) == (15, 5)
    assert capsys.readouterr().out == ""
    lengths = sorted(group.length for group in train.groups + held_out.groups)
    config = config_of(scored, "eval_share=0.25", f"max_seq_length={lengths[-1] - 1}")
    train, held_out = load_data(config, tokenizer)
    assert train.too_long + held_out.too_long > 0
    assert f"longer than max_seq_length ({lengths[-1] - 1} tokens) with their prompt and left out" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"has no group to train on: .*raise max_seq_length \(9; 80 completions are longer\)"
    ):
        load_data(config_of(scored, "max_seq_length=9"), tokenizer)


def test_it_is_said_how_many_held_out_groups_have_nothing_to_rank(tmp_path, capsys):
    row = '{"prompt": "%d", "completions": [{"text": "1", "score": %d}, {"text": "2", "score": 2}]}\n'
    (tmp_path / "some.jsonl").write_text("".join(row % (i, 1 + i % 2) for i in range(40)))
    train, held_out = load_data(config_of(str(tmp_path / "some.jsonl"), "eval_share=0.5"), make_tokenizer())
    assert len(train.groups) == 20 and 0 < len(held_out.groups) < 20
    equal = 20 - len(held_out.groups)
    assert f"{equal} of 20 held-out groups are left out, whose scores are all equal" in capsys.readouterr().out


def test_groups_without_a_difference_are_no_evaluation(tmp_path):
    row = '{"prompt": "%d", "completions": [{"text": "1", "score": 2}, {"text": "2", "score": 2}]}\n'
    (tmp_path / "equal.jsonl").write_text("".join(row % i for i in range(4)))
    with pytest.raises(DataError, match="has no group held out whose scores differ"):
        load_data(config_of(str(tmp_path / "equal.jsonl")), make_tokenizer())
