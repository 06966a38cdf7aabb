"""eval.py: metrics against the official arithmetic, hostile files, and recon and fid as a user runs them."""

import functools
import json
import zipfile
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity import metric_fid, metric_isc, metric_prc

import common
import data
import eval as evaluation
import rae
from eval import Config, Features, FeatureSums, Gaussian, frechet_distance

SIZE = 32
CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


def pixel_features(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :, :2, :2].flatten(1).float(), x[:, 0, :2, :2].flatten(1).float()


PIXELS = Features("pixels", 12, 4, pixel_features)  # of uint8 (B, 3, H, W)


def nano_images(count: int, first: int = 0, side: int = 40) -> list[np.ndarray]:
    source = data.open_source("nano:objects=0.7,nano:scenes=0.3", side, seed=5)
    return [source[first + i]["image"] for i in range(count)]


def write_folder(folder: Path, count: int, first: int = 0, side: int = 40) -> Path:
    folder.mkdir()
    for i, image in enumerate(nano_images(count, first, side)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return folder


def write_npz(path: Path, count: int, first: int = 0, side: int = 40, **statistics) -> Path:
    np.savez(path, arr_0=np.stack(nano_images(count, first, side)), **statistics)
    return path


def random_gaussian(seed: int, width: int = 8) -> Gaussian:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(width, 3 * width))
    return Gaussian(rng.normal(size=width), factor @ factor.T / (3 * width))


def run_fid(samples, reference, features: Features = PIXELS, **flags) -> dict[str, float]:
    """`eval.py fid` in this process, with any features."""
    config = Config(samples=str(samples), reference=str(reference), **{"batch": 4, "workers": 0} | flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_features", lambda *args: features)
        results = evaluation.fid(config, CPU)
    names = [result["metric"].split("/")[0].removesuffix(f"-{features.name}") for result in results]
    return dict(zip(names, [result["value"] for result in results], strict=True))


# -----------------------------------------------------------------------------------------------------------
# Frechet distance


def test_frechet_distance_has_its_closed_form():
    one = random_gaussian(0)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
    shift = np.arange(8.0)
    assert frechet_distance(one, one._replace(mean=one.mean + shift)) == pytest.approx((shift**2).sum())
    a, b = np.random.default_rng(1).uniform(0.1, 4, (2, 8))
    diagonal = [Gaussian(np.zeros(8), np.diag(variance)) for variance in (a, b)]
    assert frechet_distance(*diagonal) == pytest.approx(((a**0.5 - b**0.5) ** 2).sum())
    point = Gaussian(one.mean, np.zeros((8, 8)))  # singular
    assert frechet_distance(one, point) == pytest.approx(np.trace(one.covariance))


def test_frechet_distance_of_sums_equals_torch_fidelity():
    gaussians, theirs = [], []
    for x in clouds(200, 150, 12):
        sums = FeatureSums(12)
        for part in x.split(70):
            sums.add(part)
        gaussians.append(sums.gaussian())
        theirs.append(metric_fid.fid_features_to_statistics(x.double()))
        np.testing.assert_allclose(gaussians[-1].mean, theirs[-1]["mu"], rtol=1e-9)
        np.testing.assert_allclose(gaussians[-1].covariance, theirs[-1]["sigma"], rtol=1e-9, atol=1e-9)
    assert [gaussian.count for gaussian in gaussians] == [200, 150]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-4)


# -----------------------------------------------------------------------------------------------------------
# networks and pair metrics


def test_encoder_features_are_its_mean_token():
    features = evaluation.load_features("encoder", "", CPU)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    x, spatial = features.extract(images)
    assert x.shape == (3, features.width) == (3, 96) and spatial.shape == (3, features.spatial) == (3, 252)
    torch.testing.assert_close(features.extract(images[2:])[0], x[2:])


