import time
from functools import partial

import numpy as np
import pytest
import torch

from mini_forge.data import batches
from mini_forge.data.batches import (
    Document,
    collate,
    group_lengths,
    plan_epoch,
    show_example,
    split,
    tokenize,
    touches,
)
from mini_forge.data.chat import choose_template
from mini_forge.data.labelled import LabelledDocument, collate_labelled, tokenize_labelled
from mini_forge.data.pairs import PairDocument, collate_pairs, flatten, tokenize_pairs
from mini_forge.data.tasks import Example, Labelled, Pair
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError
from mini_forge.training.sft import SFT
from tests import toy_tokenizer


def example(prompt="two and two?", response="four", line=1):
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Example(messages, line=line, file="rows.jsonl")


@pytest.fixture
def tokenizer(tmp_path):
    return toy_tokenizer.byte_level(tmp_path)


@pytest.fixture
def chatml(tokenizer):
    return choose_template("chatml", "m", tokenizer, "text-generation")


def only(examples, template, tokenizer, *options, **named):
    (document,), stats = tokenize(examples, template, tokenizer, *options, **named)
    return document, stats


@pytest.mark.parametrize("make", [toy_tokenizer.byte_level, toy_tokenizer.pieces])
@pytest.mark.parametrize("name", ["harmony", "chatml", "llama", None])
@pytest.mark.parametrize("response", ["four", " 4 🤖 日本\n", "  two\n\n", "👩‍👩‍👧"])
def test_the_trained_tokens_are_the_responses_and_their_end_token(make, name, response, tmp_path):
    tokenizer = make(tmp_path)
    template = choose_template(name, "m", tokenizer, "text-generation")
    (example_,) = [example("u 🤖", response)]
    document, stats = only([example_], template, tokenizer)
    rendered = template.render(example_)
    ids = tokenizer.encode(rendered.text)
    assert document.ids.tolist() == ids  # nothing follows the end token here
    trained = tokenizer.decode(document.ids[document.is_trained], skip_special=False)
    (span,) = rendered.trained
    assert trained.strip() == rendered.text[slice(*span)].strip()
    assert document.is_trained[-1] and (stats.tokens, stats.trained_tokens) == (len(ids), document.is_trained.sum())
    assert tokenizer.encode(rendered.prompt) == ids[: int(np.argmax(document.is_trained))]  # generation starts the same


def test_the_mask_by_hand(tokenizer, chatml):
    # <|im_start|> user \n … <|im_end|> \n <|im_start|> assistant \n | four <|im_end|>
    document, _ = only([example("two", "four")], chatml, tokenizer)
    assert document.ids[0] == 1 and document.ids[-1] == 2
    trained = [*tokenizer.encode("four"), 2]
    assert document.ids[-len(trained) :].tolist() == trained
    assert document.is_trained.tolist() == [False] * (len(document.ids) - len(trained)) + [True] * len(trained)


def test_the_end_token_is_trained_on_though_padding_and_eos_are_the_same_token(tokenizer, chatml):
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    batch = collate([only([example()], chatml, tokenizer)[0]])
    assert batch.targets[0, -1] == tokenizer.eos_id
    assert (batch.targets == 2).sum() == 1  # and the end of the user's turn, the same token, is not


def test_a_token_that_straddles_a_boundary_is_trained_on():
    # characters 0-2, 2-5, none before 5, 5-8 and a response at 3-6
    offsets = np.array([[0, 2], [2, 5], [5, 5], [5, 8], [8, 9]])
    assert touches(offsets, [(3, 6)]).tolist() == [False, True, True, True, False]
    assert touches(offsets, [(5, 8)]).tolist() == [False, False, True, True, False]
    assert touches(offsets, [(0, 2), (8, 9)]).tolist() == [True, False, False, False, True]


def test_every_assistant_turn_is_trained_on(tokenizer, chatml):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    document, _ = only([Example(messages)], chatml, tokenizer)
    assert show_example(document, tokenizer) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"
    )


def test_what_follows_the_last_trained_token_is_cut(tmp_path):
    source = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>\n' }}{% endfor %}"
    tokenizer = toy_tokenizer.byte_level(tmp_path, chat_template=source)
    template = choose_template("model", "m", tokenizer, "text-generation")
    document, stats = only([example()], template, tokenizer)
    assert document.ids[-1] == tokenizer.eos_id and stats.truncated == 0


