"""What README.md and docs/ say is so: commands, links, keys, metrics, the loops, the files to copy.

Every command that is printed is found and tried. Those that train are composed and planned, as `dry_run=true` does; tools
have their arguments read. What that leaves out of a command's work is done by the test that ELSEWHERE names.
"""

import argparse
import ast
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from transformers import AutoModelForCausalLM

import grpo
import grpo_async
import grpo_sync
from docs.generate import ARCHITECTURES, DOCS, qwen2
from grpo import evaluate, generate, launch
from grpo.config import RENAMED, RunConfig, known_keys
from grpo.config_sections import LoraConfig
from grpo.errors import ConfigError
from grpo.launch import compose
from grpo.metrics import METRICS
from grpo.models import add_lora
from grpo.offline_config import OfflineConfig
from grpo.resume import write_config
from grpo.tool import split_arguments

ROOT = DOCS.parent
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
PEERS = ROOT / "README.md", DOCS / "failed_experiments.md"
PROGRAMS = ("python", ".venv/bin/python", "make", "pip", "sbatch", "tensorboard", "vllm")
DEFAULTS = {"sync": "grpo_gsm8k", "async": "grpo_gsm8k", "offline": "grpo_offline"}

# Commands whose work is done in another test; here only their arguments are read.
ELSEWHERE = {
    "python -m grpo.doctor": "tests/integration/test_watch.py::test_the_doctor_starts_the_parts_of_a_run_and_proves_a_push",
    "python grpo_sync.py": "tests/integration/test_sync.py::test_a_run_leaves_behind_what_the_documents_promise",
    "python grpo_async.py": "tests/integration/test_async.py::"
    "test_no_rollout_is_older_than_the_bound_and_each_prompt_is_trained_on_once",
    "python grpo_offline.py": "tests/integration/test_offline.py::"
    "test_the_policy_learns_to_rank_the_right_completion_of_held_out_prompts_first",
    "python -m grpo.evaluate": "tests/integration/test_evaluate.py::test_before_and_after_are_those_that_the_run_measured",
    "python -m grpo.generate": "tests/integration/test_generate.py::"
    "test_a_question_gets_the_response_that_an_evaluation_has_and_its_answer",
    "python -m grpo.export": "tests/integration/test_export.py::"
    "test_the_newest_is_the_runs_model_and_the_best_can_be_asked_as_the_run_asks",
    "python -m grpo.sweep": "tests/unit/test_sweep.py::test_a_table_is_made_again_from_the_directories_alone",
    "python -m grpo.transport_plot": "tests/unit/test_transport_plot.py::"
    "test_the_command_writes_a_picture_and_refuses_what_it_cannot_read",
    "python -m tests.scored_arithmetic": "tests/integration/test_offline.py::"
    "test_the_policy_learns_to_rank_the_right_completion_of_held_out_prompts_first",
    "python -m examples.walk_through": "tests/integration/test_python.py::test_the_walk_through_trains_compares_and_shows",
}


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def lines_of_code(text: str) -> list[str]:
    """Indented lines, lines of shell blocks, and code between backticks."""
    shell = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r" \\\n +", " ", without_blocks(text))  # a line that goes on in the next
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", "\n".join(line for line in text.splitlines() if not line.startswith("    ")))
    return [line for block in shell for line in block.splitlines()] + indented + [c for c in inline if " " in c]


def words(line: str) -> list[str]:
    """A command's words, without a prompt, a comment or variables before it; [] where the line is no command."""
    try:
        found = shlex.split(line.strip().removeprefix("$ "), comments=True)
    except ValueError:  # prose with an apostrophe
        return []
    while found and re.match(r"[A-Z_]+=", found[0]):
        found = found[1:]
    if not found or found[0] not in PROGRAMS or found[-1].endswith(".NAME"):
        return []
    return ["python" if found[0] == ".venv/bin/python" else found[0], *found[1:]]


COMMANDS = sorted({shlex.join(words(line)) for page in PAGES for line in lines_of_code(page.read_text()) if words(line)})
# What is printed with the error that it ends in.
PROMPTED = [
    pair for page in PAGES for pair in re.findall(r"^    \$ (.+)\n    Error: (.+)$", page.read_text(), flags=re.MULTILINE)
]
NOT_TO_WORK = {command for command, _ in PROMPTED} | {
    "python -m grpo.evaluate model=PATH env.dataset=larger"
}  # no such task


