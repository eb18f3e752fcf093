"""vLLM as an engine: one LLMEngine in the actor's own process, stepped by the actor.

Weights come through vLLM's weight-transfer registry, see grpo/vllm_worker.py.
"""

import math
import multiprocessing.connection
import os
import sys
from multiprocessing.process import BaseProcess
from threading import Thread

import numpy as np
import psutil
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from grpo.errors import PushError, one_line
from grpo.inference import EngineSpec, Request
from grpo.leftovers import claim_segments
from grpo.models import kv_cache_bytes, read_config
from grpo.rollout import Completions
from grpo.vllm_worker import TRANSFER, WorkerExtension, combine
from grpo.weight_sync import Receipt

MAX_BATCHED_TOKENS = 8192  # a step
PROBE = "probe"  # a request id that no caller's integer can be
CPU_BLOCK_SIZE = 32  # tokens; the smallest that vLLM has on a CPU, and short responses waste the least of it


def cpu_cache_bytes(spec: EngineSpec) -> int:
    """What a process needs for `max_concurrent` responses of full length, in whole blocks, with one to spare each."""
    blocks = spec.max_concurrent * (math.ceil(spec.max_length / CPU_BLOCK_SIZE) + 1) + 1
    return kv_cache_bytes(read_config(spec.model), blocks * CPU_BLOCK_SIZE, 4) // spec.tensor_parallel_size


def end_with(processes: list[BaseProcess]) -> None:
    """Wait until one of `processes` has died, and end the others and this one, which could answer no call any more.

    vLLM's own failure callback comes once the others have had 10 s to end by themselves, in which every call fails.
    """
    multiprocessing.connection.wait([process.sentinel for process in processes])
    print("One of the engine's processes has died; it ends with it", file=sys.stderr, flush=True)
    for process in processes:
        process.kill()
    os._exit(1)


