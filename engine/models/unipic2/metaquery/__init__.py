"""UniPic2-MetaQuery."""
