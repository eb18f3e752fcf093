"""The 25 verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911): which keyword arguments each takes, and
whether a text follows it. Nothing is downloaded, nothing is random, and every check is linear in the text.

The verdicts are those of Google's reference implementation (google-research, instruction_following_eval), written anew:
TorchRL's copy of it needs NLTK data from the network, draws missing values at random, puts keywords into regular
expressions unescaped, and is quadratic for texts such as a run of brackets. Where the verdicts differ on purpose:

- A model's thoughts, up to </think>, are not graded: they are taken off before (grpo/tasks/__init__.py).
- `keywords:letter_frequency` counts any one character; the reference replaces all but a-z by a random letter.
- Keywords and markers are literal texts, not regular expressions, and a count of 0 is a count, not a missing value.
- The language is detected with a fixed seed; a text in which none can be detected follows no language (there: any); a text
  in capitals is read in lower case, since langdetect skips capital words and then takes German for English.
- `length_constraints:nth_paragraph_first_word` takes the n-th of the paragraphs that it counts, those not blank.
- `length_constraints:number_sentences` uses `sentences` below in place of NLTK's Punkt, whose data is a download, and
  `change_case:capital_word_frequency` the words of CAPITAL_WORD in place of NLTK's tokenizer, for which DON'T is two words.
- `detectable_format:number_bullet_lists` looks at one line at a time and counts no Markdown rule (`---`, `* * *`).
- `detectable_format:number_highlighted_sections` is not opened by a bullet's asterisk, and `***text***` is one, not two.
- `detectable_format:json_format` refuses NaN and Infinity, which JSON has not, and takes whole numbers of any length.

Kept from the reference although debatable: keywords are counted inside longer words (forbidden words are whole words), a
word is a run of letters and digits (don't is two), one option or more of `constrained_response` anywhere in the text will
do, only straight quotation marks wrap and only the comma of ASCII is a comma.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")  # of constrained_response
LANGUAGE_SAMPLE = 10_000  # characters from which the language is detected: langdetect reads no more

WORD = re.compile(r"\w+")
CAPITAL_WORD = re.compile(r"\w+(?:[-'’./]\w+)*")  # DON'T, U.S.A, WELL-KNOWN and AND/OR are one word each
HIGHLIGHT = re.compile(r"(\*{1,3})([^\n*]++)\1")
BULLET_ASTERISK = re.compile(r"(?m)^([ \t]{0,100})\*(?=[ \t])")
SENTENCE_END = re.compile(r"""[.!?…]++["'”’»)\]*_]*+|[。！？।॥؟۔]++""")
NEVER_END = re.compile(r"mr|mrs|ms|dr|prof|st|capt|lt|gov|sen|gen|rev|vs|cf|e\.g|i\.e|p\.s|p\.p\.s", re.IGNORECASE)
MAY_END = re.compile(r"etc|inc|ltd|co|corp|jr|sr|approx|dept|est", re.IGNORECASE)
DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")  # U.S, a.m, Ph.D
LIST_MARK = re.compile(r"[\s#>*_(-]*(?:\d{1,3}|[A-Za-z])")


def compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


@cache
def _language_detectors():  # reads langdetect's profiles, which takes a quarter of a second
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


def detect_language(text: str) -> str | None:
    """The language of the first 10,000 characters, as langdetect names it (ISO 639-1, zh-cn or zh-tw), or None."""
    from langdetect.lang_detect_exception import LangDetectException

    sample = text[:LANGUAGE_SAMPLE]
    detector = _language_detectors().create()
    detector.append(sample.lower() if sample.isupper() else sample)
    try:
        found = detector.detect()
    except LangDetectException:  # no letters in the text
        return None
    return None if found == detector.UNKNOWN_LANG else found


def _period_ends_sentence(text: str, start: int, end: int) -> bool:
    """Whether the single period at text[start], with the marks that close it up to `end`, ends a sentence."""
    line_start = text.rfind("\n", max(0, start - 16), start) + 1
    if (line_start or start < 16) and LIST_MARK.fullmatch(text, line_start, start):
        return False
    words = text[max(0, start - 16) : start].split()
    word = words[-1].lstrip("\"'“‘«([*_") if words and not text[start - 1].isspace() else ""
    if NEVER_END.fullmatch(word) or (len(word) == 1 and word.isupper() and word != "I"):
        return False
    if MAY_END.fullmatch(word) or DOTTED.fullmatch(word):
        return _upper_follows(text, end)
    return True


def _upper_follows(text: str, end: int) -> bool:
    following = text[end : end + 16].lstrip().lstrip("\"'“‘«([*_")[:1]
    return following == "" or not following.islower()


