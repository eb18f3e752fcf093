"""Writes what of docs/ is made from the code: every configuration key, and what fits which GPU (make docs).

A key's meaning is the comment on its line in the dataclass, or above it. The memory figures are the estimates of
grpo/memory.py for architectures that are written down here, so nothing is downloaded.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import typing
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from grpo.config import RENAMED, RunConfig
from grpo.config_sections import LoraConfig
from grpo.launch import CONFIG_DIR
from grpo.memory import gpu_trainer_bytes, trainer_bytes
from grpo.models import kv_cache_bytes, num_adapter_parameters, num_parameters
from grpo.offline_config import OfflineConfig
from grpo.resume import MAY_CHANGE

DOCS = Path(__file__).resolve().parent
GIB = 2**30
CARDS = (24, 80)  # GiB
ROOM = 0.8  # share of a card that weights and states may take, the rest is for activations


class Key(NamedTuple):
    """A key that a user can type."""

    name: str
    type: str
    default: str
    meaning: str


def meanings(cls: type) -> dict[str, str]:
    """The comments of a dataclass's fields, inherited ones too, by the fields' names; "" where there is none."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}

        def alone(line: int, comments: dict[int, tokenize.TokenInfo] = comments) -> bool:
            return line in comments and comments[line].line.lstrip().startswith("#")

        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                above = list(takewhile(alone, count(node.lineno - 1, -1)))[::-1]
                lines = above + [line for line in range(node.lineno, node.end_lineno + 1) if line in comments]
                found[node.target.id] = " ".join(comments[line].string.lstrip("# ") for line in lines)
    return found


def keys(cls: type, prefix: str = "") -> list[Key]:
    """The keys of one section, without those of the sections in it."""
    said = meanings(cls)
    return [
        Key(prefix + item.name, type_name(item.type), value(default(item)), said[item.name])
        for item in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(item.type)
    ]


def sections(cls: type, prefix: str = "") -> list[tuple[str, type]]:
    """The section of `cls` itself, and those in it, each with the prefix of its keys."""
    found = [(prefix, cls)]
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            found += sections(item.type, f"{prefix}{item.name}.")
    return found


def default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def type_name(annotation: Any) -> str:
    if typing.get_args(annotation):
        return str(annotation).replace(" | ", " or ").replace("None", "null")
    return annotation.__name__.lower()


def value(of: Any) -> str:
    """As it is typed on the command line."""
    if of is None or isinstance(of, bool):
        return {None: "null", True: "true", False: "false"}[of]
    return f"[{', '.join(map(str, of))}]" if isinstance(of, tuple) else str(of)


def first_comment(path: Path) -> str:
    """The comment that a YAML file of config/ begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in lines if "@package" not in line)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str) -> str:
    """Plain text for a table's cell: nothing in it is Markdown."""
    return re.sub(r"([|<*])", r"\\\1", text)


def key_table(found: list[Key]) -> str:
    rows = [[f"`{key.name}`", key.type, f"`{key.default}`", prose(key.meaning)] for key in found]
    return table(["key", "type", "default", "meaning"], rows)


def sentence(cls: type) -> str:
    return prose(inspect.getdoc(cls).split("\n\n")[0].replace("\n", " "))