class VLLMEngine:
    """`Engine` over vLLM's LLMEngine."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        on_cpu = spec.device == "cpu"
        memory = (
            {"kv_cache_memory_bytes": cpu_cache_bytes(spec), "block_size": CPU_BLOCK_SIZE}
            if on_cpu
            else {"gpu_memory_utilization": spec.gpu_memory_utilization}
        )
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=spec.model,
                dtype=spec.dtype,
                seed=spec.seed,
                max_model_len=spec.max_length,
                max_num_seqs=spec.max_concurrent,
                max_num_batched_tokens=max(MAX_BATCHED_TOKENS, spec.max_concurrent, spec.max_length),
                enforce_eager=spec.enforce_eager,
                async_scheduling=False,  # a step that is still in flight would straddle a push
                # Log-probs are those of the distribution that is sampled from; with top_p it is the whole one.
                logprobs_mode="processed_logprobs" if spec.top_p == 1 else "raw_logprobs",
                tensor_parallel_size=spec.tensor_parallel_size,
                distributed_executor_backend="uni" if spec.tensor_parallel_size == 1 else "mp",
                disable_log_stats=True,
                enable_sleep_mode=spec.sleeps,
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                **memory,
            )
        )
        if spec.tensor_parallel_size > 1:  # its processes share memory under names of their own, and leave it when killed
            claim_segments([os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))])
            workers = [worker.proc for worker in self.engine.engine_core.engine_core.model_executor.workers]
            Thread(target=end_with, args=(workers,), name="end_with", daemon=True).start()
        self.dtype = str(self.engine.model_config.dtype).removeprefix("torch.")
        self.policy_version = 0
        self.ahead: list[Completions] = []  # finished while a probe was answered
        self.first_version: dict[int, int] = {}
        self.pushes: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def connect(self, description: dict, engine: str, first_index: int, aliases: list[str]) -> list[str]:
        init_info = {"description": description, "engine": engine, "first_index": first_index}
        self._workers("init_weight_transfer_engine", kwargs={"init_info": init_info})
        self.aliases = aliases
        _, projections = combine([telling for _, telling in self._workers("held", args=(aliases,))])
        return list(projections)

    def _workers(self, method: str, args: tuple = (), kwargs: dict | None = None) -> list:
        """Call a method of every worker."""
        try:
            return self.engine.collective_rpc(method, args=args, kwargs=kwargs)
        except RuntimeError as error:
            if self.spec.tensor_parallel_size == 1:
                raise
            # Of an error in a process of its own, vLLM brings the text alone.
            raise PushError(one_line(error)) from None

    def add(self, request: Request) -> None:
        sampling = request.sampling
        self.first_version[request.request_id] = self.policy_version
        self.engine.add_request(
            str(request.request_id),
            {"prompt_token_ids": request.prompt},
            SamplingParams(
                n=sampling.num_responses,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )

    def has_work(self) -> bool:
        return self.engine.has_unfinished_requests() or bool(self.ahead)

    def has_room(self) -> bool:
        scheduler = self.engine.engine_core.engine_core.scheduler
        return len(scheduler.waiting) + len(scheduler.running) < self.spec.max_concurrent

    def step(self) -> Completions | None:
        if self.ahead:
            return self.ahead.pop(0)
        return self._completions(self.engine.step())

    def _completions(self, results: list[RequestOutput]) -> Completions | None:
        ids, outputs = [], []
        for result in results:
            ids += [int(result.request_id)] * len(result.outputs)
            outputs += result.outputs
        if not outputs:
            return None
        length = np.array([len(output.token_ids) for output in outputs])
        versions = [self._versions(i, output.index, n) for i, output, n in zip(ids, outputs, length, strict=True)]
        for request_id in set(ids):
            del self.first_version[request_id]
        return Completions(
            request_id=np.array(ids),
            length=length,
            stopped=np.array([output.finish_reason == "stop" for output in outputs]),
            tokens=np.concatenate([output.token_ids for output in outputs]),
            log_probs=np.concatenate([output.logprobs.logprobs for output in outputs]).astype(np.float32),
            versions=np.concatenate(versions),
        )

    def _versions(self, request_id: int, index: int, length: int) -> np.ndarray:
        """policy_version of each token of one response, from the pushes that it lived through."""
        versions = np.full(length, self.first_version[request_id], dtype=np.int32)
        for sampled_before, version in self.pushes.pop((request_id, index), ()):
            versions[sampled_before:] = version
        return versions

    def log_probs(self, tokens: list[int]) -> np.ndarray:
        self.engine.add_request(
            PROBE,
            {"prompt_token_ids": tokens},
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
        )
        while True:
            results = self.engine.step()
            probes = [result for result in results if result.request_id == PROBE and result.finished]
            others = [result for result in results if result.request_id != PROBE]
            if (completions := self._completions(others)) is not None:
                self.ahead.append(completions)
            if probes:
                found = zip(tokens[1:], probes[0].prompt_logprobs[1:], strict=True)
                return np.array([position[token].logprob for token, position in found])

    def update_weights(self, version: int) -> Receipt:
        asleep = self.engine.is_sleeping()
        if asleep:
            self.engine.wake_up(tags=["weights"])
        for call, arguments in (
            ("start_weight_update", {}),
            ("update_weights", {"update_info": {"version": version}}),
            ("finish_weight_update", {}),
        ):
            self._workers(call, kwargs=arguments)
        self.engine.set_weight_version(str(version))
        self._adopt(version)
        workers = self._workers("held", args=(self.aliases,))
        arrived, tellings = zip(*workers, strict=True)
        if asleep:  # last, when what the push needed besides is free again
            self.engine.wake_up(tags=["kv_cache"])
        return Receipt(self.policy_version, list(arrived), *combine(list(tellings)))

    def _adopt(self, version: int) -> None:
        """What is sampled from now on belongs to `version`, in running requests too."""
        running = self.engine.engine_core.engine_core.scheduler.requests
        for internal_id, request in running.items():
            state = self.engine.output_processor.request_states[internal_id]
            parent = state.parent_req or state
            key = (int(parent.external_req_id), state.request_index)
            self.pushes.setdefault(key, []).append((request.num_output_tokens, version))
        self.policy_version = version
        # Keys and values computed under the old weights are stale, those of running requests too.
        self.engine.reset_prefix_cache(reset_running_requests=True)

    def reseed(self, seed: int) -> None:
        self.engine.reset_prefix_cache()  # what is cached changes the shapes computed, and so the last bits
        self._workers("reseed", args=(seed,))

    def sleep(self) -> None:
        if not self.engine.is_sleeping():
            self.engine.sleep(level=2)  # which keeps no copy: the next push has all weights
