"""Does this machine have what a run needs? Each line is ok, or says what to do.

    python -m grpo.doctor [KEY=VALUE ...]

The parts are those of a run: Ray, an engine, a training rank, and a push between them with its proof, on a model of the
built-in one's size. KEY=VALUE is as for grpo_sync.py: inference_model.backend=transformers, device=cpu.
"""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from grpo.errors import ConfigError, UserError, one_line
from grpo.launch import compose
from grpo.tool import run_tool

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.name=MODEL",
    "env.num_envs=8",
    "train.use_kl_to_ref=false",
    "train.gradient_accumulation_steps=1",
    "ray.start_timeout_s=120",
    "ray.timeout_s=60",
]
LEAST_DISK, LEAST_SHARED_MEMORY = 5 << 30, 512 << 20  # bytes

Check = Callable[[], str]


class Doctor:
    """The checks in their order; what a later one needs is kept from an earlier one."""

    def __init__(self, typed: list[str], folder: Path, closing: ExitStack) -> None:
        self.typed, self.folder, self.closing = typed, folder, closing

    def checks(self) -> Iterator[tuple[str, Check]]:
        yield "installation", self.installation
        yield "devices", self.devices
        yield "disk", self.disk
        yield "shared memory", self.shared_memory
        yield "Ray", self.ray
        yield "engine and trainer", self.models
        yield "weight push", self.push

    def installation(self) -> str:
        has_gpu = shutil.which("nvidia-smi")
        name, flag = (
            ("requirements_ifeval.txt", "") if has_gpu else ("requirements_cpu.txt", "--no-deps ")
        )  # as the Makefile
        pins, wrong = dict(read_pins(ROOT / name)), []
        for package, pinned in pins.items():
            try:
                found = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found = "no"
            if pinned not in (found, found.split("+")[0]):
                wrong.append(f"{package} {pinned} ({found} is there)")
        if wrong:
            more = f" and {len(wrong) - 5} more" * (len(wrong) > 5)
            raise ConfigError(f"{name} has {', '.join(wrong[:5])}{more}: make setup, or pip install {flag}-r {name}")
        return f"Python {sys.version.split()[0]} and the {len(pins)} packages of {name}"

    def devices(self) -> str:
        import psutil
        import torch

        if torch.cuda.is_available():
            if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
                raise ConfigError(
                    "Triton builds kernels for the GPU with gcc and Python's headers, which are not there: install "
                    f"python{sys.version_info.major}.{sys.version_info.minor}-dev, or the like"
                )
            names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            return ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in names)
        from grpo.devices import cuda_build, num_cores, resolve_device

        if shutil.which("nvidia-smi") and "device=cpu" not in self.typed:
            if cuda_build() is None:
                raise ConfigError(
                    "nvidia-smi is there, and PyTorch is a CPU build: install requirements_ifeval.txt, or type device=cpu"
                )
            resolve_device("auto")  # which says why PyTorch sees none
        return f"no GPU, {num_cores()} cores, {psutil.virtual_memory().available / 2**30:.1f} GiB of memory free"

    def disk(self) -> str:
        free = shutil.disk_usage(".").free
        if free < LEAST_DISK:
            raise ConfigError(
                f"{free / 2**30:.1f} GiB are free here, where outputs/ is made; checkpoints want more: free some, or set "
                "hydra.run.dir to another disk"
            )
        return f"{free / 2**30:.0f} GiB free here, where outputs/ is made"

    def shared_memory(self) -> str:
        from grpo.leftovers import SHARED_MEMORY

        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < LEAST_SHARED_MEMORY:
            raise ConfigError(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and Ray's objects and a push of the model go through it: "
                "give the container more (docker run --shm-size=8g)"
            )
        return f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}; a push takes as much of it as the weights"

    def ray(self) -> str:
        from grpo.cluster import start_ray
        from grpo.plan import make_plan

        model = str(self.folder)
        make_model(model)
        self.config = compose("grpo_arithmetic", [*(key.replace("MODEL", model) for key in SMALL), *self.typed])
        self.plan, start = make_plan(self.config), time.monotonic()
        start_ray(self.config.ray, sum(self.plan.roles.values()), self.closing)
        return f"up in {time.monotonic() - start:.0f} s"

    def models(self) -> str:
        from grpo.supervision import Supervisor
        from grpo_utils import start_models

        start, supervisor = time.monotonic(), Supervisor(self.config.ray)
        self.closing.enter_context(supervisor.watching())
        self.ranks, _, self.engines = start_models(self.config, self.plan, str(self.folder), supervisor)
        backend = self.config.inference_model.backend
        return (
            f"{backend} and {len(self.ranks)} training ranks on {self.plan.device}, up in {time.monotonic() - start:.0f} s"
        )

    def push(self) -> str:
        from grpo.pools import EnginePool, TrainerPool
        from grpo_utils import connect

        timeout_s = self.config.ray.timeout_s
        trainer = TrainerPool(self.ranks, 1, None, timeout_s)
        engines = EnginePool(self.engines, timeout_s)
        processes = self.config.inference_model.tensor_parallel_size
        push = connect(trainer, engines, self.plan.transport, processes, timeout_s)
        start = time.monotonic()
        push(1)
        seconds = time.monotonic() - start
        difference = push.probe(1, list(range(8)))
        return (
            f"over {self.plan.transport} in {seconds:.2f} s, each tensor held as it was sent; log-probs of a text differ by "
            f"{difference:.1g} nats"
        )


def read_pins(path: Path) -> Iterator[tuple[str, str]]:
    """(package, version) of each line `package==version`, those of files that it names included."""
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from read_pins(path.parent / line.removeprefix("-r ").strip())
        elif "==" in line:
            package, _, version = line.partition("==")
            yield package.split("[")[0].strip(), version.strip()


def make_model(path: str) -> None:
    """The built-in model as it is before its warm-up, which takes longer than all of this."""
    from transformers import Qwen2ForCausalLM
    from transformers.utils import logging

    from grpo.builtin import Recipe, make_config, make_tokenizer

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    Qwen2ForCausalLM(make_config(Recipe(), tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def examine(typed: list[str]) -> int:
    """Print a line a check; returns how many failed. What needs a part that is not there is left out."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        for name, check in Doctor(typed, Path(folder), closing).checks():
            try:
                print(f"ok     {name}: {check()}", flush=True)
            except Exception as error:  # whatever it is that does not work here is what is asked for
                failed += 1
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                print(f"FAILED {name}: {kind}{one_line(error)[:600]}", flush=True)
                if name in ("Ray", "engine and trainer"):
                    break
    return failed


def main() -> None:
    typed = sys.argv[1:]
    if {"-h", "--help"} & set(typed):
        print(__doc__)
        return
    compose("grpo_arithmetic", typed)  # so that a wrong key is said at once
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    failed = examine(typed)
    sys.exit(f"{failed} of the checks failed" if failed else 0)


if __name__ == "__main__":
    run_tool(main)
