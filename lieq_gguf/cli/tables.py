"""Tables for people: the layer map, the bit meter, scores, benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitMeter, layer_bpw
from lieq_gguf.records.spec import TensorSpec

if TYPE_CHECKING:
    from rich.console import Console

    from lieq_gguf.allocation.decode_costs import DecodeCosts
    from lieq_gguf.evaluation.benchmark import Benchmark
    from lieq_gguf.evaluation.divergence import Estimate, Evaluation
    from lieq_gguf.evaluation.inspection import Inspection
    from lieq_gguf.evaluation.tasks import Answers
    from lieq_gguf.records.scores import LayerScores

# Upper end of each band, in stored bits per weight; from warm colours (few bits) to cold (many).
_COLOURS = (
    (2.1, "red"),
    (2.7, "dark_orange"),
    (3.2, "yellow"),
    (4.0, "green"),
    (5.0, "cyan"),
    (7.0, "blue"),
    (99.0, "magenta"),
)
_ROLE_NAMES = {"attn_output": "o", "attn_q": "q", "attn_k": "k", "attn_v": "v"}
_BAR_WIDTH = 8
_REFERENCE_BYTES_PER_SEC = 10e9  # a Raspberry Pi 5 reads this from memory; published speeds of K types agree


def layer_map(tensors: Sequence[TensorSpec], types: Mapping[str, str], scores: Sequence[float] = ()) -> Table:
    """One row per layer, one coloured cell per matrix."""
    layers: dict[int, dict[str, str]] = {}
    for tensor in tensors:
        if tensor.layer is not None and tensor.is_matrix:
            layers.setdefault(tensor.layer, {})[tensor.role] = types[tensor.name]
    roles = list(dict.fromkeys(role for row in layers.values() for role in row))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("bpw", justify="right")
    if scores:
        table.add_column("score")
    for role in roles:
        table.add_column(_ROLE_NAMES.get(role, role.removeprefix("ffn_")), no_wrap=True)
    bpw = layer_bpw(tensors, types)
    for layer, row in sorted(layers.items()):
        cells: list[str | Text] = [str(layer), f"{bpw[layer]:.3f}"]
        if scores:
            cells.append(_bar(scores[layer], min(scores), max(scores)))
        table.add_row(*cells, *(_coloured(row[role]) if role in row else "" for role in roles))
    return table


def outer_types(tensors: Sequence[TensorSpec], types: Mapping[str, str]) -> Text:
    """Types of the outer matrices, in one line."""
    line = Text()
    for tensor in tensors:
        if tensor.layer is None and tensor.is_matrix:
            line.append(f"{tensor.role} ", style="dim").append_text(_coloured(types[tensor.name])).append("  ")
    return line


def meter_lines(meter: BitMeter, target: str = "") -> Text:
    """The three figures and the file size."""
    text = Text()
    for value, unit in (
        (f"{meter.layer_bpw:.4f}", f"bits per decoder weight{target}"),
        (f"{meter.file_bpw:.4f}", "whole file"),
        (f"{meter.nominal_bits:.3f}", "nominal"),
    ):
        text.append(value, style="bold").append(f" {unit}   ", style="dim")
    share = meter.embedding_bytes / meter.file_bytes
    text.append(f"\n{meter.file_bytes / 1e6:.1f} MB", style="bold")
    return text.append(f", {share:.0%} of it embedding and output", style="dim")


def show_inspection(report: Inspection, out: Console) -> None:
    """Print a report for people."""
    out.print(layer_map(report.tensors, report.types, report.layer_scores))
    out.print(outer_types(report.tensors, report.types))
    out.print(meter_lines(report.meter))
    memory = (report.meter.file_bytes + report.kv_cache_bytes) / 1e6
    speed = _REFERENCE_BYTES_PER_SEC / report.bytes_per_token
    out.print(
        f"needs {memory:.0f} MB of memory with {report.n_ctx} tokens of context; reads "
        f"{report.bytes_per_token / 1e6:.0f} MB per token, at most about {speed:.0f} tokens/s from 10 GB/s of memory",
        style="dim",
        highlight=False,
    )
    if "command_line" in report.provenance:
        out.print(f"made by {report.provenance['command_line']}", style="dim", highlight=False)


def prediction_line(expected_kld: float | None, tokens_per_sec: float | None, costs: DecodeCosts | None) -> Text:
    """What scores and decode costs predict."""
    predictions = []
    if expected_kld is not None:
        predictions.append(f"expected KLD about {expected_kld:.2g}")
    if tokens_per_sec is not None and costs is not None:
        where = "here" if costs.is_own else f"on {costs.machine}; bench --types measures this machine"
        predictions.append(f"about {tokens_per_sec:.0f} tokens/s {where}")
    return Text("; ".join(predictions), style="dim")


def score_table(scores: LayerScores, scorer: str) -> Table:
    """One row per layer, one column per scorer; the chosen one comes first, with a bar."""
    names = [scorer, *(name for name in scores.by_scorer if name != scorer)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", header_style="bold" if name == scorer else "dim")
    chosen = scores.by_scorer[scorer]
    for layer in range(scores.n_layers):
        values = [f"{scores.by_scorer[name][layer]:.4f}" for name in names]
        table.add_row(str(layer), _bar(chosen[layer], min(chosen), max(chosen)), *values)
    return table


def agreement_table(scores: LayerScores) -> Table:
    """Rank correlation of every pair of scores."""
    from scipy.stats import spearmanr

    names = list(scores.by_scorer)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for a in names:
        row = [float(spearmanr(scores.by_scorer[a], scores.by_scorer[b]).statistic) for b in names]
        table.add_row(a, *(f"{value:+.2f}" for value in row))
    return table


def bench_table(results: Sequence[Benchmark]) -> Table:
    """One row per file and number of threads."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="dim")
    table.caption_justify, table.caption_style = "left", "dim"
    table.caption = f"predicted for {results[0].predicted_for}"
    table.add_column("file")
    for name in (
        "MB",
        "threads",
        "prompt tok/s",
        "generate tok/s",
        "predicted",
        "MB/token",
        "GB/s",
        "load s",
        "resident MB",
    ):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.file.name,
            f"{r.file_bytes / 1e6:.1f}",
            str(r.n_threads),
            f"{r.prompt.mean:.1f} ± {r.prompt.deviation:.1f}",
            f"{r.generation.mean:.1f} ± {r.generation.deviation:.1f}",
            "" if r.predicted is None else f"{r.predicted:.1f}",
            f"{r.bytes_per_token / 1e6:.1f}",
            f"{r.bandwidth / 1e9:.1f} of {r.memory_bandwidth / 1e9:.1f}",
            f"{r.load_seconds:.2f}",
            f"{r.resident_bytes / 1e6:.0f}",
        )
    return table


