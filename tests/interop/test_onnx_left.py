"""`from_onnx`: what it leaves out and why, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import CHANNELS, FILTERS, STEPS, Model

from tvm_sepconv.interop.onnx import from_onnx


def of_two(*between, **attributes):
    model = Model().conv(CHANNELS, 1, 3, group=CHANNELS, **attributes)
    for kind in between:
        model.add(kind)
    return model.conv(FILTERS, CHANNELS, 1).proto()


def changed(edit, **arguments):
    proto = Model().pair(**arguments).proto()
    edit(proto.graph)
    return proto


def quantize(graph):
    name = graph.initializer[0].name
    made = [
        helper.make_tensor("q", TensorProto.INT8, (CHANNELS, 1, 3), [1] * CHANNELS * 3),
        helper.make_tensor("scale", TensorProto.FLOAT, (), [0.1]),
    ]
    del graph.initializer[0]
    graph.initializer.extend(made)
    graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "scale"], [name]))


def as_input(graph):
    graph.input.append(
        helper.make_tensor_value_info(graph.initializer[0].name, TensorProto.FLOAT, (5, 1, 3))
    )
    del graph.initializer[0]


def use_again(graph):
    graph.node.append(helper.make_node("Relu", ["y0"], ["again"]))


def show(graph):
    graph.output.append(helper.make_tensor_value_info("y0", TensorProto.FLOAT, None))


def use_inside(graph):
    """A branch uses a tensor of the graph around it, and has a convolution of its own."""
    inner = [
        helper.make_node("Conv", ["y0", "w0_0"], ["z"], "inner", group=CHANNELS),
        helper.make_node("Relu", ["z"], ["out"]),
    ]
    branch = helper.make_graph(inner, "branch", [], [onnx.ValueInfoProto(name="out")])
    graph.initializer.append(helper.make_tensor("flag", TensorProto.BOOL, (), [True]))
    node = helper.make_node("If", ["flag"], ["r"], then_branch=branch, else_branch=branch)
    graph.node.append(node)


def qlinear():
    inputs = ["x", "s", "z", "w", "s", "z", "s", "z"]
    node = helper.make_node("QLinearConv", inputs, ["y"], "quantized", group=CHANNELS)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, (1, CHANNELS, 9))
    graph = helper.make_graph([node], "graph", [x], [onnx.ValueInfoProto(name="y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


def of_height(height, *shape, **attributes):
    model = Model((1, CHANNELS, height, STEPS)).conv(*shape, group=CHANNELS, **attributes)
    return model.conv(FILTERS, CHANNELS, 1, 1).proto()


LEFT = {
    "nothing after": (lambda: Model().conv(5, 1, 3, group=5).proto(), "node0: 'y0' is an output"),
    "activation between": (lambda: of_two("Relu"), r"node0: 'node1' \(Relu\) follows: the fused"),
    "something between": (lambda: of_two("Neg"), r"node0: 'node1' \(Neg\) follows, not a poin"),
    "grouped": (
        lambda: Model((1, 6, 9)).conv(6, 3, 3, group=2).conv(4, 6, 1).proto(),
        "node0: it is grouped but not depthwise: group=2, input channels=6",
    ),
    "wide": (
        lambda: Model().conv(5, 1, 3, group=5).conv(7, 5, 3).proto(),
        r"node0: 'node1' follows, which is not pointwise: weight \(7, 5, 3\)",
    ),
    "strided": (
        lambda: Model().conv(5, 1, 3, group=5).conv(7, 5, 1, strides=[2]).proto(),
        "which is not pointwise.*stride 2",
    ),
    "padded": (
        lambda: Model().conv(5, 1, 3, group=5).conv(7, 5, 1, pads=[1, 0]).proto(),
        r"which is not pointwise.*padding \(1, 0\)",
    ),
    "same lower": (
        lambda: of_two(auto_pad="SAME_LOWER", strides=[2]),
        "node0: its auto_pad=SAME_LOWER with strides depends on the number of steps",
    ),
    "negative pads": (lambda: of_two(pads=[-1, 0]), r"its padding \[-1, 0\] is negative"),
    "2-D": (lambda: of_height(9, 5, 1, 3, 3), "node0: it is 2-D, with a weight of shape"),
    "high": (lambda: of_height(9, 5, 1, 1, 3), "node0: it is 2-D"),
    "padded height": (
        lambda: of_height(1, 5, 1, 1, 3, pads=[1, 0, 1, 0]),
        "its padding .* not along the steps",
    ),
    "quantized": (qlinear, r"quantized: it is quantized \(QLinearConv\)"),
    "dequantized": (lambda: changed(quantize), "node0: its weight 'w0_0' is quantized"),
    "not constant": (lambda: changed(as_input), "node0: its weight 'w0_0' is not constant"),
    "used twice": (lambda: changed(use_again), "node0: 'y0' is used 2 times"),
    "an output": (lambda: changed(show), "node0: 'y0' is an output of the model"),
    "used inside": (lambda: changed(use_inside), r"inner: it lies in a branch or loop \(If\).*"
                    "node0: 'y0' is used 3 times"),
    "training norm": (
        lambda: Model().conv(5, 1, 3, group=5).norm(5, training_mode=1).conv(7, 5, 1).proto(),
        "node0: 'node1' takes its statistics from each batch",
    ),
    "too far": (lambda: of_two(dilations=[2**24]), "node0: .*reach too far for a compiled kernel"),
    "dtypes": (
        lambda: changed(lambda graph: graph.initializer[1].CopyFrom(
            numpy_helper.from_array(np.zeros((FILTERS, CHANNELS, 1)), "w1_0"))),
        "node0: 'node1' has another dtype, float64",
    ),
    "integers": (
        lambda: changed(lambda graph: graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.zeros((CHANNELS, 1, 3), np.int32), "w0_0"))),
        "node0: its weight is of int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_out_and_why(kind):
    make, message = LEFT[kind]
    with pytest.raises(
        ValueError, match=rf"(?s)`from_onnx` found no Conv.*a ModelProto.*{message}"
    ):
        from_onnx(make())


def test_what_is_left_out_beside_layers_is_told():
    model = Model().conv(5, 1, 3, group=5).add("Relu").conv(5, 5, 1).pair()
    with pytest.warns(
        UserWarning, match=r"left these convolutions out:\n  node0: 'node1' \(Relu\)"
    ):
        assert list(from_onnx(model.proto())) == ["node3"]


def test_a_training_norm_after_is_no_part():
    model = Model().pair()
    (right,) = from_onnx(model.proto()).values()
    (layer,) = from_onnx(model.norm(FILTERS, training_mode=1).add("Relu").proto()).values()
    assert layer.get_config()["activation"] == "linear"
    np.testing.assert_array_equal(layer.bias.numpy(), right.bias.numpy())


def test_older_opsets_are_refused():
    with pytest.raises(ValueError, match=r"opset 13 or newer, but it is of 12.*convert_version"):
        from_onnx(Model().pair().proto(12))


def test_empty_models_are_refused():
    with pytest.raises(ValueError, match=r"it has no nodes or no opset. Received: a ModelProto"):
        from_onnx(onnx.ModelProto())


def test_without_onnx_the_extra_is_named():
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from tvm_sepconv.interop.onnx import from_onnx\n"
        "try:\n    from_onnx('model.onnx')\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tvm-sepconv[onnx]'" in run.stdout
