"""A row's messages as templates take them, and with a mark in one of them."""

from mini_forge.data.sandbox import TemplateFailure

MARK = "\ue000response\ue001"  # private-use characters: no template and hardly a text has them
THINKING = ("reasoning_content", "thinking", "reasoning")  # names under which rows have it


def without_nulls(message: dict) -> dict:
    """Tables give every message every key; a template asks only whether a key is there. Content may be null."""
    return {
        key: value
        for key, value in message.items()
        if key == "content" or not (value is None or (key == "tool_calls" and not value))
    }


def with_mark(message: dict) -> dict:
    """The message with `MARK` behind its text, or behind the arguments of its last tool call."""
    if not message.get("tool_calls"):
        return {**message, "content": message["content"] + MARK}
    try:
        *others, last = message["tool_calls"]
        function = dict(last.get("function") or last)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function["arguments"] = arguments + MARK
        else:
            function["arguments"] = {**(arguments or {}), MARK: MARK}
        last = {**last, "function": function} if last.get("function") else function
    except (AttributeError, TypeError, ValueError) as error:
        raise TemplateFailure(
            'tool_calls must be a list of {"function": {"name": …, "arguments": {…}}}; write them so'
        ) from error
    return {**message, "tool_calls": [*others, last]}


def thoughtless(message: dict) -> dict:
    return {key: value for key, value in message.items() if key not in THINKING}


def is_thought_in(message: dict, text: str) -> bool:
    """Whether the thinking of a message is in the text."""
    thinking = with_reasoning(message).get("reasoning_content")
    return isinstance(thinking, str) and bool(thinking.strip()) and thinking.strip() in text


def with_reasoning(message: dict) -> dict:
    """Thinking under the names that templates read: reasoning_content, and gpt-oss's thinking."""
    found = [message[key] for key in THINKING if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def with_system(messages: tuple[dict, ...], system_prompt: str | None) -> tuple[dict, ...]:
    """The configuration's system prompt in front, unless the row has its own."""
    if not system_prompt or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return ({"role": "system", "content": system_prompt}, *messages)
