"""The last final answer that a text states, as an exact number.

An answer is stated by one of

    #### 18                  <answer>18</answer>        \\boxed{18}
    A: 18 (starts a line)    The answer is 18.          Final answer: 18

in any mix. Numbers may have a sign, a currency, separators of thousands (commas, spaces, 1'000, 1_000), decimals, a unit,
Markdown or LaTeX around them, and may be fractions (3/4, 1 1/2, \\frac{3}{4}, ¾). All are read as exact
fractions, none is rounded.

- Of an equation, `3 * 6 = 18`, the last side that is a number counts; nothing is computed.
- Several numbers where one is due (`3 or 4`, `3 to 4`, `3:4`, `3 4`, `3 | 4`, `3 (or 4)`, `5 * 6`, `5 times 6`,
  `5 feet 6 inches`, `3 and a half`, `9 eggs at $2, which is $18`, `4.5, so 5 boxes`) state no answer that could be graded:
  unparseable.
- A remark does not take the place of a statement: after `#### 18` or `The answer is 18`, a later `This answer is right, as
  there are 7 days` changes nothing. Its number counts only where nothing else is stated.
- A statement without a number (`#### none`, `The answer is not 18`) is none, and the one before it counts.
- `#### 2. Find the price` with text on the lines below is a numbered heading, not an answer. Among words (`#### Total: 18`)
  a number counts only where no text is below.
- Units other than percent and number words are not looked at, let alone converted.
"""

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

