"""Image data sets through torchvision: CIFAR-10, CIFAR-100 and any folder of images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sltt.checks import flag, folder, number, whole_number
from sltt.data.augment import clear_square
from sltt.data.base import Data, Splits, hold_out

Transform = Callable[[Any], Tensor]


class Mixup(Dataset[tuple[Tensor, int]]):
    """Pairs of samples, mixed: λ x + (1 − λ) x′ with the label y with probability λ, or else y′; λ ~ Beta(α, α).

    So the expected loss is λ ℓ(o, y) + (1 − λ) ℓ(o, y′), that of mixed labels, and labels stay class indices.

    Args:
        data: samples (x, label).
        alpha: α.

    Source: Zhang et al., ICLR 2018 (arXiv 1710.09412).
    """

    def __init__(self, data: Dataset[tuple[Tensor, int]], alpha: float):
        self.data = data
        alpha = number("alpha", alpha, above=0)
        self.share = torch.distributions.Beta(alpha, alpha)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (x, y), (other, label) = self.data[index], self.data[int(torch.randint(len(self), ()))]
        share = float(self.share.sample())
        return share * x + (1 - share) * other, y if float(torch.rand(())) < share else label


class _Images(Data):
    """Training and test images that torchvision downloads and reads, and the transforms they go through."""

    source: str  # torchvision's class
    name: str
    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        root: str = "data",
        validation: float = 0.1,
        augment: bool = True,
        cutout: int = 16,
        download: bool = False,
        randaugment: int = 0,
        erase: float = 0.0,
        mixup: float = 0.0,
        reflect: bool = False,
    ):
        """Arguments of CIFAR-10 and CIFAR-100; the others take some of them.

        Args:
            root: folder of the data.
            validation: share of the training images held out to select the best epoch; 0 trains on everything.
            augment: change training images: those of CIFAR are padded by 4 pixels, cropped to 32 × 32 at random,
                flipped, and get Cutout (DeVries & Taylor 2017), as in the SLTT paper.
            cutout: side of the Cutout square in pixels; 0 is no Cutout.
            download: fetch the data into `root` where it is not there.
            randaugment: so many random distortions of magnitude 9 of 30, after the flip (Cubuk et al. 2020).
            erase: probability that a rectangle is set to zero (Zhong et al. 2020).
            mixup: α of a mix of two images with the label of one of them, see `sltt.data.Mixup`; 0 is none.
            reflect: fill the margin of a crop with the image reflected at its edge, instead of zeros.
        """
        super().__init__(validation)
        self.root = folder("root", root)
        self.augment = flag("augment", augment)
        self.cutout = whole_number("cutout", cutout, least=0)
        self.download = flag("download", download)
        self.randaugment = whole_number("randaugment", randaugment, least=0)
        self.erase = number("erase", erase, least=0, most=1)
        self.mixup = number("mixup", mixup, least=0)
        self.reflect = flag("reflect", reflect)
        self.margin: Literal["reflect", "constant"] = "reflect" if reflect else "constant"

    def open(self, train: bool) -> Any:
        """Return the training or test images, not augmented: a dataset of torchvision, `classes` and `targets`."""
        from torchvision import datasets

        try:
            kind, transform = getattr(datasets, self.source), self.transform(False)
            return kind(self.root, train=train, transform=transform, download=self.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self.name} not found, or not whole: looked in {self.root.resolve()}, expected the folder "
                f"{self.layout} there. Get it with --data.download true, or set --data.root."
            ) from error

    def names(self, images: Any) -> Sequence[Any]:
        """Return the samples' names in the split's fingerprint, in their order."""
        return images.targets

    def crop(self, augment: bool) -> list[Any]:
        """Return the transforms that give an image its size."""
        from torchvision.transforms import v2

        return [v2.RandomCrop(32, padding=4, padding_mode=self.margin)] if augment else []

    def transform(self, train: bool) -> Transform:
        """From an image, of PIL or a tensor, to a normalised tensor [C, H, W]; augmented if `train`."""
        from torchvision.transforms import v2

        augment = train and self.augment
        distortions: list[Any] = [v2.RandomHorizontalFlip()] if augment else []
        holes: list[Any] = []
        if augment and self.randaugment:
            distortions.append(v2.RandAugment(self.randaugment))
        if augment and self.cutout:
            holes.append(partial(clear_square, side=self.cutout))
        if augment and self.erase:
            holes.append(v2.RandomErasing(self.erase))
        normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        # plain tensors: with those of v2.ToImage, the transforms take half as long again
        return v2.Compose([v2.PILToTensor(), *self.crop(augment), *distortions, *normalised, *holes])

    def read(self, path: Path, steps: int) -> Tensor:
        """Read an image as the test images are."""
        return super().read(path, steps) if path.suffix == ".npy" else self.transform(False)(decode(str(path)))

    def load(self, steps: int) -> Splits:
        plain, test = self.open(True), self.open(False)
        if test.classes != plain.classes:
            differ = sorted(set(test.classes) ^ set(plain.classes))
            classes = "the classes of the training and the test images"
            raise ValueError(f"{classes} differ: {', '.join(differ[:5])}; give both the same folders")
        return self.split_images(plain, test, [*self.names(plain), *self.names(test)])

    def split_images(self, plain: Any, test: Any, names: Sequence[Any]) -> Splits:
        """Return the splits of images, with `names` in the fingerprint."""
        augmented = copy(plain)
        augmented.transform = self.transform(True)
        classes = len(plain.classes)
        splits = self.split(plain, plain.targets, test, names, augmented=augmented, static=True, classes=classes)
        return replace(splits, train=Mixup(splits.train, self.mixup)) if self.augment and self.mixup else splits


class CIFAR10(_Images):
    """CIFAR-10 (Krizhevsky 2009): static images [3, 32, 32], normalised; the official test images."""

    source, name = "CIFAR10", "CIFAR-10"
    layout = "cifar-10-batches-py of the Python version"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100(_Images):
    """CIFAR-100 (Krizhevsky 2009): static images [3, 32, 32], normalised; the official test images."""

    source, name = "CIFAR100", "CIFAR-100"
    layout = "cifar-100-python of the Python version"
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)


class ImageFolder(_Images):
    """Any folder of images, `root/{train,test}/CLASS/*`: static images [3, size, size], normalised.

    Where there is no `test`, `val` is taken, as in ImageNet. With a share as `test`, the images are `root/CLASS/*`, and
    that share of each class tests. A training image is a random resized crop, flipped at
    random. The others are resized to 8/7 of `size` and cropped in the centre. For images of up to 64 pixels that have
    this size already, give `crop_padding`: training crops come out of a margin, and other images are only resized.

    Args:
        root: folder of the data.
        size: height and width of the images that the network sees, in pixels.
        crop_padding: instead of the random resized crop, crop out of a margin of so many pixels, as for CIFAR.
        cutout: side of the Cutout square in pixels; 0 is no Cutout.
        test: share of the images of `root/CLASS/*` to test on; 0 for folders train and test.
        kwargs: `validation` and augmentations as for `sltt.data.CIFAR10`.
    """

    mean = (0.485, 0.456, 0.406)  # of ImageNet
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        size: int = 224,
        crop_padding: int | None = None,
        cutout: int = 0,
        test: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(root, cutout=cutout, download=False, **kwargs)
        self.test = number("test", test, least=0, below=1)
        self.size = whole_number("size", size, least=1)
        self.crop_padding = None if crop_padding is None else whole_number("crop_padding", crop_padding, least=0)
        if self.reflect and (crop_padding is None or crop_padding >= size):
            raise ValueError(f"reflect=True needs a crop_padding smaller than size={size}, got {crop_padding}")

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, of the folders that are there."""
        home = self.root if self.test else self.root / "train"
        return sorted(_folders(home)) if home.is_dir() else []

    def load(self, steps: int) -> Splits:
        if not self.test:
            return super().load(steps)
        if split := _folders(self.root) & {"train", "test", "val"}:
            raise ValueError(f"test={self.test} splits {self.root}/CLASS/*, and it has {min(split)}: leave test out")
        plain = self._open(self.root)
        return self.split_images(plain, hold_out(plain.targets, self.test)[1], self.names(plain))

    def open(self, train: bool) -> Any:
        names = ("train",) if train else ("test", "val")
        homes = [self.root / name for name in names if (self.root / name).is_dir()]
        if not homes:
            raise FileNotFoundError(
                f"no images found: looked in {self.root.resolve()}, expected train/CLASS/* and {{test,val}}/CLASS/*. "
                "Set --data.root; or --data.test 0.2, where it holds CLASS/*, without train and test."
            )
        # a test folder without labels may lie beside val
        home = next((path for path in homes if train or _folders(path) & _folders(self.root / "train")), homes[0])
        return self._open(home)

    def _open(self, home: Path) -> Any:
        """Open a folder of images for every class."""
        from torchvision import datasets

        class Folder(datasets.ImageFolder):
            """Without the folders that begin with a dot."""

            def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
                names = sorted(_folders(Path(directory)))
                return (names, {name: i for i, name in enumerate(names)}) if names else super().find_classes(directory)

        return Folder(str(home), transform=self.transform(False), loader=decode)

    def names(self, images: Any) -> Sequence[Any]:
        return [Path(path).relative_to(images.root).as_posix() for path, _ in images.samples]

    def crop(self, augment: bool) -> list[Any]:
        from torchvision.transforms import v2

        if self.crop_padding is not None:
            resized = v2.Resize((self.size, self.size))
            crop = v2.RandomCrop(self.size, padding=self.crop_padding, padding_mode=self.margin)
            return [resized, crop] if augment else [resized]
        if augment:
            return [v2.RandomResizedCrop(self.size, antialias=True)]
        return [v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size)]


# not EPS, on which Pillow starts Ghostscript
FORMATS = ["BMP", "TIFF", "PPM", "JPEG", "PNG", "GIF", "WEBP"]


def decode(path: str) -> Tensor:
    """Return the RGB image [3, H, W] in a file, straight to a tensor."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import pil_to_tensor
    from torchvision.transforms.v2.functional import to_dtype

    try:
        return to_dtype(decode_image(path, ImageReadMode.RGB), torch.uint8, scale=True)  # where it has 16 bits
    except RuntimeError as error:
        with suppress(Exception), Image.open(path, formats=FORMATS) as image:  # what decode_image does not read
            if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):  # of 16 bits
                return (pil_to_tensor(image).int() >> 8).byte().repeat(3, 1, 1)
            if image.mode not in ("I", "F"):  # of unknown range
                return pil_to_tensor(image.convert("RGB"))
        raise ValueError(f"{path} does not decode as an image: {error}; restore it, or save 8 or 16 bits") from error


def _folders(home: Path) -> set[str]:
    """List the folders of classes; those that begin with a dot, such as a cache, are none."""
    return {path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")}
