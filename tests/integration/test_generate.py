"""python -m grpo.generate on a finished run, as a user types it."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Finished

ROOT = Path(__file__).parents[2]
TRANSFORMERS = "inference_model.backend=transformers"
QUESTION = "What is (4 - 9) * 6?"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "grpo.generate", *arguments]


def generate(*arguments: str) -> str:
    ended = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("Asking ") and ended.stderr.count("\n") == 1  # and not a word of the libraries'
    return ended.stdout


def greedy_of(run: Finished, tmp_path: Path, question: str) -> str:
    """What grpo.evaluate has as the run's response."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": question}))
    evaluate = [
        sys.executable,
        "-m",
        "grpo.evaluate",
        f"run={run.run_dir}",
        f"prompts={mine}",
        "k=0",
        f"out={tmp_path}/c.json",
    ]
    subprocess.run(evaluate, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return json.loads((tmp_path / "c.json").read_text())["problems"][0]["after"]["response"]


@pytest.mark.parametrize("backend", [pytest.param("vllm", marks=pytest.mark.slow), "transformers"])
def test_a_question_gets_the_response_that_an_evaluation_has_and_its_answer(run_sync, tmp_path, backend):
    run = run_sync(f"inference_model.backend={backend}")
    response, answer = generate(f"model={run.run_dir}", QUESTION).splitlines()
    assert response == greedy_of(run, tmp_path, QUESTION)
    assert answer == f"Answer: {response.partition('<answer>')[2].partition('</answer>')[0]}"


def test_what_a_file_gets_can_be_graded(run_sync, tmp_path):
    run, asked, out = run_sync(TRANSFORMERS), tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(json.dumps({"question": f"What is (1 + {i}) + 2?", "answer": 3 + i}) + "\n" for i in range(5)))
    assert generate(f"model={run.run_dir}", f"prompts={asked}", f"out={out}").startswith(f"5 responses in {out}")
    grade = [sys.executable, "-m", "grpo.grade", "env.dataset=arithmetic", f"responses={out}"]
    graded = subprocess.run(grade, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert graded.startswith("5 responses: ") and "0 lines could not be read" in graded


def test_at_a_terminal_it_asks_line_by_line(run_sync):
    run = run_sync(TRANSFORMERS)
    terminal, end = pty.openpty()
    process = subprocess.Popen(command(f"model={run.run_dir}"), cwd=ROOT, stdin=end, stdout=end, stderr=end, close_fds=True)
    os.close(end)
    said = ""

    def wait_for(words: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 120
        while words not in said:
            assert time.monotonic() < deadline, said
            if select.select([terminal], [], [], 1.0)[0]:
                said += os.read(terminal, 4096).decode()

    wait_for("Ctrl-D ends.")
    for number in (3, 4):
        said = ""
        os.write(terminal, f"What is (1 + 1) + {number}?\n".encode())
        wait_for("Answer: ")
        said = said.partition("Answer: ")[2]
        wait_for("> ")  # before its next prompt a terminal takes Ctrl-D for itself
    os.write(terminal, b"\x04")
    assert process.wait(30) == 0
    os.close(terminal)
