"""What mixtures of experts have in common: numbers that ``config.json`` and the file have for them."""

from __future__ import annotations

import gguf

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.stored_parameters import StoredParameters


def expert_sizes(config: Config, n_experts: int, used: str = "num_experts_per_tok") -> dict[str, int]:
    """Sizes that occur in the shapes of experts, by name; ``used`` is the key of how many a token uses."""
    return {
        "n_experts": n_experts,
        "n_experts_used": int(config[used]),
        "n_expert_ff": int(config["moe_intermediate_size"]),
    }


def add_expert_counts(sizes: dict[str, int], writer: gguf.GGUFWriter) -> None:
    """Write the number of experts, of those that a token uses, and their width."""
    writer.add_expert_count(sizes["n_experts"])
    writer.add_expert_used_count(sizes["n_experts_used"])
    writer.add_expert_feed_forward_length(sizes["n_expert_ff"])


def source_expert_counts(
    stored: StoredParameters, key: str = "num_experts", used: str = "num_experts_per_tok"
) -> dict[str, int]:
    """Keys of ``config.json`` made from those of :func:`add_expert_counts`.

    The number of experts has ``key``, and that of those which a token uses has ``used``.
    """
    return {
        key: stored.count("expert_count"),
        used: stored.count("expert_used_count"),
        "moe_intermediate_size": stored.count("expert_feed_forward_length"),
    }
