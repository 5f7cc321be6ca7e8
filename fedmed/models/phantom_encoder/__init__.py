"""A small image encoder that was pretrained on made-up pictures: see MODEL.md. No code."""
