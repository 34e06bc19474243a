"""What goes wrong at night: each ends in one sentence, and nothing that was saved is lost."""
import contextlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
from itertools import count
from unittest.mock import patch

import pytest
import torch
from kinds import grey_noise
from runs import assert_same, everything, exit_codes, pair, quick, start, state, whole

from spatial_entropy.commands import main
from spatial_entropy.training import batches, jobs
from spatial_entropy.training.files import check
from spatial_entropy.training.models import load_weights
from spatial_entropy.training.progress import RunProgress

settings = {**everything, "epochs": 2}


def words(options):
    "Settings as words of a command."
    for k, v in options.items():
        yield "--" + k
        yield from [f"{a}={b}" for a, b in v.items()] if isinstance(v, dict) else [str(v)]


def typed(line):
    "Exit code and what is said on stderr, of a command in this process."
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(line)
    return code, said.getvalue()


def one_sentence(said):
    return said.count("\n") == 1 and "Traceback" not in said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return state(whole(tmp_path_factory.mktemp("whole"), settings))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A run that was killed when its fifth checkpoint had just got its name."
    folder = tmp_path_factory.mktemp("killed")
    child = start(folder, {**settings, "checkpoint_hist": 3}, point=("prune", 5))
    assert exit_codes(child) == [-signal.SIGKILL] and len(jobs.checkpoints(folder / "run")) == 4
    return folder / "run"


@pytest.fixture
def half(killed, tmp_path):
    "A copy of it."
    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    return tmp_path


def flip(path):
    with open(path, "r+b") as f:
        f.seek(-100, 2)
        byte = f.read(1)[0]
        f.seek(-100, 2)
        f.write(bytes([byte ^ 16]))


def cut(path):
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, os.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "place.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(half, uninterrupted, harm, file):
    if (harm, file) in [(flip, "place.pt"), (cut, "model.safetensors"), (os.unlink, "manifest.json")]:       # to the end in three cases
        harm(jobs.checkpoints(half / "run")[-1] / file)
        whole(half, settings, said=half / "said")
        assert "passed over a damaged checkpoint: " in (half / "said").read_text() and file in (half / "said").read_text()
        return assert_same(state(half / "run")["trained"], uninterrupted["trained"])
    harm(jobs.checkpoints(half / "run")[-1] / file)
    said = []
    path, _ = jobs._checkpoint(half / "run", said.append)
    assert path == jobs.checkpoints(half / "run")[-2] and file in said[0]


def test_not_one_whole_checkpoint(half):
    for path in jobs.checkpoints(half / "run"):
        flip(path / "optimizer.bin")
    (half / "run" / ".lock").unlink()                        # of the killed run
    before = sorted((half / "run").rglob("*"))
    code, said = typed(["train", "--resume", str(half / "run")])
    assert code == 2 and "not one of its 4 checkpoint(s) is whole; to start it from scratch, remove" in said and "and its metrics.csv" in said
    assert sorted((half / "run").rglob("*")) == before


def test_a_run_whose_checkpoints_were_deleted_is_not_written_over(half):
    shutil.rmtree(half / "run" / "checkpoints")
    (half / "run" / ".lock").unlink()
    before = {p: p.read_bytes() for p in (half / "run").rglob("*") if p.is_file()}
    assert (half / "run" / "metrics.csv") in before
    code, said = typed(["train", "--resume", str(half / "run")])
    assert code == 2 and "epochs, but no checkpoint is left to go on from; to train it again" in said and one_sentence(said)
    assert {p: p.read_bytes() for p in (half / "run").rglob("*") if p.is_file()} == before
    (half / "run" / "metrics.csv").unlink()
    jobs._check_unbegun(half / "run")                         # now it would begin anew


def test_a_checkpoint_of_another_model(half, tmp_path_factory):
    other = whole(tmp_path_factory.mktemp("other"), {**settings, "epochs": 1, "model_kwargs": {**settings["model_kwargs"], "embed_dim": 16}})
    shutil.rmtree(half / "run" / "checkpoints")
    shutil.copytree(other / "checkpoints", half / "run" / "checkpoints")
    code, said = typed(["train", "--resume", str(half / "run")])
    assert code == 2 and "not a checkpoint of this run (" in said and "size mismatch" in said and one_sentence(said)


