"""Conversations for calibration, as models read them."""

import json
from pathlib import Path

import pytest
from support.models import write_model

from lieq_gguf.measure.text import CalibrationText, read_calibration_texts
from lieq_gguf.sources import open_source
from lieq_gguf.tokenizers import ChatTemplate, SourceTokenizer, load_source_tokenizer, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token if loop.first }}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
CHAT = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, you!"}]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def test_the_models_own_template_is_used() -> None:
    text = render(CHAT, ChatTemplate(CHATML, {}))
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi, you!<|im_end|>\n"


def test_a_template_without_system_messages_gets_none() -> None:
    assert render(CHAT, ChatTemplate(WITHOUT_SYSTEM, {"bos_token": "<s>"})) == "<s><user>Hi, you!"


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% broken", "{{ messages[9].content.x }}"])
def test_without_a_template_that_takes_it_a_conversation_is_plain_text(template: str | None) -> None:
    given = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    text = render(given, None if template is None else ChatTemplate(template, {}))
    assert text.startswith("System: Be kind.\n\nUser: Hi, you!\n\nAssistant: {")
    assert '"city": "Köln"' in text


def test_templates_of_directories_and_files_are_found(tmp_path: Path, tiny_model: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    found = load_source_tokenizer(model).chat_template
    assert found is not None
    assert found.template == CHATML
    assert found.special_tokens["bos_token"] == "<|im_start|>"
    other = load_source_tokenizer(tiny_model).chat_template
    assert other is not None
    assert other.template == json.loads((tiny_model / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    before = open_source(model).tokenizer_fingerprint
    (model / "chat_template.jinja").write_text(CHATML + " ", encoding="utf-8")
    assert open_source(model).tokenizer_fingerprint != before


def test_shipped_conversations_alternate_and_call_tools_that_they_have() -> None:
    [text] = read_calibration_texts()
    assert len(text.conversations) >= 50
    called = 0
    for chat in text.conversations:
        names = {tool["function"]["name"] for tool in chat.get("tools", ())}
        spoken = [m for m in chat["messages"] if m["role"] != "tool" and not m.get("tool_calls")]
        roles = [m["role"] for m in spoken]
        assert roles == [*(["system"] if roles[0] == "system" else []), *["user", "assistant"] * (len(roles) // 2)]
        for message in chat["messages"]:
            for call in message.get("tool_calls", ()):
                assert call["function"]["name"] in names
                called += 1
    assert called >= 10


def test_conversations_follow_the_text() -> None:
    text = CalibrationText("Some text.", "some", json.dumps(CHAT))
    template = ChatTemplate("{{ messages[1].content }}", {})
    tokenizer = SourceTokenizer(1, {}, lambda _text, _special: [], lambda _id: None, template)
    assert text.as_read_by(tokenizer) == "Some text.\n\nHi, you!"
    assert text.digest() != CalibrationText("Some text.", "some").digest()