def sentences(text: str) -> list[str]:
    """Split `text` into sentences, by the following rule, which stands in for the paper's Punkt.

    A sentence ends where a run of `.`, `!`, `?` or `…`, with the quotation marks, brackets and Markdown emphasis that close
    it, is followed by white space or the end of the text; and at `。！？।॥؟۔` wherever they are. A period ends none after a
    title or e.g., i.e., vs., P.S. (NEVER_END), an initial (J.) or a list's mark at the start of a line (`1.`); after
    another abbreviation (MAY_END, U.S., a.m.) and after an ellipsis only if no lower-case letter follows. Line breaks end
    no sentence. What holds no letter or digit is no sentence.
    """
    found, begin = [], 0
    for match in SENTENCE_END.finditer(text):
        start, end = match.span()
        if text[start] in ".!?…":
            if end < len(text) and not text[end].isspace():
                continue
            marks = len(match[0]) - len(match[0].lstrip(".!?…"))
            if marks == 1 and text[start] == "." and not _period_ends_sentence(text, start, end):
                continue
            ellipsis = text[start] == "…" or (marks > 1 and text.startswith("..", start))
            if ellipsis and not _upper_follows(text, end):
                continue
        found.append(text[begin:end])
        begin = end
    found.append(text[begin:])
    return [sentence.strip() for sentence in found if WORD.search(sentence)]


def keywords_existence(text: str, keywords: list[str]) -> bool:
    lower = text.lower()
    return all(keyword.lower() in lower for keyword in keywords)


