"""Converts a Hugging Face model's tokenizer files to llama.cpp's vocabulary, and checks that both agree."""

from lieq_gguf.tokenizers.chat_rendering import ChatTemplate, Conversation, render
from lieq_gguf.tokenizers.check import TokenizerDifference, known_deviation, tokenizer_differences
from lieq_gguf.tokenizers.model_files import adds_bos_unlike_transformers
from lieq_gguf.tokenizers.pre_tokenizers import pre_tokenizer_caveat
from lieq_gguf.tokenizers.reading import read_vocabulary
from lieq_gguf.tokenizers.source_tokenizer import SourceTokenizer, load_source_tokenizer
from lieq_gguf.tokenizers.vocabulary import Vocabulary

__all__ = [
    "ChatTemplate",
    "Conversation",
    "SourceTokenizer",
    "TokenizerDifference",
    "Vocabulary",
    "adds_bos_unlike_transformers",
    "known_deviation",
    "load_source_tokenizer",
    "pre_tokenizer_caveat",
    "read_vocabulary",
    "render",
    "tokenizer_differences",
]
