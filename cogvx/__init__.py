"""CogVideoX in thin torch, on the ops of cogvx_kernels."""
