"""The files of a Wan pipeline: names, configs, what is quantized."""
