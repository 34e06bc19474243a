"""The surgery on every kind of block it knows, against formulas written by hand, and under what training does to a model."""
import inspect
import io
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from pydoc import locate

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models import gcvit, nest, volo
from timm.models import vision_transformer as vit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import spatial_entropy as se
from spatial_entropy.attention.surgery import LastSkipSurgery, _last_block, _name_of, _ways, register_surgery

CLASSES = dict(num_classes=5)
SMALL = dict(img_size=32, num_classes=5)
FLAT = dict(SMALL, patch_size=8, embed_dim=48, depth=2, num_heads=2, drop_path_rate=.5)
STAGES = dict(embed_dim=16, depths=(1, 1, 1, 2), num_heads=(1, 1, 1, 2), drop_path_rate=.5)
HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8, num_labels=5)
SWIN = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), image_size=32, patch_size=2, num_labels=5, drop_path_rate=.5)
SAM = dict(window_size=3, output_channels=16, mlp_dim=64, initializer_range=.2)
DECODER = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64)


def timm_model(name, **kwargs):
    return lambda: timm.create_model(name, **kwargs)


def hf_model(name, config, attn="sdpa", **kwargs):
    def make():
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, name):
            pytest.skip(f"no {name} in this transformers")
        c = getattr(transformers, config)(**(kwargs if "embed_dim" in kwargs else {**HF, **kwargs}))
        c._attn_implementation = attn
        return getattr(transformers, name)(c)
    return make


def mvit_model(**more):
    def make():
        from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
        cfg = MultiScaleVitCfg(**dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=1) | more)
        return MultiScaleVit(cfg, img_size=64, num_classes=5, drop_path_rate=.5)
    return make


def got_ocr():
    pytest.importorskip("transformers")
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder
    return GotOcr2VisionEncoder(GotOcr2VisionConfig(**HF, **SAM, global_attn_indexes=[0]))


def torchvision_model():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 48, 96, dropout=.2, num_classes=5)


def torchvision_swin(block):
    def make():
        swin = pytest.importorskip("torchvision").models.swin_transformer
        merging = swin.PatchMergingV2 if block.endswith("V2") else swin.PatchMerging
        return swin.SwinTransformer([2, 2], 16, [1, 2], [1, 2], [3, 3], stochastic_depth_prob=.5, num_classes=5, block=getattr(swin, block),
                                    downsample_layer=merging)
    return make


def caformer():
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
    return MetaFormer(3, 5, depths=(1, 1, 1, 1), dims=(16, 16, 32, 64), token_mixers=[SepConv, SepConv, Attention, Attention],
                      norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2, drop_path_rate=.5)


def torchvision_maxvit():
    maxvit = pytest.importorskip("torchvision").models.maxvit
    return maxvit.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, .5, num_classes=5)


def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    text = dict(context_length=8, vocab_size=20, width=48, heads=2, layers=1)
    return open_clip.model.CLIP(48, dict(image_size=32, patch_size=8, width=48, layers=2, head_width=24, ls_init_value=1e-5), text).visual


# The formulas: a is what attention says, and the MLP's residual is on a.
def block(b, x, **k):
    a = b.attn(b.norm1(x), **k)
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def gammas(b, x, **k):
    a = b.attn(b.norm1(x), **k)
    return a + b.drop_path2(b.gamma_2 * b.mlp(a))


def no_scale(b, x, *args, **k):
    a = b.attn(b.norm1(x), *args, **k)
    return a + b.drop_path2(b.mlp(a))


def one_drop_path(b, x):
    a = b.attn(b.norm1(x))
    return a + b.drop_path(b.mlp(a))


def one_drop_path_gammas(b, x):
    a = b.attn(b.norm1(x))
    return a + b.drop_path(b.gamma_2 * b.mlp(a))


def post(b, x, **k):
    a = b.attn(x, **k)
    return a + b.drop_path2(b.norm2(b.mlp(a)))


def sandwich(b, x, cos, sin, **k):
    a = b.attn(b.norm1(x), cos, sin, **k)
    return a + b.drop_path(b.norm4(b.mlp(a)))


def parallel(b, x, **k):
    a = b.attns[0].attn(b.attns[0].norm(x), **k) + b.attns[1].attn(b.attns[1].norm(x), **k)
    f, g = b.ffns
    return a + (f.drop_path(f.ls(f.mlp(a))) + g.drop_path(g.ls(g.mlp(a))))


def cait(b, x, x_cls):
    a = b.attn(b.norm1(torch.cat([x_cls, x], 1)))
    return a + b.drop_path(b.gamma_2 * b.mlp(a))


def xcit(b, x):
    a = b.attn(b.norm1(x))
    return torch.cat([a + b.drop_path2(b.gamma2 * b.mlp(a)), x[:, 1:]], 1)


def volo_class(b, x):
    a = b.attn(b.norm1(x))
    return torch.cat([a + b.drop_path2(b.mlp(a)), x[:, 1:]], 1)


def levit(b, x):
    a = b.attn(x)
    return a + b.drop_path2(b.mlp(a))


def pvt(b, x, size):
    a = b.attn(b.norm1(x), size)
    return a + b.drop_path2(b.mlp(a, size))


def swin(b, x):
    a = b._attn(b.norm1(x))
    return a + b.drop_path2(b.mlp(a.reshape(len(a), -1, a.shape[-1]))).reshape(a.shape)


def swin2(b, x):
    a = b._attn(x)
    return a + b.drop_path2(b.norm2(b.mlp(a.reshape(len(a), -1, a.shape[-1])))).reshape(a.shape)


def global_context(b, x, q):
    a = b._window_attn(b.norm1(x), q)
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def partition(b, x):
    a = b._partition_attn(b.norm1(x))
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def swin_cr(b, x):
    a = b._shifted_window_attn(x)
    return b.norm3(a + b.drop_path2(b.norm2(b.mlp(a.reshape(len(a), -1, a.shape[-1])))).reshape(a.shape))


