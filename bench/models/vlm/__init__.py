"""Vision-language models: positions of visual tokens, and the contents of decoder layers."""
