"""Machines that are not this one: what cannot work is said before a run begins, and what does not matter does not stop it."""
import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
import training as training_benchmark
from kinds import grey_noise
from rich.console import Console
from runs import quick
from timm.models import save_for_hf

from spatial_entropy.commands import main
from spatial_entropy.training import jobs
from spatial_entropy.training.batches import loaders
from spatial_entropy.training.config import TrainConfig, load_config
from spatial_entropy.training.files import read_text
from spatial_entropy.training.loop import prepare
from spatial_entropy.training.models import load_run
from spatial_entropy.training.progress import RunProgress

tiny = ["depth=1", "embed_dim=24", "num_heads=2", "patch_size=16"]
train = ["train", "--img-size", "64", "--limit", "32", "-b", "8", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]


def typed(*words):
    "Exit code and what is said on stderr, of a command in this process."
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        script = words[0] == "benchmark-training"
        code = (training_benchmark.main if script else main)([str(w) for w in words[script:]])
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
            grey_noise(i, 20 + 40 * c + i).save(root / name / f"é{i}.png")
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
        torch.set_num_threads(1)                             # threads that ran before the fork are not in the child, which would wait for them
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
    late = threading.Timer(300, forked.kill)                 # the exit code tells
    late.daemon = True
    late.start()
    with open(read, "rb") as f:
        text = f.read()
    forked.join()
    late.cancel()
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
    assert running.wait(300) == 0 and said == b"", said
    assert first.startswith(b"run folder: ") and b"/gr????e " in first
    run = tmp_path / "größe"
    assert everything <= {p.name for p in run.iterdir()}
    assert os.fsencode(load_config(run)[0].data) == os.fsencode(pictures)


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("läufe")
    with quick():                                            # the run above draws
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


# ---- names that timm.create_model takes

@pytest.fixture(scope="module")
def folder_of_timm(tmp_path_factory):
    "A model as timm keeps it in a folder, with its own mean and number of classes."
    path = tmp_path_factory.mktemp("modèle")
    torch.manual_seed(0)
    known = dict(mean=(.1, .2, .3), input_size=(3, 64, 64))
    save_for_hf(timm.create_model("test_vit", num_classes=2, pretrained_cfg_overlay=known), path, safe_serialization=True)
    return path


def test_a_folder_of_timm_is_trained_evaluated_and_drawn(folder_of_timm, pictures, tmp_path):
    name = f"local-dir:{folder_of_timm}"
    for start in (["--pretrained"], ["--initial-checkpoint", str(next(folder_of_timm.glob("*.safetensors")))]):
        words = small(pictures, tmp_path)[:-len(tiny) - 1]
        words[words.index("--model") + 1], words[words.index("--experiment") + 1] = name, start[0][2:]
        words[words.index("--img-size") + 1] = "64"
        with quick():
            assert typed(*words, *start) == (0, "")
    model, config, facts = load_run(tmp_path / "pretrained")
    assert config.model == name and facts["mean"] == [.1, .2, .3]
    picture = next(pictures.rglob("*.png"))
    assert typed("draw", name, picture, "-o", tmp_path / "drawn.png") == (0, "") and (tmp_path / "drawn.png").exists()


names = {"vit_tiny_patch16_224.no_such_tag": "got the tag 'no_such_tag', but timm", "local-dir:nowhere": "local-dir:nowhere is unavailable here",
         "hf-hub:nobody/nothing": "hf-hub:nobody/nothing is unavailable here", "timm/vit_tiny_patch16_224": "timm/vit_tiny_patch16_224",
         "hf-hub:": "got 'hf-hub:'", "s3:bucket/model": "got 's3:bucket/model'", "vit_tinny": "does not know; near: "}


@pytest.mark.parametrize("name", names)
def test_a_name_that_timm_does_not_take_is_one_sentence(name, pictures, tmp_path):
    words = small(pictures, tmp_path)
    words[words.index("--model") + 1] = name
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        for line in (words, ["draw", name, next(pictures.rglob("*.png")), "-o", tmp_path / "drawn.png"],
                     [*small(pictures, tmp_path), "--teacher", name], ["benchmark-training", "--model", name, "-o", tmp_path / "measured"]):
            code, said = typed(*line)
            assert code == 2 and names[name] in said and one_sentence(said), (line, said)
    assert not list(tmp_path.iterdir())


def test_the_training_benchmark_tries_its_model_first(tmp_path):
    code, said = typed("benchmark-training", "--model-kwargs", "in_chans=1", "-o", tmp_path / "measured")
    assert code == 2 and "cannot be trained on 2 picture(s)" in said and one_sentence(said), said


# ---- loading processes end with the program that they load for, however it ends and however they were started

def program(method, end, pictures, out):
    "One batch with a loading process, and then an end."
    torch.set_num_threads(1)
    multiprocessing.set_start_method(method, force=True)
    data = loaders(str(pictures), 32, 4, workers=1)
    next(iter(data.train.at(0)))
    out.send([p.pid for p in multiprocessing.active_children()])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if end == "error":
        raise ZeroDivisionError("in the user's loop")
    if end == "sys.exit":
        sys.exit(5)
    os.kill(os.getpid(), signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
    time.sleep(60)


def running(pid):
    try:
        return read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize("method, end", [
    ("fork", "error"), ("fork", "sys.exit"), ("fork", "Ctrl-C"), ("fork", "SIGKILL"), ("forkserver", "error"), ("forkserver", "SIGKILL"), ("spawn", "error")])
def test_loading_processes_end_with_their_program(pictures, method, end):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=program, args=(method, end, pictures, theirs))
    child.start()
    workers = []
    try:
        assert ours.poll(300)
        workers = ours.recv()
        assert len(workers) == 1
        child.join(20)
        assert child.exitcode == {"sys.exit": 5, "SIGKILL": -signal.SIGKILL}.get(end, 1)
        until = time.monotonic() + 20
        while any(map(running, workers)) and time.monotonic() < until:
            time.sleep(.1)
        assert not any(map(running, workers))
    finally:
        for pid in [*filter(running, workers), child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.join()