def test_train_on_prompt_trains_on_all_but_the_first_token(tokenizer, chatml):
    document, stats = only([example()], chatml, tokenizer, None, True)
    assert document.is_trained.tolist() == [False] + [True] * (len(document.ids) - 1)
    assert stats.trained_tokens == len(document.ids) - 1


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_truncation_takes_the_prompts_left_and_keeps_the_response(tokenizer, chatml, train_on_prompt):
    full, _ = only([example()], chatml, tokenizer)
    response = int(full.is_trained.sum())
    for max_length in range(response + 1, len(full.ids)):
        document, stats = only([example()], chatml, tokenizer, max_length, train_on_prompt)
        assert document.ids.tolist() == full.ids[-max_length:].tolist()
        assert document.is_trained.sum() == (max_length - 1 if train_on_prompt else response) and (
            stats.truncated,
            stats.dropped,
        ) == (1, 0)
    assert only([example()], chatml, tokenizer, len(full.ids))[1].truncated == 0


def test_a_response_too_long_alone_loses_its_right_end_but_keeps_a_token_to_predict_it_from(tokenizer, chatml):
    full, _ = only([example()], chatml, tokenizer)
    first = int(np.argmax(full.is_trained))
    document, stats = only([example()], chatml, tokenizer, 2)
    assert document.ids.tolist() == full.ids[first - 1 : first + 1].tolist() and stats.truncated == 1
    assert document.is_trained.tolist() == [False, True]


def test_truncation_leaves_a_bos_in_its_place(tmp_path):
    tokenizer = toy_tokenizer.pieces(tmp_path)
    template = choose_template(None, "m", tokenizer, "text-generation")
    full, _ = only([example()], template, tokenizer)
    response = int(full.is_trained.sum())
    for max_length in range(2, len(full.ids)):
        document, _ = only([example()], template, tokenizer, max_length)
        assert len(document.ids) == max_length and document.ids[0] == tokenizer.bos_id
        kept = min(response, max_length - 1)
        assert document.is_trained.sum() == kept
        assert document.ids[document.is_trained].tolist() == full.ids[full.is_trained][:kept].tolist()


def test_a_conversation_cut_through_an_earlier_response_does_not_train_on_its_first_token(tokenizer, chatml):
    turns = [("user", "a"), ("assistant", "hello there good day"), ("user", "c"), ("assistant", "d")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    full, _ = only([Example(messages)], chatml, tokenizer)
    first = int(np.argmax(full.is_trained))
    document, _ = only([Example(messages)], chatml, tokenizer, len(full.ids) - first - 2)
    assert document.ids.tolist() == full.ids[first + 2 :].tolist()
    assert document.is_trained.tolist() == [False, *full.is_trained[first + 3 :].tolist()]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_text_rows_are_trained_on_whole_and_cut_at_the_right(train_on_prompt, tokenizer, chatml):
    text = Example(text="hello there, good day")
    full, _ = only([text], chatml, tokenizer, None, train_on_prompt)
    assert full.ids[-1] == tokenizer.eos_id and full.is_trained[1:].all()
    document, stats = only([text], chatml, tokenizer, 3, train_on_prompt)
    assert document.ids.tolist() == full.ids[:3].tolist() and stats.truncated == 1


def test_rows_with_nothing_left_to_train_on_are_dropped_and_counted(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path, bos_token="<|im_start|>")
    chatml = choose_template("chatml", "m", tokenizer, "text-generation")
    documents, stats = tokenize([example(), Example(text="a", line=2), example(line=3)], chatml, tokenizer, 1)
    assert documents == [] and (stats.rows, stats.kept, stats.dropped, stats.truncated) == (3, 0, 3, 0)
    documents, stats = tokenize([Example(text="a", line=i) for i in (4, 9)], chatml, tokenizer, 8)
    assert [document.line for document in documents] == [4, 9] and (stats.kept, stats.dropped) == (2, 0)


def test_every_row_a_template_refuses_is_named(tokenizer, chatml):
    calls = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [{}]})
    rows = [Example(calls, line=i, file="rows.jsonl") for i in (2, 5)]
    with pytest.raises(DataError) as caught:
        tokenize([*rows, example()], chatml, tokenizer)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["rows.jsonl:2:", "rows.jsonl:5:"]


def test_examples_are_encoded_as_they_are_read_not_all_at_once(tokenizer, chatml, monkeypatch):
    monkeypatch.setattr(batches, "_ENCODED_AT_ONCE", 200)  # characters; an example has about 80
    read = []

    def examples():
        for line in range(1, 51):
            read.append(line)
            yield example(line=line)

    encoded = batches.encode(examples(), chatml, tokenizer)
    assert next(encoded)[0].line == 1 and len(read) <= 4
    whole, _ = tokenize([example(line=line) for line in range(1, 51)], chatml, tokenizer)
    rest = [document for document, _ in encoded]
    assert [d.line for d in rest] == list(range(2, 51)) and read[-1] == 50
    assert all(np.array_equal(one.ids, whole[0].ids) for one in rest)


