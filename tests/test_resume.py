"""A run that is killed, however often and whenever, ends with the bits of the run that was not."""
import os
import platform
import random
import shutil
import signal
import time
from unittest.mock import patch

import kills
import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from runs import assert_same, everything, exit_codes, pair, processes, quick, slow, start, state, until, whole

import spatial_entropy as se
from spatial_entropy.commands import main
from spatial_entropy.training import files, jobs
from spatial_entropy.training.progress import RunProgress


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    began = time.perf_counter()
    run = whole(tmp_path_factory.mktemp("whole"))
    return state(run), time.perf_counter() - began


def test_killed_at_ten_random_moments_also_while_writing(tmp_path):
    settings = {**everything, "epochs": 6}
    began = time.perf_counter()
    truth = state(whole(tmp_path / "whole", settings))
    seconds, draw, kills = time.perf_counter() - began, random.Random(0), []
    points = [("sync", draw.randint(1, 25)) for _ in range(4)] + [("state", 1), ("prune", 2)] + [None] * 100
    for point in points:
        child = start(tmp_path, settings, point=point)
        if point is None:                                    # at any moment, from the first import of the run to its end
            child.join(draw.uniform(.1, .3) * seconds)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
        exit_codes(child)
        kills += [point] if child.exitcode == -signal.SIGKILL else []
        if len(kills) == 10 or child.exitcode == 0:
            break
    assert len(kills) == 10, kills                           # the run did not end before
    run = whole(tmp_path, settings)
    assert_same(state(run), truth)
    assert not list((run / "checkpoints").glob(".*"))         # nothing half written stays


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "A run that nobody disturbed: its settings, its folder, what its files hold, the writes and the seconds it took."
    root = tmp_path_factory.mktemp("ended")
    config = kills.settings(root)
    began = time.perf_counter()
    truth, writes = kills.whole(root / "whole", config)
    return config, root / "whole" / "here", truth, writes, time.perf_counter() - began


def test_every_file_is_that_of_the_uninterrupted_run(ended, tmp_path):
    """Killed between any two writes and at random, with loading processes, Mixup, average and accumulation.

    Only the two times in metrics.csv (and in the place, where they come from) may differ. SPATIAL_ENTROPY_KILLS=100 kills a hundred times.
    """
    config, _, truth, writes, seconds = ended
    expected = {"best.safetensors", "model.safetensors", "metrics.csv", "evaluation.json", "attention.gif", "curves.png", "before_after.png"}
    assert expected <= truth.keys() and truth["best.safetensors"] != truth["model.safetensors"] and writes > 150
    moments = kills.moments(int(os.environ.get("SPATIAL_ENTROPY_KILLS", 8)), writes, seconds)
    killed, wrong = 0, {}
    for k, moment in enumerate(moments):
        was, found = kills.kill_and_go_on(tmp_path / str(k), config, moment, truth)
        killed += was
        wrong |= {str(moment): found} if found else {}
    assert not wrong and killed >= 2 * len(moments) // 3, (killed, wrong)


def gone_on(folder, config):
    (folder / "said").unlink(missing_ok=True)
    code = kills.run(folder, config)
    return code, (folder / "said").read_text()


def cut(path):
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size // 2)


def best_of(run):
    "The checkpoint of the best epoch, which is not the last."
    newest = jobs.checkpoints(run)[-1]
    best = jobs.step_name(torch.load(newest / "place.pt", weights_only=True)["place"]["best_at"])
    assert best != newest.name
    return best


def test_every_file_is_made_again(ended, tmp_path):
    "Removed, cut short, or of another run; beside them what is not ours: links under guessable names, notes, another's checkpoint."
    config, whole_run, truth, *_ = ended
    for harm in ("removed", "cut"):
        folder = tmp_path / harm
        shutil.copytree(whole_run, folder / "here")
        ours, outside = folder / "here" / "runs" / "run", folder / "outside"
        for name, path in kills.files(ours).items():
            if not name.startswith("checkpoints") and (name, harm) != ("config.yaml", "cut"):
                path.unlink() if harm == "removed" else cut(path)
        outside.write_text("mine")
        kept = []
        if harm == "removed":
            shutil.rmtree(ours / "pictures")
            kept = [ours / f".{n}" for n in ("evaluation.tmp.json", "metrics.tmp.csv", "model.tmp.safetensors", "curves.tmp.png")]
            [p.symlink_to(outside) for p in kept]
        else:
            checkpoints = ours / "checkpoints"
            (checkpoints / "step-notes.txt").write_text("x")
            (checkpoints / "step-00000004-keep").mkdir()
            shutil.copytree(checkpoints / best_of(ours), checkpoints / "step-2")
            (checkpoints / "step-00000001").symlink_to(checkpoints / best_of(ours))
            (ours / "pictures" / "epoch-notes.png").write_text("no picture")
            kept = [checkpoints / n for n in ("step-notes.txt", "step-00000004-keep", "step-2", "step-00000001")] + [ours / "pictures" / "epoch-notes.png"]
        code, said = gone_on(folder, config)
        assert code == 0, said
        assert outside.read_text() == "mine" and all(os.path.lexists(p) for p in kept)
        [shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink() for p in kept]
        assert kills.different(ours, truth) == [], said
        assert ("config.yaml: missing; taken from a checkpoint" in said) == (harm == "removed")
        assert ("model.safetensors: not weights that can be read" in said) == (harm == "cut")


