"""Synchronous GRPO: collect, optimise, push, repeat."""

from pathlib import Path

from grpo.config import RunConfig
from grpo.launch import launch


def train(run) -> None:
    """The algorithm. Staleness is 0; with train.sync_iter=false it is 1, since the next collection runs meanwhile."""
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
