"""What does each objective learn from the same samples, and what does each divergence cost? grpo_arithmetic, three seeds.

    python -m benchmarks.frontier       # writes benchmarks/results/frontier.json and frontier.png

Every online objective as its preset has it; then kl, approx_kl and ot at further coefficients (approx_kl's first is grpo,
which it is another name of). Optimiser steps are of 256 responses. Validation accuracy is taken every ten steps, test
accuracy and the KL to the reference (k3, nats a token, mean of the last five steps) at the end.
"""

import argparse
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.report import RESULTS, table
from benchmarks.training import mean_interval, train_all

OBJECTIVES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce", "kl", "ot")
COEFFICIENTS = {"kl": (0.1, 1.0, 10.0), "approx_kl": (0.1, 1.0, 10.0), "ot": (1.0, 10.0, 100.0)}  # besides the preset's
PRESETS = {"kl": ("kl", 0.001), "approx_kl": ("grpo", 0.001), "ot": ("ot", 0.1)}
KL = "train/kl_to_reference"
COLOURS = {"kl": "#0072b2", "approx_kl": "#d55e00", "ot": "#009e73"}  # that colour-blind readers tell apart
MARKERS = {"kl": "o", "approx_kl": "s", "ot": "^"}


def jobs(seeds: list[int], samples: int) -> list[tuple[dict, str, list[str]]]:
    common = [f"train.total_dialog_turns={samples}", "train.dialog_turns_per_batch=256", "train.optim_batch_size=256"]
    settings = [(name, None) for name in OBJECTIVES]
    settings += [(name, coefficient) for name, coefficients in COEFFICIENTS.items() for coefficient in coefficients]
    found = []
    for seed in seeds:
        for name, coefficient in settings:
            labels = {"objective": name, "coefficient": coefficient, "seed": seed}
            weight = [] if coefficient is None else [f"train.kl_to_ref_coeff={coefficient:g}"]
            found.append((labels, "grpo_sync.py", [f"objective={name}", *weight, f"seed={seed}", *common]))
    return found


def accuracy(runs: list[dict]) -> tuple[float, float]:
    """Mean test accuracy after training and half of its interval."""
    return mean_interval([run["eval"]["after"]["accuracy"] for run in runs])


def draw(by_label: dict[tuple, list[dict]]) -> None:
    """Accuracy against samples, an axes an objective with grpo's mean behind it; accuracy against KL."""
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplot_mosaic("ABC;DEF;GHI;KKK", height_ratios=[1, 1, 1, 1.6])
    base = by_label["grpo", None]
    for letter, name in zip("ABCDEFGHI", OBJECTIVES, strict=True):
        ax, runs = axes[letter], by_label[name, None]
        ax.plot(*_mean_curve(base), color="0.6", linewidth=3, label="grpo, mean")
        for run in runs:
            ax.plot(*zip(*_curve(run), strict=True), color="#0072b2", linewidth=0.8, alpha=0.7)
        centre, half = accuracy(runs)
        ax.set(title=f"{name}: {centre:.1%} ± {half:.1%}", ylim=(0.2, 1.0))
        ax.grid(alpha=0.3)
    axes["G"].set(ylabel="validation accuracy", xlabel="responses trained on")
    axes["G"].legend(loc="lower right", fontsize="small")
    ax = axes["K"]
    for name, coefficients in COEFFICIENTS.items():
        points, (first, preset) = [], PRESETS[name]
        for coefficient in (preset, *coefficients):
            runs = by_label[name, coefficient] if coefficient in coefficients else by_label[first, None]
            (y, dy), (x, dx) = accuracy(runs), mean_interval([run["metrics"][KL] for run in runs])
            points.append((x, y, min(dx, x), dy))
            ax.annotate(f"{coefficient:g}", (x, y), xytext=(6, -12), textcoords="offset points", color=COLOURS[name])
        x, y, dx, dy = zip(*points, strict=True)
        style = {"color": COLOURS[name], "marker": MARKERS[name], "capsize": 2, "elinewidth": 0.8}
        ax.errorbar(x, y, xerr=dx, yerr=dy, label=f"{name}, by coefficient", **style)
    ax.set(xlabel="KL to the reference at the end (k3), nats a token", ylabel="test accuracy")
    ax.set_title("Accuracy against divergence: mean of the seeds, 95% intervals")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    figure.savefig(RESULTS / "frontier.png", dpi=100)


def _curve(run: dict) -> list[list[float]]:
    return [[0, run["eval"]["before"]["accuracy"]], *run["validation"]]


def _mean_curve(runs: list[dict]) -> tuple[list[float], list[float]]:
    columns = list(zip(*(_curve(run) for run in runs), strict=True))
    return [points[0][0] for points in columns], [mean(y for _, y in points) for points in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=12_800, help="responses a run")
    arguments = parser.parse_args()
    by_label: dict[tuple, list[dict]] = {}
    for run in train_all("frontier", jobs(arguments.seeds, arguments.samples), metrics=(KL, "train/penalty")):
        by_label.setdefault((run["objective"], run["coefficient"]), []).append(run)
    draw(by_label)
    rows = []
    for (name, coefficient), runs in by_label.items():
        centre, half = accuracy(runs)
        kl = [run["metrics"][KL] for run in runs if KL in run["metrics"]]
        shown = "preset" if coefficient is None else f"{coefficient:g}"
        rows.append([name, shown, f"{centre:.1%} ± {half:.1%}", f"{mean(kl):.4f}" if kl else "-"])
    table(["objective", "coefficient", "test accuracy", "KL, nats a token"], rows)


if __name__ == "__main__":
    main()
