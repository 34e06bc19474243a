"""Check, measure and tune the CUDA kernels in one call, on a machine that has a GPU.

    PYTHONPATH=. python3 benchmarks/on_gpu.py -o FOLDER [--budget SECONDS] [--authors-code PATH] [--skip tune]

Needs the package's requirements and nothing of its development tools. What only checks (values, behaviour, taps) runs side by side; meanwhile, what
times something or needs all cores (growth, benchmark, step, runs, training, tune) loads and compiles, and then runs with nothing beside it, one
after the other. Every part has processes of its own and leaves FOLDER/PART.json, with the device, the versions, the commit, what failed, and what
was left out for want of time; FOLDER/PART.SHARE.log holds what it said. Exit code 1 if anything failed or a check was not finished. Four and a half
minutes on 16 cores.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARTS = Path(__file__).resolve().parent/"gpu_parts.py"
CHECKS = dict(values=6, behaviour=1, taps=6) # processes
TIMED = dict(growth=25, benchmark=70, step=40, runs=90, training=90, tune=60) # seconds at most, of a budget of 270, which not all fit into
LEAST = 8 # seconds: with fewer left, a part is not begun


class Process:
    "One share of a part, in a process group of its own."
    def __init__(self, part, share, of, folder, more=()):
        self.part, self.share, self.folder = part, share, folder
        words = [sys.executable, "-u", str(PARTS), part, str(folder), "--share", f"{share}/{of}", *more]
        threads = dict(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="4" if part in TIMED else "1")
        path = os.pathsep.join([str(PARTS.parent.parent), str(PARTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(folder/f"{part}.{share}.log", "w", encoding="utf-8") as log:
            self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                          env={**os.environ, "PYTHONPATH": path, **threads})

    def running(self): return self.child.poll() is None
    def ready(self): return (self.folder/f"{self.part}.ready").exists()

    def signal(self, number):
        try: os.killpg(self.child.pid, number)
        except (ProcessLookupError, PermissionError): pass

    def begin(self):
        self.signal(signal.SIGCONT)
        try: self.child.stdin.write(b"go\n"); self.child.stdin.flush()
        except OSError: pass                                            # it has died; its log says why

    def end(self):
        self.signal(signal.SIGKILL)                                     # and whoever it has started
        self.child.wait()

    def report(self):
        "What it has written, or the end of what it said."
        try: return json.loads((self.folder/f"{self.part}.{self.share}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError): pass
        said = (self.folder/f"{self.part}.{self.share}.log").read_text(encoding="utf-8", errors="replace")
        code = self.child.returncode
        return dict(part=self.part) if code == -signal.SIGKILL else dict(part=self.part, failed=f"share {self.share} ended with code {code}: {said[-2000:]}")


def merged(a, b, key=""):
    "Two shares' reports as one: lists are joined, what is counted is added, and of other numbers the larger counts."
    if isinstance(a, dict) and isinstance(b, dict): return {k: merged(a[k], b[k], k) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}
    if isinstance(a, list) and isinstance(b, list): return a + b
    if isinstance(a, bool) or isinstance(b, bool): return a and b
    if isinstance(a, int | float) and isinstance(b, int | float): return a + b if key in ("maps", "cases", "models", "done", "of") else max(a, b)
    return f"{a}\n{b}" if key == "failed" else a


def write(folder, report):
    text = json.dumps(report, indent=2) + "\n"
    (folder/f"{report['part']}.json").write_text(text, encoding="utf-8")


def closed(processes, folder, why):
    "End the part's processes, write its report and say a line. Returns (whether something failed, whether it was stopped)."
    part, late = processes[0].part, any(p.running() for p in processes)
    for p in processes: p.end()
    report = None
    for p in processes: report = p.report() if report is None else merged(report, p.report())
    if late: report["left out"] = f"what it had not done when it was stopped, {why}"
    write(folder, report)
    wrong = [json.dumps(f)[:300] for f in report.get("failing", [])]
    if "failed" in report: wrong.append(report["failed"].strip()[-600:])
    counts = ", ".join(f"{report[k]} {k}" for k in ("cases", "models") if k in report)
    words = [counts] if counts else []
    if wrong: words.append(f"{len(wrong)} FAILED")
    if late: words.append("stopped " + why)
    print(f"{part}: {'; '.join(words) or 'done'}, {report.get('seconds', '?')} s", *wrong[:8], sep="\n    ", flush=True)
    return bool(wrong), late


def waited(processes, until, enough=lambda p: False):
    "Wait until each has ended or has enough, or the time is over."
    while any(p.running() and not enough(p) for p in processes) and time.monotonic() < until: time.sleep(.1)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-o", "--output", required=True)
    p.add_argument("--budget", type=float, default=270, metavar="SECONDS", help="for everything; what does not fit is left out, the last parts first (270)")
    p.add_argument("--authors-code", metavar="PATH", help="a checkout of the authors' repository, to measure their loss too")
    p.add_argument("--timm-train", metavar="PATH", help="train.py of timm's repository, to measure beside our loop")
    p.add_argument("--skip", nargs="*", default=[], choices=(*CHECKS, *TIMED))
    args = p.parse_args(argv)
    began, folder = time.monotonic(), Path(args.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ready"): old.unlink()
    for old in folder.glob("*.*.json"): old.unlink()
    more = [w for flag in ("authors_code", "timm_train") if (at := getattr(args, flag)) for w in ("--" + flag.replace("_", "-"), str(Path(at).absolute()))]
    checks = {part: [Process(part, n, of, folder) for n in range(of)] for part, of in CHECKS.items() if part not in args.skip}
    timed = {part: Process(part, 0, 1, folder, ["--wait", *more]) for part in TIMED if part not in args.skip}
    whole = began + args.budget
    try: failed = measured(checks, timed, folder, began, whole, args.budget)
    finally:
        for q in [*timed.values(), *(q for some in checks.values() for q in some)]: q.end()
    for rest in [*folder.glob("*.ready"), *folder.glob("*.*.json")]: rest.unlink()
    print(f"{time.monotonic() - began:.0f} s in all; failed: {', '.join(failed) or 'nothing'}", flush=True)
    return 1 if failed else 0


def measured(checks, timed, folder, began, whole, budget):
    "First the checks, then what is timed, one after the other. Returns the parts that failed; a check that was stopped has not passed."
    failed, until = [], began + .4*budget
    for part, some in checks.items():
        waited(some, until)
        wrong, late = closed(some, folder, f"after {time.monotonic() - began:.0f} s")
        if wrong or late: failed.append(part if wrong else part + " (not finished)")
    waited(timed.values(), began + .5*budget, Process.ready)
    for q in timed.values():
        if not q.ready(): q.signal(signal.SIGSTOP)                      # goes on when it is its turn
    for part, q in timed.items():
        left = whole - time.monotonic()
        if left < LEAST and q.running():
            write(folder, {"part": part, "left out": f"{max(left, 0):.0f} s were left"})
            print(f"{part}: left out", flush=True); q.end()
            continue
        limit = min(TIMED[part]*max(1, budget/270), left)
        q.begin()
        waited([q], time.monotonic() + limit)
        if closed([q], folder, f"after {limit:.0f} s")[0]: failed.append(part)
    return failed


if __name__ == "__main__":
    sys.exit(main())
