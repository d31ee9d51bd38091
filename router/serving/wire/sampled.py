"""Fields of all endpoints that write."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from router.engine.grammar import Grammar
from router.engine.request import Request, Token
from router.serving.errors import FieldError
from router.serving.wire.body import Body
from router.serving.wire.structure import ResponseFormat, StructuredOutputs


class Sampled(Body):
    """How tokens are chosen, and where a continuation ends."""

    model: str = ""
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0.0, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    task: str | None = None

    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=1024)

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None

    def grammar(self) -> Grammar | None:
        """What the answer must look like. Raises FieldError where that is asked for twice."""
        given = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        asked = StructuredOutputs.model_validate(given).read("guided_")
        if self.structured_outputs is not None:
            asked += self.structured_outputs.read("structured_outputs.")
        if self.response_format is not None and (wanted := self.response_format.grammar()) is not None:
            asked.append(wanted)
        if len(asked) > 1:
            raise FieldError(asked[1].param, f"{asked[1].param} and {asked[0].param} are asked for", hint="give one")
        return asked[0] if asked else None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    def request(self, text: str | Sequence[int], room: int | None, copy: int, **options: Any) -> Request:
        """One row; the n copies of a prompt draw from streams of their own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(62) if self.seed is None else self.seed + copy
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise FieldError("logit_bias", f"the logit_bias of {token} is {bias}", hint="-100 to 100")
        told: dict[str, Any] = {"grammar": self.grammar(), "stop": stop, **options}
        return Request(
            text=text if isinstance(text, str) else "",
            ids=None if isinstance(text, str) else tuple(text),
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            adapter=self.model,
            task=self.task,
            max_new_tokens=room,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            **told,
        )


def shown(text: str, raw: bytes, prefix: str = "") -> str:
    r"""A token as OpenAI writes it: its text, or where that is no whole character its bytes as `\xe4\xbd`."""
    try:
        return raw.decode() or text
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def best_of(token: Token, count: int) -> Mapping[tuple[str, bytes], float]:
    """The `count` best tokens at a place, and the chosen one among them however unlikely it is."""
    told = {(text, raw): p for (text, p), raw in zip(token.best[:count], token.best_raw[:count], strict=True)}
    return {**told, (token.text, token.raw): token.log_prob}
