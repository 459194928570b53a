"""Templates: how a conversation is spelled, and which of its characters are a response.

Every format is a Jinja chat template, the checkpoint's own as much as harmony, chatml, llama and the plain task prompts
below, so one way of spelling and of finding responses serves training, evaluation, `generate`, `chat`, and any other
tool that reads the saved `chat_template.jinja`.

A response begins where the generation prompt ends, and ends with the end token the template puts after it (the white
space that follows is not part of it). If the template defines none, eos is appended to the last response. Both places
are found in the one full text: it must begin with the conversation up to the turn, spelled with the generation prompt,
and with the conversation through the turn. Templates that spell a turn differently once it lies in the past (dropping
its thinking, closing it with another token) break that; then the turn's content is replaced by a mark, and the response
is what differs between the two spellings. Whatever a template itself writes into a response (an empty think block, a
channel) is trained on, because the model will have to write it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

from mini_forge.data.sandbox import TemplateFailure, compile_template
from mini_forge.data.tasks import Example
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError, DataError

_NO_TOOLS = r"""
{%- for message in messages if message.tool_calls or message.role == 'tool' -%}
{{ raise_exception("this format has no tool calls; use chat_template \"model\" with a checkpoint that has them") }}
{%- endfor -%}"""

# Strings of the configuration document (harmony without newlines between messages).
FORMATS = {
    "harmony": _NO_TOOLS
    + r"""
{%- for message in messages -%}
{{ '<|start|>' + ('developer' if message.role == 'system' else message.role) }}
{{- '<|message|>' + message.content + '<|end|>' }}
{%- endfor -%}
{{ '<|start|>assistant<|message|>' if add_generation_prompt }}""",
    "chatml": _NO_TOOLS
    + r"""
{%- for message in messages -%}
{{ '<|im_start|>' + ('system' if message.role == 'developer' else message.role) }}
{{- '\n' + message.content + '<|im_end|>' + ('' if loop.last and not add_generation_prompt else '\n') }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    "llama": _NO_TOOLS
    + r"""
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ ' ' + message.content + ' </s>' }}
{%- elif message.role == 'user' -%}
{{ '<s>[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{%- set ns.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' -%}
{%- endif -%}
{%- endfor -%}""",
}
FORMAT_TOKENS = {
    "harmony": ("<|start|>", "<|message|>", "<|end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<s>", "</s>"),
}
_PLAIN = (
    _NO_TOOLS
    + r"""
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ gap + message.content + eos_token + ('' if loop.last else '\n') }}
{%- elif message.role == 'user' -%}
{{ opening + message.content + cue }}
{%- else -%}
{{ message.content + '\n\n' }}
{%- endif -%}
{%- endfor -%}"""
)
# A prompt that ends in a space would split it from the word it belongs to, so the response carries it (the gap).
PLAIN = {
    "text-generation": r"{%- set opening, cue, gap = 'USER: ', '\nASSISTANT:', ' ' -%}" + _PLAIN,
    "summarization": r"{%- set opening, cue, gap = '', '\n\nSummary:\n', '' -%}" + _PLAIN,
    "extractive-question-answering": r"{%- set opening, cue, gap = '', '\n\nAnswer:', ' ' -%}" + _PLAIN,
}
NAME_RULE = {"gpt-oss": "harmony", "openai": "harmony", "qwen": "chatml", "llama": "llama", "mistral": "llama"}

