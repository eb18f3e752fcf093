import json
from dataclasses import replace
from math import isclose

import pytest

from benchmarks.throughput import fit_costs
from grpo.launch import compose
from grpo.plan import make_plan
from grpo.throughput import (
    DATA_SHEETS,
    FITTED,
    PHASES,
    Overlap,
    Shape,
    Work,
    amounts,
    collection_s,
    data_sheet_costs,
    fitted,
    forecast,
    predict,
    work_of,
)

# 100 parameters of which 20 are a table of 10 words x 2 dimensions; 3 layers.
SHAPE = Shape(parameters=100, layers=3, hidden=2, vocabulary=10, kv_width=5, tied=False)
WORK = Work(
    responses=8,
    group_size=4,
    prompt_tokens=6,
    response_tokens=10,
    steps=2,
    epochs=1,
    micro_batches=2,
    pushes=1,
    in_flight=4,
    uses_reference=True,
)
SECONDS = {"generate": 5.0, "reward": 0.5, "reference": 1.0, "train": 3.0, "push": 0.25, "rest": 0.25}


def whole(work: Work, costs: dict, shape: Shape = SHAPE, mode: str = "sync") -> float:
    return collection_s(predict(amounts(shape, work), costs), mode, work.steps, Overlap())


def test_amounts_are_those_worked_by_hand():
    found = amounts(SHAPE, WORK)
    assert found["generate"] == {
        "iterations": 20,  # 8 responses in 2 turns of 4, 10 tokens each
        "layer_calls": 60,
        "tokens": 80,
        # 80 tokens and 2 prompts of 6 by 80 parameters; attention 4 x 3 layers x 2 dimensions x 11 tokens of context.
        "flops": 92 * 160 + 80 * 24 * 11,
        "bytes": 20 * 100 * 4 + 80 * 11 * 5 * 4,
    }
    forward = 8 * 16 * (160 + 24 * 8)
    moved = 8 * 16 * 3 * 2 * 20 + 80 * 10 * 6
    assert found["reference"] == {"calls": 1, "moved": moved, "flops": forward}
    assert found["train"] == {
        "steps": 2,
        "layer_calls": 12,
        "moved": moved,
        "flops": 3 * forward,
        "updated": 200,
        "gathered_bytes": 0,  # one rank has all weights
    }
    assert found["push"] == {"pushes": 1, "bytes": 400}
    assert found["rest"] == {"collections": 1, "steps": 2, "responses": 8}


def test_processes_share_the_work_and_what_they_share_it_by():
    alone, shared = amounts(SHAPE, WORK), amounts(SHAPE, replace(WORK, engines=2, ranks=2, references=2))
    assert shared["generate"]["tokens"] == alone["generate"]["tokens"] / 2
    assert shared["generate"]["iterations"] == 10  # one turn is as long however few responses it has
    assert amounts(SHAPE, replace(WORK, engines=4))["generate"]["iterations"] == 10
    for unit in ("flops", "moved", "updated"):
        assert shared["train"][unit] == alone["train"][unit] / 2
    # 4 micro-batches, forward and backward, in 2 bytes; gradients of 2 steps in 4.
    assert shared["train"]["gathered_bytes"] == (2 * 4 * 2 + 2 * 4) * 100
    assert shared["reference"]["flops"] == alone["reference"]["flops"] / 2
    assert shared["push"] == alone["push"]


def test_a_tied_table_is_multiplied_too_and_recomputing_is_another_forward_pass():
    assert (SHAPE.multiplied, replace(SHAPE, tied=True).multiplied) == (80, 100)
    again = amounts(SHAPE, replace(WORK, recomputes=True))["train"]["flops"]
    assert isclose(again, amounts(SHAPE, WORK)["train"]["flops"] * 4 / 3)


def test_a_prompt_that_is_shared_is_trained_on_once_a_group_in_rows_that_are_longer():
    found, separate = (amounts(SHAPE, replace(WORK, shares_prompts=shared)) for shared in (True, False))
    tokens = 2 * (6 + 4 * 10)
    assert found["train"]["moved"] == tokens * 3 * 2 * 20 + 80 * 10 * 6
    assert found["train"]["flops"] == 3 * tokens * (160 + 24 * 46)
    assert {phase: its for phase, its in found.items() if phase != "train"} == {
        phase: its for phase, its in separate.items() if phase != "train"
    }


