"""What does saving cost the training loop? Steps with and without a checkpoint that is written beside them, in turns.

    python -m benchmarks.checkpoint      # writes benchmarks/results/checkpoint.json

The 50M-parameter model with AdamW: 600 MB a checkpoint. A turn is a whole synchronous step; in every second one a checkpoint
is begun first, and written, hashed and renamed while the step computes. The cost of a checkpoint is what such a turn takes
longer, and its share is that of ten steps, as train.checkpoint_frequency=10 has it.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.report import save, spread, table
from benchmarks.step import pipeline_step
from benchmarks.subjects import configuration
from grpo.checkpoint import newest

EVERY = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="turns without and with a checkpoint, after a first pair")
    parser.add_argument("overrides", nargs="*", help="configuration keys, key=value")
    arguments = parser.parse_args()
    turns = 2 * (1 + arguments.pairs)
    overrides = ["train.kl_to_ref_coeff=0", "inference_model.max_tokens=64", *arguments.overrides]
    config = configuration("random50m", turns, *overrides)
    from grpo_utils import build

    seconds: dict[bool, list[float]] = {False: [], True: []}
    copying = []
    with tempfile.TemporaryDirectory(dir=".") as folder, build(config, Path(folder)) as run:
        collections = run.collections()
        for turn in range(turns):
            saves = turn % 2 == 1
            start = time.perf_counter()
            if saves:
                run.save()
                copying.append(time.perf_counter() - start)
            pipeline_step(run, collections)
            run.writer.finish()  # what a run would go on with beside the next step
            seconds[saves].append(time.perf_counter() - start)
        num_bytes = sum(file.stat().st_size for file in newest(Path(folder)).path.rglob("*") if file.is_file())
    without, with_one = median(seconds[False][1:]), median(seconds[True][1:])
    share = (with_one - without) / (EVERY * without)
    save(
        "checkpoint",
        config,
        {
            "bytes": num_bytes,
            "step_s": spread(seconds[False][1:]),
            "step_with_checkpoint_s": spread(seconds[True][1:]),
            "copying_s": spread(copying[1:]),
            "share_of_ten_steps": round(share, 4),
        },
    )
    table(
        ["checkpoint MB", "step s", "with a checkpoint s", "copying s", f"share of {EVERY} steps"],
        [[num_bytes / 1e6, without, with_one, median(copying[1:]), share]],
    )


if __name__ == "__main__":
    main()
