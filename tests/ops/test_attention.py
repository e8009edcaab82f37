"""Attention beside its capture: every backend against the reference in float64, sdpa against all, laws, and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from carve_kernels import BackendUnavailable, attention, backends, capture
from carve_kernels.backends import cuda
from carve_kernels.ops.attention_operator import attention_operator
from carve_kernels.types import Attended, CaptureOptions
from tests.emulator import emulator
from tests.support.attended import (
    BACKENDS,
    CUDA,
    FALLBACK,
    check_attended,
    entered,
    outputs,
    planted_value,
    problem,
    served,
)
from tests.support.attention import Case, planted, poisoned

BASE = Case(rows=1, dtype=torch.bfloat16)
CASES: dict[str, tuple[Case, int]] = {
    "plain": (BASE.but(view="all"), 64),
    "mask, padding": (BASE, 64),
    "head mask": (BASE.but(view="head mask"), 64),
    "positions": (BASE.but(view="positions"), 64),
    "window": (BASE.but(view="positions", window=23), 64),
    "softcap": (BASE.but(softcap=2.5), 64),
    "sink": (BASE.but(sink=True), 64),
    "sink, softcap, window": (BASE.but(sink=True, softcap=4.0, view="positions", window=31), 64),
    "a smaller value": (BASE.but(view="positions"), 40),
    "a larger value": (BASE.but(size=32), 96),
    "a value of eight": (BASE.but(size=8), 8),
    "many heads": (BASE.but(query_heads=28, key_heads=4, size=128, keys=203, tokens=51), 128),
    "no groups": (BASE.but(query_heads=3, key_heads=3, size=40), 40),
    "longer than a block": (BASE.but(batch=1, keys=2300, tokens=700, query_heads=2, key_heads=1, size=32), 32),
    "several rows": (BASE.but(rows=5, view="positions"), 64),
    "several rows, head mask": (BASE.but(rows=3, view="head mask"), 64),
    "more rows than go into one call": (BASE.but(rows=300, keys=40, query_heads=2, view="positions"), 32),
    "one key": (BASE.but(keys=1, tokens=1, view="all", ragged=False), 64),
    "no tokens": (BASE.but(tokens=0, ragged=False), 64),
    "no keys": (BASE.but(keys=0, view="all", ragged=False), 64),
    "no batch": (BASE.but(batch=0, view="all", ragged=False), 64),
    "no rows": (BASE.but(rows=0, view="all", ragged=False), 64),
}


@pytest.fixture(params=BACKENDS)
def chosen(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def backend(chosen: str) -> Iterator[str]:
    with entered(chosen) as backend:
        yield backend


def check(backend: str, case: Case, value_size: int, heads: str = "mean") -> None:
    arguments, options = problem(case, value_size)
    given_outputs = outputs(case, arguments, heads)
    found = attention(*arguments, **options, heads=heads, **given_outputs, backend=backend)  # type: ignore[arg-type]
    assert isinstance(found, Attended) and found.output is given_outputs["output"]
    assert all(part is target for part, target in zip(found.capture, given_outputs["out"], strict=True))
    check_attended(found, case, arguments, options, heads)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_maps_are_right(chosen: str, backend: str, name: str, dtype: torch.dtype, heads: str) -> None:
    case, value_size = CASES[name]
    if chosen.startswith(CUDA) and (dtype == torch.float32 or case.rows != 1):
        pytest.skip("the CUDA kernels take one row of halves")
    check(backend, case.but(dtype=dtype), value_size, heads)


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        query_heads=st.sampled_from([2, 4, 6]),
        key_heads=st.sampled_from([1, 2]),
        rows=st.integers(1, 4),
        keys=st.integers(1, 150),
        size=st.sampled_from([8, 32, 40, 64, 72, 80, 96, 128, 192, 256]),
        tokens=st.integers(0, 40),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        view=st.sampled_from(["mask", "head mask", "positions", "all"]),
        softcap=st.sampled_from([None, 3.0]),
        window=st.sampled_from([None, 1, 17]),
        sink=st.booleans(),
        gain=st.sampled_from([0.0, 3.0]),
        seed=st.integers(0, 1000),
    ),
    value_size=st.sampled_from([8, 24, 64, 128, 256]),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape_and_mask(name: str, case: Case, value_size: int) -> None:
    with entered(name) as backend:
        check(backend, served(case, name), value_size)


def test_the_output_is_that_of_sdpa_and_the_map_that_of_capture(chosen: str, backend: str) -> None:
    case = served(Case(rows=1, view="all", dtype=torch.float16), chosen)
    (query, key, value, tokens), options = problem(case, 64)
    output, captured = attention(query, key, value, tokens, **options, backend=backend)
    expected = scaled_dot_product_attention(query, key, value, scale=options["scale"], enable_gqa=True)
    assert torch.allclose(output, expected, rtol=2e-3, atol=2e-3) and float(expected.abs().amax()) > 0.2
    alone = capture(query, key, tokens, **options, backend="reference")
    for part, right in zip(captured, alone, strict=True):
        assert torch.allclose(part, right, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("view", ["mask", "positions"])
def test_a_row_that_sees_nothing_gives_zeros(chosen: str, backend: str, view: str) -> None:
    case = BASE.but(view=view)
    (query, key, _, tokens), options = problem(case, 40)
    if view == "mask":
        options["mask"][0] = False
    else:
        options["positions"][0] = -1
    value = planted_value(case, 40, options)
    found = attention(
        query, key, value, tokens, **options, **outputs(case, (query, key, value, tokens)), backend=backend
    )
    assert not found.output[0].any() and not any(part[0].any() for part in found.capture)
    assert bool(found.output[1].any()) and float(found.capture.mass[1]) > 0


def test_huge_logits_pick_one_value(backend: str) -> None:
    case = BASE.but(view="all", dtype=torch.float16)
    arguments, options = problem(case, 64)
    query, key, value, _ = arguments
    found = attention(*arguments, **{**options, "scale": 1e3}, backend=backend)
    logits = query.double() @ key.double().repeat_interleave(3, 1).mT
    picked = value.repeat_interleave(3, 1).gather(2, logits.argmax(-1)[..., None].expand(-1, -1, -1, 64))
    best = logits.topk(2, -1).values
    is_clear = (best[..., 0] - best[..., 1]) > 0.05
    assert bool(is_clear.any()) and torch.allclose(found.output[is_clear], picked[is_clear], rtol=2e-3, atol=2e-3)


def test_strides_of_every_tensor_may_be_any_that_fit(backend: str) -> None:
    case = BASE.but(view="positions")
    (query, key, value, tokens), options = problem(case, 64)
    plain = attention(query, key, value, tokens, **options, backend=backend)
    heads_last = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    found = attention(*heads_last, tokens.to(torch.int64), **options, backend=backend)
    assert torch.equal(found.output, plain.output)
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(found.capture, plain.capture, strict=True))


def test_the_reference_is_the_textbook() -> None:
    (query, key, tokens), options = planted(Case(rows=2, batch=1, view="positions", window=20))
    value = torch.randn(1, 2, 77, 24, dtype=torch.float64)
    query, key = query.double(), key.double()
    logits = query @ key.repeat_interleave(3, 1).mT * options["scale"]
    last = options["positions"][:, None, :, None]
    visible = (torch.arange(77) <= last) & (torch.arange(77) > last - 20)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    found = attention(query, key, value, tokens, **options, backend="reference")
    assert found.output.dtype == torch.float64
    assert torch.allclose(found.output, weights @ value.repeat_interleave(3, 1), rtol=1e-12, atol=1e-14)
    sink = torch.randn(6, dtype=torch.float64)
    weighted = torch.cat([logits, sink.view(1, 6, 1, 1).expand(-1, -1, 2, 1)], -1).softmax(-1)[..., :-1]
    found = attention(query, key, value, tokens, scale=options["scale"], sink=sink, backend="reference")
    assert torch.allclose(found.output, weighted @ value.repeat_interleave(3, 1), rtol=1e-12, atol=1e-14)


def test_a_gradient_goes_through_the_output() -> None:
    (query, key, value, tokens), options = problem(Case(rows=1, view="all"), 32)
    value.requires_grad_()
    attention(query, key, value, tokens, **options).output.sum().backward()
    assert value.grad is not None and bool(value.grad.any())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_go_through_output_and_map(softcap: float | None, backend: str) -> None:
    random = torch.Generator().manual_seed(2)
    tensors = [torch.randn(2, heads, count, 8, generator=random, dtype=torch.float64).requires_grad_()
               for heads, count in ((4, 2), (2, 9), (2, 9))]  # fmt: skip
    query, key, value = tensors
    sink = torch.randn(4, generator=random, dtype=torch.float64).requires_grad_()
    tokens = torch.tensor([[1, 4, 6], [0, 2, -1]])
    logits = 0.3 * query @ key.repeat_interleave(2, 1).mT
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    shares = torch.cat([logits, sink.view(1, -1, 1, 1).expand(2, -1, 2, 1)], -1).softmax(-1)[..., :-1]
    picked = shares.mean(1).gather(-1, tokens.clamp(min=0)[:, None].expand(-1, 2, -1)) * (tokens >= 0)[:, None]
    output = shares @ value.repeat_interleave(2, 1)
    found = attention(query, key, value, tokens, scale=0.3, softcap=softcap, sink=sink, backend=backend)
    losses = ((each.square().sum() + 3 * maps.square().sum()) for each, maps in (
        (output, picked), (found.output, found.capture.maps)))  # fmt: skip
    expected, given = (torch.autograd.grad(loss, [*tensors, sink]) for loss in losses)
    for one, other in zip(given, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "value no tensor": (TypeError, "value: expected a tensor", {"value": None}),
    "value dtype": (TypeError, "value: expected dtype", {"value": torch.zeros(2, 2, 77, 64, dtype=torch.float16)}),
    "value keys": (ValueError, r"value: expected shape \[2, 2, 77, E\]", {"value": torch.zeros(2, 2, 76, 64)}),
    "value heads": (ValueError, "value: expected shape", {"value": torch.zeros(2, 6, 77, 64)}),
    "value elsewhere": (
        ValueError,
        "value: expected a tensor on cpu as the query, got one on meta",
        {"value": torch.zeros(2, 2, 77, 64, device="meta")},
    ),
    "output shape": (ValueError, "output: expected shape", {"output": torch.zeros(2, 6, 1, 63)}),
    "output dtype": (TypeError, "output: expected dtype", {"output": torch.zeros(2, 6, 1, 64).half()}),
    "output elsewhere": (
        ValueError,
        "output: expected a tensor on cpu as the query, got one on meta",
        {"output": torch.zeros(2, 6, 1, 64, device="meta")},
    ),
    "query": (ValueError, r"query: expected shape \[B, A, R, D\]", {"query": torch.zeros(2, 6, 64)}),
    "mask float": (TypeError, "mask: expected dtype torch.bool", {"mask": torch.zeros(2, 1, 1, 77)}),
    "window": (ValueError, "window: expected positions", {"window": 4}),
    "sink": (ValueError, "sink: expected shape", {"sink": torch.zeros(5)}),
    "scale": (TypeError, "scale: expected a number", {"scale": None}),
    "heads": (ValueError, "heads: expected one of", {"heads": "max"}),
    "out": (ValueError, r"out\.maps: expected shape", {"out": poisoned(Case(rows=2))}),
    "backend": (ValueError, "backend: expected one of", {"backend": "gpu"}),
    "nan": (ValueError, "query: expected finite values", {"query": torch.full((2, 6, 1, 64), torch.nan)}),
    "tokens": (ValueError, "tokens: expected columns from 0 to 76", {"tokens": torch.full((2, 3), 77)}),
    "no cpu kernel": (BackendUnavailable, "cpu cannot serve attention: no kernel", {"backend": "cpu"}),
    "no Triton kernel": (BackendUnavailable, "triton cannot serve attention: no kernel", {"backend": "triton"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    error, message, changes = BAD[name]
    (query, key, value, tokens), options = problem(Case(rows=1, view="all"), 64)
    given_arguments = {"query": query, "key": key, "value": value, "tokens": tokens, **options, **changes}
    with pytest.raises(error, match=message):
        attention(**given_arguments)


def halves(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "query": torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16),
        "key": torch.zeros(1, 2, 9, 64, dtype=torch.bfloat16),
        "value": torch.zeros(1, 2, 9, 40, dtype=torch.bfloat16),
    }
    return {**tensors, **changes}


WIDE = torch.zeros(1, 2, 9, 80, dtype=torch.bfloat16)
UNSERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "a prefill": ("query has other than one row", halves(query=torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16))),
    "float32": ("query is torch.float32", {name: tensor.float() for name, tensor in halves().items()}),
    "a head size": ("query has heads of 60 elements", halves(query=torch.zeros(1, 4, 1, 60).bfloat16())),
    "a large head": ("value has heads of 264 elements", halves(value=torch.zeros(1, 2, 9, 264).bfloat16())),
    "a gradient of the value": ("value requires a gradient", halves(value=halves()["value"].requires_grad_())),
    "a gradient": ("query or key requires a gradient", halves(query=halves()["query"].requires_grad_())),
    "strided keys": ("key has stride 9 in its last", halves(key=torch.zeros(1, 2, 64, 9).bfloat16().mT)),
    "strided values": ("value has stride 9 in its last", halves(value=torch.zeros(1, 2, 40, 9).bfloat16().mT)),
    "keys that start anywhere": ("key has rows that do not start", halves(key=WIDE[..., 3:67])),
    "keys of odd strides": ("key has rows that", halves(key=torch.zeros(1, 2, 9, 70).bfloat16()[..., :64])),
    "values that start anywhere": ("value has rows that do not start", halves(value=WIDE[..., 1:41])),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_what_the_cuda_kernels_do_not_serve_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, tensors = UNSERVED[name]
    monkeypatch.setattr(cuda, "devices", lambda: ("cpu",))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    tokens = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(BackendUnavailable, match=f"cuda cannot serve attention: {reason}"):
        backends.resolve("attention", "cuda", tokens.device, *tensors.values(), tokens, CaptureOptions(0.1))
    served_tensors = halves().values()
    assert (
        backends.resolve("attention", "cuda", tokens.device, *served_tensors, tokens, CaptureOptions(0.1)) is not None
    )


def test_outputs_that_cannot_be_written_are_refused_or_left_to_sdpa() -> None:
    arguments, options = problem(served(BASE, CUDA), 64)
    query = arguments[0]
    batch, heads = query.shape[:2]
    expanded = torch.empty(batch, 1, 1, 64, dtype=query.dtype).expand(batch, heads, 1, 64)
    with pytest.raises(ValueError, match="output: expected memory of its own for each element"):
        attention(*arguments, **options, output=expanded)
    with pytest.raises(TypeError, match="out: expected a Capture, got tuple"):
        attention(*arguments, **options, out=(1, 2, 3))  # type: ignore[arg-type]
    odd = torch.empty(batch, heads, 1, 65, dtype=query.dtype)[..., 1:]
    with emulator.serving("attention"):
        with pytest.raises(BackendUnavailable, match="output has heads that do not start at multiples of 4 bytes"):
            attention(*arguments, **options, output=odd, backend="cuda")
        # The strides of a single entry are no distance.
        lone = [one[:1] for one in arguments]
        lone[1] = lone[1].as_strided(lone[1].shape, (3, *lone[1].stride()[1:]), lone[1].storage_offset())
        shared = {
            name: one[:1] if isinstance(one, torch.Tensor) and name != "sink" else one for name, one in options.items()
        }
        found = attention(*lone, **shared, backend="cuda")
        wanted = attention(lone[0], lone[1].clone(), *lone[2:], **shared, backend="cuda")
        assert torch.equal(found.output, wanted.output)


def test_the_fallback_is_logged_once_for_each_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
    with emulator.serving("attention"):
        for rows in (2, 3, 2):
            arguments, options = problem(BASE.but(rows=rows), 64)
            attention(*arguments, **options)
        arguments, options = problem(BASE.but(dtype=torch.float32), 64)
        attention(*arguments, **options)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "computed by sdpa and capture" in messages[0] and "other than one row" in messages[0]
    assert "query is torch.float32" in messages[1]


def test_a_compiler_sees_one_operator(chosen: str, backend: str) -> None:
    if " on " in chosen:
        pytest.skip("what moves tensors to a GPU and back cannot be compiled")
    torch._dynamo.reset()
    case = served(BASE.but(view="positions"), chosen)
    arguments, options = problem(case, 64)
    eager = attention(*arguments, **options, backend=backend)
    graphs: list[Any] = []

    def keep(graph: Any, _examples: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    def step(*tensors: torch.Tensor) -> Attended:
        return attention(*tensors, **options, backend=backend)

    for compiler in (keep, "aot_eager"):
        found = torch.compile(step, fullgraph=True, backend=compiler)(*arguments)
        assert torch.equal(found.output, eager.output)
        assert all(torch.equal(one, other) for one, other in zip(found.capture, eager.capture, strict=True))
    targets = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
    assert [name for name in targets if "carve" in name] == ["carve_kernels.attend_layer_in.default"]


def test_a_session_finds_its_operator() -> None:
    device = torch.device("cpu")
    found = attention_operator("reference", device, dtype=torch.float32, size=64, value_size=32)
    assert not isinstance(found, str) and found.backend == "reference"
    reason = attention_operator("auto", device, dtype=torch.float32, size=64, value_size=32)
    assert isinstance(reason, str) and "cpu cannot serve attention" in reason


def test_scratch_of_fewer_keys_and_tokens_is_never_more() -> None:
    with entered(CUDA):
        found = attention_operator("cuda", torch.device("cpu"), dtype=torch.float16, size=128, value_size=128)
        assert not isinstance(found, str)
        sizes = {"batch": 2, "query_heads": 28, "key_heads": 4, "size": 128, "value_size": 128}
        counts = (0, 1, 63, 64, 65, 1000, 4095, 4096, 4097, 5000, 16384, 32768, 40000)
        for other, ranging in (("tokens", "keys"), ("keys", "tokens")):
            needs = [found.needs(**sizes, **{other: 4096, ranging: count}) for count in counts]
            assert [each.bytes for each in needs] == sorted(each.bytes for each in needs)
            assert [each.tickets for each in needs] == sorted(each.tickets for each in needs)


def test_the_fallback_serves_float64() -> None:
    arguments, options = problem(Case(rows=1, view="mask"), 24)
    query, key, value, tokens = (part.double() if part.is_floating_point() else part for part in arguments)
    found = attention(query, key, value, tokens, **options)
    truth = attention(query, key, value, tokens, **options, backend="reference")
    assert found.output.dtype == torch.float64 and found.capture.maps.dtype == torch.float64
    assert torch.allclose(found.output, truth.output, rtol=1e-12, atol=1e-14)
    assert backends.FALLBACK["attention"] == FALLBACK
