"""Writes conversations as a model reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Conversation = Mapping[str, Any]
"""``messages`` and, where they call any, ``tools``, in the form that chat templates take."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template.

    Attributes:
        template: In Jinja.
        special_tokens: Texts that it may use, such as ``bos_token``.
    """

    template: str
    special_tokens: Mapping[str, str]

    def render(self, conversation: Conversation) -> str | None:
        """The text of a conversation; None if the template does not take it."""
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        of_many: Any = chat_template_utils.render_jinja_template  # its annotations are narrower than its code
        messages, tools = list(conversation["messages"]), conversation.get("tools")
        try:
            [text], _ = of_many([messages], tools=tools, chat_template=self.template, **self.special_tokens)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # templates are programs of others
            return None
        return str(text)


def render(conversation: Conversation, template: ChatTemplate | None) -> str:
    """The text of a conversation by a template; without the system message, or in plain words, if it takes no other."""
    messages = conversation["messages"]
    rendered = None
    if template is not None:
        without_system = {**conversation, "messages": [m for m in messages if m["role"] != "system"]}
        rendered = template.render(conversation) or template.render(without_system)
    return rendered or _plain(messages)


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        parts.append(f"{message['role'].capitalize()}: " + "\n".join(filter(None, [message["content"], *calls])))
    return "\n\n".join(parts)
