"""Lets ``python -m lieq_gguf`` be the command ``lieq-gguf``."""

from lieq_gguf.cli.commands import main

main()
