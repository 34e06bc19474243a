"""Boxes read from files: whatever is wrong in them is said, with the file and the line."""
import numpy as np
import pytest
import torch
from PIL import Image

from spatial_entropy.analysis.scoring import score_box_pairs
from spatial_entropy.boxes import Annotation, as_shares_of, box_pairs, read_boxes
from spatial_entropy.demo import demo_model

VOC = """<annotation><filename>{name}</filename><size><width>{w}</width><height>{h}</height><depth>3</depth></size>
<object><name>x</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object></annotation>"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c d é.png"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def table(home, text, encoding="utf-8"):
    (home / "boxes.csv").write_text(text, encoding=encoding)
    return home


def test_both_forms_say_the_same(home):
    of_table = box_pairs(table(home, "file,x0,y0,x1,y1,width,height\na.png,6,4,30,20,60,40\n"))
    (home / "boxes.csv").unlink()
    (home / "annotations").mkdir()
    (home / "annotations/a.xml").write_text(VOC.format(7, 5, 30, 20, name="a.png", w=60, h=40))
    of_xml = box_pairs(home)
    assert torch.equal(of_table[0][1], torch.tensor([[.1, .1, .5, .5]]))
    assert torch.equal(of_table[0][1], of_xml[0][1]) and of_table.names == of_xml.names == ["a.png"]
    assert "2 picture(s) without a box were left out" in of_xml.notes[0]


def test_names_are_found_with_and_without_ending_and_folder(home):
    text = "image,xmin,ymin,xmax,ymax\nb,1,1,9,9\nsub/a.png,2,2,9,9\nc d é.png,3,3,9,9\n"
    pairs = box_pairs(table(home, text, "utf-8-sig"))           # as spreadsheets write it
    assert {n: round((pairs[i][1][0, 0] * 60).item()) for i, n in enumerate(pairs.names)} == {"b.jpg": 1, "a.png": 2, "c d é.png": 3}


def test_a_picture_that_was_shipped_smaller_keeps_its_boxes(home):
    pairs = box_pairs(table(home, "file,x0,y0,x1,y1,width,height\na.png,60,40,300,200,600,401\n"), 32)
    x, boxes = pairs[0]
    assert x.shape == (3, 32, 32) and torch.allclose(boxes, torch.tensor([[.1, 40 / 401, .5, 200 / 401]]))


@pytest.mark.parametrize("text, said", [
    ("", "got the columns none"),
    ("file,x,y,w,h\na.png,1,2,3,4\n", "got the columns file, x, y, w, h"),
    ("file,x0,y0,x1,y1\na.png,1,2,three,4\n", "line 2: got 1, 2, three, 4, expected numbers"),
    ("file,x0,y0,x1,y1\na.png,1,1,9,9\na.png,5,5,5,9\n", "line 3: got the box 5, 5, 5, 9, expected x0 < x1 and y0 < y1"),
    ("file,x0,y0,x1,y1\na.png,1,2,nan,4\n", "line 2: got 1, 2, nan, 4, expected numbers"),
    ("file,x0,y0,x1,y1\na.png,1,2\n", "line 2: got 1, 2, None, None, expected numbers"),
    ("file,x0,y0,x1,y1\n", "holds no box"),
    ("file,x0,y0,x1,y1\n,1,2,3,4\n", "line 2: got no file, expected a picture's"),
    ("x0,y0,x1,y1,file\n1,2,3,4\n", "line 2: got no file, expected a picture's"),
    ("file,x0,y0,x1,y1\nz.png,1,2,3,4\n", "first z.png"),
    ("file,x0,y0,x1,y1,width,height\na.png,1,2,3,4,60,40\na.png,1,2,3,4,50,40\n", "line 3: a.png has another size above"),
])
def test_what_is_wrong_in_a_table(home, text, said):
    with pytest.raises(ValueError) as error:
        box_pairs(table(home, text))
    assert said in str(error.value) and "boxes.csv" in str(error.value)


@pytest.mark.parametrize("corners, size, said", [
    ((5, 5, 80, 9), "", "line 2: "), ((5, 5, 80, 9), "", "within 60×40 pixels"), ((-9, 5, 8, 9), "", "within 60×40"),
    ((1, 1, 9, 9), ",40,60", "was it turned or cropped"), ((1, 1, 9, 9), ",0,40", "0×40")])
def test_a_box_that_does_not_fit_its_picture_names_the_picture(home, corners, size, said):
    head = "file,x0,y0,x1,y1" + (",width,height" if size else "")
    with pytest.raises(ValueError) as error:
        box_pairs(table(home, f"{head}\na.png,{','.join(map(str, corners))}{size}\n"))
    assert said in str(error.value) and "a.png" in str(error.value)


def test_a_turned_picture_is_read_as_it_is_shown(home):
    note = Image.Exif()
    note[0x0112] = 6                                            # shown turned by 90 degrees: 40 wide, 60 high
    Image.open(home / "images/a.png").save(home / "images/a.png", exif=note)
    pairs = box_pairs(table(home, "file,x0,y0,x1,y1,width,height\na.png,4,6,20,30,40,60\n"))
    assert torch.allclose(pairs[0][1], torch.tensor([[.1, .1, .5, .5]]))


@pytest.mark.parametrize("text, said", [
    ("<annotation>", "not readable as XML"), ("", "not readable as XML"),
    (VOC.format(9, 1, 2, 3, name="a", w=60, h=40), "got the box 8.0, 0.0, 2.0, 3.0, expected x0 < x1"),
    (VOC.format("a", 1, 2, 3, name="a", w=60, h=40), "got a, 1, 2, 3"),
    (VOC.replace("<xmax>{2}</xmax>", "").format(1, 2, 3, 4, name="a", w=60, h=40), "got 1, 2, None, 4")])
def test_what_is_wrong_in_xml(home, text, said):
    (home / "annotations").mkdir()
    (home / "annotations/a.xml").write_text(text)
    with pytest.raises(ValueError) as error:
        box_pairs(home)
    assert said in str(error.value) and "a.xml" in str(error.value)


def test_a_table_that_is_none(home):
    for content in (b"file,x0,y0,x1,y1\n\xff\xfe.png,1,2,3,4\n", b"\x89PNG\r\n\x1a\n\x00\x00"):
        (home / "boxes.csv").write_bytes(content)
        with pytest.raises(ValueError, match="boxes.csv: not readable as a CSV table in UTF-8"):
            box_pairs(home)


def test_one_name_for_each_picture(home):
    Image.open(home / "images/a.png").save(home / "images/a.jpg")
    for names in (["a"], ["b", "b.jpg"]):
        with pytest.raises(ValueError, match="expected one name, with its ending, for each picture"):
            box_pairs(table(home, "file,x0,y0,x1,y1\n" + "".join(f"{n},1,1,9,9\n" for n in names)))
    assert box_pairs(table(home, "file,x0,y0,x1,y1\na.jpg,1,1,9,9\na.png,2,2,9,9\n")).names == ["a.jpg", "a.png"]


def test_xml_files_are_named_as_their_pictures(home):
    "Some annotations have one and the same `filename` in every file."
    (home / "annotations").mkdir()
    for name in ("a", "b"):
        (home / f"annotations/{name}.xml").write_text(VOC.format(7, 5, 30, 20, name="%s", w=60, h=40))
    assert box_pairs(home).names == ["a.png", "b.jpg"]


def test_sources_that_are_not_there(home):
    with pytest.raises(FileNotFoundError, match="expected images/ and beside it boxes.csv or annotations/"):
        box_pairs(home)
    with pytest.raises(FileNotFoundError, match="no such table or folder"):
        read_boxes(home / "nowhere.csv")
    with pytest.raises(ValueError, match="holds no XML file"):
        read_boxes(home / "images")


def test_shares_are_exact_and_edges_are_cut():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        w, h = torch.randint(8, 500, (2,), generator=rng).tolist()
        x, y = (torch.rand(2, generator=rng, dtype=torch.float64).sort()[0] for _ in range(2))
        box = [x[0] * w, y[0] * h, x[1] * w, y[1] * h]
        found = as_shares_of(Annotation([[float(v) for v in box]]), (w, h))
        assert torch.allclose(found[0], torch.stack([x[0], y[0], x[1], y[1]]).float(), atol=1e-6)
    assert as_shares_of(Annotation([[-1.5, 0, 101, 51]]), (100, 50)).tolist() == [[0, 0, 1, 1]]


def test_a_model_scored_from_files(home):
    pairs = box_pairs(table(home, "file,x0,y0,x1,y1\na.png,6,4,30,20\nb,6,4,30,20\nb,1,1,9,9\nc d é.png,9,9,50,30\n"), 112)
    assert repr(pairs) == f"3 pairs from {home}, 112×112 pixels"
    found = score_box_pairs(demo_model(), pairs, batch_size=2)
    assert "corloc          block 3, head 2 " in repr(found) and found.heads().blocks == [3]
    assert len(found) == 3 and found.corloc.shape == (3, 3)
    assert {row["score"] for row in found.summary("best")} == {"max_box_acc_v2", "corloc"}
    with pytest.raises(ValueError, match="heads: got 'mean'"):
        found.summary("mean")
    with pytest.raises(ValueError, match="got 1 with boxes, expected 2 or more"):
        score_box_pairs(demo_model(), [pairs[0]])
