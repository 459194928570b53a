import json
import shutil

import numpy as np
import pytest

from mini_forge.data.tokenizer import load_tokenizer
from mini_forge.errors import CheckpointError, DataError
from tests import toy_tokenizer
from tests.tiny import make_unreadable

TEXTS = ["two  and\n\n two", "日本 🤖 é\n", "👩‍👩‍👧 a", " leading", "trailing \n", "<|im_start|>hello<|im_end|>\n four"]


@pytest.mark.parametrize("make", [toy_tokenizer.byte_level, toy_tokenizer.pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_offsets_count_characters_and_cover_the_whole_text(make, text, tmp_path):
    tokenizer = make(tmp_path)
    ((ids, offsets),) = tokenizer.encode_batch([text])
    assert len(ids) == len(offsets) and ids.tolist() == tokenizer.encode(text)
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(start < end for start, end in offsets)  # spaces are not trimmed away, as the post-processor would


def test_every_part_of_a_character_has_the_offsets_of_that_character(tmp_path):
    ((ids, offsets),) = toy_tokenizer.byte_level(tmp_path).encode_batch(["x🤖y"])
    assert len(ids) == 6 and offsets.tolist() == [[0, 1], *[[1, 2]] * 4, [2, 3]]


def test_a_batch_equals_its_texts_one_by_one(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path)
    for text, found in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        (alone,) = tokenizer.encode_batch([text])
        assert all(np.array_equal(a, b) and a.dtype == np.int32 for a, b in zip(found, alone, strict=True))
    assert tokenizer.encode_batch([""])[0][1].shape == (0, 2)


@pytest.mark.parametrize("make", [toy_tokenizer.byte_level, toy_tokenizer.pieces])
def test_decoding_gives_the_text_back(make, tmp_path):
    tokenizer = make(tmp_path)
    for text in TEXTS[:2]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_spelled_in_a_text_are_tokens_and_can_be_left_out(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path)
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "a" and tokenizer.decode(ids, skip_special=False) == "<|im_start|>a<|im_end|>"


def test_only_a_tokenizer_that_would_add_a_bos_says_so_and_encoding_adds_none(tmp_path):
    with_bos = toy_tokenizer.pieces(tmp_path / "pieces")
    assert with_bos.adds_bos and with_bos.bos_id == 1 and with_bos.encode("a")[0] != 1
    assert not toy_tokenizer.byte_level(tmp_path / "bytes", bos_token="<|im_start|>").adds_bos


def test_tokens_are_read_as_strings_objects_and_from_the_older_map(tmp_path):
    toy_tokenizer.pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "pad_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "pad_token": "<unk>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_token) == (1, 2, 0, None)
    assert tokenizer.token_id("no such token") is None


def test_eos_ids_gather_what_every_file_names(tmp_path):
    toy_tokenizer.byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 0, 1)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"  # id 0 of the generation configuration


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    toy_tokenizer.byte_level(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert len(load_tokenizer(tmp_path).encode("a b c d e")) > 2


def test_the_chat_template_comes_from_its_file_the_configuration_or_the_default_of_several(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert toy_tokenizer.byte_level(tmp_path).chat_template is None
    assert toy_tokenizer.byte_level(tmp_path, chat_template="C").chat_template == "C"
    assert toy_tokenizer.byte_level(tmp_path, chat_template=named).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_tokenizer(tmp_path).chat_template == "F"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match='tool_use but no "default"'):
        toy_tokenizer.byte_level(tmp_path, chat_template=named[1:])


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path / "a", chat_template="{{ 1 }}")
    tokenizer.save(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    saved = load_tokenizer(tmp_path / "b")
    assert saved.encode(TEXTS[1]) == toy_tokenizer.byte_level(tmp_path / "c").encode(TEXTS[1])
    assert (saved.chat_template, saved.eos_id) == ("{{ 1 }}", 2)
    saved.save(tmp_path / "b")  # onto itself
    assert load_tokenizer(tmp_path / "b").chat_template == "{{ 1 }}"


def test_what_cannot_be_read_is_named_with_a_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json here.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    toy_tokenizer.byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load_tokenizer(tmp_path)


NAMES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json",
         "chat_template.jinja"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_files_that_cannot_be_read_are_named(name, tmp_path):
    toy_tokenizer.byte_level(tmp_path)
    make_unreadable(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read .*error.*; give a folder that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_not_utf8_are_named(name, tmp_path):
    toy_tokenizer.byte_level(tmp_path)
    (tmp_path / name).write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match=f"{name}: not UTF-8 at byte 3; save the file as UTF-8"):
        load_tokenizer(tmp_path)


def test_a_text_with_half_a_character_is_refused(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(DataError, match=r"text: 'before \\udcff after': has half a character"):
            encode("before \udcff after")


@pytest.mark.parametrize("name, key, value, message", [
    ("tokenizer_config.json", "eos_token", 5, "eos_token 5"),
    ("tokenizer_config.json", "bos_token", {"content": [1]}, "bos_token .*must be a text"),
    ("tokenizer_config.json", "chat_template", 5, "tokenizer_config.json: chat_template 5 must be a text"),
    ("tokenizer_config.json", "chat_template", ["x"], 'but no "default"'),
    ("tokenizer_config.json", "chat_template", [{"name": "default", "template": 5}], "chat_template 5 must be a text"),
    ("generation_config.json", "eos_token_id", "x", "generation_config.json: eos_token_id .*must be token ids"),
    ("config.json", "eos_token_id", [1, -2], "/config.json: eos_token_id .*must be token ids"),
])  # fmt: skip
def test_values_of_the_wrong_kind_are_named(name, key, value, message, tmp_path):
    toy_tokenizer.byte_level(tmp_path)
    (tmp_path / name).write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)
