"""A conversation on the terminal: replies appear as they are made, in the template the model was trained with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from mini_forge.data.chat import Template
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.inference.generate import TextStream, check_sampling, generate, spelled_end
from mini_forge.model.cache import Memory
from mini_forge.model.decoder import Decoder


def chat_loop(
    model: Decoder,
    tokenizer: Tokenizer,
    template: Template,
    system_prompt: str | None,
    read: Callable[[str], str] = input,
    write: Callable[..., object] = print,
    *,
    max_new_tokens: int,
    **sampling,
):
    """Read, reply, and so on until /exit, the end of input, or Ctrl-C; /reset begins a new conversation.

    `read(prompt)` gives a line, as `input`; `write` is called as `print`. When a conversation outgrows the model's
    positions its oldest turns are dropped, and the user is told. `sampling`: the options of `generate`."""
    check_sampling(max_new_tokens, *(sampling.get(k, v) for k, v in (("temperature", 0), ("top_k", 0), ("top_p", 1))))
    talk = _Conversation(model, tokenizer, template, system_prompt, write)
    write("/reset begins a new conversation, /exit leaves")
    try:
        while (line := read("> ").strip()) != "/exit":
            if line == "/reset":
                talk.messages.clear()
            elif line:
                talk.reply(line, max_new_tokens, sampling)
    except (EOFError, KeyboardInterrupt):
        write()  # the shell's prompt begins on a line of its own


@dataclass
class _Conversation:
    model: Decoder
    tokenizer: Tokenizer
    template: Template
    system_prompt: str | None
    write: Callable[..., object]
    messages: list[dict] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def reply(self, line: str, max_new_tokens: int, sampling: dict):
        """Add the user's turn and the model's, and show the latter as it is made."""
        self.messages.append({"role": "user", "content": line})
        ids = self._fit(max_new_tokens)
        if ids is None:
            return
        end = spelled_end(self.template, self.tokenizer)
        stream, shown = TextStream(self.tokenizer, end), ""

        def show(piece: str):
            nonlocal shown
            piece = piece if shown else piece.lstrip()  # the space that some templates put before a response
            shown += piece
            self.write(piece, end="", flush=True)

        [tokens] = generate(
            self.model,
            [ids],
            max_new_tokens=min(max_new_tokens, self.model.spec.max_positions - len(ids)),
            stop_ids=self.template.stop_ids(self.tokenizer),
            allowed=lambda *_: [] if stream.ended else None,
            on_token=lambda _, token: show(stream.push(token)),
            memory=self.memory,
            **sampling,
        )
        show(stream.finish())
        self.write()
        answer = self.template.answer(self.tokenizer.decode(tokens, skip_special=False))
        self.messages.append({"role": "assistant", "content": answer})

    def _fit(self, max_new_tokens: int) -> list[int] | None:
        """The prompt's ids, after dropping the oldest turns if there is no room for a reply (of `max_new_tokens`, or of
        half the model's positions). None, and the user's turn taken back, if that turn alone is too long."""
        positions = self.model.spec.max_positions
        room, dropped = positions - min(max_new_tokens, positions // 2), 0
        while len(ids := self._ids()) > room and len(self.messages) > 1:
            del self.messages[:2]  # a question and its reply
            dropped += 1
        if dropped:
            self.write(f"(the conversation outgrew the model's {positions} positions: oldest turns dropped: {dropped})")
        if len(ids) < positions:
            return ids
        self.messages.pop()
        self.write(f"(this message has {len(ids)} tokens with its template; the model has {positions}: shorten it)")
        return None

    def _ids(self) -> list[int]:
        return self.tokenizer.encode(self.template.render_prompt(self.messages, self.system_prompt))
