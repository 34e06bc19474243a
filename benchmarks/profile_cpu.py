"""Where the time of the fused CPU kernel goes: stage after stage is added, and the differences are the stages' own times.

    python benchmarks/profile_cpu.py [-o FILE]

One thread, process CPU time, the loads interleaved, the least of 150 repeats (what the code costs when nothing disturbs it). Nanoseconds a cell.
"""
import argparse
import time

import numpy as np
import torch
from loss import machine_facts, make_maps
from numba import njit

from spatial_entropy.measure import cpu as k
from spatial_entropy.training.files import write_json

STAGES = ("load", "pack", "cut and join", "settle", "weigh", "logarithms", "paint")
LOADS = [((256, 6, 14, 14), kind) for kind in ("mix", "white", "dots", "spiral")]
LOADS += [(shape, "mix") for shape in ((64, 12, 37, 37), (8, 16, 64, 64), (2, 16, 128, 128))]


@njit
def run(flat, shape, stages, g):
    "All maps, up to a number of stages; returns something that depends on all of it, and the number of pieces."
    B, H, h, w = shape
    n = h*w
    d, bits, mass = np.zeros(n + 64), np.zeros(n//64 + 2, np.uint64), np.empty(h*((w + 1)//2 + w//64 + 1))
    pieces, row, base = k._room(h, w)
    kept, count, all_pieces = 0., 0, 0
    for i in range(B*H):
        total, size = k._load_map(flat, i*n, w, w, 1, np.float64(flat[i*n]), 1., d)
        kept += size
        if stages > 1: k._pack(d, total/n, bits)
        if stages > 2: count = k._regions(bits, h, w, 1, pieces, row, base)
        all_pieces += count
        if stages > 3 and k._settle(pieces[2], count) < 2: continue
        if stages > 4: A = k._masses(d, total/n, count, pieces, mass)
        if stages > 5: E = k._entropy(mass, A, count)
        if stages > 6: k._gradient(g[i], -1/A, 1., E, count, pieces, mass)
    return kept, all_pieces


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-o", "--output", help="a JSON file")
    output, best, pieces = p.parse_args().output, {}, {}
    torch.set_num_threads(1)
    maps = {(shape, kind): make_maps(kind, shape).numpy().reshape(-1) for shape, kind in LOADS}
    for _ in range(151):                                             # the first compiles
        for case, flat in maps.items():
            g = np.empty((case[0][0]*case[0][1], case[0][2]*case[0][3]), np.float32)
            for stages in range(1, 8):
                start = time.process_time()
                _, pieces[case] = run(flat, case[0], stages, g)
                took = 1e9*(time.process_time() - start)/flat.size
                best[case, stages] = min(took, best.get((case, stages), 1e9))
    rows = []
    for case in maps:
        times = [best[case, s] for s in range(1, 8)]
        own = dict(zip(STAGES, [times[0], *(b - a for a, b in zip(times, times[1:]))]))
        rows.append(dict(shape=case[0], kind=case[1], pieces_a_map=pieces[case]/(case[0][0]*case[0][1]), ns_a_cell=times[-1], stages=own))
        print("×".join(map(str, case[0])), case[1], f"{rows[-1]['pieces_a_map']:.0f} pieces a map, {times[-1]:.2f} ns a cell:",
              ", ".join(f"{s} {t:.2f}" for s, t in own.items()))
    found = dict(machine=machine_facts(torch.device("cpu")), rows=rows)
    if output: write_json(output, found)


if __name__ == "__main__":
    main()
