"""Pictures of a run's metrics.jsonl: one glance tells whether it learned."""

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _curve(axes, rows: list[dict], name: str, label: str, **style) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def plot_run(run_dir: Path) -> list[Path]:
    """Write plots/reward_accuracy.png and, where a reference was used, plots/kl.png; returns their paths."""
    rows = read_metrics(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _curve(axes, rows, "rollout/reward_mean", "mean reward of the responses", color="tab:blue")
    _curve(axes, rows, "rollout/accuracy", "accuracy of the responses (sampled)", color="tab:orange", alpha=0.7)
    offline = any("train/ranking_accuracy" in row for row in rows)
    _curve(axes, rows, "train/ranking_accuracy", "ranking accuracy of the batch", color="tab:orange", alpha=0.7)
    evaluated = "ranking accuracy on the held-out groups" if offline else "validation accuracy (greedy)"
    _curve(axes, rows, "eval/accuracy", evaluated, color="tab:green", marker="o", markersize=3)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if rows:
        ends = [0, rows[-1]["step"]]
        label = f"held-out accuracy before and after (n={after['n']}): {before['accuracy']:.1%} to {after['accuracy']:.1%}"
        values = [before["accuracy"], after["accuracy"]]
        axes.scatter(ends, values, color="black", marker="*", s=90, zorder=3, label=label)
    title, unit = ("Ranking accuracy", "share") if offline else ("Reward and accuracy", "share, or reward")
    axes.set(xlabel="optimiser step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    paths.append(folder / "reward_accuracy.png")
    figure.savefig(paths[-1], dpi=120)

    if any("train/kl_to_reference" in row for row in rows):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        _curve(axes, rows, "train/kl_to_reference", "to the reference (k3)", color="tab:red")
        _curve(axes, rows, "train/kl_to_inference", "to the inference policy (k1)", color="tab:gray")
        axes.set(xlabel="optimiser step", ylabel="nats a token", title="Divergence of the policy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(folder / "kl.png")
        figure.savefig(paths[-1], dpi=120)
    return paths
