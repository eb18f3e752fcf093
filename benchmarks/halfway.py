"""A training script that also evaluates on the test split after half of its samples, and writes halfway.json.

python -m benchmarks.halfway grpo_async.py --config-name grpo_arithmetic
"""

import json
import runpy
import sys

from grpo.run import Run


def main() -> None:
    push = Run.push_weights

    def push_and_evaluate(self: Run) -> None:
        push(self)
        path = self.run_dir / "halfway.json"
        if 2 * self.progress.samples_trained >= self.config.train.total_dialog_turns and not path.exists():
            path.write_text(json.dumps({"samples": self.progress.samples_trained} | self.evaluate("test")))

    Run.push_weights = push_and_evaluate
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
