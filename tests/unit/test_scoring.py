"""Scores: what one counts by hand with the rules of RULER, InfiniteBench and LongBench v2."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apb.evaluation.scoring import METRICS, rouge_lsum


def check(metric: str, prediction: str, answers: Sequence[str], expected: float) -> None:
    assert METRICS[metric](prediction, answers) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "every", "some"),
    [
        ("They are 12, 34 and 56.", ["12", "34", "56"], 100, 100),
        ("It is 12.", ["12", "34"], 50, 100),
        ("5123", ["12", "99"], 50, 100),  # strings, not words
        ("WILLOW", ["willow"], 100, 100),
        ("", ["12"], 0, 0),
        ("a\tb", ["a\tb"], 0, 0),  # control characters of a prediction become line breaks
        ("a\x07b", ["a\nb"], 100, 100),
        ("New York City", ["york", "boston", "new"], 200 / 3, 100),
    ],
)
def test_ruler(prediction, answers, every, some):
    """string_match_all: share of the answers that occur; string_match_part: whether one does. Cases do not matter."""
    check("ruler_all", prediction, answers, every)
    check("ruler_part", prediction, answers, some)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is Willow, not oak.", ["willow", "oak"], 100),
        ("71432", ["7143", "1432", "71432"], 100 / 3),  # neither the beginning nor the end of a word is one
        ("a-7", ["7", "b"], 50),
        ("", ["7"], 0),
        ("snake_case, f(x)", ["snake", "(x)"], 0),
        # Scripts without spaces between words, and Korean with its particles.
        ("答案是北京市。", ["北京"], 100),
        ("合言葉は「ひまわり」でした", ["ひまわり"], 100),
        ("パスワードはヒマワリです。", ["ヒマワリ"], 100),
        ("정답은 서울입니다.", ["서울"], 100),
        ("คำตอบคือสีแดงครับ", ["สีแดง"], 100),
        ("ຄໍາຕອບແມ່ນສີແດງ", ["ສີແດງ"], 100),
        ("答案是上海", ["北京"], 0),
        ("正解は42です。42번입니다", ["42"], 100),
        ("答えはParisです", ["Paris", "Par", "aris"], 100 / 3),
        ("คำตอบคือนี้", ["น"], 0),  # its vowel makes it another syllable
        # Numbers: separators of thousands, and what is inside a longer one.
        ("1,234", ["1234", "234", "1", "1,234"], 50),
        ("It is 1234567.", ["1,234,567", "1'234'567", "1\u202f234\u202f567", "1\u00a0234\u00a0567"], 100),
        ("1,234.5", ["1234.5", "1234", "5"], 100 / 3),
        ("12,34,56", ["12", "34", "56", "1234"], 75),  # groups of two: a list
        ("1,2345 and 1234,567", ["1", "2345", "1234", "567"], 100),
        ("123, 456", ["123", "456", "123456"], 200 / 3),
        ("It is 3.5", ["3", "5", "3.5"], 100 / 3),
        ("It is 3. 5 is not.", ["3", "5"], 100),
        ("4\uff12 and \uff11,\uff12\uff13\uff14", ["42", "2", "1234"], 200 / 3),
        ("答えは\uff13\uff15、12\uff0c345", ["35", "12", "345", "12345"], 75),
        ("٤٢ and ๔๒", ["٤", "๒", "٤٢", "๔๒"], 50),
        ("10²", ["102", "10"], 0),
        # One spelling of accents and of widths.
        ("caf\u00e9", ["cafe\u0301", "cafe", "CAFE\u0301"], 200 / 3),
        ("Cafe\u0301 Zoe\u0308.", ["caf\u00e9", "zo\u00eb", "zoe"], 200 / 3),
        ("ｶﾞﾗｽ and \uff21\uff11", ["ガラス", "a1"], 100),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", ["한글"], 100),
    ],
)
def test_words(prediction, answers, expected):
    """Share of the answers that stand in the prediction as whole words."""
    check("words", prediction, answers, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("71432.", "71432", 100), ("It is 71432, not 5", "71432", 100), ("5 or 71432", "71432", 0), ("none", "1", 0)],
)
def test_first_integer(prediction, answer, expected):
    check("first_integer", prediction, [answer], expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("88\nThe smallest is 1", "88", 100),
        ("It is 088", "88", 100),  # by value
        ("1, 88", "88", 0),
        ("47.5", "47.5", 100),
        ("47", "47.0", 100),
        ("88.0", "88", 0),  # InfiniteBench's own script fails on this one
        ("-3", "3", 100),  # signs are not read
        ("no idea", "3", 0),
    ],
)
def test_first_number(prediction, answer, expected):
    check("first_number", prediction, [answer], expected)


def test_among_words():
    check("among_words", 'Key: "5e6b-90".', ["5e6b-90"], 100)
    check("among_words", "5e6b-90x", ["5e6b-90"], 0)
    check("among_words", "5E6B-90", ["5e6b-90"], 0)


def test_name_among_words():
    """Only the first answer counts, in capitals, and only as one word."""
    check("name_among_words", "Ace Rothstein, I think", ["ACE", "ACE ROTHSTEIN"], 100)
    check("name_among_words", "rothstein", ["ACE", "ROTHSTEIN"], 0)
    check("name_among_words", "ACE ROTHSTEIN", ["ACE ROTHSTEIN"], 0)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("C", 100),
        ("C. Snowfield", 100),
        ("A Snowfield", 0),
        ("Snowfield", 100),
        ("Dear reader, the answer is C", 0),  # begins with the letter of option D
        ("dear reader, the answer is: C.", 100),
        ("i say: answer is Snowfield", 100),
        ("the answer is: B, not C", 0),
        ("well, my answer:", 0),
        ("it may be C or A", 100),
        ("it may be A or C", 0),
        ("no letter here", 0),
        ("", 0),
    ],
)
def test_chosen_option(prediction, expected):
    check("chosen_option", prediction, ["Snowfield", "C"], expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("C.", 100),
        ("C: load", 100),
        ("C", 0),  # neither at once with a mark, nor after a phrase
        ("The answer is: C", 100),
        ("The answer is: `load`", 100),
        ("The correct option is: loader", 100),
        ("answer is: B", 0),
        ("The answer is:", 0),
    ],
)
def test_named_function(prediction, expected):
    check("named_function", prediction, ["load", "C"], expected)


def test_english_f1():
    """Words without case, punctuation and articles: two of three and two of two give 0.8; the best answer counts."""
    check("english_f1", "The old lighthouse, Maud!", ["lighthouse Maud"], 80)
    check("english_f1", "The old lighthouse, Maud!", ["a cat", "the old lighthouse Maud"], 100)
    check("english_f1", "a dog a dog", ["dog"], 200 / 3)
    check("english_f1", "", ["dog"], 0)


def test_chinese_f1():
    """Characters without punctuation: two of three said, two of two wanted."""
    check("chinese_f1", "胡一刀。", ["胡 刀"], 80)
    check("chinese_f1", "马", ["胡"], 0)


def test_rouge_lsum():
    """Lines are sentences; a line's words count once they stand in a longest common subsequence with any line."""
    assert rouge_lsum("the cat sat", "the cat sat") == 1.0
    # Wanted: a b c d | e. Said: b d | a c. Unions: {b, d} and {a, c} of the first line, nothing of the second.
    assert rouge_lsum("b d\na c", "a b c d\ne") == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    # Of the two subsequences of "a b" and "b a" ROUGE takes "a": with the second line that is one word of three said.
    assert rouge_lsum("b a\na", "a b") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    # Words that are said once count once.
    assert rouge_lsum("a", "a\na") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge_lsum("", "a") == rouge_lsum("x", "a") == rouge_lsum("\n", "\n") == 0.0
    check("summary", "The Cat!", ["a dog", "the cat"], 100)


