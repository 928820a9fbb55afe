"""Random augmentations: what they may do to an image, their draws, and how recipes name them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from spikeloom.data import TRANSFORMS, augmentation, create_dataset
from spikeloom.data.transforms import (
    RandAugment,
    RandomCrop,
    RandomErase,
    RandomHorizontalFlip,
    RandomTemporalDelete,
)
from spikeloom.errors import UsageError
from spikeloom.train.build import seed_everything

OPTIONS: dict[str, dict[str, Any]] = {"random_crop": {"padding": 4}, "random_horizontal_flip": {}}
# One image after another; timm's are drawn from `random` and numpy as well.
SINGLE: dict[str, dict[str, Any]] = {
    "color_jitter": {"brightness": 0.5, "contrast": 0.5, "mean": (0.5,) * 3, "std": (0.25,) * 3},
    "random_affine": {"degrees": 20.0, "translate": 0.2},
    "trivial_augment": {"mean": (0.5,) * 3, "std": (0.25,) * 3},
    "rand_augment": {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.15)},
    "random_erase": {"p": 0.5},
    "event_augment": {},
}
FILL = torch.tensor([-2.0, -1.5, -1.0])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(128, 3, 32, 32)


@pytest.fixture(params=list(OPTIONS))
def transform(request: pytest.FixtureRequest) -> Any:
    return TRANSFORMS[request.param](**OPTIONS[request.param])


def test_keeps_shape_type_and_input(transform: Any):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in [(5, 3, 9, 4), (1, 3, 1, 1), (0, 3, 4, 4)]:
            x = torch.randn(shape, dtype=dtype)
            before = x.clone()
            y = transform(x, FILL)
            assert y.shape == x.shape
            assert y.dtype == dtype
            assert torch.equal(x, before)


def test_draws_come_from_the_global_generator(transform: Any, x: Tensor):
    torch.manual_seed(3)
    first, state = transform(x, FILL), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(transform(x, FILL), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(transform(x, FILL), first)


def test_takes_under_3_ms(transform: Any, x: Tensor):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        transform(x, FILL)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < 0.003


def test_crop_moves_each_image_over_black(x: Tensor):
    p, height, width = 2, 7, 5
    x = x[:, :, :height, :width]
    y = RandomCrop(padding=p)(x, FILL)
    seen = set()
    for image, moved in zip(x, y, strict=True):
        padded = FILL.view(3, 1, 1).repeat(1, height + 2 * p, width + 2 * p)
        padded[:, p:-p, p:-p] = image
        places = [
            (i, j)
            for i in range(2 * p + 1)
            for j in range(2 * p + 1)
            if torch.equal(padded[:, i : i + height, j : j + width], moved)
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 20  # of 25 places, over 128 images


def test_crop_equals_torchvision_before_normalisation():
    from torchvision.transforms.functional import normalize, pad

    data = create_dataset("digits", subset=64)
    x, _ = data.batch(range(64))
    torch.manual_seed(1)
    ours = RandomCrop(padding=3)(x, data.fill)
    torch.manual_seed(1)
    top, left = torch.randint(7, (2, 64))
    raw = pad(data.images.float() / 255, [3, 3, 3, 3])
    for i in range(64):
        cut = raw[i, :, top[i] : top[i] + 8, left[i] : left[i] + 8]
        assert torch.equal(ours[i], normalize(cut, list(data.mean), list(data.std)))


def test_crop_larger_than_the_image():
    x = torch.ones(1000, 3, 2, 2)
    y = RandomCrop(padding=5)(x, FILL)
    assert ((y == 1) | (y == FILL.view(1, 3, 1, 1))).all()
    assert (y == FILL.view(1, 3, 1, 1)).all((1, 2, 3)).any()  # some moved out of sight


def test_flip_mirrors_some(x: Tensor):
    y = RandomHorizontalFlip()(x, FILL)
    flipped = [torch.equal(a.flip(-1), b) for a, b in zip(x, y, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 40 < sum(flipped) < 88  # 4 standard deviations from 64
    assert torch.equal(RandomHorizontalFlip(p=0)(x, FILL), x)
    assert torch.equal(RandomHorizontalFlip(p=1)(x, FILL), x.flip(-1))


def test_crop_refuses_other_shapes():
    crop = RandomCrop(padding=1)
    with pytest.raises(ValueError, match=r"fill \[C\]"):
        crop(torch.zeros(3, 4, 4), FILL)
    with pytest.raises(ValueError, match=r"fill \[C\]"):
        crop(torch.zeros(2, 1, 4, 4), FILL)


def test_pipeline_applies_in_order(x: Tensor):
    pipeline = augmentation([{"name": "random_crop", "padding": 4}, {"name": "random_horizontal_flip", "p": 0.25}])
    torch.manual_seed(5)
    y = pipeline(x, FILL)
    torch.manual_seed(5)
    assert torch.equal(y, RandomHorizontalFlip(p=0.25)(RandomCrop(padding=4)(x, FILL), FILL))
    assert augmentation([])(x, FILL) is x


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "random_corp", "padding": 4}, "unknown transform 'random_corp'; did you mean random_crop"),
        (
            {"name": "random_crop", "paddign": 4},
            "transform 'random_crop' has no option 'paddign'; did you mean padding?",
        ),
        ({"name": "random_crop"}, "transform 'random_crop' needs the option 'padding'"),
        ({"name": "random_crop", "padding": 0}, "padding of random_crop must be an integer of at least 1, got 0"),
        ({"name": "random_crop", "padding": 1.5}, "got 1.5"),
        ({"name": "random_horizontal_flip", "p": 1.5}, "from 0 to 1, got 1.5"),
        ({"name": "random_horizontal_flip", "p": float("nan")}, "got nan"),
        ({"name": "random_horizontal_flip", "p": "half"}, "got 'half'"),
        ({"name": "random_horizontal_flip", "p": True}, "got True"),
        ({"padding": 4}, "transform 0 must be a mapping"),
        ({"name": 3}, "transform 0 must be a mapping"),
        ("random_crop", "got 'random_crop'"),
    ],
)
def test_wrong_recipes(spec: Any, says: str):
    with pytest.raises(UsageError) as caught:
        augmentation([spec])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- image by image ---------------------------------------------------------------------------------------------------


def test_every_transform_is_tested_here():
    assert set(TRANSFORMS) == {*OPTIONS, *SINGLE, "alternating_flip", "random_temporal_delete"}


@pytest.mark.parametrize("name", SINGLE)
def test_transforms_of_single_images(name: str):
    transform = TRANSFORMS[name](**SINGLE[name])
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(16, 3, 9, 12), (0, 3, 4, 4)]:
            x = torch.randn(shape, dtype=dtype).clamp(-1, 1)
            before, outs = x.clone(), []
            for _ in range(2):
                seed_everything(3)
                outs.append(transform(x, FILL))
            assert outs[0].shape == x.shape
            assert outs[0].dtype == dtype
            assert torch.equal(x, before)
            assert torch.equal(*outs)
            assert len(x) == 0 or not torch.equal(outs[0], x)


def test_rand_augment_without_magnitude_returns_the_pixels():
    # Of the operations at magnitude 0 only those that ignore the magnitude change an image.
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.15)
    pixels = torch.randint(0, 256, (8, 3, 6, 6))
    x = (pixels / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    y = RandAugment(config="rand-m0-n1-p0.0", mean=mean, std=std)(x, FILL)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    grey = RandAugment(config="rand-m9-n2", mean=(0.3,), std=(0.4,))(torch.rand(4, 1, 8, 8), FILL[:1])
    assert grey.shape == (4, 1, 8, 8)


def test_rand_augment_is_told_the_normalisation():
    spec = [{"name": "rand_augment", "config": "rand-m9-n1"}]
    [transform] = augmentation(spec, (0.5,), (0.25,)).transforms  # pyright: ignore
    assert (transform.mean, transform.std) == ((0.5,), (0.25,))
    auto = RandAugment(config="original", mean=(0.5,) * 3, std=(0.25,) * 3)
    x = torch.randn(8, 3, 16, 16)
    assert auto(x, FILL).shape == x.shape
    assert not torch.equal(auto(x, FILL), auto(x, FILL))
    with pytest.raises(UsageError, match="config of rand_augment cannot be 'rnd-m9'"):
        augmentation([{"name": "rand_augment", "config": "rnd-m9"}], (0.5,), (0.25,))


def test_erased_areas():
    x = torch.ones(400, 1, 20, 20)
    y = RandomErase(p=0.25, mode="const")(x, FILL[:1])
    areas = (y == 0).float().mean((1, 2, 3))
    assert 0.15 < (areas > 0).float().mean() < 0.35
    assert areas[areas > 0].min() > 0.015
    assert areas.max() < 0.4


def test_event_clips_get_one_operation_each():
    torch.manual_seed(4)
    clips = torch.zeros(300, 3, 2, 24, 20)
    clips[:, :, :, 8:16, 6:14] = torch.arange(1.0, 7.0).view(3, 2, 1, 1)  # another count in every frame
    out = augmentation([{"name": "event_augment"}])(clips, torch.zeros(2))
    assert out.shape == clips.shape
    frames = out / torch.arange(1.0, 7.0).view(3, 2, 1, 1)
    torch.testing.assert_close(frames, frames[:, :1, :1].expand_as(frames))  # the same for all frames and polarities
    masks = frames[:, 0, 0]
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    square = clips[0, 0, 0] > 0
    shifted = {(dy, dx) for dy in range(-5, 6) for dx in range(-5, 6) if dx == 0 or dy == 0}
    moves = {tuple(m) for m in shifted for mask in masks if torch.equal(mask > 0, square.roll(m, (0, 1)))}
    assert len(moves) > 12
    assert {dx for _, dx in moves} == {dy for dy, _ in moves} == set(range(-5, 6))
    cut = [mask for mask in masks if mask.sum() < 64 and torch.equal(mask.bool() & square, mask.bool())]
    assert cut, "a hole"
    assert any(mask.sum() not in (64.0, *(m.sum() for m in cut)) for mask in masks), "sheared or rotated"


def test_reflected_crops_are_torchvisions():
    """Every window of the padded image, by torchvision's reflect padding."""
    from torchvision.transforms.functional import pad

    x = torch.randn(40, 3, 6, 7)
    padded = pad(x, [2, 2, 2, 2], padding_mode="reflect")
    y = augmentation([{"name": "random_crop", "padding": 2, "mode": "reflect"}])(x, FILL)
    seen = set()
    for image, wide in zip(y, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, wide[:, i : i + 6, j : j + 7])]
        assert places
        seen |= set(places)
    assert len(seen) > 12
    with pytest.raises(UsageError, match="padding of random_crop must be below 6 to reflect, got 6"):
        augmentation([{"name": "random_crop", "padding": 6, "mode": "reflect"}])(x, FILL)