def tnt(b, pixels, words):
    pixels = pixels + b.drop_path(b.attn_in(b.norm_in(pixels)))
    pixels = pixels + b.drop_path(b.mlp_in(b.norm_mlp_in(pixels)))
    n, k, _ = words.shape
    if b.legacy:
        more = b.proj(b.norm1_proj(pixels).reshape(n, k - 1, -1))
    else:
        more = b.norm2_proj(b.proj(b.norm1_proj(pixels.reshape(n, k - 1, -1))))
    words = torch.cat([words[:, :1], words[:, 1:] + more], 1)
    a = b.attn_out(b.norm_out(words))
    return pixels, a + b.drop_path(b.mlp(a))


def window_by_window(x, size, attend, out=None):
    "One window after the other, with zeros over the edge. (B, h, w, C)"
    (h, w), out = x.shape[1:3], out or size
    x = nn.functional.pad(x, (0, 0, 0, -w % size[1], 0, -h % size[0]))
    rows = [torch.cat([attend(x[:, i:i + size[0], j:j + size[1]]) for j in range(0, x.shape[2], size[1])], 2) for i in range(0, x.shape[1], size[0])]
    return torch.cat(rows, 1)[:, :h * out[0] // size[0], :w * out[1] // size[1]]


def tiny_vit(b, x):
    size = (b.window_size, b.window_size)
    a = window_by_window(x, size, lambda t: b.attn(t.flatten(1, 2)).unflatten(1, size))
    return a + b.drop_path2(b.mlp.fc2(b.mlp.act(b.mlp.fc1(a))))


def sam(b, x):
    y = b.norm1(x)
    a = window_by_window(y, (b.window_size,) * 2, b.attn) if b.window_size else b.attn(y)
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def mvit(b, x, size):
    a, size = b.attn(b.norm1(x), size)
    wide = a if b.shortcut_proj_mlp is None else b.shortcut_proj_mlp(a)
    return wide + b.drop_path2(b.mlp(a)), size


def sam2(b, x):
    y, stride = b.norm1(x), b.q_stride or (1, 1)
    size = tuple(b.window_size)
    a = window_by_window(y, size, b.attn, [n // k for n, k in zip(size, stride)]) if b.is_windowed else b.attn(y)
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def mixed(b, x):
    a = b.token_mixer(b.norm1(x))
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def mixed_bare(b, x):
    a = b.token_mixer(x)
    return a + b.drop_path2(b.ls2(b.mlp(a)))


def fast(b, x):
    a = b.token_mixer(b.norm(x))
    return a + b.drop_path2(b.layer_scale_2(b.mlp(a)))


def metaformer(b, x):
    a = b.token_mixer(b.norm1(x))
    return b.res_scale2(a) + b.layer_scale2(b.drop_path2(b.mlp(a)))


def rolled(b, x, size):
    "Hugging Face's Swin: the roll is on the padded canvas."
    ws, shift, c = int(b.window_size), int(b.shift_size), x.shape[-1]
    x = x.view(len(x), *size, c)
    x = nn.functional.pad(x, (0, 0, 0, -size[1] % ws, 0, -size[0] % ws))
    mask, x = b.get_attn_mask(*x.shape[1:3], dtype=x.dtype, device=x.device), torch.roll(x, (-shift, -shift), (1, 2))
    across = x.shape[2] // ws
    nth = iter(range(10**6))

    def attend(t):
        i = next(nth)
        return b.attention(t.flatten(1, 2), None if mask is None else mask[i % (across * (x.shape[1] // ws))][None].expand(len(t), -1, -1))[0].view(t.shape)
    return torch.roll(window_by_window(x, (ws, ws), attend), (shift, shift), (1, 2))[:, :size[0], :size[1]].flatten(1, 2)


def hf_swin(b, x, size, always_partition=False, **k):
    if not always_partition:
        b.set_shift_and_window_size(size)
    a = rolled(b, b.layernorm_before(x), size)
    return (a + b.dropout(b.mlp(a)),)


def hf_swin2(b, x, size, output_attentions=False):
    a = rolled(b, x, size)
    return (a + b.drop_path(b.layernorm_after(b.output(b.intermediate(a)))),)


def hf_sam(b, x):
    y = b.layer_norm1(x)
    attend = lambda t: b.attn(t)[0]
    a = window_by_window(y, (b.window_size,) * 2, attend) if b.window_size else attend(y)
    return a + b.mlp(a)


def hf_closing(b, x, *args, **k):
    a = b.attention(b.layernorm_before(x), *args, **k)
    a = a[0] if isinstance(a, tuple) else a
    return a + b.output.dropout(b.output.dense(b.intermediate(a)))


def hf_pixio(b, x, *args, **k):
    a = b.dropout(b.attention(b.layernorm_before(x), *args, **k)[0])
    return a + b.drop_path(b.dropout(b.mlp(a)))


def hf_internvl(b, x):
    a = b.attention(b.layernorm_before(x))[0]
    return a + b.lambda_2 * b.dropout(b.mlp(a))


def tv_swin(b, x):
    a = b.attn(b.norm1(x))
    return a + b.stochastic_depth(b.mlp(a))


def tv_swin2(b, x):
    a = b.attn(x)
    return a + b.stochastic_depth(b.norm2(b.mlp(a)))


def tv_maxvit(b, x):
    p = b.p
    y = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)      # (B, windows, cells, C)
    y = y.transpose(1, 2) if b.partition_type == "grid" else y
    a = b.attn_layer(y)
    for part in list(b.mlp_layer)[1:]:
        y = part(a if part is b.mlp_layer[1] else y)
    y = a + b.stochastic_dropout(y)
    y = y.transpose(1, 2) if b.partition_type == "grid" else y
    n = x.shape[2] // p
    return y.unflatten(1, (n, -1)).unflatten(3, (p, p)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def hf_vit(b, x, *args, **k):
    a = b.dropout(b.attention(b.layernorm_before(x), *args, **k)[0])
    return a + b.dropout(b.mlp(a))


def hf_dino(b, x, *args, **k):
    a = b.attention(b.norm1(x), *args, **k)[0]
    return a + b.drop_path(b.layer_scale2(b.mlp(a)))


def hf_clip(b, x, *args, **k):
    a = b.self_attn(b.layer_norm1(x), *args, **k)[0]
    return a + b.mlp(a)


def hf_aim(b, x, *args, **k):
    a = b.attention(b.rms_norm1(x), *args, **k)[0]
    return a + b.ffn(a)


def hf_beit(b, x, attention_mask=None, resolution=None, **k):
    if b.relative_position_bias is not None:
        attention_mask = b.relative_position_bias((4, 4), False, dim_size=17)
    a = b.dropout(b.attention(b.layernorm_before(x), attention_mask=attention_mask, **k)[0])
    return a + b.drop_path(b.lambda_2 * b.dropout(b.mlp(a)))


def torchvision_block(b, x):
    y = b.ln_1(x)
    a = b.dropout(b.self_attention(y, y, y, need_weights=False)[0])
    return a + b.mlp(a)


def open_clip_block(b, x, attn_mask=None):
    y = b.ln_1(x)
    a = b.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
    return a + b.ls_2(b.mlp(a))


# name: (how the model is made, the formula, the parts of the last block that rest)
NLS, NG = "ls1 norm2", "gamma_1 norm2"
CASES = {
    "Block": (timm_model("vit_tiny_patch16_224", **FLAT, init_values=1e-5), block, NLS),
    "Block, no LayerScale": (timm_model("deit_tiny_patch16_224", **FLAT), block, "norm2"),
    "Block of PiT": (timm_model("pit_ti_224", **SMALL), block, "norm2"),
    "Block of NaFlexVit": (timm_model("naflexvit_base_patch16_gap", **CLASSES, embed_dim=48, depth=2, num_heads=2), block, "ls1 norm2"),
    "RelPosBlock": (timm_model("vit_relpos_small_patch16_224", **FLAT, init_values=1e-5), block, NLS),
    "EvaBlock": (timm_model("eva02_tiny_patch14_224", **FLAT, init_values=1e-5), gammas, NG),
    "EvaBlock, no LayerScale": (timm_model("eva02_tiny_patch14_224", **FLAT), no_scale, "norm2"),
    "EvaBlock, LayerScale on attention": (timm_model("eva02_tiny_patch14_224", **FLAT, init_values=1e-5, attn_only_layer_scale=True), no_scale, NG),
    "beit.Block": (timm_model("beit_base_patch16_224", **FLAT), gammas, NG),
    "beit.Block, no LayerScale": (timm_model("beit_base_patch16_224", **FLAT, init_values=0), no_scale, "norm2"),
    "DeepseekVitBlock": (timm_model("deepseek_vit_412m", **FLAT), no_scale, "norm2"),
    "LayerScaleBlock": (timm_model("cait_xxs24_224", **FLAT, depth_token_only=0, global_pool="avg"), one_drop_path_gammas, NG),
    "convit.Block": (timm_model("convit_tiny", **{**FLAT, "embed_dim": 24}), one_drop_path, "norm2"),
    "visformer.Block": (timm_model("visformer_tiny", **SMALL, depth=(1, 1, 1), embed_dim=64, drop_path_rate=.5), one_drop_path, "norm2"),
    "ResPostBlock": (timm_model("vit_tiny_patch16_224", **FLAT, init_values=1e-5, block_fn=vit.ResPostBlock), post, "norm1"),
    "ResPostRelPosBlock": (timm_model("vit_relpos_medium_patch16_rpn_224", **FLAT), post, "norm1"),
    "EvaBlockPostNorm": (timm_model("eva02_tiny_patch14_224", **FLAT, use_post_norm=True), post, "norm1"),
    "Gemma4Block": (timm_model("gemma4_vit_167m", **FLAT, num_kv_heads=2, head_dim=24), sandwich, "norm2 norm3"),
    "ParallelThingsBlock": (timm_model("vit_tiny_patch16_224", **FLAT, init_values=1e-5, block_fn=vit.ParallelThingsBlock), parallel,
                            "attns.0.ls attns.1.ls ffns.0.norm ffns.1.norm"),
    "LayerScaleBlockClassAttn": (timm_model("cait_xxs24_224", **FLAT), cait, NG),
    "ClassAttentionBlock": (timm_model("xcit_nano_12_p16_224", **{**FLAT, "patch_size": 16}), xcit, "gamma1 norm2"),
    "volo.ClassBlock": (lambda: volo.VOLO((1, 1, 1, 1), **SMALL, embed_dims=(48,) * 4, num_heads=(2,) * 4, drop_path_rate=.5), volo_class, "norm2"),
    "nest.TransformerLayer": (lambda: nest.Nest(**SMALL, patch_size=2, embed_dims=(16, 32, 48), num_heads=(1, 1, 2), depths=(1, 1, 1), drop_path_rate=.5),
                              no_scale, "norm2"),
    "twins.Block": (timm_model("twins_svt_small", **SMALL, embed_dims=(16, 16, 16, 48), num_heads=(1, 1, 1, 2), depths=(1, 1, 1, 1), mlp_ratios=(2,) * 4,
                               drop_path_rate=.5), no_scale, "norm2"),
    "pvt_v2.Block": (timm_model("pvt_v2_b0", **CLASSES, embed_dims=(16, 16, 16, 48), num_heads=(1, 1, 1, 2), depths=(1, 1, 1, 1), drop_path_rate=.5), pvt,
                     "norm2"),
    "LevitBlock": (timm_model("levit_128s", img_size=64, num_classes=5, embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), drop_path_rate=.5), levit, ""),
    "HieraBlock": (timm_model("hiera_tiny_224", img_size=64, num_classes=5, embed_dim=16, stages=(1, 1, 1, 2), drop_path_rate=.5), block, "norm2"),
    "HieraBlock that widens": (timm_model("hiera_tiny_224", img_size=64, num_classes=5, embed_dim=16, stages=(1, 1, 1, 1)), block, "norm2 proj"),
    "TransformerBlock2d": (timm_model("coatnet_nano_rw_224", img_size=64, num_classes=5, depths=(1, 1, 1, 1), embed_dim=(32, 32, 32, 64)),
                           block, "norm2 shortcut"),
    "PartitionAttentionCl": (timm_model("maxvit_rmlp_pico_rw_256", img_size=64, num_classes=5, depths=(1, 1, 1, 1), embed_dim=(32, 32, 64, 64)),
                             partition, "norm2"),
    "GlobalContextVitBlock": (lambda: gcvit.GlobalContextVit(img_size=64, num_classes=5, layer_scale=1e-5, **STAGES), global_context, NLS),
    "SwinTransformerBlock": (timm_model("swin_tiny_patch4_window7_224", **SMALL, **STAGES, window_size=2, patch_size=2), swin, "norm2"),
    "SwinTransformerV2Block": (timm_model("swinv2_tiny_window8_256", **SMALL, **STAGES, window_size=2, patch_size=2), swin2, "norm1"),
    "SwinTransformerV2CrBlock": (timm_model("swinv2_cr_tiny_ns_224", **SMALL, **STAGES, window_size=2, patch_size=2), swin_cr, "norm1"),
    "tnt.Block": (timm_model("tnt_s_patch16_224", **SMALL, depth=2, drop_path_rate=.5), tnt, "norm_mlp"),
    "tnt.Block, legacy": (timm_model("tnt_s_legacy_patch16_224", **SMALL, depth=2, drop_path_rate=.5), tnt, "norm_mlp"),
    "TinyVitBlock": (timm_model("tiny_vit_5m_224", **CLASSES, embed_dims=(16, 16, 16, 48), depths=(1, 1, 1, 2), num_heads=(1, 1, 1, 2),
                                window_sizes=(3, 3, 3, 3), drop_path_rate=.5), tiny_vit, "mlp.norm local_conv"),
    "vision_transformer_sam.Block": (timm_model("samvit_base_patch16", img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2, window_size=3,
                                                global_attn_indexes=(0,), drop_path_rate=.5), sam, "norm2"),
    "vision_transformer_sam.Block, global": (timm_model("samvit_base_patch16", img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2,
                                                        window_size=3, global_attn_indexes=(1,)), sam, "norm2"),
    "mvitv2.MultiScaleBlock": (mvit_model(depths=(1, 1, 1, 2)), mvit, "norm2"),
    "mvitv2.MultiScaleBlock, [CLS]": (mvit_model(depths=(1, 1, 1, 2), use_cls_token=True), mvit, "norm2"),
    "mvitv2.MultiScaleBlock, wider in its MLP": (mvit_model(expand_attn=False), mvit, "norm2"),
    "mvitv2.MultiScaleBlock, wider in its attention": (mvit_model(expand_attn=True), mvit, "norm2 shortcut_proj_attn"),
    "hieradet_sam2.MultiScaleBlock": (timm_model("hieradet_small", **CLASSES, embed_dim=16, stages=(1, 1, 1, 2), window_spec=(4, 4, 4, 3),
                                                 global_att_blocks=(), drop_path_rate=.5), sam2, NLS),
    "hieradet_sam2.MultiScaleBlock that pools": (timm_model("hieradet_small", **CLASSES, embed_dim=16, stages=(1, 1, 1, 1), window_spec=(4, 4, 4, 4),
                                                            global_att_blocks=()), sam2, "ls1 norm2 proj"),
    "MetaBlock1d": (timm_model("efficientformer_l1", **CLASSES, depths=(1, 1, 1, 2), embed_dims=(16, 16, 16, 48), num_vit=1, drop_path_rate=.5),
                    mixed, "norm2 ls1"),
    "EfficientFormerV2Block": (timm_model("efficientformerv2_s0", img_size=64, num_classes=5, depths=(1, 1, 1, 2), embed_dims=(16, 16, 16, 48), num_vit=1,
                                          drop_path_rate=.5), mixed_bare, "ls1"),
    "fastvit.AttentionBlock": (timm_model("fastvit_sa12", **CLASSES, layers=(1, 1, 1, 2), embed_dims=(16, 16, 16, 64), drop_path_rate=.5),
                               fast, "layer_scale_1"),
    "MetaFormerBlock": (caformer, metaformer, "norm2 res_scale1"),
    "Swinv2Layer": (hf_model("Swinv2ForImageClassification", "Swinv2Config", "eager", **SWIN, window_size=3), hf_swin2, "layernorm_before"),
    "SamVisionLayer": (hf_model("SamVisionModel", "SamVisionConfig", **SAM, global_attn_indexes=[0]), hf_sam, "layer_norm2"),
    "SamVisionLayer, global": (hf_model("SamVisionModel", "SamVisionConfig", "eager", **SAM, global_attn_indexes=[1]), hf_sam, "layer_norm2"),
    "SamHQVisionLayer": (hf_model("SamHQVisionModel", "SamHQVisionConfig", **SAM, global_attn_indexes=[0]), hf_sam, "layer_norm2"),
    "GotOcr2VisionLayer": (got_ocr, hf_sam, "layer_norm2"),
    "SwinLayer": (hf_model("SwinForImageClassification", "SwinConfig", **SWIN, window_size=3), hf_swin, "layernorm_after"),
    "SwinLayer, eager": (hf_model("SwinForImageClassification", "SwinConfig", "eager", **SWIN, window_size=8), hf_swin, "layernorm_after"),
    "Blip2EncoderLayer": (hf_model("Blip2VisionModel", "Blip2VisionConfig"), hf_clip, "layer_norm2"),
    "CLIPSegEncoderLayer": (hf_model("CLIPSegVisionModel", "CLIPSegVisionConfig"), hf_clip, "layer_norm2"),
    "ChineseCLIPVisionLayer": (hf_model("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"), hf_clip, "layer_norm2"),
    "MLCDEncoderLayer": (hf_model("MLCDVisionModel", "MLCDVisionConfig"), hf_clip, "layer_norm2"),
    "OwlViTEncoderLayer": (hf_model("OwlViTVisionModel", "OwlViTVisionConfig"), hf_clip, "layer_norm2"),
    "Owlv2EncoderLayer": (hf_model("Owlv2VisionModel", "Owlv2VisionConfig"), hf_clip, "layer_norm2"),
    "AltCLIPEncoderLayer": (hf_model("AltCLIPVisionModel", "AltCLIPVisionConfig"), hf_clip, "layer_norm2"),
    "Idefics3EncoderLayer": (hf_model("Idefics3VisionTransformer", "Idefics3VisionConfig"), hf_clip, "layer_norm2"),
    "SmolVLMEncoderLayer": (hf_model("SmolVLMVisionTransformer", "SmolVLMVisionConfig"), hf_clip, "layer_norm2"),
    "PixioLayer": (hf_model("PixioModel", "PixioConfig", hidden_dropout_prob=.2, drop_path_rate=.5, mlp_ratio=2), hf_pixio, "layernorm_after"),
    "InternVLVisionLayer": (hf_model("InternVLVisionModel", "InternVLVisionConfig", image_size=(32, 32), patch_size=(8, 8), hidden_dropout_prob=.2),
                            hf_internvl, "lambda_1 layernorm_after"),
    "DPTViTLayer": (hf_model("DPTModel", "DPTConfig", hidden_dropout_prob=.2), hf_closing, "layernorm_after"),
    "YolosLayer": (hf_model("YolosModel", "YolosConfig", image_size=(32, 32), num_detection_tokens=3), hf_closing, "layernorm_after"),
    "SwinTransformerBlock of torchvision": (torchvision_swin("SwinTransformerBlock"), tv_swin, "norm2"),
    "SwinTransformerBlockV2 of torchvision": (torchvision_swin("SwinTransformerBlockV2"), tv_swin2, "norm1"),
    "PartitionAttentionLayer of torchvision": (torchvision_maxvit, tv_maxvit, "mlp_layer.0"),
    "ViTLayer": (hf_model("ViTForImageClassification", "ViTConfig", hidden_dropout_prob=.2), hf_vit, "layernorm_after"),
    "ViTLayer, eager": (hf_model("ViTForImageClassification", "ViTConfig", "eager", hidden_dropout_prob=.2), hf_vit, "layernorm_after"),
    "DeiTLayer": (hf_model("DeiTForImageClassification", "DeiTConfig", hidden_dropout_prob=.2), hf_vit, "layernorm_after"),
    "ViTMAELayer": (hf_model("ViTMAEModel", "ViTMAEConfig", hidden_dropout_prob=.2), hf_vit, "layernorm_after"),
    "ViTMSNLayer": (hf_model("ViTMSNForImageClassification", "ViTMSNConfig"), hf_vit, "layernorm_after"),
    "IJepaLayer": (hf_model("IJepaForImageClassification", "IJepaConfig"), hf_vit, "layernorm_after"),
    "Dinov2Layer": (hf_model("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, layerscale_value=1e-5, drop_path_rate=.5), hf_dino,
                    "layer_scale1 norm2"),
    "Dinov2Layer, eager": (hf_model("Dinov2Model", "Dinov2Config", "eager", mlp_ratio=2, layerscale_value=1e-5), hf_dino, "layer_scale1 norm2"),
    "Dinov2WithRegistersLayer": (hf_model("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", mlp_ratio=2, layerscale_value=1e-5),
                                 hf_dino, "layer_scale1 norm2"),
    "DINOv3ViTLayer": (hf_model("DINOv3ViTModel", "DINOv3ViTConfig", layerscale_value=1e-5, num_register_tokens=4), hf_dino, "layer_scale1 norm2"),
    "DINOv3ViTLayer, eager": (hf_model("DINOv3ViTModel", "DINOv3ViTConfig", "eager", layerscale_value=1e-5), hf_dino, "layer_scale1 norm2"),
    "CLIPEncoderLayer": (hf_model("CLIPVisionModel", "CLIPVisionConfig"), hf_clip, "layer_norm2"),
    "CLIPEncoderLayer, eager": (hf_model("CLIPVisionModel", "CLIPVisionConfig", "eager"), hf_clip, "layer_norm2"),
    "MetaClip2EncoderLayer": (hf_model("MetaClip2VisionModel", "MetaClip2VisionConfig"), hf_clip, "layer_norm2"),
    "SiglipEncoderLayer": (hf_model("SiglipVisionModel", "SiglipVisionConfig"), hf_clip, "layer_norm2"),
    "Aimv2EncoderLayer": (hf_model("Aimv2VisionModel", "Aimv2VisionConfig"), hf_aim, "rms_norm2"),
    "BeitLayer": (hf_model("BeitForImageClassification", "BeitConfig", layer_scale_init_value=1e-5, use_relative_position_bias=True, drop_path_rate=.5),
                  hf_beit, "lambda_1 layernorm_after"),
    "BeitLayer, plain, eager": (hf_model("BeitForImageClassification", "BeitConfig", "eager", layer_scale_init_value=0.), hf_beit, "layernorm_after"),
    "EncoderBlock of torchvision": (torchvision_model, torchvision_block, "ln_2"),
    "ResidualAttentionBlock of open_clip": (open_clip_model, open_clip_block, "ls_1 ln_2"),
}


def answer(model, x):
    "The tensor of a model's answer."
    torch.manual_seed(0)                                    # MAE shuffles
    y = model(x)
    for key in ("logits", "pooler_output", "last_hidden_state"):
        if getattr(y, key, None) is not None:
            return y[key]
    return y[0] if isinstance(y, tuple) else y


def make(key, seed=0):
    model, x = made(key, seed)
    torch.manual_seed(seed)
    return deepcopy(model), x.clone()


@cache
def made(key, seed):
    torch.manual_seed(seed)
    model = CASES[key][0]().eval()
    for p in model.parameters():                            # some heads start at zero, and would say nothing
        if not p.any():
            nn.init.normal_(p.data, std=.1)
    large = ("Levit", "Hiera", "TransformerBlock2d", "Partition", "GlobalContext", "mvitv2", "TinyVit", "vision_transformer_sam", "hieradet",
             "MetaBlock1d", "EfficientFormerV2", "fastvit", "MetaFormerBlock")
    size = 224 if key == "MetaBlock1d" else 64 if key.startswith(large) else 32
    return model, torch.rand(2, 3, size, size)


@cache
def stock(key):
    model, x = make(key)
    y = answer(model, x)
    y.square().sum().backward()
    return y.detach(), {n for n, p in model.named_parameters() if p.grad is not None}


def call(model, x):
    "The arguments with which a model calls its last block."
    heard = {}
    hook = _last_block(model).register_forward_pre_hook(lambda m, args, kwargs: heard.update(args=args, kwargs=kwargs), with_kwargs=True)
    with torch.no_grad():
        model(x)
    hook.remove()
    return heard["args"], heard["kwargs"]


def tensors(y):
    return [t for t in (y if isinstance(y, tuple) else (y,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("key", CASES)
def test_forward_is_the_formula(key):
    model, x = make(key)
    model, x = model.double().train(), x.double()           # DropPath and dropout fall alike from the same seed
    last = _last_block(model)
    assert type(last).__name__ == key.split(",")[0].split(" ")[0].split(".")[-1]
    args, kwargs = call(model, x)
    with se.drop_last_skip(model), torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            got = last(*args, **kwargs)
            torch.manual_seed(seed)
            want = CASES[key][1](last, *args, **kwargs)
            got, want = tensors(got), tensors(want)
            assert len(got) >= len(want) and all(t.dtype == torch.float64 for t in got)
            for a, b in zip(got, want):
                assert_close(a, b, rtol=0, atol=1e-12)
        if len(args) == 1:                                  # the tokens by name, as the stock block would take them
            first = list(inspect.signature(type(last)._with_skip.forward).parameters)[1]
            torch.manual_seed(seed)
            assert torch.equal(tensors(last(**{first: args[0]}, **kwargs))[0], got[0])


@pytest.mark.parametrize("key", CASES)
def test_done_and_undone(key):
    (model, x), (y, trained) = make(key), stock(key)
    names, last, cls = list(model.state_dict()), _last_block(model), type(_last_block(model))
    surgery = se.drop_last_skip(model)
    assert isinstance(last, cls) and list(model.state_dict()) == names
    changed = answer(model, x)
    assert changed.shape == y.shape and not torch.allclose(changed, y, rtol=1e-3, atol=1e-5)
    changed.square().sum().backward()
    prefix = next(n for n, m in model.named_modules() if m is last) + "."
    frozen = {n.removeprefix(prefix) for n, p in model.named_parameters() if not p.requires_grad}
    rests = CASES[key][2].split()
    assert all(any(n == r or n.startswith(f"{r}.") for r in rests) for n in frozen - {"pos_embed", "embeddings.position_embeddings"}), frozen
    assert all(any(n == r or n.startswith(f"{r}.") for n in frozen) for r in rests), frozen
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained - {prefix + n for n in frozen}
    resting = [p for n, p in last.named_parameters() if n in frozen]
    kept = [p.clone() for p in resting]
    for p in resting:
        p.normal_()                                         # what rests says nothing any more: LayerScale is off the path
    assert torch.equal(answer(model, x), changed)
    for p, old in zip(resting, kept):
        p.copy_(old)
    surgery.undo()
    assert type(last) is cls and torch.equal(answer(model, x), y)
    surgery.undo()
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= trained


@pytest.mark.parametrize("how", ["assigned", "from the meta device"])
def test_undone_for_parameters_that_were_replaced(how):
    """New parameters that stand under the old names get the flags that the old ones had."""
    with torch.device("meta" if how == "from the meta device" else "cpu"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, init_values=1e-4)
    model.blocks[1].norm2.bias.requires_grad_(False)        # as the owner left it
    surgery = se.drop_last_skip(model)
    if how == "assigned":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model.to_empty(device="cpu")
    assert {n for n, p in model.blocks[1].named_parameters() if not p.requires_grad} == {"norm2.weight", "norm2.bias", "ls1.gamma"}
    surgery.undo()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"blocks.1.norm2.bias"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_says_what_to_do():
    model, _ = make("Block")
    with se.drop_last_skip(model), pytest.raises(RuntimeError, match=r"runs without its skip, which torch.jit.script cannot compile; use torch.export"):
        torch.jit.script(model)


@pytest.mark.parametrize("key", CASES)
@torch.no_grad()
def test_copies_and_pickles_keep_it(key):
    (model, x), file = make(key), io.BytesIO()
    surgery = se.drop_last_skip(model)
    y = answer(model, x)
    torch.save(model, file)
    file.seek(0)
    copy = deepcopy(model)
    surgery.undo()
    for other in (copy, torch.load(file, weights_only=False)):
        assert torch.equal(answer(other, x), y)
        assert [p.requires_grad for p in other.parameters()].count(False) >= sum(n != "" for n in CASES[key][2].split())
        assert "no skip around attention" in repr(_last_block(other))
        with pytest.raises(ValueError, match="dropped already"):
            se.drop_last_skip(other)
    assert not torch.allclose(answer(model, x), y)


def test_the_whole_table_is_tested():
    tested = set()
    for key in CASES:
        try:
            tested.add(_name_of(_last_block(make(key)[0])))
        except pytest.skip.Exception:
            pass
    assert {n for n in _ways if n.startswith("timm.")} <= tested
    assert {n for n in _ways if locate(n.split(".")[0]) and n not in tested} <= {"transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer"}


@pytest.mark.parametrize("key", CASES)
def test_other_arguments_come_in_the_same_order(key):
    last = _last_block(make(key)[0])
    way = _ways[_name_of(last)]
    if way.forward.__name__ != "_tokens":
        return
    part = getattr(last, next(n for n, takes_all in way.attention if takes_all))
    names = lambda f: [n for n, p in inspect.signature(f).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = names(last.forward)[1:]
    assert names(part.forward if isinstance(part, nn.Module) else part)[1:][:len(wanted)] == wanted


@pytest.mark.parametrize("key", ["Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm", "ParallelThingsBlock"])
@pytest.mark.parametrize("more", [dict(attn_mask=torch.ones(5, 5).tril().bool()), dict(is_causal=True)])
def test_masks(key, more):
    model = make(key)[0]
    last, x = _last_block(model), torch.rand(2, 5, 48)
    with se.drop_last_skip(model), torch.no_grad():
        assert_close(last(x, **more), CASES[key][1](last, x, **more))
        assert not torch.allclose(last(x, **more), last(x))


def test_shared_biases_and_rope():
    with torch.no_grad():
        model, _ = make("RelPosBlock")
        with se.drop_last_skip(model):
            b, x = _last_block(model), torch.rand(2, 16, 48)
            shared = torch.rand(1, 2, 16, 16)
            assert_close(b(x, shared), block(b, x, shared_rel_pos=shared))
        model, _ = make("beit.Block")
        with se.drop_last_skip(model):
            b, x = _last_block(model), torch.rand(2, 17, 48)
            shared = torch.rand(2, 17, 17)
            assert_close(b(x, shared), gammas(b, x, shared_rel_pos_bias=shared))
            assert not torch.allclose(b(x, shared), b(x))
        model, x = make("EvaBlock")
        (x, *_), kwargs = call(model, x)
        with se.drop_last_skip(model):
            assert not torch.allclose(_last_block(model)(x, **kwargs), _last_block(model)(x))


@pytest.mark.parametrize("key,when", [("Block", "before"), ("Block", "after"), ("EvaBlock", "after"), ("ViTLayer", "after")])
def test_compiled_fullgraph(key, when):
    torch._dynamo.reset()
    model, x = make(key)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if when == "after":                                     # compiled, and run, before the surgery
        assert_close(answer(compiled, x), stock(key)[0])
    surgery = se.drop_last_skip(compiled)
    want = answer(model, x)
    got = answer(compiled, x)
    assert_close(got, want)
    assert not torch.allclose(got, stock(key)[0])
    got.square().sum().backward()
    assert all((p.grad is not None) or n not in stock(key)[1] for n, p in model.named_parameters() if p.requires_grad)
    surgery.undo()
    assert_close(answer(compiled, x), stock(key)[0])


@pytest.mark.parametrize("key", ["Block", "EvaBlock", "SwinTransformerBlock", "ViTLayer", "Dinov2Layer", "BeitLayer"])
def test_checkpointing(key):
    model, x = make(key)
    se.drop_last_skip(model)
    grads = []
    for on in (False, True):
        m, runs = deepcopy(model).train(), []
        if on and key.endswith("Layer"):
            enable = getattr(m, "activation_checkpointing_enable", None) or m.gradient_checkpointing_enable
            enable(dict(use_reentrant=False))
        elif on:
            m.set_grad_checkpointing()
        hook = _last_block(m).mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        answer(m, x).square().sum().backward()
        hook.remove()
        assert len(runs) == 1 + on
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-6)


def test_checkpointing_one_block():
    model, _ = make("Block")
    b, x = _last_block(model), torch.rand(2, 17, 48, requires_grad=True)
    with se.drop_last_skip(model):
        checkpoint(b, x, use_reentrant=False).sum().backward()
        got, x.grad = x.grad, None
        b(x).sum().backward()
    assert_close(got, x.grad)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_hugging_face_still_records(attn):
    model = hf_model("Dinov2ForImageClassification", "Dinov2Config", attn, mlp_ratio=2, layerscale_value=1e-5)().eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), se.drop_last_skip(model):
        y = model(x, output_hidden_states=True, output_attentions=attn == "eager")
        assert len(y.hidden_states) == 3 and type(y).__name__ == "ImageClassifierOutput"
        b = _last_block(model)
        assert_close(b(y.hidden_states[1]), hf_dino(b, y.hidden_states[1]))
        if attn == "eager":
            assert [a.shape for a in y.attentions] == [(2, 2, 17, 17)] * 2


def test_the_tower_that_sees():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    text = dict(small, vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    see = {k: v for k, v in HF.items() if k != "num_labels"}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=see))
    assert _last_block(clip) is clip.vision_model.encoder.layers[-1]
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=see))     # its pooling head attends, too
    assert _last_block(siglip) is siglip.vision_model.encoder.layers[-1]
    siglip2 = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**small, patch_size=8, num_patches=16))
    b, x = _last_block(siglip2), torch.rand(2, 4, 48)
    with se.drop_last_skip(siglip2):
        assert_close(b(x, None), hf_clip(b, x, None))
    mae = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**see, **DECODER))
    assert _last_block(mae) is mae.vit.layers[-1]
    open_clip = pytest.importorskip("open_clip")
    both = open_clip.model.CLIP(48, dict(image_size=32, patch_size=8, width=48, layers=2, head_width=24),
                                dict(context_length=8, vocab_size=20, width=48, heads=2, layers=1))
    assert _last_block(both) is both.visual.transformer.resblocks[-1]
    pooled = timm.create_model("vit_base_patch16_siglip_224", **FLAT)
    assert _last_block(pooled) is pooled.blocks[-1]


def test_tap_and_surgery_mean_the_same_tower():
    two = nn.ModuleDict(dict(a=make("Block")[0], b=make("Block")[0]))
    for ask in (se.AttentionTap, se.drop_last_skip):
        with pytest.raises(se.UnsupportedModel, match="holds several vision models"):
            ask(two)
    beside = nn.ModuleDict(dict(text=nn.TransformerEncoderLayer(8, 2), eye=make("EvaBlock")[0], last=nn.MultiheadAttention(8, 2)))
    assert _last_block(beside) is beside["eye"].blocks[-1]


def test_the_layer_that_a_head_reads():
    transformers = pytest.importorskip("transformers")
    see = {k: v for k, v in HF.items() if k != "num_labels"}
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**{**see, "num_hidden_layers": 3}),
                                      text_config=transformers.LlamaConfig(**text), image_token_index=3, vision_feature_layer=-2)
    model = transformers.LlavaForConditionalGeneration(config)
    tower = next(m for n, m in model.named_modules() if n.endswith("encoder.layers") and "vision" in n)
    assert _last_block(model) is tower[1]


