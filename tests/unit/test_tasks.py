"""What the tasks share: names, prompts as token ids, the error messages."""

import pytest

from grpo import tasks
from grpo.builtin import make_tokenizer
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.scored import encode_prompt
from grpo.tasks import SPLITS, EncodedProblems, Problem, after_thought, encode, encode_split, fingerprint


class Sums:
    """A stub task with one short, one long and one middling prompt."""

    system_prompt = "add"
    examples = []

    def problems(self, split: str) -> list[Problem]:
        return {"train": [Problem("1+1", "2"), Problem("1+1+1+1+1+1", "6"), Problem("1+2+3", "6")], "test": []}[split]


def test_the_tasks_there_are():
    assert tasks.names() == ["arithmetic", "countdown", "gsm8k", "ifeval", "math"]


def test_an_unknown_dataset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"env.dataset \(maths\) must be one of arithmetic, countdown, gsm8k, ifeval, math"
    ):
        tasks.load(EnvConfig(dataset="maths"))


def test_a_prompt_goes_through_the_chat_template():
    tokenizer = make_tokenizer()
    ids = encode(Problem("1+2", "3"), Sums(), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "1", "+", "2", "<|end|>", "<|assistant|>"]


def test_the_system_prompt_reaches_templates_that_have_a_place_for_it():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    assert tokenizer.decode(encode(Problem("1+2", "3"), Sums(), tokenizer)) == "system=add;user=1+2;"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 18", "#### 18"),
        ("<think>20?</think>\n\n#### 18", "#### 18"),
        ("It is 20.</think>\n#### 18", "#### 18"),  # the prompt had opened it
        ("<think>a</think>b</think>c", "c"),
        (" \n<think>It is 18. But wait", ""),  # cut off
        ("<think>", ""),
        ("I <think> so: #### 18", "I <think> so: #### 18"),
        ("", ""),
    ],
)
def test_what_counts_is_what_comes_after_the_thought(response, answer):
    assert after_thought(response) == answer


@pytest.mark.parametrize(
    ("dataset", "row", "cut_off", "finished"),
    [
        ("gsm8k", {"answer": "18"}, "the answer is 18. But wait", "#### 18"),
        ("math", {"answer": "18"}, r"so \boxed{18}? Let me", r"\boxed{18}"),
        ("countdown", {"numbers": [9, 2], "target": 18}, "<answer>9 * 2</answer>? Let me", "Answer: 9 * 2"),
    ],
)
def test_a_thought_that_was_cut_off_is_no_answer(dataset, row, cut_off, finished):
    grader, problem = tasks.grader(EnvConfig(dataset=dataset)), tasks.row_problem(dataset, row, "")
    thought = grader.grade(problem, f"<think>{cut_off}")
    assert (thought.outcome, thought.reward, grader.parse(f"<think>{cut_off}")) == ("unparseable", 0.0, None)
    assert grader.grade(problem, cut_off).correct
    for opened in ("<think>", ""):
        response = f"{opened}{cut_off}</think>\n{finished}"
        assert grader.grade(problem, response).correct and grader.parse(response) is not None
        assert grader.grade(problem, f"{opened}{finished}</think>\nI do not know.").outcome == "unparseable"


@pytest.mark.parametrize(
    ("generation_prompt", "thought"),
    [("Assistant: <think>\n", "<think>"), ("Assistant: <think>\n\n</think>\n\n", ""), ("Assistant:", "")],
)
def test_a_thought_that_the_chat_template_opens_is_known(generation_prompt, thought):
    class Letters(Recorder):
        chat_template = "a token a character"

        def apply_chat_template(self, turns: list[dict], **kwargs) -> list[int]:
            return [ord(character) for character in turns[-1]["content"] + generation_prompt]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    assert encode_split(Sums(), "train", Letters(), 100).thought == thought


class Recorder:
    """A tokenizer without a chat template, a token a character."""

    chat_template = None

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(character) for character in text]}


def test_without_a_template_the_prompt_is_plain_text():
    assert "".join(map(chr, encode(Problem("1+2", "3"), Sums(), Recorder()))) == "add\n\n1+2\n"


class Shown(Sums):
    """Sums with two solved examples."""

    examples = [("0+1", "1"), ("2+2", "4")]


def test_examples_are_turns_between_the_system_prompt_and_the_question():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    shown = tokenizer.decode(encode(Problem("1+2", "3"), Shown(), tokenizer))
    assert shown == "system=add;user=0+1;assistant=1;user=2+2;assistant=4;user=1+2;"


def test_a_template_that_refuses_a_system_message_has_it_told_by_the_first_user_turn():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    )
    shown = "user=0+1;assistant=1;user=2+2;assistant=4;user=1+2;"
    expected = shown.replace("user=", "user=add\n\n", 1)
    assert encode(Problem("1+2", "3"), Shown(), tokenizer) == tokenizer(expected)["input_ids"]
    alone = encode(Problem("1+2", "3"), Sums(), tokenizer)
    assert alone == tokenizer("user=add\n\n1+2;")["input_ids"]


def test_a_template_that_writes_the_date_writes_the_same_one_on_every_day():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d+%m+%Y') }};{{ messages[-1]['content'] }}"
    assert tokenizer.decode(encode(Problem("1+2", "3"), Sums(), tokenizer)) == "26+07+2024;1+2"
    assert tokenizer.decode(encode_prompt("1+2", tokenizer)) == "26+07+2024;1+2"


def test_without_a_template_examples_are_plain_text_too():
    assert "".join(map(chr, encode(Problem("1+2", "3"), Shown(), Recorder()))) == "add\n\n0+1\n1\n\n2+2\n4\n\n1+2\n"


def test_prompts_that_are_too_long_are_left_out_and_counted():
    # Three tokens of the template beside one a character: 6, 14 and 8.
    split = encode_split(Sums(), "train", make_tokenizer(), max_length=8)
    assert [problem.question for problem in split.problems] == ["1+1", "1+2+3"]
    assert [len(prompt) for prompt in split.prompts] == [6, 8]
    assert split.dropped == 1


def test_the_fingerprint_is_of_what_is_held_out_too():
    def data(**changed: str) -> dict[str, EncodedProblems]:
        return {split: EncodedProblems([Problem("1+2", changed.get(split, "3"))], [[1]], 0) for split in SPLITS}

    assert fingerprint(data()) == fingerprint(data())
    assert len({fingerprint(data(**{split: "4"})) for split in SPLITS} | {fingerprint(data())}) == 4


def test_only_the_first_problems_up_to_the_limit_are_encoded():
    split = encode_split(Sums(), "train", make_tokenizer(), max_length=100, limit=2)
    assert [problem.question for problem in split.problems] == ["1+1", "1+1+1+1+1+1"]
    assert split.dropped == 0


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", r"the train split has no prompt to use: 3 problems, 3 of them longer than env.max_prompt_length \(5\)"),
        ("test", r"the test split has no prompt to use: 0 problems, 0 of them longer than env.max_prompt_length \(5\)"),
    ],
)
def test_a_split_without_a_prompt_is_a_data_error(split, message):
    with pytest.raises(DataError, match=message):
        encode_split(Sums(), split, make_tokenizer(), max_length=5)
