"""Metrics against other ways to compute them, and `eval.py recon` as a user runs it."""

import functools
import json
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import common
import data
import eval as evaluation
from eval import Config, Features, FeatureSums, Gaussian, frechet_distance

SIZE = 32
CPU = common.Launch(torch.device("cpu"), 0, 1, torch.float32)
PIXELS = Features("pixels", 12, lambda x: x[:, :, :2, :2].flatten(1).float())  # of uint8 (B, 3, H, W)


def write_pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Pictures of the nano world, a little larger than the autoencoder takes."""
    source = data.open_source("nano", 40, seed=5)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(source[first + i]["image"]).save(folder / f"{i:02d}.png")
    return folder


def recon(world, parts, out: Path, *flags, processes=1, code=0) -> dict[str, dict] | str:
    """The results by metric; of a run that is meant to fail what it printed."""
    run = world(processes, "eval.py", "recon", "--autoencoder", parts / "rae", "--out", out, *flags)
    printed = run.wait(code)
    return printed if code else {r["metric"]: r for r in json.loads(out.read_text())}


# -----------------------------------------------------------------------------------------------------------
# Frechet distance


def random_gaussian(seed: int, width: int = 8) -> Gaussian:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(width, 3 * width))
    return Gaussian(rng.normal(size=width), factor @ factor.T / (3 * width))


def test_frechet_distance_of_gaussians_that_have_a_closed_form():
    one = random_gaussian(0)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
    shift = np.arange(8.0)
    moved = one._replace(mean=one.mean + shift)
    assert frechet_distance(one, moved) == pytest.approx((shift**2).sum())
    a, b = np.random.default_rng(1).uniform(0.1, 4, (2, 8))
    flat = [Gaussian(np.zeros(8), np.diag(variance)) for variance in (a, b)]
    assert frechet_distance(*flat) == pytest.approx(((a**0.5 - b**0.5) ** 2).sum())
    point = Gaussian(np.zeros(8), np.zeros((8, 8)))
    assert frechet_distance(one._replace(mean=point.mean), point) == pytest.approx(np.trace(one.covariance))


def test_frechet_distance_is_that_of_the_general_matrix_root():
    for seed in range(5):
        one, other = random_gaussian(seed, 24), random_gaussian(seed + 50, 24)
        root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
        traces = np.trace(one.covariance + other.covariance - 2 * root)
        expected = np.square(one.mean - other.mean).sum() + traces
        assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_sums_give_the_mean_and_covariance_whatever_the_batch(batch):
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    sums = FeatureSums(PIXELS)
    for part in images.split(batch):
        sums.add(part)
    features = PIXELS.extract(images).double().numpy()
    gaussian = sums.gaussian()
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
    assert gaussian.count == 50


def test_one_picture_has_no_covariance():
    sums = FeatureSums(PIXELS)
    sums.add(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 2 pictures, but only 1"):
        sums.gaussian()


# -----------------------------------------------------------------------------------------------------------
# networks


def test_features_of_the_encoder_are_its_mean_token():
    features = evaluation.load_features("encoder", "", CPU)
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    x = features.extract(images)
    assert x.shape == (5, features.width) == (5, 128)
    torch.testing.assert_close(features.extract(images[3:]), x[3:])


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file as torch-fidelity downloads it, of untrained weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_of_inception(inception_file):
    features = evaluation.load_features("inception", str(inception_file), CPU)
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    sums = FeatureSums(features)
    sums.add(images)
    sums.add(images[:1])
    gaussian = sums.gaussian()
    assert gaussian.mean.shape == (2048,) and gaussian.covariance.any() and gaussian.count == 4
    x = features.extract(images)
    torch.testing.assert_close(features.extract(images[2:]), x[2:], rtol=1e-3, atol=1e-5)


def test_inception_files_that_are_none(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"code": functools.partial(print, "hello")}, tmp_path / "code.pth")
    for name in ("junk", "other", "code", "missing"):
        with pytest.raises(ValueError, match="cannot load the weights of Inception") as caught:
            evaluation.load_features("inception", str(tmp_path / f"{name}.pth"), CPU)
        assert "\n" not in str(caught.value)


def test_lpips_takes_unit_pictures_and_downloads_its_backbone(monkeypatch):
    untrained = functools.partial(lpips.LPIPS, pnet_rand=True)
    monkeypatch.setattr(lpips, "LPIPS", untrained)
    metric, one = evaluation.load_lpips("alex", CPU), torch.rand(3, 3, 64, 64)
    other = one.clone()
    other[2] = 1 - other[2]
    with torch.no_grad():
        values = metric(one, other)
    assert values.shape == (3,) and values[:2].eq(0).all() and values[2] > 0

    def offline(**kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(ValueError, match="cannot load the weights of LPIPS: no route to host$"):
        evaluation.load_lpips("vgg", CPU)


def test_ssim_and_psnr_do_not_depend_on_the_batch():
    one, other = torch.rand(2, 5, 3, SIZE, SIZE)
    for metric in (evaluation.psnr, evaluation.ssim):
        whole = metric(one, other)
        alone = [metric(one[i : i + 1], other[i : i + 1]) for i in range(5)]
        assert whole.shape == (5,)
        torch.testing.assert_close(torch.cat(alone), whole)


# -----------------------------------------------------------------------------------------------------------
# references


def test_reference_files(tmp_path):
    gaussian, config = random_gaussian(3, 12), Config(batch=3)
    path = tmp_path / "reference.npz"

    def load(file: Path = path, features: Features = PIXELS) -> Gaussian:
        return evaluation.load_reference(str(file), features, SIZE, config, CPU)

    evaluation.save_gaussian(str(path), gaussian._replace(count=9), "pixels")
    loaded = load()
    assert (loaded.mean == gaussian.mean).all() and (loaded.covariance == gaussian.covariance).all()
    assert np.load(path)["n"] == 9

    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    sums = FeatureSums(PIXELS)
    sums.add(images)
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(load().covariance, sums.gaussian().covariance, rtol=1e-9)

    inception = PIXELS._replace(name="inception")
    np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance, arr_0=np.zeros(3))  # as ADM's
    assert (load(features=inception).mean == gaussian.mean).all()
    with pytest.raises(ValueError, match="of inception features, not of pixels"):
        load()

    cases = {
        "cannot read": {"sigma": gaussian.covariance},
        "cannot read .*sigma": {"mu": gaussian.mean},
        "mu .12,. and sigma .12, 11.": {"mu": gaussian.mean, "sigma": gaussian.covariance[:, :11]},
        "not finite": {"mu": gaussian.mean * np.nan, "sigma": gaussian.covariance},
        "float64 .2, 4, 4, 3.": {"arr_0": np.zeros((2, 4, 4, 3))},
        "uint8 .2, 3, 4, 4.": {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
        "Object arrays|pickle": {"mu": np.array([print]), "sigma": gaussian.covariance},
    }
    for message, arrays in cases.items():
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message) as caught:
            load(features=inception)
        assert "\n" not in str(caught.value)
    for content in (b"", b"junk", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read"):
            load()
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path / "missing.npz")


# -----------------------------------------------------------------------------------------------------------
# recon


def test_processes_and_batches_do_not_change_the_result(world, parts, tmp_path):
    write_pictures(tmp_path / "val", 11)
    (tmp_path / "val/03.png").write_bytes(b"junk")
    flags = ["--data", f"val={tmp_path}/val", "--npz", tmp_path / "pictures.npz"]
    outcomes = []
    for processes, batch, workers in ((1, 64, 0), (2, 3, 0), (1, 2, 2)):
        more = ["--batch", batch, "--workers", workers]
        results = recon(world, parts, tmp_path / "r.json", *flags, *more, processes=processes)
        strip = np.array(Image.open(tmp_path / "r.png"))
        outcomes.append((results, np.load(tmp_path / "pictures.npz")["arr_0"], strip))
    results, pictures, strip = outcomes[0]
    assert set(results) == {"psnr/val", "ssim/val", "rfid-encoder/val"}
    assert {result["n"] for result in results.values()} == {10}
    assert pictures.shape == (10, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    assert strip.shape == (2 * 128 + 2, 8 * 128 + 7 * 2, 3)
    original = data.centre_crop(Image.open(tmp_path / "val/04.png"), SIZE)  # the fourth that can be read
    assert (strip[:128:4, 3 * 130 : 3 * 130 + 128 : 4] == original).all()
    assert (strip[130::4, 3 * 130 : 3 * 130 + 128 : 4] == pictures[3]).all()
    for others, other_pictures, other_strip in outcomes[1:]:
        for name, result in results.items():
            assert others[name]["value"] == pytest.approx(result["value"], rel=1e-4, abs=1e-6), name
            assert others[name]["n"] == result["n"]
        assert (np.abs(other_pictures.astype(int) - pictures) <= 1).all()
        assert (np.abs(other_strip.astype(int) - strip) <= 1).all()


def test_references_are_saved_and_used_again(world, parts, tmp_path):
    write_pictures(tmp_path / "val", 6)
    write_pictures(tmp_path / "other", 6, first=6)
    flags, file, out = ["--data", f"{tmp_path}/val"], tmp_path / "reference.npz", tmp_path / "r.json"

    def rfid(*more, processes=1) -> float:
        return recon(world, parts, out, *flags, *more, processes=processes)["rfid-encoder/val"]["value"]

    own = rfid("--save-reference", file, "--npz", tmp_path / "pictures.npz")
    assert own > 0.01
    assert rfid("--reference", file) == pytest.approx(own, rel=1e-9)
    assert rfid("--reference", tmp_path / "val") == pytest.approx(own, rel=1e-6)
    assert rfid("--reference", tmp_path / "pictures.npz") == pytest.approx(0, abs=1e-5)
    assert rfid("--reference", tmp_path / "pictures.npz", processes=2) == pytest.approx(0, abs=1e-5)
    assert rfid("--reference", tmp_path / "other") != pytest.approx(own, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--npz", "a.npz"], "name one in --data"),
        (["--data", "a=nano:text,a=nano:scenes"], "a plain name of its own"),
        (["--data", "a/b=nano:text"], "a plain name of its own"),
        (["--data", "nowhere"], "no data source"),
        (["--features", "inception", "--inception", "README.md"], "cannot load the weights of Inception"),
        (["--data", "nano:text", "--reference", "nowhere.npz"], "cannot read statistics"),
        (["--data", "nano:text", "--reference", "nano:text"], "no end"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, world, parts, tmp_path):
    printed = recon(world, parts, tmp_path / "r.json", *flags, "--limit", 2, code=1)
    assert message in printed.strip().splitlines()[-1] and "Traceback" not in printed


def test_the_table_has_a_column_for_each_data_set():
    names = ("psnr/imagenet", "ssim/imagenet", "psnr/yfcc", "ssim/yfcc", "shapes/model/overall")
    lines = evaluation.table([{"metric": name, "value": i} for i, name in enumerate(names)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "imagenet", "yfcc", "shapes/model"]
    assert cells[2:] == [["psnr", "0.000", "2.000", ""], ["ssim", "1.000", "3.000", ""],
                         ["overall", "", "", "4.000"]]  # fmt: skip
