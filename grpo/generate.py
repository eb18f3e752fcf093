"""Ask a model: one prompt, one after the other at a terminal, or a file of them.

    python -m grpo.generate [model=RUN_OR_PATH] "What is (4 - 9) * 6?"
    python -m grpo.generate [model=RUN_OR_PATH]
    python -m grpo.generate [model=RUN_OR_PATH] prompts=FILE [out=FILE.jsonl]

model         a run's directory, whose model/ is asked as its task asks, another model in it (best/), or a path or hub
              name with env.dataset=NAME; the newest run under outputs/ that has a model by default
prompts       a prompt a line; of FILE.jsonl an object a line with a text `prompt` or `question`
out           the objects with `response`, `parsed` and `finished` (it ended by itself, not at its token budget), as
              grpo.grade reads them; without it they are printed
temperature   0 by default: nothing is drawn
seed= device= env.KEY= inference_model.KEY= ray.KEY=    instead of the run's; without a run, of config/grpo_DATASET.yaml

Each prompt is asked by itself, after the task's system prompt and examples: models are trained on single turns.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from grpo import tasks
from grpo.config import RunConfig, known_keys
from grpo.config_sections import check_hottest
from grpo.errors import ConfigError, DataError, one_line
from grpo.evaluate import SECTIONS, config_of_its_run, shipped_config
from grpo.resume import CONFIG, read_config, write_whole
from grpo.sources import check_files, check_model
from grpo.tasks.data import check_text
from grpo.tool import asking_config, check_out, find_run, read_lines, run_tool, split_arguments

if TYPE_CHECKING:  # importing them takes seconds, and a wrong argument is answered before
    from transformers import PreTrainedTokenizerBase

    from grpo.standalone import Part, RunningEngine

OWN = ("model", "prompts", "out", "temperature", "seed", "device")
CONFIG_SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}
NOTHING_READ = "none that can be read"


@dataclass(frozen=True)
class Response:
    text: str
    parsed: str | None  # the answer that the task reads in it
    finished: bool  # it ended by itself, not at its token budget

    def shown(self) -> str:
        """As it is printed."""
        cut = "" if self.finished else "\n(cut at inference_model.max_tokens)"
        answer = NOTHING_READ if self.parsed is None else self.parsed
        return f"{self.text}{cut}\n" + ("" if self.parsed == self.text.strip() else f"Answer: {answer}\n")


@dataclass(frozen=True)
class Asker:
    """A model that is up, and how its task asks."""

    engine: "RunningEngine"
    tokenizer: "PreTrainedTokenizerBase"
    task: tasks.Task
    grader: tasks.Grader
    part: "Part"
    longest: int  # tokens of a prompt

    def encode(self, prompt: str) -> list[int]:
        """Token ids; raises DataError for a prompt that no tokenizer reads, or longer than the engine was made for."""
        check_text(prompt, "the prompt")
        tokens = tasks.encode(tasks.Problem(prompt, ""), self.task, self.tokenizer)
        if len(tokens) > self.longest:
            raise DataError(
                f"the prompt has {len(tokens)} tokens with what the task puts around it, more than env.max_prompt_length "
                f"({self.longest}): raise it"
            )
        return tokens

    def ask(self, prompts: list[list[int]], turn: int = 0) -> list[Response]:
        """A response to each of the encoded prompts; with a temperature, other ones each `turn`."""
        completions = self.engine.sample(prompts, replace(self.part, seed=self.part.seed + turn))
        texts = self.tokenizer.batch_decode(completions.responses(), skip_special_tokens=True)
        stopped = completions.stopped.tolist()
        return [Response(text, self.grader.parse(text), end) for text, end in zip(texts, stopped, strict=True)]


def configure(typed: str | None, overrides: dict[str, str]) -> tuple[RunConfig, str]:
    """The configuration to ask with, and the model's path or hub name."""
    if typed is None:
        typed = str(find_run(None, "model"))
    path, model = Path(typed), typed
    if (path / CONFIG).is_file():
        model = str(find_run(typed, "model") / "model")
        config = read_config(path)
    else:
        config = config_of_its_run(path)
    if not isinstance(config, RunConfig):
        if config is not None and "env.dataset" not in overrides:
            raise ConfigError(f"model ({model}) is of a run of mode=offline, which has no task: give env.dataset=NAME too")
        config = shipped_config(overrides)
    return asking_config(config, overrides), model


