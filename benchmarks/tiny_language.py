"""Trains the model of `demo_language_model` and asks which of its heads look at what is meant; explained in nbs/78_tiny_language.ipynb.

    python benchmarks/tiny_language.py [--seeds 1 2 3] [-o runs/tiny_language] [--results results/tiny_language] [--ship 1]

Two steps, as such models are made, for each seed. Its tower learns what a patch shows (the kind and the colour of the shape that covers
it). Then it is frozen, what it says of each picture is kept, and projector and language model learn to answer; of masks they
never hear. The questions of a picture are read in one pass, hidden from each other by the attention mask. What is there already
is skipped: stop it at any time, start it again. `--ship SEED` writes that seed's weights into the package, in half precision.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import spatial_entropy
from spatial_entropy.analysis.grounding import as_truth, score_grounding
from spatial_entropy.analysis.heads import Heads
from spatial_entropy.commands import Parser, lenient_output, outcome
from spatial_entropy.data import COLORS, KINDS, colored_shapes
from spatial_entropy.language.demo import PATCH, SIDE, WORDS, demo_config, demo_language_model, inputs_of, questions
from spatial_entropy.language.heads import rank_seen
from spatial_entropy.language.locating import best_heads, combined
from spatial_entropy.language.samples import text_maps
from spatial_entropy.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "spatial_entropy/demo_language.safetensors"
GRID, SAID = SIDE // PATCH, 8                            # cells a side; tokens of a question with its answer and </s>
PICTURES = GRID * GRID
RULES = ("share", "entropy", "both", "masks", "all")     # how heads are chosen


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


# ---- what there is to learn -------------------------------------------------------------------------------------------------------

def drawn(n):
    "Pictures (n, 3, S, S) uint8 and the things in each."
    pictures, things = zip(*colored_shapes(n, "train", SIDE))
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2), things


def pixels(x):
    return x.float() / 127.5 - 1


def patch_labels(things):
    "(2, n, h·w): the kind and the colour of what covers a patch, from 1; 0 for nothing, -100 where an edge runs."
    found = torch.zeros(2, len(things), PICTURES, dtype=torch.long)
    for i, own in enumerate(things):
        for t in own:
            covered = torch.tensor(t.mask).float().view(GRID, PATCH, GRID, PATCH).mean((1, 3)).flatten()
            for label, number in zip(found, (KINDS.index(t.kind), list(COLORS).index(t.color))):
                label[i][covered > .08] = -100
                label[i][covered >= .35] = number + 1
    return found


def turn(thing, about):
    "The tokens of a question, its answer and the end."
    asked = f"which colour is the {thing.kind} ? {thing.color}" if about == "colour" else f"which shape is painted {thing.color} ? {thing.kind}"
    return [WORDS.index(w) for w in (*asked.split(), "</s>")]


def turns_of(things, rng, n):
    "(n, 8) some of the questions about a picture."
    every = [turn(t, about) for t in things for about in ("colour", "shape")]
    return [every[i] for i in rng.permutation(len(every))[:n]]


# ---- to learn it ------------------------------------------------------------------------------------------------------------------

def stepped(parameters, loss, optimizer, step, steps, peak):
    "One step of AdamW: up over 60 steps, constant to a third, down to nothing."
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 60) * (1 - max(0, step / steps - .3) / .7 * .97)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.)
    optimizer.step()


def adamw(parameters, peak):
    return torch.optim.AdamW(parameters, peak, betas=(.9, .98), weight_decay=.02)


def learn_patches(model, pictures, things, steps, seed, batch=32, peak=2e-3):
    "Teach the tower what a patch shows; the share of patches on shapes whose kind and whose colour it knows."
    torch.manual_seed(seed)
    rng, labels, seen = np.random.default_rng(seed), patch_labels(things), []
    tower, kinds = model.model.vision_tower, len(KINDS) + 1
    head = nn.Linear(tower.config.hidden_size, 2 * kinds)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = adamw(parameters, peak)
    for step in range(steps):
        at = rng.integers(len(pictures), size=batch)
        guess = head(tower(pixels(pictures[at])).last_hidden_state[:, 1:]).unflatten(-1, (2, kinds))
        loss = sum(F.cross_entropy(guess[..., i, :].flatten(0, 1), labels[i, at].flatten()) for i in (0, 1))
        stepped(parameters, loss, optimizer, step, steps, peak)
        with torch.no_grad():
            on = labels[0, at] > 0
            seen.append([(guess[..., i, :].argmax(-1) == labels[i, at])[on].float().mean().item() for i in (0, 1)])
        if (step + 1) % 200 == 0:
            say("seed {}, tower, step {}: kind {:.2f}, colour {:.2f} of the patches on shapes".format(seed, step + 1, *np.mean(seen[-200:], 0)))
    return np.mean(seen[-200:], 0).tolist()


@torch.no_grad()
def features(model, pictures):
    "What the frozen tower says, (n, h·w, d) in half precision."
    return torch.cat([model.model.vision_tower(pixels(x)).last_hidden_state[:, 1:].half() for x in pictures.split(64)])


def layout(turns):
    "Places of the tokens, and (N, N) which see which: a turn sees the picture and itself, as if it were asked alone."
    n = PICTURES + 1
    place, block = torch.arange(n + turns * SAID), torch.zeros(n + turns * SAID, dtype=torch.long)
    for i in range(turns):
        own = slice(n + i * SAID, n + (i + 1) * SAID)
        place[own], block[own] = torch.arange(n, n + SAID), i + 1
    order = torch.arange(len(place))
    return place[None], (order[:, None] >= order) & ((block == 0) | (block[:, None] == block))


def spoken(model, kept, ids):
    "Logits (b, turns, 2, words) of the answers and of their ends, of ids (b, turns, 8)."
    b, turns, _ = ids.shape
    place, seen = layout(turns)
    embed, first = model.get_input_embeddings(), torch.full((b, 1), WORDS.index("<s>"))
    x = torch.cat([embed(first), model.model.multi_modal_projector(kept.float()), embed(ids.flatten(1))], 1)
    h = model.model.language_model(inputs_embeds=x, attention_mask=seen.expand(b, 1, -1, -1), position_ids=place.expand(b, -1)).last_hidden_state
    return model.lm_head(h[:, PICTURES + 1:].unflatten(1, (turns, SAID))[:, :, -3:-1])


def learn_words(model, kept, things, steps, seed, batch=24, turns=4, peak=2.5e-3):
    "Teach projector and language model to answer."
    torch.manual_seed(seed)
    rng, losses = np.random.default_rng(seed), []
    parts = model.model.multi_modal_projector, model.model.language_model, model.lm_head
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = adamw(parameters, peak)
    for step in range(steps):
        at = rng.integers(len(kept), size=batch)
        ids = torch.tensor([turns_of(things[i], rng, turns) for i in at])
        said = spoken(model, kept[at], ids)
        answer, end = (F.cross_entropy(said[:, :, i].flatten(0, 1), ids[:, :, i - 2].flatten()) for i in (0, 1))
        stepped(parameters, answer + .1 * end, optimizer, step, steps, peak)
        losses.append(answer.item())
        if (step + 1) % 100 == 0: say(f"seed {seed}, step {step + 1}: loss {np.mean(losses[-100:]):.3f}")


# ---- to judge it ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answered(model, processor, asked):
    "The words that are said first."
    logits = [model(**inputs_of(processor, asked[i:i + 100]), logits_to_keep=1).logits[:, -1] for i in range(0, len(asked), 100)]
    return [WORDS[i] for i in torch.cat(logits).argmax(-1)]


def accuracies(model, processor, n):
    "Right, and right had another thing of the picture been meant, on pictures of the validation set."
    found = {}
    for about in ("colour", "shape"):
        asked = questions(n, about=about)
        said = answered(model, processor, asked)
        found[about] = float(np.mean([s == q.answer for s, q in zip(said, asked)]))
        others = [[t.color if about == "colour" else t.kind for t in q.others] for q in asked]
        found[f"{about}_of_another"] = float(np.mean([s in o for s, o in zip(said, others)]))
        found[f"{about}_guessed"] = float(np.mean([1 / (1 + len(o)) for o in others]))
    return found


def heard(model, processor, asked, query):
    "A `Seen` for each question; \"word\": the word that names the thing asks."
    inputs = [inputs_of(processor, [q]) for q in asked]
    if query == "last": yield from text_maps(model, [(x, [q.thing.mask]) for x, q in zip(inputs, asked)], processor)
    else:
        for x, q in zip(inputs, asked): yield from text_maps(model, [(x, [q.thing.mask])], processor, q.named)


def on_others(maps, question):
    "The scores with the masks of the other things of the picture, their mean."
    found = [score_grounding(maps, as_truth(t.mask)) for t in question.others]
    return {k: torch.stack([f[k] for f in found]).mean(0) for k in ("pointing", "energy_pointing")}


def order_of(values):
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def agreement(rows, column, truth="energy_pointing"):
    "Spearman's rank correlation over heads."
    a, b = ([r[k] if r[k] == r[k] else np.inf for r in rows] for k in (column, truth))
    return float(np.corrcoef(order_of(a), order_of(b))[0, 1])


def chosen_heads(ranked, rule, k):
    "k heads by a rule, as (layer, head)."
    def lowest(key): return [(r["block"], r["head"]) for r in sorted(ranked, key=key)[:k]]
    if rule == "both": return best_heads(ranked, k, skip=())
    if rule == "share": return lowest(lambda r: -r["attention"])
    if rule == "entropy": return lowest(lambda r: r["entropy"] if r["empty"] < .5 else np.inf)
    if rule == "masks": return lowest(lambda r: -r["energy_pointing"])
    return [(r["block"], r["head"]) for r in ranked]


def scored(samples, asked, heads, together=True):
    "Scores of each question with the own mask and with those of the others: of heads together, or their mean."
    found = dict(own=[], other=[], pointing=[], pointing_other=[])
    for seen, q in zip(samples, asked):
        maps = torch.stack([seen.maps[layer][head] for layer, head in heads])
        if together: maps = combined(maps, smooth=0)[None]
        own, other = score_grounding(maps, seen.truth), on_others(maps, q)
        for name, s in dict(own=own["energy_pointing"], other=other["energy_pointing"], pointing=own["pointing"],
                            pointing_other=other["pointing"]).items():
            found[name].append(round(s.nanmean().item(), 3))
    return found


def judged(model, processor, n, query, top, k):
    "Heads are ranked on one half of the questions, and the chosen ones scored on the other."
    asked = questions(n)
    samples, half = list(heard(model, processor, asked, query)), n // 2
    ranked = rank_seen(samples[:half], top=top, surrogates=0, shifts=1)
    whole = Heads(rank_seen(samples, top=top, surrogates=0).rows, "energy_pointing")
    other = [on_others(s.stacked, q) for s, q in zip(samples, asked)]
    heads = samples[0].heads
    for row in whole:
        i = heads.index((row["block"], row["head"]))
        row |= {f"{name}_other": torch.stack([o[name][i] for o in other]).nanmean().item() for name in other[0]}
    picked = {rule: chosen_heads(ranked, rule, k) for rule in RULES}
    return dict(heads=[{c: round(v, 4) if isinstance(v, float) else v for c, v in r.items()} for r in whole],
                agreement={c: agreement(whole, c) for c in ("attention", "entropy", "selected")}, chosen=picked,
                scores={rule: scored(samples[half:], asked[half:], picked[rule], rule != "all") for rule in RULES})


def facts(args):
    "With what it was made."
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()
    return dict(date=time.strftime("%Y-%m-%d"), commit=commit, device="cpu", machine=platform.machine(), threads=torch.get_num_threads(),
                python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                spatial_entropy=spatial_entropy.__version__, pictures=args.pictures, tower_steps=args.tower_steps, steps=args.steps,
                questions=args.questions, top=args.top, best=args.best)


# ---- the command ------------------------------------------------------------------------------------------------------------------

def learn_tower(args, folder, seed, pictures, things):
    "Weights of a tower that knows what patches show, into a file."
    torch.manual_seed(seed)
    start, model = time.process_time(), transformers.LlavaForConditionalGeneration(demo_config())
    known = learn_patches(model, pictures, things, args.tower_steps, seed)
    weights = {name: t.contiguous() for name, t in model.model.vision_tower.state_dict().items()}
    write_json(folder / f"tower{seed}.json", dict(kind=known[0], color=known[1], cpu_seconds=round(time.process_time() - start)))
    safetensors.torch.save_file(weights, folder / f"tower{seed}.safetensors")


def learn_seed(args, folder, seed, pictures, things):
    "Weights of a model with a tower of its own, into a file."
    path = folder / f"tower{seed}.safetensors"
    if not path.exists(): learn_tower(args, folder, seed, pictures, things)
    torch.manual_seed(seed)
    start, model = time.process_time(), transformers.LlavaForConditionalGeneration(demo_config())
    model.model.vision_tower.load_state_dict(safetensors.torch.load_file(path))
    learn_words(model, features(model, pictures), things, args.steps, seed)
    weights = {name: t.to(torch.float16).contiguous() for name, t in model.state_dict().items()}
    write_json(folder / f"seed{seed}.json", dict(cpu_seconds=round(time.process_time() - start)))
    safetensors.torch.save_file(weights, folder / f"seed{seed}.safetensors")


def learned(args, folder, seeds):
    "Weights of each seed that has none yet."
    left = [s for s in seeds if not (folder / f"seed{s}.safetensors").exists()]
    if not left: return
    pictures, things = drawn(args.pictures)
    for seed in left: learn_seed(args, folder, seed, pictures, things)


def measured(args, folder, results, seed):
    "The figures of one seed."
    model, processor = demo_language_model(folder / f"seed{seed}.safetensors")
    kept = {part: json.loads((folder / f"{part}{seed}.json").read_text(encoding="utf-8")) for part in ("tower", "seed")}
    found = dict(seed=seed, accuracy=accuracies(model, processor, 300), tower={k: round(kept["tower"][k], 4) for k in ("kind", "color")},
                 cpu_seconds=sum(k["cpu_seconds"] for k in kept.values()), facts=facts(args))
    say(f"seed {seed}: {found['accuracy']}")
    for query in ("last", "word"): found[query] = judged(model, processor, args.questions, query, args.top, args.best)
    write_json(results / f"seed{seed}.json", found)
    for query in ("last", "word"):
        best = found[query]["heads"][0]
        say(f"seed {seed}, {query}: best head {best['block']}.{best['head']} {best['energy_pointing']:.2f}, others {best['energy_pointing_other']:.2f}; "
            f"{ {rule: round(float(np.mean(s['own'])), 3) for rule, s in found[query]['scores'].items()} }")


def prepare(args):
    "What is to be done."
    if min(args.seeds) < 0 or args.questions < 4 or args.pictures < 64 or min(args.steps, args.tower_steps) < 1:
        raise ValueError("seeds, questions, pictures, steps: expected at least 0, 4, 64, 1")
    if args.ship is not None and args.ship not in args.seeds:
        raise ValueError(f"ship: got {args.ship}, expected one of the seeds, {args.seeds}")
    torch.set_num_threads(args.threads)
    folder, results = Path(args.output), Path(args.results)
    for place in (folder, results): place.mkdir(parents=True, exist_ok=True)

    def work():
        learned(args, folder, args.seeds)
        for seed in args.seeds:
            if not (results / f"seed{seed}.json").exists(): measured(args, folder, results, seed)
        if args.ship is not None:
            SHIPPED.write_bytes((folder / f"seed{args.ship}.safetensors").read_bytes())
            say(f"written: {SHIPPED.name}")
    return work


def parser():
    p = Parser("tiny_language.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of tower, projector and language model")
    p.add_argument("--pictures", type=int, default=6000, help="to learn from")
    p.add_argument("--tower-steps", type=int, default=1600, help="of the tower, 32 pictures each")
    p.add_argument("--steps", type=int, default=900, help="of the language model, 24 pictures with four questions each")
    p.add_argument("--questions", type=int, default=120, help="to judge the heads by, half to choose and half to score")
    p.add_argument("--top", type=int, default=3, help="heads that are selected in a sample, at most")
    p.add_argument("--best", type=int, default=3, help="heads that are used together")
    p.add_argument("--threads", type=int, default=1, help="of torch")
    p.add_argument("--ship", type=int, help="a seed whose weights become those of the package")
    p.add_argument("-o", "--output", default="runs/tiny_language", help="a folder for the weights")
    p.add_argument("--results", default="results/tiny_language", help="a folder; a file for each seed")
    return p


if __name__ == "__main__":
    with lenient_output():
        sys.exit(outcome("tiny_language.py", prepare, parser().parse_args()))
