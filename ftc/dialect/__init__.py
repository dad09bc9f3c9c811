"""The ftc:: operators. Importing this package registers all of them with torch.library, each defined in plain PyTorch.

Small ones are CompositeImplicitAutograd: they stand as one node in a captured graph and dissolve in AOTAutograd.
"""

import importlib

__all__ = ["balance", "causal_mask", "gated", "latent_attention", "moe", "rope", "softcap_attention", "token_positions"]

for _name in [*__all__, "chunk_cross_entropy", "chunk_logsumexp", "collectives", "expert_ranks", "fine_linear", "float8_linear", "float8_moe", "fused_moe", "paged_attention", "paged_latent_attention", "quantized_linear", "quantized_moe", "sequence"]:
    try:
        importlib.import_module(f"{__name__}.{_name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{_name}":
            raise
