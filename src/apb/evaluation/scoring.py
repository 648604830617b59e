"""Scores of a prediction, 0 to 100, by name: our own, and those of RULER, InfiniteBench and LongBench v2."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, answers) -> 0 to 100."""

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"  # noqa: RUF001
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
WIDE_COMMA = "\uff0c"
WORD = re.compile(r"\w")
# Thai to Myanmar, Hangul, Khmer, kana, Han.
SPACELESS = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u318f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af]"
)
# Digits in groups of three; not after another group or a point, and not before a group of another size.
GROUPED = re.compile(
    "(?<![0-9])(?<![0-9][.,])[0-9]{1,3}([,'\u2019\u00a0\u2009\u202f])[0-9]{3}(?:\\1[0-9]{3})*(?!\\1?[0-9])"
)
FRACTION = re.compile(r"\.\d")
FRACTION_AFTER = re.compile(r"\d\.$")
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+\.\d+|\d+")


def words(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction as whole words or numbers, regardless of spelling variants.

    Case, the encoding of accents and wide characters, and separators between thousands are ignored. In scripts without
    spaces between words, and in Korean, whose particles are joined to words, an answer may occur anywhere.
    """
    text = _plain(prediction)
    found = [_stands_alone(_plain(answer), text) for answer in answers]
    return 100.0 * sum(found) / len(found)


def _plain(text: str) -> str:
    """Normalize spelling variants: lower case, composed accents, ordinary widths, 1,234 as 1234."""
    # Not NFKC alone, which turns 10² into 102; and a wide comma separates clauses, not groups of digits.
    wide = {char for char in set(text) if unicodedata.decomposition(char).startswith(("<wide>", "<narrow>"))} - {
        WIDE_COMMA
    }
    text = text.translate({ord(char): unicodedata.normalize("NFKC", char) for char in wide})
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return GROUPED.sub(lambda number: number[0].replace(number[1], ""), text)


def _stands_alone(answer: str, text: str) -> bool:
    """True if the answer occurs in the text and is not part of a longer word or number there."""
    place = text.find(answer)
    while place >= 0:
        before, after = text[:place], text[place + len(answer) :]
        if not (
            _goes_on(answer[:1], before[-1:])
            or _goes_on(answer[-1:], after[:1])
            or unicodedata.category(after[:1] or " ").startswith("M")  # an accent, a vowel: another letter
            or (answer[:1].isdigit() and FRACTION_AFTER.search(before))
            or (answer[-1:].isdigit() and FRACTION.match(after))
        ):
            return True
        place = text.find(answer, place + 1)
    return False


def _goes_on(end: str, neighbour: str) -> bool:
    """True if ``neighbour``, the character next to a word's ``end`` ("" for none), continues the word."""
    if end.isdigit() and neighbour.isdigit():
        return True
    return bool(WORD.match(neighbour)) and not SPACELESS.match(end) and not SPACELESS.match(neighbour)


# -- RULER (arXiv 2404.06654), scripts/eval ------------------------------------------------------------------------


def ruler_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: share of the answers that occur in the prediction as strings, ignoring case."""
    found = _ruler_found(prediction, answers)
    return 100.0 * sum(found) / len(found)


def ruler_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: 100 if any of the answers occurs in the prediction."""
    return 100.0 * any(_ruler_found(prediction, answers))


def _ruler_found(prediction: str, answers: Sequence[str]) -> list[bool]:
    # Control characters become line breaks first, so a tab inside an answer's words is no match.
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]


# -- InfiniteBench (arXiv 2402.13718), src/compute_scores.py -------------------------------------------------------


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """100 if the first run of digits is the answer (PassKey, Number)."""
    found = re.search(r"[0-9]+", prediction)
    return 100.0 * (found is not None and found[0] == answers[0])


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """100 if the first number has the answer's value (Math.Find).

    If the answer is whole, a number with decimals is wrong (InfiniteBench's own script stops with an error there).
    """
    found = NUMBER.search(prediction)
    if found is None or ("." in found[0] and "." not in answers[0]):
        return 0.0
    return 100.0 * (float(found[0]) == float(answers[0]))


def among_words(prediction: str, answers: Sequence[str]) -> float:
    """100 if the answer is one of the prediction's words (KV)."""
    return 100.0 * (answers[0] in _spaced(prediction, "\n:\"'.,?!{}").split())


def name_among_words(prediction: str, answers: Sequence[str]) -> float:
    """100 if the first answer, in capitals, is one of the prediction's words (En.Dia)."""
    return 100.0 * (answers[0] in _spaced(prediction, "\n:\"'.,?!{}").upper().split())


