"""A run that is killed between two writes, or at any moment, and what is left of it, file by file."""
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
import yaml
from kinds import grey_noise
from runs import assert_same, everything, exit_codes, processes, quick

from spatial_entropy.commands import main
from spatial_entropy.training import evaluating as evaluation

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def pictures(root, n=24):
    "An image folder of two classes."
    draw = random.Random(0)
    for c in "ab":
        (root / c).mkdir(parents=True)
        for i in range(n):
            noise = grey_noise(i, 30 + 50 * (c == "b"))
            noise.paste((draw.randrange(256), 90, 40), (8, 8, 20 + i % 9, 24))
            noise.save(root / c / f"{i}.png")
    return root


def settings(root, **more):
    "A file of settings: workers, Mixup, CutMix, average, accumulation, a checkpoint after every update."
    text = {**everything, "limit": None, "data": str(pictures(root / "data")), "epochs": 3, "workers": 2, **more}
    text |= dict(lr=1e-5)                                   # top-1 stays as it is, so that the first epoch is the best, not the last
    for name in ("experiment", "limit"):
        text.pop(name)
    (root / "settings.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    return root / "settings.yaml"


def writes(then):
    "Call `then` before every change of the file system below this folder that Python makes."
    here, me = os.getcwd(), os.getpid()

    def hook(event, args):
        if event not in WRITES and not (event == "open" and isinstance(args[2], int) and args[2] & CHANGES):
            return
        if os.getpid() == me and isinstance(args[0], str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(args[0])).startswith(here):
            then(event, args)
    sys.addaudithook(hook)


assert evaluation.evaluate  # imported once, before the forks


def work(folder, config, at):
    "The command, in its own folder; killed before its n-th write, or never, and then it says how many there were."
    os.chdir(folder)
    torch.set_num_threads(1)
    done = []

    def count(event, args):
        done.append(event)
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    writes(count)
    there = Path("runs/run").exists()
    line = ["--resume", "runs/run"] if there else ["--config", str(config), "--output", "runs", "--experiment", "run"]
    with open("../said", "a", encoding="utf-8") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), quick():
        code = main(["train", *line])
    os.chdir("..")                                          # what follows is not counted
    Path("writes").write_text(str(len(done)))
    os._exit(code)


def run(folder, config, at=None, after=None):
    "A process that does it: killed before its n-th write or after some seconds. Its exit code."
    (folder / "here").mkdir(parents=True, exist_ok=True)
    child = processes.Process(target=work, args=(folder / "here", config, at))
    child.start()
    if after is not None:
        child.join(after)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
    return exit_codes(child)[0]


def content(path):
    "What must be the same: all of a file but the two times in the table, and what follows from them."
    if path.name == "metrics.csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in rows]
    if path.name == "place.pt":
        ours = torch.load(path, weights_only=True)
        for row in ours["place"]["rows"]:
            row.pop("seconds"), row.pop("images_per_s")
        return ours
    if path.name == "manifest.json":
        listed = json.loads(path.read_text())
        listed.pop("sha256"), listed["files"].pop("place.pt")
        return listed
    return path.read_bytes()


def files(run):
    return {str(p.relative_to(run)): p for p in sorted(run.rglob("*")) if not p.is_dir()}


def moments(n, writes, seconds, seed=0):
    "Kills: between writes, spread over all of them, and at random times."
    draw = random.Random(seed)
    third = n // 3
    spread = [round(1 + (writes - 1) * k / max(n - third - 1, 1)) for k in range(n - third)]
    return [dict(at=w) for w in spread] + [dict(after=draw.uniform(.02, seconds)) for _ in range(third)]


def different(run, truth):
    "The files that are not those of the uninterrupted run."
    ours, found = files(run), []
    for name in sorted(truth.keys() | ours.keys()):
        try:
            assert_same(content(ours[name]), truth[name])
        except (AssertionError, KeyError) as e:
            found.append(f"{name}: {str(e)[:100]}")
    return found


def whole(folder, config):
    "The uninterrupted run: what its files hold, and how many writes made them."
    assert run(folder, config) == 0, (folder / "said").read_text()
    there = folder / "here" / "runs" / "run"
    return {name: content(p) for name, p in files(there).items()}, int((folder / "writes").read_text())


def kill_and_go_on(folder, config, moment, truth):
    "Killed at this moment, gone on with to the end: whether it was killed, and which files are different then."
    code = run(folder, config, **moment)
    assert code in (0, -signal.SIGKILL), (moment, code, (folder / "said").read_text())
    again = run(folder, config)
    said = (folder / "said").read_text()
    assert again == 0, (moment, again, said[-2000:])
    found = different(folder / "here" / "runs" / "run", truth)
    found += [f"{p}: left behind" for p in (folder / "here").rglob(".*")]
    shutil.rmtree(folder)
    return code == -signal.SIGKILL, found