def at_checkpoint(number, act):
    "Something happens to the disk just before a checkpoint."
    def hook():
        real, calls = jobs._write_state, count(1)

        def write(job, temporary):
            if next(calls) == number:
                act()
            return real(job, temporary)
        return patch.object(jobs, "_write_state", write)
    return hook


def test_a_quota_that_ends_in_the_middle(tmp_path, uninterrupted):
    "Files may not grow beyond 25 kB from the fourth checkpoint on: weights fit, the optimiser's moments do not."
    hook = at_checkpoint(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000)))
    child = start(tmp_path, settings, hook=hook, said=tmp_path / "said")
    codes = exit_codes(child)
    said = (tmp_path / "said").read_text().splitlines()
    assert codes == [1] and said[-1].startswith("OSError: ") and "step-00000004: cannot be written (" in said[-1] and "or a quota is used up" in said[-1]
    left = jobs.checkpoints(tmp_path / "run")
    assert [check(p)["updates"] for p in left] == [2, 3] and not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same(state(whole(tmp_path, settings)), uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of four MiB."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)])


def test_a_full_disk(small_disk, tmp_path, uninterrupted):
    def fill():
        space = os.statvfs(small_disk)
        (small_disk / "others").write_bytes(bytes(space.f_bavail * space.f_frsize - 30_000))

    child = start(small_disk, settings, said=tmp_path / "said", hook=at_checkpoint(3, fill))
    codes = exit_codes(child)
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert codes == [1] and "step-00000003: cannot be written (" in said and "0.0 MiB free there" in said, said
    assert [check(p)["updates"] for p in jobs.checkpoints(small_disk / "run")] == [1, 2]
    (small_disk / "others").unlink()
    assert_same(state(whole(small_disk, settings)), uninterrupted)


def test_a_disk_that_becomes_read_only(small_disk, tmp_path, uninterrupted):
    read_only = at_checkpoint(3, lambda: subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True))
    child = start(small_disk, settings, said=tmp_path / "said", hook=read_only)
    codes = exit_codes(child)
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert codes == [1] and "cannot be written (Read-only file system" in said, said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert_same(state(whole(small_disk, settings)), uninterrupted)


def test_a_loading_process_that_dies(tmp_path, uninterrupted):
    def hook():
        calls = count(1)

        def update(self, images, **means):
            if next(calls) == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return patch.object(RunProgress, "update", update)

    child = start(tmp_path, {**settings, "workers": 1}, hook=hook, said=tmp_path / "said")
    codes = exit_codes(child)
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert codes == [1] and "a process that loads pictures died" in said and "fewer --workers" in said, said
    assert_same(state(whole(tmp_path, settings))["trained"], uninterrupted["trained"])


def nan_at(*numbers):
    "These batches of the first epoch are no numbers."
    real = batches._augment

    def augment(b, x, label, number):
        x, label = real(b, x, label, number)
        return (x * float("nan") if b.order and (number in numbers or not numbers) and int(b.dataset.epoch_) == 0 else x), label
    return lambda: patch.object(batches, "_augment", augment)


