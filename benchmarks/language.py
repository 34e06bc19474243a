"""What a TextImageTap costs: peak memory beside eager attention, and the slowdown of generate.

    python benchmarks/language.py [--memory] [--speed] [-o FILE]

The model has LLaVA's classes, random weights and the heads of one of 7B. Memory: its 32 layers too, but narrow, a head is 8 wide; the peak of a process of its
own, less that of one that runs the model without a tap. Eager attention keeps every layer's table, which no usual machine holds for 32 layers: it is measured
with one layer and with two, and the rest is computed from the difference.

Speed: `generate` without a tap, with one for the last token of the prompt, with one for every token that is generated, and without again, which is the
noise; in each round all four, in an order that turns, and of each the ratio to the first. The tap's work grows with the layers as the model's does, so that
few are enough; but it does not grow with the width as the model's does, and a narrow model makes it look dear: heads are 64 wide, half of the true width. Let
nothing else run on the machine.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from spatial_entropy.commands import Parser, lenient_output, outcome
from spatial_entropy.training.files import write_json

IMAGE = 9
HEADS, WIDTH, PATCHES = 32, 8, 48                        # 48×48 image tokens
TAPS = {"plain": None, "last": "last", "generated": "generated", "again": None}


def model_of(layers, attention="sdpa", width=WIDTH):
    """A model with heads of this width; its prompt has a picture of 48×48 tokens."""
    import transformers as t
    torch.manual_seed(0)
    vision = t.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=4 * PATCHES)
    text = t.LlamaConfig(hidden_size=HEADS * width, intermediate_size=2 * HEADS * width, num_hidden_layers=layers, num_attention_heads=HEADS,
                         num_key_value_heads=HEADS, vocab_size=256, max_position_embeddings=8192)
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model = t.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    if attention == "eager": model.model.language_model.set_attn_implementation("eager")
    return model


def prompt_of(tokens):
    words = [i % 200 + 20 for i in range(tokens - PATCHES**2)]
    return dict(input_ids=torch.tensor([[*words[:8], *[IMAGE] * PATCHES**2, *words[8:]]]), pixel_values=torch.randn(1, 3, 4 * PATCHES, 4 * PATCHES))


def one_run(how, layers, tokens):
    """Runs the model once; the peak of this process, in MiB."""
    from spatial_entropy.language.tap import TextImageTap
    model, prompt = model_of(layers, "eager" if how == "eager" else "sdpa"), prompt_of(tokens)
    with torch.no_grad():
        if how == "eager":
            kept = model(**prompt, output_attentions=True, logits_to_keep=1).attentions
            assert len(kept) == layers
        elif how == "plain": model(**prompt, logits_to_keep=1)
        else:
            with TextImageTap(model, reduce="share" if how == "share" else None) as tap: model(**prompt, logits_to_keep=1)
            assert len(tap.maps()) == layers
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak(how, layers, tokens):
    """The peak of a fresh process."""
    command = [sys.executable, __file__, "--one", how, str(layers), str(tokens)]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return float(found.stdout.splitlines()[-1])


def memory(layers, tokens):
    """Peaks in MiB, and what is left of them without the model."""
    plain = {n: peak("plain", n, tokens) for n in (1, 2, layers)}
    ours = {how: peak(how, layers, tokens) for how in ("maps", "share")}
    eager = {n: peak("eager", n, tokens) for n in (1, 2)}
    more = {n: eager[n] - plain[n] for n in eager}
    slope = more[2] - more[1]
    return dict(layers=layers, heads=HEADS, tokens=tokens, image_tokens=PATCHES**2, dtype="float32", plain_mib=plain, tap_mib=ours, eager_mib=eager,
                tap_more_mib={how: round(value - plain[layers], 1) for how, value in ours.items()},
                eager_more_mib={n: round(value, 1) for n, value in more.items()},
                eager_more_computed_mib=round(more[1] + slope * (layers - 1), 1), table_of_a_layer_mib=HEADS * tokens**2 * 4 / 2**20)


def one_generation(model, prompt, query, new):
    """(seconds, seconds of CPU) of `generate`."""
    from spatial_entropy.language.tap import TextImageTap
    start, cpu = time.perf_counter(), time.process_time()
    tap = TextImageTap(model, query, reduce="share") if query else nullcontext()
    with tap: model.generate(**prompt, max_new_tokens=new, do_sample=False)
    took = time.perf_counter() - start, time.process_time() - cpu
    if query: assert len(tap.maps()) == model.config.text_config.num_hidden_layers
    return took


def quartiles(values):
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def speed(layers, width, tokens, rounds, new):
    """Seconds of generate by kind of tap, in turns; quartiles of the ratio to no tap, round by round."""
    model, prompt = model_of(layers, width=width), prompt_of(tokens)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE])
    for query in dict.fromkeys(TAPS.values()): one_generation(model, prompt, query, new)                     # once, unmeasured
    kinds, taken = list(TAPS), {kind: [] for kind in TAPS}
    for i in range(rounds):
        turn = i % len(kinds)
        for kind in kinds[turn:] + kinds[:turn]: taken[kind].append(one_generation(model, prompt, TAPS[kind], new))
    ratios = {unit: {kind: quartiles([t[k] / p[k] for t, p in zip(taken[kind], taken["plain"])]) for kind in kinds[1:]}
              for k, unit in enumerate(("wall", "cpu"))}
    return dict(layers=layers, heads=HEADS, width=width, tokens=tokens, new_tokens=new, rounds=rounds, dtype="float32",
                quartiles_of_ratio_to_plain=ratios, seconds_wall_and_cpu={kind: [[round(v, 4) for v in t] for t in each] for kind, each in taken.items()})


def about():
    from loss import machine_facts
    return {"date": str(date.today()), "threads": torch.get_num_threads(), "transformers": version("transformers"), **machine_facts(torch.device("cpu"))}


def prepare(args):
    "What is to be done."
    if args.one:
        how, layers, tokens = args.one
        return lambda: print(one_run(how, int(layers), int(tokens)))
    for name, least in (("layers", 2), ("speed_layers", 1), ("width", 2), ("tokens", PATCHES**2 + 16), ("rounds", 2), ("new_tokens", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least {least}")
    if args.width % 2: raise ValueError(f"width: got {args.width}, expected an even number")
    return lambda: measure(args)


def measure(args):
    "Memory, speed or, where neither is named, both; what the file holds already stays."
    found = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if args.memory or not args.speed: found["memory"] = about() | memory(args.layers, args.tokens)
    if args.speed or not args.memory: found["speed"] = about() | speed(args.speed_layers, args.width, args.tokens, args.rounds, args.new_tokens)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, found)
    print(json.dumps(found, indent=1))


def parser():
    p = Parser("language.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--memory", action="store_true", help="peaks alone")
    p.add_argument("--speed", action="store_true", help="the slowdown of generate alone")
    p.add_argument("--layers", type=int, default=32, help="of the model whose memory is measured (32)")
    p.add_argument("--speed-layers", type=int, default=4, help="of the model whose speed is measured (4)")
    p.add_argument("--width", type=int, default=64, help="of its heads (64)")
    p.add_argument("--tokens", type=int, default=4096, help="of the prompt (4096)")
    p.add_argument("--rounds", type=int, default=12, help="of four runs each (12)")
    p.add_argument("--new-tokens", type=int, default=32, help="generated in a run")
    p.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/cpu/language.json"))
    p.add_argument("--one", nargs=3, metavar=("HOW", "LAYERS", "TOKENS"), help="one run, for the peak of its process")
    return p


if __name__ == "__main__":
    with lenient_output():
        sys.exit(outcome("language.py", prepare, parser().parse_args()))
