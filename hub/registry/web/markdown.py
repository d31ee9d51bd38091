"""A card's Markdown as HTML that runs nothing."""

from __future__ import annotations

import threading
from functools import lru_cache
from urllib.parse import quote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hub.registry.state.front_matter import without_front_matter

# Characters of Markdown that are rendered; a longer card is cut, and says so. The parser's worst texts take time in the
# square of their length: seconds for these.
MAX_RENDERED = 64 * 1024
_KEPT = 64  # rendered cards, of up to half a megabyte each
_CUT = "\n\n*The card is longer: the rest is in README.md.*\n"
_rendering = threading.BoundedSemaphore(2)  # whoever sends bad cards takes two threads, not all of them
_TAGS = (
    "a abbr b blockquote br code dd del dl dt em h1 h2 h3 h4 h5 h6 hr i img li ol p pre s strong sub sup table tbody"
    " td th thead tr ul"
)
_ATTRIBUTES = {
    "a": {"href", "title"},
    "img": {"src", "alt", "title"},
    "th": {"align"},
    "td": {"align"},
    "ol": {"start"},
}


@lru_cache(maxsize=_KEPT)
def render(text: str, base: str) -> str:
    """Card as safe HTML; the last ones are kept.

    Raw HTML in the Markdown is shown as text; what is rendered passes through an allow-list of tags, attributes
    and link schemes besides. Images of other hosts become links, so that a page tells nobody who reads it.

    Parameters
    ----------
    text
        Markdown with optional YAML in front.
    base
        URL path below which the files of the revision are (``/ns/name/resolve/REV``).
    """
    body = without_front_matter(text)
    if len(body) > MAX_RENDERED:
        body = body[:MAX_RENDERED] + _CUT
    with _rendering:
        return _html(body, base)


def _html(body: str, base: str) -> str:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "maxNesting": 20}).enable(
        ["table", "strikethrough"]
    )
    tokens = parser.parse(body)
    for token in tokens:
        for child in token.children or ():
            _localize(child, base)
    html = str(parser.renderer.render(tokens, parser.options, {}))
    return nh3.clean(
        html,
        tags=set(_TAGS.split()),
        attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def _localize(token: Token, base: str) -> None:
    """Let relative links reach the revision's files, and keep images to those files."""
    for name in ("href", "src"):
        target = token.attrs.get(name)
        if isinstance(target, str) and not _elsewhere(target) and not target.startswith(("#", "/")):
            token.attrs[name] = f"{base}/{quote(target.removeprefix('./'), safe='/%#?=&')}"
    if token.type == "image" and not str(token.attrs.get("src", "")).startswith(f"{base}/"):
        token.type, token.tag, token.nesting = "code_inline", "code", 0
        token.content = f"image: {token.attrs.get('src', '')}"
        token.attrs = {}


def _elsewhere(target: str) -> bool:
    """Whether a link names a scheme or a host; True for what cannot even be split."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return True
    return bool(parts.scheme or parts.netloc)
