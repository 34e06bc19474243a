"""Small copies of transformers' vision-language models: how each is built, and what its prompt holds of a picture."""
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module

import torch

PAD, START, END, IMAGE, VIDEO = 0, 1, 2, 9, 10           # ids of the tiny vocabulary


@dataclass(frozen=True)
class Spec:
    """One class; `name` is "folder.Class"."""
    name: str
    config: object                                       # () -> its configuration
    prompt: object                                       # (picture) -> (ids, {input: tensor}); a picture is (3, height, width) in 0–1
    grid: tuple                                          # (h, w) of the view
    view: object = None                                  # that is asked for
    size: tuple = (32, 32)                               # of the picture
    near: float = 0.                                     # cells by which a tower's convolutions spread a patch
    prefix: bool = False                                 # the prompt sees itself, so that a text read at once is another one
    more: dict = field(default_factory=dict, hash=False)

    def __str__(self): return self.name

    @property
    def cls(self):
        folder, name = self.name.split()[0].split(".")
        return getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)

    def given(self, seed=0, picture=None):
        """Inputs of one prompt."""
        if picture is None: picture = noise(self.size, seed)
        ids, more = self.prompt(picture)
        return dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **more)


@lru_cache(maxsize=2)                                    # tests of one model follow one another
def made(spec):
    """The model with random weights; those of its words are large enough that no attention is flat."""
    torch.manual_seed(0)
    model = spec.cls._from_config(spec.config(), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=.02).mul_(4 if p.ndim > 1 and re.search("language_model|text_model", name) else 1)
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, bos_token_id=START)
    return model


def noise(size, seed=0):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def text(**more):
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
                max_position_embeddings=512, pad_token_id=PAD, bos_token_id=START, eos_token_id=END) | more


def tower(**more):
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32) | more


def words(*image):
    """A prompt with image tokens, or whatever stands for them, among words."""
    return [START, 3, 4, *image, 5, 6, 7, 8]


def llava(cls="LlavaConfig", vision="CLIPVisionConfig", **more):
    def config():
        import transformers as t
        return getattr(t, cls)(vision_config=getattr(t, vision)(**tower()), text_config=t.LlamaConfig(**text()), image_token_id=IMAGE, **more)
    return config


def plain(n):
    """n tokens for a picture that comes as it is."""
    return lambda picture: (words(*[IMAGE] * n), dict(pixel_values=picture[None] * 4 - 2))


def paligemma():
    import transformers as t
    return t.PaliGemmaConfig(vision_config=t.SiglipVisionConfig(**tower(), projection_dim=32).to_dict(), image_token_id=IMAGE, projection_dim=32,
                             text_config=t.GemmaConfig(**text(head_dim=8)).to_dict())


SPECS = [
    Spec("llava.LlavaForConditionalGeneration", llava(), plain(16), (4, 4)),
    Spec("vipllava.VipLlavaForConditionalGeneration", llava("VipLlavaConfig", vision_feature_layers=[-2, -1]), plain(16), (4, 4)),
    Spec("paligemma.PaliGemmaForConditionalGeneration", paligemma,
         lambda picture: ([*[IMAGE] * 16, START, 5, 6, 7, 8], dict(pixel_values=picture[None] * 4 - 2, token_type_ids=torch.zeros(1, 21, dtype=torch.long))),
         (4, 4), prefix=True),
]


def processed(name, picture, **how):
    """What an image processor of transformers makes of a picture."""
    import transformers as t
    return getattr(t, name)(do_normalize=True, **how)([(picture * 255).round().to(torch.uint8)], return_tensors="pt")


# ---- a grid that the inputs name ----

def qwen(version, **vision):
    def config():
        import transformers as t
        rope = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4)
        part = dict(depth=2, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
        return getattr(t, version)(text_config=text(rope_scaling=rope, rope_parameters=rope, head_dim=8), vision_config=part | vision,
                                   image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=11, vision_end_token_id=12)
    return config


def by_thw(picture):
    more = processed("Qwen2VLImageProcessor", picture, patch_size=8, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=16, longest_edge=10**6))
    n = int(more["image_grid_thw"].prod()) // 4
    ids = words(11, *[IMAGE] * n, 12)
    return ids, dict(more) | dict(mm_token_type_ids=torch.tensor([[int(i == IMAGE) for i in ids]]))


def pixtral(cls, **more):
    def config():
        import transformers as t
        vision = t.PixtralVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=64)
        return getattr(t, cls)(vision_config=vision, text_config=t.MistralConfig(**text(head_dim=8, sliding_window=None)), image_token_id=IMAGE, **more)
    return config


