"""From a caption to a picture, as unCLIP: CLIP, a diffusion prior, a decoder, and the pipeline of the three."""
