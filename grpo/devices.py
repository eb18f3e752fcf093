"""What a run's processes can be on: the device, and the cores of this machine."""

import os
import shutil

import torch

from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.nodes import Node


def cuda_build() -> str | None:
    """The CUDA that PyTorch, and vLLM with it, are built for; None of CPU builds."""
    return torch.version.cuda


def resolve_device(device: str, nodes: list[Node] | None = None) -> str:
    """`auto` becomes cuda where there is a GPU, else cpu; a device that none of `nodes` (this machine) has is an error.

    So is a GPU that PyTorch does not see, unless the device is cpu.
    """
    has_gpu = torch.cuda.is_available() if nodes is None else any(node.gpus for node in nodes)
    is_blind = shutil.which("nvidia-smi") and cuda_build() and not torch.cuda.is_available()
    if is_blind and not has_gpu and device in ("auto", "cuda"):
        raise ConfigError(
            f"device ({device}): PyTorch's CUDA {cuda_build()} sees no GPU: a newer driver is needed, or device=cpu, with "
            "inference_model.backend=transformers where responses are sampled"
        )
    available = {"cuda": has_gpu, "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise ConfigError(f"device ({device}) is not on this machine; use device=auto")
    return device


def engine_device(config: RunConfig, nodes: list[Node] | None = None) -> str:
    """`resolve_device` for what samples; ConfigError where its engine does not run on that device."""
    device = resolve_device(config.device, nodes)
    if device == "cpu" and config.inference_model.backend == "vllm" and cuda_build():  # which looks for a GPU by itself
        raise ConfigError("device (cpu) needs inference_model.backend=transformers: the vLLM here is the CUDA build")
    return device


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
