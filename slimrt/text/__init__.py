"""Text to tokens and back: vocabularies rebuilt from the model file, and chat templates."""
