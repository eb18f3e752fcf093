"""Sweeps: one run after another under --multirun, or side by side as Slurm jobs, and the table of what they found.

    python grpo_sync.py --multirun optimizer.lr=1e-4,1e-5     # multirun/DATE/TIME/0, /1, and the table beside them
    python -m grpo.sweep multirun/DATE/TIME                   # makes the table again

Hydra makes the jobs and their directories, and its launcher runs them: here, or where submitit says. Each job starts the
script as a process of its own, as a user would: nothing of one run reaches the next, a run that is killed ends no other, and
a job that is started again goes on where it stopped. What the table says is read from the run directories.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from grpo.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, UserError, one_line
from grpo.intervals import wilson
from grpo.resume import SUMMARY, write_whole

ROOT = Path(__file__).resolve().parent.parent
JOB, OUTPUT, TABLE = "job.json", "output.log", "table"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LONGEST_REASON = 300  # characters


def add_override(override: str, typed: list[str]) -> None:
    """Add an override to the command line, next to those that were `typed`: argparse takes them in one row only."""
    sys.argv.insert(sys.argv.index(typed[0]) if typed else len(sys.argv), override)
    typed.insert(0, override)


def parse_override(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        raise ConfigError(f"{override} is not an override that can be read: write key=value") from None


def _values(override: str, parsed: Override, groups: dict[str, list[str]]) -> list[str]:
    if not parsed.is_sweep_override():
        return [override]
    swept = parsed.value()
    if parsed.is_interval_sweep():
        values = [str(swept.start), str(swept.end)]
    elif isinstance(swept, Glob):
        if parsed.key_or_group not in groups:
            raise ConfigError(f"{override}: a pattern needs a group of configurations, {' or '.join(sorted(groups))}")
        names = groups[parsed.key_or_group]
        values = swept.filter(names)
        if not values:
            raise ConfigError(f"{override}: nothing there has such a name; there are {', '.join(names)}")
    else:
        values = list(parsed.sweep_string_iterator())
    return [f"{parsed.get_key_element()}={value}" for value in values]


def jobs(overrides: list[str], groups: dict[str, list[str]]) -> Iterator[list[str]]:
    """The overrides of each of a sweep's runs, in Hydra's order: the last key changes fastest. Of an interval, its ends.

    groups: the names in each configuration group, which `objective=glob(*)` means. Of a key that is typed twice the last
    counts.
    """
    values = {}
    for override in overrides:
        parsed = parse_override(override)
        values[parsed.get_key_element()] = _values(override, parsed, groups)
    return map(list, product(*values.values()))


def varying(overrides: list[list[str]]) -> list[str]:
    """The keys whose values are not the same in all of the runs."""
    found = [dict(item.partition("=")[::2] for item in its) for its in overrides]  # ~KEY, which takes one away, has no value
    return [key for key in dict.fromkeys(key for its in found for key in its) if len({its.get(key) for its in found}) > 1]


@dataclass(frozen=True)
class Job:
    """One run of a sweep. Without a summary there is a `reason`."""

    number: int
    overrides: list[str]
    reason: str | None
    summary: dict | None

    def value(self, key: str) -> str:
        return dict(item.partition("=")[::2] for item in self.overrides).get(key, "")

    @property
    def accuracy(self) -> float | None:
        """Held-out, after training."""
        return None if self.summary is None else self.summary["eval"]["after"]["accuracy"]

    def told(self) -> str:
        """Its result, or why there is none."""
        if self.summary is None:
            return self.reason
        return f"{self.summary['eval']['before']['accuracy']:.1%} before, {self.accuracy:.1%} after"


def read_job(run_dir: Path) -> Job:
    job = json.loads((run_dir / JOB).read_text())
    summary = json.loads((run_dir / SUMMARY).read_text()) if (run_dir / SUMMARY).is_file() else None
    return Job(job["number"], job["overrides"], None if summary else job["reason"], summary)


def read_jobs(sweep_dir: Path, planned: list[list[str]]) -> list[Job]:
    """The runs of a sweep, the best first and those without a result last; of `planned` also those that did not start."""
    found = {job.number: job for job in map(read_job, (path.parent for path in sweep_dir.glob(f"*/{JOB}")))}
    for number, overrides in enumerate(planned):
        found.setdefault(number, Job(number, overrides, "did not start", None))
    return sorted(found.values(), key=lambda job: (job.summary is None, -(job.accuracy or 0.0), job.number))


@contextmanager
def _handed_on(child: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Hand the signals that would end this process on to the child; yields those that came."""
    came: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        came.append(number)
        for process in child:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for process in child:  # an exception of somebody else's handler
            if process.poll() is None:
                process.terminate()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(code: int, output: Path, start: int) -> str:
    """Why the run that wrote `output` from byte `start` on ended with exit code `code`, in one line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {output}"
    written = output.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    said = [line.removeprefix("Error: ") for line in lines if line.startswith(("Error: ", "Ended by "))]
    last = (said or lines or [f"exit code {code}"])[-1]
    return one_line(Exception(last))[:LONGEST_REASON] + ("" if said else f"; see {output}")


def run_job(config: DictConfig) -> float | None:
    """What Hydra runs for each job of a sweep; returns the held-out accuracy after training, None where there is none.

    A failure is written down and ends nothing. What was asked to end ends the sweep.
    """
    told = HydraConfig.get()
    run_dir, number, overrides = Path(told.runtime.output_dir), told.job.num, list(told.overrides.task)

    def note(reason: str | None) -> None:
        write_whole(run_dir / JOB, json.dumps({"number": number, "overrides": overrides, "reason": reason}) + "\n")

    if (run_dir / JOB).is_file() and (other := read_job(run_dir)).overrides != overrides:
        print(
            f"Error: {run_dir} holds another run ({' '.join(other.overrides)}): choose another hydra.sweep.dir",
            file=sys.stderr,
        )
        sys.exit(EXIT_ERROR)
    note("did not end, or was killed with the process that had started it")
    came: list[int] = []
    if not (run_dir / SUMMARY).is_file():
        print(f"Run {number}: its output is in {os.path.relpath(run_dir / OUTPUT)}", flush=True)
        command = [sys.executable, str(ROOT / f"grpo_{config.mode}.py"), "--config-name", told.job.config_name, *overrides]
        if not any(item.startswith("logging.progress=") for item in overrides):
            command.append("logging.progress=false")
        command += [f"hydra.run.dir='{run_dir}'", "resume=auto"]
        child: list[subprocess.Popen] = []
        with open(run_dir / OUTPUT, "a") as output, _handed_on(child) as came:
            start = output.tell()
            # A session of its own, so that Ctrl-C reaches it once, from here.
            child.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
            code = child[0].wait()
        note(_reason(code, run_dir / OUTPUT, start) if code else None)
    job = read_job(run_dir)
    print(f"Run {number}: {job.told()}", flush=True)
    if came:
        sys.exit(EXIT_INTERRUPTED if came[-1] == signal.SIGINT else EXIT_PREEMPTED)
    return job.accuracy


class Directory(Callback):
    """Tells where Hydra puts the sweep, and remembers it for the table."""

    last: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Directory.last = Path(config.hydra.sweep.dir).absolute()
        print(f"The sweep is in {os.path.relpath(Directory.last)}", flush=True)


def sweep(config_dir: Path, default_config: str, typed: list[str], planned: list[list[str]]) -> int:
    """Run the sweep of the command line and write its table; returns the exit code. `planned`: overrides by number."""
    if "hydra/sweeper=optuna" in typed and not any(item.startswith("hydra.sweeper.direction=") for item in typed):
        add_override("hydra.sweeper.direction=maximize", typed)  # of accuracy, where its own default is minimize
    add_override(f"+hydra.callbacks.directory._target_={__name__}.{Directory.__name__}", typed)
    # submitit's processes import this module before they start the script.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, Directory.last = 0, None
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name=default_config)(run_job)()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as end:
        code = end.code
    if Directory.last is None:
        return code
    left_out = write_table(Directory.last, planned)
    return code or (EXIT_ERROR if left_out else 0)


def write_table(sweep_dir: Path, planned: list[list[str]]) -> int:
    """Write and print the table of a sweep; returns how many of its runs have no result."""
    found = read_jobs(sweep_dir, planned)
    if not found:
        raise ConfigError(f"{sweep_dir}: there is no run of a sweep there")
    keys = varying([job.overrides for job in found])
    write_whole(sweep_dir / f"{TABLE}.txt", describe(found, keys) + "\n")
    _write_csv(sweep_dir / f"{TABLE}.csv", found, keys)
    plot(sweep_dir / f"{TABLE}.png", found, keys)
    print(f"\n{describe(found, keys)}\n\nThe table is in {os.path.relpath(sweep_dir)}: {TABLE}.txt, .csv and .png")
    left_out = sum(job.summary is None for job in found)
    if left_out:
        print(
            f"{left_out} of {len(found)} runs have no result; once one is gone on with (resume=), or ends, "
            f"python -m grpo.sweep {os.path.relpath(sweep_dir)} makes the table again"
        )
    return left_out


def describe(found: list[Job], keys: list[str]) -> str:
    """The table as text: a run a line."""
    rows = [["run", *keys, "before", "after", "95% interval", "steps", "responses/s", "s"]]
    for job in found:
        row = [str(job.number), *map(job.value, keys)]
        if job.summary is None:
            rows.append([*row, job.reason])
            continue
        its, after = job.summary, job.summary["eval"]["after"]
        low, high = wilson(after["accuracy"], after["n"])
        row += [f"{its['eval']['before']['accuracy']:.1%}", f"{after['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]
        rows.append([*row, str(its["steps"]), f"{its['samples_per_s']:.0f}", f"{its['wall_s']:.0f}"])
    whole = [row for row in rows if len(row) == len(rows[0])]  # a reason is as long as it is
    widths = [max(len(row[i]) for row in (rows if i <= len(keys) else whole)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)


def _write_csv(path: Path, found: list[Job], keys: list[str]) -> None:
    names = ("before", "after", "n", "low", "high", "steps", "samples_trained", "samples_per_s", "wall_s", "reason")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *keys, *names], restval="")
        writer.writeheader()
        for job in found:
            row = {"run": job.number} | {key: job.value(key) for key in keys}
            if job.summary is None:
                writer.writerow(row | {"reason": job.reason})
                continue
            after = job.summary["eval"]["after"]
            low, high = wilson(after["accuracy"], after["n"])
            row |= {"before": job.summary["eval"]["before"]["accuracy"], "after": after["accuracy"], "n": after["n"]}
            row |= {"low": round(low, 6), "high": round(high, 6)}
            writer.writerow(row | {name: job.summary[name] for name in names if name in job.summary})


def plot(path: Path, found: list[Job], keys: list[str]) -> None:
    """A bar a run, the best on top: accuracy after training with its 95% interval, and before it as a line."""
    from matplotlib.figure import Figure  # here, since a job's own process has no use for it

    figure = Figure(figsize=(8, 1.5 + 0.35 * len(found)), layout="constrained")
    axes, before = figure.add_subplot(), None
    for place, job in enumerate(found):
        if job.summary is None:
            axes.text(0.01, place, "no result", va="center", fontsize="small", color="tab:red")
            continue
        after, before = job.summary["eval"]["after"], job.summary["eval"]["before"]["accuracy"]
        low, high = wilson(after["accuracy"], after["n"])
        whiskers = [[after["accuracy"] - low], [high - after["accuracy"]]]
        axes.barh(place, after["accuracy"], xerr=whiskers, color="tab:blue", ecolor="black", capsize=3)
        axes.vlines(before, place - 0.4, place + 0.4, color="tab:orange")
    names = [f"{job.number}: " + " ".join(f"{key}={job.value(key)}" for key in keys) for job in found]
    axes.set_yticks(range(len(found)), names, fontsize="small")
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set(xlim=(0, 1), xlabel="held-out accuracy, with 95% intervals (orange: before training)")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        sys.exit(EXIT_ERROR if write_table(Path(sys.argv[1]), []) else 0)
    except UserError as error:
        sys.exit(f"Error: {one_line(error)}")
