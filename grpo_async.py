"""Asynchronous GRPO: optimise on what has finished, push at an interval, while the engines go on."""

from pathlib import Path

from grpo.config import RunConfig
from grpo.launch import launch


def train(run) -> None:
    """The algorithm. No rollout is older than train.max_staleness policy versions when it is trained on."""
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
