#!/bin/bash
# Trains the packaged model further on a machine with one GPU and no network, in one call:
#   bash training/recipes/emoji/burst/go_on.sh CARRIED OUT SECONDS [more of the options of `burst both`]
# CARRIED has drawings.xz, what an earlier run left (facts.json, unet-*.safetensors) and the folder wheels with what the
# machine lacks (diffusers, resvg_py; timm is not needed). Autoencoder and text encoder are those of the packaged model.
# OUT receives the few-step student, the log and two pages of pictures, 53 MB; OUT-state the denoiser itself, unet-*,
# from which the next run goes on.
set -e
carried=$(realpath "$1") output=$(realpath -m "$2") seconds=$3
shift 3
recipe=latentdiff.training.recipes.emoji
root=$(cd -P "$(dirname "$0")/../../../.." && pwd)
begun=$SECONDS
work=$(mktemp -d)
if [ -d "$carried/wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps --target "$work/site" "$carried"/wheels/*.whl
fi
export PYTHONPATH=$work/site:$root TOKENIZERS_PARALLELISM=false
mkdir "$work/from"
cp "$carried"/facts.json "$carried"/unet-*.safetensors "$work/from"
[ -n "$(ls "$carried"/vae-*.safetensors 2>/dev/null)" ] && cp "$carried"/vae-*.safetensors "$work/from" ||
    cp "$root/latentdiff/weights/emoji/vae/diffusion_pytorch_model.safetensors" "$work/from/vae-0.safetensors"
python3 -m $recipe.burst.pack pack "$carried/drawings.xz" "$work/packed" --no-features
python3 -m $recipe.burst both "$work/packed" "$output" --weights "$work/from" --state "$output-state" \
    --seconds $((seconds - SECONDS + begun)) "$@"
