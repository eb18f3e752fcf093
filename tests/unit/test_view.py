"""The page of a run's rollouts: what is in it, what it refuses, and what it does in a browser."""

import base64
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpo import tool, view
from grpo.config import RunConfig
from grpo.config_sections import EnvConfig, LoggingConfig, ModelConfig, ObjectiveConfig, TrainConfig
from grpo.errors import ConfigError, DataError
from grpo.launch import compose
from grpo.models import load_tokenizer
from grpo.offline_config import OfflineConfig
from grpo.resume import write_config
from tests.browser import CHROMIUM, Page, browser

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>&lt;b&gt; ${1} $script"
CONFIG = RunConfig(
    env=EnvConfig(dataset="arithmetic"),
    model=ModelConfig(name="builtin/arithmetic"),
    objective=ObjectiveConfig(clip_low=0.2, clip_high=0.3),
    train=TrainConfig(total_dialog_turns=512),
    logging=LoggingConfig(rollout_tokens=True),
)
# Of a response's four tokens: log-probs when sampled and when trained on, and versions.
THEN, NOW, VERSIONS = [-0.1, -0.5, -3.0, -0.25], [-0.1, -0.9, -2.5, -0.25], [1, 1, 2, 2]


def line(step: int, group: int, i: int, response: str, outcome: str, reward: float, tokens: list[int] | None) -> dict:
    row = {
        "step": step,
        "group_id": group,
        "prompt": f"What is ({group} + 1) * 2?",
        "response": response,
        "answer": str(2 * group + 2),
        "reward": reward,
        "terms": {"format": 0.2, "exact": reward - 0.2},
        "outcome": outcome,
        "parsed": str(i) if outcome != "unparseable" else None,
        "advantage": 2 * reward - 1,
        "policy_version": step - 1,
    }
    if tokens is not None:
        row |= {"tokens": tokens, "inference_log_probs": THEN, "log_probs": NOW, "token_versions": VERSIONS}
    return row