def test_flags_come_back_as_they_were():
    model = make("Block")[0].requires_grad_(False)
    model.blocks[-1].norm2.bias.requires_grad_()
    model.blocks[-1].norm2.bias.grad = torch.ones(48)
    with se.drop_last_skip(model):
        assert not any(p.requires_grad for p in model.parameters()) and model.blocks[-1].norm2.bias.grad is None
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["blocks.1.norm2.bias"]


class Scaled(nn.Module):
    "A block of our own that the table does not know."
    def __init__(self, dim, num_heads, **ignored):
        super().__init__()
        self.look, self.think = timm.layers.Attention(dim, num_heads), timm.layers.Mlp(dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x + self.look(x)
        return x + self.scale * self.think(x)


@pytest.fixture
def registry():
    known = dict(_ways)
    yield
    _ways.clear()
    _ways.update(known)


def test_a_block_of_ones_own(registry):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, embed_dim=48, depth=2, num_heads=2, block_fn=Scaled)
    with pytest.raises(se.UnsupportedModel, match=r"VisionTransformer: its last attention is in blocks.1, a Scaled \(.*\): .* register_surgery"):
        se.drop_last_skip(model)
    register_surgery(Scaled, "look()", "think scale")
    b, x, file = _last_block(model), torch.rand(2, 5, 48), io.BytesIO()
    with se.drop_last_skip(model):
        a = b.look(x)
        assert_close(b(x), a + b.scale * b.think(a))
        torch.save(model, file)
    register_surgery(Scaled, "look()", "think", also="scale", forward=lambda block, way, x: way.refine(block, 2 * way.attend(block, x)))
    with se.drop_last_skip(model):
        assert_close(b(x), 2 * a + b.think(2 * a))
    register_surgery(Scaled, "look()", "think")
    with pytest.raises(se.UnsupportedModel, match="disagree about scale"):
        se.drop_last_skip(model)
    del _ways[_name_of(b)]
    file.seek(0)
    with pytest.raises(se.UnsupportedModel, match="a Scaled without its skip was saved; call register_surgery"):
        torch.load(file, weights_only=False)


