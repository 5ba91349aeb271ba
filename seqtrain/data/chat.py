"""Conversations as text: a tokenizer's own chat template, and which of its characters a model is to learn.

Templates are rendered by transformers itself, sandboxed. What a turn is of the whole is found by rendering the turns
before it, with the prompt for its answer, and those up to it: most templates don't mark it otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.data.config import DataConfig
from seqtrain.data.tokenizer import load_tokenizer
from seqtrain.errors import ConfigError
from seqtrain.files import read_record

# Other names of roles and fields, of conversations in ShareGPT's form among others.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# ChatML, for tokenizers without a template of their own.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Characters of a template's own message that are shown.
SHOWN = 80

Message = dict[str, Any]


class BadConversation(Exception):
    """Why a conversation can't be learned from: `reason`, one of few, and what came."""

    def __init__(self, reason: str, came: object = ""):
        super().__init__(f"{reason}{f' ({came})' if came else ''}")
        self.reason, self.came = reason, str(came)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `learned`: the characters that are predicted, `start <= place < stop`, rising.

    `rewritten`: turns to be learned that the template writes otherwise once others follow, and which are not.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    rewritten: int


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and that for conversations with tools; `marks`: the tokenizer's special tokens, by name."""

    text: str
    with_tools: str
    marks: Mapping[str, str]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False
    ) -> str:
        """The conversation as transformers writes it; `prompt`: and what asks for an answer."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {
            **self.marks,
            "tools": list(tools) or None,
            "chat_template": self.with_tools if tools else self.text,
            "add_generation_prompt": prompt,
        }
        try:
            found: Any = render_jinja_template(conversations=[list(messages)], **options)
        # A template's own complaints, and whatever it runs into with turns it wasn't written for.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadConversation("that the template refuses", reason[:SHOWN]) from None
        return str(found[0][0])

    def learn(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> Rendered:
        """The conversation with the turns of `roles` to be learned, each up to its end. Raises `BadConversation`."""
        whole = self.render(messages, tools)
        learned, rewritten = [], 0
        for place, message in enumerate(messages):
            # The first one follows on nothing.
            if not place or message["role"] not in roles:
                continue
            upto = self.render(messages[: place + 1], tools)
            start = self._start(messages[:place], upto, tools, prompt=message["role"] == "assistant")
            if whole.startswith(upto) and start is not None:
                learned.append((start, len(upto)))
            else:
                rewritten += 1
        if not learned:
            came = f"the template writes {rewritten} otherwise once others follow" if rewritten else ""
            raise BadConversation(f"without a turn of {' or '.join(roles)} after the first", came)
        return Rendered(whole, tuple(learned), rewritten)

    def _start(
        self, before: Sequence[Message], upto: str, tools: Sequence[Mapping[str, Any]], *, prompt: bool
    ) -> int | None:
        """Where in `upto` the turn after `before` starts; None where the template wrote `before` otherwise."""
        asked = self.render(before, tools, prompt=prompt)
        if upto.startswith(asked):
            return len(asked)
        if not upto.startswith(self.render(before, tools)):
            return None
        # A prompt may have more than turns that are over, as the beginning of a thought.
        return next(place for place, (a, b) in enumerate(zip(asked, upto, strict=False)) if a != b)


def load_chat_template(config: DataConfig) -> ChatTemplate:
    """The template that `data.chat_template` names, or the tokenizer's own. Raises `ConfigError` if there is none."""
    name, own = config.chat_template, load_tokenizer(config).described
    marks = dict(own.special_tokens_map) if own is not None else {}
    if name == "chatml":
        text = with_tools = CHATML
    elif name:
        try:
            text = with_tools = read_record(Path(name).expanduser()).decode()
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.chat_template={name}: neither chatml nor a template's file: {error}") from None
    elif own is None or own.chat_template is None:
        raise ConfigError(
            f"data.source=chat: data.tokenizer={config.tokenizer} has no chat template; "
            "set data.chat_template=chatml, or to a file"
        )
    else:
        text, with_tools = own.get_chat_template(), own.get_chat_template(tools=[{}])
    template = ChatTemplate(text, with_tools, marks)
    _check_syntax(template, name or config.tokenizer)
    return template


def _check_syntax(template: ChatTemplate, name: str) -> None:
    from jinja2.exceptions import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    for text in (template.text, template.with_tools):
        try:
            render_jinja_template(conversations=[], chat_template=text)
        except TemplateSyntaxError as error:
            where = f"data.chat_template: that of {name} has a mistake in line {error.lineno}"
            raise ConfigError(f"{where}: {error}") from None


def conversation(came: object) -> list[Message]:
    """The turns of a conversation with the usual names: `role` and `content`. Raises `BadConversation`."""
    if isinstance(came, str):
        came = _parsed(came)
    if not isinstance(came, list) or not came:
        raise BadConversation("without turns")
    return [_turn(message) for message in came]


def tools_of(came: object) -> list[dict[str, Any]]:
    """The functions that a conversation may call: a list of JSON schemas, or that as text. Raises `BadConversation`."""
    came = _parsed(came) if isinstance(came, str) and came else came or []
    if not isinstance(came, list) or not all(isinstance(tool, dict) for tool in came):
        raise BadConversation("with tools that are no list of schemas")
    return came


def _turn(message: object) -> Message:
    if not isinstance(message, dict):
        raise BadConversation("with a turn that is no object", type(message).__name__)
    # Tables have all fields in all turns.
    fields = {name: value for name, value in message.items() if value is not None}
    role, content = fields.pop("from", None), fields.pop("value", "")
    role, content = fields.get("role", role), fields.get("content", content)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise BadConversation("with an unknown role", str(role)[:SHOWN])
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise BadConversation("with a turn that is no text", type(content).__name__)
    calls = fields.get("tool_calls") or []
    if not content.strip() and not calls:
        raise BadConversation("with an empty turn", role)
    if calls:
        fields["tool_calls"] = [_call(call) for call in calls]
    return {**fields, "role": role, "content": content}


def _call(call: Any) -> Any:
    """A call of a function whose arguments are an object, as templates expect, and no text."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            return {**call, "function": {**call["function"], "arguments": _parsed(arguments)}}
    return call


def _parsed(text: str) -> Any:
    """JSON as the object it says, any other text as it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
