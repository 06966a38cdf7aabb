"""Metrics against other ways to compute them, and `eval.py recon` and `fid` as a user runs them."""

import functools
import json
import zipfile
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity import metric_fid, metric_isc, metric_prc

import common
import data
import eval as evaluation
from eval import Config, Features, FeatureSums, Gaussian, frechet_distance

SIZE = 32
CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


def pixels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :, :2, :2].flatten(1).float(), x[:, 0, :2, :2].flatten(1).float()


PIXELS = Features("pixels", 12, 4, pixels)  # of uint8 (B, 3, H, W)


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    """Images of the nano world, a little larger than the autoencoder takes."""
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


def write_npz(path: Path, count: int, first: int = 0, side: int = 40, **statistics) -> Path:
    """Images of the nano world as ADM keeps them."""
    source = data.open_source("nano", side, seed=5)
    images = [source[first + i]["image"] for i in range(count)]
    np.savez(path, arr_0=np.stack(images), **statistics)
    return path


def fid_of(samples, reference, *, features: Features = PIXELS, dist_ctx=CPU, **flags) -> dict[str, float]:
    """As `eval.py fid` in this process, with any features."""
    flags = {"batch": 4, "workers": 0} | flags
    config = Config(samples=str(samples), reference=str(reference), **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_features", lambda *args: features)
        results = evaluation.fid(config, dist_ctx)
    values = {}
    for result in results:
        name, _, column = result["metric"].partition("/")
        assert column == Path(samples).name
        values[name.removesuffix(f"-{features.name}")] = result["value"]
    return values


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
    features, _ = PIXELS.extract(images)
    sums = FeatureSums(PIXELS.width)
    for part in features.split(batch):
        sums.add(part)
    features = features.double().numpy()
    gaussian = sums.gaussian()
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
    assert gaussian.count == 50


def test_one_image_has_no_covariance():
    sums = FeatureSums(PIXELS.width)
    sums.add(torch.zeros(1, 12))
    with pytest.raises(ValueError, match="at least 2 images, but only 1"):
        sums.gaussian()


# -----------------------------------------------------------------------------------------------------------
# networks


def test_features_of_the_encoder_are_its_mean_token():
    features = evaluation.load_features("encoder", "", CPU)
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    x, spatial = features.extract(images)
    assert x.shape == (5, features.width) == (5, 96) and spatial.shape == (5, features.spatial) == (5, 252)
    torch.testing.assert_close(features.extract(images[3:])[0], x[3:])
    assert features.classifier is None


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
    x, spatial = features.extract(images)
    sums = FeatureSums(features.width)
    sums.add(x)
    sums.add(x[:1])
    gaussian = sums.gaussian()
    assert gaussian.mean.shape == (2048,) and gaussian.covariance.any() and gaussian.count == 4
    alone, spatial_alone = features.extract(images[2:])
    torch.testing.assert_close(alone, x[2:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(spatial_alone, spatial[2:], rtol=1e-3, atol=1e-4)
    assert spatial.shape == (3, features.spatial) == (3, 2023)


def test_spatial_features_and_logits_of_inception_are_those_of_adm(inception_file):
    """mixed_6/conv: convolution, batch norm and ReLU of the 1x1 branch, in TensorFlow's order of values; and
    the unbiased logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = evaluation.load_features("inception", str(inception_file), CPU)
    names = ["2048", "logits_unbiased"]
    network, before = FeatureExtractorInceptionV3("inception-v3-compat", names, inception_file), []
    network.Mixed_6c.register_forward_hook(lambda module, args, output: before.append(output))
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    pooled, logits = network(images)
    x, spatial = features.extract(images)
    torch.testing.assert_close(x, pooled)
    torch.testing.assert_close(x @ features.classifier.T, logits)
    branch = network.Mixed_6d.branch1x1
    expected = branch.bn(branch.conv(before[0])).relu().permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    torch.testing.assert_close(spatial, expected)
    assert spatial.std() > 0


def test_inception_files_that_are_none(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"code": functools.partial(print, "hello")}, tmp_path / "code.pth")
    for name in ("junk", "other", "code", "missing"):
        with pytest.raises(ValueError, match="cannot load the weights of Inception") as caught:
            evaluation.load_features("inception", str(tmp_path / f"{name}.pth"), CPU)
        assert "\n" not in str(caught.value)


def test_lpips_takes_unit_images_and_downloads_its_backbone(monkeypatch):
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


def test_ssim_and_psnr_are_those_of_scikit_image():
    one = torch.stack([torch.from_numpy(data.open_source("nano", 40, seed=5)[i]["image"]) for i in range(3)])
    one = one.permute(0, 3, 1, 2) / 255
    other = (one + 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in zip(one, other, strict=True)]
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=0, **gaussian) for a, b in pairs]
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert evaluation.ssim(one, other).tolist() == pytest.approx(ssim, abs=1e-5)
    assert evaluation.psnr(one, other).tolist() == pytest.approx(psnr, abs=1e-5)


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
    sums = FeatureSums(PIXELS.width)
    sums.add(PIXELS.extract(images)[0])
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(load().covariance, sums.gaussian().covariance, rtol=1e-9)

    inception = PIXELS._replace(name="inception")
    black = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance, arr_0=black)  # as ADM's
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
        "Fortran": {"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))},
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


def test_a_file_that_ends_early(tmp_path):
    """Its header promises more images than there are."""
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as entry:
        header = {"descr": "|u1", "fortran_order": False, "shape": (4, 2, 2, 3)}
        np.lib.format.write_array_header_1_0(entry, header)
        entry.write(bytes(3 * 2 * 2 * 3))
    with pytest.raises(ValueError, match="cannot read"):
        evaluation.load_reference(str(tmp_path / "short.npz"), PIXELS, SIZE, Config(batch=3), CPU)


# -----------------------------------------------------------------------------------------------------------
# recon


def test_processes_and_batches_do_not_change_the_result(world, parts, tmp_path):
    write_images(tmp_path / "val", 11)
    (tmp_path / "val/03.png").write_bytes(b"junk")
    flags = ["--data", f"val={tmp_path}/val", "--npz", tmp_path / "images.npz"]
    outcomes = []
    for processes, batch, workers in ((1, 64, 0), (2, 3, 0), (1, 2, 2)):
        more = ["--batch", batch, "--workers", workers]
        results = recon(world, parts, tmp_path / "r.json", *flags, *more, processes=processes)
        strip = np.array(Image.open(tmp_path / "r.png"))
        outcomes.append((results, np.load(tmp_path / "images.npz")["arr_0"], strip))
    results, images, strip = outcomes[0]
    assert set(results) == {"psnr/val", "ssim/val", "rfid-encoder/val"}
    assert {result["n"] for result in results.values()} == {10}
    assert images.shape == (10, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert strip.shape == (2 * 128 + 2, 8 * 128 + 7 * 2, 3)
    original = data.centre_crop(Image.open(tmp_path / "val/04.png"), SIZE)  # the fourth that can be read
    assert (strip[:128:4, 3 * 130 : 3 * 130 + 128 : 4] == original).all()
    assert (strip[130::4, 3 * 130 : 3 * 130 + 128 : 4] == images[3]).all()
    for others, other_images, other_strip in outcomes[1:]:
        for name, result in results.items():
            assert others[name]["value"] == pytest.approx(result["value"], rel=1e-4, abs=1e-6), name
            assert others[name]["n"] == result["n"]
        assert (np.abs(other_images.astype(int) - images) <= 1).all()
        assert (np.abs(other_strip.astype(int) - strip) <= 1).all()


def test_references_are_saved_and_used_again(world, parts, tmp_path):
    write_images(tmp_path / "val", 6)
    write_images(tmp_path / "other", 6, first=6)
    flags, file, out = ["--data", f"{tmp_path}/val"], tmp_path / "reference.npz", tmp_path / "r.json"

    def rfid(*more, processes=1) -> float:
        return recon(world, parts, out, *flags, *more, processes=processes)["rfid-encoder/val"]["value"]

    own = rfid("--save-reference", file, "--npz", tmp_path / "images.npz")
    assert own > 0.01
    assert rfid("--reference", file) == pytest.approx(own, rel=1e-9)
    assert rfid("--reference", tmp_path / "val") == pytest.approx(own, rel=1e-6)
    assert rfid("--reference", tmp_path / "images.npz") == pytest.approx(0, abs=1e-5)
    assert rfid("--reference", tmp_path / "images.npz", processes=2) == pytest.approx(0, abs=1e-5)
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


# -----------------------------------------------------------------------------------------------------------
# fid


def clouds(count: int = 60, other: int = 50, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    one = torch.randn(count, width, generator=chance)
    return one, torch.randn(other, width, generator=chance) * 0.8 + 0.3


def brute_force(points: np.ndarray, others: np.ndarray) -> float:
    """Share of the points within the third neighbour's distance of any of the others."""
    inside = 0
    for point in points:
        for i, other in enumerate(others):
            neighbours = sorted(np.linalg.norm(x - other) for j, x in enumerate(others) if j != i)
            if np.linalg.norm(point - other) <= neighbours[2]:
                inside += 1
                break
    return inside / len(points)


def test_precision_and_recall(monkeypatch):
    samples, reference = clouds()
    precision, recall = evaluation.precision_recall(samples, reference, torch.device("cpu"))
    assert precision == pytest.approx(brute_force(samples.numpy(), reference.numpy()))
    assert recall == pytest.approx(brute_force(reference.numpy(), samples.numpy()))
    assert 0.2 < precision < recall < 1
    theirs = metric_prc.prc_features_to_metric(samples, reference, verbose=False)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-4)
    monkeypatch.setattr(evaluation, "ROWS", 7)
    assert evaluation.precision_recall(samples, reference, torch.device("cpu")) == (precision, recall)
    assert evaluation.precision_recall(samples, samples, torch.device("cpu")) == (1, 1)
    assert evaluation.precision_recall(samples, samples + 100, torch.device("cpu")) == (0, 0)


def test_inception_score(monkeypatch):
    logits = 3 * torch.randn(10_000, 9, generator=torch.Generator().manual_seed(0))
    score = evaluation.inception_score(logits)
    theirs = metric_isc.isc_features_to_metric(logits, splits=2, shuffle=False)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    parts = [p[:5000], p[5000:]]
    expected = [np.exp((q * np.log(q / q.mean(axis=0))).sum(axis=1).mean()) for q in parts]
    assert score == pytest.approx(np.mean(expected), rel=1e-9)
    monkeypatch.setattr(evaluation, "SPLIT", 6000)  # the second one is shorter, and counts as much
    parts = [p[:6000], p[6000:]]
    expected = [np.exp((q * np.log(q / q.mean(axis=0))).sum(axis=1).mean()) for q in parts]
    assert evaluation.inception_score(logits) == pytest.approx(np.mean(expected), rel=1e-9)
    assert evaluation.inception_score(100 * torch.eye(4).repeat(25, 1)) == pytest.approx(4)
    assert evaluation.inception_score(torch.ones(10, 4)) == pytest.approx(1)


def test_fid_is_that_of_torch_fidelity():
    gaussians, theirs = [], []
    for x in clouds(200, 150, 12):
        sums = FeatureSums(12)
        sums.add(x)
        gaussians.append(sums.gaussian())
        theirs.append(metric_fid.fid_features_to_statistics(x.double()))
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-4)


def test_fid_between_files_of_images(tmp_path):
    """Against numpy and scipy, on features that are pixels, with a classifier of them."""
    classes = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) / 200
    samples, reference = (write_npz(tmp_path / f"{i}.npz", 24, first=50 * i) for i in range(2))
    values = fid_of(samples, reference, features=PIXELS._replace(classifier=classes))
    assert list(values) == ["fid", "sfid", "inception-score", "precision", "recall"]
    images = [torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) for path in (samples, reference)]
    for key, i in (("fid", 0), ("sfid", 1)):
        x, y = (pixels(part)[i].double().numpy() for part in images)
        roots = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).astype(complex)).real.sum()
        traces = np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
        expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + traces - 2 * roots
        assert values[key] == pytest.approx(expected, rel=1e-6)
    x, y = (pixels(part)[0] for part in images)
    assert values["precision"] == pytest.approx(brute_force(x.numpy(), y.numpy()))
    assert values["recall"] == pytest.approx(brute_force(y.numpy(), x.numpy()))
    theirs = metric_isc.isc_features_to_metric(x @ classes.T, splits=1, shuffle=False)
    assert values["inception-score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_what_files_cannot_give_is_left_out_and_said(tmp_path, capsys):
    one, two = random_gaussian(0, 12), random_gaussian(1, 4)
    features = PIXELS._replace(name="inception", classifier=torch.ones(5, 12))
    samples = write_npz(tmp_path / "samples.npz", 12)
    statistics = {"mu": one.mean.astype(np.float32), "sigma": one.covariance}
    spatial = {"mu_s": two.mean, "sigma_s": two.covariance}
    np.savez(tmp_path / "only.npz", **statistics, **spatial)
    np.savez(tmp_path / "old.npz", **statistics)
    write_npz(tmp_path / "adm.npz", 8, first=20, **statistics, **spatial)
    write_npz(tmp_path / "few.npz", 3)

    def names(one: str, other: str) -> tuple[list[str], str]:
        found = list(fid_of(tmp_path / one, tmp_path / other, features=features))
        return found, capsys.readouterr().err

    assert names("samples.npz", "only.npz")[0] == ["fid", "sfid", "inception-score"]
    assert names("only.npz", "samples.npz")[0] == ["fid", "sfid"]
    found, printed = names("samples.npz", "old.npz")
    assert found == ["fid", "inception-score"]
    assert "left out sFID: no mu_s and sigma_s in" in printed
    assert "left out precision and recall: no images in" in printed
    assert names("samples.npz", "adm.npz")[0] == ["fid", "sfid", "inception-score", "precision", "recall"]
    found, printed = names("few.npz", "adm.npz")
    assert found == ["fid", "sfid", "inception-score"]
    assert "need 4 images" in printed and "3 images are few for a FID of 12 features" in printed
    assert "Inception score: no images in" in names("only.npz", "adm.npz")[1]

    values = fid_of(samples, tmp_path / "adm.npz", features=features)  # statistics go before images
    expected = fid_of(samples, tmp_path / "only.npz", features=features)
    assert {key: values[key] for key in expected} == expected


def test_of_a_large_reference_a_part_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MANIFOLD", 5)
    write_npz(tmp_path / "reference.npz", 30)
    kept = []
    for batch in (2, 30):
        config = Config(batch=batch)
        compared = evaluation.open_compared(str(tmp_path / "reference.npz"), None, None, config, CPU)
        survey = evaluation.survey(compared, PIXELS, evaluation.MANIFOLD, CPU)
        assert survey.pooled.count == 30 and survey.rows.shape == (5, 12)
        kept.append(survey.rows)
    assert (kept[0] == kept[1]).all()


def test_images_of_a_reference_are_cropped_and_samples_are_not(tmp_path):
    folder = write_images(tmp_path / "samples", 8)  # of 40 px
    write_npz(tmp_path / "samples.npz", 8)
    assert fid_of(folder, tmp_path / "samples.npz")["fid"] == pytest.approx(0, abs=1e-6)
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(folder / "large.png")
    fid_of(tmp_path / "samples.npz", folder)
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(folder / "large.png")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="images of mixed sizes: one has .* pixels, the first"):
            fid_of(folder, folder, workers=workers)


