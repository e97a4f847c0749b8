"""Reading, verifying and running bundles; the graph is a tiny one, written by hand."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from PIL import Image

import gn_transfer
from gn_transfer import load_bundle
from gn_transfer.__main__ import main
from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError
from gn_transfer.files import sha256
from gn_transfer.inference.bundle_files import FORMAT_VERSION, GRAPH, METADATA, read_metadata
from gn_transfer.inference.graph_check import check_graph

CLASSES = ["red", "green", "blue"]


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.full((*size, 3), colour, np.uint8)


def test_paths_arrays_and_pillow_images_give_the_same(bundle_dir, tmp_path):
    pixels = flat((10, 60, 20))
    Image.fromarray(pixels).save(tmp_path / "green.png")
    bundle = load_bundle(bundle_dir)
    content = bytearray((tmp_path / "green.png").read_bytes())
    found = bundle.predict([tmp_path / "green.png", pixels, Image.fromarray(pixels), content], top_k=2)
    assert [prediction.path for prediction in found] == [str(tmp_path / "green.png"), None, None, None]
    assert repr(found[0]).startswith("Prediction(label='green', prob=0.9")
    for prediction in found:
        assert (prediction.label, [name for name, _ in prediction.top]) == ("green", ["green", "blue"])
        assert prediction.logits == pytest.approx([1.0, 6.0, 2.0])
        assert prediction.prob == pytest.approx(np.exp(6) / np.exp([1, 6, 2]).sum())


def test_results_keep_their_order_whatever_the_batch(bundle_dir):
    bundle = load_bundle(bundle_dir)
    images = [flat((200, 0, 0)), flat((0, 200, 0)), flat((0, 0, 200))] * 5
    for batch_size in (1, 4, 100):
        assert [p.label for p in bundle.predict(images, batch_size=batch_size)] == CLASSES * 5


def test_threads_share_one_bundle(bundle_dir):
    bundle = load_bundle(bundle_dir, threads=1)
    images = [flat((20 * i % 256, 70 * i % 256, 150 * i % 256), (40 + i, 30)) for i in range(24)]
    alone = [bundle.predict([image], top_k=3)[0].top for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: bundle.predict([image], top_k=3)[0].top, images * 5))
    assert together == alone * 5


def test_images_are_taken_as_they_are_needed(bundle_dir):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield flat((1, 2, 3))

    results = load_bundle(bundle_dir).iter_predict(endless(), batch_size=4)
    next(results)
    assert len(taken) == 8
    results.close()


def test_a_bad_image_raises_or_is_handed_out(bundle_dir, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xffcut")
    bundle = load_bundle(bundle_dir)
    images = [flat((9, 0, 0)), tmp_path / "bad.jpg", tmp_path / "gone.jpg", flat((0, 9, 0))]
    with pytest.raises(BadImageError, match=r"bad\.jpg: corrupt JPEG"):
        bundle.predict(images)
    found = list(bundle.iter_predict(images, batch_size=3))
    assert [type(result).__name__ for result in found] == ["Prediction", "BadImageError", "BadImageError", "Prediction"]
    assert "no such file" in str(found[2])


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), "u1")]
)
def test_arrays_that_are_no_images(bundle_dir, array):
    with pytest.raises(ConfigError, match="give uint8 RGB"):
        load_bundle(bundle_dir).predict([array])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"the image: empty \(0 bytes\)"),
        (b"no image", "the image: not an image: its first bytes are 6e 6f"),
        (b"\xff\xd8\xff\xe0", "the image: corrupt JPEG"),
        (b"\x00\x00\x00\x18ftypavif", "an AVIF image; 12 bytes, truncated or corrupt"),
    ],
)
def test_every_bad_upload_raises_the_same_error(bundle_dir, content, reason):
    with pytest.raises(BadImageError, match=reason):
        load_bundle(bundle_dir).predict([content])


def test_what_is_no_image_at_all(bundle_dir):
    with pytest.raises(ConfigError, match="NoneType is not an image; give a path, the content"):
        load_bundle(bundle_dir).predict([None])


@pytest.mark.parametrize("one", [b"JPEG", bytearray(b"JPEG"), "cat.jpg", Path("cat.jpg"), Image.new("RGB", (4, 4))])
def test_one_image_is_given_as_a_list(bundle_dir, one):
    with pytest.raises(ConfigError, match="give a list"):
        load_bundle(bundle_dir).predict(one)


@pytest.mark.parametrize("key", ["top_k", "batch_size"])
def test_numbers_out_of_range(bundle_dir, key):
    with pytest.raises(ConfigError, match=f"{key}=0 is out of range"):
        load_bundle(bundle_dir).predict([flat((1, 1, 1))], **{key: 0})


def test_a_missing_graph_is_not_ignored(bundle_dir):
    (bundle_dir / GRAPH).unlink()
    with pytest.raises(ConfigError, match="is missing; copy the bundle again"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("name", [GRAPH, "README.md"])
def test_a_changed_byte(bundle_dir, name):
    data = bytearray((bundle_dir / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_dir / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{name} is not the file that was exported .* copy the bundle again"):
        load_bundle(bundle_dir)


def test_a_changed_class_name(bundle_dir):
    path = bundle_dir / METADATA
    path.write_text(path.read_text().replace("green", "greed"))
    with pytest.raises(ConfigError, match=r"bundle.json was changed after the export"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("name", [GRAPH, "README.md"])
def test_a_missing_file(bundle_dir, name):
    (bundle_dir / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/file", "..\\secret", "..", "C:x", "", "a\0.json", "a" * 300 + ".md"]
)
def test_a_path_that_climbs_out(bundle_dir, seal, name):
    (bundle_dir.parent / "secret").write_text("secret")
    seal(bundle_dir, files={GRAPH: sha256(bundle_dir / GRAPH), name: sha256(bundle_dir.parent / "secret")})
    with pytest.raises(ConfigError, match="not a plain name inside the bundle; refused"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("name", ["evil.py", "requirements.txt", "x.so"])
def test_a_file_that_no_export_writes(bundle_dir, seal, name):
    (bundle_dir / name).write_text("")
    seal(bundle_dir, files={GRAPH: sha256(bundle_dir / GRAPH), name: sha256(bundle_dir / name)})
    with pytest.raises(ConfigError, match=f"names the file '{name}', which no export writes; refused"):
        load_bundle(bundle_dir)


def test_a_link_in_a_circle(bundle_dir, capsys):
    (bundle_dir / GRAPH).unlink()
    (bundle_dir / GRAPH).symlink_to(GRAPH)
    for words in (["predict", str(bundle_dir), "x.jpg"], ["report", str(bundle_dir / GRAPH)]):
        assert main(words) == 2
        assert str(bundle_dir) in capsys.readouterr().err


def test_a_link_that_climbs_out(bundle_dir):
    shutil.move(bundle_dir / GRAPH, bundle_dir.parent / GRAPH)
    (bundle_dir / GRAPH).symlink_to(bundle_dir.parent / GRAPH)
    with pytest.raises(ConfigError, match="leads out of the bundle; refused"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "2", None])
def test_a_newer_version(bundle_dir, seal, version):
    seal(bundle_dir, format_version=version)
    with pytest.raises(ConfigError, match=rf"newer gn-transfer \(bundle format {version}, .* update gn-transfer"):
        load_bundle(bundle_dir)


def test_another_crop(bundle_dir, seal):
    seal(bundle_dir, crop_fraction=1.0)
    with pytest.raises(ConfigError, match=r"wants a crop of 1.0"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is corrupt"),
        ("[]", "does not describe"),
        ('{"format": "x"}', "does not describe"),
        ("\xff", "is corrupt"),
    ],
)
def test_metadata_that_is_none(bundle_dir, text, message):
    (bundle_dir / METADATA).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        read_metadata(bundle_dir)


def test_metadata_that_lacks_something(bundle_dir, seal):
    metadata = json.loads((bundle_dir / METADATA).read_text())
    del metadata["classes"], metadata["norm"]
    (bundle_dir / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ConfigError, match="lacks classes, norm"):
        load_bundle(bundle_dir)
    seal(bundle_dir, files={})
    with pytest.raises(ConfigError, match=r"names no model.onnx"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "rgb"}, "no export writes such classes"),
        ({"classes": ["red", 5, "blue"]}, "no export writes such classes"),
        ({"classes": ["red", "\x1b[31mgreen", "blue"]}, "no export writes such classes"),
        ({"classes": ["red", "red", "blue"]}, "no export writes such classes"),
        ({"versions": [1]}, "no export writes such versions"),
        ({"provenance": []}, "no export writes such provenance"),
        ({"classes": ["red", "green"]}, "the graph knows 3 classes and bundle.json names 2"),
        ({"img_size": "8"}, "no export writes such img_size"),
        ({"img_size": -8}, "no export writes such sizes in pixels"),
        ({"img_size": 0}, "no export writes such sizes in pixels"),
        ({"img_size": 10**9}, "no export writes such sizes in pixels"),
        ({"files": [GRAPH]}, "no export writes such files"),
        ({"parity": [1]}, "no export writes such parity"),
        ({"parity": {"metric_bundle": "x"}}, "no export writes such parity"),
        ({"quantization": {}}, "no export writes such quantization"),
        ({"backbone": "x\nsdk: gradio"}, "no export writes such backbone"),
        ({"files": {GRAPH: 5}}, "no export writes such files"),
        ({"task": ["classification"]}, "which this gn-transfer does not know"),
    ],
)
def test_values_that_cannot_be(bundle_dir, seal, changes, message):
    seal(bundle_dir, **changes)
    with pytest.raises(ConfigError, match=message):
        load_bundle(bundle_dir)


def reseal_graph(bundle_dir, seal):
    files = json.loads((bundle_dir / METADATA).read_text())["files"]
    seal(bundle_dir, files={**files, GRAPH: sha256(bundle_dir / GRAPH)})


def test_values_in_another_file_are_refused(bundle_dir, seal):
    graph = onnx.load(bundle_dir / GRAPH)
    for tensor in graph.graph.initializer:  # onnx moves raw bytes only
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(graph, bundle_dir / GRAPH, save_as_external_data=True, location="w.bin", size_threshold=0)
    reseal_graph(bundle_dir, seal)
    with pytest.raises(ConfigError, match="keeps values in another file"):
        load_bundle(bundle_dir)


def test_values_in_another_file_are_refused_however_they_are_written(tmp_path):
    """Protobuf may write the fields of a message in any order, and numbers with more bytes than they need."""
    entry = b"\x12\x05w.bin" + b"\x0a\x08location"  # value, then key
    tensor = bytes([13 << 3 | 2, len(entry)]) + entry
    sparse = bytes([1 << 3 | 2, len(tensor)]) + tensor
    for content in (
        bytes([5 << 3 | 2, len(tensor)]) + tensor,
        bytes([5 << 3 | 2, 0x80 | len(tensor), 0x80, 0]) + tensor,
        bytes([15 << 3 | 2, len(sparse)]) + sparse,
        bytes([5 << 3 | 2, 2, 14 << 3, 1]),  # only said to be in another file
    ):
        (tmp_path / "x.onnx").write_bytes(bytes([7 << 3 | 2, len(content)]) + content)
        with pytest.raises(ConfigError, match="keeps values in another file, which no export does; refused"):
            check_graph(tmp_path / "x.onnx")
    hidden = b"\xba\x80\x80\x80\x10"  # the key of a graph in 33 bits, of which other readers keep 32
    for content in (b"not a graph", b"\x3a\xff\x01", b"\x3a" + b"\xff" * 12, hidden + bytes([len(tensor)]) + tensor):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(ConfigError, match="is no graph of ONNX"):
            check_graph(tmp_path / "x.onnx")


def test_numbers_of_a_fixed_size_are_read(tmp_path):
    external = bytes([13 << 3 | 2, 0])
    tensor = bytes([5 << 3 | 2, len(external)]) + external
    for before in (bytes([3 << 3 | 1]) + bytes(8), bytes([3 << 3 | 5]) + bytes(4)):
        graph = before + tensor
        (tmp_path / "x.onnx").write_bytes(bytes([7 << 3 | 2, len(graph)]) + graph)
        with pytest.raises(ConfigError, match="keeps values in another file"):
            check_graph(tmp_path / "x.onnx")


def test_functions_and_other_parts_of_a_model_are_refused(tmp_path):
    def field(number, content):
        key = number << 3 | 2
        return bytes([key & 0x7F | 0x80, key >> 7] if key > 0x7F else [key]) + bytes([len(content)]) + content

    (tmp_path / "x.onnx").write_bytes(field(25, b""))  # forty that call each other twice are 2^40 nodes
    with pytest.raises(ConfigError, match="holds functions, which can call each other without end"):
        check_graph(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").write_bytes(field(20, field(1, b"")))  # TrainingInfoProto
    with pytest.raises(ConfigError, match="holds a field of the number 20, which no export does"):
        check_graph(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").write_bytes(field(2, b"pytorch") + field(7, b""))
    check_graph(tmp_path / "x.onnx")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("operator", ["Loop", "If", "Scan"])
def test_operators_that_may_never_end_are_refused(bundle_dir, seal, operator, inside):
    graph = onnx.load(bundle_dir / GRAPH)
    node = onnx.helper.make_node(operator, [], ["never"])
    if inside:
        body = onnx.helper.make_graph([node], "body", [], [])
        node = onnx.helper.make_node("Identity", ["images"], ["copy"], then_branch=body)
    graph.graph.node.append(node)
    onnx.save(graph, bundle_dir / GRAPH)
    reseal_graph(bundle_dir, seal)
    with pytest.raises(ConfigError, match=f"holds the operator '{operator}'"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("name", ["logits", "probs"])
def test_a_graph_with_other_outputs(bundle_dir, seal, name):
    graph = onnx.load(bundle_dir / GRAPH)
    node = onnx.helper.make_node("Identity", [name], ["other"])
    graph.graph.node.append(node)
    next(output for output in graph.graph.output if output.name == name).name = "other"
    onnx.save(graph, bundle_dir / GRAPH)
    reseal_graph(bundle_dir, seal)
    with pytest.raises(ConfigError, match="has not the inputs and outputs of a classification"):
        load_bundle(bundle_dir)


def test_numbers_that_are_not_finite(bundle_dir, seal):
    graph = onnx.load(bundle_dir / GRAPH)
    for tensor in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32("nan"), tensor.name))
    onnx.save(graph, bundle_dir / GRAPH)
    reseal_graph(bundle_dir, seal)
    with pytest.raises(ConfigError, match="numbers that are not finite"):
        load_bundle(bundle_dir).predict([flat((250, 0, 0))])


def test_a_pipe_and_deep_json_in_place_of_metadata(bundle_dir):
    (bundle_dir / METADATA).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_bundle(bundle_dir)
    (bundle_dir / METADATA).unlink()
    os.mkfifo(bundle_dir / METADATA)
    with pytest.raises(ConfigError, match=r"it has no bundle\.json"):
        load_bundle(bundle_dir)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(ConfigError, match="not a bundle"):
        load_bundle(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        load_bundle(tmp_path / "gone")


def test_a_graph_that_cannot_be_run(bundle_dir, seal):
    (bundle_dir / GRAPH).write_bytes(b"no graph")
    seal(bundle_dir)
    with pytest.raises(ConfigError, match="is no graph of ONNX"):
        load_bundle(bundle_dir)


def test_one_call_loads_what_a_training_leaves(bundle_dir, tmp_path):
    assert gn_transfer.load(bundle_dir).classes == CLASSES
    module = gn_transfer.TransferClassifier(gn_transfer.ModelConfig("cnn_mnist", "gn", num_groups=4))
    module.build(["cat", "dog"])
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "best.ckpt")
    for path in (tmp_path / "run", tmp_path / "run" / "best.ckpt"):
        loaded = gn_transfer.load(path)
        assert loaded.classes == ["cat", "dog"]
        assert not loaded.training
    with pytest.raises(ConfigError, match="neither a bundle"):
        gn_transfer.load(tmp_path)


def message(number: int, content: bytes = b"") -> bytes:
    """A field that holds a message of fewer than 128 bytes, as protobuf writes it."""
    key = number << 3 | 2
    return bytes([key] if key < 128 else [key & 127 | 128, key >> 7]) + bytes([len(content)]) + content


def test_values_of_attributes_are_looked_at(tmp_path):
    path, elsewhere = tmp_path / "x.onnx", message(13)
    tensor, graph, sparse = (5, elsewhere), (6, message(5, elsewhere)), (22, message(1, elsewhere))
    tensors, graphs, several_sparse = (10, elsewhere), (11, message(5, elsewhere)), (23, message(2, elsewhere))
    for number, content in (tensor, graph, sparse, tensors, graphs, several_sparse):
        path.write_bytes(message(7, message(1, message(5, message(number, content)))))
        with pytest.raises(ConfigError, match="keeps values in another file"):
            check_graph(path)


def test_graphs_are_inside_each_other_at_most_eight_times(tmp_path):
    path, attribute = tmp_path / "x.onnx", message(5, message(6))
    for depth in range(1, 10):
        path.write_bytes(message(7, message(1, attribute)))
        if depth <= 8:
            check_graph(path)
        attribute = message(5, message(6, message(1, attribute)))
    with pytest.raises(ConfigError, match="is no graph of ONNX"):
        check_graph(path)


def test_a_number_has_at_most_ten_bytes(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x3a" + b"\x80" * 10 + b"\0")
    with pytest.raises(ConfigError, match="is no graph of ONNX"):
        check_graph(path)
