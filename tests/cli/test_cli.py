"""The command line: what it prints, and one clear line for what it cannot do."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import s2attn
from s2attn import cli
from s2attn.cli.app import app
from s2attn.cli.screen import Screen, console


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def error_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_show_prints_the_pattern_its_figures_and_a_drawing() -> None:
    result = run("show", "local:2|stride:4", "--heads", "8", "--kv-heads", "4", "--seqlen", "1024")
    assert result.exit_code == 0, result.output
    assert "Local(n=2, block=64) | Stride(stride=4" in result.stdout
    assert re.search(r"density\s+38\.54 % of the causal triangle", result.stdout)
    assert "KV head 3" in result.stdout and "██··██▒▒" in result.stdout


def test_show_counts_what_ranks_would_send() -> None:
    shown = run("show", "local:2|stride:4", "--seqlen", "4096", "--ranks", "4").stdout
    assert "4,096 tokens on 4 ranks" in shown and re.search(r"zigzag +1\.\d{3} +all-gather", shown)
    assert "seqlen must be a multiple of 3" in error_of("show", "s2", "--seqlen", "4096", "--ranks", "3")


@pytest.mark.parametrize(
    "name", ["s2", "phi3_small", "power_attention", "streaming_llm", "duo_attention", "longnet", "longformer", "bigbird"]
)
def test_show_takes_every_preset(name: str) -> None:
    result = run("show", name, "--seqlen", "8192", "--layers", "2")
    assert result.exit_code == 0, result.output
    assert "causal triangle" in result.stdout


def test_show_takes_files_of_patterns_and_recipes(tmp_path: Path) -> None:
    pattern, recipe = tmp_path / "pattern.json", tmp_path / "recipe.json"
    pattern.write_text(s2attn.Window(512).to_json())
    recipe.write_text(s2attn.Recipe(s2attn.Local(2), dense_layers=[0]).to_json())
    assert "Window(n=512)" in run("show", str(pattern), "--seqlen", "2048").stdout
    assert "Recipe(Local(n=2, block=64), dense_layers=[0])" in run("show", str(recipe), "--seqlen", "2048", "--layers", "2").stdout


def test_show_json_is_json_and_nothing_else() -> None:
    result = run("show", "local:2|stride:4", "--seqlen", "2048", "--json")
    found = json.loads(result.stdout)
    assert s2attn.Pattern.from_json(json.dumps(found["spec"])) == s2attn.parse_pattern("local:2|stride:4")
    assert 0 < found["report"]["density"] < 1 and found["png"] is None


def test_show_draws_a_png(tmp_path: Path) -> None:
    path = tmp_path / "s2.png"
    result = run("show", "s2", "--heads", "4", "--png", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_show_draws_heads_that_differ_of_the_layer_that_is_asked_for() -> None:
    dense, sparse = (run("show", "phi3_small", "--seqlen", "4096", "--layers", "2", "--layer", layer).stdout for layer in "10")
    assert "heads 0, 1, ... 7" in dense and "layer 1; █ all" in dense
    assert sparse.count("─ head") > 1 and "layer 0; █ all" in sparse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "s3"], "s2attn: WHAT must be a preset (s2, phi3_small, "),
        (["show", "locl:16|stride:8"], "s2attn: pattern name must be one of "),
        (["show", "local:16|"], "s2attn: pattern must have a pattern on both sides of | and &; got 'local:16|'"),
        (["show", "nothing.json"], "s2attn: WHAT must name a JSON file that exists; got 'nothing.json'"),
        (["show", "s2", "--heads", "8", "--kv-heads", "3"], "s2attn: "),
        (["show", "s2", "--seqlen", "0"], "s2attn: seqlen must be "),
        (["demo", "--steps", "0"], "s2attn: steps must be an integer >= 1; got 0"),
        (["bench", "cpu", "--lengths", "4k"], "s2attn: --lengths must be positive numbers separated by commas; got '4k'"),
        (
            ["bench", "cpu", "--peers", "s2attn,fa9"],
            "s2attn: --peers must be some of s2attn, sdpa, flex, separated by commas; got 's2attn,fa9'",
        ),
        (
            ["bench", "run", "sleep"],
            "s2attn: suites must be some of forward, backward, train, prefill, decode, inference, select, hyper; got 'sleep'",
        ),
        (["bench", "compare", "nothing.json"], "s2attn: [Errno 2] No such file or directory: 'nothing.json'"),
        (["bench", "cpu", "--out", "."], "s2attn: --out must name a file; got ."),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], message: str) -> None:
    assert error_of(*words).startswith(message)


def test_malformed_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{not json")
    assert error_of("show", str(path)).startswith("s2attn: pattern must be JSON; got ")


def test_doctor_names_versions_devices_and_backends() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "triton", "cpu", "reference", "yes"):
        assert word in result.stdout


def test_doctor_json_has_a_reason_list_for_every_backend_and_device() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["backends"]["torch"]["cpu"] == []
    assert set(found["hardware"]) == set(found["devices"])


def test_doctor_reports_a_backend_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2attn.cli import doctor

    monkeypatch.setattr(doctor, "backend_names", lambda: ["broken"])
    monkeypatch.setattr(doctor, "get_backend", lambda name: 1 / 0)
    assert "ZeroDivisionError: division by zero" in run("doctor").stdout


def test_bench_writes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    result = run("bench", "cpu", "--quick", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert "ciency" in result.stdout and "Layout of 4,096 tokens" in result.stdout
    assert json.loads(path.read_text())["suite"] == "quick"


def test_bench_run_makes_a_plan_of_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s2attn.bench import session
    from s2attn.cli import bench

    plans: list[session.Plan] = []
    monkeypatch.setattr(bench, "run_plan", lambda plan: plans.append(plan) or [])
    words = ["--size", "tiny", "--peers", "s2attn,mine", "--peer-path", "mine=a.py", "--limit", "7", "--cases", "dense", "--seed", "3"]
    result = run("bench", "run", "forward", "train", *words, "--out", str(tmp_path), "--backend", "torch", "--commit", "abc")
    assert result.exit_code == 0, result.output
    paths = {"mine": "a.py"}
    expected = session.Plan(str(tmp_path), ("forward", "train"), "tiny", ("s2attn", "mine"), paths, "torch", 7.0, 3, "dense", "abc")
    assert plans == [expected]


def test_bench_compare_and_report_read_records(tmp_path: Path) -> None:
    record = Path(s2attn.__file__).parent / "bench/records/cpu-two-cores.json"
    shown = run("bench", "compare", str(record), str(record), "--plot", str(tmp_path / "speed.png"))
    assert shown.exit_code == 0, shown.output
    assert "cpu-two-cores: cpu on AMD EPYC" in shown.stdout and (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    made = run("bench", "report", "--records", str(record.parent), "--out", str(tmp_path / "page.md"))
    assert made.exit_code == 0, made.output
    assert "## Where we lose" in (tmp_path / "page.md").read_text()


def test_the_quick_demo_goes_all_the_way(tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = run("demo", "--quick", "--out", str(out), "--seed", "1")
    assert result.exit_code == 0, result.output
    assert "none of its numbers means anything" in result.stdout
    page = (out / "report.md").read_text()
    assert "**Quick run with tiny sizes" in page
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert {"pattern.png", "losses.png", "times.png", "memory.png"} <= {path.name for path in out.iterdir()}
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["quick"] and results["settings"]["seed"] == 1
    assert results["checkpoint"]["equal_logits"] and results["generation"]["cache_error"] <= results["generation"]["cache_tolerance"]
    assert 0 < results["generation"]["cache_most_bytes"] < results["generation"]["cache_dense_bytes"]
    assert [run["name"] for run in results["runs"]] == ["dense", "s2"]
    assert {row["seqlen"] for row in results["attention"]["rows"]} == {256, 512}
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in events) == 2 * results["settings"]["train"]["steps"]


def test_a_full_disk_or_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("here already")
    assert "File exists" in error_of("demo", "--quick", "--out", str(path))


def test_progress_can_be_advanced_before_it_begins_and_ended_twice() -> None:
    screen = Screen(console())
    screen.advance("early")
    screen.begin(2, "steps")
    screen.advance("half")
    screen.end()
    screen.end()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_there_is_a_hint(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "s2attn.cli.app":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f's2attn: the command line needs {missing}; install it with: pip install "s2attn[lab]"'


def test_another_missing_module_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "s2attn.cli.app":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        cli.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from s2attn.lab.model import LanguageModel, ModelConfig
    from s2attn.lab.train import save_model

    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(LanguageModel(ModelConfig(layers=2, width=32, heads=2, kv_heads=1, hidden=32)), folder)
    return folder


def test_generate_writes_and_goes_on_from_its_cache(trained: Path, tmp_path: Path) -> None:
    words = ["generate", str(trained), "--temperature", "1.0", "--seed", "4"]
    whole = run(*words, "--prompt", "def f(x):", "--count", "40")
    assert whole.exit_code == 0, whole.output
    assert re.search(r"40 bytes in [\d.]+ s; the cache never held more than \d+ kB", whole.stderr)
    file, cache = tmp_path / "prompt.txt", str(tmp_path / "cache.pt")
    file.write_text("def f(x):")
    first = run(*words, "--file", str(file), "--count", "25", "--save", cache, "--room", "60", "--chunk", "4")
    second = run(*words, "--resume", cache, "--count", "15")
    ascii_of = lambda text: "".join(letter for letter in text if letter.isascii() and letter != "\n")  # noqa: E731
    assert len(ascii_of(whole.stdout)) > 5  # a character that is cut in two is shown as two broken ones
    assert ascii_of(first.stdout) + ascii_of(second.stdout) == ascii_of(whole.stdout)


def test_generate_takes_more_text_behind_a_cache_and_stops_where_it_shall(trained: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.pt")
    assert run("generate", str(trained), "--prompt", "one ", "--count", "3", "--save", cache, "--room", "400").exit_code == 0
    result = run("generate", str(trained), "--prompt", "two ", "--resume", cache, "--count", "300", "--temperature", "2", "--stop", "eat")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n")[-1] in "eat" and not set(result.stdout.rstrip("\n")[:-1]) & set("eat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "s2attn: --prompt must hold something, or --file or --resume be given; got nothing"),
        (["--prompt", "a", "--file", "b"], "s2attn: --prompt and --file must not be given together; got 'a' and b"),
        (["--prompt", "a", "--count", "0"], "s2attn: max_new_tokens must be an integer >= 1; got 0"),
        (["--prompt", "a", "--chunk", "0"], "s2attn: chunk must be an integer >= 1; got 0"),
        (["--prompt", "a", "--stop", "\u00e4"], "s2attn: --stop must hold characters of one byte each; got '\u00e4'"),
        (["--resume", "nothing.pt"], "s2attn: [Errno 2] No such file or directory: 'nothing.pt'"),
    ],
)
def test_what_generate_cannot_do_is_one_line(trained: Path, words: list[str], message: str) -> None:
    assert error_of("generate", str(trained), *words).startswith(message)


def test_generate_says_when_pieces_are_too_large_for_a_saved_cache(trained: Path, tmp_path: Path) -> None:
    from s2attn import Local, Recipe
    from s2attn.lab.model import LanguageModel, ModelConfig
    from s2attn.lab.train import save_model

    config = ModelConfig(layers=1, width=32, heads=2, kv_heads=1, hidden=32, recipe=Recipe(Local(2, block=16)))
    save_model(LanguageModel(config), tmp_path / "local")
    words, cache = ["generate", str(tmp_path / "local"), "--count", "2"], str(tmp_path / "cache.pt")
    assert run(*words, "--prompt", "a", "--save", cache, "--room", "400", "--chunk", "16").exit_code == 0
    said = error_of(*words, "--prompt", 200 * "b", "--resume", cache)
    assert said.startswith("s2attn: --chunk must not be larger than when the cache was made; got 512: the cache is full")
    assert run(*words, "--prompt", 200 * "b", "--resume", cache, "--chunk", "16").exit_code == 0


def test_generate_needs_a_checkpoint(tmp_path: Path) -> None:
    assert error_of("generate", str(tmp_path), "--prompt", "a").startswith("s2attn: folder must hold config.json and weights.pt; got ")
