"""diffusers' VQModel: a VQGAN under other names, its attention written as linear layers."""

from collections.abc import Mapping
from typing import Any

from ibqlab.pretrained.family import Facts, Family, refuse_shapes, register_family, reversed_levels
from ibqlab.pretrained.tokenizer_architecture import Shapes, codebook_config, convolutional_config
from ibqlab.tokenizer import TokenizerConfig

_DECODER = reversed_levels(r"decoder\.up_blocks\.([0-9]+)\.", "decoder.up.{}.")


@register_family("diffusers")
class Diffusers(Family):
    """A folder of config.json and diffusion_pytorch_model.safetensors, or that file alone."""

    title = "a VQModel of the diffusers library"
    protocol = "taming"
    marks = (r"encoder\.down_blocks\.0\.resnets\.0\.", r"quantize\.embedding\.weight$")
    names = (
        (r"^encoder\.down_blocks\.", "encoder.down."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.mid_block\.block\.0\.", ".mid.block_1."),
        (r"\.mid_block\.block\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attn\.0\.", ".mid.attn_1."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.(?:to_q|query)\.", ".q."),
        (r"\.(?:to_k|key)\.", ".k."),
        (r"\.(?:to_v|value)\.", ".v."),
        (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
        (r"^quantize\.embedding\.", "quantizer.codes."),
    )

    def rename(self, key: str, keys: Mapping[str, Any]) -> str:
        """As the rules say, once the decoder's levels are turned round."""
        return super().rename(_DECODER(key, keys), keys)

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """What config.json says of the mathematics must be what this autoencoder does."""
        expected = {"act_fn": "silu", "norm_num_groups": 32, "norm_type": "group"}
        for word, value in expected.items():
            actual = facts.settings.get(word, value)
            if actual != value:
                raise refuse_shapes(self.title, f"its config.json says {word} {actual!r:.40}; only {value!r} is read")
        config = TokenizerConfig(autoencoder=convolutional_config(shapes), quantizer=codebook_config(shapes, "vq"))
        sizes = {
            "num_vq_embeddings": config.quantizer.codebook_size,
            "vq_embed_dim": config.quantizer.code_dim,
            "latent_channels": config.autoencoder.latent_channels,
            "layers_per_block": config.autoencoder.num_res_blocks,
        }
        for word, size in sizes.items():
            said = facts.settings.get(word)
            if said not in (None, size):
                raise refuse_shapes(self.title, f"its config.json says {word} {said!r:.40}; the weights have {size}")
        return config
