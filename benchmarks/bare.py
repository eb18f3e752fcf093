"""The bare parts of a GRPO step, each in a process of its own: what is left when the pipeline is taken away.

Raw vLLM that generates; plain PyTorch that scores under the reference, trains and copies the parameters. No Ray, no
FSDP, no TensorDict, no metrics, no logs. Both get the pipeline's own prompts and tokens and the settings of its
processes.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

# What decides how a process computes; the rest of an actor's environment is Ray's.
COMPUTING = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCH", "VLLM_", "LD_PRELOAD", "MALLOC_")


@dataclass(frozen=True)
class TrainSettings:
    """The numbers that the plain training loop needs."""

    model: str
    attn_implementation: str
    matmul_precision: str
    uses_reference: bool
    num_micro_batches: int
    temperature: float
    clip_low: float
    clip_high: float
    kl_to_ref_coeff: float
    lr: float
    betas: tuple[float, float]
    clip_grad_norm: float


class Part:
    """A process that runs `serve(connection, *arguments)` under the variables `environment`; ask it with `ask`."""

    def __init__(self, serve: Callable, environment: dict[str, str], *arguments) -> None:
        kept = dict(os.environ)
        others = {name: value for name, value in kept.items() if not name.startswith(COMPUTING)}
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        os.environ.clear()
        os.environ.update(others | environment)
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(kept)
        theirs.close()

    def ask(self, question):
        self.connection.send(question)
        return self.connection.recv()  # EOFError where the process died

    def close(self) -> None:
        self.connection.close()  # ends the process's loop
        self.process.join(30)
        self.process.kill()


def _questions(connection: Connection):
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def serve_generation(connection: Connection, spec) -> None:
    """Answer each {"prompts", "group_size", "max_tokens", "temperature"} with {"seconds", "tokens"}.

    The LLMEngine is made by the pipeline's own class, so that its settings are the same; then only vLLM is called.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from grpo.inference import make_engine

    engine = make_engine(spec).engine
    for question in _questions(connection):
        parameters = SamplingParams(
            n=question["group_size"],
            max_tokens=question["max_tokens"],
            temperature=question["temperature"],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        start = time.perf_counter()
        outputs = []
        for i, prompt in enumerate(question["prompts"]):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            outputs += engine.step()
        seconds = time.perf_counter() - start
        tokens = sum(len(response.token_ids) for output in outputs for response in output.outputs)
        connection.send({"seconds": seconds, "tokens": tokens})


def serve_training(connection: Connection, settings: TrainSettings) -> None:
    """Answer each batch of arrays (see grpo/rollout.py) with seconds a part, the gradient norm and what was scored."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(settings.matmul_precision)

    def load():
        options = {"dtype": torch.float32, "attn_implementation": settings.attn_implementation}
        return AutoModelForCausalLM.from_pretrained(settings.model, **options).eval()

    model = load()
    reference = load().requires_grad_(False) if settings.uses_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, betas=settings.betas)
    pushed = [torch.empty_like(parameter) for parameter in model.parameters()]

    def micro_batches(batch: dict) -> list[dict]:
        """Equal parts of rows of similar length, each cut to its longest row."""
        length = batch["prompt_length"] + batch["response_length"]
        parts = []
        for rows in length.argsort(descending=True).chunk(settings.num_micro_batches):
            width = int(length[rows].max())
            parts.append({k: v[rows, :width] if v.ndim == 2 else v[rows] for k, v in batch.items()} | {"rows": rows})
        return parts

    def log_probs(which, part: dict) -> tuple["torch.Tensor", int]:
        """Log-probs of the tokens from position `first` on, the shortest prompt's end."""
        first = int(part["prompt_length"].min())
        targets = part["tokens"][:, first:]
        logits = which(input_ids=part["tokens"], logits_to_keep=targets.shape[1] + 1, use_cache=False).logits[:, :-1]
        logits = logits / settings.temperature if settings.temperature != 1 else logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -losses.view_as(targets), first

    for arrays in _questions(connection):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        scored = torch.zeros(batch["tokens"].shape)
        times = [time.perf_counter()]

        if reference is not None:
            with torch.inference_mode():
                for part in micro_batches(batch):
                    values, first = log_probs(reference, part)
                    width = part["tokens"].shape[1]
                    scored[part["rows"], first:width] = values.where(part["response_mask"][:, first:], 0.0)
        times.append(time.perf_counter())

        for part in micro_batches(batch):
            current, first = log_probs(model, part)
            mask = part["response_mask"][:, first:]
            ratio = (current - part["inference_log_probs"][:, first:]).where(mask, 0.0).exp()
            advantage = part["advantage"][:, None]
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
            if reference is not None:
                delta = (part["reference_log_probs"][:, first:] - current).where(mask, 0.0)
                token_loss = token_loss + settings.kl_to_ref_coeff * (delta.exp() - 1 - delta)
            loss = ((token_loss * mask).sum(1) / mask.sum(1)).sum() / len(batch["tokens"])
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())

        with torch.no_grad():
            for target, parameter in zip(pushed, model.parameters(), strict=True):
                target.copy_(parameter)
        times.append(time.perf_counter())
        seconds = dict(zip(("reference", "train", "push"), np.diff(times).tolist(), strict=True))
        connection.send({"seconds": seconds, "grad_norm": float(norm), "reference_log_probs": scored.numpy()})
