"""Writes the weights that `spatial_entropy.demo_model()` loads, in half precision.

    python tools/demo.py runs/demo      a run of the command on the page 05_demo
"""
import sys
from pathlib import Path

import torch

from spatial_entropy.training.models import load_run, save_weights

ROOT = Path(__file__).resolve().parent.parent


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model, config, _ = load_run(sys.argv[1])
    if not config.keep_skip or config.img_size != 112:
        sys.exit(f"{sys.argv[1]}: not a run of the command on the page 05_demo")
    weights = {name: t.to(torch.float16) for name, t in model.state_dict().items()}
    print(f"written: {save_weights(weights, ROOT / 'spatial_entropy/demo.safetensors')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