def test_inception_features_and_logits_are_adms(tmp_path):
    """mixed_6/conv is convolution, batch norm and ReLU of the 1x1 branch, in TensorFlow's order."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch:  # untrained weights, as the file that it would download
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    before = []
    network.Mixed_6c.register_forward_hook(lambda module, args, output: before.append(output))
    features = evaluation.load_features("inception", str(tmp_path / "weights.pth"), CPU)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    pooled, logits = network(images)
    x, spatial = features.extract(images)
    torch.testing.assert_close(x, pooled)
    torch.testing.assert_close(x @ features.classifier.T, logits)
    branch = network.Mixed_6d.branch1x1
    expected = branch.bn(branch.conv(before[0])).relu().permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    torch.testing.assert_close(spatial, expected)
    assert spatial.std() > 0 and spatial.shape == (2, features.spatial) == (2, 2023)


def test_hostile_inception_files_are_refused(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"code": functools.partial(print, "hello")}, tmp_path / "code.pth")
    for name in ("junk", "other", "code", "missing"):
        with pytest.raises(ValueError, match="cannot load the weights of Inception"):
            evaluation.load_features("inception", str(tmp_path / f"{name}.pth"), CPU)


def test_lpips_takes_images_in_0_1(monkeypatch):
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    metric, one = evaluation.load_lpips("alex", CPU), torch.rand(2, 3, 64, 64)
    other = torch.stack([one[0], 1 - one[1]])
    with torch.no_grad():
        values = metric(one, other)
    assert values.shape == (2,) and values[0] == 0 and values[1] > 0


def test_ssim_and_psnr_equal_scikit_image():
    one = torch.from_numpy(np.stack(nano_images(2))).permute(0, 3, 1, 2) / 255
    other = (one + 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in zip(one, other, strict=True)]
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=0, **gaussian) for a, b in pairs]
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert evaluation.ssim(one, other).tolist() == pytest.approx(ssim, abs=1e-5)
    assert evaluation.psnr(one, other).tolist() == pytest.approx(psnr, abs=1e-5)


# -----------------------------------------------------------------------------------------------------------
# Inception score, precision, recall


def clouds(count: int = 60, other: int = 50, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(count, width, generator=generator)
    return one, torch.randn(other, width, generator=generator) * 0.8 + 0.3


def brute_force(points: np.ndarray, others: np.ndarray) -> float:
    """Share of the points within the third neighbour's distance of any of the others."""
    radii = np.sort(np.linalg.norm(others[:, None] - others, axis=-1))[:, 3]  # the first is the point itself
    return (np.linalg.norm(points[:, None] - others, axis=-1) <= radii).any(axis=1).mean()


def test_precision_and_recall(monkeypatch):
    samples, reference = clouds()
    precision, recall = evaluation.precision_recall(samples, reference, CPU.device)
    assert precision == pytest.approx(brute_force(samples.numpy(), reference.numpy()))
    assert recall == pytest.approx(brute_force(reference.numpy(), samples.numpy()))
    assert 0.2 < precision < recall < 1
    theirs = metric_prc.prc_features_to_metric(samples, reference, verbose=False)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-4)
    monkeypatch.setattr(evaluation, "ROWS", 7)
    assert evaluation.precision_recall(samples, reference, CPU.device) == (precision, recall)
    assert evaluation.precision_recall(samples, samples + 100, CPU.device) == (0, 0)


def test_inception_score(monkeypatch):
    monkeypatch.setattr(evaluation, "SPLIT", 500)
    logits = 3 * torch.randn(1000, 9, generator=torch.Generator().manual_seed(0))
    theirs = metric_isc.isc_features_to_metric(logits, splits=2, shuffle=False)
    assert evaluation.inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    monkeypatch.setattr(evaluation, "SPLIT", 600)  # the last split is shorter, and counts as much
    p = logits.double().softmax(dim=1).numpy()
    expected = [np.exp((q * np.log(q / q.mean(axis=0))).sum(axis=1).mean()) for q in (p[:600], p[600:])]
    assert evaluation.inception_score(logits) == pytest.approx(np.mean(expected), rel=1e-9)


# -----------------------------------------------------------------------------------------------------------
# hostile .npz files


