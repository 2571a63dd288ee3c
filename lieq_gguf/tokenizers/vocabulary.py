"""The tokenizer in a GGUF file, and how it is written."""

from collections import Counter
from dataclasses import dataclass

import gguf

from lieq_gguf.errors import TokenizerError


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a model, as Jinja text.

    Attributes:
        default: the template used when none is named.
        named: ``(name, template)`` of the others, such as ``tool_use``, sorted by name.
    """

    default: str | None = None
    named: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SpecialTokens:
    """The ids with a role, and which tokens are added to a text automatically.

    Attributes:
        ids: ``(role, id)``, role being a word of the format: ``bos``, ``eos``, ``unk``, ``pad``...
        automatic: ``(role, is added)``; for a missing role llama.cpp's default applies.
    """

    ids: tuple[tuple[str, int], ...] = ()
    automatic: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece-style BPE, ``gemma4`` for such BPE that merges
            by rank, ``t5`` for Unigram.
        pre_tokenizer: llama.cpp's name of the rule that splits text into words (``tokenizer.ggml.pre``); empty if the
            model implies it.
        tokens: one per id, UTF-8; exactly as many as the embedding has rows.
        token_types: ``gguf.TokenType`` of each token.
        scores: one per token; tokens with higher scores are merged first. None for byte-level BPE.
        merges: for BPE that merges by rank, ``left right``, the most frequent first; otherwise empty.
        special: ids with a role, and which of them are automatic.
        add_space_prefix: whether a text gets a leading blank; None leaves llama.cpp's default.
        chat_templates: copied unchanged.
        remove_extra_whitespaces: whether blanks at the ends are removed and runs of blanks become one; None leaves
            llama.cpp's default.
        precompiled_charsmap: SentencePiece's table of replacements, for Unigram; empty if there is none.
        swallows_blanks: whether blanks beside added tokens are part of them; the format has no key for it.
        added_before: texts of the tokens that the model's tokenizer adds before a text; llama.cpp adds one at most.

    Raises:
        TokenizerError: if two tokens have the same text, which makes llama.cpp abort.
    """

    model: str
    pre_tokenizer: str
    tokens: tuple[bytes, ...]
    token_types: tuple[gguf.TokenType, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] = ()
    special: SpecialTokens = SpecialTokens()
    add_space_prefix: bool | None = None
    chat_templates: ChatTemplates = ChatTemplates()
    remove_extra_whitespaces: bool | None = None
    precompiled_charsmap: bytes = b""
    swallows_blanks: bool = False
    added_before: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.tokens)) == len(self.tokens):
            return
        text, count = Counter(self.tokens).most_common(1)[0]
        ids = [i for i, token in enumerate(self.tokens) if token == text]
        raise TokenizerError(
            f"the vocabulary holds {text.decode(errors='replace')!r} {count} times (ids {ids[:5]}), but llama.cpp "
            "needs every token once; rename all but one in the tokenizer files"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing and matters to people who use the file."""
        if self.model != "gpt2" or "eos" in dict(self.special.ids) or len(self.tokens) <= _DEFAULT_EOS:
            return ()
        return (
            "no file of the model says which token ends a text (eos_token in tokenizer_config.json or "
            f"special_tokens_map.json, eos_token_id in config.json), so llama.cpp takes token {_DEFAULT_EOS}, "
            f"{self.tokens[_DEFAULT_EOS].decode(errors='replace')!r}",
        )

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the ``tokenizer.*`` keys, the same that llama.cpp's converter writes.

        Args:
            writer: a GGUF writer whose header is not written yet.
        """
        writer.add_tokenizer_model(self.model)
        if self.pre_tokenizer:
            writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.token_types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token_id in self.special.ids:
            writer.add_uint32(f"tokenizer.ggml.{_ID_KEYS.get(role, role)}_token_id", token_id)
        for role, is_added in self.special.automatic:
            writer.add_bool(f"tokenizer.ggml.add_{role}_token", is_added)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.remove_extra_whitespaces is not None:
            writer.add_remove_extra_whitespaces(self.remove_extra_whitespaces)
        if self.precompiled_charsmap:
            writer.add_precompiled_charsmap(self.precompiled_charsmap)
        if self.chat_templates.default is not None:
            writer.add_chat_template(self.chat_templates.default)
        if self.chat_templates.named:
            # gguf's own function uses a set, so two runs could write different files
            for name, template in self.chat_templates.named:
                writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
            writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, [name for name, _ in self.chat_templates.named])


_DEFAULT_EOS = 11  # llama.cpp's for byte-level BPE, GPT-2's comma
# keys of the format that differ from the role's short name
_ID_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
