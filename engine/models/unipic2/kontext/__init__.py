"""UniPic2-SD3.5M-Kontext."""
