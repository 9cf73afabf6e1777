"""What users copy from: a LLaMA in Flax NNX, its data, and a trainer for it."""
