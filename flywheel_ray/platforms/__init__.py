"""Where students are fine-tuned and answer: one module for each platform behind the `Platform` Protocol.

from flywheel_ray.platforms.local import LocalPlatform
platform = LocalPlatform(Path("runs/local"))
"""