def read_prompts(path: Path, faults: list[str]) -> list[dict]:
    """The objects of a file, each with a text `prompt` or `question`; what is wrong with its other lines goes to `faults`.

    A file that is not named .jsonl has a prompt a line.
    """
    if not path.is_file():
        raise ConfigError(f"prompts ({path}): there is no such file")
    if path.suffix != ".jsonl":
        try:
            text = path.read_text(encoding="utf-8").removeprefix("\ufeff")  # which some editors begin a file with
        except UnicodeDecodeError as error:
            raise DataError(f"prompts ({path}) is not UTF-8 at byte {error.start}: save it as UTF-8") from None
        rows = [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
    else:
        with open(path, "rb") as lines:
            rows = list(read_lines(lines, _row, faults))
    if not rows:
        raise DataError(f"prompts ({path}) has no line that can be used" + (f": {faults[0]}" if faults else ""))
    return rows


def _row(row: dict, where: str) -> dict:
    prompt = _prompt(row)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: needs a text prompt, or question")
    check_text(prompt, f"{where}: its prompt")
    return row


def _prompt(row: dict) -> str | None:
    return row.get("prompt", row.get("question"))


@contextmanager
def asker(config: RunConfig, model: str, temperature: float) -> Iterator[Asker]:
    """An engine with `model`, as `config` describes both."""
    from grpo import builtin  # here: it and they import transformers
    from grpo.devices import engine_device
    from grpo.inference import Sampling, engine_spec
    from grpo.models import load_tokenizer
    from grpo.models import read_config as read_model_config
    from grpo.plan import check_positions
    from grpo.standalone import Part, started

    device, path = engine_device(config), builtin.resolve(model, config.model.cache_dir)
    check_positions(config, read_model_config(path))
    inference = config.inference_model
    task, grader, tokenizer = tasks.without_data(config.env), tasks.grader(config.env), load_tokenizer(path)
    part = Part(Sampling(1, inference.max_tokens, temperature, inference.top_p), config.seed)
    spec = engine_spec(config, path, device)
    with started(spec, config.ray.start_timeout_s, config.ray.timeout_s) as engine:
        yield Asker(engine, tokenizer, task, grader, part, config.env.max_prompt_length)


def ask_file(asking: Asker, rows: list[dict], out: Path | None, faults: list[str]) -> int:
    """Ask the prompts of `rows`, and write or print what comes back; returns how many. Prompts too long go to `faults`."""
    encoded = []
    for row in rows:
        try:
            encoded.append((row, asking.encode(_prompt(row))))
        except DataError as error:
            faults.append(f"{_prompt(row)[:60]!r}: {one_line(error)}")
    if not encoded:
        raise DataError(f"no prompt could be asked: {faults[0]}")
    responses = asking.ask([tokens for _, tokens in encoded])
    pairs = [(row, response) for (row, _), response in zip(encoded, responses, strict=True)]
    if out is None:
        for row, response in pairs:
            print(f"> {_prompt(row)}\n{response.shown()}")
    else:
        found = [
            row | {"response": response.text, "parsed": response.parsed, "finished": response.finished}
            for row, response in pairs
        ]
        write_whole(out, "".join(f"{json.dumps(row)}\n" for row in found))
    return len(pairs)


def converse(asking: Asker) -> None:
    """Ask what is typed, line by line, until there is no more."""
    import readline  # noqa: F401 - lines can be edited, and gone back to

    print("A prompt a line, each asked by itself; Ctrl-D ends.", flush=True)
    for turn in count():
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            continue
        try:
            print(asking.ask([asking.encode(prompt)], turn)[0].shown(), flush=True)
        except DataError as error:
            print(f"{one_line(error)}\n", flush=True)


def _is_argument(item: str) -> bool:
    """Whether it is NAME=VALUE; else it is a prompt. One with spaces is a prompt, unless its name is one there is."""
    key, found, _ = item.partition("=")
    is_name, section = re.fullmatch(r"[a-z]\w*(\.\w+)*", key), key.partition(".")[0]
    return bool(found and is_name) and (key in OWN or section in CONFIG_SECTIONS or not re.search(r"\s", item))


def _temperature(arguments: dict[str, str]) -> float:
    typed = arguments.get("temperature", "0")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", typed):
        raise ConfigError(f"temperature ({typed}) must be a number of at least 0")
    return float(typed)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    typed = [item for item in sys.argv[1:] if not _is_argument(item)]
    items = [item for item in sys.argv[1:] if _is_argument(item)]
    arguments, overrides = split_arguments(items, dict.fromkeys(OWN, False), SECTIONS)
    if len(typed) > 1:
        raise ConfigError(f"there are {len(typed)} prompts: put one in quotes, or several in a file, prompts=FILE")
    if typed and "prompts" in arguments:
        raise ConfigError("give a prompt or prompts=FILE, not both")
    if "out" in arguments and "prompts" not in arguments:
        raise ConfigError(f"out ({arguments['out']}) goes with prompts=FILE")
    if not typed and "prompts" not in arguments and not sys.stdin.isatty():
        raise ConfigError("there is nothing to ask: give a prompt in quotes, prompts=FILE, or a terminal")
    out = Path(arguments["out"]) if "out" in arguments else None
    if out is not None:
        check_out(out, prompts=Path(arguments["prompts"]))
    temperature, faults = _temperature(arguments), []
    rows = read_prompts(Path(arguments["prompts"]), faults) if "prompts" in arguments else []
    run_keys = {key: arguments[key] for key in ("seed", "device") if key in arguments}
    config, model = configure(arguments.get("model"), overrides | run_keys)
    check_hottest("temperature", temperature, config.inference_model.backend)
    check_model(model)
    check_files(model)
    print(f"Asking {model}", file=sys.stderr, flush=True)
    with asker(config, model, temperature) as asking:
        if typed:
            print(asking.ask([asking.encode(typed[0])])[0].shown(), end="")
        elif rows:
            num_asked = ask_file(asking, rows, out, faults)
            for fault in faults:
                print(fault, file=sys.stderr)
            if out is not None:
                print(f"{num_asked} responses in {out}; {len(faults)} lines could not be used")
        else:
            converse(asking)


if __name__ == "__main__":
    run_tool(main)
