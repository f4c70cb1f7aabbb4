"""Skywork UniPic 1.0."""