def test_once_a_row_is_refused_the_rest_is_checked_but_not_encoded(tokenizer, chatml, monkeypatch):
    monkeypatch.setattr(batches, "_ENCODED_AT_ONCE", 200)
    calls = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [{}]})
    rows = [Example(calls, line=i, file="f") if i in (20, 40) else example(line=i) for i in range(1, 51)]
    lines = []
    with pytest.raises(DataError) as caught:
        for document, _ in batches.encode(rows, chatml, tokenizer):
            lines.append(document.line)
    assert lines and lines == list(range(1, len(lines) + 1)) and len(lines) < 20
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["f:20:", "f:40:"]


def test_a_text_longer_than_a_group_is_encoded_alone(tokenizer, chatml, monkeypatch):
    monkeypatch.setattr(batches, "_ENCODED_AT_ONCE", 100)
    rows = [example(line=1), example("long " * 100, line=2), example(line=3)]
    assert [document.line for document, _ in batches.encode(rows, chatml, tokenizer)] == [1, 2, 3]


@pytest.mark.parametrize("form", ["pairs", "labelled"])
def test_rows_of_other_forms_are_encoded_in_the_same_way(form, tokenizer, chatml, monkeypatch):
    """A few at a time, a row's texts together; every refused row is named, and none is encoded after the first."""
    monkeypatch.setattr(batches, "_ENCODED_AT_ONCE", 400)  # characters; a text has about 80
    seen, encode_batch = [], Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: seen.append(texts) or encode_batch(self, texts))
    user, call = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "", "tool_calls": [{}]}
    one, other = ({"role": "assistant", "content": content} for content in ("four", "four, I think"))

    def rows(refused=()):
        for line in range(1, 21):
            last = call if line in refused else one
            if form == "pairs":
                yield Pair((user,), (last,), (other,), line=line, file="f")
            else:
                yield Labelled((user,), (last,), line % 2 == 0, line=line, file="f")

    tokenize_rows = {"pairs": tokenize_pairs, "labelled": tokenize_labelled}[form]
    documents, stats = tokenize_rows(list(rows()), chatml, tokenizer)
    assert [d.line for d in documents] == list(range(1, 21)) and stats.kept == 20
    texts = 2 if form == "pairs" else 1
    assert len(seen) > 3 and all(len(part) % texts == 0 and sum(map(len, part)) <= 400 for part in seen)
    for d in flatten(documents):
        trained = tokenizer.decode(d.ids[d.is_trained], skip_special=False)
        assert trained in ("four<|im_end|>", "four, I think<|im_end|>")
    seen.clear()
    with pytest.raises(DataError) as caught:
        tokenize_rows(list(rows(refused=(12, 19))), chatml, tokenizer)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["f:12:", "f:19:"]
    assert 0 < sum(map(len, seen)) < 12 * texts


def document(ids, trained):
    return Document(np.array(ids, np.int32), np.array(trained, bool), 1)


def test_a_batch_is_its_documents_end_to_end():
    batch = collate([document([5, 6, 7, 8], [0, 0, 1, 1]), document([9, 4], [0, 1])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 9]]
    assert batch.targets.tolist() == [[-100, 7, 8, 4]]
    assert batch.position.tolist() == [[0, 1, 2, 0]]
    assert batch.document.tolist() == [[0, 0, 0, 1]]
    assert (batch.documents, batch.tokens) == (2, 4)
    assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.targets, batch.position, batch.document))


@pytest.mark.parametrize("together", [collate, collate_pairs, partial(collate_labelled, max_length=99)])
def test_every_kind_of_batch_counts_its_tokens_alike(together):
    """Two documents of 23 and 22 tokens, alike in 20 of which the last predicts a response: 19 are computed once."""
    prompt = list(range(20))
    ids, trained = [[*prompt, 7, 8, 9], [*prompt, 6, 5]], [[0] * 20 + [1, 0, 1], [0] * 20 + [1, 1]]
    sides = [document(*each) for each in zip(ids, trained, strict=True)]
    assert [(d.inputs, d.prompt_tokens, d.trained_tokens) for d in sides] == [(22, 20, 2), (21, 20, 2)]
    if together is collate_pairs:
        sides = [PairDocument(*sides)]
    elif together is not collate:
        sides = [LabelledDocument(d.ids, d.is_trained, 1, True) for d in sides]
    alone, shared = together(sides), together(sides, share_prefixes=True)
    assert (alone.tokens, alone.computed_tokens, alone.trained_tokens) == (43, 43, 4)
    assert (shared.tokens, shared.computed_tokens, shared.trained_tokens) == (43, 24, 4)
    assert SFT.count(shared) == 4
    row = getattr(shared, "row", shared)
    assert row.trained()[1].tolist() == [7, 9, 6, 5]