MAX_STATEMENT = 240  # characters looked at after a marker
MAX_STATEMENTS = 1000  # markers looked at, from the end
MAX_DIGITS = 40
# What announces a final answer. Every repetition is bounded or possessive, so that a scan is linear in the text.
MARKER = re.compile(
    r"(?P<heading>(?m:^)[#*_ ]{1,8}+(?:final )?answers?[*_ ]{0,4}+\n)"
    r"|(?P<hash>#{4,}+)"
    r"|(?P<box>\\(?:boxed|fbox) ?\{)"
    r"|(?P<tag><answer>)"
    r"|(?P<line>(?m:^)[ \t>*_]{0,8}+A[*_]{0,2} ?:)"
    r"|(?P<words>\banswers?\b(?: {1,3}(?:to|for|of|in) [^.:=\n]{0,80}?| \([^()\n]{0,40}\)|, [a-z ]{1,20},"
    r"| (?:I|we|you) [a-z]{1,12}(?: [a-z]{1,12})?)?[ *_]{0,4}"
    r"(?:[:=]|[-–—](?= )"
    r"|\b(?:is|are|was|equals|becomes|(?:will|would|should|must|to) be|comes(?: out)? to)\b(?!n['’]t)(?: ?:)?))",
    re.IGNORECASE,
)
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_DASHES = dict.fromkeys(map(ord, "−–‐‑‒﹣⁻"), "-")
_SPACES = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F], " ")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"), "")
_VULGAR = {
    ord(sign): f" {fraction} "
    for fraction, sign in {
        **{"1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾", "1/5": "⅕", "2/5": "⅖", "3/5": "⅗", "4/5": "⅘"},
        **{"1/6": "⅙", "5/6": "⅚", "1/7": "⅐", "1/8": "⅛", "3/8": "⅜", "5/8": "⅝", "7/8": "⅞", "1/9": "⅑", "1/10": "⅒"},
    }.items()
}
CHARACTERS = {**_FULL_WIDTH, **_DASHES, **_SPACES, **_INVISIBLE, **_VULGAR, ord("⁄"): "/", ord("∕"): "/", ord("≈"): "="}
# LaTeX and Markdown around a number, in this order.
MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]{0,100}>>", ""),  # GSM8K's calculator annotations
        (r"\{,\}|,\\!", ","),
        (r"(?<=[0-9])['’_](?=[0-9]{3}(?![0-9]))", ","),
        (r"(?<=[0-9])/-(?![0-9])", ""),  # rupees: 500/-
        (r"\\!", ""),
        (r"\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z])", "="),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox|textit) ?\{([^{}]{0,60})\}", r" \1 "),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac ?\{ ?(-?[0-9]{1,40}) ?\} ?\{ ?([0-9]{1,40}) ?\}", r" \1/\2 "),
        (r"\\frac ?([0-9])([0-9])(?![0-9])", r" \1/\2 "),
        (r"\^ ?\{? ?\\circ ?\}?|°", " "),
        (r"\\(?:left|right|displaystyle|quad|qquad|bf)(?![a-zA-Z])", " "),
        (r"\\([$%#&])", r"\1"),
        (r"\\[()\[\]]", " "),
        (r"\\[,;: ]|~", " "),
        (r"\*\*|__|`", ""),
        (r"[ \t]+", " "),
    )
]
OPENING = re.compile(r"(?:\s|\\[(\[]|[*_$:])*+")
LEAD = re.compile(
    r"(?:[-=]>|[\s*_:=({\[\"'“‘→⇒]|(?:approximately|about|around|exactly|simply|just|therefore|thus|indeed|now|only|roughly"
    r"|equal to|a total of|therefore)\b[,:]?)*+",
    re.IGNORECASE,
)
CURRENCY = r"(?:(?:US|A|C)?\$|[€£¥₹₽₩₱]|(?:USD|EUR|GBP|INR|Rs\.?|PHP)(?![a-zA-Z]))"
DIGITS = (
    rf"(?:[0-9]{{1,3}}(?:,[0-9]{{2,3}}){{0,12}},[0-9]{{3}}(?![0-9])|[0-9]{{4,7}}(?:,[0-9]{{3}}){{1,12}}(?![0-9])"
    rf"|[0-9]{{1,3}}(?: [0-9]{{3}}){{1,12}}(?![0-9]|/|,[0-9])"
    rf"|[0-9]{{1,{MAX_DIGITS}}})"
)
SIGN = r"(?:[-+] ?|(?:minus|negative) )"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})?(?:{CURRENCY} ?)*(?P<inner>{SIGN})?(?:"
    rf"(?P<whole>[0-9]{{1,{MAX_DIGITS}}})(?: {{1,3}}| ?-| and )"
    rf"(?P<part>[0-9]{{1,{MAX_DIGITS}}}) ?/ ?(?P<parts>[0-9]{{1,{MAX_DIGITS}}})"
    rf"|(?P<above>{DIGITS}) ?/ ?(?P<below>{DIGITS})"
    rf"|(?P<plain>{DIGITS}(?:\.[0-9]{{1,{MAX_DIGITS}}})?|\.[0-9]{{1,{MAX_DIGITS}}})"
    r")",
    re.IGNORECASE,
)
SCALES = {
    "percent": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(10**3),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
SCALE = re.compile(
    r"[ )}\]*$]{0,4}(?:(?P<percent>%|per ?cent(?:age)?(?: points?)?\b)"
    r"|(?P<word>dozen|hundred|thousand|million|billion|trillion)s?\b)",
    re.IGNORECASE,
)
# Words after which another number explains the first one, and those after which it says when or where.
REASON = r"(?:because|since|as|so|not|if|where|when|given|using)\b"
PLACE = r"(?:from|in|at|on|for|after|before|over|by|with|during|within|every|each)\b"
HEDGE = r"(?:or|and|maybe|perhaps|possibly|probably|either|vs|versus|alternatively|then|rather|else)\b"
ANOTHER = rf"(?:{HEDGE}[ ,.]{{0,2}}){{0,3}}(?:{CURRENCY} ?)?-?[0-9][0-9,]{{0,40}}+(?:\.[0-9]{{1,40}}+)?"
# What may not follow a number that is to stand for itself: more digits, an operator, a power, another number.
# `18 dollars, or 1800 cents` is one amount in two units.
CONTINUED = re.compile(
    r"[0-9⁰¹²³⁴⁵⁶⁷⁸⁹]|[.,:'’_][0-9]|e[-+]?[0-9]|[kKMB](?![a-zA-Z0-9])|x(?![a-zA-Z])"
    r"|\*[\w$(\\]| \*+ ?[\w$(\\]|[)}\]$ ]{0,4}(?:[+^×÷·=>√π]|<(?![|/])|/(?! ?[a-zA-Z])|-(?= ?[0-9$(]))"
    r"|\.{2,4}[0-9]| ?\\(?!n\b)[a-zA-Z]| x [0-9]"
    r"| (?:hours?|hrs?|minutes?|min|dollars?|feet|foot|ft|pounds?|lbs?|years?|months?|weeks?|days?) [0-9]"
    r"| [a-zA-Z]{1,15} ?[-*×÷+=/] ?[$0-9]"
    rf"|[ \t?!|→⇒±…\\]{{1,8}}{ANOTHER}(?! ?[-+*/×÷=^x])|[ .?\n]{{1,8}}{ANOTHER}(?! ?[-+*/×÷=^x]| [a-zA-Z])"
    rf"| ?[(\[{{] ?{ANOTHER}\?? ?[)\]}}]| ?-+> ?{ANOTHER}"
    rf"| ?(?!{REASON}|{PLACE})[a-zA-Z]{{1,15}}[ \n]{{1,3}}(?:{CURRENCY} ?)?[0-9]| ?(?:hrs?|min|sec|yds?|ft|lbs?|oz)\. [0-9]"
    r"|[^0-9\n.]{0,40}\b(?:maybe|perhaps|possibly|alternatively|versus)\b[^0-9\n]{0,15}[0-9]"
    r"| (?:[a-zA-Z]{2,15} )?(?:(?:divided|multiplied) by|(?:more|less|fewer|greater|larger|smaller|higher) than) [$0-9]"
    r"| (?:squared|cubed)(?! [a-z])| and (?:a |one )?(?:half|third|quarter)\b| (?:ten|hundred|thousand|million)ths?\b"
    r"| (?:lakh|crore)s?\b"
    rf"|(?: (?!{REASON})[$a-zA-Z0-9.%]{{1,20}}){{1,12}} ?="  # 3 boxes of 6 eggs = 18
    rf"|(?! ?(?P<unit>[a-zA-Z]{{2,15}}),? or {CURRENCY}?[0-9][0-9,.]{{0,30}} (?!(?P=unit)\b)[a-zA-Z])"
    rf" ?[a-zA-Z]{{0,15}}(?: ?[,;&] ?| and | or |-or-| to )(?:and |or )?{CURRENCY}?-?[0-9]",
)
# Between a number and another one that the sentence puts in its place, where no reason is given in between.
REPLACED = re.compile(
    r"(?:(?!\b(?:because|since|as|if|when|where|given|using|not)\b)(?:[^\n.?!=(]|\.(?=[0-9]))){0,60}?"
    r"(?:\b(?:which (?:is|makes|comes to)|so|for a total of|half of which is)\b"
    r"|\(?\bround(?:s|ed)(?: up| down)? (?:to|is)\b)"
    rf"[^\n.?!=(0-9]{{0,30}}?(?={SIGN}?{CURRENCY}?\.?[0-9])",
    re.IGNORECASE,
)
# After that other one: it says how large the first is, or how exact.
DESCRIBING = re.compile(r" ?(?:%|(?:percent|times|more|less|fewer|out|of|decimals?|significant|places|digits)\b)")
# What may not stand between a marker and a number further on.
NOT_PROSE = re.compile(
    r"\b(?:not|never|neither|nor|cannot|between|than|least|most|from|if)\b|n['’]t\b|\\[a-zA-Z]|[*+/^×÷·√<>≤≥]"
    r"|\b(?:half|twice|thrice|double|triple|third|quarter)(?: of)? ?\Z"
    r"|\b(?:step|part|case|method|example|problem|question|section) ?\Z",
    re.IGNORECASE,
)
PROSE = ("heading", "words")  # markers after which the number may stand among words
BRACKETS = re.compile(rf"\((?!{HEDGE})[^()\n]{{0,80}}\)")
# How the words after `the answer is` begin where they are the answer, and not a remark on it.
DIRECT = re.compile(
    rf"(?:{LEAD.pattern})(?:[-+$€£¥₹(\\.]|[0-9]|{CURRENCY}|[a-zA-Z]{{1,20}} ?=|that\b|minus\b|negative\b)", re.IGNORECASE
)
CHECKING = re.compile(
    r"\b(?:verify|check|confirm|explain|justify|prove|test)(?:ing)?(?: [a-z]{1,10}){0,2} \Z", re.IGNORECASE
)
SENTENCE_END = re.compile(r"(?<!\bRs)[.!?](?=\s|$)|\n")
HEADING = re.compile(r" ?[0-9]{1,2}[.):] {1,3}[A-Za-z][^\n]{0,200}\n\s{0,20}\S")


@dataclass(frozen=True)
class Value:
    """An exact number and the word that scales it: percent, million, ..., or none."""

    number: Fraction
    scale: str | None = None

    def __str__(self) -> str:
        number = written(self.number)
        if self.scale is None:
            return number
        return f"{number}%" if self.scale == "percent" else f"{number} {self.scale}"


def written(number: Fraction) -> str:
    """As data sets and people write it: a decimal where that ends within MAX_DIGITS places, else a fraction."""
    places = next((n for n in range(MAX_DIGITS + 1) if 10**n % number.denominator == 0), 0)
    if places == 0:
        return str(number)
    digits = str(abs(int(number * 10**places))).rjust(places + 1, "0")
    return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"


class Ambiguous(Exception):
    """A statement that has a number which is not one answer."""


def _digits(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _read(found: re.Match) -> Fraction | None:
    """The number that NUMBER matched; None for a division by zero."""
    if found["parts"] is not None:
        above, below = _digits(found["whole"]) * _digits(found["parts"]) + _digits(found["part"]), _digits(found["parts"])
    elif found["below"] is not None:
        above, below = _digits(found["above"]), _digits(found["below"])
    else:
        above, below = _digits(found["plain"]), Fraction(1)
    if below == 0:
        return None
    minus = sum((sign or "").strip().lower() in ("-", "minus", "negative") for sign in (found["sign"], found["inner"]))
    return above / below * (-1) ** minus


def _value(text: str, start: int) -> Value | None:
    """The value that begins at `start`, where nothing after it makes it part of something else; None where none begins.

    Raises Ambiguous where a number does begin there but does not stand for itself.
    """
    found = NUMBER.match(text, start)
    if found is None:
        return None
    number = _read(found)
    scale = SCALE.match(text, found.end())
    end = scale.end() if scale else found.end()
    if number is None or CONTINUED.match(text, end) or _is_replaced(number, text, end):
        raise Ambiguous
    if scale is None:
        return Value(number)
    return Value(number, "percent" if scale["percent"] else scale["word"].lower())


def _is_replaced(number: Fraction, text: str, end: int) -> bool:
    """Whether the sentence goes on from `number`, which ends at `end`, to another one that takes its place."""
    found = REPLACED.match(text, end)
    other = NUMBER.match(text, found.end()) if found else None
    return other is not None and _read(other) != number and DESCRIBING.match(text, other.end()) is None


def _plain(text: str) -> str:
    """`text` without the LaTeX and Markdown around its numbers, and with plain signs for unicode's variants."""
    text = text.translate(CHARACTERS)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _first(text: str) -> Value | None:
    return _value(text, LEAD.match(text).end())


def read_clause(text: str, prose: bool) -> Value | None:
    """The one number that a clause states; None where it has none.

    The number comes first, or is the last side of an equation that is a number; with `prose` it may also be the only
    number among words, but for those in brackets behind it. Raises Ambiguous where it begins with a number that is not one
    answer.
    """
    text = _plain(text)
    try:
        value = _first(text)
        if value is not None:
            return value
        ambiguous = False
    except Ambiguous:
        ambiguous = True
    sides = text.split("=")
    for side in reversed(sides if len(sides) > 1 else []):
        try:
            value = _first(side)
        except Ambiguous:
            continue
        if value is not None:
            return value
    if ambiguous:
        raise Ambiguous
    found = NUMBER.search(text) if prose else None
    if (
        found is None
        or NUMBER.search(BRACKETS.sub("", text[found.end() :]))
        or NOT_PROSE.search(text, 0, found.start())
        or text[max(found.start() - 1, 0) : found.start()].isalnum()
    ):
        return None
    try:
        return _value(text, found.start())
    except Ambiguous:
        return None


def _closing_brace(text: str) -> int | None:
    """Where the brace that was opened just before `text` is closed."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return i
    return None


def _statement(marker: re.Match, text: str, end: int) -> Value | None:
    """What `marker` announces in text[marker.end() : end]; raises Ambiguous as read_clause does."""
    kind, after = marker.lastgroup, text[marker.end() : min(end, marker.end() + MAX_STATEMENT)]
    if kind == "tag":
        close = after.lower().find("</answer>")
        return None if close < 0 else read_clause(after[:close], prose=True)
    if kind == "box":
        close = _closing_brace(after)
        if close is None:
            return None
        scale = SCALE.match(_plain(after[close + 1 : close + 30]))
        return read_clause(after[:close] + (" " + scale.group().strip() if scale else ""), prose=True)
    if kind == "hash" and HEADING.match(after):
        return None
    after = after[OPENING.match(after).end() :]
    line, _, below = after.partition("\n")
    if kind in PROSE:
        return read_clause(SENTENCE_END.split(after, maxsplit=1)[0], prose=True)
    return read_clause(line, prose=kind == "hash" and not below.strip())


def _is_remark(marker: re.Match, text: str) -> bool:
    """Whether what follows `marker` is said about an answer (`is right, as there are 7 days`) rather than the answer."""
    if marker.lastgroup != "words":
        return False
    if CHECKING.search(text, max(0, marker.start() - 40), marker.start()):
        return True
    clause = text[marker.end() : marker.end() + MAX_STATEMENT]
    return not marker.group().endswith((":", "=")) and not DIRECT.match(_plain(clause[OPENING.match(clause).end() :]))


def final_answer(response: str) -> Value | None:
    """The last final answer that `response` states; None where there is none, or the last one is not one number.

    Where there are remarks alone, the number in the last of them.
    """
    markers = deque(MARKER.finditer(response), maxlen=MAX_STATEMENTS)
    end, remarked = len(response), None
    for marker in reversed(markers):
        is_remark = _is_remark(marker, response)
        try:
            value = _statement(marker, response, end)
        except Ambiguous:
            if is_remark:
                continue
            return remarked
        if value is not None and not is_remark:
            return value
        remarked = remarked or value
        end = marker.start()
    return remarked
