"""UniPic-2: two models whose pictures are painted as DeepGen's, from other readings of the prompt."""