def test_torchvisions_transforms_are_its_own():
    """The same draws through torchvision's classes on the bytes of each image."""
    from torchvision import transforms as peer

    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.15)
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    x = (pixels / 255 - m) / s
    for spec, other in (
        ({"name": "trivial_augment"}, peer.TrivialAugmentWide()),
        ({"name": "color_jitter", "brightness": 0.4, "hue": 0.1}, peer.ColorJitter(0.4, 0, 0, 0.1)),
    ):
        seed_everything(7)
        ours = augmentation([spec], mean, std)(x, FILL)
        seed_everything(7)
        theirs = torch.stack([other(image) for image in pixels])
        torch.testing.assert_close(ours, (theirs / 255 - m) / s, rtol=0, atol=1e-5)
        assert not torch.allclose(ours, x, atol=1e-3)
    seed_everything(7)
    ours = augmentation([{"name": "random_affine", "degrees": 20.0, "scale": (0.8, 1.1), "shear": 5.0}])(x, FILL)
    seed_everything(7)
    affine = peer.RandomAffine(
        20, None, (0.8, 1.1), 5, interpolation=peer.InterpolationMode.BILINEAR, fill=FILL.tolist()
    )
    torch.testing.assert_close(ours, torch.stack([affine(image) for image in x]))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "color_jitter", "hue": 0.7}, "color_jitter: "),
        ({"name": "random_affine", "translate": 1.5}, "translate from 0 to 1"),
        ({"name": "random_affine", "scale": (1.0, 0.5)}, "two ascending numbers above 0"),
        ({"name": "trivial_augment"}, "takes images of 1 channels, got (3, 9, 12)"),
    ],
)
def test_wrong_values_of_torchvisions_transforms(spec: dict[str, Any], says: str):
    with pytest.raises(UsageError) as caught:
        augmentation([spec], (0.5,), (0.5,))(torch.zeros(1, 3, 9, 12), FILL)
    assert says in str(caught.value)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 16, 7), (5, 16, 2, 4, 3)])
