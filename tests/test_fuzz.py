"""Whatever is typed or given, it is used as it was meant or refused in one line with its exit code."""

import gzip
import io
import json
import lzma
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax.cli.commands import train
from cnn_jax.cli.parser import parameters_of
from cnn_jax.data.idx import idx_header, read_idx
from cnn_jax.inference.pictures import read_picture
from cnn_jax.inference.preprocess import find_character
from cnn_jax.inference.pretrained import PACKAGED, read_trained
from cnn_jax.pytorch.import_weights import read_torch_file
from cnn_jax.runs.folder import RunFolder, deciding_settings
from cnn_jax.runtime.errors import InputFileError, describe_failure
from tests.digits import DARK_PENS, SHAPES, draw_digit
from tests.helpers import read_digit

# The same examples in every run, with no folder of earlier ones; what a test is given stays the same for all of them.
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
numbers = st.one_of(st.integers(-3, 300), st.integers(), st.floats()).map(str)
# All but the one that waits for other processes, and two that are near one.
OPTIONS = [each.option for each in parameters_of(train) if each.name != "coordinator"] + ["--debugg", "--epoch"]
typed = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(OPTIONS), numbers),
        st.tuples(st.sampled_from(OPTIONS), words),
        st.tuples(st.sampled_from(["--precision"]), st.sampled_from(["float32", "bfloat16", "float64"])),
        st.tuples(st.sampled_from(OPTIONS)),
        st.tuples(words),
    ),
    max_size=4,
)


@fuzz
@given(typed=typed)
def test_a_command_line_is_understood_or_refused_in_one_line(typed, command, small_mnist, tmp_path):
    arguments = [argument for group in typed for argument in group]
    code, out, err = command(
        "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, *arguments, "--dry-run"
    )
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    # 4: a folder's name that the system does not take; 65: a --dataset-dir without the four files.
    assert (code, out, len(errors)) in {(0, "", 0), (2, "", 1), (4, "", 1), (65, "", 1)} or {"-h", "--help"} & set(
        arguments
    ), err
    assert "--debug" in arguments or "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
SOUND = idx_header(IMAGES.shape) + IMAGES.tobytes()


@st.composite
def edited(draw, sound):
    """The bytes of a file with a bit flipped, or some bytes replaced, removed or put in."""
    content = bytearray(sound)
    if draw(st.booleans()):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, draw(st.sampled_from([1, 8, len(content)]))))
        content[start : start + length] = draw(st.binary(max_size=draw(st.sampled_from([0, 1, 8, 64]))))
    return bytes(content)


def read_or_refuse(read, file, content):
    """What is read of a file with this content, or None where it is refused."""
    file.write_bytes(content)
    try:
        return read(file)
    except InputFileError as error:
        complaint, _ = describe_failure(error)
    assert str(file) in complaint
    assert len(complaint.splitlines()) == 1
    return None


@fuzz
@given(content=st.one_of(edited(SOUND), st.binary(max_size=100)))
def test_an_idx_file_is_read_as_it_announces_or_refused(content, tmp_path):
    images = read_or_refuse(read_images, tmp_path / "images-idx3-ubyte", content)
    assert images is None or idx_header(images.shape) + images.tobytes() == content


@fuzz
@given(suffix=st.sampled_from([".gz", ".xz"]), data=st.data())
def test_a_compressed_idx_file_is_read_unchanged_or_refused(suffix, data, tmp_path):
    content = data.draw(edited({".gz": gzip.compress(SOUND, mtime=0), ".xz": lzma.compress(SOUND)}[suffix]))
    images = read_or_refuse(read_images, tmp_path / f"images-idx3-ubyte{suffix}", content)
    assert images is None or (images == IMAGES).all()


def read_images(file):
    return read_idx(file, ndim=3)


@pytest.fixture(scope="module")
def weights():
    """A state_dict, as arrays, and the bytes of its file."""
    torch = pytest.importorskip("torch")
    tensors = {"fc.weight": torch.arange(600.0).reshape(3, 200), "fc.bias": torch.ones(3)}
    file = io.BytesIO()
    torch.save(tensors, file)
    return {name: tensor.numpy() for name, tensor in tensors.items()}, file.getvalue()


