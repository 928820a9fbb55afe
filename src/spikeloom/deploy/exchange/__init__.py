"""Networks for other tools: the traced graph, folded norms, NIR and ONNX."""
