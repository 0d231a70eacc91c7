"""Files and their contents: plain trees, safetensors, recipes, example inputs."""
