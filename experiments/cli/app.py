"""The commands ``python -m experiments``, one import away from their work."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from s2attn.cli.screen import clear_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Train small models with sparse attention, compare recipes, and make the page of evidence."""


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
        from experiments.cli.demo import show_demo

        show_demo(out, quick=quick, steps=steps, seed=seed, flex=flex)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file; the defaults, on Python's own sources, when left out.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for metrics and checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint there, if there is one.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A value in place of the file's, such as train.steps=20.")] = None,
) -> None:
    """Train a small language model on a folder of text: any recipe, packed documents, exact resume; under torchrun with FSDP2."""
    with clear_errors():
        from experiments.cli.train import show_training

        changes = list(set_ or ())
        changes += [] if out is None else [f"run.out={dumps(out)}"]
        changes += ["train.compile=true"] if compile else []
        show_training(config, changes, resume=resume)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and weights.pt, such as demo-report/checkpoint.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    file: Annotated[Path | None, typer.Option(help="The text to continue is in this file.")] = None,
    count: Annotated[int, typer.Option(help="Bytes (or tokens) to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest byte.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest likely bytes that have this probability together.")] = None,
    stop: Annotated[str, typer.Option(help="End behind any of these characters, of one byte each.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    chunk: Annotated[int, typer.Option(help="Bytes of the prompt that are read at a time.")] = 512,
    save: Annotated[Path | None, typer.Option(help="Keep the cache in this file.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from a cache that --save wrote; a prompt comes behind its text.")] = None,
    room: Annotated[int, typer.Option(help="Bytes that the text of a saved cache may grow to; this text at least.")] = 0,
) -> None:
    """Let a trained model write, live, through a cache that gives back the keys which no later byte can read."""
    with clear_errors():
        from experiments.cli.generate import Source, show_generation, stop_bytes
        from s2attn.nn.sampling import Sampling

        sampling = Sampling(count, stop_bytes(stop), temperature, top_k, top_p, seed)
        show_generation(checkpoint, Source(prompt, file, resume), sampling, chunk=chunk, save=save, room=room)


@app.command()
def ablate(
    out: Annotated[Path, typer.Option(help="Folder for runs and report; finished runs in it are kept.")] = Path("ablation"),
    size: Annotated[
        str, typer.Option(help="[bold]small[/bold] for two cores (hours), [bold]large[/bold] for a GPU, or [bold]tiny[/bold] (seconds).")
    ] = "small",
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas; all of them when left out.")] = "",
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas; those of the size when left out, none when empty.")] = None,
    seeds: Annotated[int | None, typer.Option(help="So many seeds, from 0 on.")] = None,
    budget: Annotated[float | None, typer.Option(help="Listed pairs of each recipe over those of a dense model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps on text; 0 leaves the text out.")] = None,
    task_steps: Annotated[int | None, typer.Option(help="Training steps on the tasks.")] = None,
    stretch: Annotated[str | None, typer.Option(help="Rotary scaling above the trained length: interpolation or ntk.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds; a run that is then under way goes on with the next call.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; that of the size when left out.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16, in training; that of the size when left out.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the recipes with their pairs, and run nothing.")] = False,
) -> None:
    """Compare recipes at equal tokens and equal listed pairs, over several seeds: loss, long-context tasks, speed, memory."""
    with clear_errors():
        from dataclasses import replace

        from experiments.cli.ablate import settings_of, show_ablation, show_plan

        settings = settings_of(size, recipes=recipes, tasks=tasks, seeds=seeds, budget=budget, stretch=stretch)
        settings = replace(settings.with_steps(steps, task_steps), device=device or settings.device)
        if precision is not None:
            settings = settings.with_precision(precision)
        if plan:
            show_plan(settings)
        else:
            show_ablation(settings, out, limit=limit)


@app.command()
def reach(
    out: Annotated[Path, typer.Option(help="Folder for runs and report; finished runs in it are kept.")] = Path("reach"),
    size: Annotated[str, typer.Option(help="[bold]small[/bold] for one core (half an hour), or [bold]tiny[/bold] (seconds).")] = "small",
    patterns: Annotated[str, typer.Option(help="Patterns, separated by commas; all of them when left out.")] = "",
    seeds: Annotated[int | None, typer.Option(help="So many seeds, from 0 on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each model.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds: begin no run that would not end in time.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run, and run nothing.")] = False,
) -> None:
    """Train tiny models to recall one digit, and see whether they learn it exactly where their pattern reaches through their layers."""
    with clear_errors():
        from experiments.cli.reach import settings_of, show_plan, show_reach

        settings = settings_of(size, patterns=patterns, seeds=seeds, steps=steps)
        if plan:
            show_plan(settings)
        else:
            show_reach(settings, out, limit=limit)


@app.command()
def recall(
    checkpoint: Annotated[Path | None, typer.Option(help="Judge on q and k of this model (a folder that the demo wrote).")] = None,
    text: Annotated[Path | None, typer.Option(help="What that model reads; the demo's validation files when left out.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    block: Annotated[int, typer.Option(help="Tokens per block of the choice.")] = 64,
    thresholds: Annotated[str, typer.Option(help="Shares of the estimated mass, separated by commas.")] = "0.5,0.8,0.9,0.95",
    png: Annotated[Path | None, typer.Option(help="Draw mass kept over density into this file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of planted structures.")] = 0,
) -> None:
    """Do selectors find what matters? The attention mass that each keeps, beside the most that as many blocks could keep."""
    with clear_errors():
        from experiments.cli.choosing import show_recall

        show_recall(checkpoint, text=text, seqlen=seqlen, block=block, thresholds=thresholds, png=png, seed=seed)


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A model that the demo wrote: a folder with config.json and weights.pt.")],
    out: Annotated[Path, typer.Option(help="JSON file for the table.")] = Path("thresholds.json"),
    text: Annotated[Path | None, typer.Option(help="What the model reads; the demo's validation files when left out.")] = None,
    stride: Annotated[int, typer.Option(help="Stride of XAttention.")] = 16,
    block: Annotated[int, typer.Option(help="Tokens per block of the choice.")] = 64,
    target: Annotated[float, typer.Option(help="Share of the true attention mass that each row shall keep.")] = 0.9,
    windows: Annotated[int, typer.Option(help="Pieces of text; the last one is kept back to judge the table.")] = 4,
    seqlen: Annotated[int, typer.Option(help="Bytes of each piece.")] = 2048,
) -> None:
    """Fit XAttention's threshold to every head of a model, and say what the table keeps of text that it has not seen."""
    with clear_errors():
        from experiments.cli.choosing import run_calibrate

        run_calibrate(checkpoint, out, text=text, stride=stride, block=block, target=target, windows=windows, seqlen=seqlen)


@app.command()
def evidence(
    records: Annotated[Path | None, typer.Option(help="Folder of records; those of the checkout when left out.")] = None,
    out: Annotated[Path, typer.Option(help="The page; its pictures go into the folder evidence beside it.")] = Path("docs/evidence.md"),
) -> None:
    """The page of what models learned under which patterns, from records and nothing else: guidelines, targets, limits."""
    with clear_errors():
        from experiments.cli.evidence import show_evidence

        show_evidence(records, out)
