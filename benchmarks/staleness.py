"""What does old data cost? grpo_arithmetic synchronous, and asynchronous at three bounds, the same seeds and samples.

    python -m benchmarks.staleness      # writes benchmarks/results/staleness.json and staleness.png

Each bound counts policy versions, and a push follows each optimiser step of 256 responses. The buffer is as large as the
bound allows, so that what is trained on is about as old as it may be; the realised mean is in the table. Accuracy is that
on the 1,000 test problems, after half of the samples and at the end; differences are paired by seed.
"""

import argparse
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.report import RESULTS, table
from benchmarks.training import mean_interval, train_all

REALISED = ("buffer/staleness_mean", "buffer/staleness_max", "train/ess")
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "sync": ("-m benchmarks.halfway grpo_sync.py", []),
    "async, bound 1": ("-m benchmarks.halfway grpo_async.py", ["train.max_staleness=1", "train.is_correction=truncate"]),
    "async, bound 4": ("-m benchmarks.halfway grpo_async.py", ["train.max_staleness=4", "train.is_correction=truncate"]),
    "async, bound 16": ("-m benchmarks.halfway grpo_async.py", ["train.max_staleness=16", "train.is_correction=truncate"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", type=int, default=20_480, help="responses a run")
    arguments = parser.parse_args()
    common = [
        f"train.total_dialog_turns={arguments.samples}",
        "train.dialog_turns_per_batch=256",
        "train.optim_batch_size=256",
    ]
    jobs = [
        ({"setting": name, "seed": seed}, script, [*overrides, f"seed={seed}", *common])
        for seed in arguments.seeds
        for name, (script, overrides) in SETTINGS.items()
    ]
    runs = train_all("staleness", jobs, metrics=REALISED)
    by_setting = {name: [run for run in runs if run["setting"] == name] for name in SETTINGS}
    draw(by_setting)
    rows = []
    sync = by_setting["sync"]
    for name, its in by_setting.items():
        row = [name]
        for value in (halfway, after):
            difference = mean_interval([value(run) - value(base) for run, base in zip(its, sync, strict=True)])
            row += [f"{mean(value(run) for run in its):.1%}", f"{difference[0]:+.1%} ± {difference[1]:.1%}"]
        age = [run["metrics"].get("buffer/staleness_mean (mean)", 0.0) for run in its]
        rows.append([*row, f"{mean(age):.2f}"])
    table(["setting", "half-way", "less sync", "at the end", "less sync", "mean staleness"], rows)


def after(run: dict) -> float:
    return run["eval"]["after"]["accuracy"]


def halfway(run: dict) -> float:
    return run["eval"]["halfway"]["accuracy"]


def draw(by_setting: dict[str, list[dict]]) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(by_setting.items(), ("#000000", "#0072b2", "#009e73", "#d55e00"), strict=True):
        for run in runs:
            axes.plot(*zip(*run["validation"], strict=True), color=colour, linewidth=0.6, alpha=0.4)
        columns = list(zip(*(run["validation"] for run in runs), strict=False))
        means = [mean(y for _, y in points) for points in columns]
        axes.plot([points[0][0] for points in columns], means, color=colour, linewidth=2, label=name)
    axes.set(xlabel="responses trained on", ylabel="validation accuracy", title="Old data: means and single seeds")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(RESULTS / "staleness.png", dpi=120)


if __name__ == "__main__":
    main()
