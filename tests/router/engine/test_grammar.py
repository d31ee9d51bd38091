"""Continuations that follow a grammar: every kind of row, sampled and greedy, beside rows that follow none."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

from jsonschema import Draft202012Validator

from router.engine.grammar import Grammar, GrammarError, any_of
from router.engine.request import Request, Result

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def row(adapter=None, grammar=None, **options):
    told = {"text": "The parties agree that", "max_new_tokens": 120, **options}
    return Request(adapter=adapter, grammar=grammar, **told)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_every_kind_follow_a_schema_beside_rows_that_follow_none(engine, routers, temperature):
    models = [None, "law", "lead", "0.5 * law + code", "ensemble.demix(law, code)", "near", "arrow"]
    grammar = Grammar.json_schema(SCHEMA)
    free = [row(model, max_new_tokens=20) for model in models]
    alone = engine.run(free)
    rows = [row(model, grammar, temperature=temperature, seed=7) for model in models]
    mixed = engine.run([one for pair in zip(rows, free, strict=True) for one in pair])
    for followed in mixed[::2]:
        assert isinstance(followed, Result) and followed.finish == "stop", followed
        Draft202012Validator(SCHEMA).validate(json.loads(followed.text))
    assert [r.text for r in mixed[1::2]] == [r.text for r in alone]
    assert len({r.text for r in mixed[::2]}) > 1


def test_a_row_says_what_it_says_alone(engine):
    grammar = Grammar.json_schema(SCHEMA)
    rows = [row("law", grammar, temperature=1.0, seed=n) for n in range(4)]
    assert [r.text for r in engine.run(rows)] == [engine.run([one])[0].text for one in rows]


def test_an_answer_that_is_cut_says_so(engine):
    (cut,) = engine.run([row("law", Grammar.json_schema(SCHEMA), max_new_tokens=5)])
    assert (cut.finish, cut.written) == ("length", 5)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


def test_expressions_choices_and_stop_texts(engine):
    (number,) = engine.run([row("law", Grammar("regex", "[0-9]{3}-[a-f]{2}"))])
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", number.text)
    words = ["yes", "nö 漢", 'maybe "so"']
    assert {engine.run([row("law", any_of(words, "choice"), temperature=2.0, seed=n)])[0].text for n in range(8)} <= {
        *words
    }
    stopped = engine.run([row("law", Grammar("regex", "ab[0-9]{5}"), stop=("b",))])[0]
    assert (stopped.text, stopped.finish) == ("a", "stop")


def test_penalties_and_biases_do_not_leave_the_grammar(engine):
    grammar = Grammar("regex", "(yes|no)")
    options = {"repetition_penalty": 3.0, "presence_penalty": 2.0, "temperature": 3.0, "top_p": 0.3, "min_p": 0.5}
    bias = tuple((token, 100.0) for token in range(40))
    for seed in range(4):
        (said,) = engine.run([row("law", grammar, **options, logit_bias=bias, seed=seed)])
        assert said.text in ("yes", "no")


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "objekt"}, "objekt"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"$ref": "https://example.org/x"}, "example.org"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "5"),
        ([], "must be an object"),
        (nested(200), "cannot be read"),
        ({"const": 10**400}, "cannot be read"),
        ({"$ref": "#"}, "cannot be followed"),
        ({"enum": ["x" * 200_000]}, "characters"),
        ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(600)}}, "items"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_by_what_is_wrong(engine, schema, words):
    with pytest.raises(GrammarError, match=re.escape(words)) as refused:
        engine.run([row("law", Grammar.json_schema(schema, "response_format"))])
    assert refused.value.param == "response_format"


def test_a_head_follows_no_grammar(engine):
    from hub.errors import UsageError

    with pytest.raises(UsageError, match="label"):
        engine.run([row("mood", Grammar("regex", "a"))])


def test_without_the_package_it_is_refused_with_the_command(engine, monkeypatch):
    monkeypatch.setattr("router.engine.grammar.find_spec", lambda name: None)
    with pytest.raises(GrammarError) as refused:
        engine.run([row("law", Grammar("regex", "never-asked-before"))])
    assert "llguidance" in refused.value.message and "moduloom[structured]" in str(refused.value.hint)


def test_scores_are_the_models_own(engine):
    """What the grammar leaves out does not change the log probabilities that are told."""
    said, free = engine.run([row("law", grammar, scores=3) for grammar in (Grammar("regex", "[0-9]{4}"), None)])
    assert [text for text, _ in said.tokens[0].best] == [text for text, _ in free.tokens[0].best]
    assert [p for _, p in said.tokens[0].best] == pytest.approx([p for _, p in free.tokens[0].best], abs=1e-4)
    assert said.tokens[0].log_prob < said.tokens[0].best[0][1]
