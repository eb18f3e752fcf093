"""Draw how optimal transport and token-wise KL see two phrasings of one answer, as a PNG.

    python -m grpo.transport_plot first="3+4=7;7*5=35<answer>35</answer>" second="7*5=35<answer>35</answer>" \\
        [prompt="What is (3 + 4) * 5?"] [model=builtin/arithmetic] [out=transport.png] [objective.ot_KEY=VALUE ...]

On the left the plan between the last hidden states of the two, as the ot penalty has it; beside it the KL divergence
between the distributions of the next token, which compares position with position whatever the words there are.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo import builtin
from grpo.chat import chat_tokens
from grpo.config_sections import ObjectiveConfig
from grpo.errors import ConfigError
from grpo.models import load_model, load_tokenizer
from grpo.objectives.transport import dense, sinkhorn
from grpo.scoring import last_states
from grpo.sources import BUILTIN
from grpo.tool import check_out, parse_arguments, run_tool

matplotlib.use("Agg")


@torch.no_grad()
def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, response: str
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """A response's tokens as texts, the states that each was predicted from [T, D], and log-probs there [T, V]."""
    if tokenizer.chat_template is None:
        start = tokenizer(f"{prompt}\n")["input_ids"]
    else:
        start = chat_tokens([{"role": "user", "content": prompt}], tokenizer)
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ConfigError("first and second must each have a token or more")
    with last_states(model) as its_states:
        logits = model(input_ids=torch.tensor([start + tokens]), logits_to_keep=len(tokens) + 1).logits
        states = its_states()[0]
    return [tokenizer.decode([token]) for token in tokens], states, logits[0, :-1].float().log_softmax(-1)


def transport_plan(x: torch.Tensor, y: torch.Tensor, objective: ObjectiveConfig) -> tuple[torch.Tensor, float]:
    """The plan [T1, T2] between states x [T1, D] and y [T2, D], and its cost."""
    window, lengths = objective.ot_window, (len(x), len(y))
    if window <= abs(len(x) - len(y)):
        raise ConfigError(
            f"objective.ot_window ({window}) must be above the difference of the two lengths ({abs(len(x) - len(y))}), "
            "or some token has none to meet"
        )
    width = max(lengths)
    states = [torch.nn.functional.pad(part, (0, 0, 0, width - len(part)))[None] for part in (x, y)]
    masks = [(torch.arange(width) < length)[None] for length in lengths]
    settings = {"window": window, "epsilon": objective.ot_epsilon, "iterations": objective.ot_iterations}
    plan, costs = sinkhorn(*states, *masks, **settings)
    return dense(plan[0], costs.window, lengths), float((plan * costs.values).sum())


def draw(first: tuple, second: tuple, objective: ObjectiveConfig, out: Path) -> None:
    """Write the picture of what `read` gave for the two phrasings."""
    (words, x, log_p), (others, y, log_q) = first, second
    plan, cost = transport_plan(x, y, objective)
    length = min(len(words), len(others))
    kl = (log_p[:length].exp() * (log_p[:length] - log_q[:length])).sum(-1)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(plan.numpy() * len(words), cmap="viridis", aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, ax=left, label="share of a row's mass")
    left.set(title=f"Transport plan, cost {cost:.3f}", xlabel="second phrasing", ylabel="first phrasing")
    left.set_xticks(range(len(others)), others, rotation=90, fontsize="small")
    left.set_yticks(range(len(words)), words, fontsize="small")
    right.barh(range(length), kl.numpy(), color="tab:red")
    right.set_yticks(range(length), [f"{a} | {b}" for a, b in zip(words, others, strict=False)], fontsize="small")
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    right.set(title=f"KL(first || second) by position, mean {float(kl.mean()):.2f} nats", xlabel="nats")
    figure.savefig(out, dpi=120)


def main() -> None:
    own = {"first": True, "second": True, "prompt": False, "model": False, "out": False}
    arguments, objective = parse_arguments(sys.argv[1:], own, ObjectiveConfig, "objective")
    out = Path(arguments.get("out", "transport.png"))
    check_out(out)
    path = builtin.resolve(arguments.get("model", BUILTIN), ".cache")
    model, tokenizer = load_model(path, torch.device("cpu")), load_tokenizer(path)
    prompt = arguments.get("prompt", "What is (3 + 4) * 5?")
    first, second = (read(model, tokenizer, prompt, arguments[name]) for name in ("first", "second"))
    draw(first, second, objective, out)
    print(f"written to {out}")


if __name__ == "__main__":
    run_tool(main)
