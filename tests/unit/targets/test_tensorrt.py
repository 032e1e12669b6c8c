from __future__ import annotations

import pytest
from pydantic import ValidationError

from optkit.errors import BuildError, UsageError
from optkit.models import DimRange, Signature, TensorSpec
from optkit.targets import engine_layers
from optkit.targets.base import WEAK_TYPES
from optkit.targets.onnxruntime_cuda import OnnxRuntimeCudaTarget
from optkit.targets.tensorrt import TensorRtTarget
from optkit.targets.tensorrt_plan import profiles

QDQ = """
g (float[1,4] x, int8[4,4] w) => (float[1,4] y) <float s = {0.1}, int8 z = {0}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    e = DequantizeLinear(w, s, z)
    [product] m = MatMul(d, e)
    [relu] y = Relu(m)
}
"""

# As TensorRT 8.5.3 told of a layer of ResNet-50 on an H100, and as 11 words it
LAYER_8 = {
    "Name": "product + relu",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
    "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
    "Weights": {"Type": "Int8", "Count": 16},
}
LAYER_11 = {
    "Name": "gemm_7",
    "LayerType": "gemm",
    "Inputs": [{"Name": "x", "Datatype": "Half", "Format": "Row major linear"}],
    "Outputs": [],
    "Metadata": "[ONNX Layer: product]\x1e[ONNX Layer: relu]",
}
REFORMAT = {"Name": "Reformatting CopyNode for Input Tensor 0 to product + relu", "LayerType": "Reformat", "Inputs": []}


def test_reads_layers_of_either_wording(onnx_model):
    layers = engine_layers.read_layers({"Layers": [LAYER_8, LAYER_11, REFORMAT]}, onnx_model(QDQ))
    assert [layer.precision for layer in layers] == ["INT8", "FP16", ""]
    assert [layer.nodes for layer in layers[:2]] == [("product", "relu")] * 2
    assert [layer.reformats for layer in layers] == [False, False, True]


def test_weights_that_come_as_an_input_leave_a_layer_in_int8(onnx_model):
    """As TensorRT 8.5.3 told of INT8 weights behind a DequantizeLinear on an H200."""
    fed = {**LAYER_8, "Weights": {"Type": "Float", "Count": 0}}
    fed["Inputs"] = [*LAYER_8["Inputs"], {"Name": "w", "Format/Datatype": "Row major Int8 format"}]
    held = {"Name": "w", "LayerType": "Constant", "Inputs": [], "Outputs": fed["Inputs"][1:]}
    model = onnx_model(QDQ)
    layers = engine_layers.read_layers({"Layers": [fed, held, REFORMAT]}, model)
    assert engine_layers.summary(layers, model)["precisions"] == {"INT8": 1}
    engine_layers.prove(layers, model, ["INT8"])
    with pytest.raises(BuildError, match="INT8 was asked for, and no layer of the engine computes in it"):
        engine_layers.prove(layers[1:], model, ["INT8"])


def test_the_kernel_tells_where_formats_depend_on_shapes(onnx_model):
    """As TensorRT 8.5.3 told of an engine with a dynamic batch on an H200."""
    unknown = {"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}
    dynamic = {
        **LAYER_8,
        "Inputs": [unknown, unknown],
        "Outputs": [unknown],
        "Weights": {"Type": "Float", "Count": 0},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw",
    }
    model = onnx_model(QDQ)
    layers = engine_layers.read_layers({"Layers": [dynamic]}, model)
    assert [layer.precision for layer in layers] == ["INT8"]
    engine_layers.prove(layers, model, ["INT8"])


@pytest.mark.parametrize(
    ("kernel", "precision"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw", "INT8"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x16x32", "FP16"),
        ("sm86_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x8", "FP32"),
    ],
)
def test_a_kernel_tells_what_it_reads_whatever_the_weights_came_as(onnx_model, kernel, precision):
    """Kernels of EfficientNet-Lite0 with a dynamic batch, on an H200."""
    unknown = [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}]
    told = {**LAYER_8, "Inputs": unknown, "Outputs": unknown, "Weights": {"Type": "Float"}, "TacticName": kernel}
    model = onnx_model(QDQ)
    layers = engine_layers.read_layers({"Layers": [told]}, model)
    assert engine_layers.summary(layers, model)["precisions"] == {precision: 1}


def test_hides_nothing_where_the_engine_may_have_nothing_narrower(onnx_model):
    unknown = [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}]
    told = {**LAYER_8, "Inputs": unknown, "Outputs": unknown, "Weights": {"Type": "Half"}}
    model = onnx_model(QDQ)
    for asked, counted in ((["FP16"], {"FP16": 1}), (["FP16", "INT8"], {"FP16 or narrower": 1})):
        built = model.with_record(WEAK_TYPES, {"precisions": asked, "float32": []})
        layers = engine_layers.read_layers({"Layers": [told]}, built)
        assert engine_layers.summary(layers, built)["precisions"] == counted


