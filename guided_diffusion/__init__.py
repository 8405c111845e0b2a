"""guided-diffusion reborn: train, guide, sample and score image diffusion models."""
