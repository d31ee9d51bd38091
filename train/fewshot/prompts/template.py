"""Templates: where a text, the mask and fixed words stand, in two notations of one tree.

The readable notation marks its parts with braces, LM-BFF's (arXiv:2012.15723) with stars::

    {text} It was {mask}.              *cls**sent_0*_It_was*mask*.*sep+*
    {text:cut}? {mask}, {text2:lower}  *cls**sent-_0*?*mask*,*+sentl_1**sep+*

`parse(t.format()) == t` and `parse_lmbff(t.format_lmbff()) == t` for every template both notations can say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeAlias

from hub.errors import UsageError, did_you_mean

__all__ = ["Field", "Label", "Literal", "Mask", "Piece", "Sep", "Template", "TemplateError"]


class TemplateError(UsageError):
    """A template that cannot be read, or that lacks what it needs."""


@dataclass(frozen=True)
class Literal:
    """Fixed words, spaces included."""

    text: str


@dataclass(frozen=True)
class Field:
    """A text of the example, changed as the template says.

    Attributes
    ----------
    index
        0: the text, 1: its pair; with demonstrations, 2 and up are those of the demonstrations.
    cut
        Drop its last character (a full stop before a mask that continues the sentence).
    case
        `lower` or `upper` for its first letter.
    space
        Put a space before it.
    keep
        Never shorten it.
    """

    index: int = 0
    cut: bool = False
    case: str = ""
    space: bool = False
    keep: bool = False

    def apply(self, text: str) -> str:
        """The text as it stands in the prompt."""
        text = text[:-1] if self.cut else text
        text = {"lower": text[:1].lower(), "upper": text[:1].upper()}.get(self.case, text[:1]) + text[1:]
        return f" {text}" if self.space else text


@dataclass(frozen=True)
class Mask:
    """The run of masks that is read; `count` is set by the longest label word."""

    count: int = 1


@dataclass(frozen=True)
class Label:
    """The word of the label with this index: how a demonstration says its answer."""

    index: int


@dataclass(frozen=True)
class Sep:
    """The tokenizer's separator; `segment` also starts a new token type."""

    segment: bool = True


Piece: TypeAlias = Literal | Field | Mask | Label | Sep

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_STARS = re.compile(r"\*([^*]*)\*")
_SENT = re.compile(r"(\+?)sent([lu]?)(-?)_(\d+)")
_CASES = {"l": "lower", "u": "upper", "": ""}
_WORDS = ("text", "text2", "mask", "sep", "label")
_OPTIONS = ("cut", "lower", "upper", "space", "keep")


@dataclass(frozen=True)
class Template:
    """The parts of a prompt in order; start and end tokens are the tokenizer's and stand around them.

    Raises
    ------
    TemplateError
        No mask or two of them; no text.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        masks = sum(isinstance(piece, Mask) for piece in self.pieces)
        if masks != 1:
            found = "no mask" if not masks else f"{masks} masks"
            hint = "put {mask} where the label word belongs, such as '{text} It was {mask}.'"
            raise TemplateError(f"the template {self.format()!r} has {found}; exactly one is read", hint=hint)
        if not any(isinstance(piece, Field) for piece in self.pieces):
            raise TemplateError(f"the template {self.format()!r} shows no text", hint="put {text} into it")

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its texts in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Field))

    @property
    def paired(self) -> bool:
        """Whether it shows the second text."""
        return any(field.index == 1 for field in self.fields)

    def with_masks(self, count: int) -> Template:
        """The same template with a run of `count` masks."""
        return Template(tuple(replace(p, count=count) if isinstance(p, Mask) else p for p in self.pieces))

    # -- the readable notation -------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read braces, or LM-BFF's stars where the text starts with `*cls*`."""
        if text.startswith("*cls*"):
            return cls.parse_lmbff(text)
        pieces: list[Piece] = []
        start = 0
        for match in (*_BRACES.finditer(text), None):
            words = text[start : match.start() if match else len(text)]
            if set("{}") & set(words):
                raise TemplateError(f"a brace in {text!r} has no partner", hint="write {{ or }} for a brace itself")
            pieces.append(Literal(words))
            if match:
                pieces.append(Literal(match[0][0]) if match[1] is None else _braced(match[1], text))
                start = match.end()
        return cls(_joined(pieces))

    def format(self) -> str:
        """The readable notation."""
        return "".join(_to_braces(piece) for piece in self.pieces)

    # -- LM-BFF's notation -----------------------------------------------------------------------------------------

    @classmethod
    def parse_lmbff(cls, text: str) -> Template:
        """Read `*cls*...*sep+*`; `_` stands for a space."""
        if not text.startswith("*cls*") or not text.endswith("*sep+*"):
            raise TemplateError(
                f"{text!r} does not stand between *cls* and *sep+*", hint="*cls**sent_0*_It_was*mask*.*sep+*"
            )
        body = text.removeprefix("*cls*").removesuffix("*sep+*")
        pieces: list[Piece] = []
        start = 0
        for match in _STARS.finditer(body):
            pieces.append(Literal(body[start : match.start()].replace("_", " ")))
            pieces.append(_starred(match[1], text))
            start = match.end()
        if "*" in body[start:]:
            raise TemplateError(
                f"a star in {text!r} is not closed", hint="parts look like *sent_0*, *mask*, *label_0*, *sep*"
            )
        pieces.append(Literal(body[start:].replace("_", " ")))
        return cls(_joined(pieces))

    def format_lmbff(self) -> str:
        """LM-BFF's notation.

        Raises
        ------
        TemplateError
            It cannot say this: `_` or `*` in the words, a text that must be kept, a run of several masks.
        """
        return "*cls*" + "".join(_to_stars(piece) for piece in self.pieces) + "*sep+*"


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Neighbouring words in one piece, empty ones left out: one tree for one meaning."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Literal) and isinstance(last, Literal):
            joined[-1] = Literal(last.text + piece.text)
        elif piece != Literal(""):
            joined.append(piece)
    return tuple(joined)