@pytest.fixture
def place(tmp_path, monkeypatch, model_path) -> Path:
    """A working directory in which there is what the commands name, as they name it."""
    run_dir = tmp_path / "outputs" / "DATE" / "TIME"
    (run_dir / "checkpoints").mkdir(parents=True)
    write_config(compose("grpo_arithmetic"), run_dir)
    (run_dir / "model").symlink_to(model_path)
    step = {"step": 1, "rollout/reward_mean": 0.5, "time/train_s": 1.0}
    line = {"step": 1, "group_id": 0, "prompt": "2 + 2?", "response": "4", "answer": "4", "reward": 1.0, "advantage": 0.0}
    line |= {"terms": {"exact": 1.0}, "outcome": "correct", "parsed": "4", "policy_version": 0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (run_dir / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "PATH_OR_HUB_NAME").symlink_to(model_path)
    ARCHITECTURES["Qwen2.5-0.5B"].save_pretrained(tmp_path / "PATH")
    for name in ("benchmarks", "tests", "slurm", "Makefile", *(path.name for path in ROOT.glob("requirements*.txt"))):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    group = {"prompt": "2 + 2?", "completions": [{"text": "4", "score": 1.0}, {"text": "5", "score": 0.0}]}
    (tmp_path / "scored.jsonl").write_text(f"{json.dumps(group)}\n{json.dumps(group | {'prompt': '1 + 3?'})}\n")
    (tmp_path / "gsm8k_train.jsonl").touch()
    (tmp_path / "FILE.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4", "response": "The answer is 4."}\n')
    add_lora(AutoModelForCausalLM.from_config(QWEN), LoraConfig(enabled=True), seed=0).save_pretrained(run_dir / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


QWEN = qwen2(hidden=64, layers=1, heads=2, kv_heads=2, feed_forward=64, vocabulary=16, tied=True)  # in the place of 0.5B's


def dry_run(mode: str, arguments: list[str]) -> None:
    """What a script does with `arguments` and dry_run=true: it prints a plan and ends with exit code 0."""
    if mode == "async" and not any(argument.startswith("mode=") for argument in arguments):
        arguments = [*arguments, "mode=async"]
    with pytest.raises(SystemExit) as ended:
        typed = get_args_parser().parse_args([*arguments, "dry_run=true"])
        (launch._check_sweep if typed.multirun else launch._check)(typed, mode, DEFAULTS[mode])
    assert ended.value.code == 0


def read_arguments(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's own parser reads the arguments, and goes no further."""
    read, real = [], argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser) -> None:
        read.append(real(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [module, *arguments])
    if "parse_args()" not in Path(importlib.util.find_spec(module).origin).read_text():
        assert arguments == []
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(KeyboardInterrupt):
        runpy.run_module(module, run_name="__main__")
    assert len(read) == 1


def check(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise where the command cannot work."""
    program, *rest = command
    if program == "make":
        assert set(rest) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    elif program == "pip":
        assert rest[0] == "install" and ("-r" not in rest or Path(rest[rest.index("-r") + 1]).is_file())
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
        assert Path(rest[script]).is_file()
        dry_run("async" if "async" in rest[script] else "sync", rest[script + 1 :])
    elif program == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure(argv=["tensorboard", *rest])
    elif program == "vllm":
        assert rest[0] == "serve" and Path(rest[1]).is_dir()
    elif rest[0].endswith(".py"):
        dry_run(rest[0].removeprefix("grpo_").removesuffix(".py"), rest[1:])
    elif rest[1].startswith("vllm."):
        vllm = Path(importlib.util.find_spec("vllm").origin)
        assert vllm.parent.joinpath(*rest[1].split(".")[1:]).with_suffix(".py").is_file()
    elif rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in rest[2:])
    else:
        CHECKS.get(rest[1], partial(read_arguments, rest[1]))(rest[2:], monkeypatch)


def check_tool(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")


def check_evaluate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments:
        evaluate.configure(*split_arguments(arguments, dict.fromkeys(evaluate.OWN, False), evaluate.SECTIONS))


class Reached(Exception):
    """What is to be asked is known."""


def check_generate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def asker(config: RunConfig, model: str, temperature: float) -> None:
        assert Path(model).is_dir()
        raise Reached

    monkeypatch.setattr(generate, "asker", asker)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    with pytest.raises(Reached):
        generate.main()


def check_file_of_a_module(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work is in ELSEWHERE."""


CHECKS: dict[str, Callable] = {
    "grpo.grade": partial(check_tool, "grpo.grade"),
    "grpo.plot": partial(check_tool, "grpo.plot"),
    "grpo.view": partial(check_tool, "grpo.view"),
    "grpo.generate": check_generate,
    "grpo.doctor": check_file_of_a_module,
    "grpo.export": check_file_of_a_module,
    "grpo.sweep": check_file_of_a_module,
    "grpo.evaluate": check_evaluate,
    "grpo.transport_plot": check_file_of_a_module,
    "tests.scored_arithmetic": check_file_of_a_module,
    "examples.walk_through": check_file_of_a_module,
}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in NOT_TO_WORK])
def test_every_printed_command_can_be_run(command, place, gpus, monkeypatch):
    gpus(32 if command.startswith("sbatch") else 8, {"Qwen2.5-0.5B": QWEN})
    if "hydra/sweeper=optuna" in command and importlib.util.find_spec("optuna") is None:
        with pytest.raises(ConfigError, match=r"needs pip install --no-deps -r requirements_optuna\.txt"):
            check(shlex.split(command), monkeypatch)
    else:
        check(shlex.split(command), monkeypatch)


def test_what_is_not_run_here_is_run_by_a_test_with_a_name():
    printed = {re.match(r"python (grpo_\w+\.py|-m (grpo|tests|examples)\.\w+)", command) for command in COMMANDS} - {None}
    run_here = {f"python -m grpo.{name}" for name in ("grade", "plot", "view")}
    assert {found[0] for found in printed} - run_here == ELSEWHERE.keys()
    for path, name in (where.split("::") for where in ELSEWHERE.values()):
        tree = ast.parse((ROOT / path).read_text())
        assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_commands_are_found():
    """So that a change of how they are written does not leave the tests above with nothing to do."""
    assert len(COMMANDS) > 40
    assert "python grpo_sync.py" in COMMANDS and "make train" in COMMANDS
    assert words("    $ .venv/bin/python -m x.y a=1  # so") == ["python", "-m", "x.y", "a=1"]
    assert words("    A_B=1 make train") == ["make", "train"]
    assert words("    prompts are the user's") == words("`metrics.jsonl`") == []


def rows_of_machines() -> list[tuple[str, str]]:
    table = (ROOT / "README.md").read_text().split("## Which command for which machine")[1].split("\n## ")[0]
    return re.findall(r"^\| ([^|`]+) \| `(python [^`]+)`", table, flags=re.MULTILINE)


MACHINES = {"one GPU": 1, "two GPUs": 2, "three GPUs": 3, "six GPUs": 6, "GPUs": 3}


@pytest.mark.parametrize(("machine", "command"), rows_of_machines())
def test_a_command_works_on_the_machine_that_it_is_for(machine, command, place, gpus, capsys):
    number = next((count for words, count in MACHINES.items() if machine.startswith(words)), 0)
    gpus(number)
    _, script, *arguments = shlex.split(command)
    dry_run(script.removeprefix("grpo_").removesuffix(".py"), arguments)
    plan = capsys.readouterr().out
    device = re.search(r"device +(\w+)(?:, ([\d.]+) GPU a process)?", plan)
    assert device[1] == ("cuda" if number else "cpu")
    if number > 1:
        assert device[2] == "1"  # none is shared


def test_the_machines_table_has_a_row_for_each_kind():
    machines = [machine for machine, _ in rows_of_machines()]
    assert len(machines) >= 12
    assert all(any(machine.startswith(kind) for machine in machines) for kind in ("a CPU", "GPUs", *MACHINES))


@pytest.mark.parametrize(("command", "answer"), PROMPTED)
def test_an_answer_is_printed_as_it_is_given(command, answer):
    _, script, *arguments = shlex.split(command)
    mode = script.removeprefix("grpo_").removesuffix(".py")
    with pytest.raises(ConfigError) as raised:
        launch._check(get_args_parser().parse_args(arguments), mode, DEFAULTS[mode])
    assert str(raised.value) == answer


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


KEYS = {*known_keys(RunConfig), *known_keys(OfflineConfig), *RENAMED}
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_metrics_that_are_named_are_there(page):
    for code in re.findall(r"`([^`\n]+)`", without_blocks(page.read_text())):
        for key in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)(?==|$)", code):
            if key.split(".")[0] in SECTIONS and not key.endswith((".py", ".jsonl", ".yaml", ".md")):
                assert key in KEYS or any(known.startswith(f"{key}.") for known in KEYS), (page.name, code)
        if re.fullmatch(r"(train|rollout|buffer|sync|eval|time)/\w+", code):
            assert code.replace("term_NAME", "term_*") in METRICS, (page.name, code)


def test_every_module_is_in_the_packages_table_of_contents():
    named = set(re.findall(r"\w+", grpo.__doc__))
    assert {path.stem for path in (ROOT / "grpo").glob("*.py")} - {"__init__"} <= named


def test_no_page_is_left_out_of_the_readme():
    linked = re.findall(r"\]\(docs/(\w+\.md)\)", (ROOT / "README.md").read_text())
    assert {page.name for page in DOCS.glob("*.md")} - set(linked) == set()


def test_the_two_loops_are_those_of_the_scripts():
    lines = (ROOT / "README.md").read_text().split("The two loops")[1].split("\n\n")[1].splitlines()
    columns = ([line[:48].rstrip() for line in lines], [line[48:].rstrip() for line in lines])
    for column, script in zip(columns, (grpo_sync, grpo_async), strict=True):
        body = ast.get_source_segment(inspect.getsource(script), ast.parse(inspect.getsource(script)).body[-3].body[-1])
        assert textwrap.dedent("\n".join(column)).strip() == textwrap.dedent("    " + body).strip()


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found
    return found


def test_the_task_that_is_shown_is_a_whole_one_and_passes_its_test(tmp_path):
    task, its_test, _ = blocks("adding.md", "python")
    (tmp_path / "larger.py").write_text(task)
    (tmp_path / "test_larger.py").write_text(its_test)
    (tmp_path / "conftest.py").write_text(f"import grpo.tasks\ngrpo.tasks.__path__.append({str(tmp_path)!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout + run.stderr


def test_the_policy_loss_that_is_shown_is_what_it_says():
    import torch

    space: dict = {}
    exec(blocks("adding.md", "python")[2], space)
    log_probs = torch.tensor([[0.0, 0.5], [0.0, 9.0]]).log1p().requires_grad_()  # ratios 1, 1.5 and 1
    mask = torch.tensor([[True, True], [True, False]])
    found = space["policy_loss"](log_probs, torch.zeros(2, 2), torch.tensor([2.0, -1.0]), mask, clip_low=0.2, clip_high=0.2)
    assert torch.where(mask, found.loss, 0.0).tolist() == [[-2.0, -3.0], [1.0, 0.0]]
    assert found.carries.tolist() == mask.tolist() and not found.clipped_low.any() and not found.clipped_high.any()
    preset = blocks("adding.md", "yaml")[0]
    assert "policy_loss: unclipped" in preset and "- grpo" in preset


def test_the_reward_that_is_shown_is_one():
    space: dict = {}
    exec(blocks("tasks.md", "python")[0], space)
    assert space["tagged"](["2 + 2?"] * 3, ["<answer>4</answer>", "<answer>5</answer>", "4"], ["4"] * 3) == [1.0, 0.2, 0.0]


def test_the_python_interface_that_is_shown_is_there():
    text = (DOCS / "python.md").read_text()
    compile(blocks("python.md", "python")[0], "python.md", "exec")
    shown = set(re.findall(r"\bgrpo\.([a-zA-Z_]+)\(", text)) | {"UserError", "Preempted"}
    assert shown == set(grpo.PUBLIC)
    assert all(callable(getattr(grpo, name)) for name in grpo.PUBLIC)


def test_the_commits_that_are_named_are_those_of_the_results():
    said = (ROOT / "README.md").read_text().split("that were measured: ")[1].split("\n\n")[0]
    named = {name: part[:7] for part in re.split(r";\s", said) for name in re.findall(r"`(.+?)`", part)}
    results = {}
    for name in named:
        files = (ROOT / "benchmarks" / "results").glob(f"{name}.json")
        results[name] = {json.loads(file.read_text())["machine"]["commit"] for file in files}
    assert results == {name: {commit} for name, commit in named.items()} and "learning" in results


def test_the_ratio_to_the_peer_is_the_measured_one_on_both_pages():
    ratio = f"{json.loads((ROOT / 'benchmarks' / 'results' / 'peers_builtin.json').read_text())['ratio']:.2f}"
    said = [re.search(r"^\| .*TRL.*built-in model[^|]*\| (\d\.\d\d) ", page.read_text(), re.MULTILINE)[1] for page in PEERS]
    assert said == [ratio, ratio]


def test_the_results_that_are_shown_are_those_that_were_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text())
    readme = (ROOT / "README.md").read_text()

    def after(found: dict) -> str:
        low, high = found["interval_95"]
        return f"{found['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"

    control, summary = results["control_shuffled_rewards"], results["summary"]
    mean = {"accuracy": summary["accuracy_after_mean"], "interval_95": summary["accuracy_after_interval_95"]}
    rows = [(f"seed {run['seed']}", run["eval"]["before"], run["eval"]["after"]) for run in results["runs"]]
    rows += [
        ("mean of the three seeds", rows[0][1], mean),
        ("control: .*", control["eval"]["before"], control["eval"]["after"]),
    ]
    for name, before, found in rows:
        assert re.search(rf"^\| {name} \| {before['accuracy']:.1%} \| {re.escape(after(found))} \|", readme, re.MULTILINE), (
            name
        )
    assert f" | {after(results['ceiling_supervised_right_demonstrations'])} |" in readme
    (_, before, found), shown = rows[0], re.findall(r"Held-out accuracy on .*", readme)
    said = f"{before['accuracy']:.1%} before, {found['accuracy']:.1%} after"
    assert shown == [f"Held-out accuracy on {found['n']} test problems: {said}"]