def test_a_layer_that_hides_its_precision_proves_nothing_and_disproves_nothing(onnx_model, caplog):
    """TensorRT 8.5.3 makes one layer of a whole BERT, of which it tells the border alone (on an H200)."""
    ids = {"Name": "ids", "Format/Datatype": "Row major linear Int32"}
    pooled = {"Name": "pooled", "Format/Datatype": "Row major linear FP16 format"}
    whole = {"Name": "{ForeignNode[a...product]}", "LayerType": "Myelin", "Inputs": [ids, ids], "Outputs": [pooled]}
    model = onnx_model(QDQ)
    layers = engine_layers.read_layers({"Layers": [whole]}, model)
    told = engine_layers.summary(layers, model)
    assert told["precisions"] == {"FP16 or narrower": 1}
    assert told["islands"] == []
    assert engine_layers.prove(layers, model, ["FP16"]) == []
    assert engine_layers.prove(layers, model, ["INT8", "FP16"]) == ["INT8"]
    assert "hides the precision of 1 of 1 layers: that the engine computes in INT8" in caplog.text
    both = engine_layers.read_layers({"Layers": [whole, LAYER_8]}, model)
    assert engine_layers.prove(both, model, ["INT8"]) == []


def test_a_layer_without_formats_is_no_excuse_for_a_precision_that_is_missing(onnx_model):
    model = onnx_model(QDQ)
    shape = {"Name": "[shape]", "LayerType": "ShapeHostToDevice", "Inputs": [], "Outputs": []}
    layers = engine_layers.read_layers({"Layers": [LAYER_11, shape]}, model)
    assert engine_layers.summary(layers, model)["precisions"] == {"FP16": 1, "not told": 1}
    with pytest.raises(BuildError, match=r"\(1 in FP16, 1 not told\)"):
        engine_layers.prove(layers, model, ["INT8"])


@pytest.mark.parametrize("kind", ["Scale", "kgen"])
def test_a_layer_that_only_dequantizes_proves_nothing(onnx_model, kind):
    """As TensorRT 8.5.3 told of depthwise convolutions of EfficientNet-B0 that it computed in FP16 (on an H200)."""
    model = onnx_model(QDQ.replace("e = Deq", "[weight_dequantize] e = Deq"))
    weight = {"Name": "w", "Format/Datatype": "Row major Int8 format"}
    wide = {"Name": "e", "Format/Datatype": "Row major linear FP32"}
    scale = {"Name": "weight_dequantize", "LayerType": kind, "Inputs": [weight], "Outputs": [wide]}
    layers = engine_layers.read_layers({"Layers": [scale, LAYER_11]}, model)
    assert engine_layers.summary(layers, model)["precisions"] == {"FP16": 1}
    with pytest.raises(BuildError, match="INT8 was asked for, and no layer of the engine computes in it"):
        engine_layers.prove(layers, model, ["INT8"])


@pytest.mark.parametrize("change", [{"Name": "weight_dequantize + node_of_y"}, {"Name": "", "Metadata": "[ONNX: q]"}])
def test_a_kernel_some_of_whose_nodes_have_no_names_computes(onnx_model, change):
    model = onnx_model(QDQ.replace("e = Deq", "[weight_dequantize] e = Deq").replace("q = Q", "[q] q = Q"))
    layers = engine_layers.read_layers({"Layers": [{**LAYER_8, **change}]}, model)
    assert engine_layers.prove(layers, model, ["INT8"]) == []


def test_tells_what_computes_in_fp16_although_the_graph_has_it_in_float32(onnx_model):
    layers = engine_layers.read_layers({"Layers": [LAYER_11]}, onnx_model(QDQ))
    assert engine_layers.lowered(layers, ["relu", "elsewhere"]) == ["relu"]
    half = [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}]
    moved = {"Name": "Reformatting CopyNode for Input Tensor 0 to relu", "LayerType": "Reformat", "Inputs": half}
    hidden = {"Name": "{ForeignNode[a...relu]}", "LayerType": "Myelin", "Inputs": half, "Outputs": half}
    for asked in (["FP16", "INT8"], ["FP16"]):
        built = onnx_model(QDQ).with_record(WEAK_TYPES, {"precisions": asked, "float32": ["relu"]})
        other = engine_layers.read_layers({"Layers": [LAYER_8, moved, hidden]}, built)
        assert engine_layers.lowered(other, ["relu"]) == []


def copy_of(name: str) -> dict[str, str]:
    return {"Name": f"Reformatting CopyNode for Output Tensor 0 to {name}", "LayerType": "Reformat"}


