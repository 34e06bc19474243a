"""Small copies of transformers' vision models: how each is built, what it is given, and what it is known to read."""
import inspect
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from zoo import stirred

MODULES = {"maskformer.MaskFormerSwinModel": "maskformer_swin", "donut.DonutSwinModel": "donut_swin",
           "data2vec.Data2VecVisionForImageClassification": "data2vec_vision"}


@dataclass
class Spec:
    """One class. `more` overrides the configuration; functions there are asked with the size of the picture."""
    name: str                                            # "folder.Class"
    config: str
    more: object                                         # a dict, or a function of the size that gives one
    layers: int = 2                                      # attention layers that must be found
    prefix: int = 1
    suffix: int = 0
    reads: str = "cls"                                   # "cls", "mean", "prefix", "suffix"; "pool": the last layer's own query
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
        folder, name = self.name.split(".")
        file = MODULES.get(self.name, folder)
        return getattr(import_module(f"transformers.models.{folder}.modeling_{file}"), name)

    def make(self, size, attn=None):
        import transformers
        torch.manual_seed(0)
        more = self.more(size) if callable(self.more) else {k: v(size) if callable(v) else v for k, v in self.more.items()}
        config = getattr(transformers, self.config)(**more)
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

# ---- plain towers ----
_bare = dict(prefix=0, reads="mean")
_text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99)
SPECS += [
    Spec("altclip.AltCLIPVisionModel", "AltCLIPVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("blip.BlipVisionModel", "BlipVisionConfig", square(), output="pooler_output", sizes=SQUARE, attn=("eager",)),
    Spec("blip_2.Blip2VisionModel", "Blip2VisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("instructblip.InstructBlipVisionModel", "InstructBlipVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("chinese_clip.ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("clipseg.CLIPSegVisionModel", "CLIPSegVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("owlvit.OwlViTVisionModel", "OwlViTVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("owlv2.Owlv2VisionModel", "Owlv2VisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("mlcd.MLCDVisionModel", "MLCDVisionConfig", square(), output="pooler_output", sizes=SQUARE),
    Spec("flava.FlavaImageModel", "FlavaImageConfig", square(), output="pooler_output", sizes=SQUARE, attn=("eager",)),
    Spec("data2vec.Data2VecVisionForImageClassification", "Data2VecVisionConfig", square(), reads="mean", sizes=SQUARE),
    Spec("dpt.DPTForDepthEstimation", "DPTConfig", square(num_hidden_layers=5, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
         fusion_hidden_size=8), layers=4, reads="mean", output="predicted_depth", sizes=SQUARE, attn=("eager",)),
    Spec("internvl.InternVLVisionModel", "InternVLVisionConfig", square(), reads="mean", output="last_hidden_state", sizes=SQUARE),
    Spec("yolos.YolosForObjectDetection", "YolosConfig", vit(image_size=lambda s: list(s), num_detection_tokens=7), suffix=7, reads="suffix"),
    Spec("pixio.PixioModel", "PixioConfig", vit(n_cls_tokens=4, image_size=lambda s: s[0]), prefix=4, reads="prefix", output="pooler_output"),
    Spec("pixio.PixioBackbone", "PixioConfig", vit(n_cls_tokens=4, image_size=lambda s: s[0]), prefix=4, reads="mean", output="feature_maps"),
    Spec("llama4.Llama4VisionModel", "Llama4VisionConfig", square(intermediate_size=192, vision_output_dim=48, projector_input_dim=48, projector_output_dim=48,
         pixel_shuffle_ratio=.5), suffix=1, output="last_hidden_state", sizes=SQUARE, **_bare),
    Spec("idefics2.Idefics2VisionTransformer", "Idefics2VisionConfig", square(), output="last_hidden_state", sizes=SQUARE, **_bare),
    Spec("idefics3.Idefics3VisionTransformer", "Idefics3VisionConfig", square(), output="last_hidden_state", sizes=SQUARE, **_bare),
    Spec("smolvlm.SmolVLMVisionTransformer", "SmolVLMVisionConfig", square(), output="last_hidden_state", sizes=SQUARE, **_bare),
    Spec("audio_spectrogram_transformer.ASTModel", "ASTConfig", vit(max_length=lambda s: s[1], num_mel_bins=lambda s: s[0], frequency_stride=8,
         time_stride=8), prefix=2, reads="prefix", output="pooler_output",
         inputs=lambda size, g: dict(input_values=torch.rand(2, size[1], size[0], generator=g))),
]

# ---- pyramids and windows ----
_pyramid = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[2, 2], patch_sizes=[3, 3],
                strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16)
_fields = dict(prefix=0, reads="mean", fold="pooled", near=1, step=4)
SPECS += [
    Spec("segformer.SegformerForImageClassification", "SegformerConfig", _pyramid, sizes=((32, 32), (32, 48)), **_fields),
    Spec("glpn.GLPNModel", "GLPNConfig", _pyramid, sizes=((32, 32), (32, 48)), attn=("eager",), **_fields | dict(output="last_hidden_state")),
    Spec("pvt.PvtForImageClassification", "PvtConfig", dict(image_size=lambda s: s[0], num_encoder_blocks=4, depths=[1, 1, 1, 1],
         sequence_reduction_ratios=[2, 2, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[2, 2, 2, 2], mlp_ratios=[2, 2, 2, 2]), 4,
         sizes=((64, 64),), attn=("eager",), **_fields | dict(fold="pvt", reads="cls", near=0, prefix=1)),
    Spec("pvt_v2.PvtV2ForImageClassification", "PvtV2Config", dict(image_size=lambda s: s[0], depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
         num_attention_heads=[2, 2, 2, 2], mlp_ratios=[2, 2, 2, 2]), 4, sizes=((64, 64), (64, 96)), attn=("eager",), **_fields),
    Spec("vitdet.VitDetBackbone", "VitDetConfig", vit(window_block_indices=[0], window_size=3, use_relative_position_embeddings=True),
         output="feature_maps", prefix=0, reads="mean", fold="windows", attn=("eager",)),
    Spec("sam.SamVisionModel", "SamVisionConfig", square(window_size=3, global_attn_indexes=[1], output_channels=16, mlp_dim=64),
         output="last_hidden_state", prefix=0, reads="mean", fold="windows", sizes=SQUARE),
    Spec("sam2.Sam2HieraDetModel", "Sam2HieraDetConfig", dict(hidden_size=12, blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[12, 24, 36, 48],
         num_attention_heads_per_stage=[1, 2, 2, 3], window_size_per_stage=[4, 4, 6, 2], global_attention_blocks=[2],
         window_positional_embedding_background_size=[2, 2]), 5, prefix=0, reads="mean", fold="sam2", step=4, near=1, output="last_hidden_state",
         sizes=((64, 64), (96, 64))),
    Spec("sam3.Sam3ViTModel", "Sam3ViTConfig", vit(window_size=2, global_attn_indexes=[1], pretrain_image_size=32), output="last_hidden_state",
         prefix=0, reads="mean", fold="windows", sizes=SQUARE),
    Spec("florence2.Florence2VisionBackbone", "Florence2VisionConfig", dict(embed_dim=[16, 32], num_heads=[2, 2], num_groups=[2, 2], depths=[1, 1],
         patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True], window_size=3), output="last_hidden_state",
         prefix=0, reads="mean", fold="windows", step=4, near=1, sizes=((32, 32), (32, 48)),
         inputs=lambda size, g: dict(hidden_states=torch.rand(2, 3, *size, generator=g))),
    Spec("mobilevit.MobileViTModel", "MobileViTConfig", dict(hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8], num_attention_heads=2,
         output_stride=32), 9, output="last_hidden_state", prefix=0, reads="mean", fold="unfolded", near=8, sizes=((64, 64),),
         attn=("eager",)),                               # its stem sees the whole of so small a picture
    Spec("levit.LevitForImageClassification", "LevitConfig", dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2],
         depths=[1, 1, 1], key_dim=[8, 8, 8], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2]), 5, prefix=0, reads="mean", fold="square", near=2,
         sizes=((64, 64),), step=16, attn=("eager",)),
    Spec("cvt.CvtForImageClassification", "CvtConfig", dict(embed_dim=[16, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]), 6, prefix=1, reads="cls",
         fold="cvt", near=1, sizes=((64, 64), (64, 96)), attn=("eager",)),
]

