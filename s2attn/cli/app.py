"""The commands, one import away from their work: nothing heavy is loaded before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2attn.cli.screen import clear_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Sparse attention: look at a pattern, probe a pretrained model with it, check and tune this machine."""


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A preset, a JSON file, or an expression such as [bold]local:16|stride:8[/bold].")],
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; as many as --heads when left out.")] = None,
    seqlen: Annotated[int, typer.Option(help="Context length in tokens.")] = 4096,
    layers: Annotated[int, typer.Option(help="Layers, for what the union of the layers sees.")] = 1,
    layer: Annotated[int, typer.Option(help="Layer that is drawn, for recipes and patterns that differ by layer.")] = 0,
    ranks: Annotated[int | None, typer.Option(help="Count what context parallelism on so many ranks moves, too.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the heads side by side into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a pattern is worth: density, cache, completeness, reach; and draw it."""
    with clear_errors():
        from s2attn.cli.show import Asked, show_pattern

        show_pattern(what, Asked(heads, kv_heads, seqlen, layers, layer, ranks), png=png, as_json=json)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False) -> None:
    """Versions, devices, and which backends can run here, with the reasons why the others cannot."""
    with clear_errors():
        from s2attn.cli.doctor import show_doctor

        show_doctor(as_json=json)


@app.command()
def tune(
    out: Annotated[Path | None, typer.Option(help="Folder for the table; the variable OUT, or the package's own, when left out.")] = None,
    ops: Annotated[str, typer.Option(help="Kernels, separated by commas.")] = "forward,dq,dkv,decode",
    dims: Annotated[str, typer.Option(help="Head widths, separated by commas.")] = "128,64",
    blocks: Annotated[str, typer.Option(help="Tokens per block, separated by commas.")] = "64,128,32",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    size: Annotated[str, typer.Option(help="[bold]full[/bold], or [bold]tiny[/bold] for a first look on a CPU.")] = "full",
    limit: Annotated[float, typer.Option(help="Seconds for everything together.")] = 540.0,
) -> None:
    """Measure which tiles are the fastest on this graphics card, and write the table that launches look up."""
    with clear_errors():
        from s2attn.tuning.tune_session import run_tune

        print("\n".join(run_tune(out=out, ops=ops, dims=dims, blocks=blocks, dtype=dtype, size=size, limit=limit)))


TEXT = typer.Option(help="What the model reads: text for the folder's tokenizer, or a JSON list of tokens.")
LENGTH = typer.Option(help="Tokens of each text.")
TEXTS = typer.Option(help="So many texts, one behind the other.")
LAST = typer.Option(help="Judge only the predictions of so many last tokens of each text.")
DEVICE = typer.Option(help="Where the model runs.")
MODEL = typer.Argument(help="Folder of a saved causal language model: of Transformers, or Phi-3-small.")


@app.command("compare")
def compare_model(
    model: Annotated[Path, MODEL],
    recipe: Annotated[str, typer.Argument(help="A recipe or pattern: a JSON file, a preset, or an expression.")],
    text: Annotated[Path, TEXT],
    length: Annotated[int, LENGTH] = 2048,
    texts: Annotated[int, TEXTS] = 1,
    last: Annotated[int | None, LAST] = None,
    device: Annotated[str, DEVICE] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """What would a recipe cost a model that was trained without it? Likelihood, divergence, and the attention mass that is kept."""
    with clear_errors():
        from s2attn.cli.probe import Reading, show_comparison

        show_comparison(model, recipe, Reading(text, length, texts, last, device), as_json=json)


@app.command("suggest")
def suggest_recipe(
    model: Annotated[Path, MODEL],
    text: Annotated[Path, TEXT],
    budget: Annotated[float, typer.Option(help="Nats per token that the recipe may cost.")] = 0.01,
    sink: Annotated[int, typer.Option(help="First tokens that a sparse head sees.")] = 64,
    window: Annotated[int, typer.Option(help="Last tokens that it sees.")] = 512,
    by: Annotated[str, typer.Option(help="Decide for each KV [bold]head[/bold] or [bold]layer[/bold].")] = "head",
    length: Annotated[int, LENGTH] = 2048,
    texts: Annotated[int, TEXTS] = 1,
    last: Annotated[int | None, LAST] = None,
    device: Annotated[str, DEVICE] = "cpu",
    depths: Annotated[int, typer.Option(help="Needles to hide in the text and ask for; 0 for none.")] = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the recipe.")] = None,
) -> None:
    """Which heads of a trained model can do with sinks and a window, within a measured loss?"""
    with clear_errors():
        from s2attn.cli.probe import Reading, show_suggestion

        reading = Reading(text, length, texts, last, device)
        show_suggestion(model, budget, reading, sink=sink, window=window, by=by, depths=depths, out=out)
