"""GLM-4 of 2024: half of each head rotated, gate and up in one matrix."""

from __future__ import annotations

from lieq_gguf.architectures.checks import Config, require_usual_heads
from lieq_gguf.architectures.glm4 import GLM_ATTENTION, GLM_FEED_FORWARD, Glm4
from lieq_gguf.architectures.modules import NORMS


class Glm(Glm4):
    """In transformers' own form (``-hf``).

    llama.cpp's converter reads the keys of the older form, so its files of these models have other numbers than
    ``config.json``: context, epsilon of the norms, rotary base.
    """

    gguf_name = "chatglm"
    model_type = "glm"
    source_classes = ("GlmForCausalLM",)
    modules = (NORMS[0], *GLM_ATTENTION, NORMS[1], *GLM_FEED_FORWARD)

    def check(self, config: Config) -> None:
        """Refuse also heads of an unusual width."""
        super().check(config)
        require_usual_heads(config, self.head_dim(config), self.gguf_name)
