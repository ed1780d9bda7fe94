"""Our signatures against vLLM's: those of the engine that the tests run, and those of the newest release, read without installing it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from s2attn.integrations.vllm import FIRST, LAST

OURS = Path(importlib.util.find_spec("s2attn.integrations.vllm").origin).parent
ENGINE = Path(importlib.util.find_spec("vllm").origin).parent
NEWEST = Path(sys.prefix) / "newest" / "vllm"
SOURCES = {"engine": ENGINE, "newest": NEWEST}

# Our class, vLLM's class, and the files that they are in.
IMPLEMENTED = [
    ("S2Backend", "AttentionBackend", "backend.py", "v1/attention/backend.py"),
    ("S2MetadataBuilder", "AttentionMetadataBuilder", "backend.py", "v1/attention/backend.py"),
    ("S2AttentionImpl", "AttentionImpl", "backend.py", "v1/attention/backend.py"),
    ("S2CacheSpec", "AttentionSpec", "cache.py", "v1/kv_cache_interface.py"),
    ("S2CacheManager", "SingleTypeKVCacheManager", "cache.py", "v1/core/single_type_kv_cache_manager.py"),
]
OWN = {"S2AttentionImpl": {"do_kv_cache_update", "warmup"}, "S2CacheSpec": {"lifetimes", "most_held"}}
"""Public methods that the base class does not name: ours, and one that vLLM looks for by name."""


def classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


def methods(known: dict[str, ast.ClassDef], name: str) -> dict[str, ast.FunctionDef]:
    """Methods of a class and of its bases in the same file."""
    node = known[name]
    found: dict[str, ast.FunctionDef] = {}
    for base in node.bases:
        called = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(called, ast.Name) and called.id in known:
            found |= methods(known, called.id)
    return found | {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def arguments(node: ast.FunctionDef) -> tuple[list[str], int, list[str], bool]:
    """Names of positional arguments, how many of them are required, names by keyword only, whether it takes any other."""
    positional = [argument.arg for argument in node.args.posonlyargs + node.args.args]
    return positional, len(positional) - len(node.args.defaults), [x.arg for x in node.args.kwonlyargs], node.args.kwarg is not None


def kind(node: ast.FunctionDef) -> set[str]:
    names = {x.id for x in node.decorator_list if isinstance(x, ast.Name)}
    return names & {"classmethod", "staticmethod", "property"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("ours", "theirs", "file", "path"), IMPLEMENTED, ids=[row[0] for row in IMPLEMENTED])
def test_methods_take_what_vllm_passes(ours: str, theirs: str, file: str, path: str, source: str) -> None:
    mine = {item.name: item for item in classes(OURS / file)[ours].body if isinstance(item, ast.FunctionDef)}
    base = methods(classes(SOURCES[source] / path), theirs)
    public = {name for name in mine if not name.startswith("_")}
    assert public - set(base) == OWN.get(ours, set())
    for name in (public & set(base)) | ({"__init__"} & set(mine)):
        names, required, by_keyword, rest = arguments(mine[name])
        expected, least, keywords, _ = arguments(base[name])
        assert kind(mine[name]) == kind(base[name]), name
        if rest and ours == "S2CacheManager":
            assert names == expected[: len(names)], name
            continue
        assert names[: len(expected)] == expected, name
        assert required <= max(least, len(expected)), name
        assert set(keywords) <= set(by_keyword), name


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_abstract_is_left(source: str) -> None:
    for ours, theirs, file, path in IMPLEMENTED:
        mine = {item.name for item in classes(OURS / file)[ours].body if isinstance(item, ast.FunctionDef)}
        base = methods(classes(SOURCES[source] / path), theirs)
        abstract = {name for name, node in base.items() if any(ast.unparse(x).endswith("abstractmethod") for x in node.decorator_list)}
        assert abstract <= mine, ours


@pytest.mark.parametrize("source", SOURCES)
def test_the_cache_update_is_called_as_we_take_it(source: str) -> None:
    """`do_kv_cache_update` stands in no base class: what vLLM's own backends take is the interface."""
    theirs = methods(classes(SOURCES[source] / "v1/attention/backends/flash_attn.py"), "FlashAttentionImpl")["do_kv_cache_update"]
    mine = methods(classes(OURS / "backend.py"), "S2AttentionImpl")["do_kv_cache_update"]
    assert arguments(mine) == arguments(theirs)


@pytest.mark.parametrize("source", SOURCES)
def test_what_we_read_is_there(source: str) -> None:
    """Fields and functions that we take from vLLM."""
    root = SOURCES[source]
    metadata = classes(root / "v1/attention/backend.py")["CommonAttentionMetadata"]
    fields = {item.target.id for item in metadata.body if isinstance(item, ast.AnnAssign)}
    assert {"query_start_loc", "seq_lens", "num_actual_tokens", "block_table_tensor", "causal"} <= fields
    manager = methods(classes(root / "v1/core/single_type_kv_cache_manager.py"), "SingleTypeKVCacheManager")
    assert "max_admission_blocks_per_request" in arguments(manager["__init__"])[0]
    pool = methods(classes(root / "v1/core/block_pool.py"), "BlockPool")
    assert arguments(pool["get_cached_block"])[0] == ["self", "block_hash", "kv_cache_group_ids"]
    assert arguments(pool["free_blocks"])[0] == ["self", "ordered_blocks"]
    registry = methods(classes(root / "v1/kv_cache_spec_registry.py"), "KVCacheSpecRegistry")
    assert {"_ensure_registered", "register"} <= set(registry)
    layer = (root / "model_executor/layers/attention/attention.py").read_text()
    assert "self.impl.process_weights_after_loading(act_dtype)" in layer
    assert "self.attn_backend" in ast.unparse(
        methods(classes(root / "model_executor/layers/attention/attention.py"), "Attention")["get_attn_backend"]
    )


def defined(path: Path) -> set[str]:
    """Names at the top of a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {x.id for x in targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("source", SOURCES)
def test_what_we_import_is_there(source: str) -> None:
    missing = []
    for file in sorted(OURS.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                place = SOURCES[source].joinpath(*node.module.split(".")[1:])
                path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                known = defined(path)
                missing += [f"{file.name}: {node.module}.{alias.name}" for alias in node.names if alias.name not in known]
    assert missing == []


def test_these_are_the_versions_that_are_accepted() -> None:
    def version(root: Path) -> tuple[int, ...]:
        text = (root / "_version.py").read_text()
        assigned = next(
            node.value
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == "__version__" for x in node.targets)
        )
        return tuple(int(part) for part in ast.literal_eval(assigned).split(".")[:2])

    assert (version(ENGINE), version(NEWEST)) == (FIRST, LAST)
