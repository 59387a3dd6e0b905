"""The chat template of models trained here, and the sandbox in which any template is rendered.

A template turns messages into text (jinja2, the dialect of `transformers`). Models of the Nemotron 3 family share one
layout and differ in the line breaks around `</think>`: `spaced` (Nano, Super) puts one on both sides, `glued` (Ultra,
Lightning) none.
"""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path

import jinja2
import jinja2.ext

from nautilus.config.keys import short
from nautilus.data.bounded import METER, Sandbox, TooMuch, metered, rendered
from nautilus.runtime import UserError, read_text

_TEXT = r"""
{%- set gap = "@GAP@" -%}
{%- set think = enable_thinking if enable_thinking is defined else true -%}
{%- set forget = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}
  {%- if m.role == "user" -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}

{%- macro word(value) -%}
  {{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string -}}
{%- endmacro -%}

{%- macro declared(tool) -%}
  {%- set f = tool.function if tool.function is defined else tool -%}
  {{- "<function>\n<name>" ~ f.name ~ "</name>\n" -}}
  {%- if f.description -%}{{- "<description>" ~ f.description | trim ~ "</description>\n" -}}{%- endif -%}
  {{- "<parameters>\n" -}}
  {%- set schema = f.parameters | default({}, true) -%}
  {%- for name, about in schema.properties | default({}, true) | items -%}
    {{- "<parameter>\n<name>" ~ name ~ "</name>\n" -}}
    {%- if about.type is defined -%}{{- "<type>" ~ word(about.type) ~ "</type>\n" -}}{%- endif -%}
    {%- if about.description -%}{{- "<description>" ~ about.description | trim ~ "</description>\n" -}}{%- endif -%}
    {%- if about.enum is defined -%}{{- "<enum>" ~ about.enum | tojson ~ "</enum>\n" -}}{%- endif -%}
    {%- for key, value in about | items if key not in ["type", "description", "enum", "name"] -%}
      {{- "<" ~ key ~ ">" ~ word(value) ~ "</" ~ key ~ ">\n" -}}
    {%- endfor -%}
    {{- "</parameter>\n" -}}
  {%- endfor -%}
  {%- if schema.required is defined -%}{{- "<required>" ~ schema.required | tojson ~ "</required>\n" -}}{%- endif -%}
  {{- "</parameters>\n</function>\n" -}}
{%- endmacro -%}

{%- macro called(call) -%}
  {%- set f = call.function if call.function is defined else call -%}
  {%- if f.arguments is string -%}
    {{- raise_exception("tool call arguments must be an object, not a string") -}}
  {%- endif -%}
  {{- "<tool_call>\n<function=" ~ f.name ~ ">\n" -}}
  {%- for name, value in f.arguments | default({}, true) | items -%}
    {{- "<parameter=" ~ name ~ ">\n" ~ word(value) ~ "\n</parameter>\n" -}}
  {%- endfor -%}
  {{- "</function>\n</tool_call>\n" -}}
{%- endmacro -%}

{{- "<|im_start|>system\n" -}}
{%- set system = messages[0].content | default("", true) if messages and messages[0].role == "system" else "" -%}
{{- system -}}
{%- if tools -%}
  {{- "\n\n" if system else "" -}}
  {{- "# Tools\n\nThese functions are there for you to call:\n\n<tools>\n" -}}
  {%- for tool in tools -%}{{- declared(tool) -}}{%- endfor -%}
  {{- "</tools>\n\nTo call one, write a block of exactly this form and end your turn:\n\n" -}}
  {{- "<tool_call>\n<function=name_of_the_function>\n<parameter=name_of_a_parameter>\nits value\n</parameter>\n" -}}
  {{- "<parameter=name_of_another>\na value that may\nspan several lines\n</parameter>\n" -}}
  {{- "</function>\n</tool_call>\n\n" -}}
  {{- "<IMPORTANT>\n- Keep to this form: a function block inside a tool_call block, one for every call.\n" -}}
  {{- "- Give every required parameter.\n- You may explain a call before it, never after it.\n" -}}
  {{- "- When no function helps, answer from what you know and do not mention the functions.\n</IMPORTANT>" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}

{%- for m in messages -%}
  {%- if m.role == "system" -%}
    {%- if not loop.first -%}
      {{- "<|im_start|>system\n" ~ m.content | default("", true) ~ "<|im_end|>\n" -}}
    {%- endif -%}
  {%- elif m.role == "user" -%}
    {{- "<|im_start|>user\n" ~ m.content -}}
    {%- if loop.index0 == last.user -%}
      {%- if low_effort -%}{{- "\n\n{reasoning effort: low}" -}}{%- endif -%}
      {%- if medium_effort -%}{{- "\n\n{reasoning effort: efficient}" -}}{%- endif -%}
    {%- endif -%}
    {{- "<|im_end|>\n" -}}
  {%- elif m.role == "assistant" -%}
    {%- set hide = forget and loop.index0 < last.user -%}
    {%- set body = m.content | default("", true) -%}
    {%- set thought = m.reasoning_content | default("", true) -%}
    {%- if thought and hide -%}
      {%- set shown = "<think></think>" ~ gap ~ body -%}
    {%- elif thought -%}
      {%- set shown = "<think>\n" ~ (thought | trim ~ gap if gap else thought) ~ "</think>" ~ gap ~ body -%}
    {%- elif "</think>" in body and hide -%}
      {%- set shown = "<think></think>" ~ body.split("</think>")[-1] -%}
    {%- elif "</think>" in body -%}
      {%- set shown = body if "<think>" in body else "<think>\n" ~ body -%}
    {%- else -%}
      {%- set shown = "<think></think>" ~ body -%}
    {%- endif -%}
    {{- "<|im_start|>assistant\n" ~ shown | trim -}}
    {%- if m.tool_calls -%}
      {{- "\n" -}}
      {%- for call in m.tool_calls -%}{{- called(call) -}}{%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\n" -}}
  {%- elif m.role == "tool" -%}
    {%- if loop.first or loop.previtem.role != "tool" -%}{{- "<|im_start|>user\n" -}}{%- endif -%}
    {{- "<tool_response>\n" ~ m.content ~ "\n</tool_response>\n" -}}
    {%- if loop.last or loop.nextitem.role != "tool" -%}{{- "<|im_end|>\n" -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception("a message has role " ~ m.role ~ "; use system, user, assistant or tool") -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\n" ~ ("<think>\n" if think else "<think></think>") -}}
{%- endif -%}
"""


