import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict

import grpo
from grpo.config import RunConfig
from grpo.config_sections import LoggingConfig, TrainConfig
from grpo.errors import ConfigError
from grpo.metrics import METRICS, PHASES, Clock, RunLog, metric, rollout_lines, rollout_metrics
from grpo.rewards import Grade
from grpo.rollout import GroupRecord

QUIET = RunConfig(logging=LoggingConfig(progress=False), train=TrainConfig(total_dialog_turns=512, optim_batch_size=512))


def grade(exact: float, outcome: str, parsed: str | None) -> Grade:
    return Grade({"format": 0.5 * (outcome != "unparseable"), "exact": exact}, outcome, parsed)


def batch() -> TensorDict:
    """Two groups of two: rewards 1.5, 0.5 and 0, 0; one response cut off."""
    records = [
        GroupRecord("1+1", "2", ["two: 2", "3"], [grade(1.0, "correct", "2"), grade(0.0, "wrong", "3")]),
        GroupRecord("2+2", "4", ["?", ""], [grade(0.0, "unparseable", None)] * 2),
    ]
    rollouts = TensorDict(
        reward=torch.tensor([1.5, 0.5, 0.0, 0.0]),
        graded=torch.tensor([True, True, True, True]),
        advantage=torch.tensor([0.7, -0.7, 0.0, 0.0]),
        response_length=torch.tensor([2, 1, 3, 1]),
        response_mask=torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool(),
        tokens=torch.tensor([[9, 5, 0, 0], [9, 6, 0, 0], [8, 0, 7, 1], [8, 1, 0, 0]]),
        inference_log_probs=torch.tensor([[0, -0.5, -1, 0], [0, -2, 0, 0], [0, -3, -4, -5], [0, -6, 0, 0]]).float(),
        token_versions=torch.tensor([[0, 3, 4, 0], [0, 4, 0, 0], [0, 2, 2, 2], [0, 4, 0, 0]], dtype=torch.int32),
        policy_version=torch.tensor([3, 4, 2, 4]),
        group_id=torch.tensor([20, 20, 21, 21]),
        stopped=torch.tensor([True, True, False, True]),
        batch_size=[4],
    )
    return rollouts.set_non_tensor("records", records)


def test_rollout_metrics_give_hand_worked_values():
    assert rollout_metrics(batch(), trainer_version=5, steps_since_push=2, steps_per_push=4) == pytest.approx(
        {
            "rollout/reward_mean": 0.5,
            "rollout/reward_std": math.sqrt((1 + 0 + 0.25 + 0.25) / 3),
            "rollout/reward_min": 0.0,
            "rollout/reward_q25": 0.0,
            "rollout/reward_median": 0.25,
            "rollout/reward_q75": 0.75,
            "rollout/reward_max": 1.5,
            "rollout/accuracy": 0.25,
            "rollout/wrong": 0.25,
            "rollout/unparseable": 0.5,
            "rollout/timed_out": 0.0,
            "rollout/grader_error": 0.0,
            "rollout/term_format": 0.25,
            "rollout/term_exact": 0.25,
            "rollout/truncated": 0.25,
            "rollout/response_length_mean": 1.75,
            "rollout/response_length_max": 3,
            "rollout/advantage_mean": 0.0,
            "rollout/advantage_std": math.sqrt(0.98 / 3),
            "rollout/groups": 2,
            "rollout/group_size_mean": 2,
            "rollout/equal_groups": 0.5,
            "rollout/gradient_groups": 0.5,
            "buffer/staleness_max": 3,
            "buffer/staleness_mean": (2 + 1 + 3 + 1) / 4,
            "buffer/staleness_steps_max": 3 * 4 + 2,
        }
    )


def test_responses_without_a_verdict_are_counted_and_left_out_of_the_rewards():
    rollouts = batch()
    rollouts["graded"] = torch.tensor([True, True, False, False])
    rollouts["records"][1].grades[:] = [Grade({}, "timed_out", None), Grade({}, "grader_error", None, "ValueError: x")]
    metrics = rollout_metrics(rollouts, 5)
    assert (metrics["rollout/reward_mean"], metrics["rollout/reward_min"], metrics["rollout/reward_max"]) == (1.0, 0.5, 1.5)
    assert (metrics["rollout/timed_out"], metrics["rollout/grader_error"]) == (0.25, 0.25)
    lines = list(rollout_lines(1, rollouts, None))
    assert [line["outcome"] for line in lines] == ["correct", "wrong", "timed_out", "grader_error"]
    assert [line.get("note") for line in lines] == [None, None, None, "ValueError: x"]
    rollouts["graded"] = torch.zeros(4, dtype=torch.bool)
    assert all(math.isfinite(value) for value in rollout_metrics(rollouts, 5).values())


