"""A frozen trunk, its last block learned anew under each regulariser; explained in nbs/92_last_block.ipynb.

    python benchmarks/last_block.py [--trunk RUN] [--masks FOLDER] [--seeds 5] [-o FOLDER]

The trunk sees each picture once, and what it says is kept. A run is then one block, one norm and one classifier: it takes minutes,
so that many weights and many seeds can be afforded. Runs that are there already are skipped: stop it at any time, start it again.
"""
import argparse
import copy
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

import spatial_entropy
from spatial_entropy.analysis.scoring import score_objects
from spatial_entropy.attention.surgery import drop_last_skip
from spatial_entropy.attention.tap import AttentionTap
from spatial_entropy.commands import Parser, lenient_output, outcome
from spatial_entropy.data import mask_pairs, shapes
from spatial_entropy.demo import demo_model
from spatial_entropy.loops.alternatives import attention_entropy, chance_corrected_entropy, head_disagreement, regularizer_names, regularizer_term
from spatial_entropy.loops.schedule import SCHEDULES, entropy_weight
from spatial_entropy.measure.operators import SpatialEntropyLoss
from spatial_entropy.training.comparing import MEASURES
from spatial_entropy.training.effects import Comparison
from spatial_entropy.training.evaluating import to_measure
from spatial_entropy.training.files import write_json
from spatial_entropy.training.models import load_run

NORM = dict(mean=(.5, .5, .5), std=(.5, .5, .5))


def apart(maps):
    "Spatial entropy and head disagreement, one to one: connected, and not all in the same place."
    return SpatialEntropyLoss()(maps) + head_disagreement(maps)


def softmaxed(maps):
    "The attention over the patches, (..., h, w): positive, so that a multiple of the mean is a threshold."
    return maps.flatten(-2).softmax(-1).view_as(maps)


def less_shuffled(maps):
    "Spatial entropy less that of the same maps with their cells in random order: what the values alone give is no gain."
    with torch.random.fork_rng(devices=()):                 # so that the order of the pictures is that of the other runs
        return chance_corrected_entropy(maps)


def spread(maps):
    "Spatial entropy less Shannon's of the attention, from 0 to 1: connected, and no sparser than it need be."
    return SpatialEntropyLoss()(maps) - attention_entropy(maps) / math.log(maps[0, 0].numel())


TERMS = {                               # of this study alone, beside those of regularizer_names
    "apart": apart,
    "softmax": lambda maps: SpatialEntropyLoss()(softmaxed(maps)),
    "softmax-1.5": lambda maps: SpatialEntropyLoss(times_mean=1.5)(softmaxed(maps)),
    "less-shuffled": less_shuffled,
    "spread": spread,
}


@dataclass(frozen=True)
class Setting:
    "One run."
    skip: str = "kept"                  # or "dropped"
    weight: float = 0.                  # λ, the peak
    schedule: str = "warmup"            # as in entropy_weight
    regularizer: str = "spatial-entropy"
    seed: int = 1
    epochs: int = 20

    def name(self):
        return f"{self.skip}-{self.regularizer}-{self.weight:g}-{self.schedule}-seed{self.seed}"


@dataclass
class Tokens:
    "What the trunk says of pictures: the input of the last block, and the labels."
    x: torch.Tensor                     # (n, tokens, width)
    label: torch.Tensor                 # (n,)


@torch.no_grad()
def tokens_of(model, batches):
    "What goes into the last block, of batches (pictures, labels)."
    kept, labels = [], []
    hook = model.blocks[-1].register_forward_pre_hook(lambda block, args: kept.append(args[0].clone()))
    try:
        for x, label in batches:
            model(x)
            labels.append(label)
    finally:
        hook.remove()
    return Tokens(torch.cat(kept), torch.cat(labels))


def renewed(model, setting):
    "A copy of the model whose last block, norm and classifier are as they are before training."
    torch.manual_seed(setting.seed)
    model = copy.deepcopy(model)
    for part in (model.blocks[-1], model.norm, model.head):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    if setting.skip == "dropped":
        drop_last_skip(model)
    return model


def maps_of(block, x, patches):
    "The similarity of [CLS] with every patch, (B, H, h, w): the row that AttentionTap reads."
    attention, normed = block.attn, block.norm1(x)
    qkv = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0][:, :, :1]), attention.k_norm(qkv[1][:, :, 1:])
    return (attention.scale * q @ k.mT).squeeze(2).unflatten(-1, patches)


def classified(model, x):
    "Scores of tokens that enter the last block."
    return model.head(model.norm(model.blocks[-1](x))[:, 0])


