"""Corruptions: closed forms, sampling error of the stated noise, and growing damage."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from neural.evaluate import CORRUPTIONS, corrupt, load_cifar10_c
from neural.evaluate.corruption import blur, colour, noise, resample
from nqm.errors import NQMError
from tests.tolerances import SIGMAS

#: Rounding to whole pixel values moves each by at most half of one.
PIXEL = 0.5 / 255
FLOAT32 = 2e-6


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def natural(n: int = 6, size: int = 32, channels: int = 3) -> Tensor:
    """Scenes with a 1/f spectrum, as photographs have, and correlated colours; uint8."""
    f = torch.fft.fftfreq(size)
    frequency = torch.hypot(f[:, None], f[None, :]).clamp_min(1 / size)
    white = torch.randn(n, channels, size, size, generator=rng(7))
    white = white + 2 * white.mean(1, keepdim=True)
    scene = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
    scene = scene / scene.std((1, 2, 3), keepdim=True)
    return ((0.5 + 0.2 * scene).clamp(0, 1) * 255).round().to(torch.uint8)


def photographs() -> Tensor:
    """Real CIFAR-10 test images, where the folder of real data has them."""
    path = Path(os.environ.get("NQM_DATA", "")) / "cifar10_lossless_part_webp.npz"
    if "NQM_DATA" not in os.environ or not path.is_file():
        pytest.skip("NQM_DATA names no folder with cifar10_lossless_part_webp.npz")
    image = pytest.importorskip("PIL.Image")
    mosaic = np.asarray(image.open(io.BytesIO(np.load(path)["webp_test"].tobytes())).convert("RGB"))
    tiles = mosaic[:64].reshape(2, 32, -1, 32, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(tiles.reshape(-1, 3, 32, 32).copy())


def damage(pixels: Tensor, name: str) -> list[float]:
    """Mean squared error to the clean images at severities 1 to 5."""
    errors = []
    for severity in range(1, 6):
        try:
            got = corrupt(pixels, name, severity)
        except ModuleNotFoundError:
            pytest.skip("no Pillow")
        errors.append(float((got.double() - pixels.double()).square().mean()))
    return errors


# --- every corruption ------------------------------------------------------------------------


@pytest.mark.parametrize("images", [natural, photographs], ids=["synthetic", "photographs"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_grows_with_severity(name, images):
    errors = damage(images(), name)
    assert errors[0] > 1, "severity 1 is hardly visible to a network, but it is there"
    assert np.all(np.diff(errors) > 0), errors


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 1, 28, 28), (2, 3, 5, 9), (1, 3, 1, 1)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_type_and_input_are_kept(name, shape):
    pixels = torch.randint(256, shape, generator=rng(1), dtype=torch.uint8)
    before = pixels.clone()
    for severity in (1, 5):
        got = corrupt(pixels, name, severity)
        assert got.shape == shape
        assert got.dtype == torch.uint8
        assert got.is_contiguous()
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(name):
    pixels, state = natural(), torch.get_rng_state()
    first = corrupt(pixels, name, 3, seed=4)
    assert torch.equal(first, corrupt(pixels, name, 3, seed=4))
    random = not torch.equal(first, corrupt(pixels, name, 3, seed=5))
    fixed = {
        "gaussian_blur", "defocus_blur", "brightness", "contrast", "saturate", "pixelate",
        "jpeg_compression",
    }  # fmt: skip
    assert random == (name not in fixed)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strengths_go_one_way(name):
    steps = np.diff(CORRUPTIONS[name].strengths)
    assert len(steps) == 4
    assert (steps > 0).all() or (steps < 0).all()


def test_mistakes_are_one_line():
    pixels = natural(1)
    with pytest.raises(NQMError, match="did you mean 'gaussian_noise'"):
        corrupt(pixels, "gausian_noise", 1)
    for severity in (0, 6, 2.5):
        with pytest.raises(NQMError, match="severity"):
            corrupt(pixels, "fog", severity)
    for wrong in (pixels.float(), pixels[0], pixels[:, :2]):
        with pytest.raises(NQMError, match="uint8 pixels"):
            corrupt(wrong, "fog", 1)


# --- noise -----------------------------------------------------------------------------------


def check_variance(got: Tensor, mean: float, variance: float, kurtosis: float = 3.0) -> None:
    """Mean and variance of i.i.d. values within the sampling error of each."""
    n, x = got.numel(), got.double()
    assert abs(float(x.mean()) - mean) < SIGMAS * math.sqrt(variance / n)
    error = variance * math.sqrt((kurtosis - 1) / n)
    assert abs(float((x - mean).square().mean()) - variance) < SIGMAS * error


def test_noise_has_the_stated_variance():
    x = torch.full((4, 3, 64, 64), 0.4)
    check_variance(noise.gaussian_noise(x, 0.07, rng()), 0.4, 0.07**2)
    check_variance(noise.speckle_noise(x, 0.1, rng()), 0.4, (0.4 * 0.1) ** 2)
    # A Poisson count of mean m has kurtosis 3 + 1 / m.
    check_variance(noise.shot_noise(x, 50, rng()), 0.4, 0.4 / 50, 3 + 1 / 20)


def test_unclipped_noise_survives_the_round_trip_to_pixels():
    pixels = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    got = corrupt(pixels, "gaussian_noise", 2).double() / 255
    sd = CORRUPTIONS["gaussian_noise"].strengths[1]
    # Rounding adds a uniform error of variance 1 / (12 * 255^2).
    check_variance(got, 128 / 255, sd**2 + 1 / (12 * 255**2))


def test_shot_noise_leaves_black_alone():
    x = torch.zeros(1, 3, 8, 8)
    assert torch.equal(noise.shot_noise(x, 50, rng()), x)


def test_impulses_are_black_or_white_at_even_odds():
    x, share = torch.full((4, 3, 64, 64), 0.4), 0.08
    got, n = noise.impulse_noise(x, share, rng()), 4 * 3 * 64 * 64
    for value, expected in ((0.0, share / 2), (1.0, share / 2), (x[0, 0, 0, 0], 1 - share)):
        found = float((got == value).double().mean())
        assert abs(found - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / n)
    assert torch.isin(got, torch.tensor([0.0, 0.4, 1.0])).all()


# --- blur ------------------------------------------------------------------------------------

BLURS = (
    (blur.gaussian_blur, 1.1),
    (blur.defocus_blur, 1.9),
    (blur.motion_blur, 6.0),
)


@pytest.mark.parametrize(("apply", "strength"), BLURS)
def test_blur_keeps_constants_and_light(apply, strength):
    flat = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(apply(flat, strength, rng()), flat, rtol=FLOAT32, atol=FLOAT32)
    # A spot in the interior is spread, not lost, and its centre of mass stays.
    spot = torch.zeros(2, 1, 31, 31)
    spot[:, :, 15, 15] = 1
    got = apply(spot, strength, rng())
    assert got.min() >= 0
    torch.testing.assert_close(got.sum((1, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)
    offset = torch.arange(31.0) - 15
    assert float((got.sum(2) @ offset).abs().max()) < 1e-4
    assert float((got.sum(3) @ offset).abs().max()) < 1e-4
    assert got.max() < 0.5


def test_gaussian_blur_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = natural(2).float() / 255
    expected = ndimage.gaussian_filter(
        x.double().numpy(), sigma=(0, 0, 0.75, 0.75), mode="nearest", radius=3
    )
    got = blur.gaussian_blur(x, 0.75, rng())
    np.testing.assert_allclose(got, expected, atol=FLOAT32)


def test_motion_is_along_a_line_and_differs_by_image():
    spot = torch.zeros(20, 1, 31, 31)
    spot[:, :, 15, 15] = 1
    got = blur.motion_blur(spot, 8.0, rng())[:, 0]
    offset = torch.arange(31.0) - 15
    yy = (got.sum(2) * offset**2).sum(1)
    xx = (got.sum(1) * offset**2).sum(1)
    xy = torch.einsum("nyx,y,x->n", got, offset, offset)
    half = torch.hypot((xx - yy) / 2, xy)
    long, short = (xx + yy) / 2 + half, (xx + yy) / 2 - half
    # A segment of length 8 has variance 8^2 / 12 along it; across, a pixel's width is left.
    assert ((long > 4.5) & (long < 7)).all()
    assert (short < 0.35).all()
    angle = torch.atan2(xy, (xx - yy) / 2)
    assert len(angle.round(decimals=3).unique()) == 20


def test_each_image_meets_its_own_kernel():
    x = natural(3).float() / 255
    kernels = torch.rand(3, 5, 5, generator=rng(2))
    each = torch.cat([blur.convolve(x[i : i + 1], kernels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(blur.convolve(x, kernels), each, rtol=FLOAT32, atol=FLOAT32)


# --- colour ----------------------------------------------------------------------------------


def test_brightness_and_contrast_in_closed_form():
    pixels = natural()
    x = pixels.double() / 255
    shift = CORRUPTIONS["brightness"].strengths[2]
    got = corrupt(pixels, "brightness", 3).double() / 255
    torch.testing.assert_close(got, (x + shift).clamp(0, 1), rtol=0, atol=PIXEL + FLOAT32)
    factor = CORRUPTIONS["contrast"].strengths[2]
    got = corrupt(pixels, "contrast", 3).double() / 255
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(got, mean + factor * (x - mean), rtol=0, atol=PIXEL + FLOAT32)


def test_saturation_keeps_luma_and_spreads_colours():
    x = natural().double() / 255
    got = colour.saturate(x.float(), 2.5, rng()).double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(
        torch.einsum("nchw,c->nhw", got, luma), torch.einsum("nchw,c->nhw", x, luma),
        rtol=0, atol=FLOAT32,
    )  # fmt: skip
    torch.testing.assert_close(got[:, 0] - got[:, 2], 2.5 * (x[:, 0] - x[:, 2]), rtol=0, atol=5e-6)
    grey = natural(channels=1).float()
    assert torch.equal(colour.saturate(grey, 2.5, rng()), grey)


def test_fog_mixes_in_one_shade():
    x = natural().float() / 255
    clouds = colour.plasma(6, 32, 32, rng())
    assert clouds.shape == (6, 1, 32, 32)
    assert torch.equal(clouds.amin((1, 2, 3)), torch.zeros(6))
    torch.testing.assert_close(clouds.amax((1, 2, 3)), torch.ones(6))
    # Distance to the fog's own shade shrinks by e^-depth where it is thickest, by nothing where
    # there is none.
    left = (colour.fog(x, 1.3, rng()) - colour.AIRLIGHT) / (x - colour.AIRLIGHT)
    expected = torch.exp(-1.3 * clouds).expand_as(left)
    far = (x - colour.AIRLIGHT).abs() > 0.05
    torch.testing.assert_close(left[far], expected[far], rtol=1e-4, atol=1e-4)
    # Clouds, not noise: neighbours are alike.
    step = (clouds.diff(dim=-1)).square().mean()
    assert float(step) < 0.1 * 2 * float(clouds.var())


# --- resampling ------------------------------------------------------------------------------


def test_pixelate_is_a_projection_onto_blocks():
    x = natural().float() / 255
    for scale in (0.9, 0.65, 0.5):
        got = resample.pixelate(x, scale, rng())
        torch.testing.assert_close(resample.pixelate(got, scale, rng()), got, rtol=0, atol=FLOAT32)
        torch.testing.assert_close(got.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=FLOAT32)
        rows = 1 + int((got.diff(dim=2).abs() > FLOAT32).any(3).any(1).any(0).sum())
        assert rows == round(32 * scale)
    half = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(resample.pixelate(x, 0.5, rng()), half, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    image = pytest.importorskip("PIL.Image")
    pixels = natural(2, channels=channels)
    got = corrupt(pixels, "jpeg_compression", 2)
    for original, found in zip(pixels, got, strict=True):
        buffer = io.BytesIO()
        array = original.movedim(0, -1).squeeze(-1).numpy()
        quality = int(CORRUPTIONS["jpeg_compression"].strengths[1])
        image.fromarray(array).save(buffer, "JPEG", quality=quality)
        expected = np.asarray(image.open(buffer))
        np.testing.assert_array_equal(found.movedim(0, -1).squeeze(-1).numpy(), expected)


def test_elastic_moves_a_ramp_by_the_stated_distance():
    # On a ramp along either axis the change is the displacement along it, away from the border.
    n, shift = 100, 0.7
    ramp = (torch.arange(32.0) / 32).expand(n, 1, 32, 32)
    for clean in (ramp, ramp.transpose(2, 3)):
        moved = 32 * (resample.elastic_transform(clean, shift, rng()) - clean)
        inner = moved[:, 0, 4:-4, 4:-4].double()
        # Images are independent; the pixels of one are not.
        power = inner.square().mean((1, 2))
        assert abs(float(power.mean()) - shift**2) < SIGMAS * float(power.std()) / math.sqrt(n)
        # Smooth: behind a Gaussian filter of width s neighbours correlate as exp(-1 / (4 s^2)).
        rough = inner.diff(dim=-1).square().mean((1, 2)) / 2
        expected = shift**2 * (1 - math.exp(-1 / (4 * resample.STIFFNESS**2)))
        assert abs(float(rough.mean()) - expected) < SIGMAS * float(rough.std()) / math.sqrt(n)
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(resample.elastic_transform(flat, 2.0, rng()), flat)
    x = natural().float() / 255
    still = resample.elastic_transform(x, 0.0, rng())
    torch.testing.assert_close(still, x, rtol=0, atol=1e-5)


# --- the published files ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the published form with 3 images instead of 10,000."""
    images = np.random.default_rng(0).integers(256, size=(15, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "gaussian_noise.npy", images[::-1])
    np.save(tmp_path / "labels.npy", np.tile([7, 0, 9], 5).astype(np.uint8))
    return tmp_path


def test_cifar10_c_files(folder):
    data = load_cifar10_c(folder)
    assert data.names == ("fog", "gaussian_noise")
    stored = np.load(folder / "fog.npy")
    for severity in (1, 5):
        pixels, labels = data.subset("fog", severity)
        assert pixels.shape == (3, 3, 32, 32)
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [7, 0, 9]
        assert labels.dtype == torch.int64
        expected = stored[3 * (severity - 1) : 3 * severity].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(pixels, expected)
    pixels.zero_()  # a copy: the file stays
    np.testing.assert_array_equal(np.load(folder / "fog.npy"), stored)


def test_cifar10_c_mistakes(folder, tmp_path):
    with pytest.raises(NQMError, match=r"unpack CIFAR-10-C\.tar"):
        load_cifar10_c(tmp_path / "nowhere")
    data = load_cifar10_c(folder)
    with pytest.raises(NQMError, match="did you mean 'fog'"):
        data.subset("frog", 1)
    with pytest.raises(NQMError, match=r"1\.\.5; got 6"):
        data.subset("fog", 6)
    np.save(folder / "fog.npy", np.zeros((14, 32, 32, 3), np.uint8))
    with pytest.raises(NQMError, match=r"expected uint8 \(5 N, 32, 32, 3\)"):
        data.subset("fog", 1)
    (folder / "fog.npy").write_bytes(b"not an array")
    with pytest.raises(NQMError, match=r"fog\.npy: not a readable"):
        data.subset("fog", 1)
