"""Pictures of runs' metrics.jsonl: one glance tells whether a run learned, and how it differs from others.

    python -m grpo.plot [run=outputs/DATE/TIME ...] [out=FILE.png]

run   the newest run under outputs/ by default; several are laid over one another, told apart by what they were
      configured differently
out   plots/run.png in the run's directory by default, outputs/comparison.png of several

Every run draws its own at its end. What a run has no metrics of (a reference, an engine) has no picture.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo.config import known_keys
from grpo.errors import ConfigError, DataError
from grpo.intervals import wilson
from grpo.metrics import PHASES, steps_per_push
from grpo.resume import SUMMARY, Config, key_value, read_config
from grpo.tool import OUTPUTS, check_out, find_run, run_tool, split_arguments

# Okabe and Ito's colours, told apart with any colour vision; yellow is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")  # once the colours are used up
PHASE_COLOURS = dict(zip(PHASES, (*COLOURS, "#999999"), strict=True))
LABEL_KEYS = 3  # that a run's label names, at most
LEGEND_WIDTH = 120  # characters
SMOOTH_FROM = 50  # steps, from which on a moving average is drawn too
SAME = ("logging", "ray", "resume", "resume_force", "dry_run")  # what makes no other run of it

MUTED = "#555555"
GRID = {"alpha": 0.25, "linewidth": 0.8}


@dataclass(frozen=True)
class Drawn:
    """A run as it is drawn."""

    label: str
    config: Config
    rows: list[dict]  # of metrics.jsonl
    summary: dict | None  # None where it has not ended
    colour: str
    style: str

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the metric `name`, where it is there."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]


@dataclass(frozen=True)
class Panel:
    """A picture of one metric over steps."""

    title: str
    unit: str
    metric: str
    least: tuple[float, float] | None = None  # what the axis shows at least: what happens within it is noise
    of_all: str | None = None  # the same of all that was sampled, in the metric's place in a run that leaves groups out

    def has(self, run: Drawn) -> bool:
        return any(self.metric in row for row in run.rows)

    def draw(self, axes: Axes, runs: Sequence[Drawn]) -> None:
        for run in runs:
            self._line(axes, run, *self.points(run))
        if self.least is not None:
            axes.update_datalim([(0, end) for end in self.least], updatex=False)
            axes.autoscale_view(scalex=False)
            if self.least[0] == 0:
                axes.set_ylim(bottom=0)

    def points(self, run: Drawn) -> tuple[list[int], list[float]]:
        steps, values = run.points(self.of_all) if self.of_all else ([], [])
        return (steps, values) if steps else run.points(self.metric)

    def average(self, values: list[float], window: int) -> list[float]:
        return moving_average(values, window)

    def _line(self, axes: Axes, run: Drawn, steps: list[int], values: list[float]) -> None:
        window = max(1, len(steps) // 25)
        style = {"color": run.colour, "linestyle": run.style, "clip_on": False}
        if len(steps) < SMOOTH_FROM:
            axes.plot(steps, values, linewidth=1.6, **style)
            return
        axes.plot(steps, values, linewidth=0.8, alpha=0.3, **style)
        axes.plot(steps[window - 1 :], self.average(values, window), linewidth=1.8, **style)


class Accuracy(Panel):
    """Held-out accuracy with its 95% interval: the validation split while training, the test split before and after."""

    def has(self, run: Drawn) -> bool:
        return run.summary is not None or super().has(run)

    def draw(self, axes: Axes, runs: Sequence[Drawn]) -> None:
        for run in runs:
            steps, values = run.points(self.metric)
            _, sizes = run.points("eval/problems")
            style = {"color": run.colour, "linestyle": run.style}
            if steps:
                axes.plot(steps, values, marker="o", markersize=3, linewidth=1.6, **style)
            if steps and len(sizes) == len(steps):
                ends = np.array([wilson(value, n) for value, n in zip(values, sizes, strict=True)]).T
                axes.fill_between(steps, *ends, color=run.colour, alpha=0.15, linewidth=0)
            if run.summary is None or not run.rows:
                continue
            for step, found in zip((0, run.rows[-1]["step"]), run.summary["eval"].values(), strict=True):
                share = found["accuracy"]
                low, high = wilson(share, found["n"])
                errors = [[share - low], [high - share]]
                axes.errorbar(
                    step, share, errors, fmt="D", color=run.colour, markersize=6, capsize=4, markeredgecolor="white"
                )
        axes.set_ylim(*SHARE)
        if len(runs) == 1 and runs[0].summary is not None:
            before, after = (runs[0].summary["eval"][name] for name in ("before", "after"))
            words = f"◆ before and after (n = {after['n']}): {before['accuracy']:.1%}, {after['accuracy']:.1%}"
            axes.text(0.98, 0.04, words, transform=axes.transAxes, ha="right", va="bottom", fontsize="small", color=MUTED)


class Throughput(Panel):
    """Responses over the seconds that they took, each point of as many steps as there are between two pushes.

    A single step's rate says little: the first one on a collection carries its sampling, and that behind a push the push.
    """

    def points(self, run: Drawn) -> tuple[list[int], list[float]]:
        steps, rates = run.points(self.metric)
        window = max(1, min(len(steps), steps_per_push(run.config)))
        return steps[window - 1 :], self.average(rates, window)

    def average(self, values: list[float], window: int) -> list[float]:
        """The mean of seconds a response, inverted: steps have equally many, but for the last one of an offline epoch."""
        return [1 / seconds for seconds in moving_average([1 / rate for rate in values], window)]


class Phases(Panel):
    """Seconds a step by phase, a bar a run, in their order from above.

    Phases beside one another are counted each. In async mode generate, reward and reference are nobody's step: they are not
    here but in summary.json, as totals.
    """

    def has(self, run: Drawn) -> bool:
        return any(f"time/{phase}_s" in row for row in run.rows for phase in PHASES)

    def draw(self, axes: Axes, runs: Sequence[Drawn]) -> None:
        size = len(runs)
        for y, run in zip(range(size - 1, -1, -1), runs, strict=True):
            left = 0.0
            for phase in PHASES:
                seconds = sum(run.points(f"time/{phase}_s")[1]) / max(1, len(run.rows))
                axes.barh(y, seconds, left=left, height=0.6, color=PHASE_COLOURS[phase], edgecolor="white", linewidth=0.5)
                left += seconds
            axes.text(left, y, f" {left:.3g} s", va="center", fontsize="small", color=MUTED)
            if size > 1:
                axes.plot([0, 0], [y - 0.3, y + 0.3], color=run.colour, linestyle=run.style, linewidth=5, clip_on=False)
        used = [phase for phase in PHASES if any(any(run.points(f"time/{phase}_s")[1]) for run in runs)]
        handles = [axes.barh(0, 0, color=PHASE_COLOURS[phase]) for phase in used]
        axes.legend(
            handles, used, fontsize="small", frameon=False, ncols=4, loc="upper left", columnspacing=1, handlelength=1
        )
        axes.set_yticks([])
        axes.set_ylim(-0.6, (size + 0.2) / 0.7)  # what is left above is the legend's
        axes.margins(x=0.14)


SHARE = (0.0, 1.0)
PANELS = (
    Panel("Reward of the responses", "mean", "rollout/reward_mean", of_all="rollout/reward_mean_with_dropped"),
    Accuracy("Held-out accuracy", "share right, 95% interval", "eval/accuracy", SHARE),
    Panel("Sampled accuracy", "share right of responses trained on", "rollout/accuracy", SHARE),
    Panel("KL to the reference", "nats a token (k3)", "train/kl_to_reference", (0.0, 1e-4)),
    Panel("KL to the inference policy", "nats a token (k1)", "train/kl_to_inference", (-1e-4, 1e-4)),
    Panel("Entropy", "nats a token", "train/entropy", (0.0, 0.0)),
    Panel("Response length", "mean tokens", "rollout/response_length_mean", (0.0, 1.0)),
    Panel("Unparseable responses", "share", "rollout/unparseable", (0.0, 0.01)),
    Panel("Staleness", "policy versions, largest of a batch", "buffer/staleness_max", (0.0, 1.0)),
    Panel("Loss: KL(policy || target)", "nats a group", "train/loss"),
    Panel("Ranking accuracy of the batch", "share of groups", "train/ranking_accuracy", SHARE),
    Panel("Entropy over completions", "nats a group", "train/group_entropy", (0.0, 0.0)),
    Panel("Log-prob of the completions", "nats a token", "train/completion_log_prob"),
    Panel("Gradient norm", "before clipping", "train/grad_norm", (0.0, 0.0)),
    Throughput("Throughput", "responses a second", "time/samples_per_s", (0.0, 0.0)),
    Phases("Phases", "seconds an optimiser step", "time/train_s"),
)
ONLINE_LOSS = "train/loss"  # of an online run it is near 0 by construction and says nothing


def moving_average(values: list[float], window: int) -> list[float]:
    """The mean of each `window` values in a row: as many as there are values, less window - 1."""
    sums = np.cumsum([0.0, *values])
    return ((sums[window:] - sums[:-window]) / window).tolist()


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl; what a run is just writing is left out."""
    whole, _, _ = (run_dir / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def labels(run_dirs: Sequence[Path], configs: Sequence[Config]) -> list[str]:
    """What tells the runs apart: the keys in which their configurations differ, or their names where none does."""
    names = ["/".join(run.resolve().parts[-2:]) for run in run_dirs]
    if len({type(config) for config in configs}) > 1:
        return names
    keys = [key for key in known_keys(type(configs[0])) if key.split(".")[0] not in SAME]
    differing = [key for key in keys if len({repr(key_value(config, key)) for config in configs}) > 1]
    if not differing:
        return names
    short = [key.rpartition(".")[2] for key in differing]
    shown = [(name if short.count(name) == 1 else key, key) for name, key in zip(short, differing, strict=True)][:LABEL_KEYS]
    found = [", ".join(f"{name}={key_value(config, key)}" for name, key in shown) for config in configs]
    return found if len(set(found)) == len(found) else [f"{a} ({b})" for a, b in zip(names, found, strict=True)]


def read(run_dirs: Sequence[Path]) -> list[Drawn]:
    """The runs; raises DataError where there is nothing to draw of one yet."""
    configs = [read_config(run) for run in run_dirs]
    runs = []
    for i, (run, config, label) in enumerate(zip(run_dirs, configs, labels(run_dirs, configs), strict=True)):
        rows, ended = read_metrics(run), run / SUMMARY
        summary = json.loads(ended.read_text()) if ended.is_file() else None
        if not rows and summary is None:
            raise DataError(f"{run} has no metrics yet: wait for its first step")
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        runs.append(Drawn(label, config, rows, summary, COLOURS[i % len(COLOURS)], style))
    return runs


def draw(figure: Figure, runs: Sequence[Drawn]) -> None:
    """Fill `figure` with a picture of each metric that any of the runs has."""
    offline = all(run.config.mode == "offline" for run in runs)
    panels = [panel for panel in PANELS if any(panel.has(run) for run in runs)]
    panels = [panel for panel in panels if offline or panel.metric != ONLINE_LOSS]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(4.6 * columns, 2.6 * rows + 0.6)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        axes.set_title(panel.title, loc="left", fontsize="medium", fontweight="bold")
        axes.set_title(panel.unit, loc="right", fontsize="small", color=MUTED)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize="small")
        axes.grid(axis="x" if isinstance(panel, Phases) else "y", **GRID)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 5, 10]))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # a factor of its own would lie on the title
        if not isinstance(panel, Phases):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if i + columns >= len(panels) and not isinstance(panel, Phases):
            axes.set_xlabel("optimiser step", fontsize="small", color=MUTED)
        panel.draw(axes, runs)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if len(runs) == 1:
        config = runs[0].config
        figure.suptitle(f"{runs[0].label} · {config.model.name} · {config.mode}", x=0.012, ha="left", fontsize="large")
    else:
        lines = [grid[0].plot([], [], color=run.colour, linestyle=run.style, linewidth=2.5)[0] for run in runs]
        across = max(1, LEGEND_WIDTH // max(len(run.label) for run in runs))
        figure.legend(lines, [run.label for run in runs], loc="outside upper left", frameon=False, ncols=across)


def plot(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the picture of one or several runs to `out`, a PNG."""
    figure = Figure(layout="constrained")
    draw(figure, read(run_dirs))
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=100)


def plot_run(run_dir: Path) -> None:
    """Write plots/run.png of a run."""
    plot([run_dir], run_dir / "plots" / "run.png")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    typed = [item.removeprefix("run=") for item in sys.argv[1:] if item.startswith("run=")]
    arguments, _ = split_arguments([i for i in sys.argv[1:] if not i.startswith("run=")], {"run": False, "out": False}, ())
    runs = [find_run(run, "metrics.jsonl") for run in typed or [None]]
    default = runs[0] / "plots" / "run.png" if len(runs) == 1 else OUTPUTS / "comparison.png"
    out = Path(arguments.get("out", default))
    if "out" in arguments:
        check_out(out)
    if out.suffix != ".png":
        raise ConfigError(f"out ({out}) must end in .png")
    plot(runs, out)
    print(f"{os.path.relpath(out)}: {', '.join(map(str, runs))}")


if __name__ == "__main__":
    run_tool(main)
