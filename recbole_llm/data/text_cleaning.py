"""What cells go through before they are text of a prompt: plain text on one line, articles in front, a limit."""

from __future__ import annotations

import html
import re
import unicodedata

ARTICLES = "The|A|An|Les|La|Le|L'|Un|Une|Das|Der|Die|Den|Det|Il|Lo|El|Los|Las|De|Het"
_MOVED_ARTICLE = re.compile(rf"^(?P<rest>.+), (?P<article>{ARTICLES})$")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]\w*);")
# Invisible, but part of how words are written in Persian and the languages of India, and of emoji.
_JOINERS = "\u200c\u200d"


def clean(text: str) -> str:
    """One line of plain text.

    HTML entities are decoded, also where they were encoded twice; letters and their accents become one
    character (NFC); whitespace is collapsed; control characters become spaces; and what is invisible (soft
    hyphens, marks of direction, ...) is dropped.

    >>> clean("Et Dieu&#8230;Cr\\u00e9a \\n la  Femme &amp;amp; l'homme")
    "Et Dieu…Créa la Femme & l'homme"
    """
    for _ in range(2):
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    return " ".join("".join(map(_shown, unicodedata.normalize("NFC", text))).split())


def _shown(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    invisible = unicodedata.category(char) == "Cf" and char != "\u200b"  # a zero-width space does part words
    return "" if invisible else " "


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, cut at the end of a word if one ends in the second half.

    >>> shorten("The quick brown fox", 12)
    'The quick…'
    """
    if len(text) <= limit:
        return text
    head = text[: limit - 1]
    if not text[limit - 1].isspace():
        space = head.rfind(" ")
        head = head[:space] if space >= limit // 2 else head
    return head.rstrip() + "…"


def _article_first(text: str) -> str:
    text = text.strip()
    match = _MOVED_ARTICLE.match(text)
    if match is None:
        return text
    article, rest = match["article"], match["rest"]
    return article + rest if article.endswith("'") else f"{article} {rest}"


def natural_order(title: str) -> str:
    """Put articles that were moved behind a comma back in front, also inside parentheses.

    >>> natural_order("City of Lost Children, The (Cité des enfants perdus, La) (1995)")
    'The City of Lost Children (La Cité des enfants perdus) (1995)'
    """
    start = title.find(" (")
    head, tail = (title, "") if start < 0 else (title[:start], title[start:])
    return _article_first(head) + _PARENTHESES.sub(lambda match: f"({_article_first(match[1])})", tail)