def test_weights_that_are_nowhere_are_not_guessed(ended, tmp_path):
    "The best epoch's checkpoint is gone, and the file is another's; what was measured on other weights is no measure of these."
    config, whole_run, truth, *_ = ended
    shutil.copytree(whole_run, tmp_path / "here")
    ours = tmp_path / "here" / "runs" / "run"
    shutil.copy(ours / "model.safetensors", ours / "best.safetensors")
    best = best_of(ours)
    shutil.rmtree(ours / "checkpoints" / best)
    (ours / "evaluation.json").write_text('{"weights_sha256": "of others"}')
    code, said = gone_on(tmp_path, config)
    assert code == 0 and f"best.safetensors: cannot be made again, since {best} is gone or damaged" in said, said
    assert not (ours / "best.safetensors").exists() and (ours / "best-other.safetensors").read_bytes() == truth["model.safetensors"]
    assert "evaluation.json: was measured on weights that are gone, and is removed" in said
    assert (ours / "evaluation.json").read_bytes() == truth["evaluation.json"]


def at_first_update(act):
    def update(self, images, **means):
        act()
    return patch.object(RunProgress, "update", update)


tiny = dict(limit=64, batch_size=16, epochs=2, img_size=32, entropy_warmup=0, model_kwargs=dict(depth=1, embed_dim=24, num_heads=2, patch_size=8),
            experiment="run", device="cpu", picture_interval=9)


def waits(output):
    "A run that comes to its first update, says so and does no more."
    torch.set_num_threads(1)                                 # threads that ran before the fork are not in the child, which would wait for them
    with quick(), at_first_update(lambda: ((output / "began").touch(), time.sleep(600))), open(os.devnull, "w") as out:
        se.train(output=str(output), console=Console(file=out), plot=False, **tiny)


@pytest.mark.parametrize("system", [True, False], ids=["flock", "record"])
def test_one_process_at_a_time(tmp_path, monkeypatch, capsys, system):
    if not system:
        monkeypatch.setattr(files, "fcntl", None)            # Windows, and file systems without locks
    child = processes.Process(target=waits, args=(tmp_path,))
    child.start()
    until((tmp_path / "began").exists, child)
    assert child.is_alive()
    before = sorted(p for p in (tmp_path / "run").rglob("*"))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"in use: process {child.pid} on {platform.node()} has had it since 20" in said and said.count("\n") == 1
    assert sorted(p for p in (tmp_path / "run").rglob("*")) == before
    child.kill()
    exit_codes(child)
    held = files.hold(tmp_path / "run")                      # a dead holder has nothing
    held.release()
    assert not [p for p in (tmp_path / "run").iterdir() if p.name in (".lock", ".held")]


