"""Calls of tools in the formats of the families: written by a grammar, read back from text in any pieces."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from router.serving.tool_format import TOOL_FORMATS, format_of
from router.serving.tool_reader import Argued, Called, Said, ToolReader

NAMES = ("weather", "now")
ARGUMENTS = {"city": 'a "b" {c} \\ é', "days": [1, {"x": None}]}
CALL, NOW = {"name": "weather", "arguments": ARGUMENTS}, {"name": "now", "arguments": {}}


def renamed(call, key):
    return {"name": call["name"], key: call["arguments"]}


TEXTS = {
    "hermes": [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in (CALL, NOW)],
    "smollm2": [f"<tool_call>[{json.dumps(CALL)}, ", f"{json.dumps(NOW)}]</tool_call>"],
    "llama3": [json.dumps(renamed(CALL, "parameters")), "; " + json.dumps(renamed(NOW, "parameters"))],
    "mistral": [f"[TOOL_CALLS] [{json.dumps(CALL)}, ", f"{json.dumps(NOW)}]"],
}


def read(form, pieces, **options):
    """Text, and (name, arguments) of calls."""
    reader = ToolReader(TOOL_FORMATS.all()[form], NAMES, **options)
    news = [one for piece in pieces for one in reader.add(piece)] + reader.close()
    text = "".join(one.text for one in news if isinstance(one, Said))
    calls = [(one.name, "") for one in news if isinstance(one, Called)]
    assert [one.index for one in news if isinstance(one, Called)] == list(range(len(calls)))
    for one in news:
        if isinstance(one, Argued):
            calls[one.index] = (calls[one.index][0], calls[one.index][1] + one.text)
    return text, calls


def cut(text, seed):
    places = sorted(random.Random(seed).choices(range(len(text) + 1), k=seed % 9))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("form", sorted(TEXTS))
@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_calls_are_read_whatever_pieces_they_come_in(form, before):
    if before and form == "llama3":
        before += "<|python_tag|>"
    text = before + "".join(TEXTS[form])
    for pieces in [[text], list(text), *(cut(text, seed) for seed in range(30))]:
        said, calls = read(form, pieces)
        assert said == before.removesuffix("<|python_tag|>")
        assert [(name, json.loads(given)) for name, given in calls] == [("weather", ARGUMENTS), ("now", {})]
        assert len(read(form, pieces, single=True)[1]) == 1


@pytest.mark.parametrize("form", sorted(TEXTS))
@pytest.mark.parametrize(
    "text",
    [
        *("plain words", "", " \n", "a < b", "<tool", "[TOOL", '{"a": 1}', '{"name": "other", "arguments": {}}', "{"),
        *(
            '{"name": "a\\q", "arguments": {"b": 1}}',
            '{"name": "a\nb", "arguments": {}}',
            "{]",
            '{"name": 5, "arguments": {}}',
        ),
        *("<tool_call>no</tool_call>", "<tool_call>", '[TOOL_CALLS] {"x"', '<tool_call>{"name": "weather"', "[1, 2]"),
    ],
)
def test_what_is_no_call_stays_text(form, text):
    for pieces in ([text], list(text)):
        assert read(form, pieces) == (text, [])


@pytest.mark.parametrize("form", sorted(TEXTS))
def test_arguments_that_come_first_are_read_and_ones_that_are_cut_stay_cut(form):
    key = TOOL_FORMATS.all()[form].arguments
    begin = TEXTS[form][0].partition("{")[0]
    turned = begin + json.dumps({key: {"days": 1}, "name": "weather"})
    assert read(form, list(turned))[1] == [("weather", '{"days": 1}')]
    half = begin + '{"name": "weather", "' + key + '": {"city": "Ro'
    assert read(form, list(half)) == ("", [("weather", '{"city": "Ro')])
    text = begin + '{"name": "weather", "' + key + '": "{\\"days\\": 2}"}'
    assert read(form, [text])[1] == [("weather", '{"days": 2}')]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>\n{...}\n</tool_call>{% endif %}", "hermes"),
        ('{% if tools %}<tool_call>[{"name": ...}]</tool_call>{% endif %}', "smollm2"),
        ("{{ tools }}[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ('{{ tools }}{"name": ..., "parameters": ...}<|python_tag|>', "llama3"),
        ("{{ tools }}", None),
    ],
)
def test_a_chat_template_shows_its_format(template, form):
    found = format_of(template)
    assert (None if found is None else found.name) == form


@pytest.mark.parametrize("form", sorted(TEXTS))
@pytest.mark.parametrize("special", [False, True])
def test_a_grammar_writes_what_is_read_back(form, special):
    """Also where the texts around calls are tokens of their own, which grammars and texts must keep."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    import torch

    from compose.base.model import tokenizer_of
    from router.engine.batches.detokenize import Detokenizer
    from router.engine.batches.sampling import Sampler
    from router.engine.grammar import Grammar, Grammars
    from router.engine.request import Request

    fmt = TOOL_FORMATS.all()[form]
    tokenizer = tokenizer_of("builtin:tiny-lm")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in (fmt.begin, fmt.end) if t]})
    tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in (fmt.begin, fmt.end) if t and special}
    city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    schemas = {"weather": {**city, "additionalProperties": False}, "now": {"type": "object", "maxProperties": 0}}
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    counts = set()
    for several in (False, True):
        text = fmt.grammar(schemas, tokens, several=several)
        compiled = grammars.get(Grammar("lark", text))
        for seed in range(6):
            row = compiled.begin()
            sampler = Sampler(Request(temperature=1.0, seed=seed), [], row)
            words = Detokenizer(tokenizer, [], (), tuple(tokens.values()))
            noise = torch.Generator().manual_seed(seed)
            while not row.done:
                token = sampler(torch.randn(len(tokenizer), generator=noise))
                assert token is not None
                if token != tokenizer.eos_token_id:
                    words.push(token)
                else:
                    break
            words.close()
            said, calls = read(form, [words.text])
            assert said == ""
            assert calls and all(name in NAMES for name, _ in calls)
            assert all((name == "now") == (json.loads(given) == {}) for name, given in calls)
            counts.add((several, len(calls) > 1))
    assert (False, True) not in counts and (True, True) in counts


