"""Small copies, with random weights, of the models people use: what test_models.py runs and what the site's table is made of."""
from dataclasses import dataclass, field

import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg

TINY = dict(embed_dim=48, depth=2, num_heads=2)


def stirred(model):
    """Moves every parameter a little: tokens, biases and position tables that start at zero would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.02)
    return model.eval()


@dataclass
class Model:
    """One entry point. `layers` is the number of attention layers that must be found; `fold` names the reference."""
    name: str
    layers: int = 2
    fold: str = "plain"
    kwargs: dict = field(default_factory=dict)
    sizes: tuple = ((32, 32), (32, 48))
    img_size: bool = True                                # the size is fixed at construction
    step: int = 8                                        # pixels a patch, for plain folds
    reads: str = "cls"
    build: object = None                                 # a function of its own, where timm's name has no small copy
    near: float = 1.                                     # cells by which convolutions before the layers spread a patch
    spread: bool = False                                 # they spread it so far that pixels say nothing of a place

    def make(self, size):
        torch.manual_seed(0)
        if self.build: return stirred(self.build(size))
        kwargs = dict(self.kwargs) | (dict(img_size=size) if self.img_size else {})
        return stirred(timm.create_model(self.name, num_classes=3, **kwargs))


def plain(name, reads="cls", layers=2, **kwargs):
    return Model(name, layers, "plain", dict(patch_size=8) | TINY | kwargs, reads=reads)


def _volo(size):
    from timm.models.volo import VOLO
    return VOLO((1, 1, 1, 1), size, num_classes=3, embed_dims=(48,) * 4, num_heads=(2,) * 4)


def _nest(size):
    from timm.models.nest import Nest
    return Nest(size, num_classes=3, embed_dims=(24, 48, 48), num_heads=(2, 2, 2), depths=(1, 1, 2))


def _gcvit(size):
    from timm.models.gcvit import GlobalContextVit
    return GlobalContextVit(img_size=size, num_classes=3, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), embed_dim=16, window_ratio=(8, 16, 16, 32))


def _mvit(size, **kwargs):
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
    return MultiScaleVit(MultiScaleVitCfg((1, 2, 2, 1), 24, **kwargs), size, num_classes=3)


TIMM = [
    plain("vit_tiny_patch16_224"), plain("deit_tiny_patch16_224"), plain("deit_tiny_distilled_patch16_224"), plain("deit3_small_patch16_224"),
    plain("vit_small_patch14_dinov2"), plain("vit_small_patch14_reg4_dinov2"), plain("vit_base_patch16_clip_224"),
    plain("vit_base_patch16_siglip_224", "pool", 3), plain("vit_base_patch16_siglip_gap_224", "mean"), plain("vit_medium_patch16_gap_256", "mean"),
    plain("vit_medium_patch16_reg1_gap_256", "mean"), plain("vit_little_patch16_reg4_gap_256", "mean"), plain("vit_wee_patch16_reg1_gap_256", "mean"),
    plain("vit_small_patch16_18x2_224", layers=4), plain("aimv2_large_patch14_224", "mean"), plain("vit_intern300m_patch14_448"),
    plain("vit_base_patch16_rpn_224", "mean"), plain("vit_small_plus_patch16_dinov3", "mean"), plain("vit_small_patch16_dinov3_qkvb", "mean"),
    plain("eva02_tiny_patch14_224", "mean"), plain("eva_giant_patch14_224", "mean"), plain("eva02_base_patch16_clip_224"),
    plain("vit_small_patch16_rope_224"), plain("vit_small_patch16_rope_mixed_224"), plain("vit_small_patch16_rope_ape_224"),
    plain("vit_mediumd_patch16_rope_reg1_gap_256", "mean"), plain("vit_betwixt_patch16_rope_reg4_gap_256", "mean"),
    plain("vit_pe_core_tiny_patch16_384", "pool", 3), plain("vit_pe_spatial_tiny_patch16_512", "mean"), plain("beit_base_patch16_224", "mean"),
    plain("beitv2_base_patch16_224", "mean"), plain("vit_relpos_small_patch16_224", "mean"), plain("vit_relpos_base_patch16_cls_224"),
    plain("vit_srelpos_small_patch16_224", "mean"), plain("naflexvit_base_patch16_gap", "mean"), plain("naflexvit_base_patch16_siglip", "pool", 3),
    plain("naflexvit_so150m2_patch16_reg1_gap", "mean"),
    Model("vit_tiny_r_s16_p8_224", 2, kwargs=TINY, sizes=((64, 64), (64, 128)), step=32),
    Model("vitamin_small_224", 3, kwargs=dict(embed_dim=48, depth=3, num_heads=2, embed_cfg=VitCfg(
        (16, 24, 48), (1, 1, 1), 16, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), head_type="1d")), sizes=((64, 64), (64, 96)), step=16, reads="mean"),
    Model("cait_xxs24_224", 4, "class", dict(patch_size=8) | TINY), Model("xcit_nano_12_p8_224", 2, "class", TINY),
    Model("volo_d1_224", 5, "volo", sizes=((64, 64), (96, 64)), step=16, build=_volo),
    Model("convit_tiny", 3, "convit", dict(patch_size=8, depth=3, embed_dim=12, num_heads=4, local_up_to_layer=2), sizes=((32, 32), (48, 48))),
    Model("tnt_s_patch16_224", 2, kwargs=dict(embed_dim=48, depth=2, num_heads_outer=2), sizes=((32, 32), (32, 48)), step=16),
    Model("pit_ti_224", 3, "pit", dict(base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 2)), sizes=((64, 64), (64, 96))),
    Model("pit_ti_distilled_224", 3, "pit", dict(base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 2)), sizes=((64, 64), (64, 96))),
    Model("crossvit_9_240", 10, "crossvit", dict(embed_dim=(24, 48), depth=((1, 2, 0), (1, 2, 0)), num_heads=(2, 2)), sizes=((120, 120), (120, 240))),
]

_SWIN = dict(window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 2))
_BOTH = ((64, 64), (64, 96))
_MAXVIT = dict(depths=(1, 1, 1, 1), embed_dim=(32, 32, 64, 64), stem_width=16)
_COAT, _LEVIT = _MAXVIT | dict(depths=(1, 1, 2, 1)), dict(embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(1, 2, 2))
_AROUND = (*_BOTH, (16, 16), (8, 16), (8, 8))                # grids above a window of 4, equal to it, and below
TIMM += [
    Model("swin_tiny_patch4_window7_224", 4, "swin", _SWIN, _AROUND),
    Model("swin_small_patch4_window7_224", 4, "swin", _SWIN | dict(window_size=3), ((64, 64), (40, 64))),
    Model("swin_s3_tiny_224", 4, "swin", _SWIN | dict(window_size=(4, 4)), _BOTH),
    Model("swin_large_patch4_window12_384", 4, "swin", _SWIN | dict(window_size=8), ((64, 64), (32, 64))),
    Model("swin_base_patch4_window7_224", 4, "swin", _SWIN | dict(always_partition=True, strict_img_size=False), ((64, 64), (40, 64), (16, 16))),
    Model("swinv2_tiny_window8_256", 4, "swin", _SWIN, _AROUND), Model("swinv2_cr_tiny_224", 4, "swin", _SWIN, _AROUND),
    Model("gcvit_xxtiny", 8, "gcvit", sizes=((64, 64), (64, 128)), build=_gcvit),
    Model("tiny_vit_5m_224", 3, "tiny_vit", dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), window_sizes=(4, 3, 4, 2)),
          _BOTH, False),
    Model("samvit_base_patch16", 2, "sam", dict(patch_size=8, window_size=3, global_attn_indexes=(1,)) | TINY, ((64, 64), (48, 96))),
    Model("sam2_hiera_tiny", 5, "sam2", dict(embed_dim=16, stages=(1, 2, 1, 1), global_att_blocks=(2,), window_spec=(4, 2, 4, 2)),
          ((64, 64), (128, 64), (96, 64)), False),               # at the last size queries are pooled in padded windows
    Model("davit_tiny", 4, "davit", dict(depths=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(2, 2, 2, 2), window_size=3), _BOTH, False),
    Model("twins_svt_small", 4, "twins", dict(depths=(2, 2), embed_dims=(16, 16), num_heads=(2, 2), wss=(3, 4), sr_ratios=(4, 2), mlp_ratios=(2, 2)), _BOTH),
    Model("twins_pcpvt_small", 2, "twins", dict(depths=(1, 1), embed_dims=(16, 16), num_heads=(2, 2), sr_ratios=(4, 2), mlp_ratios=(2, 2)), _BOTH),
    Model("nest_tiny", 4, "nest", sizes=((64, 64), (128, 128)), build=_nest),
    Model("maxvit_tiny_tf_224", 8, "maxvit", _MAXVIT, _BOTH), Model("maxvit_rmlp_nano_rw_256", 8, "maxvit", _MAXVIT, _BOTH),
    Model("maxxvit_rmlp_nano_rw_256", 8, "maxvit", _MAXVIT, _BOTH), Model("coatnet_0_rw_224", 3, "maxvit", _COAT, _BOTH),
    Model("coatnext_nano_rw_224", 3, "maxvit", _COAT, _BOTH),
    Model("pvt_v2_b0", 5, "pvt", dict(depths=(1, 1, 2, 1), embed_dims=(16, 16, 40, 64)), _BOTH, False),
    Model("pvt_v2_b2_li", 5, "pvt", dict(depths=(1, 2, 1, 1), embed_dims=(16, 16, 40, 64)), _BOTH, False, near=1.5),
    Model("mvitv2_tiny", 6, "mvit", sizes=((64, 64), (96, 96)), build=_mvit),
    Model("mvitv2_base_cls", 6, "mvit", sizes=((64, 64), (96, 96)), build=lambda size: _mvit(size, use_cls_token=True)),
    Model("levit_128s", 7, "levit", _LEVIT, ((224, 224),), False), Model("levit_conv_128s", 7, "levit", _LEVIT, ((224, 224),), False),
    Model("efficientformer_l1", 1, "levit", dict(depths=(1, 1, 2, 2), embed_dims=(16, 16, 32, 48)), ((224, 224),), False),
    Model("efficientformerv2_s0", 5, "levit", dict(depths=(1, 1, 3, 3), embed_dims=(16, 16, 32, 48)), ((224, 224),), False),
    Model("visformer_tiny", 4, "nchw", dict(embed_dim=64, depth=(1, 2, 2), num_heads=2), _BOTH),
    Model("fastvit_sa12", 2, "nchw", dict(layers=(1, 1, 1, 2), embed_dims=(16, 16, 32, 64)), ((128, 128), (128, 192)), False),
    Model("hiera_tiny_224", 7, "hiera", dict(embed_dim=16, stages=(1, 2, 3, 1)), _BOTH),
    Model("hiera_small_abswin_256", 7, "hiera", dict(embed_dim=16, stages=(1, 2, 3, 1)), _BOTH),
]



def _caformer(size):
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
    return MetaFormer(3, 3, depths=(1, 1, 1, 1), dims=(16, 16, 32, 64), token_mixers=[SepConv, SepConv, Attention, Attention],
                      norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2)


def _nextvit(size):
    from timm.models.nextvit import NextViT
    return NextViT(3, 3, stem_chs=(16, 8, 16), depths=(1, 1, 5, 3))


_THIN, _CLIP_SIZE = dict(width_factor=.125), ((64, 64), (64, 96))
_ENCODER = dict(patch_size=8) | TINY
TIMM += [
    Model("botnet26t_256", 3, "bottleneck", _THIN, ((64, 64), (96, 96))),
    Model("halonet26t", 3, "halo", _THIN | dict(self_attn_kwargs=dict(block_size=4, halo_size=1)), ((128, 128), (128, 256)), False),
    Model("mobilevit_xxs", 9, "mobilevit", sizes=((64, 64), (96, 64)), img_size=False, spread=True),
    Model("mobilenetv4_hybrid_medium_075", 8, "mqa", sizes=((64, 96),), img_size=False, spread=True),
    Model("caformer_s18", 2, "metaformer", sizes=((64, 64), (72, 96)), build=_caformer),
    Model("nextvit_small", 1, "grid_of", sizes=((64, 64), (72, 96)), build=_nextvit),
    Model("iformer_t", 5, "grid_of", dict(dims=(16, 16, 32, 64), depths=(1, 1, 9, 6)), ((64, 96),), False),
    Model("shvit_s1", 9, "grid_of", dict(embed_dim=(32, 48, 64), partial_dim=(16, 16, 16)), ((128, 192),), False, spread=True),
    Model("csatv2", 4, "grid_of", dict(dims=(16, 24, 32, 48), depths=(1, 1, 3, 3)), ((128, 192),), False),
    Model("lowformer_b0", 7, "grid_of", dict(width_list=[8, 16, 16, 32, 64]), ((64, 96),), False, spread=True),
    Model("cpubone_nano", 3, "grid_of", sizes=((64, 96),), img_size=False),
    Model("efficientvit_m0", 6, "msra", sizes=((128, 128), (128, 160)), img_size=False),
    Model("deepseek_vit_412m", 2, kwargs=_ENCODER, reads="mean"), Model("qwen3_vit_416m", 2, kwargs=_ENCODER, reads="mean"),
    Model("gemma4_vit_167m", 2, kwargs=_ENCODER | dict(head_dim=24, intermediate_size=64), sizes=((48, 48), (48, 72)), img_size=False, reads="mean"),
    Model("resnet50_clip", 1, "pool", _THIN, _CLIP_SIZE, spread=True),
]

REFUSED = {
    "vit_dpwee_patch16_reg1_gap_256": "two softmaxes", "vit_dlittle_patch16_reg1_gap_256": "two softmaxes", "focalnet_tiny_srf": "focal modulation",
    "efficientvit_b0": "linear attention", "edgenext_xx_small": "channels, not places", "coat_tiny": "before any query", "swiftformer_xs": "additive attention",
    "efficientvim_m1": "state-space", "mixer_s32_224": "fixed weights", "convnext_atto": "convolutional", "resnet18": "convolutional",
    "mobilevitv2_050": "separable attention", "poolformer_s12": "pool or convolve", "lambda_resnet26t": "lambda layers",
    "bat_resnext26ts": "bilinear attention", "gcresnet33ts": "no query", "repvgg_a0": "convolutional", "efficientnet_b0": "convolutional",
    "sequencer2d_s": "recurrent layers", "repvit_m0_9": "convolutional",
    "maxvit_tiny_pm_256": "two attentions side by side",
}


@dataclass
class Other:
    """A model of another library: a function that builds it for a size, its number of layers, and how its row is read."""
    name: str
    build: object
    layers: int = 2
    prefix: int = 1
    reads: str = "cls"                                   # "cls", "mean"; a pool is the last layer where `layers` is 3
    fold: str = "grid"
    sizes: tuple = ((32, 32), (32, 48))
    step: int = 8
    near: float = 1.
    spread: bool = False

    def make(self, size, **kwargs):
        torch.manual_seed(0)
        return stirred(self.build(size, **kwargs))


def hf(name, cls, config, attn="sdpa", flat=True, **more):
    """A tiny random transformers model. `flat`: ViT-like configuration names."""
    def build(size, attn=attn):
        import transformers as tf
        tiny = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=size, patch_size=8) if flat else {}
        tiny |= {k: v(size) if callable(v) else v for k, v in more.items()}
        return getattr(tf, cls)._from_config(getattr(tf, config)(**tiny), attn_implementation=attn)
    return build


_SQUARE = ((32, 32), (48, 48))
_EDGE = dict(image_size=lambda s: s[0])
_swin_hf = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=4, image_size=lambda s: s, patch_size=4, num_labels=3, flat=False)
HF = [
    Other("ViTForImageClassification", hf("vit", "ViTForImageClassification", "ViTConfig")),
    Other("ViTMSNModel", hf("vit_msn", "ViTMSNModel", "ViTMSNConfig")),
    Other("DeiTForImageClassification", hf("deit", "DeiTForImageClassification", "DeiTConfig"), prefix=2),
    Other("Dinov2ForImageClassification", hf("dinov2", "Dinov2ForImageClassification", "Dinov2Config", **_EDGE)),
    Other("Dinov2WithRegistersModel", hf("dinov2", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4, **_EDGE), prefix=5),
    Other("DINOv3ViTModel", hf("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, **_EDGE), prefix=5),
    Other("IJepaModel", hf("ijepa", "IJepaModel", "IJepaConfig"), prefix=0, reads="mean"),
    Other("CLIPVisionModel", hf("clip", "CLIPVisionModel", "CLIPVisionConfig", **_EDGE), sizes=_SQUARE),
    Other("CLIPForImageClassification", hf("clip", "CLIPForImageClassification", "CLIPConfig", flat=False, vision_config=lambda s: dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=s[0], patch_size=8)), reads="mean", sizes=_SQUARE),
    Other("MetaClip2VisionModel", hf("metaclip", "MetaClip2VisionModel", "MetaClip2VisionConfig", **_EDGE), sizes=_SQUARE),
    Other("SiglipVisionModel", hf("siglip", "SiglipVisionModel", "SiglipVisionConfig", **_EDGE), layers=3, prefix=0, reads="mean", sizes=_SQUARE),
    Other("SiglipForImageClassification", hf("siglip", "SiglipForImageClassification", "SiglipConfig", flat=False, vision_config=lambda s: dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=s[0], patch_size=8)), prefix=0, reads="mean",
          sizes=_SQUARE),
    Other("Aimv2VisionModel", hf("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", use_head=True, **_EDGE), layers=3, prefix=0, reads="mean", sizes=_SQUARE),
    Other("BeitForImageClassification", hf("beit", "BeitForImageClassification", "BeitConfig", use_relative_position_bias=True), reads="mean", sizes=_SQUARE),
    Other("SwinForImageClassification", hf("swin", "SwinForImageClassification", "SwinConfig", **_swin_hf), 4, 0, "mean", "swin", ((64, 64), (72, 64)), 4),
    Other("Swinv2ForImageClassification", hf("swinv2", "Swinv2ForImageClassification", "Swinv2Config", attn="eager", **_swin_hf), 4, 0, "mean", "swin",
          ((64, 64), (64, 96)), 4),
]


def _torchvision(size, layers=2):
    from torchvision.models.vision_transformer import VisionTransformer
    return VisionTransformer(image_size=size[0], patch_size=8, num_layers=layers, num_heads=2, hidden_dim=48, mlp_dim=64, num_classes=3)


def _torchvision_swin(size, second=False):
    from torchvision.models import swin_transformer as s
    kwargs = dict(block=s.SwinTransformerBlockV2, downsample_layer=s.PatchMergingV2) if second else {}
    return s.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=3, **kwargs)


def _torchvision_maxvit(size):
    from torchvision.models import MaxVit
    return MaxVit(size, 24, 2, [24, 40], [1, 1], 8, 0., num_classes=3)


def _open_clip(size, pool="tok", **kwargs):
    from open_clip.transformer import VisionTransformer
    return VisionTransformer(image_size=size, patch_size=8, width=48, layers=2, heads=2, mlp_ratio=2., output_dim=48, pool_type=pool, **kwargs)


def _open_clip_resnet(size):
    from open_clip.modified_resnet import ModifiedResNet
    return ModifiedResNet([1, 1, 1, 1], 16, 4, size[0], 8)


def _open_clip_timm(size):
    from open_clip.timm_model import TimmModel
    model = TimmModel("vit_tiny_patch16_224", 16, size, proj="linear", pool="avg")
    model.trunk = timm.create_model("eva02_tiny_patch14_224", img_size=size, patch_size=8, num_classes=0, global_pool="avg", **TINY)
    model.head.proj = torch.nn.Linear(48, 16)
    return model


_POOL = dict(attn_pooler_queries=5, attn_pooler_heads=2)
_WINDOWS = ((64, 64), (40, 64), (8, 12), (16, 16))            # grids above the window of 4, that do not divide, below it, and equal to it
OTHERS = [
    Other("torchvision ViT", _torchvision, sizes=_SQUARE), Other("open_clip ViT", _open_clip),
    Other("open_clip ViT, mean", lambda size: _open_clip(size, "avg"), reads="mean"),
    Other("torchvision Swin", _torchvision_swin, 4, 0, "mean", "tv_swin", _WINDOWS, 4),
    Other("torchvision Swin V2", lambda size: _torchvision_swin(size, True), 4, 0, "mean", "tv_swin", _WINDOWS, 4),
    Other("torchvision MaxViT", _torchvision_maxvit, 4, 0, "mean", "tv_maxvit", ((64, 64), (32, 32))),
    Other("open_clip ViT, its own blocks", lambda size: _open_clip(size, qk_norm=True, scale_heads=True, scale_fc=True)),
    Other("open_clip CoCa", lambda size: _open_clip(size, attentional_pool=True, **_POOL), 3, reads="mean"),
    Other("open_clip CoCa, parallel", lambda size: _open_clip(size, attentional_pool="parallel", **_POOL), 3, reads="mean"),
    Other("open_clip ResNet", _open_clip_resnet, 1, fold="pool", sizes=((64, 64), (96, 96))),
    Other("open_clip, a trunk of timm", _open_clip_timm, reads="mean"),
]
