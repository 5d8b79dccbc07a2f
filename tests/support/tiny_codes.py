"""Files of codes, small enough for a test."""

from pathlib import Path

import torch
from tiny import VAE, bert_parts
from torch import nn

from latentdiff import TokenPipeline, VQModel
from latentdiff.interchange.single_file.dalle import place
from latentdiff.models import DalleAutoencoder, TokenTransformer


def save_codes(folder: Path) -> None:
    """Write a pipeline of codes, ``words``, and DALL-E's autoencoder as a module pickled whole, ``dalle.pkl``."""
    transformer = randomized(
        TokenTransformer(16, 8, num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    )
    vae = VQModel(**VAE, num_vq_embeddings=16)
    TokenPipeline(vae, **bert_parts(), transformer=transformer).save_pretrained(folder / "words")
    torch.save(dalle_module(), folder / "dalle.pkl")


def randomized(transformer: TokenTransformer) -> TokenTransformer:
    """With weights by which words and guidance change what is drawn."""
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return transformer


def dalle_module() -> nn.Module:
    """DALL-E's autoencoder as released, ``encoder`` and ``decoder``."""
    top = nn.Sequential()
    model = DalleAutoencoder(
        block_out_channels=(4, 8), latent_channels=8, num_vq_embeddings=4, code_dim=4, layers_per_block=1
    )
    for key, weight in model.state_dict().items():
        if key == "quantize.embedding.weight":
            put(top, "decoder.blocks.input.w", weight.T[:, :, None, None].contiguous())
            put(top, "decoder.blocks.input.b", torch.zeros(4))
        else:
            put(top, f"{'decoder' if key.startswith('decoder.') else 'encoder'}.{place(key)}", weight)
    return top


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """A parameter in modules in modules, as its name says."""
    head, _, rest = name.partition(".")
    if not rest:
        module.register_parameter(head, nn.Parameter(tensor, requires_grad=False))
        return
    if head not in module._modules:
        module.add_module(head, nn.Sequential())
    put(module.get_submodule(head), rest, tensor)
