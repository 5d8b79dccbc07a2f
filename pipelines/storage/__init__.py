"""Pipelines in folders and single files, LoRAs and embeddings in pipelines, conversion and export."""