# ---- detectors and clips ----
def detr(size, **more):
    import transformers as tf
    return dict(backbone_config=tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]),
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, encoder_layers=2, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5) | more


_queried = dict(prefix=0, reads="mean", step=32, output="last_hidden_state", layers=2, sizes=((64, 64), (64, 96)), near=3,
                attn=(None, "eager"))                    # the backbone's own, and the encoder's
SPECS += [
    Spec("detr.DetrModel", "DetrConfig", detr, **_queried), Spec("conditional_detr.ConditionalDetrModel", "ConditionalDetrConfig", detr, **_queried),
    Spec("dab_detr.DabDetrModel", "DabDetrConfig", detr, **_queried | dict(attn=("eager",))),
    Spec("table_transformer.TableTransformerModel", "TableTransformerConfig", detr, **_queried | dict(attn=("eager",))),
]


def clip(size, g, frames=4):
    return dict(pixel_values=torch.rand(2, frames, 3, *size, generator=g))


_clip = dict(inputs=clip, sizes=SQUARE, output="last_hidden_state", fold="clip")
SPECS += [
    Spec("videomae.VideoMAEModel", "VideoMAEConfig", square(num_frames=4), prefix=0, reads="mean", **_clip),
    Spec("vivit.VivitModel", "VivitConfig", square(num_frames=4, tubelet_size=[2, 8, 8]), **_clip | dict(output="pooler_output")),
    Spec("vjepa2.VJEPA2Model", "VJEPA2Config", dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=8,
         crop_size=lambda s: s[0], frames_per_clip=4, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1), prefix=0, reads="mean",
         **_clip | dict(inputs=lambda size, g: dict(pixel_values_videos=clip(size, g)["pixel_values"]))),
    Spec("timesformer.TimesformerForVideoClassification", "TimesformerConfig", square(num_frames=4), **_clip | dict(output="logits", fold="plain"),
         attn=("eager",)),
]


