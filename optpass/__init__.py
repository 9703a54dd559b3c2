"""optpass: a compiler-style optimisation pipeline for generative-vision and vision models."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["apply", "capture", "load", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `optpass --help` does not pay for importing torch.
    if name == "load":
        from optpass.runtime.loading import load

        return load
    if name == "load_pipeline":
        from optpass.runtime.loading import load_pipeline

        return load_pipeline
    if name == "capture":
        from optpass.capture.sources import capture

        return capture
    if name == "apply":
        from optpass.pipeline.apply import apply

        return apply
    raise AttributeError(f"module 'optpass' has no attribute {name!r}")