def _braced(text: str, whole: str) -> Piece:
    name, _, options = text.partition(":")
    if name in ("text", "text2"):
        return _field(name, [o.strip() for o in options.split(",") if o.strip()], whole)
    if name == "sep":
        return Sep(segment=options != "same")
    if name == "mask" and (not options or (options.isdigit() and int(options) > 0)):
        return Mask(int(options or 1))
    if name == "label" and options.isdigit():
        return Label(int(options))
    near = did_you_mean(name, _WORDS, count=1)
    guess = f"; did you mean {{{near[0]}}}?" if near else ""
    hint = "known: {text} {text2} {mask} {sep} {label:0}, with {text:cut,lower,upper,space,keep}"
    raise TemplateError(f"{{{text}}} in {whole!r} is not a part of a template{guess}", hint=hint)


def _field(name: str, options: list[str], whole: str) -> Field:
    for option in options:
        if option not in _OPTIONS:
            raise TemplateError(f"{option!r} in {whole!r} does not change a text", hint=f"known: {', '.join(_OPTIONS)}")
    case = next((o for o in options if o in ("lower", "upper")), "")
    flags = {flag: flag in options for flag in ("cut", "space", "keep")}
    return Field(index=int(name == "text2"), case=case, **flags)


def _to_braces(piece: Piece) -> str:
    if isinstance(piece, Literal):
        return piece.text.replace("{", "{{").replace("}", "}}")
    if isinstance(piece, Mask):
        return "{mask}" if piece.count == 1 else f"{{mask:{piece.count}}}"
    if isinstance(piece, Label):
        return f"{{label:{piece.index}}}"
    if isinstance(piece, Sep):
        return "{sep}" if piece.segment else "{sep:same}"
    if piece.index > 1:
        raise TemplateError("the texts of demonstrations have no name in braces", hint="use format_lmbff()")
    options = [o for o in ("cut", "space", "keep") if getattr(piece, o)] + ([piece.case] if piece.case else [])
    return "{" + ("text", "text2")[piece.index] + (f":{','.join(options)}" if options else "") + "}"


def _starred(name: str, whole: str) -> Piece:
    if match := _SENT.fullmatch(name):
        space, case, cut, index = match.groups()
        return Field(int(index), cut=bool(cut), case=_CASES[case], space=bool(space))
    if match := re.fullmatch(r"label_(\d+)", name):
        return Label(int(match[1]))
    known: dict[str, Piece] = {"mask": Mask(), "sep": Sep(segment=False), "sep+": Sep()}
    if name not in known:
        hint = "known: sent_0 sent-_0 sentl_0 sentu_0 +sent_0 mask label_0 sep sep+"
        raise TemplateError(f"*{name}* in {whole!r} is not a part of a template", hint=hint)
    return known[name]


def _to_stars(piece: Piece) -> str:
    if isinstance(piece, Literal):
        if bad := set("*_") & set(piece.text):
            raise TemplateError(f"LM-BFF's notation cannot say {sorted(bad)[0]!r}", hint="use format()")
        return piece.text.replace(" ", "_")
    if isinstance(piece, Mask):
        if piece.count != 1:
            raise TemplateError(f"LM-BFF's notation has one mask, not {piece.count}", hint="use format()")
        return "*mask*"
    if isinstance(piece, Label):
        return f"*label_{piece.index}*"
    if isinstance(piece, Sep):
        return "*sep+*" if piece.segment else "*sep*"
    if piece.keep:
        raise TemplateError("LM-BFF's notation cannot keep a text whole", hint="use format()")
    return f"*{'+' * piece.space}sent{piece.case[:1]}{'-' * piece.cut}_{piece.index}*"
