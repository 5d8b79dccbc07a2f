"""Drawing with a runtime alone: no torch, no transformers, no diffusers is imported."""
