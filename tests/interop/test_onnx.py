"""`from_onnx`: layers of models in memory and in files, against ONNX Runtime on the whole model."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("tvm")

import onnx
import onnx.reference
import onnxruntime
from onnx import helper
from onnx_models import CHANNELS, FILTERS, OPSETS, STEPS, Model, normal

from tvm_sepconv.interop import onnx as interop
from tvm_sepconv.interop.onnx import from_onnx


def assert_same(model: Model, opset=OPSETS[0], shape=(2, CHANNELS, STEPS), tolerance=1e-5):
    """The layer does what the whole model does; returns the layer."""
    proto = model.proto(opset)
    onnx.checker.check_model(proto)
    (layer,) = from_onnx(proto).values()
    x = normal(*shape, dtype=model.dtype, seed=9)
    if model.dtype == "float64" or opset > OPSETS[-1]:  # which ONNX Runtime does not run
        session = onnx.reference.ReferenceEvaluator(proto)
    else:
        session = onnxruntime.InferenceSession(proto.SerializeToString())
    (right,) = session.run(None, {"x": x})
    y = layer(x.reshape(shape[0], shape[1], shape[-1]))
    assert y.dtype == right.dtype
    np.testing.assert_allclose(y.reshape(right.shape), right, rtol=tolerance, atol=tolerance)
    return layer


TABLE = {
    "plain": {},
    "kernel 1": {"kernel": 1},
    "pads": {"pads": [1, 1]},
    "uneven pads": {"pads": [3, 0]},
    "stride 2": {"pads": [1, 1], "strides": [2]},
    "dilation 2": {"pads": [2, 2], "dilations": [2]},
    "no bias": {"bias": (False, False)},
    "biases": {"bias": (True, True), "pads": [1, 1]},
    "norm between": {"norms": "between", "pads": [1, 1], "bias": (True, False)},
    "norm after": {"norms": "after", "pads": [1, 1], "bias": (False, False)},
    "norms": {"norms": "between after", "multiplier": 2, "pads": [1, 1]},
    "valid": {"auto_pad": "VALID"},
    "same upper": {"auto_pad": "SAME_UPPER", "kernel": 4},
    "same upper, stride 2": {"auto_pad": "SAME_UPPER", "strides": [2]},
    "same lower": {"auto_pad": "SAME_LOWER", "kernel": 4},
}


@pytest.mark.parametrize("name", TABLE)
def test_outputs_are_those_of_onnx_runtime(name):
    layer = assert_same(Model().pair(**TABLE[name]))
    assert layer.name == "node0" and layer.config.data_format == "channels_first"


@pytest.mark.parametrize("opset", range(OPSETS[0], onnx.defs.onnx_opset_version() + 1))
def test_every_opset(opset):
    """Up to the newest, which ONNX Runtime lags behind."""
    layer = assert_same(Model().pair(norms="between after", pads=[1, 1]).add("Relu"), opset)
    assert layer.get_config()["activation"] == "relu"


@pytest.mark.parametrize(
    ("kind", "attributes", "constants", "keras"),
    [
        ("Relu", {}, (), "relu"),
        ("Clip", {}, (0, 6), "relu6"),
        ("LeakyRelu", {"alpha": 0.2}, (), "leaky_relu"),
        ("Elu", {}, (), "elu"),
        ("Celu", {}, (), "celu"),
        ("HardSwish", {}, (), "hard_silu"),
        ("Sigmoid", {}, (), "sigmoid"),
        ("Tanh", {}, (), "tanh"),
        ("Softplus", {}, (), "softplus"),
        ("Softsign", {}, (), "softsign"),
        ("Gelu", {}, (), "gelu"),
        ("Mish", {}, (), "mish"),
        ("LeakyRelu", {}, (), None),
        ("Elu", {"alpha": 0.5}, (), None),
        ("Gelu", {"approximate": "tanh"}, (), None),
        ("Clip", {}, (0, 5), None),
        ("Erf", {}, (), None),
    ],
)
def test_activations(kind, attributes, constants, keras):
    model = Model().pair(pads=[1, 1]).add(kind, *constants, **attributes)
    opset = {"HardSwish": 14, "Mish": 18, "Gelu": 20}.get(kind, 13)
    (layer,) = from_onnx(model.proto(opset)).values()
    assert layer.get_config()["activation"] == (keras or "linear")
    if keras is not None:  # the function is ONNX Runtime's
        alone = Model((None,)).add(kind, *constants, **attributes).proto(opset)
        z = np.linspace(-9, 9, 301, dtype=np.float32)
        (right,) = onnxruntime.InferenceSession(alone.SerializeToString()).run(None, {"x": z})
        np.testing.assert_allclose(layer.config.activation(z), right, rtol=1e-5, atol=1e-5)


def test_an_activation_and_a_norm_after_it():
    model = Model().pair(pads=[1, 1]).add("Relu")
    layer = assert_same(model)
    model.norm(FILTERS)
    (other,) = from_onnx(model.proto()).values()
    np.testing.assert_array_equal(other.bias.numpy(), layer.bias.numpy())


@pytest.mark.parametrize("height", [1, "height"], ids=str)
def test_two_dimensions_of_height_one(height):
    model = Model(("batch", CHANNELS, height, "steps"))
    model.conv(CHANNELS, 1, 1, 3, group=CHANNELS, pads=[0, 2, 0, 1], strides=[1, 1])
    model.norm(CHANNELS).conv(FILTERS, CHANNELS, 1, 1, bias=True).add("Relu")
    layer = assert_same(model, shape=(2, CHANNELS, 1, STEPS))
    assert layer.config.padding == (2, 1)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_dtypes(dtype):
    model = Model(dtype=dtype).pair(norms="after", pads=[1, 1])
    layer = assert_same(model, opset=15, tolerance=1e-12 if dtype == "float64" else 2e-2)
    assert layer.dtype == dtype


def test_bfloat16_weights():
    pytest.importorskip("ml_dtypes")
    (layer,) = from_onnx(Model(dtype="bfloat16").pair().proto()).values()
    assert layer.dtype == "bfloat16"
    right = normal(CHANNELS, 1, 3) / np.sqrt(3)
    got = layer.depthwise_kernel.numpy()[:, :, 0].T.astype(np.float32)
    np.testing.assert_allclose(got, right[:, 0], rtol=1e-2)


# ---- graphs -------------------------------------------------------------------------------------


def with_constant_nodes(proto):
    for tensor in proto.graph.initializer:
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    return proto


def with_identities(proto):
    """Weights through Identity nodes, as exporters write shared ones, and some after nodes."""
    for tensor in proto.graph.initializer:
        node = helper.make_node("Identity", [tensor.name + "_kept"], [tensor.name])
        proto.graph.node.insert(0, node)
        tensor.name += "_kept"
    return proto


def with_function(proto):
    """The nodes as a function that is called, as newer exporters write modules."""
    constants = [tensor.name for tensor in proto.graph.initializer]
    output = proto.graph.output[0].name
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function(
        "own", "Block", ["x", *constants], [output], list(proto.graph.node), opsets
    )
    del proto.graph.node[:]
    call = helper.make_node("Block", ["x", *constants], [output], "call", domain="own")
    proto.graph.node.append(call)
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto


@pytest.mark.parametrize("change", [with_constant_nodes, with_identities, with_function])
def test_ways_to_write_the_same(change):
    model = Model().pair(norms="between", pads=[1, 1]).add("Relu")
    (right,) = from_onnx(model.proto(17)).values()
    (layer,) = from_onnx(change(model.proto(17))).values()
    for own, other in zip(layer.weights, right.weights, strict=True):
        np.testing.assert_array_equal(own.numpy(), other.numpy())


def test_names_are_those_of_the_nodes():
    model = Model().pair(pads=[1, 1]).conv(CHANNELS, FILTERS, 1, bias=True).pair()
    proto = model.proto()
    for node, name in zip(proto.graph.node, ("/enc/0/dw/Conv", "p", "b", "", "q"), strict=True):
        node.name = name
    layers = from_onnx(proto)
    assert list(layers) == ["/enc/0/dw/Conv", "y3"]
    assert [layer.name for layer in layers.values()] == ["enc.0.dw.Conv", "y3"]
    proto.graph.node[3].name = "/enc/0/dw/Conv"  # as nothing forbids
    assert list(from_onnx(proto)) == ["y0", "y3"]


def test_dropout_and_identity_are_passed_by():
    model = Model().conv(CHANNELS, 1, 3, group=CHANNELS).add("Identity")
    model.conv(FILTERS, CHANNELS, 1).add("Identity").add("Relu")
    assert assert_same(model).get_config()["activation"] == "relu"


def test_the_example_of_the_documentation():
    (example,) = doctest.DocTestFinder().find(from_onnx, "from_onnx", module=interop)
    assert doctest.DocTestRunner().run(example) == (0, 8)


# ---- files --------------------------------------------------------------------------------------


def saved(folder, external=False):
    path = folder / "model.onnx"
    onnx.save_model(
        Model().pair(norms="after").proto(), path, save_as_external_data=external,
        location="weights.bin", size_threshold=0,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_files(kind, external, tmp_path):
    (layer,) = from_onnx(kind(saved(tmp_path, external))).values()
    (right,) = from_onnx(Model().pair(norms="after").proto()).values()
    for own, other in zip(layer.weights, right.weights, strict=True):
        np.testing.assert_array_equal(own.numpy(), other.numpy())


@pytest.mark.parametrize("keep", [0, 1, 40, 300, -1])
def test_truncated_files(keep, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"`model` must be .*Received: model='.*model.onnx'"):
        from_onnx(path)


def test_other_files(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(ValueError, match="must be an ONNX file, but it cannot be read as one"):
        from_onnx(path)
    with pytest.raises(ValueError, match="but it is a folder"):
        from_onnx(tmp_path)
    with pytest.raises(FileNotFoundError, match="but there is none"):
        from_onnx(tmp_path / "other.onnx")
    with pytest.raises(TypeError, match=r"must be a path or an onnx.ModelProto. Received: .*int"):
        from_onnx(3)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_external_data(damage, tmp_path):
    path = saved(tmp_path, external=True)
    weights = tmp_path / "weights.bin"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"in other files|cannot be read"):
        from_onnx(path)


def test_external_data_that_is_not_loaded(tmp_path):
    proto = onnx.load(saved(tmp_path, external=True), load_external_data=False)
    with pytest.raises(ValueError, match="its weight 'w0_0' lies in a file that is not loaded"):
        from_onnx(proto)
