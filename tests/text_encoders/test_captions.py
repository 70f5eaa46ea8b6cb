"""Cleaning of captions: each rule by example, all of them beside the pipelines that publish them."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagen_kit.errors import KitError
from imagen_kit.text_encoders.captions import RULES, cleaned
from imagen_kit.text_encoders.t5 import T5TextEncoder

# What is given to each rule, in their order, and what it makes of it; the last of a row it leaves alone.
EXAMPLES: list[list[tuple[str, str]]] = [
    [("a%20star+b", "a star b"), ("%C3%A9t%C3%A9", "été"), ("100 % star", "100 % star")],
    [("  A Red\n", "a red"), ("ÉTÉ", "été"), ("a star", "a star")],
    [("<person> runs", "person runs"), ("<person><person>", "personperson"), ("<people>", "<people>")],
    [
        ("see https://a.com/b-c/ now", "see  now"),
        ("x.y.org it", " it"),
        ("a@b.com.au", "a@.au"),
        ("a.zip", "a.zip"),
    ],
    [("www:/a", "a"), ("www:star", "tar"), ("www.b.co.uk", ".uk"), ("www a", "www a")],
    [("a <b>red</b> star", "a red star"), ("x<!-- y -->&lt;z", "x<z"), ("a star", "a star")],
    [("by @painter_1!", "by !"), ("@Анна и", " и"), ("a @ b", "a @ b")],
    [("a 红色 star", "a  star"), ("㇀ㇰ㈀㌀㐀䷀一鿿", ""), ("カタカナ 한글", "カタカナ 한글")],
    [("a–b——c", "a-b-c"), ("a〜b－c-d", "a-b-c-d"), ("a_b", "a_b")],
    [("«a» “b”", '"a" "b"'), ("`´¨", '"""'), ("'a\"", "'a\"")],
    [("‘a’", "'a'"), ("it’s", "it's"), ("a,b", "a,b")],
    [("&quot;a&quot", "a"), ("a &amp; b&amp", "a ; b"), ("a & b", "a & b")],
    [("at 192.168.0.1", "at  "), ("1.2.3.4.5", " .5"), ("1.2.3", "1.2.3")],
    [("a 12:34  ", "a 1"), ("3:45\n", ""), ("3:45", "3:45")],
    [(r"a\nb", "a b"), (r"\n\n", "  "), ("a\nb", "a\nb")],
    [("star #1 #123", "star  "), ("#12345 a", " a"), ("#1234", "#1234")],
    [("123456 a", " a"), ("a 9876543", "a "), ("12345 1234567x", "12345 1234567x")],
    [("see a/b.png now", "see  now"), ("x.jpeg.pdfs", "s"), (".png star.gif", ".png star.gif")],
    [("''a\"'", '"a"'), ('"""', '"'), ("'a'", "'a'")],
    [("a...b", "a b"), ("..", " "), ("a.b", "a.b")],
    [("***sale***, ®", " sale ,  "), (r"a/b\c|d", "a b c d"), ("a-b!", "a-b!")],
    [("a . b", "a b"), ("a \n. \t.b", "a .b"), ("a. b", "a. b")],
    [("this-is-my-cute-cat", "this is my cute cat"), ("a_b_c-d-e", "a b c d e"), ("a-b-c_d", "a-b-c_d")],
    [("cafÃ©", "café"), ("itâ€™s", "it's"), ("a star", "a star")],
    [("&eacute;", "é"), ("&amp;lt;", "<"), ("a & b", "a & b")],
    [("jc6640 a", " a"), ("a abc123456", "a "), ("abcd123 a12", "abcd123 a12")],
    [("jc6640vc a", " a"), ("a1b", ""), ("1b a1", "1b a1")],
    [("6640vc231 a", " a"), ("1b2", ""), ("1b b1", "1b b1")],
    [("worldwide free shipping", ""), ("a free  shipping", "a "), ("worldwide ship", "worldwide ship")],
    [("free download free", ""), ("downloads", "s"), ("free down load", "free down load")],
    [("click for more", ""), ("a click on this b", "a  b"), ("click here", "click here")],
    [("png images", ""), ("a jpg image b", "a  b"), ("a xpng b", "a xpng b")],
    [("page 12", ""), ("on page  3 of", "on  of"), ("page a", "page a")],
    [("j2d1a2a", " "), ("12a3b4 c", "  c"), ("a1b", "a1b")],
    [("10x15", ""), ("a 2.5х3 1×2.", "a  ."), ("10 x 15", "10 x 15")],
    [("a : b", "a: b"), ("a  :\tb", "a: b"), ("a: b", "a: b")],
    [("a,b.c", "a, b. c"), ("a/b", "a/ b"), ("1,2", "1,2")],
    [("a  b", "a b"), ("a\n\t\u2003b", "a b"), ("a b", "a b")],
    [('"a b"', "a b"), ("'a\"", "a"), ("'a", "'a")],
    [("-a", "a"), (":a", "a"), ("+a", "+a")],
    [("a+", "a"), ("a-", "a"), ("a;", "a;")],
    [(".jpg", ""), (".a,b", ""), (".a b", ".a b")],
    [(" a ", "a"), ("a\n", "a"), ("a", "a")],
]


