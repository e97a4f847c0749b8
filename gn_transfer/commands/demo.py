"""The command ``demo``: a bundle in the browser."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import ConfigError, check_range
from gn_transfer.demo.heat_map import Explain, occlusion
from gn_transfer.inference.bundle import Bundle
from gn_transfer.inference.bundle_files import WEIGHTS
from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.load import load_bundle

_EXAMPLES = 8


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer demo``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
    """
    options = create_parser().parse_args(arguments)
    check_range("--port", options.port, low=1, high=65535, open_high=False)
    bundle = load_bundle(options.bundle)
    if options.space is None:
        _check_address(options.host, options.port)
    try:
        from gn_transfer.demo.page import build_page, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"demo needs {error.name}: pip install 'gn-transfer[demo]'.") from error
    examples = [] if options.root is None else _validation_images(bundle, options.root)
    if options.space is not None:
        from gn_transfer.demo.space import write_space

        write_space(bundle, examples, options.space)
        print(f"space {options.space}: push it as a Gradio Space, or try it with python {options.space / 'app.py'}")
        return 0
    if not _is_loopback(options.host):
        print(f"note: everyone who reaches {options.host} can use this page")
    explain, name = _explanation(bundle)
    with TemporaryDirectory() as uploads:
        os.environ.setdefault("GRADIO_TEMP_DIR", uploads)
        serve(build_page(bundle, examples, explain, name), options.host, options.port)
    return 0


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer demo",
        description="Show a bundle in the browser: drop an image, see its classes and what decided, or its mask. The "
        "page can be reached from this machine alone, unless --host says otherwise.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle's folder")
    parser.add_argument(
        "--data.root",
        dest="root",
        metavar="PATH",
        help="where the run's images lie: some of the validation images are offered as examples",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on (default 7860)")
    parser.add_argument(
        "--space",
        type=Path,
        metavar="DIR",
        help="write a folder for a Hugging Face Space instead, which needs no torch",
    )
    return parser


def _check_address(host: str, port: int) -> None:
    """Find out whether an address can be listened on."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror}. Choose another with --port."
        ) from error


def _explanation(bundle: Bundle) -> tuple[Explain | None, str]:
    """Choose how to explain a class: by Grad-CAM where torch, Captum and the weights are there, else by occlusion."""
    if not isinstance(bundle, ClassificationBundle):
        return None, ""
    if (bundle.folder / WEIGHTS).is_file():
        try:
            from gn_transfer.demo.grad_cam import grad_cam
        except ModuleNotFoundError:
            pass
        else:
            return grad_cam(bundle.folder), "Grad-CAM"
    return occlusion(bundle), "occlusion"


def _validation_images(bundle: Bundle, root: str) -> list[Path]:
    """Choose validation images of the run, evenly spaced over the list, which is sorted by class."""
    try:
        from gn_transfer.inference.export_source import evenly_spaced, run_data
    except ModuleNotFoundError as error:
        raise ConfigError(f"--data.root needs {error.name}, which trained the bundle; leave it out.") from error
    data = run_data(bundle.metadata.get("provenance", {}).get("config"), bundle.classes, root)
    return evenly_spaced(data.val_dataset, _EXAMPLES)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