def learn(model, tokens, setting, batch_size=64, lr=5e-4, each=lambda epoch, model: None):
    "Train what `renewed` renewed. AdamW, one cycle, gradients of norm 1 at most."
    parts, patches = (model.blocks[-1], model.norm, model.head), model.patch_embed.grid_size
    weights = [w for part in parts for w in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=.05)
    updates = len(tokens.x) // batch_size
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=setting.epochs * updates)
    term = TERMS.get(setting.regularizer) or regularizer_term(setting.regularizer)
    for epoch in range(setting.epochs):
        λ = entropy_weight(epoch, setting.epochs, setting.weight, max(1, setting.epochs // 10), setting.schedule)
        for chosen in torch.randperm(len(tokens.x))[: updates * batch_size].view(updates, batch_size):
            x, label = tokens.x[chosen], tokens.label[chosen]
            loss = F.cross_entropy(classified(model, x), label)
            if λ and term is not None:
                loss = loss + λ * term(maps_of(model.blocks[-1], x, patches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.)
            optimizer.step()
            cycle.step()
        each(epoch, model)
    return model.eval()


@torch.no_grad()
def top1(model, tokens):
    "Share of pictures whose class is guessed first, in %."
    hits = torch.cat([classified(model, x).argmax(-1) for x in tokens.x.split(256)]) == tokens.label
    return 100 * hits.float().mean().item()


def scored(model, tokens, pairs):
    "Top-1, and the scores of objects beside chance: of the best head of each picture, and of the mean head."
    found = dict(top1=top1(model, tokens))
    scores = score_objects(model, pairs, batch_size=64, surrogates=2)
    for heads in ("best", "mean"):
        for line in scores.summary(heads):
            ends = line.get("above_chance", {})
            above = dict(above=ends.get("mean"), low=ends.get("low"), high=ends.get("high"))
            chance = None if math.isnan(line["chance"]) else line["chance"]
            found[f"{line['score']}_{heads}"] = dict(own=line["own"], chance=chance, **above)
    return found


def built_in(pictures, measured=1000, run=None):
    "Demo model, or a run's on the same pictures; tokens of so many to learn from and to be measured on, pictures with masks."
    model = load_run(run)[0] if run else demo_model()
    part = {}
    for name, split, n, seed in (("train", "train", pictures, 1), ("val", "val", measured, 0)):
        drawn = shapes(n, split, 112, seed)
        images = torch.tensor(drawn.images).permute(0, 3, 1, 2)
        batches = zip(images.split(64), torch.tensor(drawn.labels).split(64))
        part[name] = tokens_of(model, ((x.float() / 127.5 - 1, label) for x, label in batches))
    return model, part["train"], part["val"], mask_pairs("shapes", 112, **NORM)


def of_run(run, pictures, masks):
    "The same of a run's folder and a folder with images/ and masks/."
    model, config, facts = load_run(run, needed=("mean", "std"))
    norm = dict(mean=tuple(facts["mean"]), std=tuple(facts["std"]))
    part = {}
    for split in ("train", "val"):
        loader = to_measure(None, config, split, norm).val
        seen, batches = 0, []
        for x, label in loader:
            batches.append((x, label))
            seen += len(x)
            if split == "train" and seen >= pictures:
                break
        part[split] = tokens_of(model, batches)
    return model, part["train"], part["val"], mask_pairs(masks, config.img_size, **norm)


def facts():
    "With what it was measured."
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            encoding="utf-8").stdout.strip()
    return dict(date=time.strftime("%Y-%m-%d"), commit=commit, torch=torch.__version__, timm=timm.__version__, python=platform.python_version(),
                spatial_entropy=spatial_entropy.__version__, machine=platform.machine(), threads=torch.get_num_threads())


def check_maps(model, pairs):
    "The rows computed here are those of the tap."
    x = torch.stack([pairs[i][0] for i in range(2)])
    kept = tokens_of(model, [(x, torch.zeros(2))]).x
    with AttentionTap(model) as tap, torch.no_grad():
        model(x)
    ours = maps_of(model.blocks[-1], kept, model.patch_embed.grid_size)
    torch.testing.assert_close(ours, tap.maps(), rtol=1e-4, atol=1e-4)


TITLES = MEASURES | {f"{m}_mean_above": (f"{name} above chance, mean head", 3) for m, name in (
    ("energy_pointing", "mass on the object"), ("pointing", "pointing"), ("pixel_auc", "pixel AUC"), ("jaccard", "Jaccard"))}


def arm_of(run):
    "Such as 'kept', 'dropped, λ 0.1' or 'dropped, entropy 0.1'."
    term = "λ" if run["regularizer"] == "spatial-entropy" else run["regularizer"]
    return f"{run['skip']}, {term} {run['weight']:g}" if run["weight"] else run["skip"]


def row_of(run):
    "What was measured of a run, called as in a comparison: of the best head, and of the mean one; scores of objects above chance."
    row = dict(arm=arm_of(run), seed=run["seed"], top1=run["top1"], entropy=run["entropy_mean"]["own"],
               entropy_chance=run["entropy_mean"]["chance"], density=run["density_mean"]["own"])
    for m in ("energy_pointing", "pointing", "pixel_auc", "jaccard"):
        row |= {f"{m}{end}_above": run[f"{m}_{head}"]["above"] for head, end in (("best", ""), ("mean", "_mean")) if f"{m}_{head}" in run}
    return row


def read_runs(folder):
    "The runs in a folder that this program wrote, as a Comparison."
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return Comparison([row_of(run) for run in runs], TITLES)


def settings_of(args):
    "Every run that is asked for, the first seed of all before the second."
    found = []
    for seed, skip, name in product(range(1, args.seeds + 1), args.skip, args.regularizer):
        found += [Setting(skip, 0., "constant", "none", seed, args.epochs)]
        found += [Setting(skip, w, s, name, seed, args.epochs) for w, s in product(args.weights, args.schedule)]
    return list(dict.fromkeys(found))


def prepare(args):
    "What is to be done."
    if bool(args.trunk) != bool(args.masks):
        raise ValueError("trunk and masks: got one of them, expected both or none")
    if args.seeds < 1 or args.pictures < 64 or args.epochs < 1:
        raise ValueError("seeds, pictures, epochs: expected at least 1, 64, 1")
    if min(args.weights) <= 0:
        raise ValueError(f"weights: got {min(args.weights)}, expected numbers above 0; runs without a regulariser are among the runs anyway")
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    left = [s for s in settings_of(args) if not (output / f"{s.name()}.json").exists()]
    return lambda: measure(args, output, left)


def measure(args, output, left):
    "Run by run."
    print(f"{len(left)} run(s) to do", flush=True)
    if not left:
        return
    drawn = args.masks in (None, "shapes")
    model, train, val, pairs = built_in(args.pictures, run=args.trunk) if drawn else of_run(args.trunk, args.pictures, args.masks)
    check_maps(model, pairs)
    about = dict(facts(), trunk=args.trunk or "demo", masks=args.masks or "shapes", pictures=len(train.x), validation=len(val.x), with_masks=len(pairs))
    for setting in left:
        start = time.process_time()
        trained = learn(renewed(model, setting), train, setting)
        found = scored(trained, val, pairs)
        write_json(output / f"{setting.name()}.json", {**asdict(setting), **found, "cpu_seconds": round(time.process_time() - start, 1), **about})
        auc = found["pixel_auc_mean"]
        print(f"{setting.name()}: top-1 {found['top1']:.1f} %, E {found['entropy_mean']['own']:.3f} (chance {found['entropy_mean']['chance']:.3f}), "
              f"AUC above chance {auc['above']:+.3f}", flush=True)


def parser():
    p = Parser("last_block.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--trunk", help="a run folder; the demo model without it")
    p.add_argument("--masks", help="a folder with images/ and masks/ to judge a run's trunk by; shapes, for one that was trained on the drawn pictures")
    p.add_argument("--weights", type=float, nargs="+", default=[.01, .03, .1, .3, 1.], help="λ, each above 0")
    p.add_argument("--skip", nargs="+", default=["kept", "dropped"], choices=("kept", "dropped"), help="the last block's skip")
    p.add_argument("--schedule", nargs="+", default=["warmup"], choices=SCHEDULES, help="of λ")
    p.add_argument("--regularizer", nargs="+", default=["spatial-entropy"], choices=[*regularizer_names(), *TERMS], help="the term")
    p.add_argument("--seeds", type=int, default=5, help="1 to this")
    p.add_argument("--epochs", type=int, default=20, help="over the kept tokens")
    p.add_argument("--pictures", type=int, default=2000, help="to learn from")
    p.add_argument("--threads", type=int, default=1, help="of torch")
    p.add_argument("-o", "--output", default="results/last_block/demo", help="a folder; a file for each run")
    return p


if __name__ == "__main__":
    with lenient_output():
        sys.exit(outcome("last_block.py", prepare, parser().parse_args()))