def test_hostile_npz_files_are_refused_in_one_line(tmp_path):
    gaussian, images = random_gaussian(3, 12), np.zeros((2, 40, 40, 3), np.uint8)
    features, samples = PIXELS._replace(name="inception"), write_npz(tmp_path / "samples.npz", 4)
    mean, covariance = gaussian.mean, gaussian.covariance
    pair = {"mu": mean, "sigma": covariance}
    cases = [
        ({"sigma": covariance}, "cannot read"),
        ({"mu": mean}, "cannot read .*sigma"),
        (pair | {"mu_s": mean}, "cannot read .*sigma_s"),
        (pair | {"mu_s": mean, "sigma_s": covariance}, r"mu_s \(12,\) and sigma_s \(12, 12\), not of 4"),
        ({"mu": mean, "sigma": covariance[:, :11]}, r"mu \(12,\) and sigma \(12, 11\)"),
        ({"mu": mean * np.nan, "sigma": covariance}, "not finite"),
        ({"mu": np.array([print]), "sigma": covariance}, "Object arrays|pickle"),
        ({"arr_0": images.astype(float)}, r"float64 \(2, 40, 40, 3\)"),
        ({"arr_0": images.transpose(0, 3, 1, 2)}, r"uint8 \(2, 3, 40, 40\)"),
        ({"arr_0": images[:, :, :30]}, "not uint8 squares"),
        ({"arr_0": np.asfortranarray(images)}, "Fortran"),
        ({"arr_0": images[:, :32, :32]}, "images of 40 pixels, .* of 32: compare images of one size"),
        ({"arr_0": images[:1]}, "at least 2 images, but only 1"),
    ]
    path = tmp_path / "reference.npz"
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message) as caught:
            run_fid(samples, path, features)
        assert "\n" not in str(caught.value)
    np.savez(path, **pair)
    with pytest.raises(ValueError, match="statistics of Inception"):
        run_fid(samples, path)
    for content in (b"", b"junk", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read"):
            run_fid(samples, path)
    header = {"descr": "|u1", "fortran_order": False, "shape": (4, 40, 40, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        entry.write(bytes(3 * 40 * 40 * 3))  # 4 images are promised, 3 are there
    for missing in (path, tmp_path / "missing.npz"):
        with pytest.raises(ValueError, match="cannot read"):
            run_fid(samples, missing)


# -----------------------------------------------------------------------------------------------------------
# fid


def test_fid_of_npz_files_equals_numpy_and_torch_fidelity(tmp_path):
    """On features that are pixels, with a classifier of them."""
    classes = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) / 200
    samples, reference = (write_npz(tmp_path / f"{i}.npz", 24, first=50 * i) for i in range(2))
    values = run_fid(samples, reference, PIXELS._replace(classifier=classes))
    assert list(values) == ["fid", "sfid", "inception-score", "precision", "recall"]
    images = [torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) for path in (samples, reference)]
    for key, i in (("fid", 0), ("sfid", 1)):
        x, y = (pixel_features(part)[i].double().numpy() for part in images)
        roots = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).astype(complex)).real.sum()
        traces = np.trace(np.cov(x.T) + np.cov(y.T))
        expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + traces - 2 * roots
        assert values[key] == pytest.approx(expected, rel=1e-6)
    x, y = (pixel_features(part)[0] for part in images)
    assert values["precision"] == pytest.approx(brute_force(x.numpy(), y.numpy()))
    assert values["recall"] == pytest.approx(brute_force(y.numpy(), x.numpy()))
    theirs = metric_isc.isc_features_to_metric(x @ classes.T, splits=1, shuffle=False)
    assert values["inception-score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_fid_computes_what_the_files_allow(tmp_path, capsys):
    one, two = random_gaussian(0, 12), random_gaussian(1, 4)
    features = PIXELS._replace(name="inception", classifier=torch.ones(5, 12))
    samples = write_npz(tmp_path / "samples.npz", 12)
    statistics = {"mu": one.mean.astype(np.float32), "sigma": one.covariance}
    spatial = {"mu_s": two.mean, "sigma_s": two.covariance}
    np.savez(tmp_path / "only.npz", **statistics, **spatial)
    np.savez(tmp_path / "old.npz", **statistics)
    write_npz(tmp_path / "adm.npz", 8, first=20, **statistics, **spatial)
    few = write_npz(tmp_path / "few.npz", 3)
    everything = ["fid", "sfid", "inception-score", "precision", "recall"]
    assert list(run_fid(samples, tmp_path / "adm.npz", features)) == everything
    assert list(run_fid(samples, tmp_path / "only.npz", features)) == everything[:3]
    assert list(run_fid(tmp_path / "only.npz", samples, features)) == everything[:2]
    capsys.readouterr()
    assert list(run_fid(few, tmp_path / "old.npz", features)) == ["fid", "inception-score"]
    printed = capsys.readouterr().err
    assert "without sFID" in printed and "without precision and recall" in printed
    assert "3 images are few for a FID of 12 features" in printed
    # statistics take precedence over images, as in ADM
    from_statistics = run_fid(samples, tmp_path / "only.npz", features)
    assert run_fid(samples, tmp_path / "adm.npz", features).items() >= from_statistics.items()


def test_part_of_a_large_reference_does_not_depend_on_the_batch(tmp_path):
    path, kept = write_npz(tmp_path / "reference.npz", 30), []
    for batch in (2, 30):
        images = evaluation.open_images(str(path), None, Config(batch=batch), CPU)
        statistics = evaluation.compute_statistics(images, PIXELS, 5, CPU)
        assert statistics.pooled.count == 30 and statistics.rows.shape == (5, 12)
        kept.append(statistics.rows)
    assert (kept[0] == kept[1]).all()


def test_files_that_are_sorted_by_class_are_mixed_in_the_splits_of_the_inception_score(tmp_path):
    for value in range(2):
        for number in range(16):
            (tmp_path / str(value)).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (255 * value,) * 3).save(tmp_path / f"{value}/{number:02d}.png")
    images = evaluation.open_images(str(tmp_path), None, Config(), CPU)
    rows = evaluation.compute_statistics(images, PIXELS, None, CPU).rows
    assert len(rows) == 32 and 0.25 < rows[:16].mean() / rows.mean() / 2 < 0.75


