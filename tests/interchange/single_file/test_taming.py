"""The transformers of Taming Transformers' checkpoints, against what the released code gives for the same weights.

Its code was run beside ours: logits of random weights agree to 2e-15 in float64, and both draw the same codes. Here the
names and shapes are written down once more, and some of the logits that it gave for `weights`.
"""

import math
from pathlib import Path

import pytest
import released_taming
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.models import TokenTransformer, VQModel
from latentdiff.pipelines import ClassTokenPipeline

WIDTH, TOKENS, PLACES = 8, 11, 12
CODES = torch.arange(9).mul(7).remainder(11).view(1, 3, 3)
CLASS_2 = [
    1.402930,
    -1.036953,
    -3.011381,
    -3.634096,
    -2.625580,
    -0.438525,
    1.945370,
    3.456050,
    3.415419,
    1.841715,
    -0.558677,
    1.402858,
    -1.057121,
    -3.042591,
    -3.662339,
    -2.638179,
    -0.429825,
    1.971465,
    3.487826,
    3.438613,
    1.845916,
    -0.575354,
]
FIRST_TOKEN = [
    1.400514,
    -1.039561,
    -3.013010,
    -3.634014,
    -2.623825,
    -0.435884,
    1.947711,
    3.457041,
    3.414615,
    1.839476,
    -0.561345,
    1.401996,
    -1.058194,
    -3.043393,
    -3.662511,
    -2.637643,
    -0.428821,
    1.972485,
    3.488405,
    3.438491,
    1.845148,
    -0.576424,
]
"""Of the third and of the last code of `CODES`: of class 2, and where the token 0 stands before."""


def weights(changes: dict[str, Tensor | None] | None = None) -> dict[str, Tensor]:
    found = released_taming.weights(TOKENS, WIDTH, PLACES)
    return {name: tensor for name, tensor in {**found, **(changes or {})}.items() if tensor is not None}


def read(file: Path, changes: dict[str, Tensor | None], **options: int) -> TokenTransformer:
    torch.save({"state_dict": weights(changes), "global_step": 3}, file)
    return TokenTransformer.from_single_file(file, allow_pickle=True, **{"heads": 2, **options})


@torch.no_grad()
def test_it_gives_what_the_released_code_gives(tmp_path: Path) -> None:
    of_classes = read(tmp_path / "a.ckpt", {}, num_classes=4)
    logits = of_classes(CODES, class_labels=torch.tensor([2]))[0].flatten(1).T
    torch.testing.assert_close(logits[[2, 8]].flatten(), torch.tensor(CLASS_2), atol=2e-5, rtol=2e-5)
    logits = read(tmp_path / "a.ckpt", {})(CODES)[0].flatten(1).T
    torch.testing.assert_close(logits[[2, 8]].flatten(), torch.tensor(FIRST_TOKEN), atol=2e-5, rtol=2e-5)


def test_a_saved_model_of_classes_draws_the_same_with_and_without_its_cache(tmp_path: Path) -> None:
    codebook = torch.randn(9, 3)  # two tokens of the eleven are no codes
    transformer = read(tmp_path / "a.ckpt", {"first_stage_model.quantize.embedding.weight": codebook}, num_classes=4)
    assert (transformer.codes, transformer.grid) == (9, (3, 3))
    vqvae = VQModel(num_vq_embeddings=9, sample_size=3, norm_num_groups=8, block_out_channels=(8,))
    ClassTokenPipeline(transformer, vqvae).save_pretrained(tmp_path / "folder")
    pipeline = ClassTokenPipeline.from_pretrained(tmp_path / "folder")
    assert pipeline.transformer.config.label_first
    codes = pipeline([1, 3], temperature=0, output_type="latent").images[:, 0]  # (2, 3, 3)
    with torch.no_grad():
        logits = pipeline.transformer(codes, class_labels=torch.tensor([1, 3]))
    assert torch.equal(logits.argmax(1), codes)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"transformer.pos_emb": None}, {}, "no weights of the names of Taming Transformers' transformer"),
        ({"transformer.blocks.1.attn.key.bias": None}, {}, r"blocks\.1\.attn\.key\.bias is missing"),
        ({"transformer.blocks.1.attn.key.bias": torch.zeros(7)}, {}, r"query\.bias should have the shape \[24\]"),
        ({"transformer.blocks.0.more": torch.zeros(2)}, {}, r"blocks\.0\.more has no place"),
        ({"transformer.ln_f.bias": torch.full((8,), math.nan)}, {}, "not finite"),
        ({"cond_stage_model.encoder.conv_in.weight": torch.zeros(2)}, {}, "by the codes of another picture"),
        ({"permuter.forward_shuffle_idx": torch.arange(9)}, {}, "not in raster order"),
        ({"transformer.blocks.0.attn.mask": torch.ones(1, 1, 12, 12)}, {}, "first tokens see later ones"),
        ({}, {"heads": 3}, "8 wide, and heads=3 do not divide it"),
        ({}, {"num_classes": 12}, "knows 11 tokens, and there are 12 classes"),
        ({}, {"sample_size": 4}, "12 places, which sample_size=4 does not fit"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], options: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "a.ckpt", changes, **options)


def test_a_safetensors_file_is_read_and_a_pickle_only_if_asked_for(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    assert TokenTransformer.from_single_file(tmp_path / "a.safetensors", heads=2).codes == TOKENS
    torch.save(weights(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is a pickle, which is only read if asked for"):
        TokenTransformer.from_single_file(tmp_path / "a.ckpt", heads=2)


def test_a_label_stands_first_in_raster_order_alone() -> None:
    with pytest.raises(ValueError, match="label_first=True is for order='raster' with num_classes"):
        TokenTransformer(11, 3, "masked", 1, 2, 4, num_classes=3, label_first=True)
    assert "label_first" not in TokenTransformer(11, 3, "raster", 1, 2, 4).config
