"""Write one HTML file in which a run's rollouts are looked at, group by group, in any browser and without a network.

    python -m grpo.view [run=outputs/DATE/TIME] [out=FILE.html] [rollouts=10000]

run        the newest run under outputs/ by default; one that still goes on will do
out        rollouts.html in the run's directory by default
rollouts   responses in the page, about: of a longer run groups evenly spaced are taken, always whole

With logging.rollout_tokens=true the run kept what belongs to its tokens, and the page colours them. What the page does
with its data is grpo/viewer/script.js. Texts and tokens lie in it as a chunk a step, gzip in base64, unpacked when they
are looked at, so that it opens at once whatever its size; nothing in them can end the element that holds them.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from grpo.config import RunConfig
from grpo.errors import DataError, one_line
from grpo.resume import read_config, write_whole
from grpo.rewards import NO_VERDICT, OUTCOMES
from grpo.tool import check_out, find_run, run_tool, split_arguments, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLLOUTS = 10_000
VIEWER = Path(__file__).parent / "viewer"
DIGITS = 4  # of log-probs in the page, in nats
PERCENTILE = 0.99  # of |log-prob difference|, where its scale ends,
LEAST_SCALE = 0.01  # nats, but not before: what is smaller is arithmetic
SHOWN = ("response", "reward", "terms", "outcome", "note", "parsed", "advantage", "policy_version")


@dataclass
class Step:
    """What there is of a step in rollouts.jsonl, whether the page has it or not."""

    outcomes: Counter = field(default_factory=Counter)
    rewards: float = 0.0  # the sum of those with a verdict

    def row(self, step: int) -> dict:
        count = self.outcomes.total()
        judged = count - sum(self.outcomes[outcome] for outcome in NO_VERDICT)
        reward = self.rewards / judged if judged else None
        return {"step": step, "count": count, "reward": reward, "outcomes": dict(self.outcomes)}


@dataclass
class Group:
    """Where a group's lines are in the file, in bytes."""

    step: int
    group_id: int
    start: int
    end: int = 0
    size: int = 0


def scan(path: Path) -> tuple[dict[int, Step], list[Group]]:
    """The steps and groups of rollouts.jsonl, in the file's order; what a run is just writing is left out."""
    steps: dict[int, Step] = defaultdict(Step)
    groups: list[Group] = []
    with open(path, "rb") as lines:
        start = 0
        for i, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                step, group_id = int(row["step"]), int(row["group_id"])
                if row["outcome"] not in OUTCOMES:
                    raise ValueError(f"there is no outcome {row['outcome']}")
                steps[step].outcomes[row["outcome"]] += 1
                steps[step].rewards += row["reward"] * (row["outcome"] not in NO_VERDICT)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{i} is no line of a run's rollouts: {one_line(error)}") from None
            if not groups or (groups[-1].step, groups[-1].group_id) != (step, group_id):
                groups.append(Group(step, group_id, start))
            start += len(line)
            groups[-1].end = start
            groups[-1].size += 1
    if not groups:
        raise DataError(f"{path} has no rollouts yet: wait for the run's first step")
    return steps, groups


