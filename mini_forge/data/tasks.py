"""What the rows of a dataset mean: each format's keys, checked, to an `Example`, a `Pair` or a `Labelled`.

    text-generation               messages · instruction,output (and input) · prompt,completion · input,output · text
    summarization                 document,summary · article,summary · input,output
    extractive-question-answering context,question,answers {text, answer_start} · context,question,answer
    dpo, rlhf                     prompt,chosen,rejected (rlhf with a reward model or function: prompt)
    dpo with loss_type "kto"      prompt,completion,label

The first format whose keys a row has is its format; other keys are ignored. Every row is checked, and every problem
is reported as `FILE:LINE: …`. To add a format, add a line to `TASKS`' tables and a function below.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mini_forge.data.rows import kind, raise_problems, scan

SUMMARIZE = "Summarize the following document:\n{}"
QUESTION = "Context: {}\n\nQuestion: {}"
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One training example: a conversation to spell by a template, or `text` to learn as it is."""

    messages: tuple[dict, ...] | None = None  # ends with an assistant turn; None for a `text` row
    text: str | None = None
    prompt: str | None = None  # the last user turn
    response: str | None = None  # the last assistant turn
    reference: str | list[str] | None = None  # what evaluation compares with; all gold answers of a question
    context: str | None = None  # what an extractive answer is a span of
    tools: tuple[dict, ...] | None = None  # for the checkpoint's own template
    line: int = 0
    file: str = ""


@dataclass(frozen=True)
class Pair:
    """A prompt and two continuations, the first preferred; both None where only prompts were asked for."""

    prompt: tuple[dict, ...]
    chosen: tuple[dict, ...] | None = None
    rejected: tuple[dict, ...] | None = None
    tools: tuple[dict, ...] | None = None
    line: int = 0
    file: str = ""


@dataclass(frozen=True)
class Labelled:
    """A prompt, one continuation, and whether that is what is wanted."""

    prompt: tuple[dict, ...]
    completion: tuple[dict, ...]
    is_desirable: bool
    tools: tuple[dict, ...] | None = None
    line: int = 0
    file: str = ""


Datum = Example | Pair | Labelled


class _Fault(ValueError):
    """What is wrong with one row, without its place."""


def load_examples(
    path, task: str, strategy: str = "sft", needs_pairs: bool = True, is_labelled: bool = False
) -> list[Example] | list[Pair] | list[Labelled]:
    """The rows of a dataset as Examples, or as Pairs for strategy dpo and rlhf. Raises DataError with every problem.

    `needs_pairs` False (rlhf with a reward model or function) asks of a row only its prompt; `is_labelled` (dpo with a
    loss on single responses) asks for a response and its label, and gives Labelled."""
    read = TASKS[task]
    if strategy in ("dpo", "rlhf"):
        read = labelled if is_labelled else pair if needs_pairs else prompt_only
    return list(_read_rows(path, read))


def read_examples(path, task: str) -> Iterator[Example]:
    """The same Examples one by one, none of them kept; DataError with every problem comes after the last."""
    return _read_rows(path, TASKS[task])


def _read_rows(path, read: Callable[[dict], Datum]) -> Iterator[Datum]:
    problems = []
    for row in scan(path, problems):
        try:
            example = read(row.fields)
        except _Fault as fault:
            problems.append((row.line, str(fault)))
        else:
            yield replace(example, line=row.line, file=str(path))
    raise_problems(path, problems)


def user_message(task: str, prompt: str) -> dict:
    """The user turn of a bare prompt, as the task's rows spell it: for a summary, `prompt` is the document."""
    return {"role": "user", "content": SUMMARIZE.format(prompt) if task == "summarization" else prompt}


def text_generation(fields: dict) -> Example:
    return _read_row(fields, "text-generation", _TEXT_GENERATION)


def summarization(fields: dict) -> Example:
    return _read_row(fields, "summarization", _SUMMARIZATION)


def extractive_question_answering(fields: dict) -> Example:
    return _read_row(fields, "extractive-question-answering", _QUESTION_ANSWERING)


def pair(fields: dict) -> Pair:
    return _read_row(fields, "dpo and rlhf", {("prompt", "chosen", "rejected"): _preference})


