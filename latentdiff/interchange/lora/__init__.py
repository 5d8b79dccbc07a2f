"""LoRA files in the formats of diffusers, PEFT and kohya: their names, their layers, reading and writing."""