def evenly(groups: list[Group], limit: int) -> list[Group]:
    """All the groups, or as many evenly spaced ones as have about `limit` rollouts together: the last one at least."""
    size = min(len(groups), max(1, len(groups) * limit // sum(group.size for group in groups)))
    return [groups[(i + 1) * len(groups) // size - 1] for i in range(size)]


def pieces(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token; of tokens that make a character together the last one has it, and the others are empty."""
    texts, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = decode(waiting)
        whole = not text.endswith("\ufffd")
        texts.append(text if whole else "")
        if whole:
            waiting = []
    if waiting:
        texts[-1] = decode(waiting)
    return texts


def decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    """What decodes a few tokens as they stand within a text, special ones too."""
    cache: dict[tuple[int, ...], str] = {}

    def decode(ids: list[int]) -> str:
        key = tuple(ids)
        if key not in cache:
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            # Tokenizers after SentencePiece drop the space that a text begins with.
            begins = tokenizer.convert_ids_to_tokens(ids[0]) or ""
            cache[key] = f" {text}" if begins.startswith("▁") and not text.startswith(" ") else text
        return cache[key]

    return decode


def chunk(value: Any) -> str:
    """JSON as the page unpacks it, in ASCII: half of a character, which a text may have, is none in UTF-8."""
    packed = gzip.compress(json.dumps(value, separators=(",", ":")).encode(), 6, mtime=0)
    return base64.b64encode(packed).decode()


def _rounded(values: list[float]) -> list[float | None]:
    """For JSON, which has no infinity: None instead. What rounds to nothing is 0, which packs better than -0.0."""
    return [round(value, DIGITS) or 0 if math.isfinite(value) else None for value in values]


def step_tokens(groups: list[list[dict]], decode: Callable[[list[int]], str]) -> dict:
    """{"words": texts, "groups": for each group and response its tokens}, as columns:

    words, indices of their texts; log_prob, when sampled; difference, of that when trained on; version, of the policy.
    """
    words: dict[str, int] = {}

    def columns(row: dict) -> dict:
        texts, sampled = pieces(row["tokens"], decode), row["inference_log_probs"]
        return {
            "words": [words.setdefault(text, len(words)) for text in texts],
            "log_prob": _rounded(sampled),
            "difference": _rounded([now - then for now, then in zip(row["log_probs"], sampled, strict=True)]),
            "version": row["token_versions"],
        }

    columned = [[columns(row) for row in rows] for rows in groups]
    return {"words": list(words), "groups": columned}


def page(run_dir: Path, limit: int = ROLLOUTS) -> str:
    """The HTML of a run's rollouts, about `limit` of them at most."""
    config = read_config(run_dir)
    assert isinstance(config, RunConfig), "only online runs have rollouts"
    path = run_dir / "rollouts.jsonl"
    steps, groups = scan(path)
    chosen = evenly(groups, limit)
    by_step: dict[int, list[tuple[Group, list[dict]]]] = defaultdict(list)
    with open(path, "rb") as file:
        for group in chosen:
            file.seek(group.start)
            rows = [json.loads(line) for line in file.read(group.end - group.start).splitlines()]
            by_step[group.step].append((group, rows))
    every = [row for groups in by_step.values() for _, rows in groups for row in rows]
    with_tokens = [row for row in every if "tokens" in row]  # logging.rollout_tokens may change where a run is gone on with
    decode = decoder(_tokenizer(run_dir, config)) if with_tokens else None
    chunks: dict[str, Any] = {}
    for step, groups_of_step in by_step.items():
        chunks[f"texts-{step}"] = [
            {"step": step, "group_id": group.group_id, "index": i, "prompt": rows[0]["prompt"], "answer": rows[0]["answer"]}
            | {"responses": [{key: row[key] for key in SHOWN if key in row} for row in rows]}
            for i, (group, rows) in enumerate(groups_of_step)
        ]
        if all("tokens" in row for _, rows in groups_of_step for row in rows):
            chunks[f"tokens-{step}"] = step_tokens([rows for _, rows in groups_of_step], decode)
    all_rollouts, num_rollouts = sum(group.size for group in groups), len(every)
    versions = [version for row in every for version in row.get("token_versions", [row["policy_version"]])]
    meta = {
        "run": "/".join(run_dir.resolve().parts[-2:]),
        "facts": [
            config.env.dataset,
            config.model.name,
            config.mode,
            f"up to step {max(steps)}",
            f"{all_rollouts:,} responses",
        ],
        "rollouts": num_rollouts,
        "all_rollouts": all_rollouts,
        "tokens": bool(with_tokens),
        "clip": _clip(config),
        "largest_advantage": max(abs(row["advantage"]) for row in every) or 1.0,
        "difference_scale": _difference_scale(with_tokens) if with_tokens else None,
        "versions": [min(versions), max(versions)],
        "steps": [found.row(step) for step, found in sorted(steps.items())],
    }
    return _fill(f"{meta['run']} · rollouts", meta, chunks)


def _clip(config: RunConfig) -> list[float] | None:
    """How far below and above 1 the loss clips the ratio of a token's probability when trained on to that when sampled.

    None where it clips another ratio, a response's or one to the policy that first trained on the batch, or none.
    """
    objective = config.objective
    if objective.policy_loss not in ("clip", "cispo") or config.train.is_correction != "none":
        return None
    return [objective.clip_low, objective.clip_high]


def _tokenizer(run_dir: Path, config: RunConfig) -> "PreTrainedTokenizerBase":
    from grpo import builtin  # here: they import transformers, which takes seconds
    from grpo.models import load_tokenizer

    exported = run_dir / "model"
    return load_tokenizer(str(exported) if exported.is_dir() else builtin.resolve(config.model.name, config.model.cache_dir))


def _difference_scale(rows: list[dict]) -> float:
    """Nats that PERCENTILE of the tokens' log-probs differ by, at most, between training and sampling, or LEAST_SCALE."""
    pairs = ((now, then) for row in rows for now, then in zip(row["log_probs"], row["inference_log_probs"], strict=True))
    found = sorted(abs(now - then) for now, then in pairs if math.isfinite(now - then))
    return max(LEAST_SCALE, found[int(PERCENTILE * (len(found) - 1))]) if found else LEAST_SCALE


def _fill(title: str, meta: dict, chunks: dict[str, Any]) -> str:
    """The page; its policy allows this script and style alone, and no connection."""
    script, style = ((VIEWER / name).read_text() for name in ("script.js", "style.css"))
    elements = [f'<script type="text/plain" id="{name}">{chunk(value)}</script>' for name, value in chunks.items()]
    return Template((VIEWER / "page.html").read_text()).substitute(
        title=html.escape(title),
        meta=json.dumps(meta).replace("<", "\\u003c"),
        chunks="\n".join(elements),
        script=script,
        script_hash=_policy_hash(script),
        style=style,
        style_hash=_policy_hash(style),
    )


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    arguments, _ = split_arguments(sys.argv[1:], {"run": False, "out": False, "rollouts": False}, ())
    limit = whole_number(arguments, "rollouts", ROLLOUTS, 1)
    run_dir = find_run(arguments.get("run"), "rollouts.jsonl")
    out = Path(arguments.get("out", run_dir / "rollouts.html"))
    check_out(out, rollouts=run_dir / "rollouts.jsonl")
    write_whole(out, page(run_dir, limit))
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_tool(main)
