"""Machines that are not this one: what cannot work is said before a run begins, and what does not matter does not stop it."""
import contextlib
import io
import multiprocessing
import os
import random
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from spatial_entropy import jobs
from spatial_entropy.commands import main
from spatial_entropy.config import TrainConfig
from spatial_entropy.files import read_text
from spatial_entropy.progress import RunProgress
from spatial_entropy.training import prepare

tiny = ["depth=1", "embed_dim=24", "num_heads=2", "patch_size=16"]
train = ["train", "--img-size", "64", "--limit", "32", "-b", "8", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]


def typed(*words):
    "Exit code and what is said on stderr, of a command in this process."
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main([str(w) for w in words])
    return code, said.getvalue()


def one_sentence(said):
    return said.count("\n") == 1 and "Traceback" not in said


# ---- what a model, an optimiser or a compiler cannot do is found before anything is written

unfit = {
    "in_chans=1": "cannot be trained on 2 picture(s) of 3×64×64", "patch_drop_rate=0.5": "patches were dropped",
    "num_classes=2": "got num_classes, which is set elsewhere", "img_size=32": "got img_size, which is set elsewhere",
    "pretrained=true": "got pretrained, which is set elsewhere", "global_pool=": "gives (2, 17, 10), expected scores (2, 10)",
    "num_heads=-2": "cannot be trained", "patch_size=0": "cannot be built", "device=meta": "got device, which is set elsewhere",
    "features_only=true": "got features_only, which is set elsewhere", "drop_rate=2": "cannot be built", "depth=[1]": "cannot be built"}


@pytest.mark.parametrize("argument", unfit)
def test_an_argument_that_no_run_survives_is_named_before_anything_is_written(tmp_path, argument):
    code, said = typed(*train, "--output", tmp_path, "--model-kwargs", *(t for t in tiny if t.split("=")[0] not in argument), argument)
    assert code == 2 and unfit[argument] in said and one_sentence(said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, expected", [
    (["--opt", "adahessian"], "opt: got 'adahessian', which cannot train here"),
    (["--compile", "tvm"], "compile: got 'tvm', which does not work here"),
    (["--model", "convit_tiny", "--grad-checkpointing", "--keep-skip"], "grad_checkpointing: convit_tiny does not offer it")])
def test_a_tool_that_does_not_work_here_is_named_before_anything_is_written(tmp_path, words, expected):
    code, said = typed(*train, "--output", tmp_path, *([] if "--model" in words else ["--model-kwargs", *tiny]), *words)
    assert code == 2 and expected in said and one_sentence(said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [
    dict(model_kwargs=dict(depth=2, embed_dim=24, num_heads=2, patch_size=8), drop_path=.2, amp_dtype="bfloat16", model_ema=True),
    dict(model="levit_128s", img_size=224, keep_skip=True, compile="eager")], ids=["dropout, bfloat16, average", "batch norm"])
def test_the_trial_changes_no_bit_of_a_run(tmp_path, settings):
    def prepared(name):
        job = prepare(TrainConfig(**{**dict(limit=32, batch_size=8, epochs=1, warmup_epochs=0, output=str(tmp_path), device="cpu"),
                                     **settings, "experiment": name}), say=lambda said: None)
        job.tap.close()
        state = {**job.model.state_dict(), **(job.ema.state_dict() if job.ema else {})}
        return {k: v.clone() for k, v in state.items()}, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    weights, *drawn = prepared("tried")
    with patch.object(jobs, "try_forward", lambda *a: None), patch.object(jobs, "_try_tools", lambda *a: None):
        others, *theirs = prepared("untried")
    assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)
    assert torch.equal(drawn[0], theirs[0]) and drawn[1:] == theirs[1:]