def costs_table(costs: DecodeCosts) -> Table:
    """One row per type, the fastest to decode first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="dim")
    table.title = f"{costs.machine}: {costs.source}"
    table.add_column("type")
    for name in ("bits per weight", "ps per weight", "GB/s"):
        table.add_column(name, justify="right")
    for name, cost in sorted(costs.picoseconds.items(), key=lambda pair: pair[1]):
        bits = QUANT_TYPES[name].bits_per_weight
        table.add_row(_coloured(name), f"{bits:.4g}", f"{cost:.1f}", f"{bits / 8 / cost * 1000:.1f}")
    return table


def estimate_lines(results: Sequence[Benchmark]) -> tuple[Text, Table]:
    """Estimates for other devices: one row per device, one column per file, from its run with the most threads."""
    by_file = {r.file: r for r in sorted(results, key=lambda r: r.n_threads)}
    chosen = [by_file[file] for file in dict.fromkeys(r.file for r in results)]
    heading = Text(
        "estimated tokens/s of generation on other devices: their published bandwidth times the share of bandwidth "
        "reached here; slower cores give less",
        style="dim",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("device")
    for r in chosen:
        table.add_column(r.file.name, justify="right")
    for estimates in zip(*(r.estimates() for r in chosen), strict=True):
        cells = [f"~{e.tokens_per_sec:.0f}" if e.fits else "does not fit" for e in estimates]
        table.add_row(estimates[0].device.name, *cells)
    needs = [f"{r.needed_bytes / 1e6:.0f} MB" for r in chosen]
    table.add_row(f"memory with {chosen[0].n_ctx} tokens of context", *needs, style="dim")
    return heading, table


def evaluation_table(results: Sequence[Evaluation]) -> Table:
    """One row per file, with the reference's perplexity above."""
    first = results[0]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="dim")
    table.caption_justify, table.caption_style = "left", "dim"
    table.title = (
        f"{first.n_tokens:,} tokens in {first.n_chunks} sequences; reference perplexity "
        f"{_with_error(first.reference_perplexity, 3)}"
    )
    table.add_column("file")
    for name in ("MB", "perplexity", "mean KLD", "median", "99 %", "same top", "health"):
        table.add_column(name, justify="right")
    if first.answers is not None:
        table.add_column("right answers", justify="right")
    for r in results:
        answers = [] if r.answers is None else [_right_answers(r.answers)]
        table.add_row(
            r.file.name,
            f"{r.file.stat().st_size / 1e6:.1f}",
            _with_error(r.perplexity, 3),
            _with_error(r.kld, 4),
            f"{r.kld_median:.4f}",
            f"{r.kld_p99:.3f}",
            f"{r.same_top.value:.1%}",
            r.health.verdict,
            *answers,
        )
    aside = [] if first.reference_health is None else [f"the reference {first.reference_health.verdict}"]
    if first.reference_answers is not None:
        aside.append(f"right answers of the reference: {_right_answers(first.reference_answers)}")
    table.caption = "; ".join(aside) or None
    return table


def _right_answers(answers: Answers) -> str:
    share = answers.to_json()["accuracy"]
    error = "" if share["stderr"] is None else f" ± {share['stderr']:.1%}"
    return f"{share['value']:.1%}{error} of {len(answers.right)}"


def _with_error(estimate: Estimate, digits: int) -> str:
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def _coloured(type_name: str) -> Text:
    bits = QUANT_TYPES[type_name].bits_per_weight
    return Text(type_name, style=next(colour for limit, colour in _COLOURS if bits <= limit))


def _bar(value: float, low: float, high: float) -> Text:
    filled = round(_BAR_WIDTH * (value - low) / (high - low)) if high > low else 0
    return Text("█" * filled + "·" * (_BAR_WIDTH - filled), style="dim")
