"""Pictures, folders and videos through a predictor with a stand-in for the network."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fcos.config import Config, DataConfig, ModelConfig, PostprocessConfig
from fcos.data.images import ImageError
from fcos.detections import Detections
from fcos.model import FCOS
from fcos.postprocess import PaddedDetections
from fcos.predict import Predictor
from fcos.predict_files import predict_files
from fcos.sources import SourceError, find_all_files, find_files
from fcos.video import VideoError, VideoReader, VideoWriter

NAMES = ("box", "other")
CONFIG = Config(data=DataConfig(min_sizes=(64,), max_size=128))


class BrightestArea(Predictor):
    """Finds the bright rectangle of a dark picture, from the prepared image alone.

    A second detection, of class 1, scores 0.2 and covers the whole picture.
    """

    def __init__(self) -> None:
        super().__init__(nn.Dropout(), CONFIG, NAMES, (5, 9), device="cpu")
        self.batches: list[tuple[int, ...]] = []

    def _detect(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor
    ) -> PaddedDetections:
        assert not self.network.training
        assert images.dtype == torch.float32
        assert all(side % 32 == 0 for side in images.shape[2:])
        self.batches.append(tuple(images.shape))
        count = len(images)
        boxes, scores = torch.zeros(count, 3, 4), torch.zeros(count, 3)
        labels, counts = torch.full((count, 3), -1), torch.zeros(count, dtype=torch.int64)
        for i, (size, original) in enumerate(zip(image_sizes, original_sizes, strict=True)):
            height, width = size.tolist()
            bright = images[i, 0, :height, :width] > 0
            whole = torch.tensor([0, 0, *original.flip(0).tolist()])
            found = []
            if bright.any():
                ys, xs = bright.nonzero().unbind(1)
                edges = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                found.append((edges * (original / size).flip(0).repeat(2), 0.8, 0))
            found.append((whole, 0.2, 1))
            for k, (box, score, label) in enumerate(found):
                boxes[i, k], scores[i, k], labels[i, k] = box, score, label
            counts[i] = len(found)
        return PaddedDetections(boxes, scores, labels, counts)


def picture(width: int, height: int, box: tuple[int, int, int, int] | None) -> np.ndarray:
    """Dark with a bright rectangle."""
    image = np.full((height, width, 3), 20, dtype=np.uint8)
    if box is not None:
        image[box[1] : box[3], box[0] : box[2]] = 230
    return image


def write_picture(path: Path, box: tuple[int, int, int, int] | None = (30, 40, 90, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(160, 120, box)).save(path)
    return path


def write_video(
    path: Path, frames: int = 20, rate: Fraction | int = 25, width: int = 96, height: int = 64
) -> Path:
    """A bright square that moves right by 2 pixels a frame; mpeg4 in MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            image = picture(width, height, (4 + 2 * i, 16, 28 + 2 * i, 40))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def close(detections: Detections, box: tuple[int, int, int, int], pixels: float = 2.5) -> bool:
    return bool(((detections.boxes[0] - torch.tensor(box)).abs() <= pixels).all())


BOX = (30, 40, 90, 80)


@pytest.mark.parametrize("kind", ["path", "str", "pil", "array", "tensor"])
def test_one_picture(kind: str, tmp_path) -> None:
    array = picture(160, 120, BOX)
    path = write_picture(tmp_path / "a.png", BOX)
    source = {
        "path": path,
        "str": str(path),
        "pil": Image.fromarray(array),
        "array": array,
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
    }[kind]
    predictor = BrightestArea()
    detections = predictor.predict(source)
    assert isinstance(detections, Detections)
    assert repr(detections) == "<1 detection: 1 box>"  # 0.2 is below the threshold
    assert detections.image_size == (120, 160)
    assert close(detections, BOX)
    assert predictor.batches == [(1, 3, 64, 96)]  # 64 x 85, padded
    both = predictor.predict(source, score_threshold=0.2)
    assert both.class_names == ["box", "other"]
    assert both[1].boxes.tolist() == [[0, 0, 160, 120]]


