"""Tiny but real tokenizers, in the file formats of the model families.

Each function writes the tokenizer files of a model directory and returns the vocab_size for its config.json. They are
trained on the texts of the check, so that merges, and so differences, happen where the check looks.
"""

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from unicodedata import category

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
QWEN_3_5_REGEX = QWEN_2_REGEX.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
#: OpenAI's own spelling of the rule that Llama 3 has too
CL100K_REGEX = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
)
SEED_REGEX = QWEN_2_REGEX.replace(r"\p{N}|", r"\p{N}{1}|").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
MINICPM_5_REGEXES = (r"\p{N}{1,3}", LLAMA_3_REGEX.replace("{1,3}", "+"))
#: as in DeepSeek V3's tokenizer.json, where line breaks are not escaped
DEEPSEEK_3_REGEXES = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
QWEN_2_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|vision_pad|>",
)  # fmt: skip
QWEN_2_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
QWEN_3_PLAIN = (*QWEN_2_PLAIN, "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN_3_5_PLAIN = (*QWEN_3_PLAIN, "<tts_pad>", "<tts_text_bos>")
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
MINISTRAL_3_SPECIAL = (*TEKKEN_SPECIAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[THINK]", "[/THINK]")
N_MINISTRAL_3_SPECIAL = 16
APERTUS_SPECIAL = ("<unk>", "<s>", "</s>", "<|system_start|>", "<|user_start|>", "<|assistant_end|>", "<pad>")
LFM2_FIRST = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
)  # fmt: skip
GLM_4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>",
)  # fmt: skip
GRANITE_4_SPECIAL = (
    "<|pad|>", "<|unk|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|start_of_role|>", "<|end_of_role|>",
    "<|end_of_text|>",
)  # fmt: skip
NEMOTRON_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<SPECIAL_17>")
HUNYUAN_SPECIAL = tuple(
    f"<\uff5chy_{name}\uff5c>".replace(" ", SPACE)
    for name in ("begin of sentence", "User", "Assistant", "place holder no 2", "place holder no 3")
)
EXAONE_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")
SEED_SPECIAL = ("<seed:bos>", "<seed:pad>", "<seed:eos>")
SEED_PLAIN = ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>")
GPT_OSS_SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>", "<|endofprompt|>",
)  # fmt: skip
MINICPM_5_SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
ERNIE_ROLES = ("<unk>", "<s>", "</s>", "<pad>")
ERNIE_ADDED = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>", "<|im_start|>", "<|im_end|>")
GEMMA_4_NAMES = {"<start_of_turn>": "<|turn>", "<end_of_turn>": "<turn|>", "<table>": "<|channel>"}


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


def _write_qwen(model_dir: Path, plain: Sequence[str], regex: str = QWEN_2_REGEX) -> int:
    tokenizer = _trained(BPE(), _split_then_bytes(regex), ())
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


def write_qwen3_5(model_dir: Path) -> int:
    """Qwen 3.5: combining marks count as letters."""
    return _write_qwen(model_dir, QWEN_3_5_PLAIN, QWEN_3_5_REGEX)


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
    tokenizer = _trained(BPE(), _split_then_bytes(LLAMA_3_REGEX, behavior="removed", invert=True), ())
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
    split = _split_then_bytes(GPT_4O_REGEX, behavior="removed", invert=True)
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