_hiera = dict(embed_dim=16, image_size=lambda s: list(s), depths=[1, 1, 1], num_heads=[1, 2, 2], embed_dim_multiplier=2, num_query_pool=2,
              masked_unit_size=[4, 4], masked_unit_attention=[True, True, False], patch_stride=[4, 4])
SPECS += [
    Spec("hiera.HieraModel", "HieraConfig", _hiera, 3, output="pooler_output", prefix=0, reads="mean", fold="hiera", step=4, near=1,
         attn=("eager",), sizes=((64, 64), (64, 96))),
    Spec("sapiens2.Sapiens2Model", "Sapiens2Config", vit(num_register_tokens=2, num_key_value_heads=2, image_size=lambda s: list(s)), prefix=3,
         output="pooler_output"),
    Spec("got_ocr2.GotOcr2VisionEncoder", "GotOcr2VisionConfig", square(window_size=3, global_attn_indexes=[1], output_channels=16, mlp_dim=64),
         output="last_hidden_state", prefix=0, reads="mean", fold="windows", sizes=SQUARE, attn=("eager",)),
]


# ---- windows cut once, tokens that join or follow ----
_cut = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=lambda s: s[0])
_backbone = dict(output="feature_maps", prefix=0, reads="mean", sizes=SQUARE)
_masks = square(num_hidden_layers=2, num_blocks=1, num_queries=5, num_register_tokens=2)
_bridge = dict(vision_config=lambda s: dict(hidden_size=128, num_hidden_layers=2, patch_size=8, image_size=s[0]), hidden_size=128,
               num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
               text_config=dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99))