def test_with_the_network() -> None:
    """An untrained network finds nothing sensible, but as much as it may, inside the picture."""
    model = ModelConfig(
        num_classes=2,
        backbone="resnet10_half",
        backbone_weights="none",
        fpn_channels=64,
        tower_convs=1,
    )
    config = Config(
        model=model,
        data=CONFIG.data,
        postprocess=PostprocessConfig(score_threshold=0.0, max_detections=7),
    )
    torch.manual_seed(0)
    predictor = Predictor(FCOS(model), config, NAMES, device="cpu")
    sizes = [(120, 160), (160, 120), (50, 50)]
    pictures = [np.random.default_rng(0).integers(0, 256, (*s, 3), np.uint8) for s in sizes]
    found = predictor.predict(pictures, score_threshold=0.0, batch_size=2)
    assert [d.image_size for d in found] == sizes
    assert [len(d) for d in found] == [7, 7, 7]
    for detections, (height, width) in zip(found, sizes, strict=True):
        assert (detections.boxes >= 0).all() and not detections.boxes.requires_grad
        assert (detections.boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert (detections.scores.diff() <= 0).all()
        assert len(detections.to_coco(1)) == 7
    alone = predictor.predict(pictures[2], score_threshold=0.0)
    assert torch.allclose(alone.boxes, found[2].boxes, atol=1e-3)


def test_several_pictures_in_order(tmp_path) -> None:
    boxes = [(10 * i, 20, 10 * i + 40, 70) for i in range(5)]
    images: list = [picture(160, 120, box) for box in boxes]
    images[1] = Image.fromarray(images[1])
    images[2] = write_picture(tmp_path / "c.png", boxes[2])
    images[3] = np.ascontiguousarray(images[3].transpose(1, 0, 2))  # upright
    predictor = BrightestArea()
    for batch_size, batches in ((1, 5), (2, 3), (8, 1)):
        predictor.batches.clear()
        found = predictor.predict(images, batch_size=batch_size)
        assert isinstance(found, list) and len(predictor.batches) == batches
        upright = (boxes[3][1], boxes[3][0], boxes[3][3], boxes[3][2])
        expected = [*boxes[:3], upright, boxes[4]]
        assert all(close(d, box) for d, box in zip(found, expected, strict=True))
    assert predictor.batches == [(5, 3, 96, 96)]
    assert predictor.predict([]) == []
    assert isinstance(predictor.predict(images[:1]), list)


def test_folder_pattern_and_video(tmp_path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.JPG", ".hidden.png"):
        write_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    write_video(tmp_path / "sub/d.mp4", frames=3)
    predictor = BrightestArea()
    assert len(predictor.predict(tmp_path)) == 2
    assert len(predictor.predict(str(tmp_path / "*.png"))) == 1
    assert len(predictor.predict(f"{tmp_path}/**/*")) == 2 + 1 + 3
    frames = predictor.predict(tmp_path / "sub/d.mp4", batch_size=2)
    assert [close(d, (4 + 2 * i, 16, 28 + 2 * i, 40)) for i, d in enumerate(frames)] == [True] * 3


def test_stream_holds_one_batch(tmp_path) -> None:
    predictor = BrightestArea()
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken, torch.zeros(3, 64, 64, dtype=torch.uint8)

    results = predictor.detect(endless(), 0.3, 4)
    assert [next(results)[0] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert taken == 8
    sources = [write_picture(tmp_path / "a.png"), tmp_path / "missing.png"]
    stream = predictor.stream(sources)
    assert len(next(stream)) == 1
    with pytest.raises(SourceError, match=r"missing\.png: no such file or folder"):
        next(stream)


def test_errors(tmp_path) -> None:
    predictor = BrightestArea()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no picture at all")
    for source, message in (
        (tmp_path / "nothing.jpg", r"nothing\.jpg: no such file or folder"),
        (tmp_path / "empty", "empty: the folder has no picture and no video"),
        (f"{tmp_path}/*.png", r"\*\.png: the pattern matches no picture"),
        (np.zeros((4, 4)), r"uint8 \[H, W, 3\]"),
        (torch.zeros(3, 4, 4), r"uint8 \[3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(source)
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        predictor.predict(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match="batch_size: must be at least 1, got 0"):
        predictor.predict(picture(8, 8, None), batch_size=0)
    with pytest.raises(ValueError, match="class_names must not be empty"):
        Predictor(nn.Identity(), CONFIG, ())
    with pytest.raises(ValueError, match=r"one id per class \(2\), got 3"):
        Predictor(nn.Identity(), CONFIG, NAMES, (1, 2, 3))


def test_find_files(tmp_path) -> None:
    a, b = write_picture(tmp_path / "photo[1].png"), write_picture(tmp_path / "photo1.png")
    assert find_files(a) == [a]  # a name, although it looks like a pattern
    assert find_files(tmp_path / "photo?.png") == [b]
    (tmp_path / "scan.data").write_bytes(a.read_bytes())
    assert find_files(tmp_path / "scan.data") == [tmp_path / "scan.data"]  # named by the user
    assert find_files(tmp_path) == [b, a]
    assert find_all_files([b, tmp_path, f"{tmp_path}/*.png"]) == [b, a]
    with pytest.raises(SourceError, match="at least one"):
        find_all_files([])


def test_video_round_trip(tmp_path) -> None:
    source = write_video(tmp_path / "in.mp4")
    seen = []
    result = BrightestArea().predict_video(
        source,
        tmp_path / "new" / "out.mp4",
        batch_size=8,
        on_frame=lambda frame, d: seen.append((frame.index, frame.time, d)),
    )
    assert result.frames == 20
    assert result.frames_per_second == pytest.approx(20 / result.seconds)
    assert [index for index, _, _ in seen] == list(range(20))
    assert [time for _, time, _ in seen] == pytest.approx([i / 25 for i in range(20)])
    assert all(close(d, (4 + 2 * i, 16, 28 + 2 * i, 40)) for i, _, d in seen)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.mp4"]
    with VideoReader(tmp_path / "new" / "out.mp4") as reader:
        frames = list(reader)
        assert (len(frames), reader.rate) == (20, 25)
        assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(20)])
        assert frames[0].image.shape == (64, 96, 3)
    # the square is where it was, now with an outline around it
    assert frames[10].image[28, 30].min() > 200 and frames[10].image[5, 90].max() < 60


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(12), Fraction(60)])
def test_video_keeps_the_rate(rate: Fraction, tmp_path) -> None:
    source = write_video(tmp_path / "in.mp4", frames=12, rate=rate)
    BrightestArea().predict_video(source, tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        times = [frame.time for frame in reader]
        assert float(reader.rate) == pytest.approx(float(rate), rel=1e-3)
    assert times == pytest.approx([i / float(rate) for i in range(12)], abs=1e-3)


def test_video_keeps_uneven_time_stamps(tmp_path) -> None:
    stamps = [0, 40, 80, 200, 220, 500]  # milliseconds
    with av.open(str(tmp_path / "in.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps:
            frame = av.VideoFrame.from_ndarray(picture(64, 64, None), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    BrightestArea().predict_video(tmp_path / "in.mkv", tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert [round(frame.time * 1000) for frame in reader] == stamps


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_video_of_odd_size(encoder: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fcos.video._ENCODERS", ("no such encoder", encoder))
    image = picture(61, 47, (40, 10, 61, 47))
    with av.open(str(tmp_path / "in.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)  # a lossless codec, which has odd sizes
        stream.width, stream.height, stream.pix_fmt = 61, 47, "bgr0"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    result = BrightestArea().predict_video(tmp_path / "in.avi", tmp_path / "out.mp4")
    assert result.frames == 3
    with VideoReader(tmp_path / "out.mp4") as reader:
        frames = list(reader)
        assert (len(frames), reader.rate) == (3, 10)
    assert frames[0].image.shape == (48, 62, 3)
    assert frames[0].image[30, 50].min() > 200 and frames[0].image[5, 5].max() < 60


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_writer_accepts_fine_time_stamps(encoder: str, tmp_path, monkeypatch) -> None:
    """MPEG transport streams count in 1/90000 s, which MPEG-4 part 2 cannot store."""
    monkeypatch.setattr("fcos.video._ENCODERS", (encoder,))
    with VideoWriter(tmp_path / "out.mp4", Fraction(25), Fraction(1, 90_000)) as writer:
        for i in range(5):
            writer.write(picture(64, 64, None), i * 3600)
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert [frame.time for frame in reader] == pytest.approx([i / 25 for i in range(5)])
        assert reader.rate == 25


def test_video_without_pyav(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    with pytest.raises(VideoError, match=r"in\.mp4: videos need PyAV: pip install 'fcos\[video\]'"):
        BrightestArea().predict(write_picture(tmp_path / "a.png").rename(tmp_path / "in.mp4"))


def test_video_filmed_sideways_is_upright(tmp_path) -> None:
    """The display matrix in the MP4 says "turn by 90 degrees clockwise"."""
    source = write_video(tmp_path / "in.mp4", frames=2)
    data = source.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    minus_one = (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, end = bytes(4), (1 << 30).to_bytes(4, "big")
    start = data.index(b"tkhd")
    place = data.index(one + zero * 3 + one, start)  # ISO/IEC 14496-12, 8.3.2
    turned = zero + one + zero + minus_one + zero + zero + zero + zero + end
    source.write_bytes(data[:place] + turned + data[place + 36 :])
    detections = BrightestArea().predict(source)
    assert detections[0].image_size == (96, 64)
    # (x, y) of the 96 x 64 frame moves to (64 - y, x)
    assert close(detections[0], (64 - 40, 4, 64 - 16, 28))


def test_video_errors(tmp_path, monkeypatch) -> None:
    predictor = BrightestArea()
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    output = tmp_path / "out.mp4"
    with pytest.raises(VideoError, match=r"broken\.mp4: cannot be opened as a video: "):
        predictor.predict_video(tmp_path / "broken.mp4", output)
    with pytest.raises(VideoError, match=r"missing\.mp4: cannot be opened"):
        predictor.predict_video(tmp_path / "missing.mp4", output)
    source = write_video(tmp_path / "in.mp4", frames=4)
    before = source.read_bytes()
    with pytest.raises(VideoError, match="must not replace its source"):
        predictor.predict_video(source, tmp_path / "sub" / ".." / "in.mp4")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor.predict_video(source, output, on_frame=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.mp4", "in.mp4"]
    assert source.read_bytes() == before
    monkeypatch.setattr("fcos.video._ENCODERS", ("no such encoder",))
    with pytest.raises(VideoError, match="no encoder of no such encoder"):
        predictor.predict_video(source, output)


def test_predict_files(tmp_path) -> None:
    write_picture(tmp_path / "in/a.png")
    write_picture(tmp_path / "in/b.jpg")
    write_picture(tmp_path / "in/c.bmp", None)
    write_video(tmp_path / "in/d.mp4", frames=3)
    lines: list[str] = []
    result = predict_files(
        BrightestArea(), [tmp_path / "in"], tmp_path / "out/new", batch_size=2, report=lines.append
    )
    assert (result.pictures, result.videos, result.frames, result.detections) == (3, 1, 3, 5)
    assert (result.exit_code, result.failures) == (0, {})
    assert 0 < result.seconds < math.inf
    names = ["a.png", "b.jpg", "c.png", "d.mp4", "detections.json"]
    assert sorted(path.name for path in (tmp_path / "out/new").iterdir()) == names
    assert Image.open(tmp_path / "out/new/b.jpg").size == (160, 120)
    drawn = np.asarray(Image.open(tmp_path / "out/new/a.png"))
    assert (drawn != picture(160, 120, BOX)).any()
    assert [line.split(": ")[1] for line in lines[:3]] == [
        "1 detection",
        "1 detection",
        "0 detections",
    ]
    entries = json.loads((tmp_path / "out/new/detections.json").read_text())
    assert [entry["drawing"] for entry in entries] == ["a.png", "b.jpg", "c.png"] + ["d.mp4"] * 3
    assert entries[0]["file"] == str(tmp_path / "in/a.png")
    assert entries[0]["image_size"] == [120, 160]
    assert entries[0]["detections"][0]["box"] == pytest.approx(BOX, abs=2.5)
    assert entries[2]["detections"] == []
    assert [(e["frame"], e["time"]) for e in entries[3:]] == [(0, 0), (1, 0.04), (2, 0.08)]


def test_predict_files_goes_on_after_a_broken_one(tmp_path) -> None:
    write_picture(tmp_path / "in/a.png")
    (tmp_path / "in/b.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (tmp_path / "in/c.mp4").write_bytes(b"broken")
    write_picture(tmp_path / "in/d.png")
    result = predict_files(BrightestArea(), [tmp_path / "in"], tmp_path / "out", batch_size=4)
    assert result.exit_code == 1
    assert [path.name for path in result.failures] == ["b.jpg", "c.mp4"]
    assert all(str(path) in message for path, message in result.failures.items())
    assert (result.pictures, result.videos) == (2, 0)
    assert [path.name for path in result.outputs] == ["a.png", "d.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.png",
        "d.png",
        "detections.json",
    ]


def test_predict_files_same_names(tmp_path) -> None:
    sources = [
        tmp_path / name for name in ("1/a.png", "2/a.png", "2/A.png", "3/a.bmp", "3/a-2.png")
    ]
    for source in sources:
        write_picture(source)
    result = predict_files(BrightestArea(), [*sources, sources[0]], tmp_path / "out")
    names = [result.outputs[source].name for source in sources]
    assert names == ["a.png", "a-2.png", "A-3.png", "a-4.png", "a-2-2.png"]
    assert all((tmp_path / "out" / name).is_file() for name in names)
    again = predict_files(BrightestArea(), sources, tmp_path / "out")
    assert again.outputs == result.outputs  # a second run replaces the first one's


def test_predict_files_leaves_its_sources_alone(tmp_path) -> None:
    source = write_picture(tmp_path / "a.png")
    clip = write_video(tmp_path / "b.mp4", frames=2)
    before = source.read_bytes(), clip.read_bytes()
    result = predict_files(BrightestArea(), [source, clip], tmp_path)
    assert (source.read_bytes(), clip.read_bytes()) == before
    assert [path.name for path in result.outputs.values()] == ["a-2.png", "b-2.mp4"]
    # nor through a link in the output folder
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").symlink_to(source)
    predict_files(BrightestArea(), [source], tmp_path / "out")
    assert source.read_bytes() == before[0]


def test_predict_files_needs_files(tmp_path) -> None:
    write_picture(tmp_path / "a.png")
    with pytest.raises(SourceError, match=r"b\.png: no such file"):
        predict_files(BrightestArea(), [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_detections_json_is_complete_when_interrupted(tmp_path) -> None:
    for name in "abc":
        write_picture(tmp_path / f"in/{name}.png")

    def stop(line: str) -> None:
        if "b.png" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(BrightestArea(), [tmp_path / "in"], tmp_path / "out", report=stop)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [entry["drawing"] for entry in entries] == ["a.png", "b.png"]
