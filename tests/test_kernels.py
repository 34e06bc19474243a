"""The fused CPU kernels: a hundred thousand maps, threads, forks, compilers, and machines that lack something."""
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from kinds import kinds, oracle

import spatial_entropy as se
from spatial_entropy.measure import cpu as kernels
from spatial_entropy.measure.entropy import clear_entropy
from spatial_entropy.measure.regions import clear_labels

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (7, 1), (3, 3), (3, 5), (5, 3), (4, 9), (1, 63), (1, 64), (1, 65), (64, 1), (65, 1), (7, 7),
          (8, 8), (9, 13), (11, 11), (12, 17), (13, 13), (14, 14), (16, 16), (15, 20), (7, 31), (31, 7), (2, 127), (3, 128), (3, 129), (1, 200),
          (5, 63), (5, 64), (5, 65), (24, 24), (27, 19), (32, 32), (37, 37), (48, 48), (33, 97), (64, 64), (128, 128)]


def count(h, w):
    return int(np.clip(700_000 // (h * w), 24, 4600))


def test_there_are_a_hundred_thousand_maps_of_thirty_shapes():
    assert len(SHAPES) >= 30 and sum(count(*s) for s in SHAPES) >= 100_000


@pytest.mark.parametrize("h,w", SHAPES)
def test_fused_against_clear(h, w):
    maps = torch.tensor(kinds(count(h, w), h, w, np.random.default_rng(1000 * h + w)), dtype=torch.float32)
    for connectivity, part in ((8, maps), (4, maps[::4])):
        E, g = kernels.entropy_and_gradient(part[None], connectivity, 1., 1e-3, True)
        clear_E, clear_g = clear_entropy(part.double(), connectivity)
        labels = kernels.label_regions(se.above_mean(part)[None], connectivity)[0]
        assert torch.equal(labels, clear_labels(se.above_mean(part), connectivity))
        assert (E[0] - clear_E).abs().max() <= 1e-5
        A = (part.double() - part.double().mean((-2, -1), keepdim=True)).relu().sum((-2, -1))
        unit = 1 / A.maximum(1e-3 * part.double().abs().sum((-2, -1)).clamp_min(1))
        size = clear_g.abs().amax((-2, -1)).maximum(unit / 100)
        assert ((g[0] - clear_g).abs().amax((-2, -1)) <= 1e-4 * size).all()


@pytest.mark.parametrize("connectivity", [4, 8])
def test_labels_and_entropy_against_the_oracle(connectivity):
    maps = kinds(120, 14, 14, np.random.default_rng(5)).astype(np.float32)
    E, _ = kernels.entropy_and_gradient(torch.tensor(maps)[None], connectivity, 1., 1e-3, False)
    labels = se.label_regions(se.above_mean(torch.tensor(maps)), connectivity).numpy()
    for m, e, label in zip(maps, E[0].tolist(), labels):
        want, _, theirs, _ = oracle(m, connectivity)
        assert abs(e - want) <= 1e-5 and np.array_equal(label, theirs)


def test_a_hundred_repeats_and_any_number_of_threads_give_the_same_bits():
    maps = torch.randn(64, 12, 14, 14)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = kernels.entropy_and_gradient(maps, 8, 1., 1e-3, True)
        for i in range(100):
            torch.set_num_threads(1 + i % 3)
            assert all(torch.equal(a, b) for a, b in zip(first, kernels.entropy_and_gradient(maps, 8, 1., 1e-3, True)))
    finally:
        torch.set_num_threads(threads)


def test_many_python_threads_at_once():
    maps = torch.randn(8, 64, 12, 14, 14)
    want = [kernels.entropy_and_gradient(m, 8, 1., 1e-3, True) for m in maps]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for a, b in zip(want, pool.map(lambda m: kernels.entropy_and_gradient(m, 8, 1., 1e-3, True), maps)):
                assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


PROGRAM = """
import json, os, sys, textwrap
import torch
for name, (code, file) in json.load(sys.stdin).items():                 # of the package and of numba nothing is imported yet
    child = os.fork()
    if not child:
        said = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        exec(compile(textwrap.dedent(code), name, "exec"), {"__name__": "__main__"})
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def codes():
    "What the tests below have to try in a process that imports the package anew."
    return {name: test.code for name, test in globals().items() if hasattr(test, "code")}


def anew(code):
    "Marks a test of what a new process says that runs this code: the fixture `said`."
    def mark(test):
        test.code = code
        return test
    return mark


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    "What each of the codes printed, each in a fork of one program that had imported torch, and nothing else."
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    folder = tmp_path_factory.mktemp("programs")
    asked = {name: (code, str(folder / name)) for name, code in codes().items()}
    done = subprocess.run([sys.executable, "-W", "always", "-c", PROGRAM], input=json.dumps(asked), capture_output=True, text=True, timeout=900,
                          cwd=os.path.dirname(__file__) + "/..")
    assert done.returncode == 0, done.stderr[-3000:]
    ended = dict(line.split() for line in done.stdout.splitlines())
    return {name: (ended[name], (folder / name).read_text()) for name in asked}


@pytest.fixture
def said(programs, request):
    code, text = programs[request.function.__name__]
    assert code == "0", text[-3000:]
    return text


@anew("""
        import os, torch, spatial_entropy as se
        torch.set_num_threads(2)
        maps = torch.randn(64, 12, 14, 14)
        want = se.spatial_entropy(maps)              # starts the parent's pool
        child = os.fork()
        if not child:
            torch.set_num_threads(2)
            os._exit(0 if torch.equal(se.spatial_entropy(maps), want) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(se.spatial_entropy(maps), want)
    """)
def test_a_forked_child_computes_after_its_parent_did(said):
    pass                                             # it ended well


def test_workers_of_a_data_loader_may_use_it():
    class Maps(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return se.spatial_entropy(torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(i)))

    alone = torch.stack([Maps()[i] for i in range(8)])
    assert torch.equal(torch.cat(list(torch.utils.data.DataLoader(Maps(), 2, num_workers=2))), alone)


@anew("""
        import sys
        sys.modules["numba"] = None                  # as if it were not installed
        import torch, spatial_entropy as se
        from spatial_entropy.measure.operators import backend
        x = torch.randn(3, 2, 7, 9, requires_grad=True)
        for _ in range(3): se.SpatialEntropyLoss()(x).backward()
        print(backend("cpu"), bool(x.grad.abs().sum() > 0), int(se.label_regions(x > 9).max()))
    """)
def test_without_numba_the_clear_answer_comes_and_says_so_once(said):
    assert "clear True 0" in said and said.count("no fused kernels for cpu") == 1


@anew("""
        import numba.core.caching as caching
        class Nowhere(caching._CacheLocator):
            from_function = classmethod(lambda cls, *a: None)
        caching.CacheImpl._locator_classes = [Nowhere]
        caching.CodeLibraryCacheImpl._locator_classes = [Nowhere]
        import torch, spatial_entropy as se
        from spatial_entropy.measure import cpu as kernels
        import warnings
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            print(kernels._options["cache"], se.spatial_entropy(torch.eye(4)).item())
        print(*(w.message for w in said), sep="\\n")
    """)
def test_where_nothing_can_be_kept_on_disk_it_is_compiled_in_memory(said):
    assert "False 0.0" in said and said.count("numba's kept code cannot be used (no folder for it can be written)") == 1


def spoil(path, harm):
    if harm == "a folder in its place":
        path.unlink()
        path.mkdir()
    elif harm == "another user's":
        path.chmod(0)
    else:
        path.write_bytes({"empty": b"", "noise": bytes(range(1, 200)), "cut": path.read_bytes()[:-30]}[harm])


@pytest.mark.parametrize("files", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("harm", ["empty", "noise", "cut", "a folder in its place", "another user's", "full disk"])
def test_a_cache_that_fails_is_said_once_and_does_without(tmp_path, monkeypatch, harm, files):
    "Of a function of two signatures: kept by one dispatcher, spoiled, wanted by the next."
    if harm == "another user's" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def triple(x):
        return 3 * x

    assert kernels._compiled(triple)(14) == 42
    kept = list(tmp_path.rglob(files))
    assert kept
    if harm == "full disk":
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_open_for_write", full)
        [p.unlink() for p in tmp_path.rglob("*.nb?")]
    else:
        [spoil(p, harm) for p in kept]
    monkeypatch.setattr(kernels, "_said", False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = kernels._compiled(triple)
        assert again(14) == 42 and again(1.5) == 4.5
    said = [str(w.message) for w in said]
    assert len(said) == 1 and "numba's kept code cannot be used" in said[0]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_fullgraph(backend):
    if backend == "inductor" and not any(os.access(os.path.join(p, "g++"), os.X_OK) for p in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("no C++ compiler for the compiled code")
    loss = se.SpatialEntropyLoss()
    attention = torch.randn(4, 3, 65, 65, requires_grad=True)

    def step(x):
        return (x**2).mean() + .1 * loss((x * 3)[:, :, 0, 1:].unflatten(-1, (8, 8))) + 0 * se.label_regions(x[:, :, 1:9, 1:9] > 0).sum()
    plain, = torch.autograd.grad(step(attention), attention)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        got, = torch.autograd.grad(compiled(attention), attention)
    torch.testing.assert_close(got, plain, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("view", [
    lambda: torch.randn(2, 3, 50, 50)[:, :, 0, 1:].unflatten(-1, (7, 7)),
    lambda: torch.randn(2, 7, 3, 9).permute(0, 2, 1, 3),
    lambda: torch.randn(4, 6, 9, 9)[::2, ::3, ::2, 1::2],
    lambda: torch.randn(1, 1, 7, 7).expand(3, 2, 7, 7),
    lambda: torch.randn(2, 1, 7).expand(2, 5, 7),
    lambda: torch.randn(9, 9).t()[1:, 2:],
])
def test_any_strides(view):
    x = view()
    assert torch.equal(se.spatial_entropy(x), se.spatial_entropy(x.contiguous().clone()))
    assert torch.equal(se.label_regions(x > 0), se.label_regions((x > 0).contiguous()))
    leaf = x.detach().clone().requires_grad_()
    again = x.detach().requires_grad_()
    for y in (leaf, again):
        se.spatial_entropy(y).sum().backward()
    assert torch.equal(leaf.grad, again.grad)


def test_input_is_left_alone_and_no_gradient_is_made_without_need():
    x = torch.randn(2, 3, 7, 7)
    kept = x.clone()
    assert not se.spatial_entropy(x).requires_grad
    E, g = torch.ops.spatial_entropy.entropy(x, 8, 1., 1e-3, False)
    assert g.numel() == 0 and torch.equal(x, kept)
    with torch.no_grad():
        assert not se.spatial_entropy(x.requires_grad_()).requires_grad


def test_half_precision_training_under_a_scaler_stays_finite():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 6 * 49)
    model.weight.data *= 1e-6                              # maps that are all but constant
    optimizer, loss, x = torch.optim.SGD(model.parameters(), .1), se.SpatialEntropyLoss(), torch.randn(64, 16)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(5):
        with torch.autocast("cpu", torch.float16):
            maps = model(x).view(64, 6, 7, 7)
        assert maps.dtype == torch.float16
        optimizer.zero_grad()
        scaler.scale(.01 * loss(maps)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 65536 and all(p.isfinite().all() for p in model.parameters())
