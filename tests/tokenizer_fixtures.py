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
from tokenizers.models import BPE

from lieq_gguf.tokenizers.check_texts import CHECK_TEXTS

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
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
    texts = [
        text
        for segment, text in CHECK_TEXTS
        if all_texts or not (segment.startswith("accents") or any(category(c).startswith("M") for c in text))
    ]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TEKKEN_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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


def write_llama_2(model_dir: Path) -> int:
    """SentencePiece BPE with bytes as a fallback: tokenizer.model, the same as tokenizer.json, two added tokens."""
    model_dir.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in ALL_TEXTS for line in text.splitlines() if line]),
        model_writer=content,
        model_type="bpe",
        vocab_size=1000,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=3,
    )
    (model_dir / "tokenizer.model").write_bytes(content.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    tokenizer = _llama_2_fast(processor)
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
    special = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>", "<|im_start|>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _save(tokenizer: Tokenizer, model_dir: Path, **config: Any) -> None:
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _update_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