def test_a_batch_that_is_no_number_is_left_out(tmp_path):
    run = whole(tmp_path, settings, hook=nan_at(3), said=tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert said.count("was left out") == 1
    assert "epoch 1, update 2: the loss is nan (batch 4 of process 0); this update was left out (1 in a row, 10 allowed)" in said
    assert all(v.isfinite().all() for v in load_weights(run / "model.safetensors").values())


def test_nothing_but_nan_stops_the_run_and_keeps_the_model(tmp_path):
    child = start(tmp_path, {**settings, "max_skips": 2}, hook=nan_at(), said=tmp_path / "said")
    codes = exit_codes(child)
    said = (tmp_path / "said").read_text().splitlines()
    assert codes == [1]
    assert said[-1].startswith("FloatingPointError: epoch 1, update 3: the loss is nan (batch 5 of process 0), for the 3. time in a row")
    for path in jobs.checkpoints(tmp_path / "run"):
        assert all(v.isfinite().all() for v in load_weights(path / "model.safetensors").values())


def test_a_batch_of_one_process_that_is_no_number_is_left_out_by_both(tmp_path):
    said = tmp_path / "rank0", tmp_path / "rank1"
    two = {**settings, "grad_accum_steps": 1}
    children = pair(tmp_path / "two", two, said=said, hook=nan_at(3))
    assert exit_codes(*children) == [0, 0], said[0].read_text()
    assert "epoch 1, update 2: the loss is nan (batch 2 of process 1)" in said[0].read_text()
    ours, theirs = state(tmp_path / "two" / "run"), state(whole(tmp_path / "one", settings, hook=nan_at(3)))
    for k, v in ours["trained"].items():
        torch.testing.assert_close(v, theirs["trained"][k], atol=1e-6, rtol=0)


def folder(root, classes, n=12):
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(n):
            grey_noise(i, 10 + 40 * c + i).save(root / f"class{c}" / f"{i}.png")
    return root


small = dict(img_size=32, epochs=1, batch_size=4, workers=0, model="vit_tiny_patch16_224", model_kwargs=dict(depth=1, embed_dim=24, num_heads=2))


def test_unreadable_pictures_are_named(tmp_path):
    data = folder(tmp_path / "data", 2)
    (data / "class1" / "3.png").write_bytes(b"nothing")
    for f in (data / "class0").glob("[0-4].png"):
        f.write_bytes(f.read_bytes()[:90])
    with quick(), contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", "--data", str(data), "--output", str(tmp_path), "--experiment", "r", *words(small)]) == 0
    found = re.search(r"(\d) picture\(s\) could not be read and were left out: class", said.getvalue())
    assert found and 3 <= int(found[1]) <= 6                 # an epoch of 16 of the 19 training pictures may not meet all


def test_no_readable_picture_ends_in_a_sentence(tmp_path):
    data = folder(tmp_path / "data", 2)
    for f in data.rglob("*.png"):
        f.write_bytes(b"nothing")
    code, said = typed(["train", "--data", str(data), "--output", str(tmp_path / "runs"), *words(small)])
    assert code in (1, 2) and "could" in said and "read" in said and one_sentence(said), said


def test_fine_tuning_on_other_classes_says_that_the_classifier_starts_anew(tmp_path):
    with quick(), contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--data", str(folder(tmp_path / "data2", 2)), "--output", str(tmp_path), "--experiment", "two", *words(small)]) == 0
        where = ["--data", str(folder(tmp_path / "data3", 3)), "--output", str(tmp_path), "--initial-checkpoint", str(tmp_path / "two")]
    with quick(), contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", *where, "--experiment", "three", *words(small)]) == 0
    assert "model.safetensors has 2 classes, the data 3: the classifier starts anew" in said.getvalue()
    code, said = typed(["train", *where, *words({**small, "model_kwargs": dict(depth=2, embed_dim=24, num_heads=2)})])
    assert code == 2 and "does not fit vit_tiny_patch16_224: it has no blocks.1.attn" in said and one_sentence(said)


def test_going_on_with_other_data_is_refused(half):
    text = (half / "run" / "config.yaml").read_text().replace("data: shapes", f"data: {folder(half / 'pictures', 2, 40)}")
    (half / "run" / "config.yaml").write_text(text)
    code, said = typed(["train", "--resume", str(half / "run")])
    assert code == 2 and "has 10 classes, the data 2, or others; a run goes on with its own data only" in said and one_sentence(said)


@pytest.mark.parametrize("line", [
    ["train", "--resume", ""], ["train", "--config", ""], ["train", "--data", ""], ["train", "--initial-checkpoint", ""], ["evaluate", ""],
    ["train", "--resume", "", "--config", "a.yaml"], ["draw", "", "a.png", "-o", "b.png"], ["train", "--output", ""]], ids=" ".join)
def test_an_empty_value_is_a_mistake(line, tmp_path, monkeypatch):
    "An unset variable in a script must not start another run."
    monkeypatch.chdir(tmp_path)
    code, said = typed(line)
    assert code == 2 and "got an empty text" in said and one_sentence(said) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["lr: 1\nlr: 2", "model_kwargs: {depth: 1, depth: 2}", '{"epochs": 1, "epochs": 2}'])
def test_a_setting_that_stands_twice_is_a_mistake(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    code, said = typed(["train", "--config", "a.yaml"])
    assert code == 2 and "stands twice" in said and one_sentence(said)
    code, said = typed(["train", "--model-kwargs", "depth=1", "depth=2"])
    assert code == 2 and "got 'depth' twice" in said and one_sentence(said)
