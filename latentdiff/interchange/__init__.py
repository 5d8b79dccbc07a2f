"""Files of other programs, and the packaged models."""

from latentdiff.interchange.folders import (
    check_pipeline_folder,
    check_safetensors,
    find_model,
    packaged_model,
    packaged_models,
)

__all__ = ["check_pipeline_folder", "check_safetensors", "find_model", "packaged_model", "packaged_models"]
