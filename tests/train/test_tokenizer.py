"""Tokenizers that are read from a definition: the widths of their ids, and what they add."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from train import tokenizer


def word_level(path, largest):
    words = {"<unk>": 0, tokenizer.EOD: 1, "a": largest}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([tokenizer.EOD])
    made.save(str(path))
    return path


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_ids_are_as_wide_as_the_largest_though_some_are_no_token_s(tmp_path, largest, dtype):
    loaded = tokenizer.load(str(word_level(tmp_path / "tokenizer.json", largest)))
    assert loaded.vocab_size == largest + 1 and loaded.dtype == dtype
    np.testing.assert_array_equal(loaded.encode("a"), [largest])


def test_nothing_is_added_to_a_document(tmp_path):
    """Neither padding nor what a template puts around a text."""
    path = word_level(tmp_path / "tokenizer.json", 2)
    definition = json.loads(path.read_text())
    definition["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    path.write_text(json.dumps(definition))
    made = tokenizers.Tokenizer.from_file(str(path))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.EOD} $A", special_tokens=[(tokenizer.EOD, 1)]
    )
    made.save(str(path))
    assert made.encode("a a").ids == [1, 2, 2, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(tokenizer.load(str(path)).encode("a a"), [2, 2])


@pytest.fixture(scope="module")
def byte_level():
    """Makes a byte-level tokenizer whose words may be of several characters, spaces among them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[tokenizer.EOD]
    )
    made.train_from_iterator(["a  b\n\n\tb's it's 12 ..\n\xe9\xe9  \n \u3000x"] * 9, trainer)
    return made


@settings(max_examples=300)
@given(text=st.text("ab's1. \n\t\r\xa0\xe9\u3000\x1c\u200b", max_size=60), piece=st.integers(1, 9))
def test_a_text_s_pieces_have_its_ids(byte_level, tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "byte_level.json"
    if not path.exists():
        byte_level.save(str(path))
    loaded = tokenizer.load(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", piece)
        pieces = loaded.pieces(text)
    assert "".join(pieces) == text
    np.testing.assert_array_equal(np.concatenate(loaded.encode_batch(pieces)), loaded.encode(text))


@pytest.mark.parametrize("change", ["none", "prefix", "normalizer", "added", "other"])
def test_only_where_that_is_sure_is_a_text_cut(byte_level, tmp_path, change, monkeypatch):
    made = tokenizers.Tokenizer.from_str(byte_level.to_str())
    if change == "prefix":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "normalizer":
        made.normalizer = tokenizers.normalizers.Strip()
    elif change == "added":
        made.add_tokens(["a b"])
    elif change == "other":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(tokenizer, "PIECE", 3)
    pieces = tokenizer.load(str(tmp_path / "tokenizer.json")).pieces("a b a b a b")
    assert pieces == (["a b", " a b", " a b"] if change == "none" else ["a b a b a b"])
