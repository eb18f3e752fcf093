"""How long do requests in flight stand still for a push, and what share of the time are pushes?

    python -m benchmarks.push_stall      # writes benchmarks/results/push_stall.json

Asynchronous runs of grpo_arithmetic with a push every 1, 4 and 16 optimiser steps. The engine's process notes when each of
its steps and each update begins and ends. A stall is the time from the end of the last step before an update to the end of
the first step after it, which computes the keys and values of everything in flight anew, less the median step: how much
later the next tokens come. Pushes that found nothing in flight are left out and counted.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import ray

from benchmarks.report import save, spread, table
from benchmarks.subjects import configuration

STEPS = {1: 48, 4: 96, 16: 160}  # optimiser steps by train.weight_update_frequency


class Event(NamedTuple):
    """A step or an update of the engine, in seconds of its process's clock."""

    what: str
    start: float
    end: float
    in_flight: bool  # whether it had anything to sample when it began


def note_events(actor) -> None:
    """Have an inference actor keep `events`, and the seconds of an update's parts."""
    engine = actor.engine
    actor.events, actor.parts = [], defaultdict(list)
    step, update, workers, adopt = engine.step, engine.update_weights, engine._workers, engine._adopt

    def noted(what: str, work):
        def working(*arguments):
            in_flight, start = engine.has_work(), time.perf_counter()
            answer = work(*arguments)
            actor.events.append((what, start, time.perf_counter(), in_flight))
            return answer

        return working

    def timed(work, name: str = ""):
        def working(*arguments, **keywords):
            start = time.perf_counter()
            answer = work(*arguments, **keywords)
            actor.parts[name or arguments[0]].append(time.perf_counter() - start)
            return answer

        return working

    engine.step, engine.update_weights = noted("step", step), noted("update", update)
    engine._workers, engine._adopt = timed(workers), timed(adopt, "adopt")


def stalls(events: list[Event]) -> tuple[list[float], float]:
    """The stall of each update that found requests in flight, and the median step, in seconds."""
    usual = median(event.end - event.start for event in events if event.what == "step")
    found = [
        after.end - before.end - usual
        for before, update, after in zip(events, events[1:], events[2:], strict=False)
        if (before.what, update.what, after.what) == ("step", "update", "step") and update.in_flight
    ]
    return found, usual


def measure(frequency: int, steps: int, overrides: list[str]) -> tuple[dict, object]:
    import grpo_async
    from grpo_utils import build

    chosen = ["mode=async", f"train.weight_update_frequency={frequency}", "env.test_size=8", *overrides]
    config = configuration("builtin", steps, *chosen)
    with tempfile.TemporaryDirectory() as folder:
        with build(config, Path(folder)) as run:
            run.begin()
            engine = run.engines.actors[0]
            ray.get(engine.__ray_call__.remote(note_events))
            grpo_async.train(run)
            noted, parts = ray.get(engine.__ray_call__.remote(lambda actor: (actor.events, dict(actor.parts))))
            run.finish()
        summary = json.loads((Path(folder) / "summary.json").read_text())
    events = list(itertools.starmap(Event, noted))
    found, usual = stalls(events)
    return {
        "pushes": sum(event.what == "update" for event in events),
        "pushes_with_requests_in_flight": len(found),
        "stall_s": spread(found) | {"max": round(max(found), 6)},
        "engine_step_s": round(usual, 6),
        "parts_s": {name: round(median(seconds), 6) for name, seconds in parts.items() if name != "reseed"},
        "share_of_time_in_pushes": summary["account"]["pushing"],
        "samples_per_s": summary["samples_per_s"],
    }, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="configuration keys, key=value")
    arguments = parser.parse_args()
    results = {}
    for frequency, steps in STEPS.items():
        results[frequency], config = measure(frequency, steps, arguments.overrides)
    save("push_stall", config, {"weight_update_frequency": results})
    table(
        ["steps a push", "pushes", "stall s", "longest", "engine step s", "share of time", "responses/s"],
        [
            [
                frequency,
                f"{its['pushes_with_requests_in_flight']} of {its['pushes']}",
                its["stall_s"]["median"],
                its["stall_s"]["max"],
                its["engine_step_s"],
                its["share_of_time_in_pushes"],
                its["samples_per_s"],
            ]
            for frequency, its in results.items()
        ],
    )


if __name__ == "__main__":
    main()
