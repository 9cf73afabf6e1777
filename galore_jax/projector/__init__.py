"""Into the subspace and back: bases, when and how they are made and kept, gradients, updates."""
