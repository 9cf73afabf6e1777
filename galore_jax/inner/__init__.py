"""What the inner optimizer cannot know: decay, moments across a refresh, the residual."""
