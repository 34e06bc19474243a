"""What lies above the mean: how much of it is object, and how much of the object it covers; read on the page nbs/93_tuning.ipynb.

    python benchmarks/trade.py FOLDER [-o FILE]

FOLDER is what `spatial-entropy compare` left behind, weights included. Runs on the built-in pictures only, whose masks are known.
"""
import argparse
import re
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from spatial_entropy.attention.tap import AttentionTap
from spatial_entropy.commands import Parser, lenient_output, outcome
from spatial_entropy.data import drawn_sets, mask_pairs
from spatial_entropy.measure.regions import above_mean
from spatial_entropy.training.files import write_json
from spatial_entropy.training.models import load_run


def shares(maps, cover):
    "Mean precision and recall of the cells above the mean; maps (B, H, h, w), the object's share of each cell (B, 1, h, w)."
    on = above_mean(maps).double()
    hit = (on * cover).sum((-2, -1))
    return dict(precision=round((hit / on.sum((-2, -1))).mean().item(), 4), recall=round((hit / cover.sum((-2, -1))).mean().item(), 4))


@torch.no_grad()
def trade(run, pictures):
    "A line for one run."
    model, config, facts = load_run(str(run), needed=("mean", "std"))
    if config.data not in drawn_sets:
        raise ValueError(f"{run}: was trained on {config.data}, expected one of {', '.join(drawn_sets)}, whose masks are known")
    pairs = mask_pairs(config.data, config.img_size, tuple(facts["mean"]), tuple(facts["std"]))
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:pictures].tolist()
    x, masks = (torch.stack(parts) for parts in zip(*(pairs[i] for i in chosen), strict=True))
    with AttentionTap(model) as tap:
        model(x)
    maps = tap.maps()
    arm, seed = re.fullmatch(r"(.+)-seed(\d+)", run.name).groups()
    return dict(arm=arm, seed=int(seed), pictures=pictures, **shares(maps, F.adaptive_avg_pool2d(masks.double()[:, None], maps.shape[-2:])))


def prepare(args):
    "What is to be done."
    if not 1 <= args.pictures <= 1000:
        raise ValueError(f"pictures: got {args.pictures}, expected 1 to 1000")
    runs = sorted(path.parent for path in Path(args.folder).glob("*-seed*/evaluation.json"))
    if not runs:
        raise FileNotFoundError(f"{args.folder}: holds no finished run of a comparison")
    torch.set_num_threads(1)

    def work(): write_json(Path(args.output), [trade(run, args.pictures) for run in runs])
    return work


def parser():
    p = Parser("trade.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("folder", help="of a comparison")
    p.add_argument("-o", "--output", default="trade.json", help="a file")
    p.add_argument("--pictures", type=int, default=300, help="of each run, drawn by seed 0")
    return p


if __name__ == "__main__":
    with lenient_output():
        sys.exit(outcome("trade.py", prepare, parser().parse_args()))
