"""python -m grpo.evaluate up to the engines: what is asked, with which settings, and how answers are judged."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo import generate
from grpo.builtin import make_tokenizer
from grpo.comparison import Question
from grpo.config import RunConfig
from grpo.errors import ConfigError, DataError, RewardError
from grpo.evaluate import OWN, SECTIONS, configure, fair_sample, read_prompts
from grpo.grading import Failed
from grpo.inference import Sampling
from grpo.launch import compose
from grpo.measure import accuracy, judge
from grpo.offline_config import OfflineConfig
from grpo.resume import write_config
from grpo.rewards import Grade
from grpo.rollout import Completions
from grpo.run import Run
from grpo.tasks import EncodedProblems, Problem
from grpo.tool import split_arguments, whole_number

from .conftest import DirectGrading


class Twelve:
    """Stub engines that answer 12 to everything."""

    def __init__(self) -> None:
        self.asked = []

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> Completions:
        self.asked.append((prompts, sampling))
        tokenizer = make_tokenizer()
        tokens = np.array([*tokenizer("12")["input_ids"], tokenizer.eos_token_id] * len(prompts))
        length = np.full(len(prompts), 3)
        return Completions(np.arange(len(prompts)), length, length > 0, tokens, tokens * 0.0, tokens * 0)


class Same:
    system_prompt = ""

    def grade(self, problem: Problem, response: str) -> Grade:
        return Grade({}, "correct" if response == problem.answer else "wrong", None)


def test_accuracy_is_the_share_of_right_greedy_responses():
    engines = Twelve()
    data = EncodedProblems([Problem("", answer) for answer in ("12", "1", "12", "2", "12")], [[i] for i in range(5)], 0)
    assert accuracy(engines, DirectGrading(Same()), data, make_tokenizer(), 9) == {"accuracy": 0.6, "n": 5}
    assert engines.asked == [(data.prompts, Sampling(num_responses=1, max_tokens=9, temperature=0.0))]
    data.thought = "1"  # what the prompts have opened, see test_tasks.py
    assert accuracy(engines, DirectGrading(Same()), data, make_tokenizer(), 9) == {"accuracy": 0.0, "n": 5}


class Failing:
    """A stub grader without a verdict where the problem says so."""

    def grade(self, problem: Problem, response: str) -> Grade:
        if problem.question:
            return Grade({}, problem.question, None, f"it was {problem.question}")
        return Same().grade(problem, response)


def test_what_could_not_be_graded_is_told_and_is_not_wrong(capsys):
    lost = ["timed_out", "grader_error", "grader_error"]
    problems = [Problem("", "12"), Problem("", "1"), *(Problem(outcome, "12") for outcome in lost)]
    data = EncodedProblems(problems, [[i] for i in range(5)], 0)
    found = accuracy(Twelve(), DirectGrading(Failing()), data, make_tokenizer(), 9)
    assert found == {"accuracy": 0.5, "n": 2, "ungraded": 3}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Warning: 3 of 5 greedy responses could not be graded: it was grader_error; the accuracy is that")
    with pytest.raises(RewardError, match="3 of 3 greedy responses could not be graded: it was grader_error"):
        accuracy(Twelve(), DirectGrading(Failing()), EncodedProblems(problems[2:], [[0]] * 3, 0), make_tokenizer(), 9)


def checked(rate: float, *grades: Grade) -> None:
    train = SimpleNamespace(max_grader_error_rate=rate, dialog_turns_per_batch=2)
    Run._check_grading(SimpleNamespace(config=SimpleNamespace(train=train)), list(grades))


def test_a_run_counts_every_response_without_a_verdict_and_names_the_most_frequent_note():
    late, failed = Grade({}, "timed_out", None, "no answer within 10 s"), Grade({}, "grader_error", None, "ValueError: x")
    right = Grade({"exact": 1.0}, "correct", "4")
    checked(0.75, late, late, failed, right)
    with pytest.raises(RewardError, match=r"3 of 4 responses .* \(0.5\) allows; 2 times: no answer within 10 s"):
        checked(0.5, late, late, failed, right)
    with pytest.raises(RewardError, match="2 of 2 responses could not be graded"):
        checked(0.9, late, late)
    checked(0.5, late)  # half of a collection
    with pytest.raises(RewardError, match="1 of 1 responses could not be graded"):
        checked(0.4, late)


def typed(*items: str) -> tuple[RunConfig, dict[str, str], Path]:
    return configure(*split_arguments(list(items), dict.fromkeys(OWN, False), SECTIONS))


def finished_run(folder: Path) -> Path:
    """What a run leaves behind, as far as an evaluation reads it."""
    write_config(compose("grpo_arithmetic", ["seed=5", "env.test_size=7"]), folder)
    for name in ("model", "checkpoints"):
        (folder / name).mkdir()
    return folder


def test_a_run_is_evaluated_as_it_was_trained(tmp_path):
    config, models, out = typed(f"run={finished_run(tmp_path)}")
    assert (config.seed, config.env.test_size, config.inference_model.max_tokens) == (5, 7, 24)
    assert models == {"before": "builtin/arithmetic", "after": f"{tmp_path}/model"}
    assert out == tmp_path / "comparison.json"


def test_what_is_typed_comes_on_top(tmp_path):
    changes = ["seed=6", "device=cpu", "env.grading_processes=1", "inference_model.backend=transformers"]
    config, _, out = typed(f"run={finished_run(tmp_path)}", *changes, f"out={tmp_path}/other.json")
    assert (config.seed, config.device, config.env.grading_processes) == (6, "cpu", 1)
    assert (config.inference_model.backend, config.env.test_size) == ("transformers", 7)
    assert out == tmp_path / "other.json"


def test_what_training_alone_needs_to_fit_limits_no_evaluation(tmp_path):
    own = ["train.max_tokens_per_micro_batch=1024", "inference_model.num_devices=4", "ray.min_engines=2"]
    write_config(compose("grpo_arithmetic", own), tmp_path)
    (tmp_path / "model").mkdir()
    typed_keys = {"inference_model.max_tokens": "2048", "env.max_prompt_length": "512", "inference_model.num_devices": "1"}
    evaluated, _, _ = typed(f"run={tmp_path}", *(f"{key}={value}" for key, value in typed_keys.items()))
    generated, _ = generate.configure(str(tmp_path), typed_keys)
    for config in (evaluated, generated):
        assert (config.inference_model.max_tokens, config.env.max_prompt_length) == (2048, 512)
        assert config.inference_model.num_devices == 1


def test_the_runs_own_split_may_be_typed_and_prompts_of_ones_own_are_not_split(tmp_path):
    run = f"run={finished_run(tmp_path)}"
    config, _, _ = typed(run, "env.test_size=7", "env.data=null", "env.dataset=arithmetic")
    assert config.env.test_size == 7
    config, _, _ = typed(run, "env.dataset=gsm8k", "prompts=mine.jsonl")
    assert config.env.dataset == "gsm8k"


def test_a_model_is_evaluated_with_the_settings_of_its_tasks_configuration():
    config, models, out = typed("model=mine", "env.dataset=arithmetic")
    assert (config.env.max_prompt_length, config.inference_model.max_tokens) == (32, 24)
    assert (models, out) == ({"model": "mine"}, Path("evaluation.json"))
    _, models, out = typed("model=mine", "base=theirs")
    assert (models, out) == ({"before": "theirs", "after": "mine"}, Path("comparison.json"))


def test_a_model_in_a_runs_directory_is_asked_what_the_run_held_out(tmp_path):
    (finished_run(tmp_path) / "best").mkdir()
    for more in ([], ["env.dataset=arithmetic"], [f"base={tmp_path}/model"]):
        config, models, out = typed(f"model={tmp_path}/best", *more)
        assert (config.seed, config.env.dataset, config.env.test_size) == (5, "arithmetic", 7)
        assert models[list(models)[-1]] == f"{tmp_path}/best" and out.parent == Path()
    config, _, _ = typed(f"model={tmp_path}/best", "env.dataset=countdown")
    assert config == compose("grpo_countdown", [])
    assert typed(f"model={tmp_path}/none_such")[0] == compose("grpo_gsm8k", [])
    config, _, _ = typed(f"model={tmp_path}/best", "env.test_size=9", "prompts=mine.jsonl")
    assert (config.seed, config.env.test_size) == (5, 9)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "give either run=DIRECTORY or model=PATH"),
        (
            ["run={done}", "env.test_size=9"],
            r"env.test_size \(9\) must be the run's own \(7\), .*: max_samples=N asks fewer",
        ),
        (["run={done}", "env.validation_size=9"], r"env.validation_size \(9\) must be the run's own"),
        (["run={done}", "env.data=mine.jsonl"], r"env.data \(mine.jsonl\) must be the run's own \(None\)"),
        (["run={done}", "env.dataset=countdown"], r"env.dataset \(countdown\) must be the run's own \(arithmetic\)"),
        (["model={done}/model", "env.test_size=9"], r"env.test_size \(9\) must be the run's own \(7\)"),
        (["run={offline}"], r"run \(.*\) is of mode=offline, which has no task: give model=.*/offline/model env.dataset="),
        (
            ["model={offline}/model"],
            r"model \(.*\) is of a run of mode=offline, which has no task: give env.dataset=NAME too",
        ),
        (["run={tmp}", "model=mine"], "give either run=DIRECTORY or model=PATH"),
        (["run={tmp}/nothing"], r"run \(.*/nothing\): there is no run there: give the directory of one"),
        (["run={tmp}"], r"run \(.*\) has no model/ yet, which is written at its end: go on with resume="),
        (["run={tmp}", "base=theirs"], r"base \(theirs\) goes with model=PATH"),
        (["model=mine", "out={tmp}/nowhere/x.json"], r"out \(.*\): there is no directory .*/nowhere"),
        (["model=mine", "out={tmp}"], r"out \(.*\) is there, and no file: give another name"),
        (
            ["model=mine", "prompts={tmp}/asked.jsonl", "out={done}/../asked.jsonl"],
            r"out \(.*/asked.jsonl\) must not be prompts, which it would replace: give another name",
        ),
        (["model=mine", "env.dataset=mine"], r"env.dataset \(mine\) has no config/grpo_mine.yaml to take settings from"),
        (["model=mine", "train.epochs=2"], "train.epochs is not an argument here: there are run, model, .* and ray.KEY"),
        (["model=mine", "env.datset=x"], "the nearest known key is env.dataset"),
        (["model=mine", "seed=many"], "seed"),
        (["model=mine", "device=tpu"], r"device \(tpu\) must be one of auto, cpu"),
        (["model=mine", "inference_model.temperature=0"], r"inference_model.temperature \(0.0\) must be above 0"),
        (["model=mine", "k"], "k: write key=value"),
    ],
)
def test_wrong_arguments_end_in_one_line(items, message, tmp_path):
    write_config(compose("grpo_arithmetic", []), tmp_path)
    done = tmp_path / "done"
    done.mkdir()
    finished_run(done)
    (tmp_path / "asked.jsonl").touch()
    (offline := tmp_path / "offline" / "model").mkdir(parents=True)
    write_config(OfflineConfig(data="x.jsonl"), offline.parent)
    (offline.parent / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=message) as raised:
        typed(*(item.format(tmp=tmp_path, done=done, offline=offline.parent) for item in items))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("value", "minimum"), [("many", 0), ("-1", 0), ("1.5", 0), ("", 0), ("0", 1)])
def test_a_number_that_is_none_ends_in_one_line(value, minimum):
    with pytest.raises(ConfigError, match=rf"^k \({value}\) must be a whole number of at least {minimum}$"):
        whole_number({"k": value}, "k", 8, minimum)
    assert whole_number({}, "k", 8, minimum) == 8
    assert whole_number({"k": "3"}, "k", 8, minimum) == 3


def write(path: Path, *lines: str | dict) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_users_file_holds_rows_of_the_task_or_prompts_alone(tmp_path):
    rows = {"question": "What is 2 + 2?", "answer": 4}, {"prompt": "Say hello."}, {"prompt": "What is 1 + 2?", "answer": "3"}
    questions, faults = read_prompts(write(tmp_path / "mine.jsonl", *rows, ""), "arithmetic")
    assert questions == [
        Question(Problem("What is 2 + 2?", "4")),
        Question(Problem("Say hello.", ""), graded=False),
        Question(Problem("What is 1 + 2?", "3")),
    ]
    assert faults == []


def test_bad_lines_are_reported_by_number_and_stop_nothing(tmp_path):
    bad = ["nonsense", "[1]", {"prompt": 3}, {"prompt": " "}, {"answer": 4}, {"prompt": "What is it?", "answer": "four"}]
    bad += [{"prompt": "\ud83d"}, {"prompt": "\ud83d", "answer": 4}, {"question": "\ud83d", "answer": 4}]
    questions, faults = read_prompts(write(tmp_path / "mine.jsonl", {"prompt": "Say hello."}, *bad), "arithmetic")
    assert [question.problem.question for question in questions] == ["Say hello."]
    assert [fault.split(":")[0].split(" is")[0] for fault in faults] == [f"line {n}" for n in range(2, 11)]
    assert all("has half of a character, which no tokenizer reads" in fault for fault in faults[-3:])


def test_a_file_without_a_usable_line_is_an_error(tmp_path):
    for lines, message in [(["nonsense"], "has no line that can be used: line 1 is not JSON"), ([], "no line that can be")]:
        with pytest.raises(DataError, match=message):
            read_prompts(write(tmp_path / "mine.jsonl", *lines), "arithmetic")
    with pytest.raises(ConfigError, match=r"prompts \(nowhere\): there is no such file"):
        read_prompts(Path("nowhere"), "arithmetic")


def said(*lengths: int) -> Completions:
    n, total = len(lengths), sum(lengths)
    return Completions(np.arange(n), np.array(lengths), np.ones(n, bool), *(np.zeros(total) for _ in range(3)))


def test_each_response_is_graded_against_its_own_problem_and_prompts_alone_are_not():
    questions = [Question(Problem("a", "1")), Question(Problem("hello", ""), graded=False), Question(Problem("b", "2"))]
    sampled = ["1", "2", "x", "y", "2", "2"]
    found = judge(questions, said(3, 4, 5), ["1", "hi", "3"], sampled, pool=DirectGrading(Same()))
    assert [grade and grade.outcome for grade in found.grades] == ["correct", None, "wrong"]
    assert [[grade.correct for grade in group] for group in found.samples] == [[True, False], [], [True, True]]
    assert found.lengths == [3, 4, 5]
    assert judge(questions, said(3, 4, 5), ["1", "hi", "3"], pool=DirectGrading(Same())).samples == [[], [], []]


def test_a_thought_that_the_prompts_open_is_judged_with_the_responses():
    questions = [Question(Problem("a", "1")), Question(Problem("b", "t1"))]
    found = judge(questions, said(3, 3), ["1", "1"], ["1", "1"], pool=DirectGrading(Same()), thought="t")
    assert (found.right, [[grade.correct for grade in group] for group in found.samples]) == (
        [False, True],
        [[False], [True]],
    )
    assert found.responses == ["1", "1"]


def test_a_users_function_gives_the_rewards_and_the_task_the_outcomes():
    calls = []

    def length(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
        calls.append((prompts, responses, answers))
        return [10 * len(prompts) + len(response) for response in responses]

    found = judge([Question(Problem("a", "1"))], said(1), ["1"], ["1", "22"], pool=DirectGrading(Same(), length))
    assert (found.rewards, found.right) == ([11], [True])
    assert [grade.outcome for grade in found.samples[0]] == ["correct", "wrong"]
    assert calls == [(["a"], ["1"], ["1"])]  # of samples, whose rewards nobody is told, it is not asked


def test_where_a_users_function_fails_the_verdicts_stay_and_it_is_told(capsys):
    def spread(prompts: list[str], responses: list[str], answers: list[str]) -> list[float] | Failed:
        return Failed("grader_error", "mine.py:spread: no spread") if len(responses) == 1 else [1.0] * len(responses)

    questions = [Question(Problem("", "1")), Question(Problem("", "2")), Question(Problem("timed_out", "3"))]
    pool = DirectGrading(Failing(), spread)
    found = judge(questions[:2], said(1, 1), ["1", "3"], pool=pool)
    assert (found.right, found.rewards, found.without_verdict) == ([True, False], [0.0, 0.0], [])
    assert [grade.note for grade in found.greedy] == ["mine.py:spread: no spread"] * 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "Warning: 2 of 2 calls failed, and their rewards are 0: mine.py:spread: no spread"
    (late,) = judge(questions[2:], said(1), ["3"], pool=pool).greedy
    assert (late.outcome, late.note) == ("timed_out", "it was timed_out")


def test_a_part_of_the_questions_is_a_fair_sample_in_their_order():
    questions = [Question(Problem(str(i), "")) for i in range(1000)]
    taken = [int(question.problem.question) for question in fair_sample(questions, 100)]
    assert taken == sorted(set(taken)) and len(taken) == 100
    assert 450 < np.mean(taken) < 550  # the first hundred would have 49.5
    assert fair_sample(questions, 100) == fair_sample(questions, 100)
    assert fair_sample(questions, None) == fair_sample(questions, 2000) == questions