class OwnForward(vit.Block):
    def forward(self, x):
        return super().forward(2 * x)


class OnlyRenamed(vit.Block):
    pass


@pytest.mark.parametrize("model,said", [
    (timm_model("resnet18"), "ResNet: no attention was found in it"),
    (timm_model("vit_tiny_patch16_224", **FLAT, block_fn=vit.ParallelScalingBlock), r"in blocks.1, a ParallelScalingBlock \(.*\): .* share one residual"),
    (timm_model("vit_tiny_patch16_224", **FLAT, block_fn=vit.DiffParallelScalingBlock), "a DiffParallelScalingBlock .* share one residual"),
    (timm_model("vit_tiny_patch16_224", **FLAT, block_fn=OwnForward), "OwnForward is a Block with a forward of its own"),
    (timm_model("crossvit_tiny_240", **CLASSES), "CrossVit: .* a CrossAttentionBlock .* no MLP follows"),
    (timm_model("davit_tiny", **CLASSES, depths=(1, 1, 1, 1), embed_dims=(16,) * 4, num_heads=(1,) * 4), "DaVit: .* a ChannelBlock .* attends over channels"),
    (timm_model("nextvit_small", **CLASSES), "NextViT: .* a NextTransformerBlock .* a second path beside attention"),
])
def test_refusals(model, said):
    with pytest.raises(se.UnsupportedModel, match=said):
        se.drop_last_skip(model())