def test_a_group_is_equal_by_its_rewards_whatever_the_verdicts():
    rollouts = batch()
    rollouts["records"][0].grades[:] = [grade(0.5, "correct", "2"), grade(0.5, "wrong", "3")]
    assert rollout_metrics(rollouts, 5)["rollout/equal_groups"] == 1
    rollouts["records"][1].grades[:] = [grade(0.5, "wrong", "2"), grade(0.25, "wrong", "3")]
    assert rollout_metrics(rollouts, 5)["rollout/equal_groups"] == 0.5


def test_a_response_without_a_verdict_makes_no_group_unequal():
    rollouts, late = batch(), Grade({}, "timed_out", None)
    rollouts["records"][0].grades[:] = [grade(0.5, "correct", "2"), late]
    assert rollout_metrics(rollouts, 5)["rollout/equal_groups"] == 1
    rollouts["records"][1].grades[:] = [late, late]  # it teaches nothing either
    assert rollout_metrics(rollouts, 5)["rollout/equal_groups"] == 1


class Counted(float):
    """A number that counts how often one is added to it."""

    additions = 0

    def __radd__(self, other: float) -> float:
        Counted.additions += 1
        return float(self) + other


def test_the_mean_of_a_term_is_made_once():
    grades = [Grade({"format": Counted(0.5), "exact": Counted(i % 2)}, "wrong", None) for i in range(256)]
    rollouts = TensorDict(
        {key: torch.ones(256) for key in ("reward", "advantage", "response_length", "policy_version", "stopped")}
        | {"graded": torch.ones(256, dtype=torch.bool)},
        batch_size=[256],
    ).set_non_tensor("records", [GroupRecord("1+1", "2", ["3"] * 256, grades)])
    before = sum(grade.reward for grade in grades)
    Counted.additions = 0
    metrics = rollout_metrics(rollouts, 5)
    assert (metrics["rollout/term_format"], metrics["rollout/term_exact"], before) == (0.5, 0.5, 256.0)
    assert Counted.additions <= 4 * 256  # two terms a response, for the means and for its reward


def test_the_penalty_is_among_them_where_there_is_one():
    rollouts = batch()
    rollouts["kl_penalty"] = torch.tensor([0.0, 0.2, 0.4, 0.6])
    metrics = rollout_metrics(rollouts, 5)
    assert metrics["rollout/kl_penalty_mean"] == pytest.approx(0.3)
    assert metrics["rollout/kl_penalty_std"] == pytest.approx(math.sqrt(0.2 / 3))


def test_rollout_lines_have_the_fields_of_their_own_response():
    lines = list(rollout_lines(7, batch(), None))
    assert lines[0] == {
        "step": 7,
        "group_id": 20,
        "prompt": "1+1",
        "response": "two: 2",
        "answer": "2",
        "reward": 1.5,
        "terms": {"format": 0.5, "exact": 1.0},
        "outcome": "correct",
        "parsed": "2",
        "advantage": pytest.approx(0.7),
        "policy_version": 3,
    }
    assert [line["prompt"] for line in lines] == ["1+1", "1+1", "2+2", "2+2"]
    assert [line["response"] for line in lines] == ["two: 2", "3", "?", ""]
    assert [line["reward"] for line in lines] == [1.5, 0.5, 0.0, 0.0]
    assert [line["group_id"] for line in lines] == [20, 20, 21, 21]
    assert [line["policy_version"] for line in lines] == [3, 4, 2, 4]


def test_a_lines_reward_is_the_sum_of_its_terms_and_not_what_float32_makes_of_it():
    rollouts = batch()
    rollouts["records"][0].grades[0] = Grade({"format": 0.2, "near": 0.2, "exact": 0.0}, "wrong", "3")
    rollouts["records"][1].grades[1] = Grade({}, "timed_out", None)
    rollouts["reward"][0] = 0.4
    first, *_, last = rollout_lines(7, rollouts, None)
    assert first["reward"] == sum(first["terms"].values()) == 0.4
    assert json.dumps(last["reward"]) == "0.0"


