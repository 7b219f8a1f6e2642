"""The device daemon: the only place that imports torch, transformers, peft and bitsandbytes."""
