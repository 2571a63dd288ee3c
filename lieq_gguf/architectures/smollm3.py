"""SmolLM3: a Llama in which every fourth layer has no rotation."""

from __future__ import annotations

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.errors import ArchitectureError

_INTERVAL = 4


class SmolLM3(Llama):
    """The rows of query and key are reordered in all layers, even in those without rotation."""

    gguf_name = "smollm3"
    model_type = "smollm3"
    source_classes = ("SmolLM3ForCausalLM",)
    rope_types = ("default", "linear", "yarn")
    biases = ()
    default_theta = 2_000_000.0
    tied_by_default = True

    def check(self, config: Config) -> None:
        """Refuse also windows, and another order of layers without rotation."""
        super().check(config)
        n_layers = config["num_hidden_layers"]
        interval = config.get("no_rope_layer_interval") or _INTERVAL
        found = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n_layers)]
        expected = [int((i + 1) % _INTERVAL != 0) for i in range(n_layers)]
        if list(found[:n_layers]) != expected:
            raise ArchitectureError(
                f"no_rope_layers in config.json is {found}, but llama.cpp's graph leaves out the rotation only in "
                f"every fourth layer: {expected}"
            )
        if config.get("use_sliding_window"):
            raise ArchitectureError("use_sliding_window is set, which llama.cpp does not compute for SmolLM3")
