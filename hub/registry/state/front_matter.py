"""Cards: the YAML in front of a README, and its Markdown as HTML that runs nothing."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, urlsplit

import nh3
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>(?:.*?\n)??)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MAX_YAML = 64 * 1024  # characters; the YAML reader is slow, and no card needs more
MAX_DEPTH = 32  # levels of nesting
MAX_RENDERED = 512 * 1024  # characters of Markdown that are rendered; a longer card is cut
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


class CardError(ValueError):
    """The YAML in front of a card is not YAML, or not a mapping."""


def parse_front_matter(text: str) -> dict[str, Any]:
    """YAML in front of a card; an empty mapping where there is none. Raises CardError."""
    found = _FRONT.match(text)
    if found is None or not found["yaml"].strip():
        return {}
    if len(found["yaml"]) > MAX_YAML:
        raise CardError(f"it has more than {MAX_YAML} characters")
    try:
        _check_shape(found["yaml"])
        value = yaml.safe_load(found["yaml"])
    except CardError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise CardError(" ".join(str(error).split())[:300]) from error
    if not isinstance(value, dict):
        raise CardError("it is not a mapping of names to values")
    return value


def _check_shape(text: str) -> None:
    """Refuse what makes the reader work for ever: deep nesting is quadratic, aliases can double with every line."""
    depth = 0
    for mark in re.findall(r"[\[\]{}]", text):  # before the scanner, which looks ahead at a thousand brackets
        depth += 1 if mark in "[{" else -1
        if depth > 2 * MAX_DEPTH:
            raise CardError(f"it is nested more than {MAX_DEPTH} levels deep")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            depth -= 1
        if depth > MAX_DEPTH:
            raise CardError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            raise CardError("it has aliases (*name), which are not read here")


def front_matter(text: str) -> dict[str, Any]:
    """YAML in front of a card; an empty mapping where there is none that can be read."""
    try:
        return parse_front_matter(text)
    except CardError:
        return {}


def render(text: str, base: str) -> str:
    """Card as safe HTML.

    Raw HTML in the Markdown is shown as text; what is rendered passes through an allow-list of tags, attributes
    and link schemes besides. Images of other hosts become links, so that a page tells nobody who reads it.

    Parameters
    ----------
    text
        Markdown with optional YAML in front.
    base
        URL path below which the files of the revision are (``/ns/name/resolve/REV``).
    """
    body = _FRONT.sub("", text, count=1)[:MAX_RENDERED]
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
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
