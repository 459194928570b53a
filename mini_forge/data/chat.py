"""Templates: how a conversation is spelled, and which of its characters are a response.

Every format is a Jinja chat template, the checkpoint's own as much as harmony, chatml, llama and the plain task prompts
below, so one way of spelling and of finding responses serves training, evaluation, `generate`, `chat`, and any other
tool that reads the saved `chat_template.jinja`.

A response begins where the generation prompt ends, and ends with the end token the template puts after it (the white
space that follows is not part of it). If the template defines none, eos is appended to the last response. Both places
are found in the one full text: it must begin with the conversation up to the turn, spelled with the generation prompt,
and with the conversation through the turn. Templates that spell a turn differently once it lies in the past (dropping
its thinking, closing it with another token) break that; then marks are put into what the turns say, and the places are
those of the marks. Whatever a template itself writes into a response (an empty think block, a channel) is trained on,
because the model will have to write it: a note says what.

For the families with thinking that means, with their own templates: gpt-oss trains on `<|channel|>final<|message|>`,
the answer and `<|return|>`, in turns before the last on `<|end|>`, in a tool call on ` to=functions.…` to `<|call|>`;
thinking that the template keeps (the last answer's) is trained on as the analysis channel. Qwen3 trains on `<think>`,
the thinking or nothing, `</think>` and the answer in the last turn, on the answer alone in those before it. Evaluation,
`generate` and `chat` prompt with the text that precedes a response in training, so the model writes those itself.

A row's messages and tools reach the checkpoint's own template whole, as transformers hands them over. Our own formats
refuse tools, calls, results and thinking: they have no place for them.
"""

import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

from mini_forge.data.formats import FORMAT_TOKENS, FORMATS, NAME_RULE, PLAIN
from mini_forge.data.messages import (
    MARK,
    is_thought_in,
    thoughtless,
    with_mark,
    with_reasoning,
    with_system,
    without_nulls,
)
from mini_forge.data.sandbox import TemplateFailure, TemplateTimeout, compile_template
from mini_forge.data.tasks import Example
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError, DataError

ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Rendered:
    """One example as text, up to the end of its last response. `trained` are the responses' (start, end) in characters,
    `prompt` is the text before the last of them."""

    text: str
    trained: list[tuple[int, int]]
    prompt: str


