"""INT8 on the ONNX graph: observers, scales, placement, Q/DQ and the linter."""
