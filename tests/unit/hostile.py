"""Texts that break graders: for the tests of every task."""

import random
import string
from collections.abc import Iterator

# What random texts are made of: pieces that graders look for, and pieces that break them.
PIECES = (
    *(
        "####",
        "#### ",
        "\\boxed{",
        "\\frac{",
        "}",
        "{",
        "<answer>",
        "</answer>",
        "<think>",
        "Answer:",
        "The answer is ",
        "A: ",
    ),
    *(
        "\n",
        " ",
        "\t",
        "\x00",
        "\ud800",
        "\udfff",
        "\u202e",
        "\u200b",
        "🧮",
        "−",
        "½",
        "٣",
        "²",
        "１",
        "Ⅷ",
        "%",
        "$",
        "€",
        "\\$",
    ),
    *(
        "0",
        "1",
        "18",
        "9" * 30,
        "1,000",
        ".5",
        "5.",
        "1/0",
        "3/4",
        "1 1/2",
        "-",
        "+",
        "*",
        "/",
        "//",
        "**",
        "^",
        "(",
        ")",
        "=",
        ",",
    ),
    *(
        "e9",
        "9**9**9**9",
        "9^9^9",
        "\\sqrt",
        "\\int",
        "\\sum_{i=1}^{9999}",
        "\\begin{matrix}",
        "x",
        "i",
        "\\infty",
        "million",
        "nan",
    ),
    *('"', "'", "`", "[", "]", "__import__('os')", "lambda: 0", "{{", "}}", "%s", "\r", "\x1b[0m", "or", "and", "not"),
)

UNITS = (
    *(
        "9",
        "1,",
        " 1",
        "-",
        "−",
        "(",
        ")",
        "((1)",
        "{",
        "}",
        "[",
        "<",
        ">",
        "\\",
        "\\\\",
        "$",
        "#",
        "####",
        "#### ",
        "#### 1\n",
        "a",
        " ",
    ),
    *(
        "\n",
        "\t",
        "\x00",
        "\ud800",
        "\udc00",
        "é",
        "e\u0301",
        "🧮",
        "\u202e",
        "½",
        "٣",
        "1/",
        "1/2 ",
        "1.",
        ".1",
        "1e9",
        "9**",
        "9^",
        "+1",
    ),
    *(
        "*1",
        "/1",
        "-1",
        "=1",
        "= ",
        ": ",
        ",",
        ".",
        "!",
        "9!",
        "%",
        "1% ",
        "$1 ",
        "1 or ",
        "1 and ",
        "1 to ",
        "A: ",
        "\nA: ",
        "\nA:",
        "answer",
    ),
    *(
        "answer is ",
        "Answer: ",
        "the answer is 1. ",
        "answer to ",
        "answer to a",
        "answer (",
        "final answer: 9, ",
        "<answer>",
        "</answer>",
    ),
    *(
        "<answer>1</answer>",
        "<answer>1",
        "<think>",
        "<think></think>",
        "\\boxed{",
        "\\boxed{1}",
        "\\boxed",
        "\\fbox{",
        "\\frac{1}{",
        "\\frac",
    ),
    *(
        "\\frac{1}{2}",
        "\\sqrt{",
        "\\left(",
        "\\text{",
        "\\text{a}",
        "x^{",
        "x_{",
        "\\sum",
        "\\int ",
        "\\begin{pmatrix}1&",
        "^\\circ",
        "<<1",
        "<<",
    ),
    *(
        ">>",
        "**",
        "__",
        "`",
        "* ",
        "- ",
        "1. a\n",
        "# a\n",
        '"',
        "'",
        "word ",
        "Word. ",
        "word, ",
        "\r\n",
        "http://a/",
        "(a+)+",
        "aaaa!",
        "1 ",
    ),
)
WRAPPERS = (("#### ", ""), ("<answer>", "</answer>"), ("\\boxed{", "}"), ("The answer is ", "."))
COUNTS = (1, 10, 100, 1_000, 10_000, 20_000)


def pathological() -> Iterator[str]:
    """1,000 texts, each the worst of its kind for some grader: nested, repeated, huge, or cut inside a character."""
    texts = [
        "",
        "9**9**9**9",
        "#### 9**9**9**9",
        "<answer>9**9**9**9</answer>",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{" + "9" * 500 + "!}",
        "\\boxed{\\sum_{i=1}^{10^{10}} \\frac{1}{i}}",
        "\\boxed{\\int_0^1 \\sin(x^{x^{x}}) dx}",
        "\\boxed{10^{10^{10}}}",
        "x" * 1_000_000,
        "#### " + "9" * 10_000,
        "#### 0." + "9" * 10_000,
        "#### 1/" + "9" * 10_000,
        "\\boxed{" * 10_000 + "18" + "}" * 10_000,
        "<answer>" * 10_000 + "18" + "</answer>" * 10_000,
        "<answer>" + "(" * 10_000 + "18" + ")" * 10_000 + "</answer>",
        "\\frac{" * 5_000 + "1" + "}{2}" * 5_000,
        "\\boxed{" + "\\sqrt{" * 140 + "2" + "}" * 140 + "}",
        "\\boxed{" + "\\frac{1}{1+" * 70 + "1" + "}" * 70 + "}",
        "answer to " + "a" * 1_000_000,
        "\x00" * 100_000,
        "\ud800" * 100_000,
        "#### 18" + " " * 1_000_000 + "x",
        " " * 1_000_000 + "#### 18",
    ]
    for count in COUNTS:
        texts += [unit * count for unit in UNITS]
    for count in (20, 100, 400):
        texts += [start + unit * count + end for start, end in WRAPPERS for unit in UNITS]
    assert len(texts) >= 1000, len(texts)
    yield from texts[:1000]


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
    """`count` short texts, the same for the same seed: of pieces that graders look for, of sums, or of any characters.

    One in two is stated as an answer.
    """
    generator = random.Random(seed)
    for _ in range(count):
        start, end = generator.choice(WRAPPERS) if generator.random() < 0.5 else ("", "")
        yield start + _random_text(generator) + end


def _random_text(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.5:
        return "".join(generator.choice(PIECES) for _ in range(generator.randrange(1, 13)))
    if kind < 0.7:
        return "".join(generator.choice("0123456789+-*/() ") for _ in range(generator.randrange(1, 30)))
    if kind < 0.85:
        return "".join(generator.choice(string.printable) for _ in range(generator.randrange(1, 80)))
    return "".join(chr(generator.randrange(0x110000)) for _ in range(generator.randrange(1, 40)))
