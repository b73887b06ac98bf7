"""The embedded platform: LoRA on the machine (or Ray worker) that runs the trial, with PyTorch, transformers and PEFT.

    platform = LocalPlatform(Path("runs/local"))
    job = platform.submit_training("3f9a-lora", "smollm2-135m", Lora(prompt="distilled"), platform.put_dataset(…))
    with platform.chat("smollm2-135m", platform.adapter(job), Generation()) as model:
        model.complete([ChatPrompt(messages=({"role": "user", "content": "Where is my card?"},))])

Importing it is free; PyTorch is imported when a model is first needed, and its absence is one clear PlatformError.
"""

from flywheel_ray.platforms.local.platform import LocalPlatform

__all__ = ["LocalPlatform"]
