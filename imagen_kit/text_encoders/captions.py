"""Captions cleaned as those were that DeepFloyd IF and PixArt were trained on.

Their captions came from the web, and lost what the web puts around a picture's description: addresses, markup, names
of files, codes of articles, offers. Prompts go through the same rules, in the same order, twice, since what one rule
leaves another may want. ``RULES`` is that table: what each rule does, and the pattern or function that does it.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_plus

from imagen_kit.errors import KitError

EXTRA = "pip install 'imagen-kit[captions]'"
# Hyphens and dashes of every script, and the wave dashes.
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_DOUBLE_QUOTES, _SINGLE_QUOTES = "`´«»“”¨", "‘’"
_ORNAMENTS = r"#®•©™&@·º½¾¿¡§~()[]{}|\/*"
_FILES = "png|jpe?g|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-z0-9.-]+\.(?:com?|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"


@dataclass(frozen=True)
class Rule:
    """One step of the cleaning: ``change`` is done to the text; ``what`` it is for, in words."""

    what: str
    change: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.change(text)


def cleaned(caption: str) -> str:
    """``caption`` in lower case and cleaned by every rule, twice.

    Raises:
        KitError: a library that a rule needs is not installed, or markup that cannot be read.
    """
    for rule in (*RULES, *RULES):
        caption = rule(caption)
    return caption


def lowered(caption: str) -> str:
    """``caption`` in lower case, without blanks at its ends: all that these models' cleaning does to plain words."""
    return caption.strip().lower()


def _each(pattern: str, by: str = "") -> Callable[[str], str]:
    """Replaces everything that matches."""
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(by, text)


def _first(*changes: Callable[[str], str]) -> Callable[[str], str]:
    """One after the other."""

    def change(text: str) -> str:
        for each in changes:
            text = each(text)
        return text

    return change


def _one_of(characters: str) -> str:
    return f"[{re.escape(characters)}]"


def _without_markup(text: str) -> str:
    """The text that a browser would show; where nothing looks like markup, that is the text itself."""
    if "<" not in text and "&" not in text:
        return text
    try:
        from bs4 import BeautifulSoup
        from bs4.exceptions import ParserRejectedMarkup
    except ImportError as error:
        raise KitError(f"prompt {text!r} has markup, which beautifulsoup4 reads: {EXTRA}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks like an address, a file's name or XML
        try:
            return BeautifulSoup(text, features="html.parser").text
        except (ParserRejectedMarkup, UnicodeEncodeError) as error:
            raise KitError(f"prompt {text!r} cannot be read as HTML, as cleaned captions are") from error


def _spaced_slug(text: str) -> str:
    """``this-is-my-cute-cat`` in words: more than three hyphens or underscores are no punctuation."""
    return re.sub("[-_]", " ", text) if text.count("-") + text.count("_") > 3 else text


def _mended(text: str) -> str:
    """Characters that were read in a wrong encoding, and what else ftfy mends."""
    try:
        import ftfy
    except ImportError as error:
        raise KitError(f"cleaned captions need ftfy: {EXTRA}") from error
    return ftfy.fix_text(text)


RULES: tuple[Rule, ...] = (
    Rule("%20 and + of an address become what they stand for", unquote_plus),
    Rule("lower case, without blanks at the ends", lowered),
    Rule("the data set's <person> is a person", lambda text: text.replace("<person>", "person")),
    Rule("addresses: http and https, domains", _each(rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})")),
    Rule("addresses: www, domains", _each(rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})")),
    Rule("markup", _without_markup),
    Rule("@nicknames", _each(r"@\w+")),
    Rule("Chinese characters, and the strokes, signs and hexagrams before them", _each("[\u31c0-\u9fff]+")),
    Rule("every kind of dash is a hyphen", _each(f"{_one_of(_DASHES)}+", "-")),
    Rule("every kind of double quote is one", _each(_one_of(_DOUBLE_QUOTES), '"')),
    Rule("every kind of single quote is one", _each(_one_of(_SINGLE_QUOTES), "'")),
    Rule("&quot and &amp that outlived the markup", _first(_each("&quot;?"), _each("&amp"))),
    Rule("IP addresses", _each(r"(?:\d{1,3}\.){3}\d{1,3}", " ")),
    Rule("1:23 at the end: numbers of articles", _each(r"\d:\d\d\s+$")),
    Rule("a written-out line break", lambda text: text.replace(r"\n", " ")),
    Rule("#1 to #999, and # with five digits or more", _first(_each(r"#\d{1,3}\b"), _each(r"#\d{5,}\b"))),
    Rule("numbers of six digits or more", _each(r"\b\d{6,}\b")),
    # From the start of a word on, where a match begins in any case: looking from each letter takes its square.
    Rule("names of files", _each(rf"(?<!\S)\S+\.(?:{_FILES})")),
    Rule("runs of quotes", _each("[\"']{2,}", '"')),
    Rule("runs of dots", _each(r"\.{2,}", " ")),
    Rule("ornaments", _each(f"{_one_of(_ORNAMENTS)}+", " ")),
    Rule("lone dots", _each(r"\s+\.\s+", " ")),
    Rule("words joined by hyphens or underscores", _spaced_slug),
    Rule("wrongly decoded characters", _mended),
    Rule("HTML entities, also twice escaped", lambda text: html.unescape(html.unescape(text))),
    Rule("codes like jc6640", _each(r"\b[a-zA-Z]{1,3}\d{3,15}\b")),
    Rule("codes like jc6640vc", _each(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b")),
    Rule("codes like 6640vc231", _each(r"\b\d+[a-zA-Z]+\d+\b")),
    Rule("(worldwide) (free) shipping", _each(r"(?:worldwide\s+)?(?:free\s+)?shipping")),
    Rule("(free) download (free)", _each(r"(?:free\s)?download(?:\sfree)?")),
    Rule("click for this, click on that", _each(r"\bclick\s(?:for|on)\s\w+")),
    Rule("kinds of files, also with image(s)", _each(rf"\b(?:{_FILES})(?:\simages?)?")),
    Rule("numbers of pages", _each(r"\bpage\s+\d+\b")),
    Rule("codes like j2d1a2a", _each(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ")),
    Rule(
        "sizes like 10x15, with a Latin, a Cyrillic or a true cross",
        _each(r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b"),
    ),
    Rule("no blank before a colon, one after it", _each(r"\b\s+:\s+", ": ")),
    Rule("a blank after a comma, a dot or a slash", _each(r"(\D[,./])\b", r"\1 ")),
    Rule("runs of blanks are one", _each(r"\s+", " ")),
    Rule("quotes around it all", _each(r"^[\"']([\w\W]+)[\"']$", r"\1")),
    Rule("punctuation that it begins with", _each(r"^['_,:;-]")),
    Rule("punctuation that it ends with", _each(r"['_,:+-]$")),
    Rule("a lone ending such as .jpg", _each(r"^\.\S+$")),
    Rule("no blanks at the ends", str.strip),
)
