"""The chat templates of the golden renderings: small ones in the shape of what checkpoints carry (whitespace control,
namespaces, slices, trim, macros, generation tags), written for these files, and SmolLM2's own, which is one line.

Those of GPT_OSS and below mark what the model writes with generation tags, which checkpoints' own templates lack.
"""

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Drops the thinking of all but the last answer: an earlier turn's text depends on whether a question follows it.
QWEN3 = """\
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant after the optional system message') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# trim_blocks, lstrip_blocks, generation tags, loop controls and a tojson that does not escape HTML: all of
# transformers' environment that plain jinja lacks.
ENVIRONMENT = """\
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if message.role == 'assistant' %}
<|assistant|>
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {% else %}
<|user|>
{{ message | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

# Types by a macro that calls itself, a dated system message, channels; the last answer ends in <|return|>, earlier ones
# in <|end|>, calls in <|call|>; thinking is kept in the last answer, and before calls that no answer follows yet.
GPT_OSS = r"""{%- macro kind(spec) -%}
    {%- if spec.type == "array" -%}
        {{- kind(spec["items"]) + "[]" }}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' }}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- else -%}
        {{- {"integer": "number"}.get(spec.type, spec.type) }}
    {%- endif -%}
{%- endmacro -%}
{%- macro signature(tool) -%}
    {{- "// " + tool.description + "\ntype " + tool.name + " = (_: {\n" }}
    {%- for name, spec in tool.parameters.properties.items() %}
        {{- name + ("" if name in (tool.parameters.required or []) else "?") + ": " + kind(spec) + "," }}
        {%- if spec.default is defined %}
            {{- " // default: " + spec.default | tojson }}
        {%- endif %}
        {{- "\n" }}
    {%- endfor %}
    {{- "}) => any;" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d") + "\n\nReasoning: " }}
{{- reasoning_effort if reasoning_effort is defined else "medium" }}
{{- "\n\n# Valid channels: analysis, commentary, final.<|end|>" }}
{%- set has_system = messages[0].role in ["system", "developer"] %}
{%- set talk = messages[1:] if has_system else messages %}
{%- if has_system or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if has_system %}
        {{- "# Instructions\n\n" + messages[0].content + "\n\n" }}
    {%- endif %}
    {%- for tool in tools or [] %}
        {{- signature(tool.function) + "\n\n" }}
    {%- endfor %}
    {{- "<|end|>" }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in talk -%}
    {%- if message.role == "assistant" -%}
        {%- if "content" in message and "<|channel|>" in message.content -%}
            {{- raise_exception("give thinking in its own key, not as a channel in content") }}
        {%- endif -%}
        {{- "<|start|>assistant" }}
        {%- generation -%}
        {%- if "tool_calls" in message -%}
            {%- set later = namespace(answers=false) %}
            {%- for other in talk[loop.index:] if other.role == "assistant" and "tool_calls" not in other %}
                {%- set later.answers = true %}
            {%- endfor %}
            {%- set call = message.tool_calls[0].function or message.tool_calls[0] %}
            {%- if (message.content or message.thinking) and not later.answers %}
                {{- "<|channel|>analysis<|message|>" + (message.content or message.thinking) }}
                {{- "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- " to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
            {{- call.arguments | tojson + "<|call|>" }}
            {%- set called.name = call.name %}
        {%- elif loop.last and not add_generation_prompt -%}
            {%- if "thinking" in message %}
                {{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- "<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else -%}
            {{- "<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif -%}
        {%- endgeneration -%}
    {%- elif message.role == "tool" -%}
        {%- if called.name is none -%}
            {{- raise_exception("a tool result must follow a tool call") }}
        {%- endif -%}
        {{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- else -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""

# Behind the last question thinking is kept, and the last turn has a block for it even without any; results of tools
# that follow each other share one user turn.
QWEN3_TOOLS = r"""{%- set system = messages[0].content if messages[0].role == "system" else "" %}
{%- if tools %}
    {{- "<|im_start|>system\n" + (system + "\n\n" if system else "") + "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" + tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif system %}
    {{- "<|im_start|>system\n" + system + "<|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(seeking=true, question=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.seeking and message.role == "user" and not (message.content.startswith("<tool_response>")
        and message.content.endswith("</tool_response>")) %}
        {%- set ns.seeking = false %}
        {%- set ns.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else "" %}
        {%- if not thought and "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" }}
        {%- generation -%}
        {%- if loop.index0 > ns.question and (loop.last or thought) %}
            {{- "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- ("\n" if content or not loop.first else "") + '<tool_call>\n{"name": "' + call.name }}
            {{- '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>" }}
        {%- endgeneration -%}
        {{- "\n" }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\n<tool_response>\n" + content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- "<|im_end|>\n" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}
"""

# Tools and calls as XML: macros with defaults, `is mapping`, items, safe text, a loop's neighbours; no thinking.
QWEN3_CODER = r"""{%- macro others(object, known=[]) -%}
    {%- if object is mapping %}
        {%- for key in object if key not in known %}
            {%- if object[key] is mapping or (object[key] is sequence and object[key] is not string) %}
                {{- "\n<" ~ key ~ ">" ~ (object[key] | tojson | safe) ~ "</" ~ key ~ ">" }}
            {%- else %}
                {{- "\n<" ~ key ~ ">" ~ (object[key] | string) ~ "</" ~ key ~ ">" }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro -%}
{%- set system = messages[0].content if messages[0].role == "system" else none %}
{%- set talk = messages if system is none else messages[1:] %}
{%- if system is not none or tools %}
    {{- "<|im_start|>system\n" + (system or "You are a helpful assistant.") }}
    {%- for tool in tools or [] %}
        {%- set tool = tool.function if tool.function is defined else tool %}
        {{- "\n<function>\n<name>" ~ tool.name ~ "</name>" ~ others(tool, known=["name", "parameters"]) }}
        {%- for name, spec in tool.parameters.properties | items %}
            {{- "\n<parameter>\n<name>" ~ name ~ "</name>" ~ others(spec) ~ "\n</parameter>" }}
        {%- endfor %}
        {{- "\n</function>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endif %}
{%- for message in talk %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant" }}
        {%- if message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls | length > 0 %}
            {{- "\n" }}
            {%- generation -%}
            {{- message.content | trim + "\n" if message.content is string and message.content | trim | length }}
            {%- for call in message.tool_calls %}
                {%- set call = call.function if call.function is defined else call %}
                {{- "\n<tool_call>\n<function=" + call.name + ">\n" }}
                {%- for name, value in call.arguments | items %}
                    {%- set value = value | string if value is string else value | tojson | safe %}
                    {{- "<parameter=" + name + ">\n" ~ value ~ "\n</parameter>\n" }}
                {%- endfor %}
                {{- "</function>\n</tool_call>" }}
            {%- endfor %}
            {{- "<|im_end|>" }}
            {%- endgeneration -%}
            {{- "\n" }}
        {%- else %}
            {{- "\n" }}
            {%- generation -%}
            {{- message.content + "<|im_end|>" }}
            {%- endgeneration -%}
            {{- "\n" }}
        {%- endif %}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- "<|im_start|>user\n" }}
        {%- endif %}
        {{- "<tool_response>\n" + message.content + "\n</tool_response>\n" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- "<|im_end|>\n" }}
        {%- endif %}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\n" if add_generation_prompt }}
"""

# Trims what users and the model say; tools stand in the first user turn, a call between its own tokens.
LLAMA4 = r"""{{- bos_token }}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|header_start|>system<|header_end|>\n\n" + system + "<|eot|>" }}
{%- endif %}
{%- if tools is not none and tools %}
    {{- "<|header_start|>user<|header_end|>\n\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\n\n" }}
    {%- endfor %}
    {{- messages[0].content | trim + "<|eot|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|header_start|>ipython<|header_end|>\n\n" + message.content | tojson + "<|eot|>" }}
    {%- else %}
        {{- "<|header_start|>" + message.role + "<|header_end|>\n\n" }}
        {%- if message.role == "user" %}
            {{- message.content | trim + "<|eot|>" }}
        {%- else %}
            {%- generation -%}
            {%- if message.tool_calls %}
                {{- "<|python_start|>" + message.content + "<|python_end|>" }}
                {%- for call in message.tool_calls %}
                    {{- '{"name": "' + call.function.name + '", "parameters": ' }}
                    {{- call.function.arguments | tojson + "}" }}
                {%- endfor %}
            {%- else %}
                {{- message.content | trim }}
            {%- endif %}
            {{- "<|eot|>" }}
            {%- endgeneration -%}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{{- "<|header_start|>assistant<|header_end|>\n\n" if add_generation_prompt }}
"""

TEMPLATES = {  # name -> (template, bos, eos)
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>"),
    "qwen2.5": (QWEN25, None, "<|im_end|>"),
    "qwen3": (QWEN3, None, "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "environment": (ENVIRONMENT, "<s>", "</s>"),
}