def test_a_folder_called_nano_is_not_the_nano_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "nano-run", 260)
    images = evaluation.open_images("nano-run", None, Config(), CPU)
    assert sum(len(indices) for indices, _ in images.batches) == 260


def test_references_are_cropped_and_samples_are_not(tmp_path):
    folder, path = write_folder(tmp_path / "samples", 8), write_npz(tmp_path / "samples.npz", 8)
    assert run_fid(folder, path)["fid"] == pytest.approx(0, abs=1e-6)
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(folder / "large.png")
    run_fid(path, folder)
    with pytest.raises(ValueError, match="squares of one size"):
        run_fid(folder, folder)
    for image in folder.iterdir():
        image.write_bytes(b"junk")
    with pytest.raises(ValueError, match="no image that can be used"):
        run_fid(folder, path)
    with pytest.raises(ValueError, match="give both --samples and --reference"):
        run_fid(path, "")


def test_fid_of_a_folder_of_sample_takes_the_samples(tmp_path, capsys):
    images = write_folder(tmp_path / "samples", 8)
    without = run_fid(images, "nano:objects", limit=12)
    text = {"prompt": "a star", "seed": 0, "grid": "full", "steps": 50}
    for image in list(images.iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(image)))
        common.save_image(image, pixels.permute(2, 0, 1) / 255, **text)
    # of prompts, and of DPG-Bench
    for name, grid in (("grid", {"grid_of": "12ab"}), ("item", text | {"grid_of": 4})):
        common.save_image(images / f"{name}.png", torch.rand(3, 82, 166), **grid)
    assert run_fid(images, "nano:objects", limit=12) == without
    assert "skipped 2 images: a grid of images from sample.py" in capsys.readouterr().err
    assert run_fid(images, images)["fid"] == pytest.approx(0, abs=1e-6)


# -----------------------------------------------------------------------------------------------------------
# careless use


@pytest.fixture
def run(monkeypatch):
    """run(flag, ...): eval.py in this process."""

    def call(*flags) -> None:
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, flags)])
        evaluation.main()

    return call


@pytest.mark.parametrize("name", ["photos", "photo.png", "photos/cat.jpg/r.json", "both.json"])
def test_outputs_are_refused_before_the_work(name, run, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("mine")
    common.save_image(tmp_path / "both.png", torch.zeros(3, 2, 2), camera="mine")
    monkeypatch.setattr(common, "load_autoencoder", lambda *_: pytest.fail("the work began"))
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=name.removesuffix(".json")):
        run("--out", tmp_path / name)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "photos/cat.jpg").read_text() == "mine"


def test_what_is_not_finite_is_not_measured(run, parts, tmp_path):
    model = rae.RAE.from_pretrained(parts / "rae")
    torch.nn.init.constant_(model.decoder.decoder_pred.bias, float("nan"))
    model.save_pretrained(tmp_path / "rae")
    flags = [
        "--autoencoder",
        tmp_path / "rae",
        "--data",
        "val=nano:text",
        "--limit",
        4,
        "--out",
        tmp_path / "r.json",
    ]
    with pytest.raises(ValueError, match="reconstructions of val: the model's result is not finite"):
        run(*flags, "--out", tmp_path / "r.json")
    assert not list(tmp_path.glob("r.*"))
    broken = PIXELS._replace(extract=lambda x: tuple(part * float("inf") for part in pixel_features(x)))
    with pytest.raises(ValueError, match="features of 4 images are not finite"):
        run_fid(write_npz(tmp_path / "samples.npz", 4), "nano:objects", broken, limit=4)


