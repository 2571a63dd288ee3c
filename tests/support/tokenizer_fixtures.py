"""Tiny but real tokenizers, in the file formats of the model families.

Each function writes the tokenizer files of a model directory and returns the vocab_size for its config.json. They are
trained on the texts of the check, so that merges, and so differences, happen where the check looks.
"""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from unicodedata import category

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram

from lieq_gguf.tokenizers.check_texts import CHECK_TEXTS
from lieq_gguf.tokenizers.sentencepiece_model import open_sentencepiece

ALL_TEXTS = tuple(text for _, text in CHECK_TEXTS)
N_MERGED = 1200
SPACE = "\u2581"
WORD_WITHOUT_MERGE = "Ġbrown"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA_3_CHAT = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% endfor %}"
INST_CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"

LLAMA_3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN_2_REGEX = LLAMA_3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_4O_REGEX = TEKKEN_REGEX.replace(r"\p{M}]+|[^", rf"\p{{M}}]+{CONTRACTIONS}?|[^").replace(
    r"\p{M}]*|\p{N}|", rf"\p{{M}}]*{CONTRACTIONS}?|\p{{N}}{{1,3}}|"
)
QWEN_2_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|vision_pad|>",
)  # fmt: skip
QWEN_2_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
QWEN_3_PLAIN = (*QWEN_2_PLAIN, "<tool_response>", "</tool_response>", "<think>", "</think>")
DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
SMOLLM3_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>")
OLMO_2_SPECIAL = (
    "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|im_start|>", "<|im_end|>",
    "<|endofprompt|>", "<|pad|>",
)  # fmt: skip
OLMO_2_PLAIN = ("<|extra_id_0|>", "|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||")
GRANITE_FIRST = (
    "<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<gh_stars>",
    "<issue_start>", "<commit_msg>", "<reponame>",
)  # fmt: skip
GRANITE_LAST = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
PHI_3_ADDED = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|system|>", "<|end|>", "<|user|>",
)  # fmt: skip
PHI_4_ADDED = ("<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>")
GEMMA_ROLES = ("<pad>", "<eos>", "<bos>", "<unk>")
GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
GEMMA_USER_DEFINED = (
    "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>", *GEMMA_TURNS,
    *("\n" * n for n in range(1, 32)), *(SPACE * n for n in range(2, 32)),
    "<table>", "</table>", "<h1>", "</h1>", *("\t" * n for n in range(2, 32)), "<unused99>",
)  # fmt: skip
SMOLLM2_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
)  # fmt: skip
TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "<pad>")


