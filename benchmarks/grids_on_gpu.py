"""Do the runs of several grids side by side on one GPU, within a time limit: train each, then measure it once.

    PYTHONPATH=. python3 benchmarks/grids_on_gpu.py PLAN.yaml -o FOLDER --results TARS --jobs 15 --seconds 400

It is for runs so small that a GPU waits for the processor: a process a core, started by forking one that has imported everything and read every
picture. PLAN.yaml is a list in order of worth; an entry has `grid` (a file of `spatial-entropy compare`), `seconds` (what a run takes, a guess), and
may have `arms` and `seeds` (only these) and `tests` ({file name: arguments of `evaluate`}). A run whose evaluation.json and tests are there is done.
What has ended goes into TARS/runs.tar.gz as it comes, the weights of seed 1 into TARS/weights-1.tar, -2, …; a run that does not fit into the time is
not begun.

Sixteen processes share one H200 badly: 3,800 pictures a second in all with half a million weights, the GPU at 99 %, switching between them.
"""
import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported: a forked process must have neither its threads nor a GPU that was asked for in another way than by NVML.
os.environ |= dict(OMP_NUM_THREADS="1", PYTORCH_NVML_BASED_CUDA_CHECK="1")

import matplotlib
import torch
import yaml
from rich.console import Console

from spatial_entropy.data import MaskPairs, mask_pairs
from spatial_entropy.training.archives import sources
from spatial_entropy.training.batches import Pictures
from spatial_entropy.training.comparing import planned, read_grid
from spatial_entropy.training.evaluating import keep_scores
from spatial_entropy.training.jobs import epochs_done
from spatial_entropy.training.loop import resume, train
from spatial_entropy.training.sources import Source

matplotlib.use("agg")
torch.set_num_threads(1)
KEPT = "config.yaml", "facts.json", "metrics.csv", "evaluation.json"


@dataclass
class Job:
    "One run of one entry of the plan."
    run: object                         # a Planned
    entry: int
    masks: str | None
    tests: dict

    def files(self):
        return [self.run.folder / name for name in (*KEPT, *self.tests)]

    def done(self):
        return all(f.exists() for f in self.files())


def read_plan(path, output):
    "The jobs that are left, in order of worth: an entry after the other, a seed after the other."
    entries, jobs = yaml.safe_load(Path(path).read_text(encoding="utf-8")), []
    for number, entry in enumerate(entries):
        grid = read_grid(entry["grid"])
        runs = [r for r in planned(grid, Path(output) / Path(entry["grid"]).parent.name)
                if r.arm in entry.get("arms", [r.arm]) and r.seed in entry.get("seeds", [r.seed])]
        jobs += [Job(r, number, grid.masks, entry.get("tests", {})) for r in sorted(runs, key=lambda r: r.seed)]
    seen = set()
    jobs = [j for j in jobs if not (j.run.folder in seen or seen.add(j.run.folder))]
    return entries, [j for j in jobs if not j.done()]


def kept(function, key):
    "The function, its answers kept by a key of its arguments."
    found = {}

    def asked(self, i):
        if (k := key(self, i)) in found:
            return found[k]
        answer = function(self, i)
        if k is not None and answer is not None:               # what could not be read is tried, and told, each time
            found[k] = answer
        return answer
    return asked


def keep_pictures():
    "From now on, read every picture and every mask once a process."
    file = lambda source, i: (str(source.root), source.name(i)) if hasattr(source, "root") else None    # drawn pictures have no file
    Source.open = kept(Source.open, file)
    MaskPairs.__getitem__ = kept(MaskPairs.__getitem__, lambda self, i: (str(self.home), self.size, str(self.transform), i))
    def unchanged(self, i):             # without augmentation a picture is the same each epoch
        return None if self.train or (at := file(self.source, i)) is None else (at, str(self.transform))

    Pictures.__getitem__ = kept(Pictures.__getitem__, unchanged)


def read_pictures(jobs):
    "Read them all, for the processes that are forked after; how many."
    sets = {j.run.config.data for j in jobs} | {t["data"] for j in jobs for t in j.tests.values() if "data" in t}
    masks = {(m, j.run.config.img_size) for j in jobs for m in (j.masks, *(t.get("masks") for t in j.tests.values())) if m}
    todo = [(source.open, i) for data in sorted(sets) for source in sources(data) if len(source) <= 6000 for i in range(len(source))]
    for folder, size in sorted(masks):
        pairs = mask_pairs(folder, size, (.5,) * 3, (.5,) * 3)
        todo += [(pairs.__getitem__, i) for i in range(len(pairs))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: one[0](one[1]), todo))
    return len(todo)


def do(job, console):
    "Train a run, then measure it; seconds of both."
    start, device, folder = time.time(), job.run.config.device, job.run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if epochs_done(folder) < job.run.config.epochs:
        begun = (folder / "config.yaml").exists()
        trained = resume(str(folder), console, plot=False) if begun else train(job.run.config, console, plot=False)
        if trained.stopped:
            raise SystemExit(f"stopped by {trained.stopped}")   # a run that has not ended is not measured
    middle = time.time()
    keep_scores(job.run.folder, masks=job.masks, device=device)
    for name, options in job.tests.items():
        keep_scores(job.run.folder, job.run.folder / name, device=device, **options)
    return middle - start, time.time() - middle


