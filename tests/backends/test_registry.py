"""Names, the order of choice, and refusals that carry every reason."""

from __future__ import annotations

import pytest
import torch

from s2attn.backends import backend_names, get_backend, pick, registry
from s2attn.core import Unsupported


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that are here whatever is installed."""
    monkeypatch.setattr(registry, "_LOADERS", {name: registry._LOADERS[name] for name in ("torch", "reference")})


def x(dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(1, 4, 2, 16, dtype=dtype, device=device)


def test_names_are_those_of_the_backends() -> None:
    assert {"torch", "reference"} <= set(backend_names())
    assert backend_names().index("torch") < backend_names().index("reference")
    assert all(get_backend(name).name == name for name in backend_names())


def test_auto_takes_the_first_without_objections() -> None:
    first = next(name for name in backend_names() if not get_backend(name).objections(x(), x(), x()))
    assert pick("auto", x(), x(), x()).name == first


def test_an_explicit_choice_is_kept() -> None:
    assert pick("reference", x(), x(), x()).name == "reference"
    assert pick("torch", x(), x(), x()).name == "torch"


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*'torch'.*; got 'fast'"):
        pick("fast", x(), x(), x())
    with pytest.raises(TypeError, match=r"backend must be one of .*; got int"):
        pick(*[3, x(), x(), x()])


@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        (x(torch.int64), x(torch.int64), x(torch.int64), "q has dtype torch.int64"),
        (x(torch.complex64), x(torch.complex64), x(torch.complex64), "complex64"),
        (x(torch.float8_e4m3fn), x(torch.float8_e4m3fn), x(torch.float8_e4m3fn), "float8"),
        (x(device="meta"), x(device="meta"), x(device="meta"), "meta device"),
        (x(), x(device="meta"), x(), "several devices: cpu, meta, cpu"),
        (x(), x(torch.float64), x(), "differ in dtype: torch.float32, torch.float64, torch.float32"),
        (x().to_sparse(), x(), x(), "q is torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("name", ["torch", "reference", "auto"])
@pytest.mark.usefixtures("two_backends")
def test_refusals_name_every_backend_and_every_reason(q, k, v, reason: str, name: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        pick(name, q, k, v)
    assert list(refusal.value.reasons) == ["torch", "reference"]
    assert all(any(reason in why for why in reasons) for reasons in refusal.value.reasons.values())
    assert reason in str(refusal.value)


@pytest.mark.usefixtures("two_backends")
def test_a_refusal_says_who_could_have_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_backend("torch")), "objections", lambda self, q, k, v: ["it rains"])
    assert pick("auto", x(), x(), x()).name != "torch"
    with pytest.raises(Unsupported, match="torch: it rains\n  reference: could serve this call"):
        pick("torch", x(), x(), x())
