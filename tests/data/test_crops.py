"""Crops: torchvision's distribution and pixels, a function of the seed, the same by every path."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from torchvision.transforms import InterpolationMode, v2

from hardpatch.data.images import jpeg
from hardpatch.data.images.batched_crops import crop_batch, crop_masks
from hardpatch.data.images.crops import NUMBERS_PER_CROP, Box, crop_numbers, draw_box, resample, resample_mask
from hardpatch.data.images.decode import RGB, DecodeError, Decoder
from hardpatch.data.loader.loading import Cover, TrainingImages
from hardpatch.data.sources import FileSource

torch.set_num_threads(1)
BICUBIC = InterpolationMode.BICUBIC


def photograph(width, height, *, seed=0, mode="RGB"):
    """Smooth with edges and noise, like a photograph."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    rng = np.random.default_rng(seed)
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(1, 12, (3, 3))]
    pixels = np.stack(waves, -1) * 90 + 128 + rng.normal(0, 6, (height, width, 3))
    pixels[(x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.02] = (250, 20, 60)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", **({"quality": 90} | options))
    return file.getvalue()


def files(folder, pictures, **options):
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(picture if isinstance(picture, bytes) else encoded(picture, **options))
    return FileSource([str(path) for path in paths], decoder=RGB)


def training(source, **changed):
    return TrainingImages(source, **({"size": (32, 32), "crop_scale": (0.2, 1.0), "flip": True, "seed": 0} | changed))


# Where crops lie


@pytest.mark.parametrize("size", [(400, 500), (64, 64), (90, 400), (700, 100)])
def test_distribution_is_torchvisions(size):
    """Area, ratio, row and column of 4,000 crops each; for every one, the hypothesis that both draw alike stands."""
    transform = v2.RandomResizedCrop(32, (0.2, 1.0))
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    drawn = [transform.make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn], float)
    numbers = crop_numbers(0, [(0, index) for index in range(4000)])[:, 0]
    boxes = [draw_box(row, size, scale=(0.2, 1.0), flip=True) for row in numbers]
    ours = np.array([box[:4] for box in boxes], float)

    def figures(found):
        top, left, height, width = found.T
        row, column = top / np.maximum(1, size[0] - height), left / np.maximum(1, size[1] - width)
        return {"area": height * width, "ratio": width / height, "top": top, "left": left, "row": row, "column": column}

    for name, values in figures(ours).items():
        other = figures(theirs)[name]
        assert kstest(values, other).pvalue > 1e-3, name
        assert values.min() >= other.min() - 2 or name in ("area", "ratio"), name
    assert 0.47 < np.mean([box.flip for box in boxes]) < 0.53
    assert abs(np.mean([box.flip for box in boxes if box.top <= np.median(ours[:, 0])]) - 0.5) < 0.04


def test_test_of_the_distribution_would_notice():
    """Area drawn by its root, or ratios not by their logarithm, fails it."""
    numbers = crop_numbers(0, [(0, index) for index in range(4000)])[:, 0]
    other = numbers.copy()
    other[:, 0:20:2] = numbers[:, 0:20:2] ** 1.15
    areas = [
        [math.prod(draw_box(row, (400, 500), scale=(0.2, 1.0), flip=False)[2:4]) for row in rows]
        for rows in (numbers, other)
    ]
    assert kstest(*areas).pvalue < 1e-3


def test_box_is_the_one_that_torchvision_would_take_of_the_same_draws():
    """A slow twin with torchvision's own loop on our numbers."""
    for index in range(300):
        size = (40 + index, 340 - index)
        row = crop_numbers(1, [(2, index)])[0, 0].tolist()
        wanted = None
        for area, ratio in zip(row[0:20:2], row[1:20:2]):
            target = size[0] * size[1] * (0.2 + 0.8 * area)
            aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= size[1] and 0 < h <= size[0]:
                wanted = (int(row[20] * (size[0] - h + 1)), int(row[21] * (size[1] - w + 1)), h, w)
                break
        got = draw_box(np.array(row), size, scale=(0.2, 1.0), flip=False)
        assert wanted is None or got[:4] == wanted


