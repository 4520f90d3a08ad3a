"""The COCO reader: what it keeps, and an error for each broken rule."""

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from fcos.config import DataConfig
from fcos.data.coco import AnnotationError, CocoDataset, shared_image_files
from fcos.data.images import ImageError
from fcos.data.sampling import SampleIndex
from fcos.data.transforms import train_transforms


def small():
    """Two pictures, 40 wide and 30 high; categories with gaps and out of order."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [10, 10, 20, 10]},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 5, "name": "airplane"}],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, document, name="set.json"):
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_contents(folder):
    data = CocoDataset(write(folder, small()))
    assert data.class_names == ("airplane", "toothbrush")
    assert data.category_ids == (5, 90)
    assert data.image_ids == [7, 3]
    assert data.aspect_ratios.tolist() == [40 / 30, 40 / 30]
    assert (data.size(0), data.path(1)) == ((30, 40), folder / "images" / "sub" / "b.png")
    sample = data[0]
    assert sample.image.shape == (3, 30, 40) and sample.image.dtype == torch.uint8
    assert sample.image_id == 7 and sample.original_size == (30, 40)
    assert sample.labels.tolist() == [1, 0] and sample.labels.dtype == torch.int64
    assert sample.boxes.tolist() == [[1, 2, 4.5, 6], [10, 10, 30, 20]]
    assert type(sample.boxes) is torch.Tensor and type(sample.image) is torch.Tensor
    negative = data[1]
    assert negative.boxes.shape == (0, 4) and negative.labels.shape == (0,)
    assert (negative.boxes.dtype, negative.labels.dtype) == (torch.float32, torch.int64)
    with pytest.raises(IndexError, match="index must be in 0..1, got 2"):
        data[2]


def test_crowd_empty_and_outside_boxes(folder):
    document = small()
    boxes = [
        ([0, 0, 9, 9], 1),  # crowd
        ([5, 5, 0, 9], 0),  # no width
        ([5, 5, 9, -1], 0),  # negative height
        ([38, 28, 10, 10], 0),  # clipped
        ([-5, -5, 10, 10], 0),  # clipped
        ([50, 5, 10, 10], 0),  # wholly outside
        ([0, 0, 40.000001, 30], 0),  # the rounding of decimals: not worth a report
        ([0, 0, 1e308, 1e308], 0),  # clipped, without a warning
    ]
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 5, "bbox": box, "iscrowd": crowd}
        for i, (box, crowd) in enumerate(boxes)
    ]
    data = CocoDataset(write(folder, document))
    report = data.report
    assert (report.images, report.images_without_boxes, report.boxes) == (2, 1, 4)
    assert (report.crowd, report.dropped, report.clipped) == (1, 3, 3)
    kept = [[38, 28, 40, 30], [0, 0, 5, 5], [0, 0, 40, 30], [0, 0, 40, 30]]
    assert data.target(1)[0].tolist() == kept
    assert str(report) == (
        "2 images (1 without boxes), 4 boxes, 1 crowd boxes left out, "
        "3 empty boxes dropped, 3 boxes clipped to the image"
    )


def test_interleaved_annotations_keep_their_images(folder):
    document = small()
    document["annotations"] = [
        {"id": i, "image_id": (3, 7)[i % 2], "category_id": 5, "bbox": [i, 0, 1, 1]}
        for i in range(6)
    ]
    data = CocoDataset(write(folder, document))
    assert data.target(0)[0][:, 0].tolist() == [1, 3, 5]
    assert data.target(1)[0][:, 0].tolist() == [0, 2, 4]


def test_agrees_with_pycocotools(folder, capsys):
    random = np.random.default_rng(0)
    document = small()
    document["annotations"] = [
        {
            "id": i,
            "image_id": int(random.choice([7, 3])),
            "category_id": int(random.choice([5, 90])),
            "bbox": [*random.uniform(0, 15, 2), *random.uniform(1, 14, 2)],
            "area": 1.0,
            "iscrowd": int(random.random() < 0.2),
        }
        for i in range(100)
    ]
    path = write(folder, document)
    data, other = CocoDataset(path), COCO(str(path))
    for index, image in enumerate(data.image_ids):
        found = other.loadAnns(other.getAnnIds(imgIds=[image], iscrowd=False))
        boxes, labels = data.target(index)
        xywh = np.array([a["bbox"] for a in found])
        assert np.allclose(boxes[:, :2], xywh[:, :2], rtol=1e-6)
        assert np.allclose(boxes[:, 2:] - boxes[:, :2], xywh[:, 2:], atol=1e-5)
        assert [data.category_ids[label] for label in labels] == [a["category_id"] for a in found]


def test_image_folder(folder):
    path = write(folder, small())
    assert CocoDataset(path).images == folder / "images"
    beside = write(folder / "images", small())
    assert CocoDataset(beside).images == folder / "images"
    elsewhere = write(folder / "images" / "sub", small())
    assert len(CocoDataset(elsewhere, folder / "images")[1].image)
    with pytest.raises(AnnotationError, match="nowhere: no such image folder"):
        CocoDataset(path, folder / "nowhere")


def test_without_pictures(tmp_path):
    data = CocoDataset(write(tmp_path, small()), check_images=False)
    assert data.report.boxes == 2
    with pytest.raises(ImageError, match=r"a\.png: no such file"):
        data[0]


def test_missing_size_is_read_from_the_file(folder):
    document = small()
    del document["images"][1]["width"]
    assert CocoDataset(write(folder, document)).size(1) == (30, 40)


def change(*path, value=None, remove=False):
    """A function that sets or removes one entry of the small document."""

    def apply(document):
        for step in path[:-1]:
            document = document[step]
        if remove:
            del document[path[-1]]
        else:
            document[path[-1]] = value

    return apply


def twice(key):
    return lambda document: document[key].append(document[key][0])


BROKEN = [
    (change("images", remove=True), "top level: key 'images' is missing"),
    (change("annotations", remove=True), "top level: key 'annotations' is missing"),
    (change("categories", remove=True), "top level: key 'categories' is missing"),
    (change("images", value=[]), "images: the list is empty; at least one image"),
    (change("categories", value=[]), "categories: the list is empty; at least one class"),
    (change("images", value={}), "images: must be a list, got {}"),
    (change("annotations", 1, value=4), r"annotations\[1\]: must be an object, got 4"),
    (twice("images"), "image 7: the id occurs twice"),
    (twice("annotations"), "annotation 1: the id occurs twice"),
    (twice("categories"), "category 90: the id occurs twice"),
    (change("images", 1, "id", remove=True), r"images\[1\]: field 'id' is missing"),
    (change("images", 1, "id", value="3"), r"images\[1\]: id must be a 64-bit integer, got '3'"),
    (change("images", 1, "id", value=True), r"images\[1\]: id must be a 64-bit integer, got True"),
    (change("images", 1, "id", value=2**63), r"images\[1\]: id must be a 64-bit integer, got 92"),
    (change("images", 1, "file_name", remove=True), "image 3: file_name must be .*, got None"),
    (change("images", 1, "file_name", value="/etc/passwd"), "image 3: file_name must stay inside"),
    (change("images", 1, "file_name", value="C:\\a.png"), "image 3: file_name must stay inside"),
    (change("images", 1, "file_name", value="../a.png"), "image 3: file_name must stay inside"),
    (change("images", 1, "file_name", value="sub/../../a"), "image 3: file_name must stay inside"),
    (change("images", 1, "file_name", value="..\\a.png"), "image 3: file_name must stay inside"),
    (change("images", 1, "file_name", value="\ud800"), "image 3: file_name is not a text"),
    (change("images", 1, "width", value=0), "image 3: width must be a positive whole number"),
    (change("images", 1, "width", value=4.5), "image 3: width must be a positive .*, got 4.5"),
    (change("images", 1, "height", value="30"), "image 3: height must be a positive .*, got '30'"),
    (change("images", 1, "height", value=math.nan), "image 3: height must be .*, got nan"),
    (change("categories", 0, "name", remove=True), "category 90: name must be a text, got None"),
    (change("annotations", 1, "image_id", value=9), "annotation 2: image_id 9 is not among the im"),
    (change("annotations", 1, "category_id", value=0), "annotation 2: category_id 0 is not among"),
    (change("annotations", 1, "category_id", remove=True), "annotation 2: field 'category_id' is"),
    (change("annotations", 1, "bbox", remove=True), "annotation 2: field 'bbox' is missing"),
    (change("annotations", 1, "bbox", value=[1, 2, 3]), "annotation 2: bbox must be four numbers"),
    (change("annotations", 1, "bbox", value=None), "annotation 2: bbox must be four numbers"),
    (change("annotations", 1, "bbox", 2, value=math.nan), "annotation 2: bbox must hold finite"),
    (change("annotations", 1, "bbox", 2, value=-math.inf), "annotation 2: bbox must hold finite"),
    (change("annotations", 1, "bbox", 2, value=10**400), "annotation 2: bbox must hold finite"),
    (change("annotations", 1, "bbox", 2, value="3"), "annotation 2: bbox must hold finite"),
    (change("annotations", 1, "bbox", 2, value=True), "annotation 2: bbox must hold finite"),
    (change("annotations", 1, "iscrowd", value=2), "annotation 2: iscrowd must be 0 or 1, got 2"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN, ids=[rule[:50] for _, rule in BROKEN])
def test_broken_rules(folder, breaks, message):
    document = small()
    breaks(document)
    with pytest.raises(AnnotationError, match=r"set\.json: " + message):
        CocoDataset(write(folder, document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [1 2]}', "line 2, column 20: not JSON"),
        ("", "line 1, column 1: not JSON"),
        ("[]", "top level: must be an object"),
        ('[{"image_id": 1, "score": 0.5}]', "top level: .* as a file of detection results"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_malformed_json(folder, text, message):
    with pytest.raises(AnnotationError, match=rf"set\.json: {message}"):
        CocoDataset(write(folder, text))


def test_nan_outside_of_a_box(folder):
    text = json.dumps(small() | {"info": {"a": "NaN", "area": math.nan}}, indent=1)
    line = next(i for i, row in enumerate(text.split("\n"), 1) if row.endswith(": NaN"))
    with pytest.raises(AnnotationError, match=rf"set\.json: line {line}: NaN and Infinity are not"):
        CocoDataset(write(folder, text))


def test_missing_and_unreadable_json(folder):
    with pytest.raises(AnnotationError, match=r"none\.json: no such annotation file"):
        CocoDataset(folder / "none.json")
    (folder / "latin.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(AnnotationError, match=r"latin\.json: not JSON in UTF-8"):
        CocoDataset(folder / "latin.json")
    (folder / "marked.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(small()).encode())
    assert len(CocoDataset(folder / "marked.json")) == 2


def test_missing_pictures_are_counted(folder):
    document = small()
    document["images"] += [
        {"id": 100 + i, "file_name": f"no{i}.png", "width": 4, "height": 3} for i in range(8)
    ]
    message = r"8 of 10 pictures are missing in .*images: no0.png, no1.png, .*no4.png, \.\.\.$"
    with pytest.raises(AnnotationError, match=message):
        CocoDataset(write(folder, document))


def test_a_link_out_of_the_folder_is_fine(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "c.png"
    Image.new("RGB", (40, 30)).save(outside)
    os.remove(folder / "images" / "a.png")
    os.symlink(outside, folder / "images" / "a.png")
    assert CocoDataset(write(folder, small()))[0].image.shape == (3, 30, 40)


def test_wrong_size(folder):
    document = small()
    document["images"][0]["width"] = 41
    message = r"a\.png: the picture is 40x30 .* image 7 in .*set\.json is 41x30: the boxes would be"
    with pytest.raises(AnnotationError, match=message):
        CocoDataset(write(folder, document))[0]


def test_missing_size_and_missing_picture(tmp_path):
    document = small()
    del document["images"][0]["height"]
    rule = (
        r"set\.json: image 7: height or width is missing and cannot be read .*a\.png: no such file"
    )
    with pytest.raises(ImageError, match=rule):
        CocoDataset(write(tmp_path, document), check_images=False)


def test_size_before_exif_rotation(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "images" / "a.png", exif=exif)
    with pytest.raises(AnnotationError, match=r"is 30x40 .* is 40x30: .*swapped .*EXIF rotation"):
        CocoDataset(write(folder, small()))[0]
    document = small()
    document["images"][0] |= {"width": 30, "height": 40}
    assert CocoDataset(write(folder, document))[0].image.shape == (3, 40, 30)


def test_truncated_picture(folder):
    picture = folder / "images" / "a.png"
    picture.write_bytes(picture.read_bytes()[:60])
    data = CocoDataset(write(folder, small()))
    with pytest.raises(ImageError, match=r"a\.png"):
        data[0]


def test_shared_image_files(folder):
    first = CocoDataset(write(folder, small()))
    document = small()
    del document["images"][0], document["annotations"][:]
    second = CocoDataset(write(folder, document, "other.json"), folder / "images" / ".." / "images")
    assert shared_image_files(first, second) == 1
    assert shared_image_files(first, first) == 2


def test_augmentation_depends_on_seed_epoch_and_image_only(folder):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "a.png")
    config = DataConfig(min_sizes=tuple(range(20, 60)), photometric=True)
    data = CocoDataset(write(folder, small()), transforms=train_transforms(config))
    data = pickle.loads(pickle.dumps(data))  # loader workers may be started afresh

    def shapes(seed):
        return [tuple(data[SampleIndex(0, epoch, seed)].image.shape) for epoch in range(20)]

    first = data[SampleIndex(0, 5, 1)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    data[SampleIndex(1, 9, 9)]
    again = data[SampleIndex(0, 5, 1)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's stream is touched
    assert torch.equal(first.image, again.image) and torch.equal(first.boxes, again.boxes)
    assert torch.equal(data[0].image, data[SampleIndex(0, 0, 0)].image)
    assert len(set(shapes(1))) > 5
    assert shapes(1) != shapes(2)


def test_many_boxes_take_little_memory(tmp_path):
    """118,000 images and 860,000 boxes must not be Python objects in every worker."""
    document = {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480}
            for i in range(2000)
        ],
        "annotations": [
            {"id": i, "image_id": i % 2000, "category_id": 1, "bbox": [1.5, 2, 30, 40]}
            for i in range(14_000)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    data = CocoDataset(write(tmp_path, document), check_images=False)
    assert len(pickle.dumps(data)) < 2000 * 40 + 14_000 * 30
    assert data.report.boxes == 14_000