def test_with_adapters_the_other_weights_have_no_gradients_and_no_update():
    whole_model, adapted = (amounts(replace(SHAPE, adapters=n), replace(WORK, ranks=2)) for n in (0, 7))
    # 8 responses of 16 tokens, 80 parameters, half of a backward pass; shared by 2 ranks.
    assert whole_model["train"]["flops"] - adapted["train"]["flops"] == 8 * 16 * 2 * 80 / 2
    assert adapted["train"]["updated"] == 2 * 7 / 2
    assert adapted["train"]["gathered_bytes"] == 2 * 4 * 2 * 100 + 2 * 4 * 7
    assert {phase: its for phase, its in adapted.items() if phase != "train"} == {
        phase: its for phase, its in whole_model.items() if phase != "train"
    }


def test_a_dry_run_with_adapters_forecasts_less_training():
    def seconds(*overrides: str) -> float:
        config = compose("grpo_arithmetic", ["device=cpu", *overrides])
        return float(make_plan(config).describe(config).rpartition("train ")[2].partition(",")[0])

    assert seconds("train_model.lora.enabled=true") < seconds()


def test_no_reference_takes_no_time():
    needed = amounts(SHAPE, replace(WORK, uses_reference=False))
    assert needed["reference"] == {}
    assert predict(needed, fitted().costs)["reference"] == 0


def test_a_phase_is_the_sum_of_its_units_and_gathering_goes_on_beside():
    needed = {phase: {} for phase in PHASES} | {"train": {"steps": 2, "flops": 10, "gathered_bytes": 7}}
    costs = {phase: {} for phase in PHASES}
    assert predict(needed, costs | {"train": {"steps": 1.0, "flops": 0.5}})["train"] == 7.0
    assert predict(needed, costs | {"train": {"steps": 1.0, "flops": 0.5, "gathered_bytes": 2.0}})["train"] == 14.0
    assert predict(needed, costs | {"train": {"steps": 1.0, "gathered_bytes": 0.1}})["train"] == 2.0


def test_a_synchronous_collection_is_the_sum_of_its_phases():
    assert collection_s(SECONDS, "sync", 4, Overlap(generate=9, train=9, step_s=9)) == 10.0


def test_a_synchronous_collection_beside_the_steps_on_the_one_before_takes_as_long_as_the_longer_and_the_push():
    assert (
        collection_s(SECONDS, "sync", 4, Overlap(), sync_iter=False) == 6.5 + 0.5
    )  # sampled, graded, scored; push and rest
    assert collection_s(SECONDS | {"train": 8.0}, "sync", 4, Overlap(), sync_iter=False) == 8.5
    assert collection_s(SECONDS, "sync", 4, Overlap(cores=1), sync_iter=False) == 10.0
    assert collection_s(SECONDS, "sync", 4, Overlap(generate=2, train=2, step_s=9), sync_iter=False) == 13.0
    shape = Shape(4e8, 12, 1024, 32_000, 6144, tied=True)
    beside, behind = (
        float(forecast(compose("grpo_arithmetic", [f"train.sync_iter={its}"]), shape, "cuda", "H100").split()[1])
        for its in ("false", "true")
    )
    assert beside < behind


def test_an_asynchronous_collection_is_as_long_as_its_slowest_side():
    assert collection_s(SECONDS, "async", 4, Overlap()) == 5.0  # the engines
    assert collection_s(SECONDS | {"generate": 1.0}, "async", 4, Overlap()) == 3.5  # training, pushes and the rest
    assert collection_s(SECONDS | {"reward": 9.0}, "async", 4, Overlap()) == 10.0  # grading and scoring
    assert collection_s(SECONDS, "async", 4, Overlap(generate=2, train=2, step_s=0.25)) == 11.0


