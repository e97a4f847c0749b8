"""The page of ``gn-transfer demo``: drop an image, see what the bundle says of it. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it reports every start to its makers

import cv2
import gradio as gr
import numpy as np

from gn_transfer.data.decode import BadImageError, decode_image
from gn_transfer.data.overlay import class_colors
from gn_transfer.data.preprocess import reduce_image
from gn_transfer.demo.heat_map import Explain, laid_over
from gn_transfer.inference.bundle_files import CARD
from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.image_source import Pixels
from gn_transfer.inference.segmentation import SegmentationBundle

_CLASSES_SHOWN = 5
_EXAMPLE_SIDE = 256
_SEEN_SIDE = 320
_MOST_PIXELS = 4_000_000  # of a segmentation: more would take gigabytes of logits and maps
_LONGEST_SIDE = 1024  # of a segmented image in the page
_KEPT_S = 3600  # uploads in the server's temporary folder


class _Shown(NamedTuple):
    """What shows the answer of a task.

    Attributes:
        outputs: The components.
        answer: Gives the text of the status, and the values of the components, for the path of an image.
        steps: What follows: a function, the components that it takes, and the one that it fills.
    """

    outputs: list[Any]
    answer: Callable[[str], list[Any]]
    steps: list[tuple[Callable[..., Any], list[Any], Any]]


def build_page(
    bundle: ClassificationBundle | SegmentationBundle,
    examples: Sequence[Path] = (),
    explain: Explain | None = None,
    explained_by: str = "",
) -> gr.Blocks:
    """Build the page of a bundle.

    Args:
        bundle: The bundle.
        examples: Images to offer.
        explain: Gives the heat map of a classification; None shows none.
        explained_by: Its name.

    Returns:
        The page, not yet served.
    """
    title = f"{bundle.metadata['backbone']}, {bundle.metadata['norm']}"
    # Names, messages and the card may come from a stranger: they are shown as text, never as HTML or Markdown.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S)) as page:
        gr.HTML(f"<h1>{escape(title)}</h1><p>{escape(_described(bundle))}</p>")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Drop an image here", file_count="single", elem_id="upload")
                if examples:
                    thumbnails = [_reduced(decode_image(path), _EXAMPLE_SIDE) for path in examples]
                    gallery = gr.Gallery(
                        thumbnails,
                        label="Examples",
                        columns=4,
                        height="auto",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="examples",
                    )
            with gr.Column():
                status = gr.HTML(elem_id="status")
                if isinstance(bundle, ClassificationBundle):
                    outputs, answer, steps = _show_classes(bundle, explain, explained_by)
                else:
                    outputs, answer, steps = _show_mask(bundle)

        def answer_file(path: str | None) -> list[Any]:
            try:
                if path is None:
                    return ["", *(None for _ in outputs)]
                said, *values = answer(path)
            except BadImageError as error:
                said, values = f"This file cannot be read: {error.reason}.", [None] * len(outputs)
            return [f"<b>{escape(said)}</b>" if said else "", *values]

        def answer_example(event: gr.SelectData) -> list[Any]:
            known = isinstance(event.index, int) and 0 <= event.index < len(examples)
            return answer_file(str(examples[event.index]) if known else None)

        started = [upload.change(answer_file, upload, [status, *outputs])]
        if examples:
            started.append(gallery.select(answer_example, None, [status, *outputs]))
        for event in started:
            for step, sources, target in steps:
                event.then(step, sources, target)
        if CARD in bundle.metadata["files"]:  # these were verified
            with gr.Accordion("Model card", open=False, elem_id="card"):
                card = (bundle.folder / CARD).read_text(encoding="utf-8", errors="replace")
                gr.Textbox(card, lines=20, max_lines=40, show_label=False, interactive=False)
    return page  # type: ignore[no-any-return]


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve a page until the process is interrupted.

    Args:
        page: The page.
        host: Address of the network device to listen on; 127.0.0.1 is this machine alone.
        port: To listen on.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        max_file_size="100mb",
        footer_links=[],
    )
    print(f"page {address}  (stop it with Ctrl+C)", flush=True)
    page.block_thread()


def _described(bundle: ClassificationBundle | SegmentationBundle) -> str:
    reached, parity = bundle.validation_metric, bundle.metadata["parity"]
    what = "Segments images into" if isinstance(bundle, SegmentationBundle) else "Tells apart"
    names = ", ".join(bundle.classes[:12]) + (
        f", and {len(bundle.classes) - 12} more" if len(bundle.classes) > 12 else ""
    )
    return f"{what} {names}. Validation {parity['metric']} {reached:.1%} on {parity['images']:,} images."


def _show_classes(bundle: ClassificationBundle, explain: Explain | None, explained_by: str) -> _Shown:
    """Lay out what is said of a classified image."""
    square, number = gr.State(), gr.State()
    label = gr.Label(label="Classes", num_top_classes=_CLASSES_SHOWN, elem_id="classes")
    with gr.Row():
        seen = gr.Image(label="What the model sees", interactive=False, elem_id="seen", buttons=[])
        if explain is not None:
            heat = gr.Image(label=f"What decided: {explained_by}", interactive=False, elem_id="heat", buttons=[])

    def answer(path: str) -> list[Any]:
        [prediction] = bundle.predict([path], top_k=_CLASSES_SHOWN)
        pixels = bundle.graph_input(path)
        said = ""
        if not prediction.known:
            said = (
                f"Unknown. The highest probability, {prediction.prob:.1%}, is below the bundle's threshold of "
                f"{bundle.threshold:.1%}."
            )
        return [said, dict(prediction.top), _magnified(pixels), pixels, bundle.classes.index(prediction.label)]

    def show_heat(pixels: Pixels | None, place: int | None) -> Pixels | None:
        if explain is None or pixels is None or place is None:
            return None
        return _magnified(laid_over(pixels, explain(pixels, place)))

    steps = [(show_heat, [square, number], heat)] if explain is not None else []
    return _Shown([label, seen, square, number], answer, steps)


def _show_mask(bundle: SegmentationBundle) -> _Shown:
    """Lay out what is said of a segmented image."""
    colors = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in class_colors(len(bundle.classes)).tolist()]
    areas = gr.Label(label="Area", num_top_classes=_CLASSES_SHOWN, show_heading=False, elem_id="areas")
    image = gr.AnnotatedImage(
        label="Classes of the pixels",
        color_map=dict(zip(bundle.classes, colors, strict=True)),
        elem_id="mask",
        buttons=[],
    )

    def answer(path: str) -> list[Any]:
        image_HWC = decode_image(path)
        height, width = reduce_image(image_HWC, bundle.short_side).shape[:2]
        if height * width > _MOST_PIXELS:
            raise BadImageError(
                path,
                f"{width} x {height} pixels are too many for this page (at most {_MOST_PIXELS // 10**6} million); "
                "gn-transfer predict takes it",
            )
        [segmentation] = bundle.predict([image_HWC])
        pixels = _reduced(image_HWC, _LONGEST_SIDE)
        mask = cv2.resize(segmentation.mask, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        shares = {name: count / segmentation.mask.size for name, count in segmentation.pixels.items()}
        parts = [(mask == place, name) for place, name in enumerate(bundle.classes) if (mask == place).any()]
        return ["", shares, (pixels, parts)]

    return _Shown([areas, image], answer, [])


def _reduced(pixels: Pixels, longest: int) -> Pixels:
    scale = min(1.0, longest / max(pixels.shape[:2]))
    size = [max(1, round(scale * side)) for side in pixels.shape[1::-1]]
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _magnified(square_HWC: Pixels) -> Pixels:
    """Bring a square to a side that is good to look at."""
    side = max(len(square_HWC), _SEEN_SIDE)
    return np.asarray(cv2.resize(square_HWC, (side, side), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