def write_lfm2(model_dir: Path) -> int:
    """LFM2.5: Llama 3's rule in OpenAI's spelling, words taken whole, BOS by a template, special tokens first."""
    tokenizer = _trained(BPE(ignore_merges=True), _split_then_bytes(CL100K_REGEX), LFM2_FIRST)
    return _save_bytes(
        tokenizer, model_dir, n_unused=6, first="<|startoftext|>", bos_token="<|startoftext|>", eos_token="<|im_end|>",
        pad_token="<|pad|>", legacy=False, chat_template=CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_ministral_3(model_dir: Path) -> int:
    """Mistral's tekken as tokenizer.json, with the chat template in a file of its own."""
    special = (
        *MINISTRAL_3_SPECIAL,
        *(f"<SPECIAL_{i}>" for i in range(len(MINISTRAL_3_SPECIAL), N_MINISTRAL_3_SPECIAL)),
    )
    tokenizer = _trained(BPE(ignore_merges=True), _split_then_bytes(TEKKEN_REGEX), special, _texts_without_marks())
    vocab_size = _save_bytes(
        tokenizer, model_dir, n_unused=0, first="<s>", add_bos_token=True, add_eos_token=False, bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>", tokenizer_class="TokenizersBackend",
    )  # fmt: skip
    (model_dir / "chat_template.jinja").write_text(INST_CHAT, encoding="utf-8")
    return vocab_size


def write_tekken_json_only(model_dir: Path) -> int:
    """The same as tekken.json, Mistral's own format: bytes in the order of merging, more of them than are used."""
    vocab_size = write_ministral_3(model_dir)
    content = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    byte_of = {text: byte for byte, text in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    texts = [text for text in content["model"]["vocab"] if text not in MINISTRAL_3_SPECIAL]
    texts = [text for text in texts if not text.startswith("<SPECIAL_")]
    encoded = [base64.b64encode(bytes(byte_of[c] for c in text)).decode() for text in texts]
    entries = [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(encoded)]
    unused = [{"rank": len(entries), "token_bytes": base64.b64encode(b"never").decode(), "token_str": "never"}]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(MINISTRAL_3_SPECIAL)]
    config = {
        "pattern": TEKKEN_REGEX, "num_vocab_tokens": len(entries) + 1, "default_vocab_size": vocab_size,
        "default_num_special_tokens": N_MINISTRAL_3_SPECIAL, "version": "v13",
    }  # fmt: skip
    tekken = {"config": config, "vocab": entries + unused, "special_tokens": special}
    (model_dir / "tekken.json").write_text(json.dumps(tekken), encoding="utf-8")
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer_config.json").unlink()
    return vocab_size


def write_apertus(model_dir: Path) -> int:
    """Mistral's tekken with other special tokens."""
    split = _split_then_bytes(TEKKEN_REGEX)
    tokenizer = _trained(BPE(ignore_merges=True), split, APERTUS_SPECIAL, _texts_without_marks())
    return _save_bytes(
        tokenizer, model_dir, n_unused=3, first="<s>", bos_token="<s>", eos_token="<|assistant_end|>",
        pad_token="<pad>", unk_token="<unk>", add_prefix_space=False, chat_template=CHATML,
        tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_nemotron_h(model_dir: Path) -> int:
    """Mistral's special tokens, but Llama 3's rule."""
    tokenizer = _trained(BPE(ignore_merges=True), _split_then_bytes(LLAMA_3_REGEX), NEMOTRON_SPECIAL)
    return _save_bytes(
        tokenizer, model_dir, n_unused=-len(tokenizer.get_vocab()) % 8, first="<s>", bos_token="<s>",
        eos_token="<|im_end|>", unk_token="<unk>", add_bos_token=True, chat_template=CHATML,
        tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_granite_4(model_dir: Path) -> int:
    """OpenAI's cl100k in its own spelling, with Granite's roles."""
    tokenizer = _trained(BPE(), _split_then_bytes(CL100K_REGEX, behavior="removed", invert=True), ())
    tokenizer.add_special_tokens(_added(GRANITE_4_SPECIAL, special=True))
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    return _save_bytes(
        tokenizer, model_dir, n_unused=-len(tokenizer.get_vocab()) % 8, add_prefix_space=False,
        bos_token="<|end_of_text|>", eos_token="<|end_of_text|>", pad_token="<|pad|>", unk_token="<|unk|>",
        chat_template=CHATML, tokenizer_class="GPT2Tokenizer",
    )  # fmt: skip


def write_glm_4(model_dir: Path) -> int:
    """GLM-4 of 2025: Llama 3's rule, words taken whole, no post-processor; several tokens end an answer."""
    tokenizer = _trained(BPE(ignore_merges=True), _split_then_bytes(LLAMA_3_REGEX), ())
    tokenizer.add_special_tokens(_added(GLM_4_SPECIAL, special=True))
    ends = [int(tokenizer.token_to_id(text) or 0) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    vocab_size = _save_bytes(
        tokenizer, model_dir, n_unused=4, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        chat_template="[gMASK]<sop>" + CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip
    (model_dir / "config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return vocab_size


def write_glm_4_with_prefix(model_dir: Path) -> int:
    """The same as transformers' script for GLM makes it with ``--use_post_processor``: two tokens before every text."""
    vocab_size = write_glm_4(model_dir)
    prefix = ("[gMASK]", "<sop>")
    pieces = [{"SpecialToken": {"id": text, "type_id": 0}} for text in prefix]
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    ids = {token["content"]: token["id"] for token in _read_json(model_dir / "tokenizer.json")["added_tokens"]}
    template = {
        "type": "TemplateProcessing", "single": [*pieces, a], "pair": [*pieces, a, b],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in prefix},
    }  # fmt: skip
    of_bytes = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    _update_json(model_dir / "tokenizer.json", post_processor={"type": "Sequence", "processors": [of_bytes, template]})
    return vocab_size


def write_hunyuan_dense(model_dir: Path) -> int:
    """Hunyuan: DeepSeek V3's rule; tokenizer_config.json names another token than ends an answer."""
    tokenizer = _trained(BPE(), _split_then_bytes(*DEEPSEEK_3_REGEXES), ())
    tokenizer.add_special_tokens(_added(HUNYUAN_SPECIAL, special=True))
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    ids = [int(tokenizer.token_to_id(text) or 0) for text in HUNYUAN_SPECIAL]
    vocab_size = _save_bytes(
        tokenizer, model_dir, n_unused=5, bos_token=HUNYUAN_SPECIAL[0], eos_token=HUNYUAN_SPECIAL[1],
        chat_template=CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip
    (model_dir / "config.json").write_text(json.dumps({"eod_token_id": ids[3], "pad_token_id": -1}), encoding="utf-8")
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[3:]}), encoding="utf-8")
    return vocab_size


def write_exaone_4(model_dir: Path) -> int:
    """EXAONE 4: GPT-2's rule."""
    tokenizer = _trained(BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), EXAONE_SPECIAL)
    tokenizer.add_tokens(_added(("<think>", "</think>", "<tool_call>"), special=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _save_bytes(
        tokenizer, model_dir, n_unused=2, bos_token="[BOS]", eos_token="[|endofturn|]", pad_token="[PAD]",
        unk_token="[UNK]", chat_template=CHATML, tokenizer_class="GPT2Tokenizer",
    )  # fmt: skip


def write_seed_oss(model_dir: Path) -> int:
    """Seed-OSS: Qwen's rule, but line breaks never follow punctuation."""
    tokenizer = _trained(BPE(), _split_then_bytes(SEED_REGEX), SEED_SPECIAL)
    tokenizer.add_tokens(_added(SEED_PLAIN, special=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _save_bytes(
        tokenizer, model_dir, n_unused=3, bos_token="<seed:bos>", eos_token="<seed:eos>", pad_token="<seed:pad>",
        chat_template=CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_gpt_oss(model_dir: Path) -> int:
    """gpt-oss: OpenAI's o200k; it says that words are taken whole, but merges lead to each of them."""
    split = _split_then_bytes(GPT_4O_REGEX)
    tokenizer = _trained(BPE(ignore_merges=True), split, (), _texts_without_marks())
    tokenizer.add_special_tokens(_added(GPT_OSS_SPECIAL, special=True))
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    return _save_bytes(
        tokenizer, model_dir, n_unused=9, bos_token="<|startoftext|>", eos_token="<|return|>",
        pad_token="<|endoftext|>", chat_template=CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_minicpm_5(model_dir: Path) -> int:
    """MiniCPM 5: Llama 3's rule, before which digits are split by threes."""
    tokenizer = _trained(BPE(ignore_merges=True), _split_then_bytes(*MINICPM_5_REGEXES), MINICPM_5_SPECIAL)
    return _save_bytes(
        tokenizer, model_dir, n_unused=1, first="<s>", bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>",
        chat_template=CHATML, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip


def write_ernie_4_5(model_dir: Path) -> int:
    """ERNIE 4.5: SentencePiece BPE without a leading blank, separators among the added tokens."""
    processor = _train_sentencepiece(
        model_dir, model_type="bpe", vocab_size=1000, character_coverage=0.98, add_dummy_prefix=False, pad_id=3,
        pad_piece="<pad>",
    )  # fmt: skip
    tokenizer = _llama_2_fast(processor)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.add_special_tokens(_added((*ERNIE_ROLES, *ERNIE_ADDED), special=True))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    _save(
        tokenizer,
        model_dir,
        add_bos_token=False,
        add_eos_token=False,
        add_prefix_space=False,
        added_tokens_decoder=_decoder_entries(tokenizer),
        additional_special_tokens=list(ERNIE_ADDED[3:]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token=ERNIE_ADDED[0],
        sep_token=ERNIE_ADDED[1],
        mask_token=ERNIE_ADDED[2],
        chat_template=CHATML,
        tokenizer_class="Ernie4_5Tokenizer",
    )
    return int(tokenizer.get_vocab_size()) + 4


def write_gemma_4(model_dir: Path) -> int:
    """Gemma 4: Gemma's kind of BPE as tokenizer.json alone, with other turns; BOS is left to the chat template."""
    write_gemma_json_only(model_dir)
    for path in (model_dir / "tokenizer.json", model_dir / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in GEMMA_4_NAMES.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(_added(list(GEMMA_4_NAMES.values()), special=True))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    tokenizer.save(str(model_dir / "tokenizer.json"))
    _update_json(model_dir / "tokenizer_config.json", add_bos_token=False)
    (model_dir / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


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


def _split_then_bytes(*regexes: str, behavior: str = "isolated", invert: bool = False) -> Any:
    splits = [pre_tokenizers.Split(Regex(regex), behavior, invert) for regex in regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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


def _save_bytes(tokenizer: Tokenizer, model_dir: Path, n_unused: int, first: str = "", **config: Any) -> int:
    """Save a byte-level BPE and its tokens in tokenizer_config.json; returns the vocab_size.

    Args:
        tokenizer: what to save.
        model_dir: where to.
        n_unused: rows of the embedding beyond the tokens.
        first: token before every text.
        config: of tokenizer_config.json.
    """
    if first:
        known = [(first, int(tokenizer.token_to_id(first) or 0))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=known
        )
    config = {"clean_up_tokenization_spaces": False, **config}
    _save(tokenizer, model_dir, added_tokens_decoder=_decoder_entries(tokenizer), **config)
    return int(tokenizer.get_vocab_size()) + n_unused


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _update_json(path: Path, **changes: Any) -> None:
    content = _read_json(path) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
