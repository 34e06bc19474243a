"""A tapped model is compiled in as few graphs as the model itself, on its first call, and gives out its rows alone."""
import dataclasses
import fnmatch
import inspect
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.attention.rows import Rows, query_row

sys.path.insert(0, str(Path(__file__).parent))
from test_tap import KINDS, zoo  # noqa: E402
from zoo import HF, OTHERS, TIMM  # noqa: E402

PACKAGE = str(Path(se.__file__).parent)
TABOO = {m.__file__ for m in (re, dataclasses, fnmatch, inspect)}   # older compilers of torch do not follow these


def asked_of_python(run):
    "What the package calls, while something runs, that a compiler of some version cannot follow: {(caller, callee)}."
    found = set()

    def watch(frame, event, callee):
        if event == "c_call" and callee is next and frame.f_code.co_filename.startswith(PACKAGE):
            found.add((frame.f_code.co_qualname, "next"))
        elif event == "call" and frame.f_code.co_filename in TABOO and frame.f_back.f_code.co_filename.startswith(PACKAGE):
            found.add((frame.f_back.f_code.co_qualname, frame.f_code.co_qualname))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("spec", [*TIMM, *HF, *OTHERS], ids=lambda s: s.name)
def test_a_pass_asks_nothing_that_compilers_cannot_follow(spec, monkeypatch):
    "As a compiler goes through it, whatever this version's compiler can do."
    model, x = spec.make(spec.sizes[0]).train(), torch.rand(2, 3, *spec.sizes[0])
    with se.AttentionTap(model, "all") as tap:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not asked_of_python(lambda: model(x))
    monkeypatch.undo()
    assert len(tap.maps()) == spec.layers


def compiled(model, call):
    "The shapes of what each graph of a first call in training gives out with a gradient."
    graphs = []

    def backend(graph, examples):
        graphs.append([o for o in graph.graph.output_node().args[0] if isinstance(o, torch.fx.Node)])
        return graph.forward

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        call(torch.compile(model.train(), backend=backend))
    return [[tuple(o.meta["example_value"].shape) for o in outputs if o.meta["example_value"].requires_grad] for outputs in graphs]


def in_one_piece(model, call, prepare=lambda model: None, **tapped):
    prepare(model)
    plain = compiled(model, call)
    with se.AttentionTap(model, **tapped) as tap:
        graphs, layers = compiled(model, call), len(tap.blocks)
    assert len(graphs) == len(plain) == 1
    rows = list(graphs[0])
    for shape in plain[0]: rows.remove(shape)
    assert len(rows) == layers, f"beside the model's outputs and {layers} row(s) the graph gives out {rows}"
    maps = tap.maps() if len(tap.blocks) > 1 or not tap.single else {0: tap.maps()}
    assert all(m.requires_grad and m.isfinite().all() for m in maps.values())


@pytest.mark.parametrize("name", KINDS)
def test_one_graph_and_no_output_but_the_rows(name):
    in_one_piece(*zoo(name, shallow=True), block="all")


def small(**more):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, **more)


@pytest.mark.parametrize("more", [dict(query=(1, 2)), dict(query="mean"), dict(softmax=True), dict(prepare=se.drop_last_skip), dict(prepare=se.use_simpool)],
                         ids=["a patch", "mean", "softmax", "without its skip", "SimPool"])
def test_one_graph_however_it_is_asked(more):
    x = torch.rand(2, 3, 32, 32)
    in_one_piece(small(), lambda m: m(x), **more)


def test_one_graph_where_attention_splits_a_tensor():
    "`Tensor.split` is written in Python; graphs of some versions cannot name it."
    x = torch.rand(2, 3, 224, 224)
    model = next(s for s in TIMM if s.name == "levit_128s").make((224, 224))
    in_one_piece(model, lambda m: m(x), block=0)


@pytest.mark.parametrize("rows", [Rows(token=0), Rows(start=1)], ids=["a token", "mean"])
def test_the_gradient_of_a_compiled_row_is_float32_under_autocast(rows):
    q, k = (torch.randn(2, 3, 1, 9, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    weight, grads = torch.linspace(-1, 1, 9), []
    for function in (query_row, torch.compile(query_row, backend="aot_eager", fullgraph=True)):
        given = [t.clone().requires_grad_() for t in (q, k)]
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            s, _ = function(*given, .25, None, rows)
        (s*weight).sum().backward()
        grads.append([t.grad for t in given])
    assert_close(*grads, atol=1e-6, rtol=1e-5)
