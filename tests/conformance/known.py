"""The tests of diffusers that do not pass for our classes, and why."""

PROCESSORS = "attention is scaled_dot_product_attention; there are no attention processors to exchange"
IP_ADAPTER = "no IP-Adapter"
NAMES = "the test expects the names of diffusers' blocks"

KNOWN = {
    "IPAdapter::": IP_ADAPTER,
    "test_fuse_unfuse_qkv_projections": PROCESSORS,
    "test_get_set_processor": PROCESSORS,
    "test_attention_processor": PROCESSORS,
    "test_special_attn_proc": PROCESSORS,
    "test_custom_diffusion": PROCESSORS,
    "test_encode_prompt_works_in_isolation": "the test reads the source of encode_prompt, in diffusers' folder",
    "test_stable_diffusion_long_prompt": "the test counts the characters of diffusers' log; ours says it in its own",
    "test_gradient_checkpointing_is_applied": NAMES,
}
"""A part of a test's class and name, and why such tests do not pass."""


def reason(test: str) -> str | None:
    return next((why for part, why in KNOWN.items() if part in test), None)
