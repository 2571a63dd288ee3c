"""Everything that calls C: ggml's encoders and decoders, and models loaded in llama.cpp."""