def test_sides_that_share_cores_are_busy_no_longer_than_the_cores():
    assert collection_s(SECONDS, "async", 4, Overlap(cores=1)) == 10.0
    assert collection_s(SECONDS, "async", 4, Overlap(train=2, cores=2)) == (5 + 2.5 + 6.5) / 2
    assert collection_s(SECONDS, "async", 4, Overlap(cores=4)) == 5.0  # there the engines take longer


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["responses", "response_tokens", "prompt_tokens"])
def test_more_work_never_takes_less_time(mode, name):
    for costs in (fitted().costs, data_sheet_costs(DATA_SHEETS["H100"], fitted().costs)):
        shape = Shape(4e8, 12, 1024, 32_000, 6144, tied=True)
        times = [whole(replace(WORK, **{name: size}), costs, shape, mode) for size in (8, 64, 512, 4096)]
        assert times == sorted(times) and times[-1] > times[0]


def test_more_devices_never_take_longer_on_the_data_sheet():
    costs = data_sheet_costs(DATA_SHEETS["H100"], fitted().costs)
    shape = Shape(4e8, 12, 1024, 32_000, 6144, tied=True)
    work = replace(WORK, responses=4096, response_tokens=512, in_flight=256)
    times = [predict(amounts(shape, replace(work, engines=n)), costs)["generate"] for n in (1, 2, 8, 64)]
    assert times == sorted(times, reverse=True)
    # However many engines there are, a response is sampled token by token.
    assert times[-1] >= 512 * 5e-3


def test_costs_of_a_data_sheet_are_worked_by_hand():
    costs = data_sheet_costs(DATA_SHEETS["A100"], fitted().costs)
    assert isclose(costs["train"]["flops"], 1 / (0.4 * 312e12))
    assert isclose(costs["generate"]["bytes"], 1 / (0.6 * 2e12))
    assert isclose(costs["train"]["gathered_bytes"], 1 / (0.7 * 25e9))
    assert costs["rest"] == fitted().costs["rest"]  # the driver has no GPU


def test_the_fit_finds_the_costs_that_made_the_times():
    costs = {phase: {} for phase in PHASES}
    costs |= {"generate": {"iterations": 2e-3, "flops": 3e-9}, "push": {"pushes": 0.5}, "rest": {"responses": 1e-4}}
    rows = []
    for responses in (4, 8, 32):
        for tokens in (5, 50):
            needed = amounts(SHAPE, replace(WORK, responses=responses, response_tokens=tokens))
            rows.append((needed, predict(needed, costs)))
    found = fit_costs(rows)
    for needed, seconds in rows:
        again = predict(needed, found)
        assert all(isclose(again[phase], seconds[phase], rel_tol=1e-6) for phase in PHASES)
    assert all(cost > 0 for its in found.values() for cost in its.values())


def test_the_processes_of_a_cpu_count_as_one():
    several = ["train_model.num_devices=2", "inference_model.num_devices=2", "env.num_envs=8"]
    config = compose("grpo_arithmetic", several)
    on_cpu, on_gpus = (work_of(config, 16, 24, on_cpu=where) for where in (True, False))
    assert (on_cpu.engines, on_cpu.ranks, on_cpu.in_flight) == (1, 1, 2 * 8 * 8)
    assert (on_gpus.engines, on_gpus.ranks, on_gpus.in_flight) == (2, 2, 8 * 8)
    assert (on_cpu.responses, on_cpu.steps, on_cpu.pushes, on_cpu.micro_batches) == (512, 1, 1, 4)


def test_a_dry_run_tells_seconds_a_phase_and_where_they_are_from():
    config = compose("grpo_arithmetic", ["device=cpu"])
    text = make_plan(config).describe(config)
    line = next(line for line in text.splitlines() if line.startswith("time "))
    assert all(f"{phase} " in line for phase in PHASES)
    assert "a collection at full length" in line and fitted().machine in line
    on_gpu = forecast(config, SHAPE, "cuda", "NVIDIA H100 80GB HBM3")
    assert on_gpu.endswith("an estimate from the data sheet of the H100, unmeasured")
    assert "no data sheet of GeForce" in forecast(config, SHAPE, "cuda", "GeForce")


def test_what_was_fitted_is_stated_with_its_error():
    kept = json.loads(FITTED.read_text())
    assert set(kept["costs"]) == set(PHASES)
    errors = kept["median_error"], kept["largest_error"]
    assert errors == (None, None) or 0 < errors[0] <= errors[1]
