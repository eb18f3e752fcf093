"""grpo_sync.py that says on stdout what it is about to do, so that a test can end it there.

    python -m tests.integration.announced [OVERRIDES]

Nothing else is changed: the parts are the real ones. Each line is a phase: generate, reference, train, push, evaluate, save
(the ranks' part of a checkpoint) or complete (the rest of it, beside training). In the phase that HELD names it waits until
its stdin is closed.
"""

import functools
import os
import sys

import grpo_sync
from grpo.launch import launch

HELD = "GRPO_TEST_HELD"


def announce(cls: type, method: str, phase: str) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def announcing(*arguments, **keywords):
        print(phase, flush=True)
        if phase == os.environ.get(HELD):
            sys.stdin.read()
        return original(*arguments, **keywords)

    setattr(cls, method, announcing)


def main(config, run_dir) -> None:
    from grpo.checkpoint import CheckpointWriter
    from grpo.collector import InferencePolicy
    from grpo.pools import ReferencePool, TrainerPool
    from grpo.push import WeightPush
    from grpo.run import Run

    announce(InferencePolicy, "forward", "generate")
    announce(ReferencePool, "score", "reference")
    announce(TrainerPool, "step", "train")
    announce(WeightPush, "__call__", "push")
    announce(Run, "evaluate", "evaluate")
    announce(TrainerPool, "save", "save")
    announce(CheckpointWriter, "_complete", "complete")
    grpo_sync.main(config, run_dir)


if __name__ == "__main__":
    launch("sync", "grpo_gsm8k", main)
