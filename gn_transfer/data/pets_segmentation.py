"""Oxford-IIIT Pet with its trimaps: which pixels show the animal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.masks import MaskValues
from gn_transfer.data.pets import FOLDER, Pets
from gn_transfer.data.sample import write_sample
from gn_transfer.data.segmentation import SegmentationDataModule

_ANIMAL, _BACKGROUND, _BORDER = 1, 2, 3  # values of a trimap


class PetsSegmentation(SegmentationDataModule, Pets):
    """Oxford-IIIT Pet (Parkhi et al. 2012) for segmentation: the classes background and pet, by the official lists.

    A trimap also marks the border between the two, where annotators differ. By default it does not count.

    Args:
        root: Folder that holds ``oxford-iiit-pet``, or that folder itself.
        border: What the border is: ignored, or a class of its own.
        download: Fetch the data set (800 MB) if it is not there.
        **options: Those of :class:`gn_transfer.data.SegmentationDataModule`.
    """

    def __init__(
        self,
        root: Path | str = "data",
        border: Literal["ignore", "class"] = "ignore",
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, download=download, **options)
        self.border = border

    def mask_values(self) -> MaskValues:
        """Background and pet, and the border where it is a class."""
        targets = {_BACKGROUND: 0, _ANIMAL: 1}
        if self.border == "ignore":
            return MaskValues(("background", "pet"), targets, frozenset({_BORDER}))
        return MaskValues(("background", "pet", "border"), {**targets, _BORDER: 2}, frozenset())

    def list_fit(self) -> ListedImages:
        """List trainval; validation is cut from it, stratified by breed."""
        return ListedImages(list(self.mask_values().classes), self._with_trimaps(super().list_fit().train), None)

    def list_test(self) -> list[LabeledImage]:
        """List the official test split."""
        return self._with_trimaps(super().list_test())

    def _with_trimaps(self, images: list[LabeledImage]) -> list[LabeledImage]:
        found = []
        for image in images:
            path = Path(image.path)
            trimap = path.parent.parent / "annotations" / "trimaps" / f"{path.stem}.png"
            found.append(image._replace(mask=trimap.as_posix()))
        without = [image for image in found if not (Path(self.root) / image.mask).is_file()]
        if without:
            raise ConfigError(
                f"data.root={self.root}: {len(without):,} of {len(found):,} images have no trimap "
                f"({without[0].mask}); unpack annotations.tar.gz of the data set anew."
            )
        return found


class SegmentationSample(PetsSegmentation):
    """The synthetic animals of :class:`gn_transfer.data.Sample` with their trimaps, written into ``root`` on first use.

    Args:
        root: Folder that the images are written to.
        border: What the border is: ignored, or a class of its own.
        **options: Those of :class:`gn_transfer.data.SegmentationDataModule`; the images (80 px) do not depend on the
            seed.
    """

    NOT_OPTIONS = SegmentationDataModule.NOT_OPTIONS | {"download"}
    WRITTEN = (FOLDER,)

    def __init__(
        self,
        root: Path | str = "data_sample",
        border: Literal["ignore", "class"] = "ignore",
        **options: Any,
    ) -> None:
        super().__init__(root, border, download=False, **options)

    def prepare_data(self) -> None:
        """Write the images unless they are there; Lightning calls it once per machine."""
        write_sample(Path(self.root))
