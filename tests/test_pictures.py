"""Pictures and masks as people have them: turned, deep, transparent, broken; masks in every form. Right, or one sentence."""
import io
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from spatial_entropy.data import is_picture, mask_pairs, open_picture, shapes
from spatial_entropy.pictures import one_line, show_heads, show_maps, show_regions

SHAPES = shapes(40)
PHOTO = Image.fromarray(SHAPES.images[0][:40])                   # 64 wide, 40 high
SHAPE = SHAPES.masks[0][:40]


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def same(a, b, within=0):
    a, b = (np.asarray(x).astype(int) for x in (a, b))
    assert a.shape == b.shape and abs(a - b).max() <= within, (a.shape, b.shape)


# pictures

@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_camera_says(turn, kind):
    exif = Image.Exif()
    exif[0x0112] = turn
    lossless = {"PNG": {}, "TIFF": {}, "WEBP": dict(lossless=True), "JPEG": dict(quality=95)}[kind]
    data = saved(PHOTO, kind, exif=exif, **lossless)
    found = open_picture(data)
    same(found, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    same(open_picture(found), found)                            # not twice


def test_a_damaged_camera_note_does_not_cost_the_picture():
    for note in (b"Exif\0\0II*\0" + b"\xff" * 40, b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12" + b"\0" * 9):
        same(open_picture(saved(PHOTO, exif=note)), PHOTO)


RAMP = np.arange(256, dtype=np.uint16).repeat(4).reshape(16, 64)
GREY = RAMP.astype(np.uint8)


@pytest.mark.parametrize("image,kind", [
    (Image.fromarray(RAMP * 257), "PNG"), (Image.fromarray(RAMP * 257), "TIFF"),
    (Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"), (Image.fromarray(RAMP * 257), "PPM")])
def test_deep_pictures_are_rescaled_by_their_depth(image, kind):
    same(open_picture(saved(image, kind)), Image.fromarray(GREY).convert("RGB"))


def test_other_depths():
    big = b"P5 64 16 65535\n" + (RAMP * 257).astype(">u2").tobytes()
    same(open_picture(big), Image.fromarray(GREY).convert("RGB"))
    high = np.array([[0, 2**31 + 5, 2**32 - 1]], np.uint32)      # Pillow reads it as if it had a sign
    out = io.BytesIO(saved(Image.fromarray(high.view(np.int32)), "TIFF"))
    with pytest.raises(OSError, match="has values from .* expected 0 to 2.14748e.09"):
        open_picture(out.getvalue())
    signed, unsigned = (bytes([0x53, 1, 3, 0, 1, 0, 0, 0, k, 0]) for k in (2, 1))
    assert signed in out.getvalue()
    same(open_picture(out.getvalue().replace(signed, unsigned)), Image.fromarray(np.uint8([[0, 128, 255]])).convert("RGB"))
    for values in ([[0, 3.5]], [[-.1, 1]], [[0, float("nan")]], [[0, float("inf")]]):
        with pytest.raises(OSError, match="^deep.tif: has values from .* expected 0 to 1; save it with 8 or 16 bits$"):
            open_picture(saved(Image.fromarray(np.float32(values)), "TIFF"), "deep.tif")


def test_transparent_pictures_are_on_white():
    half = PHOTO.copy()
    half.putalpha(128)
    hidden = Image.new("RGBA", (8, 8), (9, 200, 3, 0))           # a colour that nobody has seen
    same(open_picture(saved(half)), (np.asarray(PHOTO).astype(float) * 128 + 255 * 127) / 255, 1)
    same(open_picture(saved(hidden)), np.full((8, 8, 3), 255))
    same(open_picture(saved(hidden.convert("LA"))), np.full((8, 8, 3), 255))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    same(open_picture(saved(palette, transparency=1)), np.full((8, 8, 3), 255))
    same(open_picture(saved(palette, transparency=b"\0\xff")), np.full((8, 8, 3), [0, 0, 255]))
    opaque = PHOTO.copy()
    opaque.putalpha(255)
    same(open_picture(saved(opaque)), PHOTO)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa", "LAB"])
def test_every_mode_is_rgb_or_named(mode):
    if mode == "LAB":
        how = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(PHOTO, how)
    else:
        image = PHOTO.convert("RGBA").convert("RGBa") if mode == "RGBa" else PHOTO.convert("LA").convert("PA") if mode == "PA" else PHOTO.convert(mode)
    try:
        assert open_picture(image, "x").mode == "RGB"
    except OSError as e:
        assert mode == "LAB" and str(e).startswith("x: cannot be decoded")


def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(tmp_path)                                       # a socket's path must be short
        s.bind("socket.png")
        os.chdir(here)
        for name, said in (("pipe", "is a pipe, not a file"), ("zero", "is a device, not a file"), ("socket", "is a socket, not a file"),
                           ("folder", "is a folder, not a file"), ("gone", "no such file")):
            with pytest.raises(OSError, match=f"{name}.png: {said}$"):
                open_picture(tmp_path / f"{name}.png")


def test_huge_and_broken_pictures_are_one_sentence(tmp_path, monkeypatch):
    whole = saved(PHOTO)
    bad = whole[:40] + bytes(b ^ 255 for b in whole[40:80]) + whole[80:]
    for data in (b"", b"\x89PNG\r\n\x1a\n", whole[:100], whole[:-30], bad, saved(PHOTO, "JPEG")[:300], saved(PHOTO, "GIF")[:100], saved(PHOTO, "TIFF")[:60]):
        with pytest.raises(OSError, match="^x.png: ") as e:
            open_picture(data, "x.png")
        assert "\n" not in str(e.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match="x.png: has more pixels than Pillow decodes; expected at most 2,000; make it smaller"):
        open_picture(saved(PHOTO), "x.png")


def test_plain_pictures_are_what_pillow_gives():
    for kind in ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF"):
        data = saved(PHOTO, kind)
        same(open_picture(data), Image.open(io.BytesIO(data)).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(saved(PHOTO.convert("P")))


def test_names_of_pictures():
    assert all(map(is_picture, ("a.png", "B/x.JPEG", "a.ppm", "a.gif", "a.webp", "a.bmp", "a.tga", "a.jp2", "a.pgm", "a b$.tif")))
    assert not any(map(is_picture, (".a.png", "a/._b.png", ".git/a.png", "__MACOSX/a/b.png", "c/@eaDir/b.jpg", "Thumbs.db", "a.txt", "png", "a.h5", "a.mpg")))


# masks

def pairs_of(root, masks, images=None):
    "A mask folder of PIL masks, or of bytes with their ending."
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks):
        (images[i] if images else PHOTO).save(root / "images" / f"{i}.png")
        data, ending = mask if isinstance(mask, tuple) else (saved(mask), "png")
        (root / "masks" / f"{i}.{ending}").write_bytes(data)
    return root


def voc(index):
    image = Image.fromarray(index.astype(np.uint8))
    colors = np.zeros((256, 3), np.uint8)
    for i in range(256):
        for bit in range(8):
            colors[i] |= np.uint8([(i >> 3 * bit + c & 1) << 7 - bit for c in range(3)])
    image.putpalette(colors.flatten().tolist())
    return image


def rim(mask):
    "A mask with a void rim, two pixels wide."
    big = np.asarray(Image.fromarray(mask).convert("L").resize((64, 40))) > 0
    grown = big.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            grown |= np.roll(big, step, axis)
    return grown & ~big


def cut_out(mask):
    image = PHOTO.copy()
    image.putalpha(Image.fromarray(mask))
    return image


def many(mask):
    return np.where(mask, 1 + np.arange(64) // 5 + 13 * (np.arange(40)[:, None] // 5), 0)


RIM = rim(SHAPE)
FORMS = {
    "0 and 1": Image.fromarray(SHAPE.astype(np.uint8)),
    "0 and 255": Image.fromarray(SHAPE.astype(np.uint8) * 255),
    "1 bit": Image.fromarray(SHAPE),
    "grey levels": Image.fromarray(np.where(SHAPE, 128, 0).astype(np.uint8)),
    "two grey levels": Image.fromarray(np.where(SHAPE, np.where(np.arange(64) < 30, 85, 255), 0).astype(np.uint8)),
    "numbered": Image.fromarray(np.where(SHAPE, 1 + np.arange(64) // 8, 0).astype(np.uint8)),
    "a hundred objects": Image.fromarray(many(SHAPE).astype(np.uint8)),
    "labels and void": Image.fromarray(np.where(RIM, 255, SHAPE * 3).astype(np.uint8)),
    "palette and void": voc(np.where(RIM, 255, SHAPE * 15)),
    "palette, grey colour": voc(SHAPE * 7),
    "palette in any order": Image.fromarray((~SHAPE).astype(np.uint8)),
    "grey palette": Image.fromarray(SHAPE.astype(np.uint8) * 255),
    "colours": voc(np.where(RIM, 255, SHAPE * 4)).convert("RGB"),
    "white as RGB": Image.fromarray(SHAPE.astype(np.uint8) * 255).convert("RGB"),
    "1 as RGB": Image.fromarray(SHAPE.astype(np.uint8)).convert("RGB"),
    "16 bits": Image.fromarray(SHAPE.astype(np.uint16) * 65535),
    "16 bits, numbered": Image.fromarray(SHAPE.astype(np.uint16) * 1003),
    "floating point": (saved(Image.fromarray(SHAPE.astype(np.float32)), "TIFF"), "tif"),
    "transparency": cut_out(SHAPE),
    "opaque": Image.fromarray(SHAPE.astype(np.uint8) * 255).convert("RGBA"),
    "jpeg": (saved(Image.fromarray(SHAPE.astype(np.uint8) * 255), "JPEG", quality=40), "jpg"),
    "jpeg of colours": (saved(Image.fromarray(SHAPE.astype(np.uint8) * 255).convert("RGB"), "JPEG", quality=40), "jpg"),
}
FORMS["palette in any order"].putpalette([192, 0, 0, 0, 0, 0])
FORMS["grey palette"].putpalette([i for k in range(256) for i in (k, k, k)])


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_read_by_what_it_holds(form, tmp_path, size=48):
    pairs = mask_pairs(pairs_of(tmp_path, [FORMS[form]]), size)
    _, mask, *valid = pairs[0]
    assert len(valid) == pairs.void == ("void" in form or form == "colours"), form
    assert all(np.array_equal(v, ~small(RIM, size)) for v in valid)
    assert (mask.numpy() != small(SHAPE, size)).mean() <= (.01 if "jpeg" in form else 0), form


def test_smooth_edges_are_cut_in_the_middle(tmp_path):
    smooth = [Image.fromarray(m[:40].astype(np.uint8) * 255).resize((160, 100), Image.Resampling.BICUBIC) for m in SHAPES.masks[:6]]
    pairs = mask_pairs(pairs_of(tmp_path, smooth), 100)
    for (_, mask), s in zip(pairs, smooth):
        assert np.array_equal(mask, np.asarray(s.resize((100, 100), Image.Resampling.NEAREST)) > 127)


def test_the_void_label_is_a_matter_of_the_set(tmp_path):
    a = np.where(SHAPE, 255, 0).astype(np.uint8)
    alone = mask_pairs(pairs_of(tmp_path / "a", [Image.fromarray(a)] * 3), 64)
    assert alone[0][1].any()                                     # 255 among nothing else is the object …
    labelled = [Image.fromarray(np.where(RIM, 255, SHAPE * k).astype(np.uint8)) for k in (1, 2, 20)]
    among = mask_pairs(pairs_of(tmp_path / "b", [*labelled, Image.fromarray(a)]), 64)
    assert not among[3][1].any() and among[0][1].any()           # … and among labels it is what nobody could name
    assert among.void and not alone.void and np.array_equal(among[3][2], small(~SHAPE, 64))


def small(mask, size):
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


@pytest.mark.parametrize("kind", ["P", "RGB"])
def test_void_in_one_coloured_mask_of_many_is_found(kind, tmp_path):
    "64 masks are asked how they are to be read; of the 150 here only number 70 has void, and none of them is that one."
    plain, rimmed = voc(SHAPE * 4).convert(kind), voc(np.where(RIM, 255, SHAPE * 4)).convert(kind)
    pairs = mask_pairs(pairs_of(tmp_path, [rimmed if i == 70 else plain for i in range(150)]), 64)
    at = pairs.names.index("70")
    assert at % 3 and pairs.void
    assert np.array_equal(pairs[at][2], ~small(RIM, 64)) and pairs[at - 1][2].all()
    batch = next(iter(torch.utils.data.DataLoader(pairs, 8)))
    assert [t.shape for t in batch] == [(8, 3, 64, 64), (8, 64, 64), (8, 64, 64)] and batch[2].dtype == torch.bool
    (tmp_path / "masks/70.png").write_bytes(saved(plain))
    assert not mask_pairs(tmp_path, 64).void and len(mask_pairs(tmp_path, 64)[0]) == 2


def test_void_in_one_grey_mask_of_many_is_found(tmp_path):
    "The same with labels 0 and 1 in grey, where colours cannot tell: all are asked, since those that were hold labels alone."
    plain, rimmed = (Image.fromarray(a.astype(np.uint8)) for a in (SHAPE * 1, np.where(RIM, 255, SHAPE * 1)))
    pairs = mask_pairs(pairs_of(tmp_path, [rimmed if i == 70 else plain for i in range(150)]), 64)
    at = pairs.names.index("70")
    assert at % 3 and pairs.void
    assert np.array_equal(pairs[at][2], ~small(RIM, 64)) and pairs[at - 1][2].all()
    assert np.array_equal(pairs[at][1], small(SHAPE & ~RIM, 64)) and np.array_equal(pairs[at - 1][1], small(SHAPE, 64))


def test_void_turns_with_its_mask(tmp_path):
    note = Image.Exif()
    note[0x0112] = 6
    lying = voc(np.where(RIM, 255, SHAPE * 4)).transpose(Image.Transpose.ROTATE_90)
    upright = mask_pairs(pairs_of(tmp_path / "a", [voc(np.where(RIM, 255, SHAPE * 4))]), 64)[0]
    turned = mask_pairs(pairs_of(tmp_path / "b", [(saved(lying, exif=note), "png")]), 64)[0]
    assert np.array_equal(turned[1], upright[1]) and np.array_equal(turned[2], upright[2])


@pytest.mark.parametrize("mask,said", [
    (Image.new("L", (64, 40)), "there is no foreground in its 3 mask.s., the first holds 0; expected 0 for the background"),
    (Image.new("L", (64, 40), 1), "all is foreground in its 3 mask.s., the first holds 1;"),
    (Image.fromarray(np.where(SHAPE, 1, 2).astype(np.uint8)), "all is foreground in its 3 mask.s., the first holds 1, 2;"),
    (voc(np.where(SHAPE, 255, 0)), "there is no foreground in its 3"),
    (Image.new("RGBA", (64, 40)), "there is no foreground in its 3"),
])
def test_a_set_without_two_kinds_is_refused(mask, said, tmp_path):
    pairs_of(tmp_path, [mask] * 3)
    with pytest.raises(ValueError, match=said):
        mask_pairs(tmp_path)


def test_one_empty_mask_is_none_of_the_sets_business(tmp_path):
    pairs = mask_pairs(pairs_of(tmp_path, [*[Image.new("L", (64, 40))] * 70, FORMS["numbered"]]))
    assert len(pairs) == 71 and pairs[pairs.names.index("70")][1].any() and not pairs[pairs.names.index("3")][1].any()


def test_pairs(tmp_path):
    root = pairs_of(tmp_path, [FORMS["0 and 1"], FORMS["0 and 1"]])
    for name in (".DS_Store", "Thumbs.db", "._0.png", "notes.txt"):
        (root / "masks" / name).write_bytes(b"x")
        (root / "images" / name).write_bytes(b"x")
    os.mkfifo(root / "masks" / "pipe.png")
    pairs = mask_pairs(root)
    assert pairs.names == ["0", "1"] and not pairs.notes
    PHOTO.save(root / "images" / "alone.jpg")
    assert mask_pairs(root).notes == (f"{root / 'images'}: 1 image(s) without a mask were left out, first alone.jpg",)
    PHOTO.save(root / "images" / "0.jpg")
    with pytest.raises(ValueError, match="images: 0.jpg and 0.png have one name; keep one"):
        mask_pairs(root)
    (root / "images" / "0.jpg").unlink()
    (root / "masks" / "0.png").write_bytes(saved(FORMS["0 and 1"])[:70])
    with pytest.raises(OSError, match="masks/0.png: cannot be decoded"):
        mask_pairs(root)
    for name in ("0.png", "1.png"):
        (root / "masks" / name).unlink()
    with pytest.raises(ValueError, match="holds no masks, only 1 × .db, 1 × .png, 1 × .txt"):
        mask_pairs(root)


@pytest.mark.parametrize("turn", [3, 5, 6, 7, 8])
def test_a_turned_photograph_keeps_its_mask(turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    back = {3: 3, 5: 5, 6: 8, 7: 7, 8: 6}[turn]                  # what the camera did is undone
    note = Image.Exif()
    note[0x0112] = back
    lying = lambda im: ImageOps.exif_transpose(Image.open(io.BytesIO(saved(im, exif=note))))
    upright = mask_pairs(pairs_of(tmp_path / "a", [FORMS["0 and 1"]]), 64)[0]
    for name, mask in (("upright", FORMS["0 and 1"]), ("with a note", (saved(lying(FORMS["0 and 1"]), exif=exif), "png")), ("lying", lying(FORMS["0 and 1"]))):
        if turn == 3 and name == "lying":
            continue                                             # nothing tells it from an upright one
        root = pairs_of(tmp_path / name, [mask])
        (root / "images" / "0.png").write_bytes(saved(lying(PHOTO), exif=exif))
        x, m = mask_pairs(root, 64)[0]
        assert np.array_equal(m, upright[1]) and np.allclose(x, upright[0]), name


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1", b"GIF89a", b"II*\0", b"P5 9 9 65535\n", b"BM"]))
def test_whatever_the_bytes_are(rest, head):
    try:
        assert open_picture(head + rest, "x").mode == "RGB"
    except OSError as e:
        assert str(e).startswith("x: ") and "\n" not in str(e)


# texts beside pictures

def test_texts_are_drawn_as_they_are(tmp_path):
    names = ["cost_$5_and_$6^", "$\\frac{$", "a\nb\tc", "\udcff\x00", "x" * 300, "[bold]", "[/b]", "\\alpha_{", "日本"]
    assert all(len(one_line(n)) <= 32 and one_line(n).isprintable() for n in names)
    maps = np.random.default_rng(0).random((1, len(names), 4, 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|constrained_layout")
        for k, figure in enumerate((show_heads([np.asarray(PHOTO)], maps, (maps > .5).astype(int), [names], names=names[:1]),
                                    show_maps(maps, titles=names, captions=names), show_regions((maps > .5).astype(int), names, names))):
            figure.savefig(tmp_path / f"{k}.{('svg', 'png', 'pdf')[k]}", dpi=20)
    assert len(list(tmp_path.iterdir())) == 3


def test_real_masks_of_voc():
    place = os.environ.get("SPATIAL_ENTROPY_VOC_MASKS")
    if not place:
        pytest.skip("SPATIAL_ENTROPY_VOC_MASKS names no folder of PASCAL VOC's SegmentationClass")
    from spatial_entropy.data import _Files
    files = [(p, p) for p in sorted(Path(place).glob("*.png"))]
    read = _Files(files, 64)
    for p, _ in files:
        a = np.asarray(Image.open(p))
        assert np.array_equal(read.mask(p)[0], np.where(a == 255, 2, a > 0)), p.name
    assert read.void
