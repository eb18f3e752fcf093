"""Synchronous GRPO: collect, optimise, push, repeat."""

from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import RunConfig
from grpo.launch import launch

if TYPE_CHECKING:
    from grpo.run_sync import SyncRun


def train(run: "SyncRun") -> None:
    """Make those responses likelier that earn more than the others to the same prompt.

    collections    sample env.repeats responses a prompt, grade them, compare them within the group
    step           one optimiser step on the clipped objective and its penalties
    push_weights   the engines sample under the new weights from now on; evaluate and save where it is due

    Staleness is 0; with train.sync_iter=false it is 1, since the next collection runs meanwhile.
    """
    for rollouts in run.collections():
        for batch in run.batches(rollouts):
            run.step(batch)
        run.push_weights()


def main(config: RunConfig, run_dir: Path) -> None:
    from grpo.supervision import supervised  # here, so that a wrong key is answered before torch is imported
    from grpo_utils import build

    supervised(config, run_dir, build, train)


if __name__ == "__main__":
    launch("sync", "grpo_gsm8k", main)