def template_text(style: str = "spaced") -> str:
    """Our template in one of the family's two styles."""
    gaps = {"spaced": r"\n", "glued": ""}
    if style not in gaps:
        raise ValueError(f"style={style!r} is none of {', '.join(gaps)}")
    return _TEXT.strip().replace("@GAP@", gaps[style])


TEMPLATE = template_text()


def template_of(asked: str, own: str | None) -> str | None:
    """The template that is asked for: a file's, or by "nemotron" the family's; the model's own where none is. UserError
    for a file that cannot be read or is none."""
    if not asked:
        return own
    if asked == "nemotron":
        return TEMPLATE
    if not Path(asked).is_file():
        raise UserError(f"template={asked} was asked for; give a file with a template, or nemotron for the family's")
    found = read_text(Path(asked))
    compiled(found)  # now, not when somebody has begun to talk
    return found


def render_template(template: str, variables: dict) -> str:
    """The text of any template, ours or a checkpoint's own."""
    ready = compiled(template)
    try:
        return rendered(ready, variables)
    except TooMuch as bad:
        raise UserError(
            f"the chat template {short(template)} does more than any conversation needs: {bad}; use the checkpoint's"
            f" original file"
        ) from bad
    # What a filter raises on a value that it was not made for may be of any kind.
    except Exception as bad:
        raise UserError(
            f"the chat template cannot render these messages: {bad}; check roles, content and tools"
        ) from bad


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """In the sandbox: a template of unknown origin cannot reach Python, change what it is given, or take long."""
    # Line breaks after blocks are swallowed, as templates written for transformers expect.
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = metered("tojson", as_json)
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = strftime_now
    try:
        return sandbox.from_string(template)
    # What jinja writes may be no Python: blocks within blocks too deep, numbers too long.
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as bad:
        raise UserError(f"the chat template is not valid jinja: {bad}; use the checkpoint's original file") from bad


def as_json(
    value, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    """JSON as models read it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str):
    METER.get().told(message)
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    METER.get().refuse_widths(pattern, ())
    return datetime.datetime.now().strftime(pattern)