def labelled(fields: dict) -> Labelled:
    return _read_row(fields, 'dpo with loss_type "kto"', {("prompt", "completion", "label"): _labelled})


def prompt_only(fields: dict) -> Pair:
    return _read_row(fields, "rlhf", {("prompt",): lambda row: Pair(_prompt(row), tools=_tools(row))})


TASKS: dict[str, Callable[[dict], Example]] = {
    "text-generation": text_generation,
    "summarization": summarization,
    "extractive-question-answering": extractive_question_answering,
}


def _read_row(fields: dict, task: str, formats: dict[tuple[str, ...], Callable]):
    """By the first format whose keys all have values; a null counts as absent unless nothing else fits."""
    has = {key for key, value in fields.items() if value is not None}
    for keys in (has, fields.keys()):
        for needed, read in formats.items():
            if keys >= set(needed):
                return read(fields)
    accepted = " · ".join(",".join(keys) for keys in formats)
    raise _Fault(f"has the keys {', '.join(fields) or '(none)'}; a row for {task} needs {accepted}")


def _from_messages(row: dict) -> Example:
    messages = _conversation(row["messages"], "messages")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise _Fault("messages has no assistant turn; there is nothing to learn from it")
    messages = messages[: turns[-1] + 1]  # what follows the last response is never trained on
    users = [message["content"] for message in messages if message["role"] == "user"]
    response = messages[-1].get("content")
    return Example(messages, None, users[-1] if users else None, response, response, tools=_tools(row))


def _tools(row: dict) -> tuple[dict, ...] | None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Fault(f"tools must be a list of objects, is {kind(tools)}")
    return tuple(tools or ()) or None


def _from_instruction(row: dict) -> Example:
    instruction, response = _text(row, "instruction").strip(), _text(row, "output").strip()
    extra = "" if row.get("input") is None else _text(row, "input", may_be_blank=True).strip()
    return _single_turn(f"{instruction}\n\n{extra}" if extra else instruction, response)


def _keys(prompt_key: str, response_key: str, form: str = "{}") -> Callable[[dict], Example]:
    return lambda row: _single_turn(form.format(_text(row, prompt_key)), _text(row, response_key))


def _single_turn(prompt: str, response: str, **others) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Example(messages, prompt=prompt, response=response, **{"reference": response, **others})


def _from_question(row: dict) -> Example:
    context, question = _text(row, "context"), _text(row, "question")
    key = "answers" if row.get("answers") is not None else "answer"
    answers = _answers(row, key, context)
    return _single_turn(QUESTION.format(context, question), answers[0], reference=answers, context=context)


_TEXT_GENERATION = {
    ("messages",): _from_messages,
    ("instruction", "output"): _from_instruction,
    ("prompt", "completion"): _keys("prompt", "completion"),
    ("input", "output"): _keys("input", "output"),
    ("text",): lambda row: Example(text=_text(row, "text")),
}
_SUMMARIZATION = {
    ("document", "summary"): _keys("document", "summary", SUMMARIZE),
    ("article", "summary"): _keys("article", "summary", SUMMARIZE),
    ("input", "output"): _keys("input", "output", SUMMARIZE),
}
_QUESTION_ANSWERING = {
    ("context", "question", "answers"): _from_question,
    ("context", "question", "answer"): _from_question,
}


def _answers(row: dict, key: str, context: str) -> list[str]:
    """All gold answers: {"text": [...], "answer_start": [...]}, a list of strings, or one string."""
    value = row[key]
    starts = None
    if isinstance(value, dict):
        if "text" not in value:
            raise _Fault(f"{key} has the keys {', '.join(value) or '(none)'}; it needs text (and answer_start)")
        value, starts = value["text"], value.get("answer_start")
        key = f"{key}.text"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise _Fault(f"{key} must be a string or a list of at least one, is {kind(value)}; remove the row, or fill it")
    places = [key] if isinstance(value, str) else [f"{key}[{i}]" for i in range(len(texts))]
    texts = [_text({place: text}, place) for place, text in zip(places, texts, strict=True)]
    if starts is None:
        for text in texts:
            if _letters(text) not in _letters(context):
                raise _Fault(f"the answer {text[:40]!r} is not in the context; copy it from there word for word")
        return texts
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(starts, list) or len(starts) != len(texts) or any(type(start) is not int for start in starts):
        raise _Fault(f"answer_start must be one integer for each of the {len(texts)} answers")
    for text, start in zip(texts, starts, strict=True):
        if start < 0 or not context.startswith(text, start):
            found = context.find(text)
            where = f"it is at {found}" if found >= 0 else "it is nowhere in the context"
            raise _Fault(f"the answer {text[:40]!r} is not at answer_start {start} of the context; {where}")
    return texts


