"""Compile every CUDA kernel that the package launches, for GPUs that need not be there.

    python tools/compile_kernels.py [80 90]

The package's own calls are made on CPU tensors, and each launch compiles instead of running, so what is compiled is what a launch would use.
Prints registers, spilled bytes, shared memory; exit code 1 if a kernel spills more than 64 bytes a thread.
"""
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from spatial_entropy.measure import cuda as kernels


@contextmanager
def compiling(capability, built):
    "Inside, a launch compiles into `built`, once for each specialisation, and does not run."
    target = GPUTarget("cuda", capability, 32)
    backend, launch = make_backend(target), JITFunction.run
    known = backend.parse_options({}).__dict__                  # which of what a launch adds this Triton knows
    usual = dict(debug=False, instrumentation_mode="", fpsan_homomorphic_casts=False)

    def run(self, *args, grid, warmup, **kwargs):
        kwargs.update({k: v for k, v in usual.items() if k in known})
        bound, special, _ = create_function_from_signature(self.signature, self.params, backend)(*args, **kwargs)
        key = self.__name__, str(special), kwargs["num_warps"]
        if key not in built:
            options, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, special, None)
            built[key] = compile(ASTSource(self, signature, constexprs, attrs), target=target, options=options.__dict__)
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch


def call_everything():
    "One call for each path that compiles differently."
    grids = {torch.float32: [(14, 14), (7, 7), (24, 24), (1, 1), (64, 64), (1, 1200)]}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for h, w in grids.get(dtype, [(14, 14), (64, 64)]):
            maps = torch.zeros(1, 2, h, w, dtype=dtype)
            for connectivity in (8, 4) if (h, w) in ((14, 14), (64, 64)) else (8,):
                for need in (True, False) if connectivity == 8 and dtype == torch.float32 else (True,):
                    E, g = kernels.entropy_and_gradient(maps, connectivity, 1.1, 1e-3, need)
                    kernels.mean_entropy(E)
                if dtype == torch.float32:
                    kernels.label_regions(maps > 0, connectivity)
            kernels.scale_gradient(kernels.entropy_and_gradient(maps, 8, 1., 1e-3, True)[1], E, dtype)


def resources(binary):
    "Registers, bytes of stack (spills) and of shared memory."
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        use = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, encoding="utf-8").stdout
    got = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", use)}
    return dict(registers=got.get("REG"), spilled=got.get("STACK", 0) + got.get("LOCAL", 0), shared=binary.metadata.shared)


def main(capabilities):
    worst = 0
    for capability in capabilities:
        start, built = time.time(), {}
        with compiling(capability, built):
            call_everything()
        for (name, special, warps), binary in built.items():
            facts = resources(binary)
            worst = max(worst, facts["spilled"])
            types = " ".join(re.findall(r"\*\w+", special))
            print(f"sm_{capability} {name:17} {types:40} warps {warps}  {facts}")
        print(f"sm_{capability}: {len(built)} kernels in {time.time() - start:.0f} s")
    return int(worst > 64)


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]] or [80, 90]))