def test_rouge_is_that_of_the_library():
    """The same numbers as rouge_score, on which InfiniteBench's own script rests, where it is installed."""
    # It comes with lm-evaluation-harness alone, which the tests' extra leaves out for its size.
    library = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    scorer = library.RougeScorer(["rougeLsum"], use_stemmer=False)
    texts = ["The old man\nand the sea, the sea.", "A man saw the sea\nold and grey", "sea", "the\nthe the old\nman."]
    for said in texts:
        for wanted in texts:
            assert rouge_lsum(said, wanted) == pytest.approx(scorer.score(wanted, said)["rougeLsum"].fmeasure)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_0_to_100(name):
    """Nonsense is scored, not refused."""
    for prediction in ("", "\x00", "A", "…", "7" * 400):
        assert 0 <= METRICS[name](prediction, ["x1", "A"] if name != "first_number" else ["1"]) <= 100


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The correct answer is (C).", 100),
        ("Sure. **The correct answer is (C) Maud**", 100),
        ("The correct answer is C", 100),
        ("The correct answer is A. No: The correct answer is (C)", 100),  # brackets go first
        ("The correct answer is (A). The correct answer is (C)", 0),
        ("The correct answer is (E)", 0),
        ("the correct answer is (C)", 0),
        ("C", 0),
        ("", 0),
    ],
)
def test_letters_that_are_stated(prediction, expected):
    """LongBench v2: nothing but its own sentence counts."""
    check("stated_letter", prediction, ["C"], expected)
