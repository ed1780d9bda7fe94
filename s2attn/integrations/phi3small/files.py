"""The files of a published checkpoint: ``config.json``, and weights as safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2attn.core import bad_value, requires

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Checkpoints of short texts carry the angles of each layer beside the weights; they follow from the configuration.
ANGLES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
MOST_NAMED = 4


def read_config(folder: str | Path) -> dict[str, Any]:
    """The object in ``config.json``."""
    path = Path(folder) / "config.json"
    found = _read_json(path)
    if not isinstance(found, dict):
        raise bad_value(str(path), "must hold a JSON object", type(found).__name__)
    return found


def load_weights(
    folder: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    angles: Tensor,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The weights that a model asks for by name and shape, all of them and no others.

    An ``lm_head.weight`` must be the embeddings, and stored angles must be ``angles``; both are then dropped.

    Raises:
        ValueError: names and shapes that differ, found before any weight is read.
    """
    files = _open(Path(folder))
    _check_names(shapes, {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}, angles)
    weights: dict[str, Tensor] = {}
    for name in shapes:
        weight = files[name].get_tensor(name)
        if not weight.is_floating_point():
            raise bad_value(name, "must be stored as floating-point numbers", weight.dtype)
        dtype = dtype or weight.dtype
        weights[name] = weight.to(device=device, dtype=dtype)
    for name in files.keys() - shapes.keys():
        _check_extra(name, files[name].get_tensor(name), weights[EMBEDDINGS], angles)
    return weights


def _open(folder: Path) -> dict[str, Any]:
    """An open file for each name of a weight."""
    with requires("weights cannot be read", "safetensors", "phi3small"):
        from safetensors import SafetensorError, safe_open
    index = folder / INDEX
    where = _read_index(index) if index.is_file() else None
    names = [ONE] if where is None else sorted(set(where.values()))
    files: dict[str, Any] = {}
    for file in names:
        path = folder / file
        if not path.is_file():
            raise bad_value("folder", f"must hold {file}", str(folder))
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise bad_value(str(path), "must be a safetensors file", str(error)) from error
        for name in opened.keys():  # noqa: SIM118  a safetensors file is no mapping
            if name in files or (where is not None and where.get(name) != file):
                said = "in the one file that the index names for it" if where is not None else "once"
                raise bad_value(f"{name} in {file}", f"must be {said}", where.get(name) if where else "a second one")
            files[name] = opened
    lost = sorted((where or {}).keys() - files.keys())
    if lost:
        raise bad_value(str(index), "must name weights that its files hold", _some(lost))
    return files


def _read_index(path: Path) -> dict[str, str]:
    found = _read_json(path)
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
        raise bad_value(str(path), "must have a weight_map from names to files beside it", repr(where)[:80])
    return where


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise bad_value("folder", f"must hold {path.name}", str(path.parent))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_value(str(path), "must be JSON", str(error)) from error


def _check_names(wanted: Mapping[str, tuple[int, ...]], came: Mapping[str, tuple[int, ...]], angles: Tensor) -> None:
    extras = {HEAD: wanted[EMBEDDINGS], **{name: tuple(angles.shape) for name in came if ANGLES.fullmatch(name)}}
    known = {**wanted, **extras}
    missing, unknown = sorted(wanted.keys() - came.keys()), sorted(came.keys() - known.keys())
    shapes = [f"{name} has {came[name]} for {known[name]}" for name in sorted(known.keys() & came.keys()) if came[name] != known[name]]
    wrong = {"missing": missing, "not of this model": unknown, "of another shape": shapes}
    if any(wrong.values()):
        raise bad_value(
            "weights", "must be those of the configuration", "; ".join(f"{why}: {_some(what)}" for why, what in wrong.items() if what)
        )


def _check_extra(name: str, weight: Tensor, embeddings: Tensor, angles: Tensor) -> None:
    if name == HEAD and not torch.equal(weight.to(embeddings), embeddings):
        raise bad_value(HEAD, f"must equal {EMBEDDINGS}, which this model reads its output with", "other numbers")
    # The tolerance is that of a file in bfloat16.
    if name != HEAD and not torch.allclose(weight.float().cpu(), angles, rtol=2**-7, atol=0.0):
        raise bad_value(name, "must hold the angles that the configuration gives", "other numbers")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
