"""The pack's GPU kernels: what each needs, how it is launched, and its Triton source."""