def test_finds_what_is_clipped_after_it_was_quantized(onnx_model):
    """The order of the layers of EfficientNet-Lite0 on an H200, where the engine's outputs were noise."""
    model = onnx_model("""g (float[1,4] x) => (float[1,4] y)
      <float s = {0.1}, int8 z = {0}, float o = {0}, float t = {2}> {
        [conv] c = Abs(x) [clip] a = Clip(c, o, t) m = Identity(a) [quantize] q = QuantizeLinear(m, s, z)
        [dequantize] d = DequantizeLinear(q, s, z) [next] y = Abs(d) }""")
    quantize = {"Name": "quantize", "LayerType": "Reformat"}
    alone, with_conv = {"Name": "PWN(clip)", "LayerType": "PointWiseV2"}, {"Name": "conv + PWN(clip)"}
    rest = {"Name": "dequantize + next"}
    for told, found in (
        ([{"Name": "conv"}, quantize, alone, rest], ["clip"]),
        ([{"Name": "conv"}, alone, quantize, rest], []),
        ([with_conv, quantize, rest], []),
        ([{"Name": "conv + PWN(clip) + quantize"}, rest], []),
        ([{"Name": "conv"}, alone, rest], []),
        ([{"Name": "conv"}, {**quantize, "Name": "quantize_clone_0"}, alone, rest], ["clip"]),
        ([{"Name": "conv"}, quantize, alone, copy_of("quantize"), rest], ["clip"]),
        ([with_conv, quantize, copy_of("conv + PWN(clip)"), rest], []),
    ):
        layers = engine_layers.read_layers({"Layers": told}, model)
        assert engine_layers.clipped_numbers(layers, model) == found


def test_tells_islands(onnx_model):
    model = onnx_model(QDQ)
    told = engine_layers.summary(engine_layers.read_layers({"Layers": [LAYER_11, REFORMAT]}, model), model)
    assert told["precisions"] == {"FP16": 1}
    assert told["reformats"] == 1
    assert told["islands"] == ["product"]


def test_finds_the_nodes_of_layers_by_what_was_inspected_or_by_their_names(onnx_model):
    model = onnx_model(QDQ)
    records = {"inspector": engine_layers.summary(engine_layers.read_layers({"Layers": [LAYER_11]}, model), model)}
    names = ["gemm_7", "product + relu", "Reformatting CopyNode for Input Tensor 0 to product + relu", "elsewhere"]
    both = ("product", "relu")
    assert engine_layers.nodes_of_layers(names, records, model) == dict(zip(names, (both, both, both, ()), strict=True))


def test_a_precision_that_is_missing_is_an_error(onnx_model):
    model = onnx_model(QDQ)
    engine_layers.prove(engine_layers.read_layers({"Layers": [LAYER_8]}, model), model, ["FP16", "INT8"])
    with pytest.raises(
        BuildError, match=r"INT8 was asked for, and no layer of the engine computes in it \(1 in FP16\)"
    ):
        engine_layers.prove(engine_layers.read_layers({"Layers": [LAYER_11]}, model), model, ["INT8"])
    with pytest.raises(BuildError, match="tells nothing"):
        engine_layers.prove([], model, ["FP16"])


def test_profiles_come_from_the_dims_or_from_the_recipe():
    spec = TensorSpec("x", "float32", ("N", 3))
    signature = Signature((spec,), (TensorSpec("y", "float32", ("N",)),), {"N": DimRange(1, 4, 8)})
    assert profiles(signature) == [{"x": [[1, 3], [4, 3], [8, 3]]}]
    assert profiles(signature, [{"N": (1, 1, 1)}, {"N": (2, 16, 32)}]) == [
        {"x": [[1, 3], [1, 3], [1, 3]]},
        {"x": [[2, 3], [16, 3], [32, 3]]},
    ]
    with pytest.raises(UsageError, match="`profiles` names the dimension 'M': known: N"):
        profiles(signature, [{"M": (1, 1, 1)}])


def test_a_shape_that_the_data_decide_needs_a_profile():
    found = TensorSpec("y", "int64", (1, "found"))
    assert profiles(Signature((TensorSpec("x", "float32", (4,)),), (found,))) == [{"x": [[4], [4], [4]]}]
    assert profiles(Signature((TensorSpec("x", "float32", (4,)),), ())) == []


def test_refuses_options_that_do_not_exist():
    with pytest.raises(ValidationError, match="less than or equal to 5"):
        TensorRtTarget(optimization_level=9)
    with pytest.raises(ValidationError, match="Extra inputs"):
        TensorRtTarget(precision="fp16")


@pytest.mark.parametrize("target", [TensorRtTarget(), OnnxRuntimeCudaTarget()], ids=lambda target: target.name)
def test_says_what_is_missing_where_it_cannot_run(target):
    availability = target.can_run()
    assert availability.ok or (availability.reason and availability.mend)
