"""How long do requests in flight stand still for a push, and what share of the time are pushes?

    python -m benchmarks.push_stall      # writes benchmarks/results/push_stall.json

Asynchronous runs of grpo_arithmetic with a push every 1, 4 and 16 optimiser steps, looked at in the engine's process. A
stall is the time from the end of the last step before an update to the beginning of the first step after it. The keys and
values of everything in flight belong to the old weights and are then computed anew: `delay_s` says how much later, in all, a
response has its next token, from the end of the last step before until each that was in flight has one, less the median
step. Pushes that found nothing in flight have neither.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import ray

from benchmarks.report import save, spread, table
from benchmarks.subjects import configuration

STEPS = {1: 48, 4: 96, 16: 160}  # optimiser steps by train.weight_update_frequency


def watch(actor) -> None:
    """Have an inference actor keep `seen`: seconds of its engine's steps, of stalls, delays, and the parts of updates."""
    engine = actor.engine
    scheduler = engine.engine.engine_core.engine_core.scheduler
    seen = actor.seen = defaultdict(list)
    step, update, workers, adopt = engine.step, engine.update_weights, engine._workers, engine._adopt
    tokens: dict[str, int] = {}  # of the responses that stand still
    last_s = 0.0  # when the last step before they did ended

    def stepping():
        nonlocal tokens, last_s
        start = time.perf_counter()
        if tokens and len(seen["stall"]) == len(seen["delay"]):
            seen["stall"].append(start - last_s)
        answer = step()
        now = time.perf_counter()
        seen["step"].append(now - start)
        if tokens:
            going = scheduler.requests
            tokens = {i: n for i, n in tokens.items() if i in going and going[i].num_output_tokens == n}
            if tokens:
                return answer
            seen["delay"].append(now - last_s)
        last_s = now
        return answer

    def updating(version):
        nonlocal tokens
        tokens = {request.request_id: request.num_output_tokens for request in scheduler.running}
        return timed(update, "update")(version)

    def timed(work, name: str | None = None):
        def working(*arguments, **keywords):
            start = time.perf_counter()
            answer = work(*arguments, **keywords)
            seen[name or arguments[0]].append(time.perf_counter() - start)
            return answer

        return working

    engine.step, engine.update_weights = stepping, updating
    engine._workers, engine._adopt = timed(workers), timed(adopt, "adopt")


def measure(frequency: int, steps: int, overrides: list[str]) -> tuple[dict, object]:
    import grpo_async
    from grpo_utils import build

    chosen = ["mode=async", f"train.weight_update_frequency={frequency}", "env.test_size=8", *overrides]
    config = configuration("builtin", steps, *chosen)
    with tempfile.TemporaryDirectory() as folder:
        with build(config, Path(folder)) as run:
            run.begin()
            engine = run.engines.actors[0]
            ray.get(engine.__ray_call__.remote(watch))
            grpo_async.train(run)
            seen = ray.get(engine.__ray_call__.remote(lambda actor: dict(actor.seen)))
            run.finish()
        summary = json.loads((Path(folder) / "summary.json").read_text())
    usual, stalls = median(seen["step"]), seen["stall"]
    delays = [seconds - usual for seconds in seen["delay"]]
    parts = {name: seconds for name, seconds in seen.items() if name not in ("step", "stall", "delay", "reseed")}
    return {
        "pushes": len(seen["update"]),
        "stall_s": spread(stalls) | {"max": round(max(stalls), 6)},
        "delay_s": spread(delays) | {"max": round(max(delays), 6)},
        "engine_step_s": round(usual, 6),
        "parts_s": {name: round(median(seconds), 6) for name, seconds in parts.items()},
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
        ["steps a push", "pushes", "stalls", "stall s", "longest", "delay s", "longest", "share of time", "responses/s"],
        [
            [
                str(frequency),
                its["pushes"],
                len(its["stall_s"]["values"]),
                its["stall_s"]["median"],
                its["stall_s"]["max"],
                its["delay_s"]["median"],
                its["delay_s"]["max"],
                its["share_of_time_in_pushes"],
                its["samples_per_s"],
            ]
            for frequency, its in results.items()
        ],
    )


if __name__ == "__main__":
    main()
