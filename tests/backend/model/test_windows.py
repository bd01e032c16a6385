"""Where plain text is split: parts that fit, are even, end between words, and are the text one after the other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from concept_audit.model.chat import ChatRenderer
from concept_audit.model.windows import NEAR, Splitter
from concept_audit.types import Message
from tests.conftest import WORDS, sentence

LONGEST = 64


def texts() -> dict[str, str]:
    made = random.Random(7)
    words = [sentence(made, made.randint(3, 20)) for _ in range(60)]
    return {
        "words": " ".join(words),
        "lines": "\n".join(words),
        "paragraphs": "\r\n\r\n".join(words),
        "no white space": "".join(words).replace(" ", ""),
        "Chinese": "银行在河边。" * 90,
        "emoji": "🙂👩‍👩‍👧" * 60,
        "white space": " \n\t" * 300,
        "one more than fits": "a" * 64,
        "accents and surrogates": "naïve \ufffd café " * 40,
    }


def of_pieces():
    """A tokenizer as SentencePiece's are: a sign for spaces, also before the text, bytes for what it does not know, and
    a token before every text."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    raw.train_from_iterator([" ".join(WORDS)], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def renderer(request, tokenizer) -> ChatRenderer:
    return ChatRenderer(tokenizer if request.param == "bytes" else of_pieces(), LONGEST)


@pytest.mark.parametrize("name", texts())
def test_parts_are_the_text_and_each_fits(renderer, name):
    text = texts()[name]
    spans = Splitter(renderer)(text)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1][1] == len(text)
    assert len(spans) > 1
    for start, end in spans:
        row = renderer.render((Message("assistant", text[start:end]),))
        assert start < end and not row.truncated


def test_a_text_that_fits_is_one_part(renderer):
    split = Splitter(renderer)
    for text in ("Yes.", "naïve", "the river " * 9):
        assert not renderer.render((Message("assistant", text),)).truncated
        assert split(text) == [(0, len(text))]


def test_parts_end_between_words_and_before_paragraphs(renderer):
    text = texts()["words"]
    for _, end in Splitter(renderer)(text)[:-1]:
        assert text[end] == " " and text[end - 1] != " "
    text = texts()["paragraphs"]
    ends = [end for _, end in Splitter(renderer)(text)[:-1]]
    assert sum(text[end - 1] == "\n" for end in ends) > 0
    assert all(text[end - 1] == "\n" or text[end].isspace() for end in ends)


def test_parts_are_even_so_that_no_rest_of_a_few_tokens_has_a_score_of_its_own(renderer):
    for words in range(30, 200, 7):
        text = " ".join(["river"] * words)
        sizes = np.array([len(renderer.places(text[start:end])) for start, end in Splitter(renderer)(text)])
        assert sizes.min() >= sizes.max() * (1 - 3 / NEAR) - 2, sizes


def test_a_character_of_more_tokens_than_a_row_is_a_part_of_its_own(tokenizer):
    split = Splitter(ChatRenderer(tokenizer, 2))
    assert split("🙂ab") == [(0, 1), (1, 2), (2, 3)]
