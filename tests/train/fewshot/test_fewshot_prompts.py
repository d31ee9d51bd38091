"""Templates, verbalizers and truncation, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from train.fewshot.examples import Example
from train.fewshot.prompts.filled import encode, lengths_after_cut, render
from train.fewshot.prompts.template import Field, Literal, Mask, Sep, Template, TemplateError
from train.fewshot.prompts.verbalizer import Verbalizer, VerbalizerError, WordScores, nearest_single_tokens

GRAMMAR = [  # LM-BFF's notation, the readable one, the tree
    ("*cls**sent_0*_It_was*mask*.*sep+*", "{text} It was{mask}.", (Field(), Literal(" It was"), Mask(), Literal("."))),
    ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "{text:cut}?{mask},{text2:space,lower}",
     (Field(cut=True), Literal("?"), Mask(), Literal(","), Field(1, case="lower", space=True))),
    ("*cls**mask*:*+sent_0**sep+*", "{mask}:{text:space}", (Mask(), Literal(":"), Field(space=True))),
    ("*cls**sentu_0**sep+**mask**sep*x*sep+*", "{text:upper}{sep}{mask}{sep:same}x",
     (Field(case="upper"), Sep(), Mask(), Sep(segment=False), Literal("x"))),
    ("*cls**+sentl-_0**mask**label_1**sep+*", "{text:cut,space,lower}{mask}{label:1}", None),
]  # fmt: skip


@pytest.mark.parametrize(("stars", "braces", "tree"), GRAMMAR)
def test_both_notations_are_one_tree_in_both_directions(stars, braces, tree):
    parsed = Template.parse(stars)
    assert parsed == Template.parse(braces)
    assert tree is None or parsed.pieces == tree
    assert parsed.format_lmbff() == stars and parsed.format() == braces


def test_field_changes():
    assert Field(cut=True).apply("Fun.") == "Fun"
    assert Field(case="lower", space=True).apply("Fun.") == " fun."
    assert Field(case="upper").apply("fun") == "Fun"
    assert Field(cut=True).apply("") == ""


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{text} is", "no mask"),
        ("{text} {mask} {mask}", "2 masks"),
        ("It was {mask}", "no text"),
        ("{txt} {mask}", "{text}"),
        ("{text {mask}", "brace"),
        ("{text:cutt} {mask}", "cutt"),
        ("*cls**sent_0**mask*", "sep+"),
        ("*cls**snt_0**mask**sep+*", "snt_0"),
    ],
)
def test_a_bad_template_is_named(text, word):
    with pytest.raises(TemplateError) as error:
        Template.parse(text)
    assert word in str(error.value) + str(error.value.hint) and error.value.hint


def test_literal_braces_and_what_stars_cannot_say():
    template = Template.parse("{{x}} {text} {mask}")
    assert template.pieces[0] == Literal("{x} ") and template.format() == "{{x}} {text} {mask}"
    with pytest.raises(TemplateError, match="'_'"):
        Template.parse("a_b {text}{mask}").format_lmbff()


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [([10, 4], 9, [5, 4]), ([5, 5], 7, [4, 3]), ([3, 9, 6], 10, [3, 4, 3]), ([7, 7, 1], 4, [2, 1, 1])],
)  # fmt: skip
def test_the_longest_text_is_cut_first(lengths, room, kept):
    assert lengths_after_cut(lengths, room) == kept
    slow = list(lengths)  # the rule word by word: the longest loses its last token, on a tie the later one
    while sum(slow) > room:
        slow[max(i for i, n in enumerate(slow) if n == max(slow))] -= 1
    assert slow == kept


def test_encode_puts_the_mask_and_types_where_the_template_says(masked_tokenizer):
    tok = masked_tokenizer
    row = encode(Template.parse("{text} it was {mask}.{sep}{text2}"), Example("good film", "bad plot"), tok)
    assert " ".join(tok.convert_ids_to_tokens(row.ids)) == "[CLS] good film it was [MASK] . [SEP] bad plot [SEP]"
    assert row.types == (0,) * 8 + (1,) * 3 and row.mask_at == (5,)
    cut = encode(Template.parse("{text} it was {mask:2}."), Example("good film very very very"), tok, max_length=9)
    assert " ".join(tok.convert_ids_to_tokens(cut.ids)) == "[CLS] good film it was [MASK] [MASK] . [SEP]"
    assert cut.mask_at == (5, 6)


def test_kept_texts_are_never_shortened_and_too_little_room_is_an_error(masked_tokenizer):
    example = Example("good film very very", "bad plot")
    row = encode(Template.parse("{text:keep} {mask} {text2}"), example, masked_tokenizer, max_length=8)
    assert " ".join(masked_tokenizer.convert_ids_to_tokens(row.ids)) == "[CLS] good film very very [MASK] bad [SEP]"
    with pytest.raises(TemplateError, match="words of the template"):
        encode(Template.parse("{text:keep} {mask}"), example, masked_tokenizer, max_length=5)
    with pytest.raises(TemplateError, match="text2"):
        encode(Template.parse("{text} {mask} {text2}"), Example("a"), masked_tokenizer)


def test_render_for_people():
    shown = render(Template.parse("{text:cut}? {mask}, {text2:lower}"), Example("Is it.", "Yes it is"), "____")
    assert shown == "Is it? ____, yes it is"


def test_several_words_score_the_mean_of_their_logits():
    scores = WordScores(((1, 2), (4,)))
    logits = torch.tensor([[0.0, 3.0, 5.0, 9.0, 7.0]])
    assert torch.equal(scores(logits), torch.tensor([[4.0, 7.0]]))


def test_words_that_are_not_one_token_are_named_with_the_nearest(masked_tokenizer):
    verbalizer = Verbalizer.of({"pos": "great", "neg": "terribly"})
    with pytest.raises(VerbalizerError, match="'terribly' of label 'neg'") as error:
        verbalizer.single(masked_tokenizer)
    assert "terrible" in str(error.value.hint)
    assert nearest_single_tokens(masked_tokenizer, "grea")[0] == "great"
    with pytest.raises(VerbalizerError, match="both"):
        Verbalizer.of({"a": "good", "b": "good"})
    with pytest.raises(VerbalizerError, match="no word"):
        Verbalizer.of({"a": "good", "b": ""})