@pytest.mark.parametrize(("rule", "examples"), zip(RULES, EXAMPLES, strict=True), ids=[r.what for r in RULES])
def test_every_rule_by_example(rule, examples):
    if rule.what == "markup":
        pytest.importorskip("bs4")
    assert [rule(given) for given, _ in examples] == [wanted for _, wanted in examples]
    assert [given != wanted for given, wanted in examples] == [True] * (len(examples) - 1) + [False]


TOGETHER = [
    ("A large Red star above a small blue ring", "a large red star above a small blue ring"),
    ("Star – «FREE download» http://shop.com/star.jpg #12, 10x15", 'star - "'),
    ("my-cute-red-star_by_@painter, 灰色背景 … jc6640", "my cute red star by , …"),
    ("", ""),
]


@pytest.mark.parametrize(("caption", "wanted"), TOGETHER)
def test_all_rules_together(caption, wanted):
    assert cleaned(caption) == wanted


def fragments() -> list[str]:
    """What rules look for, what nearly is that, and what stands around it."""
    found = [text for examples in EXAMPLES for text, _ in examples]
    more = (
        "<br/> </b> <script>x</script> <p < > & &amp;amp; &quot; &#39; &#x4e2d; &nbsp; <?php <!doctype html>"
    )
    letters = [
        *"abxzAÉİßKé39٣ª名😀'\",.:;-_+#@/\\()\t\n\r\x00\x85\xa0\u200b\u2028",
        " ",
        "  ",
        "%zz",
        "１２",
        "ﬁ",
    ]
    return [*found, *more.split(" "), *letters]


@pytest.fixture(scope="module")
def published():
    """The cleaning of diffusers' DeepFloyd IF pipeline, which PixArt's have too."""
    pytest.importorskip("bs4")
    diffusers = pytest.importorskip("diffusers")
    pipeline = object.__new__(
        diffusers.IFPipeline
    )  # of which the cleaning asks only for a pattern of its class
    return lambda text: pipeline._text_preprocessing(text, clean_caption=True)[0]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_examples_equal_the_published_cleaning(published):
    texts = [*fragments(), *(caption for caption, _ in TOGETHER)]
    assert [cleaned(text) for text in texts] == [published(text) for text in texts]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(fragments()), max_size=8), st.sampled_from(["", " "]))
def test_examples_joined_equal_the_published_cleaning(published, pieces, between):
    text = between.join(pieces)
    assert cleaned(text) == published(text)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))  # half a pair: bs4 fails on it
def test_any_text_equals_the_published_cleaning(published, text):
    assert cleaned(text) == published(text)


def test_half_a_pair_is_replaced():
    assert cleaned("a \ud800 star") == "a \ufffd star"


def test_a_long_word_is_looked_at_once():
    """Files' names are looked for from the start of a word; a hundred thousand letters would take hours else."""
    rule = next(rule for rule in RULES if rule.what == "names of files")
    word = "a" * 100_000
    assert rule(word) == word


@pytest.mark.parametrize(
    ("library", "prompt", "said"),
    [
        ("bs4", "a <b>star</b>", "has markup, which beautifulsoup4 reads: pip install"),
        ("ftfy", "a star", "need ftfy"),
    ],
)
def test_a_missing_library_is_one_line(monkeypatch, library, prompt, said):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(KitError, match=said) as caught:
        cleaned(prompt)
    assert "\n" not in str(caught.value)


def test_plain_prompts_need_no_parser(monkeypatch):
    monkeypatch.setitem(sys.modules, "bs4", None)
    assert cleaned("A red Star > a blue one") == "a red star > a blue one"


@pytest.mark.parametrize("prompt", ["a <![x star", "&lt;\udcff"])
def test_broken_markup_is_one_line(prompt):
    pytest.importorskip("bs4")
    with pytest.raises(KitError, match="cannot be read as HTML") as caught:
        cleaned(prompt)
    assert re.fullmatch("[^\n]*", str(caught.value))


def test_the_text_encoder_reads_what_it_is_told_to():
    texts = [" A red Star, FREE download "]
    as_given, lower, clean = (
        T5TextEncoder(size="tiny", lowercase=choice).tokenizer for choice in (False, True, "cleaned")
    )
    assert lower(texts, 99) == as_given(["a red star, free download"], 99)
    assert clean(texts, 99) == as_given(["a red star"], 99)
    with pytest.raises(KitError, match=r"unknown choice of lowercase 'clean'; did you mean 'cleaned'\?"):
        T5TextEncoder(size="tiny", lowercase="clean")