_MARK = "\ue000response\ue001"  # private-use characters: no template and hardly a text has them


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
    asks: bool  # whether it has a generation prompt; if not, one is made of what precedes a response's content
    _spell: Callable[..., str] = field(repr=False)  # (messages, tools, add_generation_prompt) -> text
    _tokenizer: Tokenizer = field(repr=False)

    def render(self, example: Example, system_prompt: str | None = None) -> Rendered:
        """The whole example and its response spans. Raises DataError, naming the row, if the template refuses it."""
        if example.text is not None:
            return self._render_text(example.text)
        messages = _with_system(example.messages, system_prompt)
        try:
            text = self._spell(messages, example.tools, False)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._response(text, messages, i, example.tools) for i in turns]
            if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
                raise TemplateFailure("cannot tell one response from the next in what it spells")
        except TemplateFailure as failure:
            raise DataError(f"{example.file}:{example.line}: the {self.name} chat template: {failure}") from failure
        start, end = spans[-1]
        text, prompt = text[:end], text[:start]
        if not text.endswith(self._ends()):
            text += self._tokenizer.eos_token or ""
        return Rendered(text, [*spans[:-1], (start, len(text))], prompt)

    def render_prompt(self, conversation: Example | Sequence[dict], system_prompt: str | None = None) -> str:
        """The text to generate from: an example's without its last response, or a conversation's that awaits one."""
        if isinstance(conversation, Example):
            return self.render(conversation, system_prompt).prompt
        messages = _with_system(tuple(conversation), system_prompt)
        try:
            cue = self._spell(messages, None, True)
            before, _ = self._around((*messages, {"role": "assistant", "content": ""}), len(messages), None)
        except TemplateFailure as failure:
            raise DataError(f"the {self.name} chat template: {failure}") from failure
        return cue if self.asks and before.startswith(cue) else before.rstrip(" ")

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
        calls_tools = bool(messages[turn].get("tool_calls"))
        cue = self._spell_past(messages[:turn], tools, True) if self.asks else None
        past = text if turn == len(messages) - 1 else self._spell_past(messages[: turn + 1], tools, False)
        start = len(cue) if cue is not None and text.startswith(cue) else None
        end = None
        if past is not None and text.startswith(past := past.rstrip()):
            end = len(past) if calls_tools or self.end == "" or past.endswith(self._ends()) else None
        if start is None or end is None:
            if calls_tools:
                raise TemplateFailure(f"cannot tell where the tool calls of messages[{turn}] begin and end")
            before, after = self._around(messages, turn, tools)
            if start is None and text.startswith(before):
                start = len(before.rstrip(" "))  # a prompt that ends in a space splits it from its word
            elif start is None and cue is not None:  # it asks for no thinking, and this response has some
                asked = self._spell_past(messages[:turn], tools, False)
                shared = len(commonprefix((cue, text)))
                start = shared if asked is not None and shared > len(asked.rstrip()) else None
            if end is None and text.endswith(after):
                end = len(text) - len(after) + self._end_length(after)
        if start is None or end is None or start >= end:
            raise TemplateFailure(f"cannot tell where the response messages[{turn}] begins and ends in what it spells")
        return start, end

    def _spell_past(self, messages: tuple[dict, ...], tools, cue: bool) -> str | None:
        """A conversation's beginning alone, or None for a template that spells only whole conversations."""
        try:
            return self._spell(messages, tools, cue)
        except TemplateFailure:
            return None

    def _around(self, messages: tuple[dict, ...], turn: int, tools) -> tuple[str, str]:
        """What the template spells before and after the content of one turn, if that content were `_MARK`."""
        marked = {**messages[turn], "content": _MARK}
        text = self._spell((*messages[:turn], marked, *messages[turn + 1 :]), tools, False)
        before, mark, after = text.partition(_MARK)
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
    chat_template: str | None, model_name: str, tokenizer: Tokenizer, task: str, now: datetime | None = None
) -> Template:
    """The template a configuration asks for: harmony, chatml, llama, model (the checkpoint's own), auto (by the model's
    name), or None: the checkpoint's own if it has one, else the plain prompt of the task.

    `now` is the date for templates that tell it. Raises CheckpointError when the tokenizer lacks what is needed."""
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
    template = _template(name, source, notes, tokenizer, now)
    if tokenizer.eos_token is None and (name == "plain" or template.end == ""):
        raise CheckpointError(
            f"{tokenizer.path}: nothing to end a response with: the tokenizer has no eos_token and the {name} "
            "template no end token; set eos_token in tokenizer_config.json"
        )
    return template


def _template(name: str, source: str, notes: list[str], tokenizer: Tokenizer, now: datetime | None) -> Template:
    """Compiles the source and asks it, with a short conversation, what it puts around a response."""
    try:
        spell = partial(_spell, compile_template(source, now), tokenizer)
    except TemplateFailure as failure:
        raise CheckpointError(f"{tokenizer.path}: its chat template does not compile: {failure}") from failure
    ask = ({"role": "user", "content": "x"},)
    template = Template(name, source, notes, "", None, True, spell, tokenizer)
    try:
        cue = spell(ask, None, True)
        before, after = template._around((*ask, {"role": "assistant", "content": ""}), 1, None)
    except TemplateFailure as failure:
        notes.append(f"the chat template refuses a plain question and answer: {failure}")
        return template
    opening = before[len(cue) :] if before.startswith(cue) else ""
    asks = not opening.strip() or cue != spell(ask, None, False)
    if not asks:
        notes.append(f"the chat template has no generation prompt; what it puts before a response is used: {opening!r}")
        opening = ""
    if not before.startswith(cue):
        notes.append(
            f"the template's generation prompt ends in {cue[-20:]!r}, which a finished conversation does not have; "
            "prompts stop before that, as in training"
        )
    return Template(name, source, notes, opening, after.strip(), asks, spell, tokenizer)


def _spell(
    render: Callable[..., str], tokenizer: Tokenizer, messages: Sequence[dict], tools, add_generation_prompt: bool
) -> str:
    """The template's text, given the variables that transformers gives it."""
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return render(
        messages=[_with_reasoning(message) for message in messages],
        tools=list(tools) if tools else None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{key: token for key, token in tokens.items() if token is not None},
    )


def _with_reasoning(message: dict) -> dict:
    """Thinking under the names that templates read: reasoning_content, and gpt-oss's thinking."""
    found = [message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _with_system(messages: tuple[dict, ...], system_prompt: str | None) -> tuple[dict, ...]:
    """The configuration's system prompt in front, unless the row has its own."""
    if not system_prompt or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return ({"role": "system", "content": system_prompt}, *messages)


def _format_of(model_name: str) -> str:
    """The document's rule; of a path on this machine only the folder's own name counts."""
    name = (Path(model_name).name if Path(model_name).exists() else model_name).lower()
    return next((form for part, form in NAME_RULE.items() if part in name), "chatml")
