"""What every script needs and knows no diffusion: errors, processes, downloads, files."""