def chosen_option(prediction: str, answers: Sequence[str]) -> float:
    """100 if the option (answers: its text, its letter) is named (En.MC).

    The first letter decides, else what follows a phrase such as "answer is", else the first word of A, B, C and D.
    """
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return 100.0 * (text[0] in answers)
    if text in answers:
        return 100.0
    text = _single_spaces(_spaced(text, "\n\"'.,?!{}"))
    after = _after_phrase(text, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return 100.0 * after.startswith(tuple(answers))
    # A word is any run of these letters in order, so "AB" counts as one.
    named = next((word for word in text.split() if word in "ABCD"), None)
    return 100.0 * (named in answers)


def named_function(prediction: str, answers: Sequence[str]) -> float:
    """100 if the function (answers: its name, its letter) is named, at the start or after a phrase (Code.Debug)."""
    name, letter = answers[0], answers[1]
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 100.0
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    after = _after_phrase(_single_spaces(text), ("answer is:", "is:", "answer:", "correct option is:"))
    return 100.0 * (after is not None and after.startswith((letter, name)))


def english_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of words over the answers, without case, punctuation and articles (En.QA)."""
    return 100.0 * max(_f1(_english(prediction), _english(answer)) for answer in answers)


def chinese_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of characters over the answers, without punctuation and space (Zh.QA)."""
    return 100.0 * max(_f1(_chinese(prediction), _chinese(answer)) for answer in answers)


def summary(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum F1, the best over the answers: sentences are lines, no stemming (En.Sum)."""
    return 100.0 * max(rouge_lsum(prediction, answer) for answer in answers)


def rouge_lsum(prediction: str, reference: str) -> float:
    """ROUGE-L of summaries (Lin 2004): union of longest common subsequences per line; F1, 0 to 1."""
    said, wanted = _lines(prediction), _lines(reference)
    sizes = sum(map(len, said)), sum(map(len, wanted))
    if not all(sizes):
        return 0.0
    left, right = Counter(word for line in said for word in line), Counter(word for line in wanted for word in line)
    hits = 0
    for line in wanted:
        for place in sorted(set().union(*(_common(line, other) for other in said))):
            word = line[place]
            if left[word] > 0 and right[word] > 0:
                hits += 1
                left[word] -= 1
                right[word] -= 1
    precision, recall = hits / sizes[0], hits / sizes[1]
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _lines(text: str) -> list[list[str]]:
    return [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line]


def _common(first: list[str], second: list[str]) -> set[int]:
    """Indices in `first` of a longest common subsequence: of several, the one found by ROUGE's own backtracking."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
    places, row_at, column_at = set(), len(first), len(second)
    while row_at and column_at:
        if first[row_at - 1] == second[column_at - 1]:
            row_at, column_at = row_at - 1, column_at - 1
            places.add(row_at)
        elif table[row_at][column_at - 1] > table[row_at - 1][column_at]:
            column_at -= 1
        else:
            row_at -= 1
    return places


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def _english(text: str) -> list[str]:
    kept = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def _chinese(text: str) -> list[str]:
    kept = "".join(mark for mark in text.lower() if mark not in string.punctuation + CHINESE_PUNCTUATION)
    return list("".join(kept.split()))


def _spaced(text: str, marks: str) -> str:
    return text.strip().translate({ord(mark): " " for mark in marks})


def _single_spaces(text: str) -> str:
    return re.sub(" +", " ", text)


def _after_phrase(text: str, phrases: tuple[str, ...]) -> str | None:
    """The text after the first of the phrases that occurs, less one character (a space); None if none occurs.

    Empty for a prediction that ends with the phrase.
    """
    for phrase in phrases:
        place = text.find(phrase)
        if place >= 0:
            return text[place + len(phrase) + 1 :]
    return None


# -- LongBench v2 (arXiv 2412.15204), pred.py ----------------------------------------------------------------------


def stated_letter(prediction: str, answers: Sequence[str]) -> float:
    """100 if the prediction says "The correct answer is (A)" of the right letter, or the same without brackets.

    Asterisks do not count. The first such sentence with brackets decides, else the first without.
    """
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return 100.0 * (found is not None and found[1] == answers[0])


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        words,
        ruler_all,
        ruler_part,
        first_integer,
        first_number,
        among_words,
        name_among_words,
        chosen_option,
        named_function,
        english_f1,
        chinese_f1,
        summary,
        stated_letter,
    )
}
"""All metrics by name."""
