"""File formats: containers (safetensors, model folders) and the layouts of quantized tensors in them."""
