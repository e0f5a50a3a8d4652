"""Texts that others wrote (passages, questions, models, servers, cards), made harmless for where they are shown.

A terminal obeys control characters, and a page of Markdown holds HTML, links and pictures. Figures need neither:
`tracking/style.py` has matplotlib take texts as they are.
"""

from __future__ import annotations

import re

# C0 and C1 controls but tab and line feed, line separators, lone surrogates (terminals have no bytes for them), and
# the characters that reorder text.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKUP = re.compile(r"[\\`\[\]|]")


def visible(text: str) -> str:
    """`text` with every control character written as an escape such as `\\x1b`, which a terminal only shows."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def in_markdown(text: str) -> str:
    """`text` as a reader of Markdown sees it again: no HTML, link, picture, code or cell of a table comes of it."""
    text = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\g<0>", text)