def write_smollm2(model_dir: Path) -> int:
    """Byte-level BPE, each digit alone, nothing automatic; special tokens are the first ids."""
    tokenizer = _trained(
        BPE(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        SMOLLM2_SPECIAL,
    )
    _save(
        tokenizer,
        model_dir,
        add_prefix_space=False,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        tokenizer_class="GPT2Tokenizer",
    )
    return int(tokenizer.get_vocab_size())


def write_smollm2_with_template_files(model_dir: Path) -> int:
    """As SmolLM2, with the chat templates in files of their own, as transformers 5 saves them."""
    vocab_size = write_smollm2(model_dir)
    _update_json(model_dir / "tokenizer_config.json", chat_template=None)
    (model_dir / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (model_dir / "additional_chat_templates").mkdir()
    (model_dir / "additional_chat_templates" / "tool-use.jinja").write_text("tools: " + CHATML, encoding="utf-8")
    return vocab_size


def write_llama_3(model_dir: Path) -> int:
    """Byte-level BPE that takes words of the vocabulary whole, BOS by a template, special tokens after the others."""
    split = _split_then_bytes(LLAMA_3_REGEX)
    model = json.loads(_trained(BPE(), split, ()).to_str())["model"]
    # a word without its merge is found only by a tokenizer that looks words up first
    merges = [(left, right) for left, right in model["merges"] if left + right != WORD_WITHOUT_MERGE]
    tokenizer = Tokenizer(BPE(vocab=model["vocab"], merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in LLAMA_3_SPECIAL])
    bos = ("<|begin_of_text|>", int(tokenizer.token_to_id("<|begin_of_text|>") or 0))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
            ),
        ]
    )
    _save(
        tokenizer,
        model_dir,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA_3_CHAT,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return int(tokenizer.get_vocab_size())


def write_tekken(model_dir: Path, all_texts: bool = False) -> int:
    """Byte-level BPE as of Mistral Nemo; the embedding has five rows more than there are tokens.

    Args:
        model_dir: where to write.
        all_texts: whether to learn merges with accented capitals and combining marks, at which llama.cpp deviates.
    """
    texts = ALL_TEXTS if all_texts else _texts_without_marks()
    split = _split_then_bytes(TEKKEN_REGEX)
    tokenizer = _trained(BPE(ignore_merges=True), split, TEKKEN_SPECIAL, texts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    _save(
        tokenizer,
        model_dir,
        add_bos_token=True,
        add_eos_token=False,
        add_prefix_space=False,
        bos_token={"content": "<s>", "special": True, "__type": "AddedToken"},
        eos_token={"content": "</s>", "special": True, "__type": "AddedToken"},
        unk_token="<unk>",
        chat_template=[{"name": "default", "template": INST_CHAT}, {"name": "tool_use", "template": "tools"}],
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return int(tokenizer.get_vocab_size()) + 5


def write_llama_2(model_dir: Path, byte_fallback: bool = True) -> int:
    """SentencePiece BPE with bytes as a fallback: tokenizer.model, the same as tokenizer.json, two added tokens."""
    model_dir.mkdir(parents=True, exist_ok=True)
    processor = _train_sentencepiece(
        model_dir, model_type="bpe", vocab_size=1000, character_coverage=0.98, byte_fallback=byte_fallback
    )
    tokenizer = _llama_2_fast(processor)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>", "<|im_start|>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    n_pieces = processor.vocab_size()
    added = {0: "<unk>", 1: "<s>", 2: "</s>", n_pieces: "<|im_start|>", n_pieces + 1: "<tool>"}
    decoder = {
        str(token_id): {"content": text, "special": text != "<tool>", "normalized": False, "lstrip": False}
        for token_id, text in added.items()
    }
    _save(
        tokenizer,
        model_dir,
        add_bos_token=True,
        add_eos_token=False,
        added_tokens_decoder=decoder,
        additional_special_tokens=["<|im_start|>"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=None,
        legacy=True,
        chat_template=INST_CHAT,
        tokenizer_class="LlamaTokenizer",
    )
    return int(n_pieces) + len(added) - 3


def write_llama_2_json_only(model_dir: Path) -> int:
    """As Llama 2, without tokenizer.model."""
    vocab_size = write_llama_2(model_dir)
    (model_dir / "tokenizer.model").unlink()
    return vocab_size


def write_llama_2_model_only(model_dir: Path) -> int:
    """As Llama 2, without tokenizer.json."""
    vocab_size = write_llama_2(model_dir)
    (model_dir / "tokenizer.json").unlink()
    return vocab_size


def _write_qwen(model_dir: Path, plain: Sequence[str]) -> int:
    tokenizer = _trained(BPE(), _split_then_bytes(QWEN_2_REGEX), ())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_special_tokens(_added(QWEN_2_SPECIAL, special=True))
    tokenizer.add_tokens(_added(plain, special=False))
    _save(
        tokenizer,
        model_dir,
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        additional_special_tokens=list(QWEN_2_SPECIAL[1:]),
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        clean_up_tokenization_spaces=False,
        errors="replace",
        split_special_tokens=False,
        chat_template=CHATML,
        tokenizer_class="Qwen2Tokenizer",
    )
    return int(tokenizer.get_vocab_size()) + 7


def write_qwen2(model_dir: Path) -> int:
    """Qwen 2.5: NFC, each digit alone, no BOS, added tokens that are not special; the embedding has more rows."""
    return _write_qwen(model_dir, QWEN_2_PLAIN)


def write_qwen3(model_dir: Path) -> int:
    """As Qwen 2.5, with the tokens around thoughts."""
    return _write_qwen(model_dir, QWEN_3_PLAIN)


def write_deepseek_r1_qwen(model_dir: Path) -> int:
    """Qwen's rule with DeepSeek's tokens and an automatic BOS."""
    roles = (DEEPSEEK_BOS.replace("begin", "end"), DEEPSEEK_BOS)
    tokenizer = _trained(BPE(), _split_then_bytes(QWEN_2_REGEX), ())
    tokenizer.add_special_tokens(_added(roles, special=True))
    turns = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")
    tokenizer.add_tokens(_added(turns, special=False))
    bos = (roles[1], int(tokenizer.token_to_id(roles[1]) or 0))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
    )
    _save(
        tokenizer,
        model_dir,
        add_bos_token=True,
        add_eos_token=False,
        bos_token=roles[1],
        eos_token=roles[0],
        pad_token=roles[0],
        unk_token=None,
        legacy=True,
        sp_model_kwargs={},
        tokenizer_class="LlamaTokenizerFast",
    )
    return int(tokenizer.get_vocab_size())


def write_smollm3(model_dir: Path) -> int:
    """Llama 3's rule and words taken whole, but nothing automatic; thoughts and tools in added tokens."""
    split = _split_then_bytes(LLAMA_3_REGEX)
    tokenizer = _trained(BPE(ignore_merges=True), split, ())
    tokenizer.add_special_tokens(_added((*LLAMA_3_SPECIAL, "<|im_start|>", "<|im_end|>"), special=True))
    tokenizer.add_tokens(_added(SMOLLM3_PLAIN, special=False))
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="$A", pair="$A $B:1")]
    )
    _save(
        tokenizer,
        model_dir,
        added_tokens_decoder=_decoder_entries(tokenizer),
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=True,
        fast=False,
        chat_template=CHATML,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return int(tokenizer.get_vocab_size())


def write_olmo2(model_dir: Path) -> int:
    """OpenAI's cl100k as Olmo 2 and 3 have it: Llama 3's rule by merges alone, no post-processor."""
    tokenizer = _trained(BPE(), _split_then_bytes(LLAMA_3_REGEX, "removed", invert=True), ())
    tokenizer.add_special_tokens(_added(OLMO_2_SPECIAL, special=True))
    tokenizer.add_tokens(_added(OLMO_2_PLAIN, special=False))
    _save(
        tokenizer,
        model_dir,
        add_prefix_space=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        tokenizer_class="GPT2Tokenizer",
    )
    return int(tokenizer.get_vocab_size()) + 9


def write_granite(model_dir: Path) -> int:
    """StarCoder's tokenizer as Granite 3 has it: code tokens first, roles last, one token in every role."""
    tokenizer = _trained(
        BPE(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        GRANITE_FIRST,
    )
    tokenizer.add_special_tokens(_added(GRANITE_LAST, special=True))
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    _save(
        tokenizer,
        model_dir,
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        additional_special_tokens=list(GRANITE_LAST),
        bos_token="<|end_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        unk_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,
        errors="replace",
        vocab_size=49152,
        chat_template=CHATML,
        tokenizer_class="GPT2Tokenizer",
    )
    return int(tokenizer.get_vocab_size())


def write_phi_4_mini(model_dir: Path) -> int:
    """OpenAI's o200k as Phi-4-mini has it; most added tokens swallow the blanks behind them."""
    split = _split_then_bytes(GPT_4O_REGEX, "removed", invert=True)
    tokenizer = _trained(BPE(), split, (), _texts_without_marks())
    tokenizer.add_special_tokens(_added(PHI_4_ADDED, special=True, swallowing=PHI_4_ADDED[2:]))
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    _save(
        tokenizer,
        model_dir,
        add_prefix_space=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
        tokenizer_class="GPT2Tokenizer",
    )
    return int(tokenizer.get_vocab_size()) + 4


def write_phi_3(model_dir: Path) -> int:
    """Phi-3-mini: Llama 2's tokenizer with added tokens, of which most swallow the blanks behind them.

    llama.cpp does the same for models whose ``general.name`` has ``phi-3``, and for no others.
    """
    processor = _train_sentencepiece(model_dir, model_type="bpe", vocab_size=1000, character_coverage=0.98)
    tokenizer = _llama_2_fast(processor)
    tokenizer.add_special_tokens(_added(("<unk>", "<s>"), special=True))
    tokenizer.add_tokens(_added(("</s>",), special=False, swallowing=("</s>",)))
    tokenizer.add_special_tokens(_added(PHI_3_ADDED, special=True, swallowing=PHI_3_ADDED[1:]))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    decoder = _decoder_entries(tokenizer)
    first_added = processor.vocab_size()
    added = {
        str(entry["content"]): int(token_id) for token_id, entry in decoder.items() if int(token_id) >= first_added
    }
    (model_dir / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    _save(
        tokenizer,
        model_dir,
        add_bos_token=False,
        add_eos_token=False,
        added_tokens_decoder=decoder,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        legacy=False,
        sp_model_kwargs={},
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
        tokenizer_class="LlamaTokenizer",
    )
    return int(tokenizer.get_vocab_size()) + 5


def write_gemma(model_dir: Path) -> int:
    """Gemma 2 and 3: SentencePiece BPE without a leading blank; runs of blanks and newlines are user-defined."""
    processor = _train_sentencepiece(
        model_dir,
        model_type="bpe",
        vocab_size=1200,
        character_coverage=0.98,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=list(GEMMA_USER_DEFINED),
    )
    tokenizer = _llama_2_fast(processor)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(_added((*GEMMA_ROLES, *GEMMA_TURNS), special=True))
    tokenizer.add_tokens(_added([text for text in GEMMA_USER_DEFINED if text not in GEMMA_TURNS], special=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    _save(
        tokenizer,
        model_dir,
        add_bos_token=True,
        add_eos_token=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        additional_special_tokens=list(GEMMA_TURNS),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        sp_model_kwargs={},
        spaces_between_special_tokens=False,
        use_default_system_prompt=False,
        chat_template="{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}{% endfor %}",
        tokenizer_class="GemmaTokenizer",
    )
    return int(processor.vocab_size()) + 6


def write_gemma_json_only(model_dir: Path) -> int:
    """As Gemma, without tokenizer.model and without added tokens in tokenizer_config.json, as transformers 5 saves."""
    vocab_size = write_gemma(model_dir)
    (model_dir / "tokenizer.model").unlink()
    _update_json(model_dir / "tokenizer_config.json", added_tokens_decoder=None)
    return vocab_size


def write_gemma_model_only(model_dir: Path) -> int:
    """As Gemma, with tokenizer.model alone."""
    vocab_size = write_gemma(model_dir)
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer_config.json").unlink()
    return vocab_size


def write_unigram(model_dir: Path, byte_fallback: bool = False) -> int:
    """SentencePiece Unigram with NFKC and one blank for several: tokenizer.model and the same as tokenizer.json."""
    processor = _train_sentencepiece(
        model_dir,
        model_type="unigram",
        vocab_size=500 + 256 * byte_fallback,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        user_defined_symbols=["<tool>"],
    )
    pieces = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(processor.vocab_size())]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    charsmap = open_sentencepiece(model_dir / "tokenizer.model").precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(_added(("<unk>", "<s>", "</s>"), special=True))
    tokenizer.add_tokens(_added(("<tool>",), special=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    _save(
        tokenizer,
        model_dir,
        add_bos_token=True,
        add_eos_token=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return int(processor.vocab_size()) + 3


def write_unigram_json_only(model_dir: Path) -> int:
    """As the Unigram, without tokenizer.model."""
    vocab_size = write_unigram(model_dir)
    (model_dir / "tokenizer.model").unlink()
    return vocab_size


def write_unigram_model_only(model_dir: Path) -> int:
    """As the Unigram, without tokenizer.json."""
    vocab_size = write_unigram(model_dir)
    (model_dir / "tokenizer.json").unlink()
    return vocab_size


def _trained(model: BPE, pre_tokenizer: Any, special: Sequence[str], texts: Sequence[str] = ALL_TEXTS) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + N_MERGED,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _llama_2_fast(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The tokenizer.json of a SentencePiece model: every way to make a piece from two is a merge, best score first."""
    vocabulary = {processor.IdToPiece(i): i for i in range(processor.vocab_size())}
    merges = []
    for piece, token_id in vocabulary.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = sorted((vocabulary[a], vocabulary[b], a, b) for a, b in pairs if a in vocabulary and b in vocabulary)
        merges += [(-processor.GetScore(token_id), rank, a, b) for rank, (_, _, a, b) in enumerate(known)]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(a, b) for *_, a, b in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _split_then_bytes(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _texts_without_marks() -> tuple[str, ...]:
    """Texts without accented capitals and combining marks, at which some of llama.cpp's rules deviate."""
    return tuple(
        text
        for segment, text in CHECK_TEXTS
        if not (segment.startswith("accents") or any(category(c).startswith("M") for c in text))
    )


def _added(texts: Sequence[str], special: bool, swallowing: Sequence[str] = ()) -> list[AddedToken]:
    return [AddedToken(text, special=special, normalized=False, rstrip=text in swallowing) for text in texts]


def _decoder_entries(tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    return {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _train_sentencepiece(model_dir: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Write tokenizer.model, with all options of Llama 2's that are not given."""
    model_dir.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    defaults = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 3,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in ALL_TEXTS for line in text.splitlines() if line]),
        model_writer=content,
        **{**defaults, **options},
    )
    (model_dir / "tokenizer.model").write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def _save(tokenizer: Tokenizer, model_dir: Path, **config: Any) -> None:
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _update_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
