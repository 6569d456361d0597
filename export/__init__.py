"""PyTorch reference model and checkpoints -> ONNX files and table shards."""
