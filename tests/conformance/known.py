"""The tests of diffusers that do not pass for our classes, and why."""

IP_ADAPTER = "no IP-Adapter"
PROCESSORS = "attention is scaled_dot_product_attention; there are no attention processors to exchange"
SIZES = "a PIL image far from the size of training is brought near it, and the test's are half as large"
UPCAST = "in half precision an autoencoder with force_upcast is in float32 from the beginning, and not while it runs"
NAMES = "the test looks for classes or attributes inside diffusers' blocks; ours are other classes"
PICKLES = "the test wants the weights in a pickle; here they go into safetensors files only"

KNOWN = {
    "IPAdapter::": IP_ADAPTER,
    "test_ip_adapter": IP_ADAPTER,
    "PipelineFastTests::test_pipeline_signature": IP_ADAPTER,
    "ImgPipelineFastTests::test_pt_np_pil_inputs_equivalent": SIZES,
    "RefinerOnlyPipelineFastTests::test_pt_np_pil_inputs_equivalent": SIZES,
    "test_dtype_alias": UPCAST,
    "test_dtype_dict": UPCAST,
    "StableDiffusionXLPipelineFastTests::test_freeu": NAMES,
    "test_get_set_processor": PROCESSORS,
    "test_attention_processor": PROCESSORS,
    "test_special_attn_proc": PROCESSORS,
    "test_custom_diffusion": PROCESSORS,
    "test_gradient_checkpointing_is_applied": NAMES,
    "TestStableDiffusionPipeline::test_freeu_disabled": NAMES,
    "StableDiffusion2PipelineFastTests::test_freeu": NAMES,
    "test_stable_diffusion_xl_inpaint_mask_latents": "the test calls a private method of diffusers' pipeline",
    "test_asymmetrical_unet": "the test's config has depths for two layers of a block with one, which is an error here",
    "ImageVariationPipelineFastTests::test_save_load_optional_components": "the feature extractor is optional here: "
    "without one pictures are tensors, and the test gives none",
    "UpscalePipelineFastTests::test_stable_diffusion_upscale": "diffusers' upscaler puts 0.08333 in the place of the "
    "autoencoder's scaling_factor; ours takes the config's",
    "test_raises_warning_for_mask_feature": "mask_feature only warns in diffusers; here it is no argument",
    "test_encode_prompt_works_in_isolation": "the test reads the source of encode_prompt in diffusers' own folder",
    "test_stable_diffusion_long_prompt": "the test counts the characters of diffusers' warning; ours says it otherwise",
    "test_logs_info_when_no_lora_keys_found": "a file without LoRA is an error here, and a line in diffusers' log",
    "test_simple_inference_save_pretrained_with_text_lora": "a pipeline is not saved with LoRAs in it: a folder would "
    "hold the adapter in the place of the text encoder's weights",
    "LoRATests::test_low_cpu_mem_usage_with_loading": PICKLES,
    "test_simple_inference_with_text_denoiser_lora_save_load": PICKLES,
    "test_simple_inference_with_text_lora_save_load": PICKLES,
}
"""A part of a test's class and name, and why such tests do not pass."""


def reason(test: str) -> str | None:
    return next((why for part, why in KNOWN.items() if part in test), None)
