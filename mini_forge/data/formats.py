"""The formats that are ours to spell: the configuration document's three, and the plain prompt of each task.

They have no place for tools, calls, results or thinking, and refuse a row with any rather than leave it out.
"""

_TEXT_ALONE = r"""
{%- set remedy = "this format has no place for it: use chat_template \"model\" with a checkpoint that has one" -%}
{{ raise_exception("the row has tools; " ~ remedy) if tools }}
{%- for message in messages -%}
{{ raise_exception("a message has tool_calls; " ~ remedy) if message.tool_calls or message.function_call }}
{{- raise_exception("a message has the role tool; " ~ remedy) if message.role == 'tool' }}
{{- raise_exception("a message has thinking in a key of its own; " ~ remedy)
    if message.reasoning_content or message.thinking or message.reasoning }}
{%- endfor -%}"""

# Strings of the configuration document (harmony without newlines between messages).
FORMATS = {
    "harmony": _TEXT_ALONE
    + r"""
{%- for message in messages -%}
{{ '<|start|>' + ('developer' if message.role == 'system' else message.role) }}
{{- '<|message|>' + message.content + '<|end|>' }}
{%- endfor -%}
{{ '<|start|>assistant<|message|>' if add_generation_prompt }}""",
    "chatml": _TEXT_ALONE
    + r"""
{%- for message in messages -%}
{{ '<|im_start|>' + ('system' if message.role == 'developer' else message.role) }}
{{- '\n' + message.content + '<|im_end|>' + ('' if loop.last and not add_generation_prompt else '\n') }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    "llama": _TEXT_ALONE
    + r"""
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ raise_exception("a system message must stand before a user's in this format") if ns.system }}
{{- ' ' + message.content + ' </s>' }}
{%- elif message.role == 'user' -%}
{{ '<s>[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{%- set ns.system = ns.system + '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' -%}
{%- endif -%}
{%- endfor -%}""",
}
FORMAT_TOKENS = {
    "harmony": ("<|start|>", "<|message|>", "<|end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<s>", "</s>"),
}
_PLAIN = (
    _TEXT_ALONE
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
