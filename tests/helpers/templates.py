"""Chat templates with the quirks of those in use, and a small byte-level tokenizer for each: nothing is downloaded.

Whole families with tokenizers of their own are in ``tests/golden``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sft_dist.data.chat_template import ChatRenderer, TokenizedRow
from sft_dist.data.messages import Conversation, Message, Origin
from sft_dist.data.named_templates import built_in_source

CHATML = built_in_source("chatml")
GEMMA = built_in_source("gemma")
QWEN = built_in_source("qwen3")

# The block leaves the end-of-turn token outside, as many templates in the wild do.
CHATML_GENERATION = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}
{%- if tools is not none %}
    {{- 'You have access to these functions.\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}' }}
        {{- '<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {{- message.content | tojson }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# The tools stand before the last question, wherever that is; roles must alternate; no generation prompt.
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(turn=0) %}
{%- for message in loop_messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and 'tool_calls' not in message) %}
        {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
            {{- raise_exception('After the optional system message, roles must alternate user/assistant.') }}
        {%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.first and system_message is defined %}
            {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

# The generation prompt opens a reasoning block that finished turns do not have; arguments are concatenated as text.
R1 = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|Assistant|>' + message.content + '<|call|>' + call.name + '\n' + call.arguments + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|Assistant|><think>\n' }}
{%- endif %}
"""

NO_EOS = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)

_CORPUS = ["Hello world, hello there. What is it? The answer is 42.\n\nこんにちは世界。東京の天気は晴れです。\n"] * 8
_SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "r1": ("<|begin|>", "<|end|>", ["<|User|>", "<|Assistant|>"]),
    "plain": ("<s>", "</s>", []),
}


def build_tokenizer(family: str, template: str | None, *, swallows_space: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens of ``family``.

    It adds a BOS by itself where special tokens are asked for, so that a doubled BOS would show.
    """
    bos, eos, more = _SPECIAL[family]
    backend = Tokenizer.from_str(_trained())
    names = [bos, eos, *more]
    backend.add_special_tokens([AddedToken(name, special=True, rstrip=swallows_space) for name in names])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


@lru_cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return str(backend.to_str())


def renderer_of(family: str, template: str, **options: bool) -> ChatRenderer:
    return ChatRenderer(build_tokenizer(family, template, **options))


def conversation(*turns: tuple[str, str] | Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A conversation of (role, content) pairs or whole messages, as if read from line 1 of rows.jsonl."""
    messages = tuple(turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns)  # type: ignore[arg-type]
    return Conversation(messages, tools, Origin("rows.jsonl", 1))


def supervised_texts(renderer: ChatRenderer, row: TokenizedRow) -> list[str]:
    """The decoded text of each run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for id, is_supervised in zip(row.input_ids, row.supervised, strict=True):
        if is_supervised and not previous:
            runs.append([])
        if is_supervised:
            runs[-1].append(id)
        previous = is_supervised
    return [renderer.tokenizer.decode(run, skip_special_tokens=False) for run in runs]
