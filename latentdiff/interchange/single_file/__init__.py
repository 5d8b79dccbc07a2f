"""Checkpoints that hold a whole model in one file, as Stable Diffusion and Latent Diffusion were released.

`checkpoint` finds and opens a file, `names` maps the names of weights both ways, `shapes` infers configs from weights,
`settings` has what weights do not contain, `reading` builds networks from files, `writing` writes files, `adm` reads
DDPM's and ADM's, `dit` DiT's, `taesd` TAESD's.
"""

# ruff: noqa: F401
from latentdiff.interchange.single_file.adm import AdmCheckpoint, read_adm
from latentdiff.interchange.single_file.checkpoint import HEADER, HUB_OPTIONS, ON_THE_HUB, Checkpoint, find_file
from latentdiff.interchange.single_file.dit import is_dit, read_dit
from latentdiff.interchange.single_file.reading import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    clip_tokenizer,
    read_autoencoder,
)
from latentdiff.interchange.single_file.settings import (
    OriginalSettings,
    assumed_settings,
    check_prediction_is_known,
    is_refiner,
    is_sdxl,
    is_stable_diffusion_2,
    scheduler_settings,
    sdxl_scheduler_settings,
)
from latentdiff.interchange.single_file.shapes import autoencoder_kind, text_kind, unet_config, vae_config
from latentdiff.interchange.single_file.taesd import read_taesd, taesd_weights
from latentdiff.interchange.single_file.writing import (
    NoOriginalNamesError,
    autoencoder_alone,
    check_target,
    header_of_parts,
    original_autoencoder,
    original_text_encoder,
    original_text_encoders,
    original_unet,
    plain_config,
    write_checkpoint,
)
