"""The engine: requests in, images and text out."""