# ---- a stream that knows few letters, that nobody reads, that is full or closed

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Two classes with names beyond ASCII."
    root = tmp_path_factory.mktemp("Bilder") / "Käfer und β"
    for c, name in enumerate(("Käfer", "β")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.effect_noise((36, 36), 20 + 40 * c + i).convert("RGB").save(root / name / f"é{i}.png")
    return root


def small(pictures, output):
    settings = dict(data=pictures, img_size=32, b=8, epochs=1, warmup_epochs=0, workers=0, device="cpu", output=output, experiment="größe",
                    model="vit_tiny_patch16_224")
    flags = [w for k, v in settings.items() for w in ("-b" if k == "b" else "--" + k.replace("_", "-"), str(v))]
    return ["train", *flags, "--model-kwargs", *tiny]


def shown(words, encoding="ascii", reader="reads"):
    "(exit code, what was read) of a command in a fork, whose stdout has that encoding and that reader."
    read, write = os.pipe()

    def child():
        os.dup2(os.open("/dev/full", os.O_WRONLY) if reader == "is full" else write, 1)
        os.close(read)
        sys.stdout = open(1, "w", encoding=encoding, closefd=False) if reader != "was closed" else None
        if reader == "was closed":
            os.close(1)
        try:
            code = main([str(w) for w in words])
            code = 99 if not os.path.exists("/proc/self/fd/1") else code
            if sys.stdout:
                sys.stdout.flush()
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            print(repr(e), file=sys.stderr)
            code = 120
        os._exit(code)

    forked = multiprocessing.get_context("fork").Process(target=child)
    if reader == "left":
        os.close(read)
        read = os.open(os.devnull, os.O_RDONLY)
    forked.start()
    os.close(write)
    with open(read, "rb") as f:
        text = f.read()
    forked.join()
    return forked.exitcode, text.decode(encoding)


everything = {"config.yaml", "facts.json", "metrics.csv", "model.safetensors", "best.safetensors", "evaluation.json", "curves.png", "before_after.png",
              "attention.gif", "checkpoints", "pictures"}


def test_a_command_ends_well_where_only_ascii_is_known_and_the_reader_leaves(pictures, tmp_path):
    "`train | head -1` in the C locale, as a program of its own."
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    code = "import sys; from spatial_entropy.commands import main; sys.exit(main())"
    running = subprocess.Popen([sys.executable, "-c", code, *small(pictures, tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    first = running.stdout.readline()
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait() == 0 and said == b"", said
    assert first.startswith(b"run folder: ") and b"/gr????e " in first
    run = tmp_path / "größe"
    assert everything <= {p.name for p in run.iterdir()} and "β" in read_text(run / "config.yaml")


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("läufe")
    code, text = shown(small(pictures, output))
    assert code == 0 and text.count("\n") > 10 and "? cpu" in text and everything <= {p.name for p in (output / "größe").iterdir()}
    return output / "größe"


@pytest.mark.parametrize("reader", ["reads", "left", "is full", "was closed"])
def test_a_command_ends_well_whoever_reads(run, pictures, tmp_path, reader):
    drawn = ["draw", run, next(pictures.rglob("*.png")), "-o", tmp_path / "é.png"]
    for words in (["evaluate", run, "-o", tmp_path / "ü.json"], drawn, ["train", "--help"], ["--help"]):
        code, text = shown(words, reader=reader)
        assert code == 0 and bool(text) == (reader == "reads"), (words, code, text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["é.png", "ü.json"]


def test_a_terminal_that_is_gone_does_not_stop_a_run():
    "Bars in a terminal whose other end is closed: EIO at every letter, in rich's thread too."
    if not hasattr(os, "openpty"):
        pytest.skip("needs a pseudo-terminal")
    ours, theirs = os.openpty()
    file = open(theirs, "w", encoding="ascii", closefd=False)
    console = Console(file=file, force_terminal=True, force_jupyter=False, width=100, _environ={"TERM": "xterm"})
    with RunProgress(2, 2, console, plot=False) as progress:
        os.close(ours)
        for epoch in range(2):
            progress.epoch(epoch)
            progress.update(8, loss=1.)
            progress.finish(dict(epoch=epoch + 1))
        progress.note("λ ≤ 1")
    assert console.file is file
    with contextlib.suppress(OSError):
        file.close()
    os.close(theirs)


def test_a_terminal_that_cannot_redraw_gets_lines():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, force_jupyter=False, width=100, color_system=None, _environ={"TERM": "dumb"})
    with RunProgress(1, 1, console, plot=False) as progress:
        progress.epoch(0)
        progress.update(8, loss=1.)
        progress.finish(dict(epoch=1))
    assert said.getvalue() == "epoch   1/1\n"
