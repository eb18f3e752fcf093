"""Pictures of runs: what is in them, which runs they take, and the notebook that draws them too."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo import plot, tool
from grpo.config import RunConfig
from grpo.config_sections import EnvConfig, OptimizerConfig, TrainConfig
from grpo.errors import ConfigError, DataError
from grpo.intervals import wilson
from grpo.offline_config import OfflineConfig
from grpo.resume import write_config

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "eval": {"before": {"accuracy": 0.25, "n": 100}, "after": {"accuracy": 0.75, "n": 100}},
    "steps": 4,
    "samples_trained": 2048,
    "samples_per_s": 100.0,
    "wall_s": 20.5,
}


REFERENCE = {"train/kl_to_reference": 0.01}


def write_run(
    run_dir: Path,
    num_steps: int = 4,
    ended: bool = True,
    lr: float = 1e-4,
    seed: int = 0,
    more: dict = REFERENCE,
    optim_batch_size: int = 512,
) -> Path:
    run_dir.mkdir(parents=True)
    config = RunConfig(
        seed=seed,
        env=EnvConfig(dataset="arithmetic"),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(total_dialog_turns=2048, dialog_turns_per_batch=512, optim_batch_size=optim_batch_size),
    )
    write_config(config, run_dir)
    rows = []
    for step in range(1, num_steps + 1):
        row = {"step": step, "rollout/reward_mean": step / 10}
        row |= {"train/loss": 1e-6, "time/train_s": 2.0, "time/generate_s": 1.0, "time/push_s": 0.0}
        row |= more
        row |= {"eval/accuracy": 0.5, "eval/problems": 50} if step % 2 == 0 else {}
        rows.append(row)
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if ended:
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    return run_dir


def drawn(*runs: Path) -> dict[str, matplotlib.axes.Axes]:
    """The pictures that there are, by their titles."""
    figure = Figure(layout="constrained")
    plot.draw(figure, plot.read(runs))
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def test_a_picture_is_drawn_of_each_metric_that_a_run_has(tmp_path):
    pictures = drawn(write_run(tmp_path / "run"))
    assert list(pictures) == ["Reward of the responses", "Held-out accuracy", "KL to the reference", "Phases"]
    (line,) = pictures["Reward of the responses"].lines
    assert line.get_xydata().tolist() == [[1, 0.1], [2, 0.2], [3, pytest.approx(0.3)], [4, 0.4]]
    assert "KL to the reference" not in drawn(write_run(tmp_path / "other", more={}))


def test_the_reward_of_a_run_that_leaves_groups_out_is_that_of_all_it_sampled(tmp_path):
    whole, skipping = write_run(tmp_path / "a"), write_run(tmp_path / "b", more={"rollout/reward_mean_with_dropped": 0.05})
    first, second, *_ = drawn(whole, skipping)["Reward of the responses"].lines
    assert first.get_ydata().tolist() == [0.1, 0.2, pytest.approx(0.3), 0.4]
    assert second.get_ydata().tolist() == [0.05] * 4


def test_held_out_accuracy_has_its_interval_while_training_and_before_and_after(tmp_path):
    axes = drawn(write_run(tmp_path / "run"))["Held-out accuracy"]
    low, high = wilson(0.5, 50)
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((low, high))
    ends = {tuple(bar.lines[0].get_xydata()[0]): bar.lines[2][0].get_segments()[0][:, 1].tolist() for bar in axes.containers}
    assert ends == {(0, 0.25): pytest.approx(wilson(0.25, 100)), (4, 0.75): pytest.approx(wilson(0.75, 100))}
    assert axes.texts[0].get_text() == "◆ before and after (n = 100): 25.0%, 75.0%"


def test_phases_are_seconds_a_step(tmp_path):
    axes = drawn(write_run(tmp_path / "run"))["Phases"]
    assert [bar.get_width() for bar in axes.patches if bar.get_width()] == [1.0, 2.0]
    assert [text.get_text() for text in axes.get_legend().texts] == ["generate", "train"]


def test_runs_are_laid_over_one_another_and_told_apart_by_what_differs(tmp_path):
    first, second = write_run(tmp_path / "a" / "1"), write_run(tmp_path / "a" / "2", lr=1e-3, seed=1, ended=False)
    runs = plot.read([first, second])
    assert [run.label for run in runs] == ["seed=0, lr=0.0001", "seed=1, lr=0.001"]
    assert [len(axes.lines) for title, axes in drawn(first, second).items() if title.startswith("KL")] == [2]
    same = write_run(tmp_path / "a" / "3")
    assert [run.label for run in plot.read([first, same])] == ["a/1", "a/3"]
    labels = [run.label for run in plot.read([first, second, same])]
    assert labels[0] == "a/1 (seed=0, lr=0.0001)" and len(set(labels)) == 3


def test_what_is_noise_looks_like_it(tmp_path):
    """KL to the reference is 0.01 and shows, an axis from 0 on; no staleness is a line on the ground."""
    pictures = drawn(
        write_run(tmp_path / "run", more=REFERENCE | {"train/kl_to_inference": 1e-8, "buffer/staleness_max": 0.0})
    )
    low, high = pictures["KL to the inference policy"].get_ylim()
    assert low <= -1e-4 and high >= 1e-4
    assert pictures["Staleness"].get_ylim()[0] == 0 and pictures["Staleness"].get_ylim()[1] >= 1
    low, high = pictures["KL to the reference"].get_ylim()
    assert low == 0 and 0.01 < high < 0.02


def test_a_long_run_has_a_moving_average(tmp_path):
    assert plot.moving_average([1.0, 2.0, 6.0, 1.0], 2) == [1.5, 4.0, 3.5]
    axes = drawn(write_run(tmp_path / "run", num_steps=100))["Reward of the responses"]
    raw, smooth = axes.lines
    assert (len(raw.get_xdata()), len(smooth.get_xdata())) == (100, 97)
    assert smooth.get_xydata()[0].tolist() == [4, pytest.approx(0.25)]  # the mean of the first four


@pytest.mark.parametrize("num_steps", [8, 100])
def test_throughput_is_that_of_whole_collections(tmp_path, num_steps):
    """Of 4 steps of 128 responses, the first of which samples: 64 s and three times 12.8 s are 5 responses a second."""
    run = write_run(tmp_path / "run", optim_batch_size=128)
    rates = [2.0 if step % 4 == 0 else 10.0 for step in range(num_steps)]
    rows = [{"step": step, "time/samples_per_s": rate} for step, rate in enumerate(rates, start=1)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    lines = drawn(run)["Throughput"].lines
    assert lines[0].get_xdata().tolist() == list(range(4, num_steps + 1))
    assert len(lines) == (1 if num_steps == 8 else 2)
    assert all(line.get_ydata().tolist() == pytest.approx([5.0] * len(line.get_ydata())) for line in lines)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    (line,) = drawn(run)["Throughput"].lines  # of a run that has just begun: 2 steps in 0.6 s a response
    assert line.get_xydata().tolist() == [[2, pytest.approx(2 / 0.6)]]
    other = write_run(tmp_path / "other")  # which has none
    assert [len(line.get_xdata()) for line in drawn(run, other)["Throughput"].lines] == [1, 0]


def test_an_offline_run_has_the_pictures_of_its_own_metrics(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_config(OfflineConfig(data="x.jsonl"), run)
    row = {"step": 1, "train/loss": 0.5, "train/ranking_accuracy": 0.25, "eval/accuracy": 0.5, "eval/problems": 9}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert list(drawn(run)) == ["Held-out accuracy", "Loss: KL(policy || target)", "Ranking accuracy of the batch"]


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plot", *arguments])
    plot.main()


def test_the_command_takes_the_newest_run_and_refuses_what_it_cannot_draw(tmp_path, monkeypatch, capsys):
    for module in (tool, plot):
        monkeypatch.setattr(module, "OUTPUTS", tmp_path)
    run = write_run(tmp_path / "day" / "1")
    command(monkeypatch)
    assert (run / "plots" / "run.png").read_bytes().startswith(b"\x89PNG")
    other = write_run(tmp_path / "day" / "2", lr=1e-3)
    command(monkeypatch, f"run={run}", f"run={other}")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "comparison.png: " in capsys.readouterr().out
    waiting = write_run(tmp_path / "waiting", num_steps=0, ended=False)
    for arguments, error, message in [
        ([f"run={waiting}"], DataError, "has no metrics yet: wait for its first step"),
        ([f"run={tmp_path}"], ConfigError, "there is no run there"),
        ([f"run={run}", "out=x.pdf"], ConfigError, r"out \(x.pdf\) must end in .png"),
        ([f"run={run}", f"out={tmp_path}/no/x.png"], ConfigError, "there is no directory"),
        ([f"run={run}", f"out={tmp_path}"], ConfigError, "is there, and no file: give another name"),
        (["what=reward"], ConfigError, "what is not an argument here: there are run and out"),
    ]:
        with pytest.raises(error, match=message):
            command(monkeypatch, *arguments)


def test_every_metric_that_is_drawn_is_in_the_table():
    from grpo.metrics import METRICS

    assert {panel.metric for panel in plot.PANELS} <= METRICS.keys()
    assert {panel.of_all for panel in plot.PANELS if panel.of_all} == {"rollout/reward_mean_with_dropped"} & METRICS.keys()


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Has the notebook's cells run one after the other in a folder of runs, as a notebook runs them; gives their names."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    (tmp_path / "grpo").symlink_to(ROOT / "grpo")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "notebooks" / "results.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "commit it without outputs"

    def run() -> dict:
        names: dict = {}
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "results.ipynb", "exec"), names)
        return names

    yield run
    plt.close("all")


def test_the_notebook_says_where_no_run_has_ended(notebook):
    with pytest.raises(DataError, match=r"^no run under outputs/ or multirun/ has ended yet: train one$"):
        notebook()


def test_the_notebook_draws_offline_runs_alone_and_leaves_out_what_it_cannot_read(tmp_path, notebook, capsys):
    old = write_run(tmp_path / "outputs" / "old")
    (old / "config.yaml").write_text("no_such_key: 1\n")
    run = write_run(tmp_path / "outputs" / "offline")
    write_config(OfflineConfig(data="x.jsonl"), run)
    names = notebook()
    assert names["table"]["mode"].tolist() == ["offline"]
    assert names["chosen"] == [Path("outputs/offline")]
    assert "left out: outputs/old/config.yaml cannot be read: " in capsys.readouterr().out


def test_the_notebook_collects_the_runs_into_a_table_and_draws_them(tmp_path, notebook):
    write_run(tmp_path / "outputs" / "day" / "1")
    write_run(tmp_path / "outputs" / "mine")
    write_run(tmp_path / "multirun" / "day" / "time" / "0", lr=1e-3)
    write_run(tmp_path / "outputs" / "day" / "2", ended=False)
    names = notebook()
    assert names["table"][["samples", "before", "after"]].to_numpy().tolist() == [[2048, 0.25, 0.75]] * 3
    assert list(names["differing"]) == ["optimizer.lr"]
    assert len(names["chosen"]) == 3
    assert names["axes"].get_ylabel() == "held-out accuracy"


def test_small_values_are_written_out_and_no_factor_lies_on_the_title(tmp_path):
    figure = Figure(layout="constrained")
    plot.draw(figure, plot.read([write_run(tmp_path / "run", more={"train/kl_to_reference": 2e-5})]))
    FigureCanvasAgg(figure).draw()
    shown = {axes.get_title(loc="left"): axes.yaxis for axes in figure.axes}
    assert {axis.get_offset_text().get_text() for axis in shown.values()} == {""}
    assert shown["KL to the reference"].get_ticklabels()[1].get_text() == "0.00002"
