#!/bin/bash
# Trains the packaged model further on a machine with one GPU and no network, in one call:
#   bash training/recipes/emoji/burst/go_on.sh CARRIED OUT SECONDS [more of the options of `burst both`]
# CARRIED has drawings.xz, what an earlier run left (facts.json, unet-*.safetensors) and the folder wheels with what the
# machine lacks (resvg_py; timm is not needed). Autoencoder and text encoder are those of the packaged model.
set -e
carried=$1 output=$2 seconds=$3
shift 3
recipe=latentdiff.training.recipes.emoji
root=$(cd -P "$(dirname "$0")/../../../.." && pwd)
begun=$SECONDS
export PYTHONPATH=$root TOKENIZERS_PARALLELISM=false
[ ! -d "$carried/wheels" ] || pip install --quiet --no-index --find-links "$carried/wheels" resvg_py
work=$(mktemp -d)
cp "$carried"/facts.json "$carried"/unet-*.safetensors "$work"
[ -n "$(ls "$carried"/vae-*.safetensors 2>/dev/null)" ] && cp "$carried"/vae-*.safetensors "$work" ||
    cp "$root/latentdiff/weights/emoji/vae/diffusion_pytorch_model.safetensors" "$work/vae-0.safetensors"
python -m $recipe.burst.pack pack "$carried/drawings.xz" "$work/packed" --no-features
python -m $recipe.burst both "$work/packed" "$output" --weights "$work" --state "$work/state" \
    --seconds $((seconds - SECONDS + begun)) "$@"
