"""A plain training loop over diffusers' classes with latents and text states computed beforehand, as sd-scripts has it.

The step is that of diffusers' ``train_text_to_image.py``: the same losses, clipping, optimizer and average of the
weights, but it takes latents, drawn from the kept posterior, and text states out of memory. `training_side_by_side.py`
runs it.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer


@torch.no_grad()
def encode(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of latents, as they are and mirrored (N, 2, C, h, w), and text states (N, L, D)."""
    vae = AutoencoderKL.from_pretrained(options.model / "vae").to(device)
    text_encoder = CLIPTextModel.from_pretrained(options.model / "text_encoder").to(device)
    tokenizer = CLIPTokenizer.from_pretrained(options.model / "tokenizer")
    prepare = transforms.Compose(
        [
            transforms.Resize(options.resolution),
            transforms.CenterCrop(options.resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    means, deviations, states = [], [], []
    for line in (options.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pixels = prepare(Image.open(options.data / row["file_name"]).convert("RGB"))
        posterior = vae.encode(torch.stack([pixels, pixels.flip(-1)]).to(device)).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        deviations.append(posterior.std * vae.config.scaling_factor)
        tokens = tokenizer(row["text"], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        states.append(text_encoder(tokens.input_ids.to(device))[0][0])
    return torch.stack(means), torch.stack(deviations), torch.stack(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--encoded", type=Path, required=True, help="keeps what is computed beforehand")
    options = parser.parse_args()
    torch.manual_seed(1)
    accelerator = Accelerator(mixed_precision=options.precision)
    device = accelerator.device
    if not options.encoded.is_file():
        torch.save(encode(options, device), options.encoded)
    means, deviations, states = torch.load(options.encoded, map_location=device)
    scheduler = DDPMScheduler.from_pretrained(options.model / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(options.model / "unet")
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=True)
    ema.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, weight_decay=0.01)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unet.train()
    order: list[int] = []
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order = torch.randperm(len(means)).tolist()
        chosen, order = torch.tensor(order[: options.batch]), order[options.batch :]
        mirrored = torch.randint(0, 2, (options.batch,))
        mean, deviation = means[chosen, mirrored], deviations[chosen, mirrored]
        latents = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (options.batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, states[chosen], return_dict=False)[0].float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        accelerator.log({"train_loss": loss.item()}, step=step)


if __name__ == "__main__":
    main()