# -----------------------------------------------------------------------------------------------------------
# recon, and both with several processes


def test_recon_and_fid_do_not_depend_on_processes_or_batches(world, parts, tmp_path, capsys):
    folder = write_folder(tmp_path / "val", 11)
    samples = write_folder(tmp_path / "samples", 11, side=SIZE)
    for some in (folder, samples):
        (some / "03.png").write_bytes(b"junk")
    flags = {"autoencoder": str(parts / "rae"), "data": f"val={folder}", "samples": str(samples)}
    flags["reference"] = str(write_npz(tmp_path / "reference.npz", 14, first=20, side=SIZE))
    config = Config(**flags, workers=2, out=str(tmp_path / "one.json"))
    one = evaluation.recon(config, CPU) + evaluation.fid(config, CPU)
    printed = capsys.readouterr().err
    assert "skipped 1 images" in printed and "10 images are few for a FID of 96" in printed
    names = [result["metric"].split("/")[0].removesuffix("-encoder") for result in one]
    assert names == ["psnr", "ssim", "rfid", "fid", "sfid", "precision", "recall"]

    flags |= {"batch": 3, "workers": 0, "out": tmp_path / "two.json"}
    options = [option for name, value in flags.items() for option in (f"--{name}", value)]
    world(2, "eval.py", "recon", "fid", *options).wait()
    file = json.loads((tmp_path / "two.json").read_text())
    assert set(file) == {"command", "seed", "versions", "date", "results"}
    for a, b in zip(one, file["results"], strict=True):
        assert a["metric"] == b["metric"] and a["n"] == b["n"] == 10
        assert a["value"] == pytest.approx(b["value"], rel=1e-4, abs=1e-6)
    strip, other = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two"))
    # eight originals above eight reconstructions, enlarged 4 times
    assert strip.shape == (2 * 128 + 2, 8 * 128 + 7 * 2, 3)
    original = data.centre_crop(Image.open(folder / "04.png"), SIZE)  # the fourth that can be read
    assert (strip[:128:4, 3 * 130 : 3 * 130 + 128 : 4] == original).all()
    assert (np.abs(other.astype(int) - strip) <= 1).all()


def test_rfid_compares_with_originals_or_a_reference(parts, tmp_path):
    folder = write_folder(tmp_path / "val", 4)
    flags = {"autoencoder": str(parts / "rae"), "workers": 0, "out": str(tmp_path / "r.json")}

    def rfid(reference) -> float:
        config = Config(data=str(folder), reference=str(reference), **flags)
        [value] = [r["value"] for r in evaluation.recon(config, CPU) if r["metric"].startswith("rfid")]
        return value

    with_originals = rfid("")
    assert with_originals > 0.01
    assert rfid(folder) == pytest.approx(with_originals, rel=1e-6)
    crops = [data.centre_crop(Image.open(path), SIZE) for path in sorted(folder.iterdir())]
    np.savez(tmp_path / "originals.npz", arr_0=np.stack(crops))
    assert rfid(tmp_path / "originals.npz") == pytest.approx(with_originals, rel=1e-6)
    assert rfid("nano:text") != pytest.approx(with_originals, rel=1e-4)
    with pytest.raises(ValueError, match="images of 40 pixels, not 32"):
        evaluation.recon(Config(data=str(write_npz(tmp_path / "large.npz", 2)), **flags), CPU)
    with pytest.raises(ValueError, match="large.npz has images of 40 pixels, not 32"):
        rfid(tmp_path / "large.npz")


@pytest.mark.parametrize("names", ["a=nano:text,a=nano:scenes", "a/b=nano:text", "=nano:text"])
def test_data_sets_need_plain_names(names):
    with pytest.raises(ValueError, match="plain name"):
        evaluation.parse_data_sets(names)
    assert evaluation.parse_data_sets("a=nano:text,x/y") == {"a": "nano:text", "y": "x/y"}


def test_table_has_a_column_for_each_data_set():
    names = ("psnr/imagenet", "ssim/imagenet", "psnr/yfcc", "ssim/yfcc", "shapes/model/overall")
    lines = common.table([{"metric": name, "value": i} for i, name in enumerate(names)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "imagenet", "yfcc", "shapes/model"]
    assert cells[2:] == [["psnr", "0.000", "2.000", ""], ["ssim", "1.000", "3.000", ""],
                         ["overall", "", "", "4.000"]]  # fmt: skip