def _letters(text: str) -> str:
    """Letters and digits alone, case folded: an answer without its place need not repeat the spacing."""
    return "".join(filter(str.isalnum, text.casefold()))


def _preference(row: dict) -> Pair:
    prompt = _prompt(row)
    return Pair(prompt, _continuation(row, "chosen", prompt), _continuation(row, "rejected", prompt), _tools(row))


def _labelled(row: dict) -> Labelled:
    prompt = _prompt(row)
    completion = _continuation(row, "completion", prompt)
    if not isinstance(row["label"], bool):
        raise _Fault(f"label must be true (a desirable completion) or false, without quotes, is {kind(row['label'])}")
    return Labelled(prompt, completion, row["label"], _tools(row))


def _prompt(row: dict) -> tuple[dict, ...]:
    """What is to be answered: a string as the user's turn, or a conversation."""
    turns = _turns(row, "prompt", "user")
    if turns[-1]["role"] == "assistant":
        raise _Fault("prompt ends with an assistant turn, which a response would follow as a second one; remove it, or "
                     "move it into the responses")  # fmt: skip
    return turns


def _continuation(row: dict, key: str, prompt: tuple[dict, ...]) -> tuple[dict, ...]:
    """The turns of a response to `prompt`, the last of them the assistant's."""
    turns = _turns(row, key, "assistant")
    if turns[: len(prompt)] == prompt and len(turns) > len(prompt):  # the whole conversation given again
        turns = turns[len(prompt) :]
    if turns[0] == prompt[-1]:
        raise _Fault(f"{key} begins with the prompt's last message; give all of the prompt's there, or none")
    if turns[-1]["role"] != "assistant":
        raise _Fault(f"{key} must end with an assistant turn, ends with {turns[-1]['role']!r}")
    return turns


def _turns(row: dict, key: str, role: str) -> tuple[dict, ...]:
    """A string as one turn of that role, or a list of messages."""
    if isinstance(row[key], list):
        return _conversation(row[key], key)
    return ({"role": role, "content": _text(row, key)},)


def _conversation(value, key: str) -> tuple[dict, ...]:
    if not isinstance(value, list) or not value:
        raise _Fault(f"{key} must be a list of at least one {{role, content}}, is {kind(value)}")
    return tuple(_message(message, f"{key}[{i}]") for i, message in enumerate(value))


def _message(message, name: str) -> dict:
    """One checked message, its text parts joined, all its other keys kept for the checkpoint's own template."""
    if not isinstance(message, dict):
        raise _Fault(f"{name} must be an object with role and content, is {kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _Fault(f"{name}.role must be one of {', '.join(ROLES)}, is {role!r}")
    if role == "assistant" and message.get("tool_calls") and (content is None or content == ""):
        return dict(message)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise _Fault(f'{name}.content may only have parts {{"type": "text", "text": "…"}}; we train on text alone')
        content = "".join(texts)
    content = _text({f"{name}.content": content}, f"{name}.content", may_be_blank=role not in ("user", "assistant"))
    return {**message, "content": content}


def _text(row: dict, key: str, may_be_blank: bool = False) -> str:
    """A string field. Half a character (a lone surrogate escape) is no text a tokenizer can take."""
    value = row[key]
    if not isinstance(value, str):
        raise _Fault(f"{key} must be a string, is {kind(value)}")
    if not may_be_blank and not value.strip():
        raise _Fault(f"{key} is empty; remove the row or fill it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise _Fault(f"{key} has half a character (an escape \\ud800 to \\udfff without its other half); remove it")
    return value
