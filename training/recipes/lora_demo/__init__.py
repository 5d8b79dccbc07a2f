"""Twenty drawn pictures in one style, for a LoRA that teaches it to the packaged model."""
