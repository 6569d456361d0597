"""The engines room: ONNX files -> engines for a target, and the runners that execute them."""
