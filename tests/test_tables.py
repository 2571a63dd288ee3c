"""What people see is what the records hold: every figure, in the column that says what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from support.specs import COSTS, make_spec, spec_of

from lieq_gguf.cli import tables
from lieq_gguf.evaluation.benchmark import Benchmark, Rate
from lieq_gguf.evaluation.devices import DEVICES
from lieq_gguf.evaluation.divergence import Estimate, Evaluation
from lieq_gguf.evaluation.health import Health
from lieq_gguf.evaluation.inspection import Inspection
from lieq_gguf.evaluation.tasks import Answers
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitMeter
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec, TensorSpec

METER = BitMeter(3.1415, 4.2718, 2.875, 12_340_000, 23_456_789, 9_000_000, 3_085_000)
WARM_TO_COLD = ("red", "dark_orange", "yellow", "green", "cyan", "blue", "magenta")
SCORES = LayerScores(
    "tiny", 512, "text", 0,
    {"lieq": (0.5, 0.25, 0.125), "lim": (-0.9, -0.8, -0.7), "zd": (0.1, 0.3, 0.2)},
    {},
)  # fmt: skip
RUN = Benchmark(
    file=Path("models/small.gguf"), file_bytes=12_340_000, n_threads=2, n_prompt=512, n_generate=128,
    prompt=Rate(456.78, 1.23), generation=Rate(98.76, 0.54), load_seconds=0.31, resident_bytes=76_500_000,
    bytes_per_token=10_900_000, memory_bandwidth=5.5e9, needed_bytes=80_100_000, n_ctx=4096, predicted=87.65,
    predicted_for="a machine, 2 threads",
)  # fmt: skip


def lines(*parts: RenderableType) -> list[str]:
    """What a terminal without colours shows."""
    out = StringIO()
    console = Console(file=out, width=250, color_system=None)
    for part in parts:
        console.print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def cells(row: str) -> list[str]:
    """The fields of a row, none of which is empty."""
    return row.split()


def uniform(spec: ModelSpec, name: str, **others: str) -> dict[str, str]:
    """One type throughout, but for the tensors of some roles."""
    return {t.name: others.get(t.role, name) for t in spec.tensors if t.is_matrix}


# The map of layers


def test_each_matrix_is_under_its_role() -> None:
    spec = make_spec(2)
    types = uniform(spec, "Q3_K", attn_k="Q8_0", attn_output="Q6_K", ffn_down="IQ4_XS")
    header, *rows = lines(tables.layer_map(spec.tensors, types))
    assert cells(header) == ["layer", "bpw", "q", "k", "v", "o", "gate", "up", "down"]
    for layer, row in enumerate(rows):
        assert cells(row)[0] == str(layer)
        assert cells(row)[2:] == ["Q3_K", "Q8_0", "Q3_K", "Q6_K", "Q3_K", "Q3_K", "IQ4_XS"]


def test_a_layer_without_a_matrix_leaves_its_place_empty() -> None:
    full = {"attn_q": (4, 256), "attn_v": (4, 256), "ffn_up": (4, 256)}
    spec = spec_of([full, {"attn_q": (4, 256), "ffn_up": (4, 256)}, {"ssm_in": (4, 256), "attn_v": (4, 256)}])
    types = uniform(spec, "Q2_K", attn_v="Q4_K", ffn_up="Q6_K", ssm_in="Q8_0")
    header, *rows = lines(tables.layer_map(spec.tensors, types))
    place = {role: header.index(f" {role}") + 1 for role in ("q", "v", "up", "ssm_in")}
    found = [{role: row[start:].split(" ")[0] for role, start in place.items()} for row in rows]
    assert found == [
        {"q": "Q2_K", "v": "Q4_K", "up": "Q6_K", "ssm_in": ""},
        {"q": "Q2_K", "v": "", "up": "Q6_K", "ssm_in": ""},
        {"q": "", "v": "Q4_K", "up": "", "ssm_in": "Q8_0"},
    ]


def test_bits_of_a_layer_are_the_mean_over_its_weights() -> None:
    spec = spec_of([{"attn_q": (1, 256), "ffn_up": (3, 256)}, {"attn_q": (1, 256), "ffn_up": (3, 256)}])
    types = uniform(spec, "Q2_K") | {"blk.1.ffn_up.weight": "Q6_K"}
    rows = lines(tables.layer_map(spec.tensors, types))[1:]
    assert [cells(row)[1] for row in rows] == ["2.625", f"{(2.625 + 3 * 6.5625) / 4:.3f}"]


def test_layers_are_in_their_order_whatever_that_of_the_file() -> None:
    spec = make_spec(12)
    tensors = sorted(spec.tensors, key=lambda t: t.name)  # blk.10 before blk.2
    rows = lines(tables.layer_map(tensors, uniform(spec, "Q4_K")))[1:]
    assert [cells(row)[0] for row in rows] == [str(i) for i in range(12)]


def test_scores_are_drawn_only_where_there_are_some() -> None:
    spec = make_spec(3)
    types = uniform(spec, "Q4_K")
    assert "score" not in lines(tables.layer_map(spec.tensors, types))[0]
    header, *rows = lines(tables.layer_map(spec.tensors, types, (0.1, 0.3, 0.2)))
    assert cells(header)[:3] == ["layer", "bpw", "score"]
    assert [cells(row)[2].count("█") for row in rows] == [0, 8, 4]
    assert {len(cells(row)[2]) for row in rows} == {8}


def test_equal_scores_draw_no_bar() -> None:
    spec = make_spec(2)
    rows = lines(tables.layer_map(spec.tensors, uniform(spec, "Q4_K"), (0.5, 0.5)))[1:]
    assert not any("█" in row for row in rows)


def test_experts_are_one_cell_and_their_router_is_none() -> None:
    tensors = (
        TensorSpec("blk.0.ffn_gate_inp.weight", "r", (8, 256), 0, is_fixed=True),
        TensorSpec("blk.0.ffn_up_exps.weight", "e{}", (8, 4, 256), 0),
        TensorSpec("blk.0.ffn_down_exps.weight", "d{}", (8, 4, 256), 0),
    )
    types = {"blk.0.ffn_gate_inp.weight": "F32", "blk.0.ffn_up_exps.weight": "Q2_K",
             "blk.0.ffn_down_exps.weight": "Q4_K"}  # fmt: skip
    header, row = lines(tables.layer_map(tensors, types))
    assert cells(header) == ["layer", "bpw", "up_exps", "down_exps"]
    assert cells(row) == ["0", f"{(2.625 + 4.5) / 2:.3f}", "Q2_K", "Q4_K"]


def test_every_type_has_a_colour_and_more_bits_are_never_warmer() -> None:
    rising = sorted(QUANT_TYPES.values(), key=lambda q: q.bits_per_weight)
    found = [WARM_TO_COLD.index(colour_of(q.name)) for q in rising]
    assert found == sorted(found)
    assert set(found) == set(range(len(WARM_TO_COLD)))  # none is there for nothing


def colour_of(type_name: str) -> str:
    line = tables.outer_types([TensorSpec("output.weight", "o", (1, 256))], {"output.weight": type_name})
    (colour,) = {str(span.style) for span in line.spans if line.plain[span.start : span.end] == type_name}
    return colour


def test_outer_matrices_are_in_one_line() -> None:
    spec = make_spec(2, tied=False)
    types = uniform(spec, "Q2_K", token_embd="Q4_K", output="Q6_K")
    assert " ".join(lines(tables.outer_types(spec.tensors, types))[0].split()) == "token_embd Q4_K output Q6_K"


# The meter and what is predicted


def test_the_three_figures_and_the_size_are_together() -> None:
    figures, size = lines(tables.meter_lines(METER, " (3.2 asked for)"))
    for figure in ("3.1415", "4.2718", "2.875", "(3.2 asked for)"):
        assert figure in figures
    assert figures.index("3.1415") < figures.index("(3.2 asked for)") < figures.index("4.2718")
    assert size.startswith("12.3 MB, 25% ")


def test_an_inspection_shows_map_meter_and_needs() -> None:
    spec = make_spec(3)
    report = Inspection(
        file=Path("small.gguf"), architecture="llama", n_layers=3, tensors=spec.tensors,
        types=uniform(spec, "Q3_K", token_embd="Q6_K"), meter=METER, layer_scores=(0.1, 0.2, 0.3),
        provenance={"command_line": "lieq-gguf convert small --bits 3.2"}, kv_cache_bytes=7_660_000, n_ctx=2048,
        bytes_per_token=10_000_000,
    )  # fmt: skip
    shown = "\n".join(inspection_lines(report))
    for part in (
        *lines(tables.layer_map(spec.tensors, report.types, report.layer_scores)),
        *lines(tables.meter_lines(METER)),
        "token_embd Q6_K",
        "20 MB",  # file and cache
        "2048 tokens",
        "10 MB per token",
        "1000 tokens/s",  # 10 GB/s by 10 MB
        "made by lieq-gguf convert small --bits 3.2",
    ):
        assert part in shown
    assert "made by" not in "\n".join(inspection_lines(replace(report, provenance={})))


def inspection_lines(report: Inspection) -> list[str]:
    out = StringIO()
    tables.show_inspection(report, Console(file=out, width=250, color_system=None))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_forecast_says_what_is_known_and_for_which_machine() -> None:
    elsewhere = tables.prediction_line(0.1234, 56.7, COSTS).plain
    assert "0.12" in elsewhere
    assert "57 tokens/s" in elsewhere
    assert COSTS.machine in elsewhere
    here = tables.prediction_line(None, 56.7, replace(COSTS, is_own=True)).plain
    assert "57 tokens/s" in here
    assert "KLD" not in here
    assert COSTS.machine not in here
    assert "tokens/s" not in tables.prediction_line(0.1, None, COSTS).plain
    assert tables.prediction_line(None, None, None).plain == ""


# Scores


def test_the_chosen_score_comes_first_and_is_drawn() -> None:
    header, *rows = lines(tables.score_table(SCORES, "lim"))
    assert cells(header) == ["layer", "lim", "lieq", "zd"]
    assert [cells(row)[0] for row in rows] == ["0", "1", "2"]
    assert [cells(row)[1].count("█") for row in rows] == [0, 4, 8]
    assert [cells(row)[2:] for row in rows] == [
        ["-0.9000", "0.5000", "0.1000"], ["-0.8000", "0.2500", "0.3000"], ["-0.7000", "0.1250", "0.2000"],
    ]  # fmt: skip


def test_agreement_is_the_correlation_of_ranks() -> None:
    header, *rows = lines(tables.agreement_table(SCORES))
    assert cells(header) == ["lieq", "lim", "zd"]
    assert [cells(row) for row in rows] == [
        ["lieq", "+1.00", "-1.00", "-0.50"], ["lim", "-1.00", "+1.00", "+0.50"], ["zd", "-0.50", "+0.50", "+1.00"],
    ]  # fmt: skip


# Speed


def test_a_run_is_a_row_with_all_its_figures() -> None:
    other = replace(RUN, n_threads=4, generation=Rate(123.4, 0.0))
    _header, first, second, *caption = lines(tables.bench_table([RUN, other]))
    assert " ".join(first.split()) == (
        "small.gguf 12.3 2 456.8 ± 1.2 98.8 ± 0.5 87.7 10.9 1.1 of 5.5 0.31 76"  # 10.9 MB 98.76 times a second
    )
    assert "123.4 ± 0.0" in second
    assert RUN.predicted_for in " ".join(caption)


def test_costs_rise_down_the_table() -> None:
    title, _header, *rows = lines(tables.costs_table(COSTS))
    assert title == f"{COSTS.machine}: {COSTS.source}"
    assert [cells(row)[0] for row in rows] == sorted(COSTS.picoseconds, key=lambda name: COSTS.picoseconds[name])
    # 4.5 bits in 28 ps are 0.5625 bytes, 20.1 of them in a nanosecond
    assert ["Q4_K", "4.5", "28.0", "20.1"] in [cells(row) for row in rows]


def test_every_device_has_an_estimate_for_every_file() -> None:
    large = replace(RUN, file=Path("large.gguf"), bytes_per_token=8 * 10**9, needed_bytes=10 * 10**9)
    heading, table = tables.estimate_lines([replace(RUN, n_threads=1, needed_bytes=1), RUN, large])
    assert "estimated" in heading.plain
    header, *rows, needs = lines(table)
    assert cells(header) == ["device", "small.gguf", "large.gguf"]
    by_device = dict(zip((device.name for device in DEVICES), rows, strict=True))
    for device, row in by_device.items():
        assert row.startswith(device)
    # 10.9 MB a token of 5.5 GB/s are reached at 98.76 tokens/s to 19.6 percent, and a Raspberry Pi 5 has 17.1 GB/s
    assert "~307" in by_device["Raspberry Pi 5, 8 GB"]
    assert by_device["Raspberry Pi 5, 8 GB"].endswith("does not fit")
    assert by_device["Apple M4, 16 GB"].split()[-1].startswith("~")
    assert "4096" in needs
    assert needs.split()[-4:] == ["80", "MB", "10000", "MB"]  # of the run with more threads


# Evaluations


def evaluation(file: Path, **changes: object) -> Evaluation:
    values: dict[str, object] = {
        "file": file, "n_tokens": 12_345, "n_chunks": 7, "perplexity": Estimate(17.1234, 0.0456),
        "reference_perplexity": Estimate(15.6789, 0.0321), "kld": Estimate(0.12345, 0.00678), "kld_median": 0.0567,
        "kld_p99": 1.2349, "kld_max": 9.9, "same_top": Estimate(0.8765, 0.01),
        "probability_change": Estimate(-0.01, 0.001), "probability_change_rms": 0.1,
        "health": Health(5, 2, 0, 0.4, ()),
    } | changes  # fmt: skip
    return Evaluation(**values)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> Sequence[Path]:
    """Two files, of which the table tells the sizes."""
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for megabytes, path in enumerate(paths, start=1):
        path.write_bytes(bytes(megabytes * 1_000_000))
    return paths


def test_an_evaluation_is_a_row_with_all_its_figures(files: Sequence[Path]) -> None:
    alone = evaluation(files[1], perplexity=Estimate(16.5, None), health=Health(5, 0, 0, 0.1, ()))
    title, header, first, second = lines(tables.evaluation_table([evaluation(files[0]), alone]))
    assert title.startswith("12,345 tokens in 7 sequences")
    assert title.endswith("15.679 ± 0.032")
    assert "right answers" not in header
    assert " ".join(first.split()) == ("a.gguf 1.0 17.123 ± 0.046 0.1235 ± 0.0068 0.0567 1.235 87.6% 2 loop of 5")
    assert " ".join(second.split()).startswith("b.gguf 2.0 16.500 0.1235 ± 0.0068 ")
    assert second.endswith("speaks")


def test_answers_and_the_reference_are_shown_where_there_are_some(files: Sequence[Path]) -> None:
    asked = evaluation(
        files[0], answers=Answers((0, 1, 1, 0), (0, 0, 0, 0), (0, 1, 0, 0)),
        reference_answers=Answers((0,), (0,), (0,)), reference_health=Health(5, 0, 1, 0.0, ()),
    )  # fmt: skip
    _title, header, row, caption = lines(tables.evaluation_table([asked]))
    assert header.endswith("right answers")
    assert row.endswith("75.0% ± 25.0% of 4")
    assert "1 empty of 5" in caption
    assert caption.endswith("100.0% of 1")