def test_numbers_depend_on_seed_epoch_index_and_view_alone():
    some = crop_numbers(3, [(1, 5), (2, 5), (1, 6)], views=2)
    assert some.shape == (3, 2, NUMBERS_PER_CROP)
    assert np.array_equal(some[2], crop_numbers(3, [(1, 6)], views=2)[0])
    assert np.array_equal(some[:, :1], crop_numbers(3, [(1, 5), (2, 5), (1, 6)]))
    rows = np.concatenate([some.reshape(6, -1), crop_numbers(4, [(1, 5)])[0]])
    assert len({row.tobytes() for row in rows}) == 7


def test_numbers_are_uniform_and_independent():
    numbers = crop_numbers(0, [(epoch, index) for epoch in range(40) for index in range(100)])[:, 0]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert all(kstest(column, "uniform").pvalue > 1e-3 for column in numbers.T)
    correlations = np.corrcoef(numbers.T) - np.eye(NUMBERS_PER_CROP)
    assert np.abs(correlations).max() < 0.08
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.06  # of one image and the next


# Pixels


@pytest.mark.parametrize("box", [Box(0, 0, 97, 131), Box(5, 17, 60, 44), Box(50, 3, 20, 24), Box(3, 4, 32, 32)])
def test_pixels_are_torchvisions(box):
    image = torch.from_numpy(np.array(photograph(131, 97))).permute(2, 0, 1)
    for pixels in (image, image.contiguous(), image.float() * 1.7 - 30):
        wanted = v2.functional.resized_crop(pixels, *box[:4], [32, 32], interpolation=BICUBIC, antialias=True)
        assert torch.equal(resample(pixels, box, (32, 32)), wanted)
        assert torch.equal(resample(pixels, box._replace(flip=True), (32, 32)), wanted.flip(-1))


def test_mask_is_cut_as_torchvision_cuts_masks():
    mask = torch.rand(41, 57) > 0.5
    wanted = v2.functional.resized_crop_mask(mask[None].to(torch.uint8), 3, 5, 30, 40, [16, 16])[0].bool()
    assert torch.equal(resample_mask(mask, Box(3, 5, 30, 40), (16, 16)), wanted)


def test_a_whole_jpeg_gives_the_decoders_pixels(tmp_path):
    """Without scaling the quick path and the plain one agree to the bit, whatever the orientation and the colours."""
    pictures = [photograph(90, 61), photograph(61, 90, mode="L"), photograph(80, 80)]
    contents = [encoded(picture, subsampling=sampling) for picture in pictures for sampling in (0, 1, 2)]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents.append(encoded(photograph(70, 50, seed=orientation), exif=exif))
    contents.append(encoded(pictures[0], progressive=True))
    for content in contents:
        header = jpeg.read_header(content, channels=3)
        made, plain = jpeg.decode(content, header, channels=3, scale=1), RGB(content).image
        assert header.size == plain.shape[1:]
        assert torch.equal(made, plain)


