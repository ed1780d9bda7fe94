"""The commands, one import away from their work: nothing heavy is loaded before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2attn.cli.screen import clear_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Time attention against its peers, behind a correctness check.")
app.add_typer(bench_app, name="bench")


@app.callback()
def root() -> None:
    """Sparse attention: look at a pattern, watch a model learn with it, time it."""


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A preset, a JSON file, or an expression such as [bold]local:16|stride:8[/bold].")],
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; as many as --heads when left out.")] = None,
    seqlen: Annotated[int, typer.Option(help="Context length in tokens.")] = 4096,
    layers: Annotated[int, typer.Option(help="Layers, for what the union of the layers sees.")] = 1,
    layer: Annotated[int, typer.Option(help="Layer that is drawn, for recipes and patterns that differ by layer.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Draw the heads side by side into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a pattern is worth: density, cache, completeness, reach; and draw it."""
    with clear_errors():
        from s2attn.cli.show import Asked, show_pattern

        show_pattern(what, Asked(heads, kv_heads, seqlen, layers, layer), png=png, as_json=json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an earlier report in it is replaced.")] = Path("demo-report"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, a few seconds: shows that all works, measures nothing.")] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps of each model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches, text and timings.")] = 0,
    flex: Annotated[bool, typer.Option("--flex/--no-flex", help="Time a compiled FlexAttention too.")] = True,
) -> None:
    """Train a dense and an S2 model on real text, write with it, time attention, and leave a report: about five minutes."""
    with clear_errors():
        from s2attn.cli.demo import show_demo

        show_demo(out, quick=quick, steps=steps, seed=seed, flex=flex)


@bench_app.command()
def cpu(
    out: Annotated[Path, typer.Option(help="JSON file for the record.")] = Path("bench-cpu.json"),
    lengths: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "4096,8192,16384",
    peers: Annotated[str, typer.Option(help="Who takes part, separated by commas.")] = "s2attn,sdpa,flex",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes and no FlexAttention, a few seconds: measures nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
) -> None:
    """s2attn on this CPU against torch's dense attention and a compiled FlexAttention."""
    with clear_errors():
        from s2attn.cli.bench import bench_cpu

        bench_cpu(out, lengths=lengths, peers=peers, quick=quick, seed=seed)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False) -> None:
    """Versions, devices, and which backends can run here, with the reasons why the others cannot."""
    with clear_errors():
        from s2attn.cli.doctor import show_doctor

        show_doctor(as_json=json)