def test_group_by_length_is_the_published_order():
    lengths = [5, 3, 9, 1, 7, 2, 8, 6, 4, 10, 12, 11]
    order = group_lengths(lengths, 2, torch.Generator().manual_seed(42))
    assert order.tolist() == [10, 8, 7, 1, 2, 0, 6, 11, 4, 3, 9, 5]
    assert group_lengths([], 2, torch.Generator()).tolist() == []


def test_of_equal_lengths_the_earlier_drawn_comes_first():
    lengths = [5 + 2 * (i % 3 > 0) for i in range(4000)]
    drawn = torch.randperm(4000, generator=torch.Generator().manual_seed(3)).tolist()
    expected = []
    for start in range(0, 4000, 100):  # 50 batches of 2
        stretch = drawn[start : start + 100]
        expected += [i for i in stretch if lengths[i] == 7] + [i for i in stretch if lengths[i] == 5]
    assert group_lengths(lengths, 2, torch.Generator().manual_seed(3)).tolist() == expected


LENGTHS = [3, 50, 7, 7, 21, 64, 1, 9, 33, 12, 5]


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"packing": True, "capacity": 64}])
def test_an_epoch_has_every_document_once_and_depends_on_seed_and_epoch_alone(options):
    plans = [plan_epoch(LENGTHS, 2, 2, seed=s, epoch=e, **options) for s, e in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    for plan in plans:
        assert sorted(i for microbatch in plan for i in microbatch) == list(range(len(LENGTHS)))
    assert list(plans[0]) == list(plans[1]) and len({str(list(plan)) for plan in plans}) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[5, 6], [1, 4], [3, 8], [10, 9], [0, 7], [2]]),
        ({"group_by_length": True}, [[5, 6], [1, 4], [8, 3], [9, 10], [7, 0], [2]]),
        ({"packing": True, "capacity": 64}, [[8, 4, 7, 6, 1, 9], [2, 3, 10, 0, 5]]),
    ],
    ids=["shuffled", "grouped", "packed"],
)
def test_an_epoch_is_the_one_that_earlier_releases_planned(options, expected):
    """Else a run would not resume where it stopped. Recorded from the release that planned in lists."""
    assert list(plan_epoch(LENGTHS, 2, 1, seed=3, epoch=2, **options)) == expected


def test_an_epoch_is_a_sequence_of_lists_and_knows_its_tokens():
    plan = plan_epoch(LENGTHS, 4)
    assert [plan[0], plan[1], plan[-1]] == list(plan) == plan[:] and plan[1:2] == [plan[1]]
    assert plan.tokens(np.array(LENGTHS)).tolist() == [sum(LENGTHS[i] for i in batch) for batch in plan]
    with pytest.raises(IndexError):
        plan[3]
    for options in ({}, {"group_by_length": True}, {"packing": True, "capacity": 8}):
        assert list(plan_epoch([], 4, **options)) == []


def test_a_million_lengths_are_planned_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 513, 1_000_000)
    for options in ({}, {"group_by_length": True}, {"packing": True, "capacity": 512}):
        began = time.process_time()
        plan = plan_epoch(lengths, 8, **options)
        assert time.process_time() - began < 5  # about 0.3 s; as lists, with a step for each document, 3 to 10 s
        assert np.array_equal(np.sort(plan.documents), np.arange(len(lengths)))


def test_microbatches_are_documents_or_with_packing_full_rows():
    assert [len(m) for m in plan_epoch(LENGTHS, 4)] == [4, 4, 3]
    assert 5 in plan_epoch(LENGTHS, 2, 2, group_by_length=True)[0]  # the longest comes first
    packed = plan_epoch(LENGTHS, 2, packing=True, capacity=64)
    assert len(packed) == 2 and all(sum(LENGTHS[i] for i in m) <= 128 for m in packed)
    assert list(packed) == list(plan_epoch(LENGTHS, 2, packing=True, capacity=64, group_by_length=True))


def test_the_split_takes_its_share_but_never_all_and_never_nothing():
    shares = [(10, 0.0, 0), (10, 0.2, 2), (30, 0.1, 3), (10, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0), (3, 0.99, 2)]
    for n, share, held_out in shares:
        train, evaluation = split(n, share, 42)
        assert len(evaluation) == held_out and sorted(train + evaluation) == list(range(n))
        assert train == sorted(train) and evaluation == sorted(evaluation)
    assert split(100, 0.1, 1) == split(100, 0.1, 1) != split(100, 0.1, 2)


def test_what_is_trained_on_is_marked_in_the_example_shown(tmp_path):
    tokenizer = toy_tokenizer.pieces(tmp_path)  # its decoder strips the first space of what it is given
    template = choose_template(None, "m", tokenizer, "text-generation")
    shown = show_example(only([example("two and two", "is four")], template, tokenizer)[0], tokenizer)
    assert shown == "<s> USER: two and two\nASSISTANT:⟦ is four</s>⟧"