def test_random_temporal_delete(shape: tuple[int, ...]):
    # Slice t of every clip holds t.
    x = torch.arange(16.0).view(1, 16, *(1,) * (len(shape) - 2)).expand(shape)
    delete = RandomTemporalDelete(T_train=12)
    counts = torch.zeros(16)
    for _ in range(200):
        y = delete(x, torch.empty(0))
        assert y.shape == (5, 12, *shape[2:])
        kept = y.flatten(2)[0, :, 0]
        assert (y == kept.view(1, 12, *(1,) * (len(shape) - 2))).all()  # the same slices of all samples
        assert (kept.diff() > 0).all()  # in order, none twice
        counts[kept.long()] += 1
    assert ((counts > 110) & (counts < 190)).all()  # uniformly: 150 on average, standard deviation 6
    assert torch.equal(RandomTemporalDelete(T_train=16)(x, torch.empty(0)), x)
    assert torch.equal(RandomTemporalDelete(T_train=20)(x, torch.empty(0)), x)


def test_random_temporal_delete_of_images():
    with pytest.raises(UsageError, match="takes sequences"):
        RandomTemporalDelete(T_train=2)(torch.zeros(4, 3, 8, 8), FILL)
    with pytest.raises(UsageError, match="T_train of random_temporal_delete must be an integer of at least 1"):
        augmentation([{"name": "random_temporal_delete", "T_train": 0}])


def test_a_clip_is_moved_as_one():
    clips = torch.randn(6, 1, 3, 8, 8).expand(6, 5, 3, 8, 8)
    pipeline = augmentation([{"name": "random_crop", "padding": 2}, {"name": "random_temporal_delete", "T_train": 3}])
    moved = pipeline(clips, FILL)
    assert moved.shape == (6, 3, 3, 8, 8)
    assert (moved == moved[:, :1]).all()
    assert not torch.equal(moved, clips[:, :3])
    assert (moved[:, :, 2] == -1.0).any()  # new places are black: the fill of each frame's own channel
    assert not (moved[:, :, 0] == -1.0).any()
