"""What does comparing hidden states cost, beside comparing log-probs? The ot penalty against k3, forward and backward.

    python -m benchmarks.transport      # writes benchmarks/results/transport.json

One response of T tokens at a time, in turns: the transport penalty of its states [T, 2048] with the ot preset's settings,
and the k3 penalty of its log-probs [T]. Beside them the pass over the output layer that both need, [T, 2048] times
[2048, 16384] with its log-probs, which is what either is a part of.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.report import save, spread, table
from grpo.launch import compose
from grpo.models import _LogProbsAndEntropy
from grpo.objectives.divergences import k3, token_penalty, transport_penalty

HIDDEN, VOCABULARY = 2048, 16_384
LENGTHS = (256, 1024, 4096)
WARM_UP, REPEATS = 2, 9


def seconds(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work().backward()
    return time.perf_counter() - start


def kept_bytes(work: Callable[[], torch.Tensor], own: list[torch.Tensor]) -> int:
    """Bytes that `work` keeps for the backward pass, besides its inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in inputs)


def measure(length: int, settings: dict) -> dict:
    """The three parts at one length, in turns."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    anchor = torch.nn.functional.normalize(normal(1, length, HIDDEN), dim=-1)
    states = (anchor + 0.01 * normal(1, length, HIDDEN)).requires_grad_()
    log_probs, reference = normal(1, length).requires_grad_(), normal(1, length)
    mask, head = torch.ones(1, length, dtype=torch.bool), normal(VOCABULARY, HIDDEN).requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
    half = anchor.half()

    def transport() -> torch.Tensor:
        return transport_penalty(states, half, mask, **settings)["penalty"].sum()

    def token() -> torch.Tensor:
        return token_penalty(log_probs, reference, mask, estimate=k3)["penalty"].mean()

    def output() -> torch.Tensor:
        return _LogProbsAndEntropy.apply(states[0] @ head.T, tokens, 1.0)[0].mean()

    parts = {"ot": transport, "k3": token, "output_layer": output}
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(WARM_UP + REPEATS):
        for name, work in parts.items():
            taken[name].append(seconds(work))
    found = {f"{name}_s": spread(values[WARM_UP:]) for name, values in taken.items()}
    ot_s, k3_s, output_s = (found[f"{name}_s"]["median"] for name in parts)
    return found | {
        "ot_over_k3": round(ot_s / k3_s, 2),
        "ot_over_output_layer": round(ot_s / output_s, 4),
        "ot_kept_bytes": kept_bytes(transport, [states, anchor, half]),
    }


def main() -> None:
    torch.set_num_threads(1)  # so that other work on the machine shows less
    config = compose("grpo_arithmetic", ["objective=ot"])
    names = ("target", "window", "epsilon", "iterations")
    settings = {name: getattr(config.objective, f"ot_{name}") for name in names} | {"target": 0.0}  # so that it is charged
    results = {str(length): measure(length, settings) for length in LENGTHS}
    save("transport", config, {"hidden_size": HIDDEN, "vocabulary": VOCABULARY, "tokens": results})
    table(
        ["tokens", "ot s", "k3 s", "ot / k3", "output layer s", "ot / output layer", "kept MB"],
        [
            [
                length,
                r["ot_s"]["median"],
                r["k3_s"]["median"],
                r["ot_over_k3"],
                r["output_layer_s"]["median"],
                r["ot_over_output_layer"],
                r["ot_kept_bytes"] / 1e6,
            ]
            for length, r in results.items()
        ],
    )


if __name__ == "__main__":
    main()
