"""Evaluation: token-weighted loss, scores of generations, answers held to their context, and the files it leaves."""

import json
import math

import numpy as np
import pytest
import torch

from mini_forge.data.batches import Document, collate, tokenize
from mini_forge.data.chat import choose_template
from mini_forge.data.tasks import TASKS
from mini_forge.errors import CheckpointError, ConfigError, DataError, TrainingError
from mini_forge.inference.evaluate import (
    SAMPLES,
    evaluate_generation,
    evaluate_loss,
    format_table,
    write_eval,
)
from mini_forge.inference.generate import generate
from mini_forge.inference.spans import ContextSpans, TokenBytes, span_edges
from tests.fake_model import TableModel, says
from tests.tiny import random_model
from tests.toy_tokenizer import byte_level, pieces


def document(ids, first_trained, line=1):
    is_trained = np.arange(len(ids)) >= first_trained
    return Document(np.array(ids, dtype=np.int32), is_trained, line)


def table_nll(model, batch):
    """Sum and count over trained-on tokens, by the full table of logits."""
    logits = model.head(model(batch.input_ids, batch.position, batch.document))
    kept = batch.targets != -100
    nll = torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept], reduction="sum")
    return nll, int(kept.sum()), {}


def two_documents():
    """A model with p(1 after 0) = 3/4 and p(0 after 1) = 1/2, and documents of 1 and of 3 trained-on tokens."""
    model = TableModel(torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log())
    return model, [document([0, 0, 1], 2), document([0, 1, 0, 1], 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_token_weighs_the_same_whatever_the_batch(batch_size):
    """Tokens 0→1 three times, 1→0 once: (3·ln 4/3 + ln 2) / 4, not the mean of the two documents' means."""
    model, documents = two_documents()
    expected = (3 * math.log(4 / 3) + math.log(2)) / 4
    result = evaluate_loss(model, documents, table_nll, batch_size=batch_size)
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert result["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["eval_tokens"] == 4


def test_loss_of_the_real_model_equals_one_document_at_a_time(tmp_path):
    model = random_model()
    draw = torch.Generator().manual_seed(1)
    documents = [document(torch.randint(0, 272, (n,), generator=draw).tolist(), n // 2) for n in (5, 19, 2, 8, 30, 19)]

    def nll(model, batch):
        logits = model.logits(batch.input_ids, batch.position, batch.document)
        total = torch.nn.functional.cross_entropy(logits[0], batch.targets[0], ignore_index=-100, reduction="sum")
        return total, int((batch.targets != -100).sum()), {}

    with torch.no_grad():
        parts = [nll(model, collate([document])) for document in documents]
    expected = sum(float(total) for total, _, _ in parts) / sum(count for _, count, _ in parts)
    result = evaluate_loss(model, documents, nll, batch_size=4)
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_longest_documents_come_first():
    model, documents = two_documents()
    evaluate_loss(model, documents, table_nll, batch_size=1)
    assert [call[0].shape[1] for call in model.calls] == [3, 2]


def test_loss_is_measured_without_dropout_and_gradients_and_the_mode_is_restored():
    model, documents = two_documents()
    model.train()

    def nll(model, batch):
        assert not model.training and not model.dropout.training and not torch.is_grad_enabled()
        return table_nll(model, batch)

    evaluate_loss(model, documents, nll, batch_size=1)
    assert model.training and model.dropout.training


def test_no_documents_are_an_error():
    with pytest.raises(DataError, match="no rows to evaluate on"):
        evaluate_loss(two_documents()[0], [], table_nll, batch_size=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_failure(value):
    model, documents = two_documents()
    with pytest.raises(TrainingError, match="the loss is"):
        evaluate_loss(model, documents, lambda *_: (torch.tensor(value), 3, {}), batch_size=1)


CONTEXT = (
    "The tower (Tour Eiffel) in Paris is 330 m tall; Parisians call it «la dame de fer» – «größte» 日本の塔 🙂 ok."
)
STOP = 0


def spans_of(tokenizer, context=CONTEXT, limit=40, **options):
    return ContextSpans(context, TokenBytes(tokenizer), [STOP], limit, **options)


def walk(spans, liking):
    """What a model generates within the spans that likes each id by `liking` (limit, V) at each step."""
    limit, vocabulary = liking.shape
    model = says(1, [], vocabulary, max_positions=limit + 1)
    model.table[:limit] = liking
    [row] = generate(model, [[1]], max_new_tokens=limit, stop_ids=[STOP], allowed=lambda _, new: spans.allowed(new))
    return row


@pytest.fixture(params=[byte_level, pieces], ids=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


@pytest.mark.parametrize("whole_words", [True, False])
def test_whatever_is_generated_is_a_span_of_the_context(tokenizer, whole_words):
    """Random likings, short and long limits: the answer is in the context, and begins and ends at word edges."""
    starts, ends = span_edges(CONTEXT, whole_words)
    encoded = CONTEXT.encode()
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(60):
        limit = 12 + trial % 30
        spans = spans_of(tokenizer, limit=limit, whole_words=whole_words)
        liking = torch.rand(limit, tokenizer.vocab_size, generator=draw) * 5
        liking[:, STOP] -= 3
        row = walk(spans, liking)
        answer = spans.text(row)
        assert answer and answer in CONTEXT
        first = [i for i in starts if encoded.startswith(answer.encode(), i)]
        assert any(i + len(answer.encode()) in ends for i in first), answer
        seen.add(answer)
    assert len(seen) > 20


def can_spell(spans, ids):
    """Whether each of the ids was allowed when its turn came, and the stop id after them."""
    steps = [spans.allowed(ids[:n]) for n in range(len(ids) + 1)]
    return all(token in steps[n] for n, token in enumerate(ids)) and STOP in steps[-1]


ANSWERS = [
    "Paris",
    "330 m",
    "The tower (Tour Eiffel) in Paris",
    "«größte»",
    "größte",
    "日本",
    "日本の塔 🙂",
    "ok",
    "塔",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("before", ["", " "], ids=["bare", "space"])
def test_an_answer_may_begin_with_one_space_or_none(tmp_path, answer, before):
    tokenizer = byte_level(tmp_path)
    assert can_spell(spans_of(tokenizer), tokenizer.encode(before + answer))
    assert spans_of(tokenizer).text(tokenizer.encode(before + answer)) == answer


@pytest.mark.parametrize("answer", ANSWERS)
def test_sentencepiece_answers_begin_with_its_space(tmp_path, answer):
    tokenizer = pieces(tmp_path)
    assert can_spell(spans_of(tokenizer), tokenizer.encode(answer))
    assert spans_of(tokenizer).text(tokenizer.encode(answer)) == answer


@pytest.mark.parametrize(
    "text", ["London", "Pari", "aris", "tall Parisians", "  Paris", "größ", "tour", " ", "", "330 m tall Paris"]
)
def test_what_is_no_span_of_whole_words_cannot_be_spelled(tmp_path, text):
    tokenizer = byte_level(tmp_path)
    assert not can_spell(spans_of(tokenizer), tokenizer.encode(text))


def test_parts_of_words_can_be_spelled_when_asked_for(tmp_path):
    tokenizer = byte_level(tmp_path)
    spans = spans_of(tokenizer, whole_words=False)
    assert can_spell(spans, tokenizer.encode("aris")) and can_spell(spans, tokenizer.encode("größ"))
    assert not can_spell(spans, tokenizer.encode("London"))


def test_an_answer_never_stops_inside_a_character(tmp_path):
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("日本")
    assert len(ids) == 6  # one token a byte
    spans = spans_of(tokenizer)
    assert [STOP in spans.allowed(ids[:n]) for n in range(7)] == [False] * 3 + [True] + [False] * 2 + [True]


def test_words_that_occur_twice_are_followed_everywhere(tmp_path):
    """After "Paris" come both " is 330" and, letter by letter, nothing of "Parisians", which is another word."""
    tokenizer = byte_level(tmp_path)
    context = "Paris was. Paris is. Parisians"
    spans = spans_of(tokenizer, context)
    after = spans.allowed(tokenizer.encode("Paris"))
    spelled = {tokenizer.decode([token]) for token in after if token != STOP}
    assert {" ", "i"} <= spelled  # on to " was", " is", and to "Parisians"
    assert can_spell(spans, tokenizer.encode("Paris was")) and can_spell(spans, tokenizer.encode("Paris is"))
    assert can_spell(spans, tokenizer.encode("Parisians"))
    assert not can_spell(spans, tokenizer.encode("Parisi"))


def test_the_limit_leaves_room_to_finish_the_word(tmp_path):
    """With 3 tokens of one letter: "ab" and "abc" can be finished, "wxyz" may not even be begun."""
    tokenizer = byte_level(tmp_path)
    letters = {letter: tokenizer.encode(letter)[0] for letter in "qxzj"}
    spans = spans_of(tokenizer, "qxzj qx", limit=3)
    ids = [letters["q"], letters["x"]]
    assert letters["q"] in spans.allowed([]) and letters["x"] in spans.allowed(ids[:1])
    assert letters["z"] not in spans.allowed(ids) and STOP in spans.allowed(ids)
    assert letters["z"] in spans_of(tokenizer, "qxzj qx", limit=4).allowed(ids)


def test_a_context_with_nothing_to_spell_is_an_error(tmp_path):
    tokenizer = byte_level(tmp_path)
    with pytest.raises(DataError, match="no span of it can be spelled in 2 tokens"):
        spans_of(tokenizer, "qxzj", limit=2)
    with pytest.raises(DataError, match="no span"):
        spans_of(tokenizer, " \n ")


def test_white_space_before_the_end_token_closes_the_answer(tmp_path):
    """The llama format ends a response with " </s>": after the space only the stop may follow, unless the context
    goes on there."""
    tokenizer = byte_level(tmp_path)
    space, newline = tokenizer.encode(" "), tokenizer.encode("\n")
    spans = spans_of(tokenizer, "(Paris) is")
    paris = tokenizer.encode("Paris")
    assert spans.allowed([*paris, *newline]) == [STOP] and spans.allowed([*paris, *space]) == [STOP]
    assert spans.text([*paris, *newline]) == "Paris"
    assert spans.allowed([*paris, *newline, *newline]) == []
    assert newline[0] in spans_of(tokenizer, "(Paris) is", limit=len(paris) + 1).allowed(paris)
    closed = spans.allowed([*tokenizer.encode("(Paris)"), *space])
    assert STOP in closed and tokenizer.encode("i")[0] in closed


def test_a_stop_id_that_spells_text_stays_a_stop(tmp_path):
    tokenizer = byte_level(tmp_path)
    [angle] = tokenizer.encode("<")
    spans = ContextSpans("a <b c", TokenBytes(tokenizer), [angle], 20)
    assert angle not in spans.allowed([])
    assert angle in spans.allowed(tokenizer.encode("c"))
    assert angle not in spans._moves[2]  # where the context goes on with "<"


@pytest.mark.parametrize(
    ("context", "starts", "ends"),
    [
        ("ab cd", {0, 3}, {2, 5}),
        ("don't", {0, 3, 4}, {3, 4, 5}),
        ("5 km.", {0, 2, 4}, {1, 4, 5}),
        ("é日本", {0, 2, 5}, {2, 5, 8}),
        ("e\u0301a b", {0, 5}, {4, 6}),
        (" x ", {1}, {2}),
        ("3D2", {0}, {3}),
        ("कि x", {0, 7}, {6, 8}),  # a vowel sign belongs to its consonant
    ],
)
def test_spans_begin_and_end_at_the_edges_of_words(context, starts, ends):
    assert span_edges(context) == (starts, ends)


def test_a_vocabulary_spells_every_text_it_encodes(tokenizer):
    spelling = TokenBytes(tokenizer).spelling
    ids = tokenizer.encode(CONTEXT)
    assert b"".join(spelling[token] for token in ids).decode().removeprefix(" ") == CONTEXT
    assert not {tokenizer.token_id(special) for special in tokenizer.special_tokens} & spelling.keys()


def test_other_kinds_of_vocabularies_are_refused(tmp_path):
    tokenizer = byte_level(tmp_path)
    record = json.loads(tokenizer._backend.to_str())
    record["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    tokenizer._backend.__setstate__(json.dumps(record).encode())
    with pytest.raises(CheckpointError, match="byte-level or SentencePiece"):
        TokenBytes(tokenizer)


def questions(*rows):
    task = TASKS["extractive-question-answering"]
    return [task({"context": context, "question": "Where?", "answer": answer}) for context, answer in rows]


def prompt_length(tokenizer, template, example, extra=""):
    return len(tokenizer.encode(template.render_prompt(example) + extra))


def plain(tokenizer, task="extractive-question-answering"):
    return choose_template(None, "some", tokenizer, task)


def test_extractive_answers_are_held_to_the_context_by_default(tokenizer):
    """A model that wants to say "London in Paris": held to the context it says what comes nearest; free, just that."""
    template, task = plain(tokenizer), "extractive-question-answering"
    [example] = questions(("He lives in Paris now.", "Paris"))
    stop = tokenizer.eos_id
    wish = [*tokenizer.encode("London"), stop]
    likes = {tokenizer.encode("Paris")[0]: 3.0, tokenizer.encode(" Paris")[-len(tokenizer.encode("Paris")) :][0]: 3.0}
    model = says(prompt_length(tokenizer, template, example), wish, tokenizer.vocab_size, {**likes, stop: 2.0})
    options = {"max_new_tokens": len(wish) + 8}
    _, [held] = evaluate_generation(model, tokenizer, template, [example], task, **options)
    metrics, [free] = evaluate_generation(model, tokenizer, template, [example], task, constrained=False, **options)
    assert held["prediction"] and held["prediction"] in example.context
    assert free["prediction"] == "London" and metrics["exact_match"] == 0.0


def test_scores_are_means_over_rows_and_rows_keep_their_order(tmp_path):
    """The model says "Paris" to all: right, half right (F1 = 2·1/(1+2)), wrong; of prompts of rising length."""
    tokenizer = byte_level(tmp_path)
    template, task = plain(tokenizer), "extractive-question-answering"
    examples = questions(
        ("In Paris.", "Paris"), ("In Paris, France, too.", "Paris, France"), ("In Paris or Rome, they all say.", "Rome")
    )
    ids = [*tokenizer.encode(" Paris"), tokenizer.eos_id]
    script = {}
    for example in examples:
        length = prompt_length(tokenizer, template, example)
        script |= {length - 1 + k: token for k, token in enumerate(ids)}
    assert len(script) == 3 * len(ids)
    model = says(0, [], tokenizer.vocab_size)
    for position, token in script.items():
        model.table[position, token] = 10.0
    for batch_size in (1, 2, 3):
        metrics, predictions = evaluate_generation(
            model, tokenizer, template, examples, task, batch_size=batch_size, max_new_tokens=30
        )
        assert [row["prediction"] for row in predictions] == ["Paris"] * 3
        assert [row["reference"] for row in predictions] == [["Paris"], ["Paris, France"], ["Rome"]]
        assert [row["f1"] for row in predictions] == pytest.approx([1, 2 / 3, 0])
        assert [row["exact_match"] for row in predictions] == [1.0, 0.0, 0.0]
        assert predictions[1]["prompt"] == template.render_prompt(examples[1])
        assert metrics == pytest.approx(
            {"generated_rows": 3, "truncated_prompts": 0, "exact_match": 1 / 3, "f1": 5 / 9}
        )


def test_the_gold_answer_can_be_spelled_in_every_format(tokenizer):
    """A model that says what it would be trained to say gets full marks, held to the context or not."""
    task = "extractive-question-answering"
    [example] = questions(("He lives in Paris (France) now.", "Paris (France)"))
    for name in (None, "harmony", "chatml", "llama"):
        template = choose_template(name, "some", tokenizer, task)
        rendered = template.render(example)
        prompt, whole = tokenizer.encode(rendered.prompt), tokenizer.encode(rendered.text)
        assert whole[: len(prompt)] == prompt
        model = says(len(prompt), whole[len(prompt) :], tokenizer.vocab_size, {tokenizer.eos_id: -5.0})
        for constrained in (True, False):
            metrics, [row] = evaluate_generation(
                model, tokenizer, template, [example], task, constrained=constrained, max_new_tokens=len(whole)
            )
            assert (name, row["prediction"]) == (name, "Paris (France)")
            assert metrics["exact_match"] == 1.0
            assert int(model.calls[-1][1].max()) < len(whole)  # it went no further than the end


def test_an_end_of_two_tokens_is_told_by_its_first(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|><|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(tmp_path, chat_template=source)
    task = "extractive-question-answering"
    template = choose_template("model", "some", tokenizer, task)
    [example] = questions(("He lives in Paris now.", "Paris"))
    length = prompt_length(tokenizer, template, example)
    likes = dict.fromkeys(tokenizer.encode(" now."), 1.0)  # better than any other way to end
    for constrained, wish in ((True, "Paris<|endoftext|>"), (False, "Paris<|endoftext|><|im_end|>")):
        model = says(length, tokenizer.encode(wish), tokenizer.vocab_size, likes)
        options = {"constrained": constrained, "max_new_tokens": 20}
        _, [row] = evaluate_generation(model, tokenizer, template, [example], task, **options)
        assert row["prediction"] == "Paris"


def test_a_templates_thinking_is_given_and_not_taken_for_the_answer(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(tmp_path, chat_template=source)
    task = "extractive-question-answering"
    template = choose_template("model", "some", tokenizer, task)
    [example] = questions(("He lives in Paris now.", "Paris"))
    opening = "<think>\n\n</think>\n\n"
    assert template.opening == opening
    held = [*tokenizer.encode("Paris"), tokenizer.token_id("<|im_end|>")]
    model = says(prompt_length(tokenizer, template, example, opening), held, tokenizer.vocab_size)
    _, [row] = evaluate_generation(model, tokenizer, template, [example], task, max_new_tokens=9)
    assert row["prediction"] == "Paris" and row["prompt"].endswith(opening)
    free = [*tokenizer.encode(opening + "Paris"), tokenizer.token_id("<|im_end|>")]
    model = says(prompt_length(tokenizer, template, example), free, tokenizer.vocab_size)
    _, [row] = evaluate_generation(
        model, tokenizer, template, [example], task, max_new_tokens=len(free), constrained=False
    )
    assert row["prediction"] == "Paris" and not row["prompt"].endswith(opening)


def test_summaries_are_scored_by_rouge(tmp_path):
    """ "the cat" against "the cat sat": words 2 of 2 and 3, F1 4/5; pairs 1 of 1 and 2, F1 2/3."""
    tokenizer = byte_level(tmp_path)
    template = plain(tokenizer, "summarization")
    example = TASKS["summarization"]({"document": "The cat sat. It did.", "summary": "the cat sat"})
    ids = [*tokenizer.encode("the cat"), tokenizer.eos_id]
    model = says(prompt_length(tokenizer, template, example), ids, tokenizer.vocab_size)
    metrics, [row] = evaluate_generation(model, tokenizer, template, [example], "summarization", max_new_tokens=20)
    assert row["prediction"] == "the cat" and row["reference"] == "the cat sat"
    assert {name: metrics[name] for name in ("rouge1", "rouge2", "rougeL")} == pytest.approx(
        {"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5}
    )
    assert row["rouge2"] == pytest.approx(2 / 3)


def test_text_generation_has_samples_and_no_scores(tmp_path):
    tokenizer = byte_level(tmp_path)
    template = plain(tokenizer, "text-generation")
    read = TASKS["text-generation"]
    rows = [read({"text": "no prompt"}), *(read({"input": f"{i}?", "output": f"{i}!"}) for i in range(SAMPLES + 3))]
    model = says(0, [], tokenizer.vocab_size)
    metrics, predictions = evaluate_generation(model, tokenizer, template, rows, "text-generation", max_new_tokens=2)
    assert metrics == {"generated_rows": SAMPLES, "truncated_prompts": 0}
    assert predictions[0].keys() == {"prompt", "prediction", "reference"} and predictions[0]["reference"] == "0!"
    metrics, predictions = evaluate_generation(
        model, tokenizer, template, rows, "text-generation", max_new_tokens=2, limit=2
    )
    assert len(predictions) == metrics["generated_rows"] == 2
    assert evaluate_generation(model, tokenizer, template, rows[:1], "text-generation", max_new_tokens=2)[1] == []


def test_the_system_prompt_is_part_of_the_prompt(tmp_path):
    tokenizer = byte_level(tmp_path)
    template = choose_template("chatml", "some", tokenizer, "summarization")
    example = TASKS["summarization"]({"document": "A.", "summary": "B."})
    model = says(0, [], tokenizer.vocab_size)
    _, [row] = evaluate_generation(
        model, tokenizer, template, [example], "summarization", max_new_tokens=2, system_prompt="Be brief."
    )
    assert row["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert tokenizer.decode(model.calls[0][0][0].tolist(), skip_special=False) == row["prompt"]


def test_prompts_too_long_for_the_model_lose_their_left_part_but_for_bos(tmp_path):
    tokenizer = pieces(tmp_path)
    template = choose_template(None, "some", tokenizer, "summarization")
    read = TASKS["summarization"]
    examples = [read({"document": "a b c " * 30, "summary": "B."}), read({"document": "a", "summary": "B."})]
    ids = tokenizer.encode(template.render_prompt(examples[0]))
    assert ids[0] == tokenizer.bos_id
    room = len(tokenizer.encode(template.render_prompt(examples[1])))
    assert room < len(ids)
    model = says(0, [], tokenizer.vocab_size, max_positions=room + 5)
    metrics, _ = evaluate_generation(
        model, tokenizer, template, examples, "summarization", max_new_tokens=5, batch_size=1
    )
    assert metrics["truncated_prompts"] == 1
    assert model.calls[0][0].tolist() == [[ids[0], *ids[-(room - 1) :]]]


def test_more_new_tokens_than_positions_are_refused(tmp_path):
    tokenizer = byte_level(tmp_path)
    model = says(0, [], tokenizer.vocab_size, max_positions=40)
    example = TASKS["summarization"]({"document": "A.", "summary": "B."})
    with pytest.raises(ConfigError, match="max_new_tokens: 40 leaves no room for a prompt in the model's 40"):
        evaluate_generation(
            model, tokenizer, plain(tokenizer, "summarization"), [example], "summarization", max_new_tokens=40
        )


def test_no_examples_are_an_error(tmp_path):
    tokenizer = byte_level(tmp_path)
    with pytest.raises(DataError, match="no rows to generate from"):
        evaluate_generation(None, tokenizer, plain(tokenizer), [], "summarization")


def test_prompts_are_the_beginnings_of_what_was_trained_on(tokenizer):
    """The prompt's tokens are those before the first trained-on one, so a model meets what it has seen."""
    [example] = questions(("He lives in Paris now.", "Paris"))
    template = plain(tokenizer)
    [trained], _ = tokenize([example], template, tokenizer)
    first = int(trained.is_trained.argmax())
    model = says(0, [], tokenizer.vocab_size)
    evaluate_generation(model, tokenizer, template, [example], "extractive-question-answering", max_new_tokens=20)
    assert model.calls[0][0][0].tolist() == trained.ids[:first].tolist()


def test_files_hold_metrics_and_a_line_per_prediction(tmp_path):
    rows = [{"prompt": "größe?", "prediction": "a\nb", "reference": ["x"], "f1": 0.5}] * 2
    write_eval(tmp_path, {"f1": 0.5, "generated_rows": 2}, rows)
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == {"f1": 0.5, "generated_rows": 2}
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows and "größe" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "predictions.jsonl"]


def test_an_earlier_evaluations_predictions_do_not_stay(tmp_path):
    write_eval(tmp_path, {"f1": 0.5}, [{"prompt": "p"}])
    write_eval(tmp_path, {"eval_loss": 1.0}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the evaluation here"):
        write_eval(tmp_path / "missing", {"f1": 0.5}, [])


def test_the_table_is_aligned():
    assert format_table({"eval_loss": 1.23456, "eval_tokens": 12345, "f1": 0.5}) == (
        "eval_loss     1.235\neval_tokens  12,345\nf1              0.5"
    )
