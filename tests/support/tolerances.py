"""How far a result may lie from that of llama.cpp, torch or transformers.

The same product comes out otherwise on every kernel: AVX2, AVX-512, AMX and NEON add in another order, some round
activations to 8 or 16 bits first, some add in 16 bits, and one token takes another way than a batch. So a bound is
derived from the rounding that some kernel does, with the largest of many values taken as 5 standard deviations of the
error, and not from what one machine gave. Beside it stands how far the least of the faults it is there for is away.

Logits are compared in standard deviations of the expected ones. That the likeliest token is the same follows from a
bound where it is far enough ahead, and does not hold where it is not, so it is no test of its own.

What was measured for a bound: on AVX2, with and without llama.cpp's repacked layouts, and on the same with the F16
product of NEON (four vectors of eight lanes, added in F16) in its place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FLOAT32_LOGITS = 1e-4
"""Two orders of the same float32 sums. A sum of 512 products is off by √512 · 2⁻²⁴ = 1.3e-6, thirty products one after
the other (seven layers) by √30 of that, the largest of many by 5 times as much: 4e-5. A missing bias is 0.4 away."""

F16_LOGITS = 0.03
"""An F16 file in llama.cpp, beside float32. Every activation is rounded to F16 (2⁻¹¹/√3 = 2.8e-4); NEON and
AVX-512-FP16 also add in F16, 16 partial sums at 512 columns, √(16/2) · 2.8e-4 = 8e-4. Thirty products (seven layers):
√30 as much, 0.005, and the largest 0.025. Measured: 0.005 with AVX2, 0.015 with NEON's product. The least of faults:
final cap of the logits left out 0.12, biases of the key 0.36, rotation where there is none 0.38, a window of 33 for 32
1.5, rotary rows of one layer 4."""

DEEP_F16_LOGITS = 0.08
"""The same at 64 layers: 256 products, √256 · 8e-4 = 0.013, and the largest 0.064. Measured: 0.009 with AVX-512."""

MIXTURE_LOGITS = 0.3
MIXTURE_SHARE = 0.8
"""The same for a mixture of experts, at four of five positions. A token whose second and third expert are as near as
that rounding goes to another one, and is up to 2 away; those that look back at it are 0.2 away. With NEON's product 5 %
of 128 positions were farther than 0.2. Shares that are not normed, or a third expert, are 0.8 and more away at four
of five positions, two experts that change places 1.2 at half of them."""

EIGHT_BIT_LOGITS = 0.3
"""Two ways of llama.cpp through the same quantised file, as one token and a batch. Activations are rounded to 8 bits by
blocks: a step is the largest of 256 values over 127, 0.02 to 0.05 standard deviations, so a product is off by
0.6 to 1.4 %, and three layers with their output (13 products) by 2 to 5 %. An error before the rounding as small as
2⁻¹¹ moves some of the codes, and after a few layers both ways are rounded independently: √2 as much. Measured are
0.034 (root mean square) beside float32, so 0.048 between two ways, the largest 0.24. The logits of the position before
or after are at least 1.7 away."""

F16_PRODUCT = 5e-3
"""One product of an F16 matrix, beside float32, in the largest of its values: the 8e-4 of F16_LOGITS, the largest of
many 5 times as much, over a largest value of 4 standard deviations: 1e-3 with NEON, 4e-4 with others. A row in the
place of another is 1 away."""

F16_SUMS = 0.01
"""Sums of squared activations over hundreds of tokens, in F16: 0.005 of every value (F16_LOGITS), twice that for its
square, averaged over 200 tokens and more 7e-4; for single columns 5 times as much. Another row order is 0.3 away."""

BFLOAT16_SUMS = 0.01
"""The same in bfloat16: both factors of a product and its result are rounded by 2⁻⁹/√3 to 2⁻⁸/√3, a product by 0.3 %,
all of three layers by 1 %, which squares and averages over thousands of tokens lessen to 1e-3."""

FLOAT32_SUMS = 1e-4
"""Sums of float32 products or squares, relative: 7e-6 by the reckoning of FLOAT32_LOGITS, the largest of many 4e-5. If
one factor was rounded to F16 on the way, single values are 5e-4 away, and 4e-3 with bfloat16."""


def distance(found: npt.ArrayLike, expected: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Largest difference of each position's logits ``[…, n_vocab]``, in standard deviations of all expected ones."""
    wanted = np.asarray(expected, dtype=np.float64)
    change = np.abs(np.asarray(found, dtype=np.float64) - wanted).max(axis=-1)
    return np.asarray(change / wanted.std())


def assert_logits_close(found: npt.ArrayLike, expected: npt.ArrayLike, bound: float, share: float = 1.0) -> None:
    """Fail if more positions than ``1 - share`` have a logit farther off than ``bound`` standard deviations."""
    assert np.shape(found) == np.shape(expected)
    distances = distance(found, expected)
    within = float((distances < bound).mean())  # NaN is not
    assert within >= share, (
        f"{within:.1%} of the positions are within {bound} standard deviations, expected {share:.0%}; "
        f"median {np.median(distances):.3g}, largest {distances.max():.3g}"
    )
