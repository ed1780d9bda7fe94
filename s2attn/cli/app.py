"""The commands, one import away from their work: nothing heavy is loaded before a command needs it."""

from __future__ import annotations

from json import dumps
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
    ranks: Annotated[int | None, typer.Option(help="Count what context parallelism on so many ranks moves, too.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the heads side by side into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a pattern is worth: density, cache, completeness, reach; and draw it."""
    with clear_errors():
        from s2attn.cli.show import Asked, show_pattern

        show_pattern(what, Asked(heads, kv_heads, seqlen, layers, layer, ranks), png=png, as_json=json)


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
        from s2attn.cli.train import show_training

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
    room: Annotated[int, typer.Option(help="Bytes that the text of a saved cache may grow to; no more than now when left out.")] = 0,
) -> None:
    """Let a trained model write, live, through a cache that gives back the keys which no later byte can read."""
    with clear_errors():
        from s2attn.cli.generate import Source, show_generation, stop_bytes
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

        from s2attn.cli.ablate import settings_of, show_ablation, show_plan

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
        from s2attn.cli.reach import settings_of, show_plan, show_reach

        settings = settings_of(size, patterns=patterns, seeds=seeds, steps=steps)
        if plan:
            show_plan(settings)
        else:
            show_reach(settings, out, limit=limit)


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
        from s2attn.bench.tune_session import run_tune

        print("\n".join(run_tune(out=out, ops=ops, dims=dims, blocks=blocks, dtype=dtype, size=size, limit=limit)))


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
        from s2attn.cli.choosing import show_recall

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
        from s2attn.cli.choosing import run_calibrate

        run_calibrate(checkpoint, out, text=text, stride=stride, block=block, target=target, windows=windows, seqlen=seqlen)


TEXT = typer.Option(help="What the model reads: text for the folder's tokenizer, or a JSON list of tokens.")
LENGTH = typer.Option(help="Tokens of each text.")
TEXTS = typer.Option(help="So many texts, one behind the other.")
LAST = typer.Option(help="Judge only the predictions of so many last tokens of each text.")
DEVICE = typer.Option(help="Where the model runs.")
MODEL = typer.Argument(help="Folder of a saved causal language model: of Transformers, Phi-3-small, or the demo's.")


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


@bench_app.command()
def run(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="forward, backward, train, prefill, decode, inference, select, hyper; all of them when left out."),
    ] = None,
    size: Annotated[
        str, typer.Option(help="[bold]full[/bold] on a graphics card; [bold]small[/bold], for some suites, or [bold]tiny[/bold] on a CPU.")
    ] = "full",
    peers: Annotated[
        str, typer.Option(help="Who takes part in forward and backward, separated by commas; the usual ones when left out.")
    ] = "",
    peer_path: Annotated[list[str] | None, typer.Option(help="NAME=PATH: a peer from a checkout or a Python file.")] = None,
    backend: Annotated[str | None, typer.Option(help="Backend of s2attn; triton on a graphics card when left out.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds for everything together.")] = 540.0,
    cases: Annotated[str, typer.Option(help="Only cases whose name holds this text.")] = "",
    out: Annotated[str | None, typer.Option(help="Folder for the records; the variable OUT, or bench-results, when left out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    commit: Annotated[str | None, typer.Option(help="Commit for the records, where the source tree cannot tell.")] = None,
) -> None:
    """Suites for a graphics card, within a time limit: attention, training and prefill, paged decoding, inference, choosing blocks."""
    with clear_errors():
        from s2attn.bench.session import plan_of
        from s2attn.cli.bench import bench_run

        names = {
            "size": size,
            "peers": peers,
            "backend": backend,
            "limit": limit,
            "cases": cases,
            "out": out,
            "seed": seed,
            "commit": commit,
        }
        bench_run(plan_of(suites or (), peer_path=peer_path or (), **names))


@bench_app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(help="Records, as JSON files.")],
    plot: Annotated[Path | None, typer.Option(help="Draw speed-up over density, with the ideal line, into this file.")] = None,
) -> None:
    """Records as tables, beside each other."""
    with clear_errors():
        from s2attn.cli.bench import bench_compare

        bench_compare(records, plot)


@bench_app.command()
def report(
    records: Annotated[Path | None, typer.Option(help="Folder of records; those of the package when left out.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/performance.md"),
) -> None:
    """The page of all measurements, from records and nothing else: curves, where we lose, and what was never measured."""
    with clear_errors():
        from s2attn.cli.bench import bench_report

        bench_report(records, out)


@app.command()
def evidence(
    records: Annotated[Path | None, typer.Option(help="Folder of records; those of the package when left out.")] = None,
    out: Annotated[Path, typer.Option(help="The page; its pictures go into the folder evidence beside it.")] = Path("docs/evidence.md"),
) -> None:
    """The page of what models learned under which patterns, from records and nothing else: guidelines, targets, limits."""
    with clear_errors():
        from s2attn.cli.evidence import show_evidence

        show_evidence(records, out)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False) -> None:
    """Versions, devices, and which backends can run here, with the reasons why the others cannot."""
    with clear_errors():
        from s2attn.cli.doctor import show_doctor

        show_doctor(as_json=json)