def write_run(run_dir: Path, lines: list[dict], config: RunConfig = CONFIG) -> Path:
    run_dir.mkdir()
    write_config(config, run_dir)
    (run_dir / "rollouts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    return run_dir


def small_run(
    run_dir: Path,
    with_tokens: bool = False,
    model_path: str | None = None,
    config: RunConfig = CONFIG,
    steps: tuple[int, ...] = (1, 2, 3),
    without: tuple[int, ...] = (),
) -> Path:
    """3 steps of 2 groups of 2 responses; the second of a group is wrong, that of the last one is hostile.

    The steps `without` have no tokens whatever the others have.
    """
    ids = load_tokenizer(model_path)("1+1=", add_special_tokens=False)["input_ids"] if with_tokens else None
    lines = []
    for step in steps:
        tokens = None if step in without else ids
        for group in (2 * step, 2 * step + 1):
            lines.append(line(step, group, 1, f"right {group}", "correct", 1.0, tokens))
            last = group == 7
            lines.append(line(step, group, 2, EVIL if last else "off", "unparseable" if last else "wrong", 0.2, tokens))
    run = write_run(run_dir, lines, config)
    if model_path:
        (run / "model").symlink_to(model_path)
    return run


def meta_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="meta">(.*?)</script>', page)[1])


def chunk_of(page: str, name: str) -> dict | list:
    packed = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_has_every_group_of_every_step(tmp_path):
    page = view.page(small_run(tmp_path / "run"))
    meta = meta_of(page)
    assert (meta["rollouts"], meta["all_rollouts"], meta["tokens"]) == (12, 12, False)
    assert meta["steps"][0] == {"step": 1, "count": 4, "reward": pytest.approx(0.6), "outcomes": {"correct": 2, "wrong": 2}}
    assert meta["steps"][2]["outcomes"] == {"correct": 2, "wrong": 1, "unparseable": 1}
    assert (meta["clip"], meta["largest_advantage"], meta["versions"]) == ([0.2, 0.3], 1.0, [0, 2])
    first, second = chunk_of(page, "texts-3")
    assert (first["group_id"], first["answer"], second["index"]) == (6, "14", 1)
    assert [response["response"] for response in second["responses"]] == ["right 7", EVIL]
    assert second["responses"][0]["terms"] == {"format": 0.2, "exact": 0.8}


def test_tokens_come_with_their_texts_and_columns(tmp_path, model_path):
    page = view.page(small_run(tmp_path / "run", True, model_path))
    meta = meta_of(page)
    assert meta["tokens"] and meta["versions"] == [1, 2]
    assert meta["difference_scale"] == pytest.approx(0.5)
    chunk = chunk_of(page, "tokens-1")
    tokens = chunk["groups"][1][0]
    assert [chunk["words"][word] for word in tokens["words"]] == ["1", "+", "1", "="]
    assert (tokens["log_prob"], tokens["difference"], tokens["version"]) == (THEN, [0, -0.4, 0.5, 0], VERSIONS)


@pytest.mark.parametrize(
    ("overrides", "clip"),
    [
        (["objective=grpo"], [0.2, 0.2]),
        (["objective=dapo"], [0.2, 0.28]),
        (["objective=cispo"], [1.0, 4.0]),
        (["objective=gspo"], None),  # clips the ratio of a response
        (["objective=rloo"], None),  # clips none
        (["objective=grpo", "train.is_correction=truncate"], None),  # that to the policy that first trained on the batch
    ],
)
def test_the_clip_range_is_there_where_it_is_of_the_ratio_that_is_shown(tmp_path, overrides, clip):
    run = small_run(tmp_path / "run", config=compose("grpo_arithmetic", overrides))
    assert meta_of(view.page(run))["clip"] == clip


def test_steps_that_have_tokens_show_them_though_others_have_none(tmp_path, model_path):
    page = view.page(small_run(tmp_path / "run", True, model_path, without=(1,)))
    meta = meta_of(page)
    assert (meta["tokens"], meta["difference_scale"], meta["versions"]) == (True, pytest.approx(0.5), [0, 2])
    assert [f'id="tokens-{step}"' in page for step in (1, 2, 3)] == [False, True, True]
    assert len(chunk_of(page, "tokens-2")["groups"]) == 2


def test_the_facts_name_the_last_step_and_do_not_count_those_that_have_lines(tmp_path):
    """With train.epochs=2 the second use of a batch has none."""
    assert meta_of(view.page(small_run(tmp_path / "run", steps=(1, 3, 5))))["facts"][3] == "up to step 5"


def test_half_of_a_character_is_in_the_page_as_it_is(tmp_path):
    row = line(1, 1, 1, "你 \ud83d", "wrong", 0.2, None) | {"answer": "\udc00"}
    (group,) = chunk_of(view.page(write_run(tmp_path / "run", [row])), "texts-1")
    assert (group["responses"][0]["response"], group["answer"]) == ("你 \ud83d", "\udc00")


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    letters = {1: b"a", 2: b"\xe4\xbd", 3: b"\xa0", 4: b" b", 5: b"\xff"}

    def decode(ids: list[int]) -> str:
        return b"".join(letters[i] for i in ids).decode(errors="replace")

    assert view.pieces([1, 2, 3, 4], decode) == ["a", "", "你", " b"]
    assert view.pieces([2, 4, 5], decode) == ["", "� b", "�"]  # bytes that are no character lose nothing


def test_the_space_that_sentencepiece_drops_at_a_start_is_put_back():
    class Tokenizer:
        words = {1: "▁two", 2: "words", 3: "</s>"}

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.words[token]

        def decode(self, ids: list[int], **settings: bool) -> str:
            assert settings == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert view.pieces([1, 2, 1, 3], view.decoder(Tokenizer())) == [" two", "words", " two", "</s>"]


def test_a_long_run_is_thinned_out_evenly_and_in_whole_groups(tmp_path):
    lines = [
        line(step, 100 * step + g, i, "x", "wrong", 0.2, None) for step in range(1, 11) for g in range(8) for i in range(3)
    ]
    run = write_run(tmp_path / "run", lines)
    page = view.page(run, limit=100)
    meta = meta_of(page)
    assert (meta["rollouts"], meta["all_rollouts"]) == (99, 240)  # 33 of 80 groups
    assert [group["group_id"] for group in chunk_of(page, "texts-1")] == [101, 103, 106]
    assert [group["group_id"] for group in chunk_of(page, "texts-2")] == [200, 203, 205, 207]
    assert meta_of(view.page(run, limit=240))["rollouts"] == 240
    assert meta_of(view.page(run, limit=1))["rollouts"] == 3
    assert all(step["count"] == 24 for step in meta["steps"])


@pytest.mark.parametrize("limit", [1, 12, 30, 97, 100, 239])
def test_the_step_that_a_page_opens_at_has_a_group_in_it_however_few_there_are(tmp_path, limit):
    lines = [line(step, 2 * step + g, i, "x", "wrong", 0.2, None) for step in range(1, 41) for g in (0, 1) for i in range(3)]
    page = view.page(write_run(tmp_path / "run", lines), limit)
    assert meta_of(page)["steps"][-1]["step"] == 40
    assert chunk_of(page, "texts-40")[-1]["group_id"] == 81


def late_run(run_dir: Path) -> Path:
    """A step with responses with and without a verdict, and one with none."""
    verdicts = [(1, "correct", 1.0), (1, "wrong", 0.2), (1, "timed_out", 0.0), (1, "grader_error", 0.0)]
    verdicts += [(2, "timed_out", 0.0)] * 2
    return write_run(run_dir, [line(step, step, i, "x", *verdict, None) for i, (step, *verdict) in enumerate(verdicts)])


def test_responses_without_a_verdict_are_in_no_mean(tmp_path):
    first, second = meta_of(view.page(late_run(tmp_path / "run")))["steps"]
    assert (first["count"], first["reward"]) == (4, pytest.approx(0.6))
    assert (second["count"], second["reward"]) == (2, None)


def test_a_line_that_is_just_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    run = small_run(tmp_path / "run")
    with open(run / "rollouts.jsonl", "a") as file:
        file.write('{"step": 4, "group')
    assert meta_of(view.page(run))["all_rollouts"] == 12
    with open(run / "rollouts.jsonl", "a") as file:
        file.write("\n")
    other = write_run(tmp_path / "other", [line(1, 1, 1, "x", "fine", 0.2, None)])
    with pytest.raises(DataError, match=r"rollouts.jsonl:1 is no line of a run's rollouts: there is no outcome fine"):
        view.page(other)
    with pytest.raises(DataError, match=r"rollouts.jsonl:13 is no line of a run's rollouts: Invalid control character"):
        view.page(run)


def test_log_probs_that_json_has_no_number_for_are_null(tmp_path, model_path):
    tokens = load_tokenizer(model_path)("1+1=", add_special_tokens=False)["input_ids"]
    row = line(1, 1, 1, "1+1=", "correct", 1.0, tokens) | {"inference_log_probs": [-0.1, float("-inf"), -3.0, -0.25]}
    run = write_run(tmp_path / "run", [row])
    (run / "model").symlink_to(model_path)
    page = view.page(run)
    tokens = chunk_of(page, "tokens-1")["groups"][0][0]
    assert (tokens["log_prob"], tokens["difference"]) == ([-0.1, None, -3.0, -0.25], [0, None, 0.5, 0])
    assert meta_of(page)["difference_scale"] < 1  # of those that are finite


def test_nothing_outside_is_asked_for_and_only_its_own_script_may_run(tmp_path):
    page = view.page(small_run(tmp_path / "run"))
    assert EVIL not in page and "window.hacked" not in page
    assert not re.search(r"""(?:src|href)=["']|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["view", *arguments])
    view.main()


def test_the_command_takes_the_newest_run_and_refuses_what_it_cannot_show(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "OUTPUTS", tmp_path)
    (tmp_path / "day").mkdir()
    with pytest.raises(ConfigError, match=r"there is no run with rollouts.jsonl under .*: train one"):
        command(monkeypatch)
    run = small_run(tmp_path / "day" / "time")
    command(monkeypatch)
    assert f"{run}/rollouts.html" in capsys.readouterr().out
    assert meta_of((run / "rollouts.html").read_text())["run"] == "day/time"
    command(monkeypatch, f"run={run}", f"out={tmp_path}/x.html", "rollouts=4")
    assert meta_of((tmp_path / "x.html").read_text())["rollouts"] == 4
    offline = tmp_path / "offline"
    offline.mkdir()
    write_config(OfflineConfig(data="x.jsonl"), offline)
    empty = write_run(tmp_path / "empty", [])
    for arguments, error, message in [
        ([f"run={tmp_path}"], ConfigError, "there is no run there"),
        ([f"run={offline}"], ConfigError, "has no rollouts.jsonl"),
        ([f"run={empty}"], DataError, "has no rollouts yet: wait for the run's first step"),
        ([f"run={run}", "rollouts=many"], ConfigError, r"rollouts \(many\) must be a whole number of at least 1"),
        ([f"run={run}", f"out={tmp_path}/no/x.html"], ConfigError, "there is no directory"),
        ([f"run={run}", f"out={tmp_path}"], ConfigError, "is there, and no file: give another name"),
        ([f"run={run}", f"out={run}/rollouts.jsonl"], ConfigError, "must not be rollouts, which it would replace"),
        (["colour=red"], ConfigError, "colour is not an argument here: there are run, out and rollouts"),
    ]:
        with pytest.raises(error, match=message):
            command(monkeypatch, *arguments)


# ---- In a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        page.resize(1440, 900)
        yield page


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def open_run(page: Page, run: Path, fragment: str = "", limit: int = view.ROLLOUTS) -> None:
    out = run / "rollouts.html"
    out.write_text(view.page(run, limit))
    page.events.clear()
    page.open(out, fragment)


@needs_chromium
def test_groups_stand_side_by_side_and_steps_are_walked_through(tmp_path, chromium):
    open_run(chromium, small_run(tmp_path / "run"))
    assert texts(chromium, ".where") == ["Step 3 · group 6", "Step 3 · group 7"]
    assert texts(chromium, ".badge") == ["✓ correct", "✗ wrong", "✓ correct", "? unparseable"]
    assert texts(chromium, ".response > header .number") == ["1.00", "+1.00", "0.20", "−0.60"] * 2
    tops = "[...document.querySelectorAll('.group:first-child .response')].map((e) => e.getBoundingClientRect().top)"
    assert len(set(chromium.evaluate(tops))) == 1
    chromium.press("ArrowLeft")
    chromium.wait("document.querySelector('.where').textContent === 'Step 2 · group 4'")
    chromium.press("ArrowRight")
    chromium.press("ArrowRight")  # there is no fourth
    chromium.wait("document.querySelector('.where').textContent === 'Step 3 · group 6'")
    assert chromium.evaluate("document.getElementById('following').disabled") is True
    chromium.press("j")
    chromium.press("j")
    assert chromium.evaluate("document.activeElement.querySelector('.where').textContent") == "Step 3 · group 7"


@needs_chromium
def test_steps_without_a_group_in_the_page_are_passed_over(tmp_path, chromium):
    lines = [line(step, step, 0, "x", "wrong", 0.2, None) for step in range(1, 31)]
    open_run(chromium, write_run(tmp_path / "run", lines), limit=10)  # steps 3, 6, ... 30
    assert texts(chromium, ".where") == ["Step 30 · group 30"]
    for key, step in [("ArrowRight", 30), ("ArrowLeft", 27), ("ArrowLeft", 24), ("ArrowRight", 27)]:
        chromium.press(key)
        chromium.wait(f"document.querySelector('.where')?.textContent === 'Step {step} · group {step}'")
    open_run(chromium, tmp_path / "run", "step=4", limit=10)
    assert texts(chromium, ".where") == []  # as asked for
    chromium.evaluate("document.getElementById('previous').click()")
    chromium.wait("document.querySelector('.where')?.textContent === 'Step 3 · group 3'")
    assert chromium.evaluate("document.getElementById('previous').disabled") is True


@needs_chromium
def test_what_a_model_wrote_is_text_and_nothing_else(tmp_path, chromium):
    open_run(chromium, small_run(tmp_path / "run"))
    assert EVIL in texts(chromium, ".text")
    assert chromium.evaluate("window.hacked") is None
    assert chromium.evaluate("document.querySelectorAll('img').length") == 0
    requests = [e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in requests} <= {"file", "about", "blob"}
    # Even if some of it did get into the page, its policy would stop it.
    chromium.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 3\">')")
    chromium.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")
    assert chromium.evaluate("window.hacked") is None


@needs_chromium
def test_filters_and_search_find_responses_in_this_step_or_in_all(tmp_path, chromium):
    run = small_run(tmp_path / "run")
    chromium.resize(1440, 4000)  # all are in view
    for fragment, found, badges in [
        ("step=1&outcomes=wrong", "2 of 2 groups in step 1, 2 responses that match", ["✗ wrong"] * 2),
        ("all=1&outcomes=unparseable", "1 of 6 groups in all steps, 1 response that matches", ["? unparseable"]),
        ("all=1&lowest=0.5", "6 of 6 groups in all steps, 6 responses that match", ["✓ correct"] * 6),
        ("all=1&highest=0.5&outcomes=correct", "0 of 6 groups in all steps, 0 responses that match", []),
        ("all=1&text=RIGHT+4", "1 of 6 groups in all steps, 1 response that matches", ["✓ correct"]),
        ("all=1&text=%3Cscript%3E", "1 of 6 groups in all steps, 1 response that matches", ["? unparseable"]),
        ("step=2", "2 of 2 groups in step 2, 4 responses", ["✓ correct", "✗ wrong"] * 2),
    ]:
        open_run(chromium, run, fragment)
        assert texts(chromium, "#found") == [found]
        counts = ["2", "2", "0"] if "step" in fragment else ["6", "5", "1"]
        assert texts(chromium, ".chips .number") == counts
        assert texts(chromium, ".badge") == badges
    chromium.press("/")
    for letter in "right 5":
        chromium.press(letter)
    chromium.wait("document.getElementById('found').textContent.startsWith('1 of 2 groups in step 2, 1 response')")
    assert chromium.evaluate("[...CSS.highlights.get('found')].map(String)") == ["right 5"]
    assert texts(chromium, ".others") == ["Show 1 more that does not match"]
    chromium.evaluate("document.querySelector('.others').click()")
    assert texts(chromium, ".badge") == ["✓ correct", "✗ wrong"]
    chromium.resize(1440, 900)


@needs_chromium
@pytest.mark.parametrize(("typed", "value", "found"), [("0.4", 0.4, 2), ("-1", -1, 4)])
def test_a_number_that_is_typed_slowly_stays_what_it_is(tmp_path, chromium, typed, value, found):
    open_run(chromium, small_run(tmp_path / "run"))
    chromium.evaluate("document.getElementById('lowest').focus()")
    for key in typed:
        chromium.press(key)
        chromium.evaluate("new Promise((resolve) => setTimeout(resolve, 350))")  # the page waits 150 ms for the next key
    assert chromium.evaluate("document.getElementById('lowest').value") == typed
    assert f"lowest={value}" in chromium.evaluate("location.hash")
    assert texts(chromium, "#found")[0].endswith(f" {found} responses that match")
    chromium.evaluate("location.hash = 'step=3&lowest=0.9'")
    chromium.wait("document.getElementById('lowest').value === '0.9'")


@needs_chromium
@pytest.mark.parametrize("rewards", [[0.0, 0.2, 0.1 + 0.2, 1.0], torch.tensor([0.0, 0.2, 0.3, 1.0]).tolist()])
def test_a_filter_at_the_reward_that_is_shown_keeps_it(tmp_path, chromium, rewards):
    lines = [line(1, 1, i, f"{i}", "wrong", reward, None) for i, reward in enumerate(rewards)]
    run = write_run(tmp_path / "run", lines)
    for fragment, shown in [
        ("lowest=0.2", ["1.00", "0.30", "0.20"]),
        ("highest=0.2", ["0.20", "0.00"]),
        ("lowest=0.3&highest=0.3", ["0.30"]),
        ("lowest=0.31", ["1.00"]),
    ]:
        open_run(chromium, run, fragment)
        assert texts(chromium, ".response > header .number")[::2] == shown


@needs_chromium
def test_a_groups_figures_are_those_of_its_verdicts(tmp_path, chromium):
    run, figures = late_run(tmp_path / "run"), "#of-step dd, .group > header dd"
    open_run(chromium, run, "step=1")  # of 1 and 0.2: their mean, and sqrt(0.16 + 0.16)
    assert texts(chromium, figures) == ["25.0%", "0.600", "4", "1 of 4", "0.60", "0.57"]
    open_run(chromium, run, "step=2")
    assert texts(chromium, figures) == ["0.0%", "none", "2", "0 of 2", "none", "none"]


@needs_chromium
def test_tokens_are_coloured_by_what_is_chosen(tmp_path, model_path, chromium):
    run = small_run(tmp_path / "run", True, model_path)
    shades = """[...document.querySelectorAll('.response:first-child .text')[0].children].map(
        (e) => [e.textContent, e.className, Number(e.style.getPropertyValue('--share'))])"""
    up, down = "token above", "token below"
    # ratio: exp(-0.4) = 0.67 and exp(0.5) = 1.65 lie beyond 0.8 and 1.3, where the scale ends.
    open_run(chromium, run, "step=1&colour=ratio")
    assert chromium.evaluate(shades) == [["1", up, 0], ["+", f"{down} beyond", 1], ["1", f"{up} beyond", 1], ["=", up, 0]]
    open_run(chromium, run, "step=1&colour=difference")  # -0.4 and 0.5 of 0.5
    assert chromium.evaluate(shades) == [["1", up, 0], ["+", down, 0.8], ["1", up, 1], ["=", up, 0]]
    open_run(chromium, run, "step=1&colour=log_prob")  # of 4 nats
    assert [shade for _, _, shade in chromium.evaluate(shades)] == [0.025, 0.125, 0.75, 0.063]
    open_run(chromium, run, "step=1&colour=version")
    assert [shade for _, _, shade in chromium.evaluate(shades)] == [0.1, 0.1, 1, 1]
    open_run(chromium, run, "step=1&colour=advantage")
    assert chromium.evaluate(shades) == [[text, up, 1] for text in "1+1="]
    chromium.press("c")
    chromium.wait("document.getElementById('colour').value === 'ratio'")
    chromium.evaluate("document.querySelectorAll('.token')[1].click()")
    assert texts(chromium, "#tip code") == ['"+"']
    assert texts(chromium, "#tip dd") == ["−0.5000", "−0.9000", "−0.4000", "0.6703", "+1.000", "1"]


@needs_chromium
def test_where_no_ratio_of_a_token_is_clipped_none_is_underlined(tmp_path, model_path, chromium):
    run = small_run(tmp_path / "run", True, model_path, config=compose("grpo_arithmetic", ["objective=gspo"]))
    open_run(chromium, run, "step=1&colour=ratio")
    shades = """[...document.querySelectorAll('.response:first-child .text')[0].children].map(
        (e) => [e.className, Number(e.style.getPropertyValue('--share'))])"""
    up, down = "token above", "token below"
    assert chromium.evaluate(shades) == [[up, 0], [down, 0.8], [up, 1], [up, 0]]  # -0.4 and 0.5 of 0.5
    low, _, high, words = texts(chromium, "#legend span")
    assert (low, high) == ("0.61", "1.65")  # exp(-0.5), exp(0.5)
    assert words.endswith("; the scale ends at this run's 99th percentile")


@needs_chromium
def test_a_step_without_tokens_says_so_among_others_that_have_them(tmp_path, model_path, chromium):
    run = small_run(tmp_path / "run", True, model_path, without=(1,))
    for step, tokens, notes in [(1, 0, 1), (2, 16, 0)]:
        open_run(chromium, run, f"step={step}&colour=ratio")
        assert len(texts(chromium, ".token")) == tokens
        assert len(texts(chromium, "#legend .note")) == notes
    open_run(chromium, run, "step=1")
    assert texts(chromium, "#legend .note")[0].startswith("This step did not keep its rollouts' tokens: with logging.")


@needs_chromium
def test_a_long_response_is_cut_until_it_is_asked_for(tmp_path, chromium):
    lines = [line(1, 1, i, "a line\n" * length, "wrong", 0.2, None) for i, length in enumerate((100, 3))]
    open_run(chromium, write_run(tmp_path / "run", lines))
    heights = "[...document.querySelectorAll('.text')].map((e) => e.clientHeight >= e.scrollHeight)"
    assert chromium.evaluate(heights) == [False, True]
    assert texts(chromium, ".more") == ["Show all of it"]
    chromium.evaluate("document.querySelector('.more').click()")
    assert chromium.evaluate(heights) == [True, True]
    assert texts(chromium, ".more") == []


@needs_chromium
def test_the_scheme_follows_the_system_until_one_is_chosen(tmp_path, chromium):
    ground = "getComputedStyle(document.body).backgroundColor"
    open_run(chromium, small_run(tmp_path / "run"))
    light = chromium.evaluate(ground)
    chromium.resize(1440, 900, dark=True)
    dark = chromium.evaluate(ground)
    assert light != dark
    chromium.press("t")
    assert (chromium.evaluate(ground), texts(chromium, "#theme")) == (light, ["Theme: light"])
    chromium.press("t")
    assert (chromium.evaluate(ground), texts(chromium, "#theme")) == (dark, ["Theme: dark"])
    chromium.resize(1440, 900)


@needs_chromium
def test_a_run_without_tokens_says_so_and_offers_what_it_has(tmp_path, chromium):
    open_run(chromium, small_run(tmp_path / "run"), "colour=ratio")
    assert "with logging.rollout_tokens=true they are coloured one by one" in texts(chromium, "#legend .note")[0]
    disabled = "[...document.getElementById('colour').options].filter((o) => o.disabled).map((o) => o.value)"
    assert chromium.evaluate(disabled) == ["ratio", "difference", "log_prob"]
    assert chromium.evaluate("document.getElementById('colour').value") == "advantage"


@needs_chromium
def test_it_opens_within_a_second_with_ten_thousand_responses(tmp_path, model_path, chromium):
    """Of 50 tokens each, in groups of 8; elements are made of those in view alone."""
    tokens = load_tokenizer(model_path)("1+1=2;" * 8 + "3*", add_special_tokens=False)["input_ids"]
    columns = {"inference_log_probs": THEN * 12 + THEN[:2], "log_probs": NOW * 12 + NOW[:2], "token_versions": [1] * 50}
    lines = [
        line(step, 25 * step + group, i, "1+1=2;" * 8 + "3*", "wrong", 0.2, tokens) | columns
        for step in range(1, 51)
        for group in range(25)
        for i in range(8)
    ]
    assert (len(lines), len(tokens)) == (10_000, 50)
    run = write_run(tmp_path / "run", lines)
    (run / "model").symlink_to(model_path)
    opened = []
    for _ in range(3):  # what else the machine does is no fault of the page's
        open_run(chromium, run, "colour=log_prob")
        opened.append(chromium.evaluate("performance.getEntriesByName('shown')[0].startTime"))
    assert min(opened) < 1000
    assert chromium.evaluate("document.querySelectorAll('.group').length") < 25
    start = chromium.evaluate("performance.now()")
    chromium.press("a")
    chromium.wait("document.getElementById('found').textContent.startsWith('1,250 of 1,250 groups in all steps')")
    assert chromium.evaluate("performance.now()") - start < 2000
    in_view = chromium.evaluate("document.querySelectorAll('.group').length")
    chromium.evaluate("scrollTo(0, document.body.scrollHeight)")
    chromium.wait(f"document.querySelectorAll('.group').length > {in_view}")


@needs_chromium
@pytest.mark.parametrize("width, height", [(390, 844), (1440, 900)])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_and_words_can_be_read_at_any_width_in_either_scheme(
    tmp_path, model_path, chromium, width, height, dark
):
    run = small_run(tmp_path / "run", True, model_path)
    chromium.resize(width, height, dark)
    open_run(chromium, run)
    assert chromium.evaluate("document.documentElement.scrollWidth") == width
    assert chromium.evaluate(CONTRAST) >= 4.5
    chromium.resize(1440, 900)


# The smallest ratio of luminances between a text and the ground of its element, WCAG 2's.
CONTRAST = """(() => {
  const context = document.createElement('canvas').getContext('2d');
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const ground = (element) => {
    const below = element.parentElement ? ground(element.parentElement) : [255, 255, 255, 255];
    const own = rgba(getComputedStyle(element).backgroundColor), share = own[3] / 255;
    return own.map((value, i) => share * value + (1 - share) * below[i]);
  };
  const luminance = (colour) => {
    const parts = colour.slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const words = 'h1, p, dt, dd, .badge, .reading, .text span, .chips button, label, .legend';
  const ratios = [...document.querySelectorAll(words)].map((e) => {
    const pair = [luminance(rgba(getComputedStyle(e).color)), luminance(ground(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
  return Math.min(...ratios);
})()"""
