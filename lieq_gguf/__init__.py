"""Mixed-precision GGUF files for llama.cpp, with layers scored by geometry."""

__version__ = "0.1.0"
