"""Every model of timm, torchvision, open_clip and transformers: read, or refused with its reason.

    python tools/census.py             # all of them, some twenty minutes; nothing is downloaded
    python tools/census.py timm        # one library; what the page says of the others stays
    python tools/census.py timm:swin*  # some of its names; what the page says of the others stays

Models are built on the meta device, where they cost no memory, and run there: shapes pass through every
layer, values do not. The result is the last part of docs/models.md.
"""
import importlib
import re
import sys
import warnings
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
LIBRARIES = ("timm", "torchvision", "open_clip", "transformers")
HEADING = "## Census"
INTRODUCTION = """
Every model of four libraries, by name: those that are read, by family, and those that are not, by reason.
Written by `python tools/census.py`; a test builds a sample of the names anew and compares.

- *checked*: recorded, and a small copy of each of its kinds of layers is compared with the unfused reference above;
- *recorded*: a tapped forward pass at the model's own size ran on meta tensors, and every map had its grid's shape.
  Of the models of one class with the same kinds of layers, the first one runs;
- *found*: its attention layers are known to the table, but that pass did not run on meta tensors;
- *not built*: the library itself builds no model from the class's default configuration; what it says is given.
"""
UNBUILT = "not built"
GROUPS = ("read", "attention over places, refused", "attention of another kind", "no attention", UNBUILT)


# ---- the names, and how each is built ----

def timm_models():
    """(name, build, size) of every architecture; pretrained tags share them."""
    import timm
    for name in timm.list_models():
        def build(name=name):
            model = timm.create_model(name)
            return model, model.pretrained_cfg["input_size"][1:]
        yield name, build


def torchvision_models():
    import torchvision
    for name in torchvision.models.list_models(module=torchvision.models):
        def build(name=name):
            kwargs = dict(init_weights=False) if name in ("googlenet", "inception_v3") else {}
            return torchvision.models.get_model(name, **kwargs), (299, 299) if name == "inception_v3" else (224, 224)
        yield name, build


def open_clip_models():
    """The vision tower of every configuration: the text towers have no places."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower
    for name in open_clip.list_models():
        def build(name=name):
            config = open_clip.get_model_config(name)
            vision = CLIPVisionCfg(**config["vision_cfg"])
            vision.timm_model_pretrained = False
            tower = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
            size = vision.image_size
            return tower, tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        yield name, build


def transformers_models():
    """Every class that is given pictures, from its default configuration, in few layers."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("zoo_transformers").census()


SOURCES = dict(timm=timm_models, torchvision=torchvision_models, open_clip=open_clip_models, transformers=transformers_models)


# ---- one model ----

def group_of(why):
    """Which group a refusal belongs to."""
    if re.search("two softmaxes|two attentions|no adapter|none of its attention layers|several vision models", why):
        return GROUPS[1]
    plain = "no queries and keys over places|convolutional network|fixed weights|state-space|no attention|neither queries nor keys"
    return GROUPS[3] if re.search(plain, why) else GROUPS[2]


def reason(error):
    """The sentence without the class and the family, which name the model and not the cause."""
    return re.sub(r"^\w+ \(.*?\): ", "", str(error).split("; add an entry")[0])


def built(build):
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):                 # a constructor that reads its own tensors
        return build()


def recorded(model, given):
    """Whether a tapped pass gives every layer's map; on the device the model was built on."""
    import spatial_entropy as se
    device = next(model.parameters()).device
    if not isinstance(given, dict):
        given = dict(x=torch.empty(2, 3, *given, device=device))
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with se.AttentionTap(model.eval(), "all") as tap, torch.no_grad():
        model(inputs["x"]) if list(inputs) == ["x"] else model(**inputs)
        return all(m.ndim == 4 and min(m.shape) > 0 for m in tap.maps().values())


def sorted_into(build):
    """(group, family or reason, model, its inputs, what was found in it) of one model, which does not run; found is None where it is not read."""
    from spatial_entropy.attention.families import UnsupportedModel, find
    try:
        model, given = built(build)
    except Exception as error:                                  # the library's own: no default, or not on its own
        return UNBUILT, f"{type(error).__name__}: {' '.join(str(error).split())[:90]}", None, None, None
    try:
        found = find(model)
    except UnsupportedModel as error:
        why = reason(error)
        return group_of(why), why, model, given, None
    return GROUPS[0], found.adapter.name, model, given, found


def look(build, ran=None):
    """(group, family or reason, proof, hosts) of one model; `ran` remembers what ran, by class and kinds of layers."""
    group, text, model, given, found = sorted_into(build)
    if found is None:
        return group, text, "", ()
    hosts, ran = frozenset(k.host for _, _, k in found.layers), {} if ran is None else ran
    key = type(model), type(found.model), hosts
    if key not in ran:
        try:
            ran[key] = "recorded" if recorded(model, given) else "found"
        except Exception as error:                              # the page says "found"; the terminal says why
            ran[key] = "found"
            print(f"    {type(error).__name__}: {str(error)[:200]}", flush=True)
    return group, text, ran[key], hosts


