"""A reward function that keeps a run where it is until the file `go` is there."""

import os
import time
from pathlib import Path

BEHIND = 2  # optimiser steps
LONGEST_S = 240.0


def is_exact(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """1 for the answer in its tag; behind step BEHIND of the run in PAUSED_RUN it waits for PAUSED_RUN/go."""
    run = os.environ.get("PAUSED_RUN")
    if run is not None:
        deadline = time.monotonic() + LONGEST_S
        while _num_steps(Path(run)) >= BEHIND and not (Path(run) / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    return [float(f"<answer>{answer}</answer>" in response) for response, answer in zip(responses, answers, strict=True)]


def _num_steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0