def test_with_log_probs_a_line_has_what_belongs_to_its_response_tokens():
    log_probs = batch()["inference_log_probs"] - 0.25
    lines = list(rollout_lines(7, batch(), log_probs))
    assert [line["tokens"] for line in lines] == [[5, 0], [6], [0, 7, 1], [1]]
    assert [line["inference_log_probs"] for line in lines] == [[-0.5, -1], [-2], [-3, -4, -5], [-6]]
    assert [line["log_probs"] for line in lines] == [[-0.75, -1.25], [-2.25], [-3.25, -4.25, -5.25], [-6.25]]
    assert [line["token_versions"] for line in lines] == [[3, 4], [4], [2, 2, 2], [4]]


def metrics_of(step: int) -> dict[str, float]:
    return {"rollout/reward_mean": step / 10, "buffer/staleness_max": 0.0, "time/samples_per_s": 100.0, "train/lr": 0.5}


def read(run_dir) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_step_is_held_until_the_next_and_written_with_what_was_added_meanwhile(tmp_path):
    log = RunLog(tmp_path, QUIET)
    log.step(1, 0, metrics_of(1))
    assert read(tmp_path) == []
    log.add({"time/push_s": 0.5, "eval/accuracy": 0.25})
    log.add({"time/push_s": 0.25})
    log.step(2, 1, metrics_of(2))
    (first,) = read(tmp_path)
    assert (first["step"], first["policy_version"]) == (1, 0)
    assert first["time/push_s"] == 0.75
    assert first["eval/accuracy"] == 0.25
    assert first["rollout/reward_mean"] == 0.1
    assert first["time_s"] >= 0
    log.flush()
    assert [row["step"] for row in read(tmp_path)] == [1, 2]
    assert "eval/accuracy" not in read(tmp_path)[1]
    log.flush()
    assert len(read(tmp_path)) == 2
    with pytest.raises(AssertionError, match="no step to add to"):
        log.add({"eval/accuracy": 0.5})
    log.close()


def test_the_bars_rate_is_that_of_a_whole_collection(tmp_path):
    """Of 4 steps of 512 responses, the first of which samples: 256 s and three times 51.2 s are 5 responses a second."""
    train = TrainConfig(total_dialog_turns=8192, dialog_turns_per_batch=2048, optim_batch_size=512)
    log, shown = RunLog(tmp_path, RunConfig(logging=LoggingConfig(progress=False), train=train)), []
    for step in range(1, 10):
        log.step(step, 0, {"time/samples_per_s": 2.0 if step % 4 == 1 else 10.0})
        shown.append(log.bar.postfix)
    assert shown[0] == "samples/s=2"
    assert shown[3:] == ["samples/s=5"] * 6
    log.close()


def test_closing_writes_what_is_held_and_closing_again_is_fine(tmp_path):
    log = RunLog(tmp_path, QUIET)
    log.step(1, 0, metrics_of(1))
    log.rollouts(1, batch(), None)
    log.close()
    log.close()
    assert [row["step"] for row in read(tmp_path)] == [1]
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 4


def test_a_log_closed_before_its_first_step_is_empty(tmp_path):
    RunLog(tmp_path, QUIET).close()
    assert read(tmp_path) == []


def test_lines_are_json_in_the_order_of_the_steps(tmp_path):
    log = RunLog(tmp_path, QUIET)
    for step in range(1, 6):
        log.rollouts(step, batch(), batch()["inference_log_probs"])
        log.step(step, step - 1, metrics_of(step))
    log.close()
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["policy_version"] for row in read(tmp_path)] == [0, 1, 2, 3, 4]
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in rollouts] == [step for step in range(1, 6) for _ in range(4)]


def test_a_response_with_line_breaks_and_other_scripts_is_one_line(tmp_path):
    rollouts = batch()
    rollouts["records"][0].responses[0] = 'first\nsecond\u2028third "quoted" 你好 😀 \ufffd'
    log = RunLog(tmp_path, QUIET)
    log.rollouts(1, rollouts, None)
    log.close()
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["response"] == rollouts["records"][0].responses[0]


def test_a_metric_without_a_line_in_the_table_is_refused(tmp_path):
    log = RunLog(tmp_path, QUIET)
    log.step(1, 0, metrics_of(1) | {"train/mystery": 1.0})
    with pytest.raises(AssertionError, match="train/mystery"):
        log.close()