@cache
def checked_hosts(library):
    """(family, class of layer) of those of a library that tests/test_models.py compares with the reference."""
    from spatial_entropy.attention.families import find
    sys.path.append(str(ROOT / "tests"))
    zoo = importlib.import_module("zoo")
    models = [s.make(s.sizes[0]) for s in dict(timm=zoo.TIMM, transformers=zoo.HF).get(library, zoo.OTHERS)]
    if library == "transformers":
        models += [s.make(s.sizes[0]) for s in importlib.import_module("zoo_transformers").SPECS]
    if library == "open_clip":                                  # its trunks from timm
        models += [s.make(s.sizes[0]) for s in zoo.TIMM]
    return {(f.adapter.name, k.host) for f in map(find, models) for _, _, k in f.layers}


# ---- the page ----

def count(library, pattern="*", before=()):
    """{(group, family or reason): {name: proof}} of a library; what does not match is taken from the listing before."""
    rows, checked, ran = {}, checked_hosts(library), {}
    for group, text, proof, names in before:
        rows.setdefault((group, text), {}).update({n: proof for n in names if not fnmatch(n, pattern)})
    for i, (name, build) in enumerate(SOURCES[library]()):
        if not fnmatch(name, pattern):
            continue
        group, text, proof, hosts = look(build, ran)
        if proof == "recorded" and all((text, h) in checked for h in hosts):
            proof = "checked"
        rows.setdefault((group, text), {})[name] = proof
        print(f"{library} {i} {name}: {group} ({text}) {proof}", flush=True)
    return rows


def listing(library, rows):
    total = sum(map(len, rows.values()))
    lines = [f"### {library} {version(library.replace('open_clip', 'open_clip_torch'))}: {total} names", ""]
    for group in GROUPS:
        here = {text: dict(sorted(names.items())) for (g, text), names in rows.items() if g == group and names}
        lines += [f"**{group}: {sum(map(len, here.values()))}**", ""] if here else []
        for text, names in sorted(here.items()):
            for proof in sorted(set(names.values())):
                some = [n for n in names if names[n] == proof]
                lines.append(f"- {text} ({', '.join(filter(None, [str(len(some)), proof]))}): {', '.join(some)}")
        lines += [""] if here else []
    return "\n".join(lines)


def parts(text):
    """{library: its listing} of a page."""
    found = re.split(r"^### (?=\w+ [\d.]+\S*: \d+ names$)", text.partition(HEADING)[2], flags=re.M)[1:]
    return {p.split()[0]: "### " + p.rstrip() + "\n" for p in found}


def read_listing(part):
    """[(group, family or reason, proof, names)] of a library's listing."""
    rows, group = [], ""
    for line in part.splitlines():
        if m := re.fullmatch(r"\*\*(.+): (\d+)\*\*", line):
            group = m[1]
        elif m := re.fullmatch(r"- (.+) \((\d+)(?:, (\w+))?\): (.+)", line):
            rows.append((group, m[1], m[3] or "", m[4].split(", ")))
    return rows


def summary(listings):
    lines = ["| library | names | read | checked, recorded, found | refused, over places | another kind | no attention | not built |",
             "|---|---|---|---|---|---|---|---|"]
    for library, part in listings.items():
        n = {g: 0 for g in (*GROUPS, "checked", "recorded", "found")}
        for group, _, proof, names in read_listing(part):
            n[group] += len(names)
            if proof:
                n[proof] += len(names)
        proofs = f"{n['checked']}, {n['recorded']}, {n['found']}"
        cells = [library, sum(n[g] for g in GROUPS), n["read"], proofs, *(n[g] for g in GROUPS[1:])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def census(listings):
    """The last part of the page."""
    listings = {k: listings[k] for k in LIBRARIES if k in listings}
    return "\n".join([HEADING, INTRODUCTION, summary(listings), "", *listings.values()])


def main(wanted):
    wanted = [w.partition(":")[::2] for w in wanted or LIBRARIES]
    unknown = {library for library, _ in wanted} - set(LIBRARIES)
    if unknown:
        sys.exit(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(LIBRARIES)}")
    warnings.filterwarnings("ignore")
    for library, pattern in wanted:
        before = parts(PAGE.read_text(encoding="utf-8")).get(library, "")
        rows = count(library, pattern or "*", read_listing(before) if pattern else ())
        if not rows:
            continue
        text = PAGE.read_text(encoding="utf-8")
        listings = parts(text) | {library: listing(library, rows)}
        PAGE.write_text(text.partition(HEADING)[0].rstrip() + "\n\n" + census(listings), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
