"""What caches features in eager PyTorch, put onto the pipeline of moving-digits: DeepCache; and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

BRANCHES: Mapping[str, int] = {"up_blocks.2.resnets.0": 0, "up_blocks.1": 1, "up_blocks.0": 4}
"""DeepCache's ``cache_branch_id`` of a cut: 3 · level + layer, level 0 being the one of the highest resolution.

Of that level's up block the package computes the layers up to ``layer`` from the end, and nothing deeper.
"""


def deepcache(pipeline: Any, cut: str, every: int) -> None:
    """Put DeepCache's own hooks onto ``pipeline`` for good."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=every, cache_branch_id=BRANCHES[cut])
    helper.enable()


def _first_block_cache(pipeline: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipeline.unet, FirstBlockCacheConfig(threshold=0.1))


def _first_block_cache_inside(pipeline: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipeline.unet.mid_block.attentions[0], FirstBlockCacheConfig(threshold=0.1))


def _cache_dit(pipeline: Any) -> None:
    import cache_dit

    cache_dit.enable_cache(pipeline)


def _cache_dit_over(name: str) -> Callable[[Any], None]:
    """cache-dit told by hand that the list ``name`` of the UNet holds its blocks, as its documentation has it."""

    def enable(pipeline: Any) -> None:
        import cache_dit

        adapter = cache_dit.BlockAdapter(
            pipe=pipeline,
            transformer=pipeline.unet,
            blocks=getattr(pipeline.unet, name),
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        )
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))

    return enable


ATTEMPTS: Mapping[str, Callable[[Any], None]] = {
    "diffusers' FirstBlockCache on the UNet": _first_block_cache,
    "diffusers' FirstBlockCache on one transformer of it": _first_block_cache_inside,
    "cache-dit on the pipeline": _cache_dit,
    "cache-dit, `BlockAdapter` over `down_blocks`": _cache_dit_over("down_blocks"),
    "cache-dit, `BlockAdapter` over `up_blocks`": _cache_dit_over("up_blocks"),
}
"""Ways to put the other peers onto a UNet."""


def refusals(make: Callable[[], Any]) -> dict[str, str]:
    """What each of :data:`ATTEMPTS` comes to on a pipeline from ``make``: its error, or that it runs."""
    found = {}
    for name, enable in ATTEMPTS.items():
        pipeline = make()
        try:
            enable(pipeline)
            pipeline([3], num_inference_steps=4)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            found[name] = "runs: it belongs into the table"
    return found