def with_breaks(merge):
    """A token ends each row, which is no image token."""
    def prompt(picture):
        h, w = (s // 8 // merge for s in picture.shape[1:])
        return words(*([*[IMAGE] * w, 13] * h)), dict(pixel_values=picture[None] * 4 - 2, image_sizes=torch.tensor([picture.shape[1:]]))
    return prompt


_q25 = dict(hidden_size=32, intermediate_size=48, window_size=32, fullatt_block_indexes=[1], out_hidden_size=32)
_q3 = dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0])
SPECS += [
    Spec("qwen2_vl.Qwen2VLForConditionalGeneration", qwen("Qwen2VLConfig", embed_dim=32, hidden_size=32, mlp_ratio=1), by_thw, (4, 6), size=(64, 96)),
    Spec("qwen2_5_vl.Qwen2_5_VLForConditionalGeneration", qwen("Qwen2_5_VLConfig", **_q25), by_thw, (4, 6), size=(64, 96)),
    Spec("qwen3_vl.Qwen3VLForConditionalGeneration", qwen("Qwen3VLConfig", **_q3), by_thw, (4, 6), size=(64, 96)),
    Spec("mistral3.Mistral3ForConditionalGeneration", pixtral("Mistral3Config", spatial_merge_size=2), with_breaks(2), (2, 3), size=(32, 48)),
    Spec("llava.LlavaForConditionalGeneration with Pixtral", pixtral("LlavaConfig", vision_feature_layer=-1, vision_feature_select_strategy="full"),
         with_breaks(1), (4, 6), size=(32, 48)),
]

# ---- so many tokens, whatever the picture ----


def gemma3():
    import transformers as t
    return t.Gemma3Config(text_config=text(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8),
                          vision_config=tower(image_size=64), mm_tokens_per_image=16, image_token_id=IMAGE, boi_token_index=11, eoi_token_index=12)


def gemma_prompt(picture):
    ids = words(11, *[IMAGE] * 16, 12)
    return ids, dict(pixel_values=picture[None] * 4 - 2, token_type_ids=torch.tensor([[int(i == IMAGE) for i in ids]]))


SPECS += [
    Spec("gemma3.Gemma3ForConditionalGeneration", gemma3, gemma_prompt, (4, 4), size=(64, 64)),
]

# ---- tiles ----


def internvl():
    import transformers as t
    return t.InternVLConfig(text_config=t.Qwen2Config(**text()), vision_config=t.InternVLVisionConfig(**tower(image_size=[64, 64], patch_size=[8, 8])),
                            image_token_id=IMAGE, image_seq_length=16, downsample_ratio=.5)


def internvl_tiles(picture, tiles=2):
    more = processed("GotOcr2ImageProcessor", picture, size=dict(height=64, width=64), crop_to_patches=True, min_patches=tiles, max_patches=tiles)
    n = len(more["pixel_values"])
    return words(11, *[IMAGE] * 16 * n, 12), dict(pixel_values=more["pixel_values"])


def smolvlm(cls, text_cls="LlamaConfig"):
    def config():
        import transformers as t
        return getattr(t, cls)(text_config=getattr(t, text_cls)(**text()), vision_config=tower(image_size=64), scale_factor=2, image_token_id=IMAGE,
                               pad_token_id=PAD)
    return config


def in_rows(picture):
    """Idefics 3's prompt: tags of rows and columns, a line break after each row, the whole picture last."""
    more = processed("Idefics3ImageProcessor", picture, size=dict(longest_edge=128), max_image_size=dict(longest_edge=64), return_row_col_info=True)
    (r,), (c,) = more.pop("rows"), more.pop("cols")
    (r, c), tile = (int(torch.as_tensor(n).flatten()[0]) for n in (r, c)), [IMAGE] * 16
    tiles = [[*([7, 20 + 4 * y + x, *tile] for x in range(c)), [3]] for y in range(r)]
    flat = [i for row in tiles for part in row for i in part]
    return words(*flat, 3, 7, 8, *tile, 7), dict(more)


def llava_next(cls, vision="CLIPVisionConfig", **more):
    def config():
        import transformers as t
        pins = [[64, 32], [32, 64], [64, 64]]
        return getattr(t, cls)(vision_config=getattr(t, vision)(**tower()), text_config=t.LlamaConfig(**text()), image_token_id=IMAGE,
                               image_grid_pinpoints=pins, **more)
    return config