def test_tensorboard_gets_every_logging_frequency_th_step_and_every_evaluation(tmp_path):
    run_config = RunConfig(
        logging=LoggingConfig(progress=False, tensorboard=True),
        train=TrainConfig(total_dialog_turns=512, logging_frequency=2),
    )
    log = RunLog(tmp_path, run_config)
    for step in range(1, 6):
        log.step(step, step, metrics_of(step))
        if step == 3:
            log.add({"eval/accuracy": 0.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*metrics_of(1), "eval/accuracy"}
    assert [(p.step, pytest.approx(p.value)) for p in events.Scalars("eval/accuracy")] == [(3, 0.75)]
    rewards = [(point.step, point.value) for point in events.Scalars("rollout/reward_mean")]
    assert rewards == [(step, pytest.approx(metrics_of(step)["rollout/reward_mean"])) for step in (2, 3, 4)]


def test_weights_and_biases_that_cannot_be_reached_end_in_one_line(tmp_path, monkeypatch):
    import wandb

    def unreachable(**settings):
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", unreachable)
    config = RunConfig(logging=LoggingConfig(progress=False, wandb=True))
    with pytest.raises(ConfigError, match=r"^logging.wandb \(true\): .* timed out after 90.0 sec.: .*WANDB_MODE=offline"):
        RunLog(tmp_path, config)
    assert not any(tmp_path.iterdir())


def test_weights_and_biases_gets_rewards_as_a_histogram_and_a_few_groups_as_a_table(tmp_path, monkeypatch):
    import wandb

    class Sink:
        def __init__(self) -> None:
            self.points: list[tuple[int, dict]] = []

        def log(self, points: dict, step: int) -> None:
            self.points.append((step, points))

        def finish(self) -> None: ...

    sink = Sink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **settings: sink)
    config = RunConfig(
        logging=LoggingConfig(progress=False, wandb=True),
        train=TrainConfig(total_dialog_turns=512, logging_frequency=2),
    )
    log = RunLog(tmp_path, config)
    for step in (1, 2, 3):
        rollouts = batch()
        rollouts["graded"][3] = False  # whose reward says nothing
        log.rollouts(step, rollouts, None)
        log.step(step, step - 1, metrics_of(step))
        if step == 3:
            log.add({"eval/accuracy": 0.5})
    log.close()
    (second, points), (third, others) = sink.points
    assert (second, third) == (2, 3)
    assert points["rollout/reward_mean"] == metrics_of(2)["rollout/reward_mean"]
    assert sum(points["rollout/rewards"].histogram) == 3
    table = points["rollout/samples"]
    assert table.columns[:3] == ["group_id", "prompt", "response"]
    assert [row[:3] for row in table.data] == [[20, "1+1", "two: 2"], [20, "1+1", "3"], [21, "2+2", "?"], [21, "2+2", ""]]
    assert "rollout/samples" not in others and others["eval/accuracy"] == 0.5


def test_the_clock_adds_up_a_phase_and_keeps_totals(monkeypatch):
    now = iter([10.0, 11.5, 20.0, 20.25, 30.0, 34.0, 40.0, 41.0])
    monkeypatch.setattr("grpo.metrics.time.perf_counter", lambda: next(now))
    clock = Clock()
    for name in ("train", "train", "push"):
        with clock.phase(name):
            pass
    assert clock.take() == {"time/train_s": 1.75, "time/push_s": 4.0}
    assert clock.take() == {}
    with pytest.raises(KeyError), clock.phase("train"):  # a phase that fails took its time too
        raise KeyError
    assert clock.take() == {"time/train_s": 1.0}
    assert clock.total == dict.fromkeys(PHASES, 0.0) | {"train": 2.75, "push": 4.0}


def test_every_metric_that_is_emitted_is_in_the_table_and_the_other_way_round():
    """The names come from the code that makes them; those of the other modules from their source."""
    rollouts = batch()
    rollouts["kl_penalty"] = torch.zeros(4)
    emitted = set(map(metric, rollout_metrics(rollouts, 5)))
    clock = Clock()
    for name in PHASES:
        with clock.phase(name):
            pass
    emitted |= set(clock.take())
    package = Path(grpo.__file__).parent
    sources = {*package.rglob("*.py"), *package.parent.glob("*.py")} - {package / "metrics.py", package / "plot.py"}
    areas = "train|rollout|buffer|sync|eval|time"
    emitted |= {name for path in sources for name in re.findall(rf'"((?:{areas})/\w+)"', path.read_text())}
    assert emitted == METRICS.keys()