def test_a_changed_configuration_is_named_and_refused(tmp_path, capsys):
    def stop():
        signal.raise_signal(signal.SIGHUP)
    with quick(), at_first_update(stop):
        run = se.train(output=str(tmp_path), plot=False, **tiny)
    assert run.stopped == "SIGHUP" and len(jobs.checkpoints(run.folder)) == 1
    text = (run.folder / "config.yaml").read_text()
    for old, new in {"\nlr: 0.001": "\nlr: 0.5", "\nseed: 42": "\nseed: 7", "\nepochs: 2": "\nepochs: 1", "\nworkers: 0": "\nworkers: 1"}.items():
        assert old in text
        text = text.replace(old, new)
    (run.folder / "config.yaml").write_text(text)
    capsys.readouterr()
    assert main(["train", "--resume", str(run.folder)]) == 2
    said = capsys.readouterr().err
    assert all(what in said for what in ("lr was 0.001, is 0.5", "seed was 42, is 7", "epochs was 2, is 1", "--allow-changes")) and "workers was" not in said
    assert said.count("\n") == 1 and len(jobs.checkpoints(run.folder)) == 1
    older = {**jobs._versions(), "torch": "1.0"}
    with patch.object(jobs, "_versions", lambda: older), at_first_update(stop), quick():
        code = main(["train", "--resume", str(run.folder), "--allow-changes"])
    assert code == 128 + signal.SIGHUP and "going on so, as asked" in capsys.readouterr().out
    with quick():
        after = se.resume(run.folder, plot=False, workers=0)
    assert len(after.rows) == 1 and after.rows[0]["lr"] > .01    # the old one was at most 0.001
    assert "was trained with torch 1.0 (here " in capsys.readouterr().out
    (run.folder / "config.yaml").write_text(text.replace("opt: adamw", "opt: sgd"))
    with pytest.raises(ValueError, match="opt was 'adamw', is 'sgd'; another optimiser cannot take over"):
        se.resume(run.folder, allow_changes=True)


def test_every_update_killed_once(tmp_path, uninterrupted):
    "Ten kills, each in a later checkpoint than the one before: after the bytes, before the name."
    for k in range(10):
        child = start(tmp_path, settings=everything, point=("state", 1 if k == 0 else 2))
        code, = exit_codes(child)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert k >= 6
    assert_same(state(whole(tmp_path)), uninterrupted[0])


def test_signals_save_and_go_on(tmp_path, uninterrupted):
    truth, seconds = uninterrupted
    codes, said, begun = [], tmp_path / "said", tmp_path / "run" / "pictures" / "epoch-0000.png"
    said.touch()
    for k in range(5):
        began = len(said.read_text().splitlines())
        child = start(tmp_path, settings={**everything, "recovery_interval": 0}, said=said)
        until(lambda k=k, began=began: len(said.read_text().splitlines()) > began or begun.exists() and not k, child)
        time.sleep(.1 + seconds * .05)                       # it has begun, or said that it goes on
        if child.is_alive():
            os.kill(child.pid, (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[k % 3])
        codes += exit_codes(child)
    assert 3 in codes and set(codes) <= {0, 3}, (codes, said.read_text())
    assert "saved; go on with resume(" in said.read_text()
    ours = state(whole(tmp_path))
    assert_same(ours, truth)


def test_loading_processes_do_not_matter(tmp_path, uninterrupted):
    "Killed with two of them, gone on with none."
    child = start(tmp_path, settings={**everything, "workers": 2}, point=("state", 5))
    assert exit_codes(child) == [-signal.SIGKILL] and len(jobs.checkpoints(tmp_path / "run")) == 2
    for c in (tmp_path / "run").glob("config.yaml"):
        c.write_text(c.read_text().replace("workers: 2", "workers: 0"))
    assert_same(state(whole(tmp_path)), uninterrupted[0])


def test_two_processes_one_of_them_killed(tmp_path):
    settings = {**everything, "grad_accum_steps": 1}
    PartialState(cpu=True)                                   # accelerate has been used here before, by one process alone
    children = pair(tmp_path / "whole", settings)
    assert exit_codes(*children) == [0, 0]
    said = tmp_path / "rank0", tmp_path / "rank1"
    for victim, point in [(1, ("write", 2)), (0, ("state", 2)), (1, ("write", 2)), (0, ("sync", 30)), (1, ("write", 2))]:
        children = pair(tmp_path / "killed", settings, [point if r == victim else None for r in range(2)], said)
        codes = exit_codes(*children, seconds=90)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1       # and does not wait for ever
    children = pair(tmp_path / "killed", settings)
    assert exit_codes(*children) == [0, 0]
    assert_same(state(tmp_path / "killed" / "run"), state(tmp_path / "whole" / "run"))
    assert "another process of this run ended" in said[0].read_text()


def test_two_processes_asked_to_stop(tmp_path, uninterrupted):
    "Only one of them is asked; both save at the same update. Then one process goes on alone, with twice the accumulation."
    settings = {**everything, "grad_accum_steps": 1}
    children = pair(tmp_path, settings, hook=slow)
    until((tmp_path / "run" / "pictures" / "epoch-0000.png").exists, *children)
    os.kill(children[1].pid, signal.SIGTERM)
    assert exit_codes(*children, seconds=90) == [3, 3]
    with pytest.raises(ValueError, match=r"makes an update from 16 pictures; here it would be 8 \(1 process\(es\)\): start as many as before \(2\)"):
        se.resume(tmp_path / "run")