def configuration() -> str:
    """The page docs/configuration.md."""
    parts = [
        "# Configuration keys",
        "Made by `make docs` from the dataclasses in [grpo/config.py](../grpo/config.py), "
        "[grpo/config_sections.py](../grpo/config_sections.py) and "
        "[grpo/offline_config.py](../grpo/offline_config.py); a key is typed as `KEY=VALUE` behind a script. A key that is "
        "not here is refused with the nearest one that is, and a value that cannot work with the rule it breaks, before "
        "anything starts. `--cfg job` prints what a command composes, `dry_run=true` what it would use.",
        "Defaults below are those of the dataclasses. The configuration files set others:",
        table(
            ["`--config-name`", "what it is"],
            [
                [f"[{path.stem}](../config/{path.name})", prose(first_comment(path))]
                for path in sorted(CONFIG_DIR.glob("*.yaml"))
            ],
        ),
        table(
            ["`model=`", "what it is"],
            [
                [f"[{path.stem}](../config/model/{path.name})", prose(first_comment(path))]
                for path in sorted((CONFIG_DIR / "model").glob("*.yaml"))
            ],
        ),
        "`objective=` picks one of the presets in [objectives.md](objectives.md). What is typed counts over a preset, and a "
        "preset over the configuration file.",
        "# Online runs: grpo_sync.py, grpo_async.py",
    ]
    online = {}
    for prefix, cls in sections(RunConfig):
        found = keys(cls, prefix)
        online |= {key.name: key for key in found}
        parts += [f"## {prefix.removesuffix('.') or 'The run'}", sentence(cls), key_table(found)]
    offline = [(prefix, cls, keys(cls, prefix)) for prefix, cls in sections(OfflineConfig)]
    alike = [f"`{key.name}`" for _, _, found in offline for key in found if online.get(key.name) == key]
    parts += ["# Offline runs: grpo_offline.py", f"These keys are as in online runs: {', '.join(alike)}."]
    for prefix, cls, found in offline:
        own = [key for key in found if online.get(key.name) != key]
        if own:
            parts += [f"## {prefix.removesuffix('.') or 'The run'}, offline", sentence(cls), key_table(own)]
    parts += [
        "# At a resume",
        "These keys, and all keys of a section that is named, may be others at a resume; any other makes another run of it "
        "and is refused (see [failures.md](failures.md)):",
        ", ".join(f"`{key}`" for key in MAY_CHANGE) + ".",
        "# Keys of other documents",
        "Where a key of another implementation is typed, the answer names ours:",
        table(["theirs", "here"], [[f"`{theirs}`", f"`{here}`"] for theirs, here in RENAMED.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int, vocabulary: int, tied: bool
) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


# As the models' own config.json have them.
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "Qwen2.5-0.5B": qwen2(896, 24, 14, 2, 4864, 151936, True),
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": qwen2(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": qwen2(3584, 28, 28, 4, 18944, 152064, False),
}
SETTINGS = {  # of the trainer: adapters, optimizer.name
    "all weights, adamw": (False, "adamw"),
    "all weights, adamw_8bit": (False, "adamw_8bit"),
    "LoRA, adamw": (True, "adamw"),
}


def least(needed: typing.Callable[[int], float], card: int) -> str:
    """The smallest number of 1, 2, 4, 8 and 16 with which `needed` bytes fit into ROOM of a card of `card` GiB."""
    return next((str(n) for n in (1, 2, 4, 8, 16) if needed(n) <= ROOM * card * GIB), "none")


def memory() -> str:
    """The tables of docs/memory.md."""
    trainers, others = [], []
    for name, model in ARCHITECTURES.items():
        parameters = num_parameters(model)
        for setting, (adapters, optimizer) in SETTINGS.items():
            trained = num_adapter_parameters(model, LoraConfig(enabled=True)) if adapters else parameters

            def rank(ranks: int, sizes: tuple = (parameters, 0, trained, adapters, optimizer)) -> int:
                return gpu_trainer_bytes(trainer_bytes(*sizes, ranks), sizes[0], 0, sizes[-1])

            each = [f"{rank(n) / GIB:.1f}" for n in (1, 4)]
            trainers.append([name, setting, *each, *(least(rank, card) for card in CARDS)])

        def engine(parts: int, weights: int = 2 * parameters) -> float:
            return 2 * weights / parts  # as much again for the cache

        cache = kv_cache_bytes(model, 1000, 2)
        sizes = [f"{2 * parameters / GIB:.1f}", f"{cache / 2**20:.0f}", *(least(engine, card) for card in CARDS)]
        others.append([name, f"{parameters / 1e9:.2f}", *sizes])
    cards = [f"least on {card} GB" for card in CARDS]
    return "\n\n".join(
        [
            "A training rank, GiB on its GPU (weights, gradients and optimiser states in float32, in shards), and "
            "how many `train_model.num_devices` it takes at least:",
            table(["model", "trained", "1 rank", "each of 4", *cards], trainers),
            "A reference, or an engine's weights, GiB in bfloat16; an engine's cache, MiB for 1,000 tokens; and how many "
            "GPUs an engine takes at least (`inference_model.tensor_parallel_size`) to have as much room for its cache as "
            "for its weights:",
            table(["model", "billion parameters", "weights", "cache", *cards], others),
        ]
    )


BEGIN, END = "<!-- made by make docs -->", "<!-- until here -->"


def with_tables(page: str) -> str:
    """docs/memory.md with its tables made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{memory()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration())
    page = DOCS / "memory.md"
    page.write_text(with_tables(page.read_text()))
