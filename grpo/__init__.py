"""Group Relative Policy Optimisation for language models with verifiable rewards.

What PUBLIC names is the Python interface (docs/python.md). Each is imported when it is asked for, so that `import grpo`
takes no time.

    the algorithm   run_sync, run_async (on run, session); collect (collector, background); replay, admission;
                    rollout: what a batch holds; micro_batches: how it is split
    mathematics     advantages, objectives/, intervals, adamw_8bit
    text to score   tasks/ (stated_numbers is of GSM8K, instructions of IFEval), rewards, shapes, grading;
                    chat: text to tokens
    models          models, scoring, shared_prompts, adapters, four_bit, builtin
    actors          trainer (trainer_state), reference, inference (engine_vllm, vllm_worker, engine_transformers);
                    pools: the driver's side of them
    weight pushes   push, weight_sync, transports; colocate
    Ray             cluster, nodes, remote, leftovers, supervision, preemption
    configuration   config, config_sections, rules, errors, sources, launch, resume, sweep
    what it needs   plan: devices, memory, placement, throughput
    run directory   checkpoint, metrics, account
    offline         offline, offline_config, offline_plan, offline_run, offline_trainer, scored
    tools           doctor, evaluate (measure, comparison, standalone), generate, grade, export, plot, view (viewer/),
                    transport_plot; on tool
    Python          interface
"""

import importlib
from typing import Any

PUBLIC = {
    "compose": "grpo.launch",
    "build": "grpo.interface",
    "train": "grpo.interface",
    "resume_run": "grpo.interface",
    "compare": "grpo.interface",
    "UserError": "grpo.errors",
    "Preempted": "grpo.preemption",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