@dataclass(frozen=True)
class Template:
    """A way to spell conversations; made by `choose_template`."""

    name: str  # harmony, chatml, llama, plain, or model: the checkpoint's own
    source: str  # the Jinja text, to save beside an adapter
    notes: list[str]  # what to tell the user about it, a line each
    opening: str  # what the template itself puts between the generation prompt and a response's content
    end: str | None  # what it puts after it: an end token, "" for nothing; None if it would not say
    cue: str  # its generation prompt; may be "", where a response follows the user's turn directly
    asks: bool  # whether it has one; if not, one is made of what precedes a response's content
    date: date | None  # that it tells; None if it tells none
    _spell: Callable[..., str] = field(repr=False)  # (messages, tools, add_generation_prompt) -> text
    _tokenizer: Tokenizer = field(repr=False)

    def render(self, example: Example, system_prompt: str | None = None) -> Rendered:
        """The whole example and its response spans. Raises DataError, naming the row, if the template refuses it, and
        CheckpointError if it does not come to an end."""
        if example.text is not None:
            return self._render_text(example.text)
        messages = with_system(example.messages, system_prompt)
        try:
            text = self._spell(messages, example.tools, False)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._response(text, messages, i, example.tools) for i in turns]
            if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
                raise TemplateFailure("cannot tell one response from the next in what it spells")
        except TemplateTimeout as timeout:
            raise TemplateTimeout(f"{example.file}:{example.line}: {timeout}") from timeout
        except TemplateFailure as failure:
            raise DataError(f"{example.file}:{example.line}: the {self.name} chat template: {failure}") from failure
        start, end = spans[-1]
        text, prompt = text[:end], text[:start]
        if not text.endswith(self._ends()):
            text += self._tokenizer.eos_token or ""
        return Rendered(text, [*spans[:-1], (start, len(text))], prompt)

    def render_prompt(
        self, conversation: Example | Sequence[dict], system_prompt: str | None = None, tools=None
    ) -> str:
        """The text to generate from: an example's without its last response, or a conversation's that awaits one."""
        if isinstance(conversation, Example):
            return self.render(conversation, system_prompt).prompt
        messages = (*with_system(tuple(conversation), system_prompt), {"role": "assistant", "content": MARK})
        try:
            text = self._spell(messages, tools, False)
            start = self._start(text, messages, len(messages) - 1, tools)
        except TemplateFailure as failure:
            raise DataError(f"the {self.name} chat template: {failure}") from failure
        if start is None:
            raise DataError(f"the {self.name} chat template: cannot tell where the response would begin")
        return text[:start]

    def leaves_out(self, role: str) -> bool:
        """Whether a conversation that ends in a response lacks what its first message, of that role, says."""
        messages = ({"role": role, "content": MARK}, {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"})  # fmt: skip
        text = self._spell_past(messages, None, False)
        return text is not None and MARK not in text

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids that end a response: the checkpoint's eos, and the template's end token where it is one token."""
        return list(dict.fromkeys(i for i in (*tokenizer.eos_ids, tokenizer.token_id(self.end)) if i is not None))

    def answer(self, text: str) -> str:
        """The answer in a generation decoded with its special tokens: no thinking, no opening, no end token."""
        for opening in (self.opening, "</think>"):
            if opening.strip():
                text = text.rpartition(opening.strip())[2]
        places = [text.find(end) for end in self._ends() if end in text]
        return text[: min(places, default=len(text))].strip()

    def _render_text(self, text: str) -> Rendered:
        """A `text` row: the text itself, between BOS, if the tokenizer's own post-processor would add it, and eos."""
        bos = self._tokenizer.bos_token if self._tokenizer.adds_bos else ""
        eos = self._tokenizer.eos_token or ""
        text = bos + text.removeprefix(bos).removesuffix(eos) + eos
        return Rendered(text, [(len(bos), len(text))], bos)

    def _ends(self) -> tuple[str, ...]:
        """What a response can end in: the template's end, or (in past turns often another) special token."""
        return (*((self.end,) if self.end else ()), *self._tokenizer.special_tokens)

    def _response(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> tuple[int, int]:
        """(start, end) in `text`, the spelling of all `messages`, of the response in one assistant turn."""
        start = self._start(text, messages, turn, tools)
        if messages[turn].get("tool_calls"):
            end = self._end_of_calls(text, messages, turn, tools)
        else:
            end = self._end_of_content(text, messages, turn, tools)
        if start is None or end is None or start >= end:
            raise TemplateFailure(
                f"cannot tell where the response messages[{turn}] begins and ends in what it spells; end the row "
                "before it, or give chat_template another format"
            )
        return start, end

    def _start(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> int | None:
        """Where in `text` the generation prompt of an assistant turn ends."""
        cue = self._spell_past(messages[:turn], tools, True) if self.asks else None
        is_cued = turn > 0 or (cue or "").endswith(self.cue)  # some spell it only behind a message
        if cue is not None and is_cued and text.startswith(cue):
            return len(cue)
        if (start := self._start_by_marks(text, messages, turn, tools)) is not None:
            return start
        if not messages[turn].get("tool_calls"):
            for said in (messages[turn], thoughtless(messages[turn])):
                before, _ = self._around((*messages[:turn], said, *messages[turn + 1 :]), turn, tools)
                if text.startswith(before) and not is_thought_in(messages[turn], before):
                    return len(before.rstrip(" "))  # a prompt that ends in a space splits it from its word
        return None if cue is None else self._shared(text, cue, messages[:turn], tools)

    def _shared(self, text: str, cue: str, asked: tuple[dict, ...], tools) -> int | None:
        """How far the text is its generation prompt's, where that asks for thinking, or for none, and the response is
        otherwise; None where they differ before. A tag or word that both begin alike is the response's."""
        past = self._spell_past(asked, tools, False)
        end = len(commonprefix((cue, text)))
        first = None if past is None else next((len(p) for p in (past, past.rstrip()) if cue[:end].startswith(p)), None)
        if first is None:
            return None
        header = cue[first:end]
        if header.rfind("<") > header.rfind(">"):
            header = header[: header.rfind("<")]
        elif cue[end : end + 1].isalnum() and text[end : end + 1].isalnum():
            header = header.rstrip(ALPHANUMERIC)
        return first + len(header) if header.strip() else None

    def _start_by_marks(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> int | None:
        """The same for a template that spells the past otherwise when something follows (gpt-oss drops the thinking
        before a tool call once its answer is there): the first generation prompt behind what the turn before says."""
        if not self.cue.strip():
            return None
        said = self._place(text, messages, turn - 1, tools) if turn else 0
        says = self._place(text, messages, turn, tools)
        if said is None or says is None:
            return None
        start = text.find(self.cue, said, says)
        return None if start < 0 else start + len(self.cue)

    def _end_of_content(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> int | None:
        past = text if turn == len(messages) - 1 else self._spell_past(messages[: turn + 1], tools, False)
        past = None if past is None else past.rstrip()
        if past is not None and text.startswith(past) and (self.end == "" or past.endswith(self._ends())):
            return len(past)
        _, after = self._around(messages, turn, tools)
        return len(text) - len(after) + self._end_length(after) if text.endswith(after) else None

    def _end_of_calls(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> int | None:
        """Behind the last call's arguments: what follows them where the turn is the last one, and the end token."""
        place = self._place(text, messages, turn, tools)
        through = messages[: turn + 1]
        past = self._spell_past(through, tools, False)
        past_place = None if past is None else self._place(past, through, turn, tools)
        if place is None or past_place is None:
            raise TemplateFailure(f"it leaves out a tool call of messages[{turn}], or spells it more than once")
        closing = past[past_place:].rstrip()
        closing = next((closing.removesuffix(end) for end in self._ends() if closing.endswith(end)), closing)
        end = place + len(closing)
        return end + self._end_length(text[end:]) if text.startswith(closing, place) else None

    def _place(self, text: str, messages: tuple[dict, ...], turn: int, tools) -> int | None:
        """Where in `text` the content of a turn ends, or the arguments of its last call; None if it is not in there.

        A mark put there must only add to the text: what precedes it and what follows it is all of the text."""
        said = (*messages[:turn], with_mark(messages[turn]), *messages[turn + 1 :])
        marked = self._spell_past(said, tools, False)
        if marked is None or len(marked) <= len(text):
            return None
        before, after = commonprefix((text, marked)), commonprefix((text[::-1], marked[::-1]))
        return len(text) - len(after) if len(before) + len(after) >= len(text) else None

    def _spell_past(self, messages: tuple[dict, ...], tools, cue: bool) -> str | None:
        """A conversation's beginning alone, or None for a template that spells only whole conversations."""
        try:
            return self._spell(messages, tools, cue)
        except TemplateFailure:
            return None

    def _around(self, messages: tuple[dict, ...], turn: int, tools) -> tuple[str, str]:
        """What the template spells before and after the content of one turn, if that content were `MARK`."""
        marked = {**messages[turn], "content": MARK}
        text = self._spell((*messages[:turn], marked, *messages[turn + 1 :]), tools, False)
        before, mark, after = text.partition(MARK)
        if not mark:
            raise TemplateFailure("it leaves out the content of an assistant turn; there is nothing to train on")
        return before, after

    def _end_length(self, after: str) -> int:
        """The length of the end token, with white space before it, that begins `after`; 0 without one."""
        if self.end == "":
            return 0
        rest = after.lstrip()
        length = next((len(end) for end in self._ends() if rest.startswith(end)), None)
        return 0 if length is None else len(after) - len(rest) + length


def choose_template(
    chat_template: str | None, model_name: str, tokenizer: Tokenizer, task: str, today: date | None = None
) -> Template:
    """The template a configuration asks for: harmony, chatml, llama, model (the checkpoint's own), auto (by the model's
    name), or None: the checkpoint's own if it has one, else the plain prompt of the task.

    `today` is the date for templates that tell it. Raises CheckpointError when the tokenizer lacks what is needed."""
    name, notes = chat_template, []
    if name == "auto":
        name = _format_of(model_name)
        notes.append(f"chat_template auto: {name}, by the model's name {model_name!r}")
    if name is None:
        name = "plain" if tokenizer.chat_template is None else "model"
    if name == "model":
        source = tokenizer.chat_template
        if source is None:
            raise CheckpointError(
                f'{tokenizer.path}: chat_template is "model", but this checkpoint has no chat template of its own; '
                f"use one of {', '.join(FORMATS)}, or leave chat_template out"
            )
    else:
        source = PLAIN[task] if name == "plain" else FORMATS[name]
        missing = [token for token in FORMAT_TOKENS.get(name, ()) if tokenizer.token_id(token) is None]
        if missing:
            notes.append(f"chat_template {name}: the tokenizer has no token {' '.join(missing)}; it is spelled as text")
        if tokenizer.adds_bos and not (name == "llama" and tokenizer.bos_token == "<s>"):
            source = "{{- bos_token -}}" + source
    template = _template(name, source, notes, tokenizer, today)
    if tokenizer.eos_token is None and (name == "plain" or template.end == ""):
        raise CheckpointError(
            f"{tokenizer.path}: nothing to end a response with: the tokenizer has no eos_token and the {name} "
            "template no end token; set eos_token in tokenizer_config.json"
        )
    return template


def _template(name: str, source: str, notes: list[str], tokenizer: Tokenizer, today: date | None) -> Template:
    """Compiles the source and asks it, with a short conversation, what it puts around a response."""
    today = (today or date.today()) if "strftime_now" in source else None
    try:
        spell = partial(_spell, compile_template(source, today), tokenizer, name)
    except TemplateFailure as failure:
        raise CheckpointError(
            f"{tokenizer.path}: its chat template does not compile: {failure}; "
            "mend it there, or give chat_template another format"
        ) from failure
    ask = ({"role": "user", "content": "x"},)
    template = Template(name, source, notes, "", None, "", True, today, spell, tokenizer)
    try:
        plain, cue = spell(ask, None, False), spell(ask, None, True)
        before, after = template._around((*ask, {"role": "assistant", "content": ""}), 1, None)
    except TemplateFailure as failure:
        notes.append(f"the chat template refuses a plain question and answer: {failure}")
        return template
    opening = before[len(cue) :] if before.startswith(cue) else ""
    asks = not opening.strip() or cue != plain
    if not asks:
        notes.append(f"the chat template has no generation prompt; what it puts before a response is used: {opening!r}")
        opening = ""
    if not before.startswith(cue):
        notes.append(
            f"the template's generation prompt ends in {cue[-20:]!r}, which a finished conversation does not have; "
            "prompts stop before that, as in training"
        )
    own_cue = cue.removeprefix(plain) if asks and cue.startswith(plain) else ""
    template = Template(name, source, notes, opening, after.strip(), own_cue, asks, today, spell, tokenizer)
    if opening.strip():
        notes.append(_opening_note(template, ask))
    return template


def _opening_note(template: Template, ask: tuple[dict, ...]) -> str:
    """What the template writes into a response by itself, and in which: this is trained on."""
    note = f"the chat template begins the last response with {template.opening!r}, which is trained on"
    try:
        before, _ = template._around((*ask, {"role": "assistant", "content": ""}, *ask), 1, None)
    except TemplateFailure:
        return note
    earlier = "those before it too" if before.endswith(template.opening) else "those before it have none"
    return f"{note}; {earlier}"


def _spell(
    render: Callable[..., str], tokenizer: Tokenizer, name: str, messages: Sequence[dict], tools,
    add_generation_prompt: bool,
) -> str:  # fmt: skip
    """The template's text, given the variables that transformers gives it."""
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    variables = {key: token for key, token in tokens.items() if token is not None}
    variables |= {"tools": list(tools) if tools else None, "documents": None}
    variables["add_generation_prompt"] = add_generation_prompt
    messages = [with_reasoning(without_nulls(message)) for message in messages]
    try:
        try:
            return render(messages=messages, **variables)
        except TemplateFailure:  # many cannot take the null content of a tool call; some (DeepSeek's) ask for it
            if all(message.get("content") is not None for message in messages):
                raise
        filled = [message | {"content": message.get("content") or ""} for message in messages]
        return render(messages=filled, **variables)
    except TemplateTimeout as timeout:
        raise TemplateTimeout(f"{tokenizer.path}: the {name} chat template: {timeout}") from timeout


def _format_of(model_name: str) -> str:
    """The document's rule; of a path on this machine only the folder's own name counts."""
    name = (Path(model_name).name if os.path.exists(model_name) else model_name).lower()
    return next((form for part, form in NAME_RULE.items() if part in name), "chatml")
