"""Write a checkpoint's weights as a model in transformers format: the best one, or those of a run that has not ended.

    python -m grpo.export [run=outputs/DATE/TIME] [checkpoint=BEST] [out=DIRECTORY]

run          the newest run under outputs/ with a checkpoint of that name by default
checkpoint   BEST by default, which is best by validation accuracy; LATEST, or a name in the run's checkpoints/
out          best/, latest/ or the checkpoint's name in the run's directory by default; it must not be there yet

Adapters are merged; they are also written by themselves, in peft's format, to `adapter` in it.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.errors import CheckpointError, ConfigError
from grpo.offline_config import OfflineConfig
from grpo.resume import read_config
from grpo.sources import check_adapter_files, check_files, check_model
from grpo.tool import find_run, run_tool, split_arguments

OWN = ("run", "checkpoint", "out")
BEST, LATEST = "BEST", "LATEST"
MISSING = {BEST: "it was not evaluated on the way, or not yet (train.eval_frequency)", LATEST: "none is whole yet"}  # why


def find_checkpoint(run_dir: Path, typed: str) -> Path:
    """The directory of a checkpoint by its name, BEST or LATEST; ConfigError where it is not there."""
    folder = run_dir / "checkpoints"
    pointers = [name for name in MISSING if (folder / name).is_file()]
    if typed in MISSING and typed not in pointers:
        remedy = f": checkpoint={LATEST} exports its newest" if LATEST in pointers else ""
        raise ConfigError(f"checkpoint ({typed}): {run_dir} has none, since {MISSING[typed]}{remedy}")
    name = (folder / typed).read_text().strip() if typed in pointers else typed
    if not (folder / name).is_dir():
        there = [*pointers, *sorted(path.name for path in folder.glob("checkpoint_*"))]
        raise ConfigError(f"checkpoint ({typed}): there is no {folder / name}; there are {', '.join(there) or 'none'}")
    return folder / name


def export_checkpoint(run_dir: Path, checkpoint: Path, out: Path) -> dict:
    """Write the model of `checkpoint` to the directory `out`, whole or not at all; returns the checkpoint's state.

    Raises CheckpointError where the checkpoint is damaged, or the run, which goes on, has removed it meanwhile.
    """
    import torch  # here, and what imports it: a wrong argument is answered before

    from grpo import builtin, models, trainer_state
    from grpo.adapters import load_lora
    from grpo.checkpoint import STATE, TRAINER, damage
    from grpo.devices import resolve_device
    from grpo.four_bit import check_four_bit

    with _not_removed(checkpoint):
        if (reason := damage(checkpoint)) is not None:
            raise CheckpointError(f"{checkpoint} is damaged: {reason}: take another one, checkpoint=NAME")
        state = json.loads((checkpoint / STATE).read_text())
    config = read_config(run_dir)
    source = builtin.resolve(config.model.name, config.model.cache_dir)
    check_model(source)
    check_files(source)
    lora, in_four_bits = config.train_model.lora, config.train_model.quantization.enabled
    adapter = config.lora_path if isinstance(config, OfflineConfig) else None
    if adapter is not None:
        check_adapter_files(adapter)
    device, dtype = torch.device("cpu"), torch.float32
    if in_four_bits:  # as the run made them, where this machine can
        check_four_bit(models.read_config(source), "train_model.quantization.enabled")
        device, dtype = torch.device(resolve_device(config.device)), models.DTYPES[config.train.mixed_precision]
    hidden = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with trainer_state.one_process(), _not_removed(checkpoint):
            model = models.load_model(source, device, dtype=dtype, in_four_bits=in_four_bits)
            if adapter is not None:
                model = load_lora(model, adapter)
            elif lora.enabled:
                model = models.add_lora(model, lora, config.seed)
            trainer_state.load_weights(model, checkpoint / TRAINER)
            models.export(model, models.load_tokenizer(source), hidden / "model")
        if (hidden / "adapter").is_dir():
            os.rename(hidden / "adapter", hidden / "model" / "adapter")
        os.rename(hidden / "model", out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return state


@contextmanager
def _not_removed(checkpoint: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, CheckpointError, CheckpointException):
        if checkpoint.is_dir():
            raise
        raise CheckpointError(f"{checkpoint} was removed by its run meanwhile: type the command again") from None


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    arguments, _ = split_arguments(sys.argv[1:], dict.fromkeys(OWN, False), ())
    typed = arguments.get("checkpoint", BEST)
    run_dir = find_run(arguments.get("run"), "checkpoints" if "run" in arguments else f"checkpoints/{typed}")
    checkpoint = find_checkpoint(run_dir, typed)
    out = Path(arguments["out"]) if "out" in arguments else run_dir / typed.lower()
    if out.exists():
        raise ConfigError(f"out ({out}) is there already: give another")
    if not out.parent.is_dir():
        raise ConfigError(f"out ({out}): there is no directory {out.parent}")
    progress = export_checkpoint(run_dir, checkpoint, out)["progress"]
    accuracy = (
        f", validation accuracy {progress['best_accuracy']:.1%}" if progress["best_step"] == progress["num_steps"] else ""
    )
    print(f"{out}: the weights after step {progress['num_steps']} ({checkpoint.name}{accuracy})")


if __name__ == "__main__":
    run_tool(main)