@pytest.mark.parametrize("form", sorted(TEXTS))
@pytest.mark.parametrize("special", [False, True])
def test_text_may_stand_around_strict_calls_and_calls_must_fit(form, special):
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    import torch

    from compose.base.model import tokenizer_of
    from router.engine.grammar import Grammar, Grammars

    fmt = TOOL_FORMATS.all()[form]
    tokenizer = tokenizer_of("builtin:tiny-lm")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in (fmt.begin, fmt.end) if t]})
    tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in (fmt.begin, fmt.end) if t and special}
    schemas = {"weather": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "additionalProperties": False}}
    compiled = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).get(
        Grammar("lark", fmt.grammar(schemas, tokens, several=True, free=True))
    )

    def taken(text) -> bool:
        row = compiled.begin()
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            left = row.mask(torch.zeros(len(tokenizer)))
            if left is None or left[token] < 0:
                return False
            row.take(token)
        return True

    begin, end = ("" if fmt.bare else fmt.begin), fmt.end
    left, right = ("[", "]") if fmt.listed else (fmt.inner, fmt.inner)

    def call(x):
        return f'{begin}{left}{{"name": "weather", "{fmt.arguments}": {{"x": {x}}}}}{right}{end}'

    assert taken("any words, also < and [ ]") and taken(call(1)) and taken("")
    assert not taken(call(3)) and not taken(call('"a"'))
    if not fmt.bare:
        assert taken(f"First. {call(2)}") and not taken(f"First. {call(7)}") and not taken(f"a {begin}b")
