"""Asynchronous GRPO: optimise on what has finished, push at an interval, while the engines go on."""

from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import RunConfig
from grpo.launch import launch

if TYPE_CHECKING:
    from grpo.run_async import AsyncRun


def train(run: "AsyncRun") -> None:
    """Make those responses likelier that earn more than the others to the same prompt.

    batches        groups that were sampled, graded and compared in the background, as they finish
    step           one optimiser step on the clipped objective and its penalties
    push_weights   the engines sample under the new weights from now on; evaluate and save where it is due

    No rollout is older than train.max_staleness policy versions when it is trained on.
    """
    for batch in run.batches():
        run.step(batch)
        if run.push_is_due:
            run.push_weights()


def main(config: RunConfig, run_dir: Path) -> None:
    from grpo.supervision import supervised  # here, so that a wrong key is answered before torch is imported
    from grpo_utils import build

    supervised(config, run_dir, build, train)


if __name__ == "__main__":
    launch("async", "grpo_gsm8k", main)
