"""Reads a model's tokenizer, in whichever format it is."""

from pathlib import Path

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.byte_level_bpe import read_byte_level_bpe
from lieq_gguf.tokenizers.model_files import open_tokenizer, read_tokenizer_files
from lieq_gguf.tokenizers.pre_tokenizers import checked_name
from lieq_gguf.tokenizers.sentencepiece_style import is_sentencepiece_style, read_sentencepiece
from lieq_gguf.tokenizers.vocabulary import Vocabulary


def read_vocabulary(
    model_dir: Path, vocab_size: int, pre_tokenizer: str | None = None, architecture: str = "llama"
) -> Vocabulary:
    """Read the vocabulary of a model for llama.cpp.

    The files are tried in the order of llama.cpp's converter: tokenizer.model, then tokenizer.json as
    SentencePiece-style BPE or Unigram, then tokenizer.json as byte-level BPE. They are read with the
    libraries they were written for, so that no code of the model is run.

    Args:
        model_dir: a Hugging Face model directory.
        vocab_size: number of rows of the embedding, from config.json.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for byte-level BPE; None to recognise it.
        architecture: llama.cpp's name of the architecture, such as ``qwen2``; some keys depend on it.

    Raises:
        SourceError: if a file cannot be read.
        TokenizerError: if there are no tokenizer files, or llama.cpp does not support the tokenizer.
    """
    name = None if pre_tokenizer is None else checked_name(pre_tokenizer)
    files = read_tokenizer_files(model_dir)
    tokenizer = None if files.tokenizer_json is None else open_tokenizer(files)
    if files.sentencepiece_model is not None or tokenizer is None or is_sentencepiece_style(tokenizer):
        if name is not None:
            raise TokenizerError(
                f"{model_dir}: you asked for pre-tokenizer {name!r}, but this is a SentencePiece-style tokenizer, "
                "which has none; leave out --pre-tokenizer"
            )
        return read_sentencepiece(files, tokenizer, vocab_size, architecture)
    return read_byte_level_bpe(files, tokenizer, vocab_size, architecture, name)