def test_the_last_attention_decides_not_the_last_known_block():
    model = make("Block")[0]
    model.blocks.append(Scaled(48, 2))
    with pytest.raises(se.UnsupportedModel, match="in blocks.2, a Scaled"):
        se.drop_last_skip(model)


def test_refusals_by_state():
    model = make("Block")[0]
    with pytest.raises(TypeError, match="model: got str, expected an nn.Module"):
        se.drop_last_skip("vit")
    model.blocks[-1].forward = model.blocks[-1].forward
    with pytest.raises(RuntimeError, match="its forward was replaced on the object"):
        se.drop_last_skip(model)
    del model.blocks[-1].forward
    del model.blocks[-1].mlp
    with pytest.raises(se.UnsupportedModel, match="Block: .* disagree about mlp; the block is of another version of timm"):
        se.drop_last_skip(model)
    model = make("Block")[0]
    surgery = se.drop_last_skip(model)
    model.blocks[-1].__class__ = type("FSDPBlock", (type(model.blocks[-1]),), {})
    with pytest.raises(ValueError, match="dropped already"):
        se.drop_last_skip(model)
    with pytest.raises(RuntimeError, match="FSDPBlock.* undo that first"):
        surgery.undo()
    with pytest.raises(ValueError, match="attention: got 'norm1 attn'"):
        register_surgery("a.b", "norm1 attn", "mlp")


