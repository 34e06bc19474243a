"""Small copies of transformers' vision models: how each is built, what it is given, and what it is known to read."""
from dataclasses import dataclass, field

import torch
from zoo import stirred


@dataclass
class Spec:
    """One class. `more` overrides the configuration; functions there are asked with the size of the picture."""
    name: str                                            # "folder.Class"
    config: str
    more: dict
    layers: int = 2                                      # attention layers that must be found
    prefix: int = 1
    suffix: int = 0
    reads: str = "cls"                                   # "cls", "mean", "suffix"; "pool": the last layer's own query
    step: int = 8                                        # pixels a patch
    fold: str = "plain"                                  # the reference's way of laying a row out
    sizes: tuple = ((32, 32), (32, 48))
    output: str = "logits"                               # what the query's gradient is taken of
    inputs: object = lambda size, g: dict(pixel_values=torch.rand(2, 3, *size, generator=g))
    attn: tuple = ("sdpa", "eager")
    near: int = 0                                        # cells by which a stem of convolutions spreads a patch
    kwargs: dict = field(default_factory=dict)

    @property
    def cls(self):
        import transformers
        return getattr(transformers, self.name.split(".")[1])

    def make(self, size, attn=None):
        import transformers
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{k: v(size) if callable(v) else v for k, v in self.more.items()})
        return stirred(self.cls._from_config(config, attn_implementation=attn or self.attn[0]))

    def given(self, size):
        return self.inputs(size, torch.Generator().manual_seed(0))


def vit(**more):
    """ViT-like names of a tiny configuration; `image_size` follows the picture."""
    return dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=lambda s: s, patch_size=8) | more


def square(**more):
    return vit(image_size=lambda s: s[0], **more)


def within(key, inner, **more):
    """A tiny configuration inside another one."""
    return {key: lambda s: {k: v(s) if callable(v) else v for k, v in inner.items()}} | more


SQUARE = ((32, 32), (48, 48))
_swin = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 2], image_size=lambda s: s, patch_size=4)
# window 4 on grids of 4 and 8, of 2 and 4, of 12 and 6 (padded): at, below and above
_SWIN_SIZES = ((32, 32), (16, 16), (48, 56))
_mapped = dict(output="feature_maps", layers=4, prefix=0, reads="mean", fold="swin", step=4, sizes=_SWIN_SIZES)
SPECS = [
    Spec("swin.SwinBackbone", "SwinConfig", _swin | dict(window_size=4, out_features=["stage2"]), **_mapped),
    Spec("swin.SwinBackbone", "SwinConfig", _swin | dict(window_size=8, out_features=["stage1", "stage2"]), **_mapped),
    Spec("swin.SwinModel", "SwinConfig", _swin | dict(window_size=4), **_mapped | dict(output="pooler_output", sizes=((32, 32), (48, 56)))),
    Spec("swinv2.Swinv2Backbone", "Swinv2Config", _swin | dict(window_size=4, out_features=["stage2"]), attn=("eager",), **_mapped),
    Spec("maskformer.MaskFormerSwinModel", "MaskFormerSwinConfig", _swin | dict(window_size=4), attn=("eager",),
         **_mapped | dict(output="pooler_output")),
    Spec("donut.DonutSwinModel", "DonutSwinConfig", _swin | dict(window_size=4), attn=("eager",),
         **_mapped | dict(output="pooler_output", sizes=((32, 32), (48, 56)))),
    Spec("swin2sr.Swin2SRModel", "Swin2SRConfig", dict(embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=4, patch_size=1,
                                                       image_size=lambda s: s), attn=("eager",),
         **_mapped | dict(output="last_hidden_state", step=1, near=1, sizes=((8, 8), (12, 16)))),
]
_tower = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=lambda s: s[0], patch_size=8)
SPECS += [
    Spec("metaclip_2.MetaClip2ForImageClassification", "MetaClip2Config", within("vision_config", _tower), reads="mean", sizes=SQUARE),
    Spec("metaclip_2.MetaClip2VisionModel", "MetaClip2VisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("siglip.SiglipForImageClassification", "SiglipConfig", within("vision_config", _tower), reads="mean", prefix=0, sizes=SQUARE),
    Spec("siglip.SiglipVisionModel", "SiglipVisionConfig", square(), layers=3, prefix=0, reads="pool", output="pooler_output", sizes=SQUARE),
    Spec("vit.ViTForMaskedImageModeling", "ViTConfig", vit(encoder_stride=8), reads="mean", output="reconstruction", sizes=SQUARE),
    Spec("dinov2.Dinov2Backbone", "Dinov2Config", square(), reads="mean", output="feature_maps"),
    Spec("dinov2.Dinov2Backbone", "Dinov2Config", square(num_hidden_layers=4, out_indices=[1, 3]), 3, reads="mean", output="feature_maps"),
    Spec("dinov3_vit.DINOv3ViTBackbone", "DINOv3ViTConfig", square(num_register_tokens=4), prefix=5, reads="mean", output="feature_maps"),
]
