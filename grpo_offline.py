"""Offline training: completions that have scores already are ranked by the policy as their scores rank them."""

from pathlib import Path

from grpo.launch import launch
from grpo.offline_config import OfflineConfig


def train(run) -> None:
    """Bring the policy's shares of a prompt's completions to those of their scores (grpo/objectives/offline.py)."""
    for groups in run.batches():
        run.step(groups)


def main(config: OfflineConfig, run_dir: Path) -> None:
    from grpo.offline import build  # here, so that a wrong key is answered before torch is imported
    from grpo.supervision import supervised

    supervised(config, run_dir, build, train)


if __name__ == "__main__":
    launch("offline", "grpo_offline", main)