def test_a_subclass_without_a_forward_is_the_block():
    model = timm_model("vit_tiny_patch16_224", **FLAT, block_fn=OnlyRenamed)().eval()
    with se.drop_last_skip(model):
        b, x = model.blocks[-1], torch.rand(2, 5, 48)
        assert_close(b(x), block(b, x))
    assert type(b) is OnlyRenamed


def test_a_hugging_face_subclass_without_a_forward():
    model, x = make("ViTLayer")                             # its base class wraps the forward of every subclass anew
    b = _last_block(model)
    b.__class__ = type("OnlyRenamed", (type(b),), {})
    with torch.no_grad(), se.drop_last_skip(model):
        x = torch.rand(2, 5, 48)
        assert_close(b(x), hf_vit(b, x))


def _passes(ddp, x, n=2):
    for _ in range(n):                                      # the second pass fails if a parameter had no gradient
        ddp.zero_grad()
        answer(ddp, x).square().mean().backward()
    return {k: p.grad for k, p in ddp.module.named_parameters() if p.grad is not None}


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    grads, mine = {}, slice(2 * rank, 2 * rank + 2)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))[mine]
    for key in ("Block", "ViTLayer"):
        model = make(key)[0]
        se.drop_last_skip(model)
        grads[key, "before"] = _passes(DistributedDataParallel(model), x)
        ddp = DistributedDataParallel(make(key)[0])         # in place on a wrapped model that has trained, and back again
        grads[key, "stock"] = _passes(ddp, x)
        with se.drop_last_skip(ddp):
            grads[key, "after"] = _passes(ddp, x)
        grads[key, "undone"] = _passes(ddp, x)
    fixed = DistributedDataParallel(make("Block")[0], static_graph=True)
    with pytest.raises(RuntimeError, match="drop the skip first, then wrap"):
        se.drop_last_skip(fixed)
    assert type(fixed.module.blocks[-1]) is vit.Block
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_equal_one():
    pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:
        how = "spawn" if torch.cuda.is_available() else "fork"             # a fork spares the children their imports; autograd forbids it beside a GPU
        torch.multiprocessing.start_processes(_ddp_worker, (folder,), nprocs=2, start_method=how)
        got = torch.load(Path(folder) / "grads.pt")
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for (key, when), grads in got.items():
        model = make(key)[0]
        if when in ("before", "after"):
            se.drop_last_skip(model)
        answer(model, x).square().mean().backward()
        want = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == want.keys()
        for k, g in want.items():
            assert_close(grads[k], g, atol=1e-6, rtol=1e-4, msg=lambda m, k=k, when=when: f"{when} {k}: {m}")


def test_handle_takes_a_block():
    model = make("Block")[0]
    with LastSkipSurgery(model.blocks[0]):                  # for whoever wants another block than the last
        assert hasattr(type(model.blocks[0]), "_with_skip") and type(model.blocks[1]) is vit.Block
