"""What the tasks share: names, prompts as token ids, the error messages."""

import pytest

from grpo import tasks
from grpo.builtin import make_tokenizer
from grpo.config import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.tasks import Problem, encode, encode_split


class Sums:
    """A stub task with one short, one long and one middling prompt."""

    system_prompt = "add"

    def problems(self, split: str) -> list[Problem]:
        return {"train": [Problem("1+1", "2"), Problem("1+1+1+1+1+1", "6"), Problem("1+2+3", "6")], "test": []}[split]


def test_the_tasks_there_are():
    assert tasks.names() == ["arithmetic", "gsm8k", "ifeval"]


def test_an_unknown_dataset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"env.dataset \(math\) must be one of arithmetic, gsm8k, ifeval"):
        tasks.load(EnvConfig(dataset="math"))


def test_a_prompt_goes_through_the_chat_template():
    tokenizer = make_tokenizer()
    ids = encode(Problem("1+2", "3"), Sums(), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "1", "+", "2", "<|end|>", "<|assistant|>"]


def test_the_system_prompt_reaches_templates_that_have_a_place_for_it():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    assert tokenizer.decode(encode(Problem("1+2", "3"), Sums(), tokenizer)) == "system=add;user=1+2;"


def test_without_a_template_the_prompt_is_plain_text():
    class Recorder:
        chat_template = None

        def __call__(self, text: str) -> dict:
            return {"input_ids": [ord(character) for character in text]}

    assert "".join(map(chr, encode(Problem("1+2", "3"), Sums(), Recorder()))) == "add\n\n1+2\n"


def test_prompts_that_are_too_long_are_left_out_and_counted():
    # Three tokens of the template beside one a character: 6, 14 and 8.
    split = encode_split(Sums(), "train", make_tokenizer(), max_length=8)
    assert [problem.question for problem in split.problems] == ["1+1", "1+2+3"]
    assert [len(prompt) for prompt in split.prompts] == [6, 8]
    assert split.dropped == 1


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
