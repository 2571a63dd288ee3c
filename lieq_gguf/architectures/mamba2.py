"""What models with Mamba-2 layers have in common: the modules of such a layer, its sizes, keys and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError


def mamba_modules(name: str) -> tuple[LayerModule, ...]:
    """The modules of a Mamba-2 mixer that has a name in the source's layer.

    ``in_proj`` makes gate, values, keys, queries and time steps; the convolution runs over values, keys and queries.
    """
    return (
        LayerModule("ssm_in", f"{name}.in_proj", ("projected_width", "width")),
        LayerModule(
            "ssm_conv1d", f"{name}.conv1d", ("n_channels", "n_kernel"), bias="always", is_fixed=True,
            stored_shape=("n_channels", "one", "n_kernel"),
        ),
        LayerModule("ssm_dt", f"{name}.dt_bias", ("n_ssm_heads",), suffixes=(".bias", "")),
        LayerModule(
            "ssm_a", f"{name}.A_log", ("n_ssm_heads", "one"), suffixes=("", ""), is_fixed=True, is_negated_exp=True,
            stored_shape=("n_ssm_heads",),
        ),
        LayerModule(
            "ssm_d", f"{name}.D", ("n_ssm_heads", "one"), suffixes=("", ""), is_fixed=True,
            stored_shape=("n_ssm_heads",),
        ),
        LayerModule(
            "ssm_norm", f"{name}.norm", ("n_groups", "group_width"), is_fixed=True, stored_shape=("ssm_width",)
        ),
        LayerModule("ssm_out", f"{name}.out_proj", ("width", "ssm_width")),
    )  # fmt: skip


class Mamba2(Decoder):
    """A family with Mamba-2 layers.

    Attributes:
        mamba_keys: Keys of ``config.json`` for ``n_kernel``, ``state_size``, ``n_groups``, ``n_ssm_heads`` and
            ``ssm_head_dim``, the width of the convolution and of a head's state, and so on.
        convolution_bias: Key that says whether the convolution has a bias; the graph always adds one.
        projection_biases: Keys that say whether other modules of the mixer have one; the graph adds none.
    """

    mamba_keys: ClassVar[Mapping[str, str]] = {
        "n_kernel": "mamba_d_conv", "state_size": "mamba_d_state", "n_groups": "mamba_n_groups",
        "n_ssm_heads": "mamba_n_heads", "ssm_head_dim": "mamba_d_head",
    }  # fmt: skip
    convolution_bias: ClassVar[str] = "mamba_conv_bias"
    projection_biases: ClassVar[tuple[str, ...]] = ("mamba_proj_bias",)

    def check(self, config: Config) -> None:
        """Refuse also what the graph of a Mamba-2 layer does not compute."""
        super().check(config)
        for key in self.mamba_keys.values():
            require_count(key, config[key])
        if not config[self.convolution_bias]:
            raise ArchitectureError(
                f"{self.convolution_bias} is off, but llama.cpp runs {self.gguf_name} only with this bias"
            )
        for key in self.projection_biases:
            if config.get(key):
                raise ArchitectureError(
                    f"{key} is set, but llama.cpp runs {self.gguf_name} models without these biases"
                )
        sizes = self.sizes(config)
        if sizes["n_ssm_heads"] % sizes["n_groups"]:
            raise ArchitectureError(
                f"{self.mamba_keys['n_ssm_heads']} is {sizes['n_ssm_heads']}; expected a multiple of "
                f"{self.mamba_keys['n_groups']}, {sizes['n_groups']}"
            )
        self._check_time_steps(config)

    def _check_time_steps(self, config: Config) -> None:
        """Refuse time steps that are cut off; in JSON, infinity is a word or an object around it."""
        limit = config.get("time_step_limit")
        if limit is None:
            return
        least, most = (float(bound["__float__"] if isinstance(bound, dict) else bound) for bound in limit)
        if least > 0 or not math.isinf(most):
            raise ArchitectureError(
                f"time_step_limit is {least:g} to {most:g}, but llama.cpp runs {self.gguf_name} only without limits"
            )

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of a Mamba-2 layer."""
        own = {name: int(config[key]) for name, key in self.mamba_keys.items()}
        ssm_width, state_width = own["n_ssm_heads"] * own["ssm_head_dim"], own["n_groups"] * own["state_size"]
        n_channels = ssm_width + 2 * state_width
        return super().sizes(config) | own | {
            "ssm_width": ssm_width,
            "group_width": ssm_width // own["n_groups"],
            "n_channels": n_channels,
            "projected_width": ssm_width + n_channels + own["n_ssm_heads"],
        }  # fmt: skip

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and those of a Mamba-2 layer."""
        super().add_hyper_parameters(config, writer)
        sizes = self.sizes(config)
        writer.add_ssm_conv_kernel(sizes["n_kernel"])
        writer.add_ssm_state_size(sizes["state_size"])
        writer.add_ssm_group_count(sizes["n_groups"])
        writer.add_ssm_inner_size(sizes["ssm_width"])
        writer.add_ssm_time_step_rank(sizes["n_ssm_heads"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and those of a Mamba-2 layer."""
        n_heads, width = stored.count("ssm.time_step_rank"), stored.count("ssm.inner_size")
        found = {
            "n_kernel": stored.count("ssm.conv_kernel"),
            "state_size": stored.count("ssm.state_size"),
            "n_groups": stored.count("ssm.group_count"),
            "n_ssm_heads": n_heads,
            "ssm_head_dim": width // n_heads,
        }
        own = {key: found[name] for name, key in self.mamba_keys.items()}
        return super().source_config(stored) | own | {self.convolution_bias: True}