SPECS += [
    Spec("lw_detr.LwDetrViTBackbone", "LwDetrViTConfig", _cut | dict(num_windows=4, window_block_indices=[0], pretrain_image_size=32, mlp_ratio=2),
         fold="cut", **_backbone),
    Spec("rf_detr.RfDetrDinov2Backbone", "RfDetrDinov2Config", _cut | dict(num_windows=2, window_block_indexes=[0], mlp_ratio=2), fold="cut", **_backbone),
    Spec("eomt.EomtForUniversalSegmentation", "EomtConfig", _masks, fold="last", prefix=8, reads="mean", output="masks_queries_logits", sizes=SQUARE),
    Spec("eomt_dinov3.EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", _masks, fold="last", prefix=8, reads="mean",
         output="masks_queries_logits", sizes=SQUARE),
    Spec("videomt.VideomtForUniversalSegmentation", "VideomtConfig", _masks, layers=1, fold="last", prefix=3, reads="mean",
         output="masks_queries_logits", sizes=SQUARE,
         inputs=lambda size, g: dict(pixel_values_videos=torch.rand(2, 1, 3, *size, generator=g))),
    Spec("x_clip.XCLIPVisionModel", "XCLIPVisionConfig", square(num_frames=2), suffix=1, output="pooler_output", sizes=SQUARE),
    Spec("videoprism.VideoPrismVisionModel", "VideoPrismVisionConfig", square(num_frames=2, tubelet_size=[1, 8, 8], num_spatial_layers=2,
         num_temporal_layers=1), prefix=0, reads="mean", output="last_hidden_state", sizes=SQUARE, attn=("eager",),
         inputs=lambda size, g: dict(pixel_values_videos=clip(size, g, 2)["pixel_values"])),
    Spec("bridgetower.BridgeTowerModel", "BridgeTowerConfig", _bridge, reads="mean", output="image_features", sizes=SQUARE, attn=("eager",),
         inputs=lambda size, g: dict(pixel_values=torch.rand(2, 3, *size, generator=g), input_ids=torch.zeros(2, 3, dtype=torch.long))),
    Spec("groupvit.GroupViTVisionModel", "GroupViTVisionConfig", square(depths=[2, 1, 1], num_group_tokens=[6, 4, 0], num_output_groups=[6, 4, 0]),
         prefix=0, suffix=6, reads="suffix", output="pooler_output", sizes=SQUARE, attn=("eager",)),
]