def in_pieces(name, n):
    def prompt(picture):
        more = processed(name, picture, size=dict(shortest_edge=32) if "Next" in name else dict(height=32, width=32), crop_size=dict(height=32, width=32),
                         image_grid_pinpoints=[[64, 32], [32, 64], [64, 64]])
        more.pop("batch_num_images", None)
        return words(*[IMAGE] * n), dict(more)
    return prompt


SPECS += [
    Spec("internvl.InternVLForConditionalGeneration", internvl, internvl_tiles, (4, 8), size=(64, 128)),
    Spec("smolvlm.SmolVLMForConditionalGeneration", smolvlm("SmolVLMConfig"), in_rows, (4, 8), size=(64, 128)),
    Spec("idefics3.Idefics3ForConditionalGeneration", smolvlm("Idefics3Config"), in_rows, (8, 4), size=(128, 64)),
    Spec("llava_next.LlavaNextForConditionalGeneration", llava_next("LlavaNextConfig"), in_pieces("LlavaNextImageProcessor", 16 + 4 * 9), (4, 8),
         size=(32, 64)),
    Spec("llava_onevision.LlavaOnevisionForConditionalGeneration", llava_next("LlavaOnevisionConfig", "SiglipVisionConfig", vision_aspect_ratio="anyres_max_9"),
         in_pieces("LlavaOnevisionImageProcessor", 16 + 8 * 5), (8, 4), size=(64, 32)),
]

# ---- the same entries, other families ----


def tiles_with_tags(cls, vision, **more):
    def config():
        import transformers as t
        return getattr(t, cls)(text_config=t.Cohere2Config(**text(head_dim=8, sliding_window=64)), vision_config=getattr(t, vision)(**tower(image_size=64)),
                               image_token_id=IMAGE, downsample_factor=2, **more)
    return config


def tagged(first, between, *after):
    """Two tiles and the picture as a whole, each after its tag."""
    def prompt(picture):
        pixels = processed("GotOcr2ImageProcessor", picture, size=dict(height=64, width=64), crop_to_patches=True, min_patches=2, max_patches=2)
        tile = [IMAGE] * 16
        return words(*first, *tile, *between[0], *tile, *between[1], *tile, *after), dict(pixel_values=pixels["pixel_values"])
    return prompt


def glm4v():
    import transformers as t
    rope = dict(rope_type="default", mrope_section=[1, 1, 0], rope_theta=1e4, partial_rotary_factor=.5)
    return t.Glm4vConfig(text_config=text(rope_parameters=rope), image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=11, image_end_token_id=12,
                         video_start_token_id=14, video_end_token_id=15,
                         vision_config=dict(depth=2, hidden_size=32, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, image_size=64,
                                            out_hidden_size=32, intermediate_size=48))


def janus():
    import transformers as t
    return t.JanusConfig(text_config=t.LlamaConfig(**text()), image_token_id=IMAGE,
                         vision_config=t.JanusVisionConfig(**tower(projection_dim=32, depth=2, mlp_ratio=1., num_image_tokens=16)),
                         vq_config=dict(embed_dim=8, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
                                        num_patches=4, projection_dim=8, image_token_embed_dim=8, num_attention_heads=1, hidden_size=8, num_hidden_layers=1))


def qwen35():
    import transformers as t
    rope = dict(rope_type="default", mrope_section=[1, 1, 0], rope_theta=1e4, partial_rotary_factor=.5)
    words = text(head_dim=8, num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "full_attention"], rope_parameters=rope,
                 linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
    return t.Qwen3_5Config(text_config=words, vision_config=dict(depth=2, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, **_q3),
                           image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=11, vision_end_token_id=12)


SPECS += [
    Spec("cohere2_vision.Cohere2VisionForConditionalGeneration", tiles_with_tags("Cohere2VisionConfig", "SiglipVisionConfig", alignment_intermediate_size=64),
         tagged([11], [[13], [13]], 13, 12), (4, 8), size=(64, 128)),
    Spec("aya_vision.AyaVisionForConditionalGeneration", tiles_with_tags("AyaVisionConfig", "SiglipVisionConfig", vision_feature_layer=-1,
                                                                         vision_feature_select_strategy="full", adapter_layer_norm_eps=1e-6),
         tagged([11, 20], [[21], [22]], 12), (4, 8), size=(64, 128)),
    Spec("glm4v.Glm4vForConditionalGeneration", glm4v, by_thw, (4, 6), size=(64, 96)),
    Spec("janus.JanusForConditionalGeneration", janus, plain(16), (4, 4)),
    Spec("qwen3_5.Qwen3_5ForConditionalGeneration", qwen35, by_thw, (4, 6), size=(64, 96)),
]
