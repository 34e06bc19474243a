"""What benchmarks/gpu_parts.py does on a GPU, small, on the CPU: the kernels in Triton's interpreter. Run in a process of its own by test_on_gpu.py."""
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore", module="triton")

import gpu_parts
import torch

from spatial_entropy.measure import operators

folder = Path(sys.argv[1])
operators._kernels = lambda device: gpu_parts.kernels
FEW = dict(device="cpu", shapes=[(5, 7)], kinds=("mix", "broken", "constant"), B=1)


def run(name, do):
    gpu_parts.run_part(name, do, folder, device="cpu")
    return json.loads((folder / f"{name}.0.json").read_text(encoding="utf-8"))


def check_values_right_and_wrong():
    one = run("values", lambda save, ready: gpu_parts.check_values(save, 0, 3, **FEW))         # its own two of the six
    assert one["complete"] and one["failing"] == [] and one["cases"] == 12 and one["maps"] == 72 and one["kernels"] == "triton", one
    right = operators._kernels
    module = type("cuda", (), {k: staticmethod(getattr(gpu_parts.kernels, k)) for k in gpu_parts.kernels.__all__})
    module.entropy_and_gradient = staticmethod(lambda *a: tuple(t + .01 for t in gpu_parts.kernels.entropy_and_gradient(*a)))
    operators._kernels = lambda device: module
    wrong = run("values", lambda save, ready: gpu_parts.check_values(save, 0, 6, **FEW))
    operators._kernels = right
    assert len(wrong["failing"]) == wrong["cases"] == 6 and "failed" not in wrong, wrong
    assert wrong["failing"][0].keys() == {"shape", "kind", "dtype", "k", "connectivity", "error"}, wrong


def check_behaviour():
    facts = ("deterministic", "recorded", "strides", "scaler")
    gpu_parts.maps_of = lambda kind, B, H, h, w, seed=0, real=gpu_parts.maps_of: real(kind, min(B, 2), 2, min(h, 9), min(w, 9), seed)
    said = run("behaviour", lambda save, ready: gpu_parts.check_behaviour(save, "cpu", facts))
    assert [f["fact"] for f in said["failing"]] == ["recorded"], said       # which needs a GPU, and does not keep the others from being tried
    assert {"deterministic", "scaler"} <= said["facts"].keys(), said


def check_what_is_timed():
    tuned = {s: (1, 1, 3, 3) for s in gpu_parts.TUNED}
    begun = []
    said = run("growth", lambda save, ready: gpu_parts.growth(save, lambda: begun.append(1), "cpu", (3, 5), 60))
    assert begun and {"3.mix", "5.dots", "5.copy"} <= said.keys() and "error" not in str(said), said
    said = run("tune", lambda save, ready: gpu_parts.tune(save, ready, "cpu", tuned, slice(0, None, 17), 0))
    assert len(said["rows"]) == 5 and said["best"].keys() == tuned.keys() and "failed" not in str(said), said


check_values_right_and_wrong()
check_what_is_timed()
if "--strides" in sys.argv: check_behaviour()
torch.set_num_threads(1)
print("done")
