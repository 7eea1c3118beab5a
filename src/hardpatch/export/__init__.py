"""Getting the backbone out: timm, Hugging Face, safetensors, ONNX, torch.export. See :mod:`hardpatch.export.export`."""