def told(name, size, g):
    """A tower that is told where its patches lie: (model, inputs, (N, 2) rows and columns); the last patches of the second picture are padding."""
    import transformers as tf
    h, w = (n // 4 for n in size)
    order, some = torch.randperm(h * w, generator=g), torch.rand(2, h * w, 48, generator=g)
    places, tiny = torch.stack([order // w, order % w], -1), dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    pads, row_column = torch.arange(h * w) < torch.tensor([[h * w], [h * w - 3]]), places.expand(2, -1, -1)
    torch.manual_seed(0)
    if name == "gemma4":
        from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
        config = Gemma4VisionConfig(**tiny | dict(num_key_value_heads=1, head_dim=16, patch_size=4, position_embedding_size=16, pooling_kernel_size=1))
        at = torch.where(pads[..., None], row_column.flip(-1), -1)
        return tf.Gemma4VisionModel._from_config(config), dict(pixel_values=some, pixel_position_ids=at), places
    if name == "kosmos2_5":
        from transformers.models.kosmos2_5 import configuration_kosmos2_5 as c
        from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5VisionModel
        config = c.Kosmos2_5VisionConfig(**tiny | dict(patch_embed_hidden_size=48, head_dim=16, patch_size=4))
        at = torch.where(pads[..., None], torch.cat([row_column + 1., some], -1), 0.)
        return Kosmos2_5VisionModel._from_config(config), dict(flattened_patches=at), places
    config = tf.Molmo2VisionConfig(**tiny | dict(num_key_value_heads=2, head_dim=16, patch_size=4, image_size=list(size)))
    rows = torch.stack([torch.arange(h * w) // w, torch.arange(h * w) % w], -1)
    from transformers.models.molmo2.modeling_molmo2 import Molmo2VisionModel
    return Molmo2VisionModel._from_config(config), dict(pixel_values=some), rows


# ---- pictures behind one another ----
def packed(pictures, patch=4, merge=2, frames=2):
    """(N, 3·frames·patch²) patches in blocks of merge×merge, as the processors of Qwen's line lay them, and grid_thw."""
    rows, grids = [], []
    for p in pictures:                                   # (T, 3, h, w), T a multiple of the frames
        t, (h, w) = len(p) // frames, (n // patch for n in p.shape[-2:])
        p = p.view(t, frames, 3, h // merge, merge, patch, w // merge, merge, patch).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        rows, grids = [*rows, p.reshape(t * h * w, -1)], [*grids, (t, h, w)]
    return torch.cat(rows), torch.tensor(grids)


_qwen2 = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
_qwen3 = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=32)
_deep = _qwen3 | dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
PACKED = {                                               # class: configuration, its values
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": ("Qwen2VLVisionConfig", _qwen2),
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": ("Qwen2_5_VLVisionConfig", _qwen3 | dict(window_size=16, fullatt_block_indexes=[1])),
    "qwen3_vl.Qwen3VLVisionModel": ("Qwen3VLVisionConfig", _deep),
    "qwen3_vl_moe.Qwen3VLMoeVisionModel": ("Qwen3VLMoeVisionConfig", _deep),
    "qwen3_5.Qwen3_5VisionModel": ("Qwen3_5VisionConfig", _deep),
    "qwen3_5_moe.Qwen3_5MoeVisionModel": ("Qwen3_5MoeVisionConfig", _deep),
    "qwen4_exp.Qwen4ExpVisionModel": ("Qwen4ExpVisionConfig", _deep),
    "cohere_compass.CohereCompassVisionModel": ("CohereCompassVisionConfig", _deep),
    "qwen2_5_omni.Qwen2_5OmniVisionEncoder": ("Qwen2_5OmniVisionEncoderConfig", _qwen3 | dict(window_size=16, fullatt_block_indexes=[1])),
    "qwen3_omni_moe.Qwen3OmniMoeVisionEncoder": ("Qwen3OmniMoeVisionEncoderConfig", _deep),
    "glm4v.Glm4vVisionModel": ("Glm4vVisionConfig", _qwen3 | dict(image_size=32)),
    "glm4v_moe.Glm4vMoeVisionModel": ("Glm4vMoeVisionConfig", _qwen3 | dict(image_size=32)),
    "glm_ocr.GlmOcrVisionModel": ("GlmOcrVisionConfig", _qwen3),
    "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel": ("Ernie4_5_VLMoeVisionConfig", _qwen3),
    "exaone4_5.Exaone4_5_VisionModel": ("Exaone4_5_VisionConfig", _qwen3 | dict(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=2)),
}
_layers2 = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
_hunyuan = _layers2 | dict(out_hidden_size=32, max_image_size=32)
_muse = _layers2 | dict(pos_emb_height=2, pos_emb_width=2, max_position_embeddings=4, layer_types=["window_attention", "full_attention"])
_minicpm = _layers2 | dict(image_size=32, insert_layer_id=0)
PACKED |= {
    "glm_image.GlmImageVisionModel": ("GlmImageVisionConfig", dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, image_size=32)),
    "glm5_next.Glm5NextVisionModel": ("Glm5NextVisionConfig", _qwen3 | dict(image_size=32, projection_intermediate_size=32)),
    "cosmos3_edge.Cosmos3EdgeVisionModel": ("Cosmos3EdgeVisionConfig", _layers2 | dict(num_patches=64)),
    "dots3_note.Dots3NoteVisionModel": ("Dots3NoteVisionConfig", _layers2 | dict(moe_intermediate_size=16, num_local_experts=2, num_experts_per_tok=1,
        mlp_layer_types=["dense", "dense"], adapter_in_dim=32, adapter_out_dim=32)),
    "lfm3_vl.Lfm3VlVisionModel": ("Lfm3VlVisionConfig", _layers2 | dict(num_key_value_heads=1, layer_types=["full_attention"] * 2)),
    "minimax_m3_vl.MiniMaxM3VLVisionModel": ("MiniMaxM3VLVisionConfig", _layers2 | dict(hidden_size=48, image_size=32)),
    "paddleocr_vl.PaddleOCRVisionTransformer": ("PaddleOCRVisionConfig", _layers2 | dict(image_size=32)),
    "paddleocr_vl.PaddleOCRVisionModel": ("PaddleOCRVisionConfig", _layers2 | dict(image_size=32)),
    "hunyuan_vl.HunYuanVLVisionTransformer": ("HunYuanVLVisionConfig", _hunyuan | dict(text_hidden_size=32)),
    "hy_v4_vl.HYV4VLVisionModel": ("HYV4VLVisionConfig", _hunyuan),
    "kimi_k25.Kimi_K25VisionModel": ("Kimi_K25VisionConfig", _layers2 | dict(pos_emb_height=8, pos_emb_width=8)),
    "muse_spark.MuseSparkVisionModel": ("MuseSparkVisionConfig", _muse),
    "muse_glimmer.MuseGlimmerVisionModel": ("MuseGlimmerVisionConfig", _muse),
    "video_llama_3.VideoLlama3VisionModel": ("VideoLlama3VisionConfig", _layers2),
    "inkling2.Inkling2VisionModel": ("Inkling2VisionConfig", _layers2 | dict(posemb_grid_size=8, projection_hidden_dim=32, text_hidden_size=32)),
    "minicpmv4_6.MiniCPMV4_6VisionModel": ("MiniCPMV4_6VisionConfig", _minicpm),
    "minicpmv4_7.MiniCPMV4_7VisionModel": ("MiniCPMV4_7VisionConfig", _minicpm),
    "minicpm_ocr.MiniCPMOcrVisionModel": ("MiniCPMOcrVisionConfig", _minicpm),
}
_picture = lambda x: x.view(len(x), 3, 4, 4)  # noqa: E731
LAID = {                                                 # class: how its patches lie, and in which shape it is given them
    "GlmImageVisionModel": dict(merge=1, frames=1, single=True),
    "Dots3NoteVisionModel": dict(frames=1), "Cosmos3EdgeVisionModel": dict(frames=1),
    "PaddleOCRVisionTransformer": dict(merge=1, frames=1, shape=lambda x: _picture(x)[None], grid=lambda thw: None, more=lambda thw: (thw,)),
    "PaddleOCRVisionModel": dict(merge=1, frames=1, shape=lambda x: _picture(x)[None]),
    "HunYuanVLVisionTransformer": dict(merge=1, frames=1, single=True), "HYV4VLVisionModel": dict(merge=1, frames=1, single=True),
    "Kimi_K25VisionModel": dict(merge=1, frames=1, shape=_picture),
    "MuseSparkVisionModel": dict(merge=1, frames=2), "MuseGlimmerVisionModel": dict(merge=1, frames=2),
    "VideoLlama3VisionModel": dict(frames=1, more=lambda thw: (torch.full((len(thw),), 2),)),
    "Inkling2VisionModel": dict(frames=1, shape=lambda x: x.view(-1, 2, 2, 3, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(-1, 8, 8, 3),
                                grid=lambda thw: thw // torch.tensor([1, 2, 2])),
} | dict.fromkeys(("MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel", "MiniCPMOcrVisionModel"), dict(
    merge=1, frames=1, single=True, shape=lambda x: _picture(x).permute(1, 2, 0, 3).reshape(1, 3, 4, -1), grid=lambda thw: thw[:, 1:]))


def packed_for(model, pics):
    """The arguments of a tower that is given its pictures behind one another."""
    how = LAID.get(type(model).__name__, {})
    frames = how.get("frames", getattr(model.config, "temporal_patch_size", 1))
    if frames == 1:                                      # ERNIE merges frames after the blocks
        pics = [p[::2] for p in pics]
    if how.get("single") or type(model).__name__.startswith("Glm4v"):    # a clip comes as pictures, one a row of the sizes
        pics = [some for p in pics for some in p.split(frames)]
    x, thw = packed(pics, merge=how.get("merge", 2), frames=frames)
    same = lambda t: t
    return how.get("shape", same)(x), how.get("grid", same)(thw), *how.get("more", lambda thw: ())(thw)


def make_packed(name, attn="sdpa"):
    folder, cls = name.split(".")
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(import_module(f"transformers.models.{folder}.configuration_{folder}"), PACKED[name][0])
    torch.manual_seed(0)
    return stirred(getattr(module, cls)._from_config(config(**PACKED[name][1]), attn_implementation=attn))


# ---- every vision class of the library ----
VISUAL = ("IMAGE", "VIDEO", "VISION", "VISUAL", "DEPTH", "OBJECT", "SEGM", "BACKBONE", "MASK_GEN", "KEYPOINT", "MULTIMODAL", "TABLE_REC")
OVERRIDES = {                                            # where the default configuration builds nothing
    "beit.BeitForSemanticSegmentation": dict(out_indices=[1, 1, 2, 2]),
    "hiera.HieraForPreTraining": dict(decoder_hidden_size=32, decoder_depth=1, decoder_num_heads=2),
    "perceiver.PerceiverForImageClassificationFourier": dict(num_cross_attention_heads=1),
    "perceiver.PerceiverForImageClassificationConvProcessing": dict(num_cross_attention_heads=1),
}


def mapped():
    """The names in the library's own maps from tasks with pictures to classes."""
    from transformers.models.auto import modeling_auto
    maps = [m for k, m in vars(modeling_auto).items() if k.endswith("MAPPING_NAMES") and any(w in k for w in VISUAL)]
    return {c for m in maps for v in m.values() for c in (v if isinstance(v, (tuple, list)) else [v])}


def vision_classes():
    """{"folder.Class": class} of every model class of transformers that is given pictures or clips."""
    import transformers
    from transformers.modeling_utils import PreTrainedModel
    names, found = mapped(), {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if not re.search("pixel_values|pixel_embeds|video", file.read_text(encoding="utf-8")):
            continue
        module = import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, cls in vars(module).items():
            own = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
            if own and not name.endswith("PreTrainedModel") and (name in names or is_given_pictures(cls)):
                found[f"{file.parent.name}.{name}"] = cls
    return found


def is_given_pictures(cls):
    main = getattr(cls, "main_input_name", "")
    asked = [*inspect.signature(cls.forward).parameters, *([main] if isinstance(main, str) else main)]
    return any(a.startswith(("pixel_", "grid_thw")) for a in asked)


def shallow(config):
    """Two layers everywhere: what is looked at is which kinds there are."""
    for key in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    for inner in [v for v in vars(config).values() if hasattr(v, "to_dict")]:
        shallow(inner)
    return config


def census():
    """(name, build) of every vision class; build() gives the model, of the default configuration, and its inputs."""
    for name, cls in vision_classes().items():
        def build(name=name, cls=cls):
            config = cls.config_class(**OVERRIDES.get(name, {}))
            try:
                model = cls(shallow(cls.config_class(**OVERRIDES.get(name, {}))))
            except (ValueError, TypeError, IndexError, KeyError, AssertionError, AttributeError, RuntimeError):
                model = cls(config)                      # some need all their layers
            size = getattr(getattr(config, "vision_config", config), "image_size", None) or 224
            size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
            return model, dict(pixel_values=torch.empty(2, 3, *size[-2:]))
        yield name, build