@pytest.mark.parametrize("scale", jpeg.SCALES)
@pytest.mark.parametrize("size", [(640, 480), (641, 483), (1000, 640)])
def test_decoding_at_a_fraction_is_close_to_decoding_all(size, scale):
    """The box moves by half a pixel of the result at most; of what it then holds, pixels are off by a level or two."""
    content = encoded(photograph(*size))
    header = jpeg.read_header(content, channels=3)
    full = jpeg.decode(content, header, channels=3, scale=1)
    small = jpeg.decode(content, header, channels=3, scale=scale)
    assert small.shape[1:] == (-(-size[1] // scale), -(-size[0] // scale))
    out = 320 // scale
    differences = []
    for index in range(6):
        box = draw_box(crop_numbers(0, [(0, index)])[0, 0], header.size, scale=(0.6, 1.0), flip=True)
        if jpeg.choose_scale((box.height, box.width), (out, out)) < scale:
            continue
        there = jpeg.scaled_box(box, scale, (small.shape[1], small.shape[2]))
        assert abs(there.top * scale - box.top) <= scale / 2
        assert abs((there.top + there.height) * scale - (box.top + box.height)) <= scale
        moved = Box(*(scale * number for number in there[:4]), box.flip)
        a, b = (resample(image, part, (out, out)).float() for image, part in ((full, moved), (small, there)))
        differences.append((a - b).abs().mean().item())
    assert max(differences) < 2


@pytest.mark.parametrize("scale", [1, *jpeg.SCALES])
def test_pillow_gives_the_same_pixels(scale):
    contents = [encoded(photograph(203, 161)), encoded(photograph(203, 161, mode="L"))]
    exif = Image.Exif()
    exif[0x0112] = 6
    contents.append(encoded(photograph(203, 161), exif=exif))
    headers = [jpeg.read_header(content, channels=3) for content in contents]
    for content, header in zip(contents, headers):
        with Image.open(io.BytesIO(content)) as picture:
            picture.draft(None, (picture.width // scale, picture.height // scale))
            wanted = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        if header.orientation == 6:
            wanted = wanted.rot90(-1, (1, 2))
        assert torch.equal(jpeg.decode(content, header, channels=3, scale=scale), wanted)


def test_scale_is_the_smallest_decoding_that_still_has_the_resolution():
    assert jpeg.choose_scale((224, 224), (224, 224)) == 1
    assert jpeg.choose_scale((447, 2000), (224, 224)) == 1
    assert jpeg.choose_scale((448, 448), (224, 224)) == 2
    assert jpeg.choose_scale((1000, 900), (224, 224)) == 4
    assert jpeg.choose_scale((5000, 4000), (224, 224)) == 8


def test_large_photographs_are_decoded_small_and_small_ones_whole(tmp_path, monkeypatch):
    scales = []
    decode = jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *a, scale, **k: (scales.append(scale), decode(*a, scale=scale, **k))[1])
    source = files(tmp_path, [photograph(600, 400), photograph(60, 50)])
    crops = training(source, crop_scale=(0.9, 1.0))
    crops[0, 0], crops[0, 1]
    assert scales == [8, 1]
    scales.clear()
    training(source, crop_scale=(0.9, 1.0), jpeg_scaling=False)[0, 0]
    training(source, crop_scale=(1.0, 1.0))[0, 0]
    assert scales == [1, 8]


# Damage


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_off_jpeg_is_refused_wherever_the_crop_lies(tmp_path, progressive):
    whole = encoded(photograph(600, 400), progressive=progressive)
    for share in (0.3, 0.6, 0.95, 0.999):
        source = files(tmp_path, [whole[: int(len(whole) * share)], photograph(64, 64)])
        for epoch in range(5):
            for size in ((32, 32), (200, 200)):
                assert training(source, size=size)[epoch, 0].damaged[0].name.endswith("0.jpg"), share


def test_what_libjpeg_warns_of_is_left_to_the_decoder():
    """Junk that Pillow reads over: the quick path steps aside, and the decoder's word counts."""
    content = bytearray(encoded(photograph(200, 160)))
    content[len(content) // 2 : len(content) // 2] = b"\xff\xd9"
    header = jpeg.read_header(bytes(content), channels=3)
    assert header is None or jpeg.decode(bytes(content), header, channels=3, scale=1) is None


def test_only_plain_jpegs_are_taken():
    assert jpeg.read_header(encoded(photograph(20, 20, mode="CMYK")), channels=3) is None
    assert jpeg.read_header(encoded(photograph(20, 20)), channels=1) is None  # luminance is the decoder's rule
    assert jpeg.read_header(b"\x89PNG", channels=3) is None
    assert jpeg.read_header(b"", channels=3) is None
    file = io.BytesIO()
    photograph(20, 20).save(file, "PNG")
    assert jpeg.read_header(file.getvalue(), channels=3) is None
    grey = jpeg.read_header(encoded(photograph(20, 12, mode="L")), channels=1)
    assert grey == ((12, 20), 1)


def test_jpeg_of_many_scans_is_left_to_the_decoder():
    content = encoded(photograph(64, 64), progressive=True)
    start = content.index(b"\xff\xda")
    assert jpeg.read_header(content[:start] + content[start:] * 8, channels=3) is None


def test_no_data_in_jpegs_is_still_found(tmp_path):
    picture = Image.new("RGB", (64, 64))
    picture.paste(photograph(64, 32), (0, 0))
    source = files(tmp_path, [picture], quality=100, subsampling=0)
    source.decoder = Decoder(no_data=0)
    assert training(source, crop_scale=(0.99, 1.0))[0, 0].valid is not None


# Views


def test_views_of_an_image_come_from_one_decoding(tmp_path, monkeypatch):
    source = files(tmp_path, [photograph(64, 50, seed=i) for i in range(3)])
    once = [training(source)[1, index].image for index in (2, 0)]
    calls = []
    decode = jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
    crops = training(source, views=3).batch([(1, 2), (1, 0)]).images
    assert len(calls) == 2
    assert len(crops) == 6
    assert torch.equal(crops[0], once[0])
    assert torch.equal(crops[3], once[1])
    assert len({crop.numpy().tobytes() for crop in crops}) == 6


def test_damage_is_told_once_for_all_views(tmp_path):
    source = files(tmp_path, [b"\xff\xd8\xff nonsense", photograph(64, 50)])
    batch = training(source, views=3).batch([(0, 0), (1, 1)])
    assert len(batch.images) == 6
    assert len(batch.damaged) == 1


# On the device, in batches


def pairs(dtype=torch.uint8, channels=3):
    generator = torch.Generator().manual_seed(0)
    sizes = [(50, 64), (97, 131), (20, 16), (33, 200), (64, 64)] * 9
    images = [torch.randint(256, (channels, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    if dtype == torch.float32:
        images = [image.float() * 3 - 200 for image in images]
    numbers = crop_numbers(0, [(0, index) for index in range(len(images))])[:, 0]
    boxes = [draw_box(row, image.shape[1:], scale=(0.2, 1.0), flip=True) for row, image in zip(numbers, images)]
    return images, boxes


def test_batched_crops_of_floats_are_torchvisions():
    images, boxes = pairs(torch.float32, channels=5)
    made = crop_batch(images, boxes, (24, 32))
    for crop, image, box in zip(made, images, boxes):
        torch.testing.assert_close(crop, resample(image, box, (24, 32)), atol=2e-3, rtol=1e-5)


def test_batched_crops_of_bytes_are_torchvisions_within_three_levels():
    """White noise is the worst case for rounding in between: there only its float kernel is compared."""
    images, boxes = pairs()
    made = crop_batch(images, boxes, (24, 32))
    assert made.dtype == torch.uint8
    exact = torch.stack([resample(i.float(), box, (24, 32)).round().clamp(0, 255) for i, box in zip(images, boxes)])
    assert (made.float() - exact).abs().max() <= 1  # a tie falls either way
    photographs = [torch.from_numpy(np.array(photograph(90 + i, 70))).permute(2, 0, 1) for i in range(len(images))]
    where = [Box(3, 2, 60 - i % 9, 70 - i % 7, bool(i % 2)) for i in range(len(images))]
    theirs = torch.stack([resample(image, box, (32, 32)) for image, box in zip(photographs, where)])
    difference = (crop_batch(photographs, where, (32, 32)).int() - theirs.int()).abs()
    assert difference.max() <= 3
    assert difference.float().mean() < 0.25


def test_batched_crops_of_both_kinds_are_floats():
    images, boxes = pairs()
    mixed = [image.float() if number % 2 else image for number, image in enumerate(images)]
    made = crop_batch(mixed, boxes, (8, 8))
    assert made.dtype == torch.float32
    assert torch.equal(made[0::2].to(torch.uint8), crop_batch(images, boxes, (8, 8))[0::2])


def test_batched_masks_are_cut_alike():
    images, boxes = pairs()
    masks = [image[0] > 128 for image in images]
    made = crop_masks(masks, boxes, (24, 32))
    for crop, mask, box in zip(made, masks, boxes):
        assert torch.equal(crop, resample_mask(mask, box, (24, 32)))


def test_batched_cover_is_cover():
    images, _ = pairs(torch.float32)
    boxes = [Box(0, 0, *image.shape[1:], False) for image in images]
    made = crop_batch(images, boxes, (24, 33), cover=True)
    masks = crop_masks([image[0] > 100 for image in images], boxes, (24, 33), cover=True)
    cover = Cover((24, 33))
    for crop, mask, image in zip(made, masks, images):
        torch.testing.assert_close(crop, cover(image), atol=5e-3, rtol=1e-5)
        assert torch.equal(mask, cover((image[0] > 100)[None])[0])


def test_source_of_which_nothing_can_be_read_says_so(tmp_path):
    source = files(tmp_path, [b"\xff\xd8\xff"] * 3)
    with pytest.raises(Exception, match="3 images in a row"):
        training(source)[0, 0]
    with pytest.raises(DecodeError):
        source.read(0)
