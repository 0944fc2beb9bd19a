"""Settings that make things small: every registered quantizer, by what its config says, and a tokenizer of digits."""

from ibqlab.quantizers import CHOSEN_STARTS, available_quantizers, quantizer_config

SMALL_DIGITS = {
    "data.source": "digits",
    "data.image_size": 8,
    "tokenizer.autoencoder.channel_multipliers": [1, 1],
    "tokenizer.autoencoder.resolution": 8,
    "tokenizer.quantizer.codebook_size": 32,
}
"""What `builtin/smoke` becomes for 32 codes and 4 × 4 tokens per digit."""


def small_settings(name, codes, dim):
    """About `codes` codes of dimension D, drawn from N(0, 1) unless the method has a start of its own alone."""
    config = quantizer_config({"name": name})
    start = {"codebook_init": "normal"} if config.codebook_init in CHOSEN_STARTS else {}
    return type(config).sized(codes, dim) | start


def accepts(name, **settings):
    """Whether a quantizer takes these settings; each refuses those that its codebook makes meaningless."""
    try:
        quantizer_config({"name": name, **settings})
    except ValueError:
        return False
    return True


def quantizers_that_accept(**settings):
    """Names of the registered quantizers that take these settings."""
    return [name for name in available_quantizers() if accepts(name, **settings)]