def keywords_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    return detect_language(text) == language


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by `***`; a blank one is overlooked at either end and fails in between."""
    blank = [not part.strip() for part in text.split("***")]
    return not any(blank[1:-1]) and blank.count(False) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(sum(1 for _ in WORD.finditer(text)), relation, num_words)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by a blank line; a first word ends at `.,?!'"` and opening quotation marks are no part of it."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == first_word.strip().lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """Placeholders are `[...]` within a line, each up to the first closing bracket."""
    return sum(_placeholders(line) for line in text.split("\n")) >= num_placeholders


def _placeholders(line: str) -> int:
    count, begin = 0, line.find("[")
    while begin >= 0 and (end := line.find("]", begin)) >= 0:
        count, begin = count + 1, line.find("[", end)
    return count


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker anywhere in the text, in either case; P.S. and P.P.S may have a space between their letters."""
    marker = postscript_marker.strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(spaced.get(marker, re.escape(marker.lower())), text.lower()) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Bullets are the lines that start with `-` or a single `*`, with or without a space after it, and are no rule."""
    return sum(_is_bullet(line.strip()) for line in text.split("\n")) == num_bullets


def _is_bullet(line: str) -> bool:
    marks = "".join(line[:1_000].split())
    if len(marks) >= 3 and marks[0] in "*-" and not marks.strip(marks[0]):
        return False  # a Markdown rule
    return line.startswith("-") or (line.startswith("*") and not line.startswith("**"))


def constrained_response(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Highlights are `*...*`, `**...**` and `***...***` within a line, with more than white space in them."""
    found = HIGHLIGHT.finditer(BULLET_ASTERISK.sub(r"\1", text))
    return sum(1 for match in found if match[2].strip()) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Sections are marked by the splitter, as it is written, and a number."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d++", text)) >= num_sections


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def json_format(text: str) -> bool:
    """The text is one JSON value, in Markdown's ticks or not; what is nested deeper than Python reads is none."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip(), parse_int=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A line holds `<<...>>` with more than white space and angle brackets in it."""
    for line in text.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 1 and line[begin : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text: str) -> bool:
    """Two different texts parted by `******`, which may also open and close the whole."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    answers = [part for part in parts if part]
    return len(answers) == 2 and answers[0] != answers[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase, in either case; quotation marks around the whole text do not count."""
    ending, phrase = text.strip().lower(), end_phrase.strip().lower()
    return ending.endswith(phrase) or ending.strip('"').endswith(phrase)


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = sum(1 for word in CAPITAL_WORD.finditer(text) if word[0].isupper())
    return compare(capitals, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and detect_language(text) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and detect_language(text) == "en"


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


class Rule(NamedTuple):
    """What a keyword argument must be."""

    text: str
    holds: Callable[[object], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


COUNT = Rule("a whole number, 0 or more", lambda v: type(v) is int and v >= 0)
POSITION = Rule("a whole number, 1 or more", lambda v: type(v) is int and v >= 1)
RELATION = Rule("'less than' or 'at least'", lambda v: v in RELATIONS)
TEXT = Rule("a text that is not blank", _is_text)
TEXTS = Rule("a list of texts that are not blank", lambda v: isinstance(v, list) and v != [] and all(map(_is_text, v)))
CHARACTER = Rule("one character", lambda v: _is_text(v) and len(v) == 1)
LANGUAGE = Rule(
    "a language that langdetect knows: an ISO 639-1 code, zh-cn or zh-tw", lambda v: v in _language_detectors().langlist
)

INSTRUCTIONS: dict[str, tuple[Callable[..., bool], dict[str, Rule]]] = {
    "keywords:existence": (keywords_existence, {"keywords": TEXTS}),
    "keywords:frequency": (keywords_frequency, {"keyword": TEXT, "frequency": COUNT, "relation": RELATION}),
    "keywords:forbidden_words": (forbidden_words, {"forbidden_words": TEXTS}),
    "keywords:letter_frequency": (
        letter_frequency,
        {"letter": CHARACTER, "let_frequency": COUNT, "let_relation": RELATION},
    ),
    "language:response_language": (response_language, {"language": LANGUAGE}),
    "length_constraints:number_sentences": (number_sentences, {"num_sentences": COUNT, "relation": RELATION}),
    "length_constraints:number_paragraphs": (number_paragraphs, {"num_paragraphs": COUNT}),
    "length_constraints:number_words": (number_words, {"num_words": COUNT, "relation": RELATION}),
    "length_constraints:nth_paragraph_first_word": (
        nth_paragraph_first_word,
        {"num_paragraphs": COUNT, "nth_paragraph": POSITION, "first_word": TEXT},
    ),
    "detectable_content:number_placeholders": (number_placeholders, {"num_placeholders": COUNT}),
    "detectable_content:postscript": (postscript, {"postscript_marker": TEXT}),
    "detectable_format:number_bullet_lists": (number_bullet_lists, {"num_bullets": COUNT}),
    "detectable_format:constrained_response": (constrained_response, {}),
    "detectable_format:number_highlighted_sections": (number_highlighted_sections, {"num_highlights": COUNT}),
    "detectable_format:multiple_sections": (multiple_sections, {"section_spliter": TEXT, "num_sections": COUNT}),
    "detectable_format:json_format": (json_format, {}),
    "detectable_format:title": (title, {}),
    "combination:two_responses": (two_responses, {}),
    "combination:repeat_prompt": (repeat_prompt, {"prompt_to_repeat": TEXT}),
    "startend:end_checker": (end_checker, {"end_phrase": TEXT}),
    "startend:quotation": (quotation, {}),
    "change_case:capital_word_frequency": (
        capital_word_frequency,
        {"capital_frequency": COUNT, "capital_relation": RELATION},
    ),
    "change_case:english_capital": (english_capital, {}),
    "change_case:english_lowercase": (english_lowercase, {}),
    "punctuation:no_comma": (no_comma, {}),
}


def fault(instruction_id: object, kwargs: object) -> str | None:
    """What is wrong with an instruction and its keyword arguments, in a few words; None where nothing is."""
    if not isinstance(instruction_id, str) or instruction_id not in INSTRUCTIONS:
        return f"instruction id {instruction_id!r} must be one of {', '.join(INSTRUCTIONS)}"
    rules = INSTRUCTIONS[instruction_id][1]
    if not isinstance(kwargs, dict) or kwargs.keys() != rules.keys():
        given = sorted(kwargs) if isinstance(kwargs, dict) else repr(kwargs)
        return f"kwargs of {instruction_id} must be {sorted(rules)}, not {given}"
    for name, rule in rules.items():
        if not rule.holds(kwargs[name]):
            return f"{instruction_id}: {name} ({kwargs[name]!r:.80}) must be {rule.text}"
    return None


def follows(instruction_id: str, kwargs: dict, text: str) -> bool:
    """Whether `text` follows the instruction; a blank text follows none."""
    return text.strip() != "" and INSTRUCTIONS[instruction_id][0](text, **kwargs)


def loosened(text: str) -> list[str]:
    """The paper's eight readings of a response (section 2.2): as it is, and without its first line, its last line or both,
    each with and without asterisks; those that are equal are given once."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cut, *(reading.replace("*", "") for reading in cut)]))


def verdicts(instruction_ids: list[str], kwargs: list[dict], response: str) -> tuple[list[bool], list[bool]]:
    """Whether `response` follows each instruction, strictly and loosely.

    `kwargs` has one dictionary an instruction, as `fault` accepts them. Returns (follow_strict, follow_loose), each with one
    verdict an instruction; what is followed strictly is followed loosely. The prompt is followed when all of them are.
    """
    readings = loosened(response)
    pairs = list(zip(instruction_ids, kwargs, strict=True))
    strict = [follows(name, arguments, response) for name, arguments in pairs]
    loose = [
        followed or any(follows(name, arguments, reading) for reading in readings)
        for (name, arguments), followed in zip(pairs, strict, strict=True)
    ]
    return strict, loose