def expected(first, took):
    "Seconds of a run of each entry: as measured, 0 where none has ended; those that were guessed were off by as much as the others."
    off = max((t / f for f, t in zip(first, took) if t), default=1)
    return [t or f * off for f, t in zip(first, took)]


def work(number, jobs, taken, first, took, lock, until, output):
    "One process: the first job that nobody has taken and that will end in time, again and again."
    if multiprocessing.get_start_method() == "spawn":
        keep_pictures()
    log = open(Path(output) / f"process-{number}.log", "a", encoding="utf-8", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    while True:
        with lock:
            left, seconds = until - time.time(), expected(first, took)
            at = next((k for k, j in enumerate(jobs) if not taken[k] and seconds[j.entry] * 1.1 < left), None)
            if at is None:
                return
            taken[at] = 1
        job = jobs[at]
        try:
            trained, measured = do(job, Console(file=log, width=120))
            with lock:
                took[job.entry] = .5 * ((took[job.entry] or trained + measured) + trained + measured)
            (job.run.folder / "seconds.txt").write_text(f"{trained:.1f} {measured:.1f}\n", encoding="utf-8")
            taken[at] = 2
        except Exception:
            taken[at] = 3
            print(f"FAILED {job.run.folder}", flush=True)
            traceback.print_exc()


def pack(jobs, results, packed, limit=15_000_000):
    "Put what has ended since into the archives."
    results.mkdir(parents=True, exist_ok=True)
    new = [j for j in jobs if j.run.folder not in packed and j.done() and (j.run.folder / "seconds.txt").exists()]
    if not new:
        return
    for job in new:
        packed[job.run.folder] = job
    temporary = results / "runs.tmp"
    with tarfile.open(temporary, "w:gz") as tar:
        for job in packed.values():
            for f in (*job.files(), job.run.folder / "seconds.txt"):
                tar.add(f, "/".join(f.parts[-3:]))
    os.replace(temporary, results / "runs.tar.gz")
    for job in new:
        weights = job.run.folder / "model.safetensors"
        if job.run.seed != 1 or not weights.exists():
            continue
        number = 1
        while (tar := results / f"weights-{number}.tar").exists() and tar.stat().st_size + weights.stat().st_size > limit:
            number += 1
        if number <= 3:
            with tarfile.open(tar, "a") as t:
                t.add(weights, "/".join(weights.parts[-3:]))


def start_method(device):
    "fork, unless this process has touched the GPU by now, after which a forked one cannot use it."
    probe = multiprocessing.get_context("fork").Process(target=torch.zeros, args=(1,), kwargs=dict(device=device))
    probe.start()
    probe.join()
    return "spawn" if probe.exitcode else "fork"


def load():
    "What the GPU says of its load, in percent; empty without one."
    try:
        words = "nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader".split()
        return subprocess.run(words, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:
        return ""


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("plan")
    p.add_argument("-o", "--output", required=True, help="where the runs lie")
    p.add_argument("--results", required=True, help="where the archives are written")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--seconds", type=float, required=True, help="from now on")
    args = p.parse_args()
    start = time.time()
    until = start + args.seconds
    entries, jobs = read_plan(args.plan, args.output)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    if not jobs:
        return 0
    multiprocessing.set_start_method(start_method(jobs[0].run.config.device))
    keep_pictures()
    pictures = read_pictures(jobs) if multiprocessing.get_start_method() == "fork" else 0
    print(f"{len(jobs)} runs; processes start by {multiprocessing.get_start_method()}; {pictures} pictures read in {time.time() - start:.1f} s", flush=True)
    taken, lock = multiprocessing.Array("i", len(jobs), lock=False), multiprocessing.Lock()
    first, took = [float(e["seconds"]) for e in entries], multiprocessing.Array("d", len(entries), lock=False)
    given = jobs, taken, first, took, lock, until, args.output
    workers = [multiprocessing.Process(target=work, args=(n, *given), daemon=True) for n in range(args.jobs)]
    for w in workers:
        w.start()
    signal.signal(signal.SIGTERM, lambda *_: [w.terminate() for w in workers])
    packed, results = {}, Path(args.results)
    while any(w.is_alive() for w in workers) and time.time() < until:
        time.sleep(5)
        pack(jobs, results, packed)
        print(f"{time.time() - start:.0f} s: {list(taken).count(2)} done, {list(taken).count(1)} at work, {list(taken).count(3)} failed; "
              f"a run takes {[round(s) for s in expected(first, took)]} s; {load()}", flush=True)
    for w in workers:
        w.terminate()
    pack(jobs, results, packed)
    for f in sorted(Path(args.output).glob("process-*.log")):
        text = f.read_text(encoding="utf-8", errors="replace")
        if "FAILED" in text:
            print(f.name, text[text.index("FAILED"):][:3000], flush=True)
    return 1 if 3 in list(taken) else 0


if __name__ == "__main__":
    sys.exit(main())
