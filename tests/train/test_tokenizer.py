"""Tokenizers that are read from a definition: the widths of their ids, and what they add."""

import json

import numpy as np
import pytest
import tokenizers

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
