"""transformers as an engine, for machines that vLLM does not support. Slower; one step is one whole batch."""

from collections import deque

import numpy as np
import torch
from transformers import GenerationConfig

from grpo.colocate import give_memory_back
from grpo.inference import EngineSpec, Request
from grpo.models import load_model, load_tokenizer
from grpo.rollout import Completions, length_mask
from grpo.scoring import score, score_text
from grpo.transports import make_receiver
from grpo.weight_sync import Receipt, checksum


class TransformersEngine:
    """`Engine` over `model.generate`: requests are answered in order, as many at a time as `max_concurrent` allows."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.device = torch.device(spec.device)
        self.model = load_model(spec.model, self.device)
        own = self.model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else load_tokenizer(spec.model).eos_token_id
        self.ends = torch.tensor(ends).reshape(-1)
        # `generate` fills what a call leaves open from the model's own settings, such as a repetition penalty; what is
        # sampled then would not be the policy.
        self.model.generation_config = GenerationConfig()
        self.parameters = dict(self.model.named_parameters())
        self.queue: deque[Request] = deque()
        self.policy_version = 0
        self.dtype = "float32"

    def connect(self, description: dict, engine: str, first_index: int, aliases: list[str]) -> list[str]:
        self.receiver = make_receiver(description, engine, first_index, self.device)
        self.names = [slot.name for slot in self.receiver.slots] + aliases
        return []

    def add(self, request: Request) -> None:
        self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue)

    def has_room(self) -> bool:
        return sum(request.sampling.num_responses for request in self.queue) < self.spec.max_concurrent

    @torch.no_grad()
    def step(self) -> Completions | None:
        sampling, requests, room = self.queue[0].sampling, [], self.spec.max_concurrent
        while self.queue and self.queue[0].sampling == sampling and (not requests or room >= sampling.num_responses):
            requests.append(self.queue.popleft())
            room -= sampling.num_responses
        rows = [request.prompt for request in requests for _ in range(sampling.num_responses)]
        width = max(len(row) for row in rows)
        prompts = torch.zeros(len(rows), width, dtype=torch.int64)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):  # generate needs its padding on the left
            prompts[i, width - len(row) :] = torch.tensor(row)
            attention[i, width - len(row) :] = 1
        greedy = sampling.temperature == 0
        settings = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            eos_token_id=self.ends.tolist(),
            pad_token_id=int(self.ends[0]),
            use_cache=True,
        )
        output = self.model.generate(
            prompts.to(self.device), attention_mask=attention.to(self.device), generation_config=settings
        )[:, width:]
        return self._completions(requests, rows, output.cpu(), sampling.temperature or 1.0)

    def _completions(
        self, requests: list[Request], rows: list[list[int]], output: torch.Tensor, temperature: float
    ) -> Completions:
        ended = torch.isin(output, self.ends)
        stopped = ended.any(1)
        length = torch.where(stopped, ended.int().argmax(1) + 1, output.shape[1])
        prompt_length = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int((prompt_length + length).max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        mask = length_mask(prompt_length, length, tokens.shape[1])
        response_mask = length_mask(torch.zeros_like(length), length, output.shape[1])
        tokens[mask] = output[response_mask]
        log_probs = score(
            self.model,
            tokens.to(self.device),
            prompt_length.to(self.device),
            mask.to(self.device),
            temperature,
        ).cpu()
        return Completions(
            request_id=np.repeat([r.request_id for r in requests], requests[0].sampling.num_responses),
            length=length.numpy(),
            stopped=stopped.numpy(),
            tokens=output[response_mask].numpy(),
            log_probs=log_probs[mask].numpy(),
            versions=np.full(int(length.sum()), self.policy_version, dtype=np.int32),
        )

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> np.ndarray:
        return score_text(self.model, tokens, self.device)

    @torch.no_grad()
    def update_weights(self, version: int) -> Receipt:
        for name, tensor in self.receiver.receive(version):
            parameter = self.parameters[name]
            if parameter.shape != tensor.shape:  # it sleeps
                parameter.data = torch.empty_like(tensor, dtype=parameter.dtype, device=self.device)
            parameter.copy_(tensor)
        self.policy_version = version
        held = dict(self.model.named_parameters(remove_duplicate=False))  # tied ones under each of their names
        return Receipt(version, [self.receiver.arrived], {name: checksum(held[name]) for name in self.names}, {})

    def reseed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def sleep(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.new_empty(0)
        give_memory_back()
