"""vLLM as an engine: one LLMEngine in the actor's own process, stepped by the actor.

Weights come through vLLM's weight-transfer registry; `SharedMemoryTransfer` is registered there as `shared_memory` when
vLLM imports this module for `WorkerExtension`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from grpo.inference import EngineSpec, Request
from grpo.models import kv_cache_bytes, read_config
from grpo.rollout import Completions
from grpo.weight_sync import SharedMemoryReceiver

TRANSFER = "shared_memory"
MAX_BATCHED_TOKENS = 8192  # a step
CPU_BLOCK_SIZE = 32  # tokens; the smallest that vLLM has on a CPU, and short responses waste the least of it


@dataclass
class InitInfo(WeightTransferInitInfo):
    path: str
    num_bytes: int
    slots: list[dict]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    pass


def refresh_tied_lm_head(model: torch.nn.Module) -> None:
    """Repack the output layer from the embedding it shares.

    On a CPU vLLM keeps a prepacked copy of lm_head's weight. Layerwise reloading never visits a tied lm_head, because
    the checkpoint has no tensor of that name, so without this the old output layer stays in use and nothing says so.
    """
    lm_head = getattr(model, "lm_head", None)
    if hasattr(lm_head, "cpu_linear"):
        lm_head.quant_method.process_weights_after_loading(lm_head)


class SharedMemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's side of a push on one host."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.receiver = SharedMemoryReceiver(init_info.path, init_info.num_bytes, init_info.slots)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with torch.no_grad():
            self.model.load_weights(self.receiver.parameters())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_lm_head(self.model)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Mixed into every vLLM worker; naming it makes vLLM import this module there."""

    def reseed(self, seed: int) -> None:
        torch.manual_seed(seed)


if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, SharedMemoryTransfer)


def cpu_cache_bytes(spec: EngineSpec) -> int:
    """What `max_concurrent` responses of full length need in whole blocks, with one to spare each."""
    blocks = spec.max_concurrent * (math.ceil(spec.max_length / CPU_BLOCK_SIZE) + 1) + 1
    return kv_cache_bytes(read_config(spec.model), blocks * CPU_BLOCK_SIZE, 4)


class VLLMEngine:
    """`Engine` over vLLM's LLMEngine."""

    def __init__(self, spec: EngineSpec) -> None:
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
                distributed_executor_backend="uni",
                disable_log_stats=True,
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                **memory,
            )
        )
        self.policy_version = 0
        self.first_version: dict[int, int] = {}
        self.pushes: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def connect(self, description: dict) -> None:
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": description})

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
        return self.engine.has_unfinished_requests()

    def step(self) -> Completions | None:
        ids, outputs = [], []
        for result in self.engine.step():
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

    def update_weights(self, version: int) -> None:
        for call, arguments in (
            ("start_weight_update", {}),
            ("update_weights", {"update_info": {}}),
            ("finish_weight_update", {}),
        ):
            self.engine.collective_rpc(call, kwargs=arguments)
        self.engine.set_weight_version(str(version))
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
        self.engine.collective_rpc("reseed", args=(seed,))