@fuzz
@given(data=st.data())
def test_a_file_of_weights_is_read_unchanged_or_refused(data, weights, tmp_path):
    tensors, sound = weights
    read = read_or_refuse(read_torch_file, tmp_path / "weights.pt", data.draw(edited(sound)))
    assert read is None or (
        read.keys() == tensors.keys() and all((read[name] == array).all() for name, array in tensors.items())
    )


@pytest.fixture(scope="module")
def pictures():
    """The bytes of a picture's files by their endings, of a PNG with a palette and of JPEGs with EXIF among them."""
    picture = draw_digit(np.random.default_rng(1), SHAPES[5][0], DARK_PENS[2], "white").resize((60, 80))
    exif = Image.Exif()
    exif[0x0112] = 1
    forms = {
        "rgb.png": (picture, {}),
        "palette.png": (picture.convert("P"), {"transparency": 3}),
        "grey.jpg": (picture.convert("L"), {"exif": exif}),
        "cmyk.jpg": (picture.convert("CMYK"), {"progressive": True, "exif": exif}),
    }
    return {name: picture_bytes(form, name, **options) for name, (form, options) in forms.items()}


def picture_bytes(picture, name, **options):
    content = io.BytesIO()
    picture.save(content, "PNG" if name.endswith("png") else "JPEG", **options)
    return content.getvalue()


@fuzz
@given(name=st.sampled_from(["rgb.png", "palette.png"]), data=st.data())
def test_a_png_is_read_unchanged_or_refused(name, data, pictures, tmp_path):
    (tmp_path / "sound").write_bytes(pictures[name])
    digit = read_or_refuse(read_digit, tmp_path / name, data.draw(edited(pictures[name])))
    assert digit is None or (digit == read_digit(tmp_path / "sound")).all()


@fuzz
@given(name=st.sampled_from(["grey.jpg", "cmyk.jpg"]), data=st.data())
def test_a_jpeg_is_read_as_some_digit_or_refused(name, data, pictures, tmp_path):
    def find(file):
        return find_character(read_picture(str(file)).colours)

    found = read_or_refuse(find, tmp_path / name, data.draw(edited(pictures[name])))  # None for a blot, too
    assert found is None or (found.image.shape, found.image.dtype, found.image.max()) == ((28, 28, 1), np.uint8, 255)


@pytest.fixture(scope="module")
def run_files(trained_run):
    """The sound bytes of a run's files by their names."""
    options = ("--features", 2, 4, "--batch-size", 100, "--seeds", 2, "--validation", 30)
    run = trained_run(*options, epochs=1, reported=False)
    return {name: (run / name).read_bytes() for name in ("config.json", "metrics.jsonl", "result.json")}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def reassigned(draw, sound):
    """A file of one JSON object that has another value under a key, or one key more."""
    values = json.loads(sound)
    values[draw(st.sampled_from(sorted(values)) | words)] = draw(json_values)
    return json.dumps(values).encode()


@fuzz
@given(name=st.sampled_from(["config.json", "metrics.jsonl", "result.json"]), data=st.data())
def test_a_file_of_a_run_is_read_as_its_types_say_or_refused(name, data, run_files, tmp_path):
    def read(file):
        folder = RunFolder(file.parent)
        return {"config.json": folder.read_settings, "metrics.jsonl": folder.read_metrics}.get(
            name, folder.read_result
        )()

    sound = run_files[name]
    content = data.draw(st.one_of(edited(sound), reassigned(sound), json_values.map(json.dumps).map(str.encode)))
    found = read_or_refuse(read, tmp_path / name, content)
    if name == "config.json" and found is not None:
        # What is understood is what can be written and read again.
        RunFolder(tmp_path).write_settings(found)
        assert deciding_settings(RunFolder(tmp_path).read_settings()) == deciding_settings(found)


@fuzz
@given(data=st.data())
def test_a_networks_file_is_read_or_refused(data, tmp_path):
    sound = PACKAGED.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    # Where a byte of the header changes; the weights after it carry no checksum.
    content = data.draw(edited(sound[:end])) + sound[end:]
    network = read_or_refuse(read_trained, tmp_path / "network.safetensors", content)
    assert network is None or network.logits(np.zeros((1, *network.image_shape), np.uint8)).shape == (1, 10)