def test_references_of_fid_are_saved_and_used_again(tmp_path):
    samples, reference = (write_npz(tmp_path / f"{i}.npz", 12, first=20 * i) for i in range(2))
    values = fid_of(samples, reference, save_reference=str(tmp_path / "saved.npz"))
    assert np.load(tmp_path / "saved.npz")["n"] == 12
    again = fid_of(samples, tmp_path / "saved.npz", save_reference=str(tmp_path / "again.npz"))
    assert again == pytest.approx({key: values[key] for key in ("fid", "sfid")})
    assert "n" not in np.load(tmp_path / "again.npz")


def test_mistakes_of_fid(tmp_path):
    samples, gaussian = write_npz(tmp_path / "samples.npz", 8), random_gaussian(0, 12)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/00.png").write_bytes(b"junk")
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((4, 8, 6, 3), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 40, 40, 3), np.uint8))
    np.savez(tmp_path / "other.npz", mu=gaussian.mean, sigma=gaussian.covariance, features="encoder")
    np.savez(tmp_path / "half.npz", mu=gaussian.mean, sigma=gaussian.covariance, mu_s=gaussian.mean)
    statistics = {"mu": gaussian.mean, "sigma": gaussian.covariance, "features": "pixels"}
    np.savez(tmp_path / "spatial.npz", **statistics, mu_s=gaussian.mean, sigma_s=gaussian.covariance)
    small = write_npz(tmp_path / "small.npz", 8, side=32)
    cases = [
        ("", samples, "give both --samples and --reference"),
        (samples, "", "give both --samples and --reference"),
        (samples, small, "images of 40 x 40 pixels, .*small.npz of 32 x 32: compare those of one size"),
        (tmp_path / "wide.npz", samples, "images of 6 x 8 pixels: no squares"),
        (samples, tmp_path / "other.npz", "of encoder features, not of pixels"),
        (samples, tmp_path / "half.npz", "cannot read .*sigma_s"),
        (samples, tmp_path / "spatial.npz", r"mu_s \(12,\) and sigma_s \(12, 12\) of 4 pixels features"),
        (tmp_path / "one.npz", samples, "at least 2 images, but only 1"),
        (tmp_path / "broken", samples, "holds no image that can be used"),
        (tmp_path / "missing.npz", samples, "cannot read"),
        (samples, "nowhere", "no data source"),
    ]
    for one, other, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            fid_of(one, other)
        assert "\n" not in str(caught.value)


def test_processes_do_not_change_fid(world, tmp_path):
    """As a user runs it, with the encoder in nano/weights."""
    folder = write_images(tmp_path / "samples", 11)
    (folder / "03.png").write_bytes(b"junk")
    write_npz(tmp_path / "reference.npz", 14, first=20)
    out, outcomes = tmp_path / "r.json", []
    for processes, batch in ((1, 64), (2, 3)):
        flags = ["--samples", folder, "--reference", tmp_path / "reference.npz", "--batch", batch]
        run = world(processes, "eval.py", "fid", *flags, "--workers", 0, "--out", out)
        printed = run.wait()
        assert "left out 1 images" in printed and "10 images are few for a FID of 96" in printed
        outcomes.append({r["metric"]: r for r in json.loads(out.read_text())})
    one, two = outcomes
    keys = [f"{name}-encoder/samples" for name in ("fid", "sfid", "precision", "recall")]
    assert list(one) == list(two) == keys and one[keys[0]]["value"] > 0.01
    for key in keys:
        assert one[key]["value"] == pytest.approx(two[key]["value"], rel=1e-4, abs=1e-6)
        assert one[key]["n"] == two[key]["n"] == 10
